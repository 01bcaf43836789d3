"""Folders of images: decoded, and brought to the size that the network takes, by TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kmerge.data.columns import Column, Held
from kmerge.data.dataset import Dataset, Indexed
from kmerge.data.entries import Entry
from kmerge.data.names import Names
from kmerge.errors import DataError, FormatError
from kmerge.methods.registry import Array
from kmerge.store.rawio import why_unreadable

if TYPE_CHECKING:
    from kmerge.data.opening import Reading

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png"})
MOST_PIXELS = 1 << 27
"""An image that declares more is refused before it is decoded."""
MOST_BYTES = 1 << 30
"""A file with more is not read."""
_IGNORED = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Picture:
    """How images become rows of an input.

    Attributes:
        height, width, channels: of a row.
        first: whether the channels come before the places.
        low, high: the values of black and white.
        dtype: of the input layer; whole numbers are rounded to.
    """

    height: int
    width: int
    channels: int
    first: bool
    low: float
    high: float
    dtype: np.dtype[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        places = (self.height, self.width)
        return (self.channels, *places) if self.first else (*places, self.channels)

    def decode(self, data: bytes, what: str) -> Array:
        """One image, shape as told, float32; resized bilinearly, as `keras.utils.image_dataset_from_directory` does.

        Raises:
            FormatError: it is no image, or declares too many pixels.
        """
        import tensorflow as tf

        height, width = image_size(data, what)
        if not 0 < height * width <= MOST_PIXELS:
            raise FormatError(
                f"{what} declares {height:,} × {width:,} pixels, more than the {MOST_PIXELS:,} that are "
                "read: scale it down."
            )
        if data.startswith(b"GIF8") and (pixels := frames(data)) > MOST_PIXELS:
            raise FormatError(
                f"{what} declares {pixels:,} pixels in all of its frames, more than the {MOST_PIXELS:,} that are read: "
                "keep the first one only."
            )
        try:
            with tf.device("CPU"):
                image = tf.io.decode_image(data, channels=self.channels, expand_animations=False)
                array = np.asarray(tf.image.resize(image, (self.height, self.width)), np.float32)
        except (tf.errors.OpError, ValueError) as error:
            raise FormatError(f"{what} cannot be read as an image ({str(error).splitlines()[0]}).") from error
        if (self.low, self.high) != (0, 255):
            array = (self.low + array * ((self.high - self.low) / 255)).astype(np.float32)
        if self.dtype.kind in "iu":
            array = np.rint(array)
        return np.moveaxis(array, -1, 0) if self.first else array


def picture(entry: Entry, pixels: tuple[float, float] | None, size: tuple[int, int] | None, where: str) -> Picture:
    """How images become rows of an input.

    Args:
        entry: the input.
        pixels: values of black and white; None for 0 and 255 where the network rescales by itself, or takes whole
            numbers, else 0 and 1.
        size: height and width of the first image, for an input of any size.
        where: for errors.

    Raises:
        DataError: the input takes no images.
    """
    shape = entry.shape or ()
    last = len(shape) == 4 and shape[3] in (1, 3, 4)
    if len(shape) != 4 or not (last or shape[1] in (1, 3, 4)):
        raise DataError(
            f"The data{where} are images, and input '{entry.name}' takes rows of shape {tuple(shape[1:])}: expected "
            "height, width and 1, 3 or 4 channels. Give arrays."
        )
    channels = shape[3] if last else shape[1]
    places = shape[1:3] if last else shape[2:4]
    height, width = (side or own for side, own in zip(places, size or (None, None), strict=True))
    if not height or not width or not channels:
        raise DataError(f"Input '{entry.name}' takes images of any size: give arrays{where}, all of one size.")
    whole = entry.numpy_dtype.kind in "iu"
    low, high = pixels or ((0, 255) if entry.scaled or whole else (0, 1))
    return Picture(height, width, channels, not last, low, high, entry.numpy_dtype)


def image_size(data: bytes, what: str) -> tuple[int, int]:
    """Height and width that an image declares, without decoding it.

    Raises:
        FormatError: it is no JPEG, PNG, GIF or BMP.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack(">II", data[16:24])
            return height, width
        if data.startswith((b"GIF87a", b"GIF89a")):
            width, height = struct.unpack("<HH", data[6:10])
            return height, width
        if data.startswith(b"BM"):
            width, height = struct.unpack("<ii", data[18:26])
            return abs(height), width
        if data.startswith(b"\xff\xd8"):
            place = 2
            while data[place] == 0xFF:
                marker = data[place + 1]
                if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                    height, width = struct.unpack(">HH", data[place + 5 : place + 9])
                    return height, width
                place += 1 if marker == 0xFF else 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    except (struct.error, IndexError):
        raise FormatError(f"{what} is cut short: write it again.") from None
    raise FormatError(f"{what} is no JPEG, PNG, GIF or BMP.")


def frames(data: bytes) -> int:
    """Pixels of all frames of a GIF, as far as it goes: a decoder unpacks all of them, even for the first."""
    found, place = 0, 13 + _colours(data[10:11])
    while data[place : place + 1] in (b"!", b","):
        if data[place] == ord(","):
            width, height = struct.unpack("<HH", data[place + 5 : place + 9].ljust(4, b"\0"))
            found += width * height
            place += 11 + _colours(data[place + 9 : place + 10])
        else:
            place += 2
        while place < len(data) and data[place]:  # blocks, each with its length in front
            place += 1 + data[place]
        place += 1
    return found


def _colours(flags: bytes) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


@dataclass(frozen=True, eq=False)
class Pictures(Column):
    """Image files, decoded when they are asked for."""

    shape: tuple[int, ...]
    files: Sequence[Path]
    picture: Picture

    def take(self, rows: Array) -> Array:
        found = np.empty((len(rows), *self.picture.shape), np.float32)
        for place, row in enumerate(rows):
            found[place] = self.picture.decode(_content(self.files[row]), _named(self.files[row]))
        return found


def open_images(path: Path, names: Names, reading: Reading, where: str) -> Dataset:
    """Open a folder with one folder of images per class, in the order of their sorted names, or with images only.

    Args:
        path: the folder.
        names: what belongs to what; the classes are labels of all heads.
        reading: the values of pixels.
        where: for errors: " in photos".

    Raises:
        DataError: the folder holds something else, or the network takes no images.
        FormatError: a file is no image.
    """
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    loose = _images(path, strict=False)
    if loose and any(_images(folder, strict=False) for folder in folders):
        raise DataError(
            f"{path} holds images, and folders of images: expected a folder for each class, or images without labels."
        )
    groups = [loose] if loose else [_images(folder, strict=True) for folder in folders]
    files = [file for group in groups for file in group]
    if not files:
        raise FormatError(
            f"{path} is a folder without data: expected a folder of images for each class, images, or tables or "
            "records of one kind."
        )
    if len(names.entries) != 1:
        raise DataError(
            f"The data{where} are images, and the network takes {len(names.entries)} inputs: give arrays under "
            "their names."
        )
    size = image_size(_content(files[0]), _named(files[0]))
    made = picture(names.entries[0], reading.pixels, size, where)
    column = Pictures((len(files), *made.shape), files, made)
    if loose:
        return Indexed(names.entries, (column,), where=where, file=path.name)
    classes = Held.of(np.repeat(np.arange(len(groups)), [len(group) for group in groups]))
    targets = dict.fromkeys(names.labels, classes) if names.targets else {}
    known = tuple(folder.name for folder in folders)
    return Indexed(names.entries, (column,), targets, where=where, file=path.name, classes=known)


def _images(folder: Path, strict: bool) -> list[Path]:
    found = []
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.name.lower() in _IGNORED:
            continue
        if item.suffix.lower() in SUFFIXES and item.is_file():
            found.append(item)
        elif strict:
            raise DataError(
                f"{_named(item)} is no image: expected {', '.join(sorted(SUFFIXES))} in the folder of a class, and "
                "nothing else."
            )
    return found


def _named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise FormatError(f"{_named(path)} has {size:,} bytes, more than {MOST_BYTES:,}: scale it down.")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
