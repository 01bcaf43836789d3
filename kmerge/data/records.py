"""TFRecord files of `tf.train.Example`, also compressed, read by TensorFlow."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from kmerge.data.entries import Entry
from kmerge.data.images import picture
from kmerge.data.names import Names
from kmerge.data.pipeline import untuned
from kmerge.data.streams import Streamed
from kmerge.errors import DataError, FormatError, KmergeError
from kmerge.methods.registry import Array

if TYPE_CHECKING:
    from kmerge.data.dataset import Dataset
    from kmerge.data.opening import Reading

ROWS = 256
"""Records of a block."""
LOOKED_AT = 1000
"""Records at the front by which it is told which features there are."""
LARGEST = 1 << 30
"""Bytes of a record, at most."""
_GZIP = b"\x1f\x8b"
_MARKERS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM")


def is_record(path: Path, head: bytes) -> bool:
    """Whether a file is a TFRecord, by the checksum of its first length."""
    if head.startswith(_GZIP):
        try:
            with path.open("rb") as file:
                head = zlib.decompressobj(31).decompress(file.read(1 << 14), 12)
        except (zlib.error, OSError):
            return False
    return len(head) >= 12 and _checksum(head[:8]) == struct.unpack("<I", head[8:12])[0]


def _checksum(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def open_records(files: Sequence[Path], name: str, names: Names, reading: Reading, where: str) -> Dataset:
    """Open TFRecord files, one after the other; in memory where they are small and needed again.

    Inputs are features of their names: numbers, strings, encoded images, bytes of pixels, or serialised tensors. Labels
    are features `y` and `y_<label>`; one that is absent from a record is missing there. Sample weights are `weights`
    and `weights_<label>`, 1 where absent. Other features are not read.

    Args:
        files: the files, in order.
        name: for people.
        names: what belongs to what.
        reading: the values of pixels.
        where: for errors: " in x.tfrecord".

    Raises:
        DataError: the features do not fit the network.
        FormatError: a file is damaged.
    """
    rows = sum(_count(path) for path in files)
    layout = _Layout(_examples(files), names, reading, where)

    def source(seed: int | None) -> Iterator[Any]:
        import tensorflow as tf

        with tf.device("CPU"):
            for records in _records(files).batch(ROWS):
                yield layout.batch(tf.io.parse_example(records, layout.features))

    stream = Streamed(names.entries, names, source, where, name, (), rows)
    return stream.held() if reading.again else stream


def _count(path: Path) -> int:
    """How many records a file holds; no record is read, and none may be longer than what is there.

    Raises:
        FormatError: the file is damaged.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP
    size = None if zipped else path.stat().st_size
    count = place = 0
    try:
        with gzip.open(path) if zipped else path.open("rb") as opened:
            reader = cast(IO[bytes], opened)
            while head := reader.read(12):
                length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else LARGEST + 1
                place += 16 + length
                if length > LARGEST or (size is not None and place > size):
                    raise FormatError(f"Record {count} of {path.name} is cut short or longer than a gigabyte.")
                if zipped:
                    _skip(reader, length + 4, path, count)
                else:
                    reader.seek(place)
                count += 1
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path.name} cannot be read as a TFRecord ({error}): write it again.") from error
    return count


def _skip(file: IO[bytes], length: int, path: Path, count: int) -> None:
    while length:
        block = file.read(min(length, 1 << 20))
        if not block:
            raise FormatError(f"Record {count} of {path.name} is cut short.")
        length -= len(block)


def _records(files: Sequence[Path]) -> Any:
    import tensorflow as tf

    parts = []
    for path in files:
        with path.open("rb") as file:
            kind = "GZIP" if file.read(2) == _GZIP else ""
        parts.append(tf.data.TFRecordDataset(str(path), compression_type=kind))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.concatenate(part)
    return untuned(whole)


def _examples(files: Sequence[Path]) -> Iterator[Any]:
    import tensorflow as tf

    with tf.device("CPU"):
        for record in islice(iter(_records(files)), LOOKED_AT):
            yield tf.train.Example.FromString(record.numpy())


@dataclass(frozen=True)
class _Feature:
    """A feature as it was first seen: "bytes_list", "float_list" or "int64_list", and how many values."""

    kind: str
    length: int
    value: Any


class _Layout:
    """Which features are which input, and which are labels."""

    def __init__(self, examples: Iterator[Any], names: Names, reading: Reading, where: str) -> None:
        self.where, self.reading, self.entries = where, reading, names.entries
        found: dict[str, _Feature] = {}
        try:
            for example in examples:
                for name, feature in example.features.feature.items():
                    kind = feature.WhichOneof("kind")
                    if name not in found and kind is not None and len(getattr(feature, kind).value):
                        values = getattr(feature, kind).value
                        found[name] = _Feature(kind, len(values), values[0])
        except KmergeError:
            raise
        except Exception as error:
            raise FormatError(
                f"The records{where} are no tf.train.Example ({type(error).__name__}: {error})."
            ) from error
        self.inputs: dict[int, str] = {}
        for name in found:
            if name in names.numbers:
                self.inputs.setdefault(names.numbers[name], name)
        for number, entry in enumerate(self.entries):
            if number not in self.inputs:
                listed = ", ".join(sorted(found)) or "none"
                raise DataError(
                    f"The records{where} have no feature for input '{entry.name}': expected one of "
                    f"{', '.join(sorted(entry.names))}, and they have {listed}."
                )
        self.labels: dict[str, str] = {}
        self.weights: dict[str, str] = {}
        for name, (kind, label) in names.beside.items() if names.targets else ():
            if name in found:
                into = self.labels if kind == "y" else self.weights
                into |= dict.fromkeys(names.labels if label is None else (label,), name)
        self.features = {name: self._input(found[name], self.entries[n]) for n, name in self.inputs.items()}
        for name in self.labels.values():
            self.features[name] = self._label(found[name], name)
        for name in self.weights.values():
            self.features[name] = self._label(found[name], name, 1)
        self.pictures: dict[str, Any] = {}

    def _input(self, feature: _Feature, entry: Entry) -> Any:
        import tensorflow as tf

        sizes: list[int | None] = list(entry.shape[1:]) if entry.shape is not None else [None]
        if feature.kind == "bytes_list" and not entry.is_text:
            return tf.io.FixedLenFeature([], tf.string)
        if sizes.count(None) == 1:  # all records have as many as the first
            known = math.prod(size for size in sizes if size)
            sizes = [feature.length // known if size is None else size for size in sizes]
        if None in sizes:
            raise DataError(f"Input '{entry.name}' takes rows of any size: give arrays{self.where}, all of one size.")
        kinds = {"bytes_list": tf.string, "float_list": tf.float32, "int64_list": tf.int64}
        return tf.io.FixedLenFeature(sizes, kinds[feature.kind])

    def _label(self, feature: _Feature, name: str, absent: int | None = None) -> Any:
        import tensorflow as tf

        if feature.kind == "bytes_list":
            what = "numbers of classes, from 0 on" if absent is None else "sample weights"
            raise DataError(f"Feature '{name}'{self.where} holds text: expected {what}.")
        whole = feature.kind == "int64_list"
        missing: Any = absent if absent is not None else -1 if whole else math.nan
        sizes = [] if feature.length == 1 else [feature.length]
        default = missing if not sizes else [missing] * feature.length
        return tf.io.FixedLenFeature(sizes, tf.int64 if whole else tf.float32, default)

    def batch(self, parsed: Mapping[str, Any]) -> tuple[Any, dict[str, Array], dict[str, Array]]:
        """Inputs by name, labels and sample weights by head."""
        inputs = {}
        for number, entry in enumerate(self.entries):
            array = parsed[self.inputs[number]].numpy()
            if array.dtype.kind == "O" and not entry.is_text:
                array = np.stack([self._row(item, entry) for item in array])
            inputs[entry.name] = array
        labels, weights = (
            {label: parsed[name].numpy() for label, name in names.items()} for names in (self.labels, self.weights)
        )
        return inputs, labels, weights

    def _row(self, data: bytes, entry: Entry) -> Array:
        """A row from bytes: an encoded image, values as they stand in memory, or a serialised tensor."""
        import tensorflow as tf

        sizes = [size for size in (entry.shape or ())[1:] if size is not None]
        known = entry.shape is not None and len(sizes) == len(entry.shape) - 1
        for dtype in (np.dtype(np.uint8), entry.numpy_dtype.newbyteorder("<")):
            if known and len(data) == math.prod(sizes) * dtype.itemsize:
                return np.frombuffer(data, dtype).reshape(sizes)
        what = f"A record{self.where}"
        if data.startswith(_MARKERS):
            if entry.name not in self.pictures:
                self.pictures[entry.name] = picture(entry, self.reading.pixels, None, self.where)
            image: Array = self.pictures[entry.name].decode(data, what)
            return image
        try:
            message = type(tf.make_tensor_proto(0)).FromString(data)
            shape = tuple(int(size.size) for size in message.tensor_shape.dim)
            # One value may stand for any number of them, so that the shape is checked before they are made.
            if (known and math.prod(shape) != math.prod(sizes)) or not 0 <= math.prod(shape) <= 8 * max(len(data), 1):
                raise DataError(
                    f"{what} holds a tensor of shape {shape} for input '{entry.name}': expected "
                    f"{tuple((entry.shape or (None,))[1:])}, and all of its values."
                )
            return np.asarray(tf.make_ndarray(message))
        except KmergeError:
            raise
        except Exception as error:
            raise FormatError(
                f"{what} holds {len(data):,} bytes for input '{entry.name}', which are neither its values, nor an "
                "image, nor a serialised tensor."
            ) from error
