"""Write weights and models: layout first, then numbers in any order from any thread, straight to their bytes."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.errors import MergeError
from kmerge.store.archive import CONFIG, METADATA, WEIGHTS, Asset
from kmerge.store.layout import Layout, add_root_attributes, as_bytes, build_skeleton
from kmerge.store.rawio import Window, read_at, write_at
from kmerge.store.target import check_target, explain, temporary_file, temporary_folder
from kmerge.store.zipread import member_problem
from kmerge.store.zipwrite import ZIP64_FROM, Member, crc32_combine, directory

_ROOM_PER_OBJECT = 4096  # generous: bytes of HDF5's own records per group or tensor
_BLOCK = 1 << 20
Closing = Callable[[], Mapping[str, Any]]
"""Gives what is known only after the tensors."""


class Output:
    """The HDF5 file being written: tensors are filled by flat ranges.

    Args:
        fd: the file, not owned.
        start: where the HDF5 data begin in it.
        layout: what they hold.
        path: the target, for messages.
        sum_up: whether a CRC-32 over the whole will be asked for.
    """

    def __init__(self, fd: int, start: int, layout: Layout, path: Path, sum_up: bool) -> None:
        self.path, self.layout = path, layout
        self._fd, self._start, self._sum_up = fd, start, sum_up
        self._pieces: list[tuple[int, int, int]] = []  # offset, bytes, CRC-32 of each block written
        window = Window(fd, start, 0, writable=True)
        with explain(path):
            self._offsets = build_skeleton(window, layout)
        self.size = window.seek(0, os.SEEK_END)

    def write(self, key: str, start: int, array: np.ndarray) -> None:
        """Write the flat elements [start, start + array.size) of a tensor, once; any thread may.

        Args:
            key: path of the tensor in the layout.
            start: first element.
            array: the elements, of the tensor's type.

        Raises:
            MergeError: if the layout has no such tensor, or the block does not fit it.
            OutputError: if the disk is full.
        """
        spec = self.layout.tensors.get(key)
        if spec is None:
            raise MergeError(f"the layout has no tensor {key!r}.")
        view = as_bytes(array, spec, start, key)
        if not len(view):
            return
        offset = self._offsets[key] + start * array.itemsize
        with explain(self.path):
            write_at(self._fd, self._start + offset, view)
        self._pieces.append((offset, len(view), zlib.crc32(view) if self._sum_up else 0))

    def finish(self) -> int:
        """Check that every tensor was written whole, and return the CRC-32 of all bytes if asked for, else 0."""
        self._pieces.sort()
        position = crc = index = 0
        for offset, end, key in sorted(
            (self._offsets[key], self._offsets[key] + spec.nbytes, key)
            for key, spec in self.layout.tensors.items()
            if spec.size
        ):
            crc = self._pass_over(crc, position, offset)
            position = offset
            while position < end:
                if index == len(self._pieces) or self._pieces[index][0] != position:
                    twice = index < len(self._pieces) and self._pieces[index][0] < position
                    problem = "was written twice in part" if twice else "was not written completely"
                    raise MergeError(
                        f"{self.path.name}: tensor {key!r} {problem}; nothing was saved. This is a bug in kmerge."
                    )
                _, length, piece = self._pieces[index]
                if self._sum_up:
                    crc = crc32_combine(crc, piece, length)
                position += length
                index += 1
        if index != len(self._pieces):
            raise MergeError(
                f"{self.path.name}: a tensor was written twice in part; nothing was saved. This is a bug in kmerge."
            )
        return self._pass_over(crc, position, self.size)

    def _pass_over(self, crc: int, start: int, stop: int) -> int:
        """Take what HDF5 itself wrote between two tensors into the sum."""
        while self._sum_up and start < stop:
            data = bytearray(min(_BLOCK, stop - start))
            read_at(self._fd, self._start + start, memoryview(data))
            crc = zlib.crc32(data, crc)
            start += len(data)
        return crc


@contextmanager
def create_hdf5(
    path: str | Path, layout: Layout, overwrite: bool = False, closing: Closing | None = None
) -> Iterator[Output]:
    """Write one HDF5 file; it appears when the block ends normally.

    Args:
        path: where to.
        layout: everything but the numbers.
        overwrite: whether an existing file may be replaced.
        closing: gives further attributes of the root once all tensors are written.

    Yields:
        The output, to be filled with `write`.

    Raises:
        OutputError: if it cannot be written there.
        MergeError: if a tensor was not written completely.
    """
    path = _full(path)
    check_target(path, overwrite, False, layout.nbytes)
    with temporary_file(path, overwrite) as fd:
        output = Output(fd, 0, layout, path, sum_up=False)
        yield output
        output.finish()
        if closing is not None:
            with explain(path):
                add_root_attributes(Window(fd, 0, output.size, writable=True), closing())


@contextmanager
def create_archive(
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | Closing,
    config: Mapping[str, Any],
    layout: Layout,
    assets: Mapping[str, bytes | Asset] | None = None,
    folder: bool = False,
    overwrite: bool = False,
) -> Iterator[Output]:
    """Write a model in Keras 3's own format; it appears when the block ends normally.

    Args:
        path: where to.
        metadata: content of metadata.json, or a function that gives it once all tensors are written.
        config: content of config.json.
        layout: everything of model.weights.h5 but the numbers.
        assets: further members by their full names ("assets/…"), as bytes or as `Archive.assets` gives them.
        folder: whether to write an unzipped folder instead of a zip.
        overwrite: whether an existing file or model folder may be replaced.

    Yields:
        The output, to be filled with `write`.

    Raises:
        OutputError: if it cannot be written there.
        MergeError: if a tensor was not written completely.
    """
    path = _full(path)
    assets = dict(assets or {})
    for name in assets:
        problem = "has the name of another part" if name in (METADATA, CONFIG, WEIGHTS) else member_problem(name)
        if problem:
            raise MergeError(f"asset {name!r} {problem}.")
    texts = {CONFIG: json.dumps(config).encode()}
    if not callable(metadata):
        texts = {METADATA: json.dumps(metadata).encode(), **texts}
    sizes = [len(asset) if isinstance(asset, bytes) else asset.size for asset in assets.values()]
    check_target(path, overwrite, folder, layout.nbytes + sum(sizes))
    write = _in_folder if folder else _in_zip
    late = metadata if callable(metadata) else None
    with write(path, texts, layout, assets, overwrite, late) as output:
        yield output


@contextmanager
def _in_folder(
    path: Path,
    texts: dict[str, bytes],
    layout: Layout,
    assets: dict[str, bytes | Asset],
    overwrite: bool,
    metadata: Closing | None,
) -> Iterator[Output]:
    with temporary_folder(path, overwrite) as place:
        for name, data in texts.items():
            with explain(path):
                (place / name).write_bytes(data)
        with explain(path):
            fd = os.open(place / WEIGHTS, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            output = Output(fd, 0, layout, path, sum_up=False)
            for name, asset in assets.items():
                data = _content(asset)
                with explain(path):
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(data)
            yield output
            output.finish()
            if metadata is not None:
                with explain(path):
                    (place / METADATA).write_bytes(json.dumps(metadata()).encode())
        finally:
            os.close(fd)


@contextmanager
def _in_zip(
    path: Path,
    texts: dict[str, bytes],
    layout: Layout,
    assets: dict[str, bytes | Asset],
    overwrite: bool,
    metadata: Closing | None,
) -> Iterator[Output]:
    with temporary_file(path, overwrite) as fd:
        members: list[Member] = []
        end = 0

        def append(name: str, data: bytes) -> None:
            nonlocal end
            member = Member(name, end, len(data), zlib.crc32(data), wide=len(data) >= ZIP64_FROM)
            with explain(path):
                write_at(fd, end, memoryview(member.local()))
                write_at(fd, member.data, memoryview(data))
            members.append(member)
            end = member.data + len(data)

        for name, data in texts.items():
            append(name, data)
        objects = 16 + len(layout.tensors) + len(layout.groups)
        weights = Member(
            WEIGHTS, end, wide=layout.nbytes + _ROOM_PER_OBJECT * objects + _attribute_bytes(layout) >= ZIP64_FROM
        )
        members.append(weights)
        output = Output(fd, weights.data, layout, path, sum_up=True)
        weights.size = output.size
        end = weights.data + weights.size
        for name, asset in assets.items():
            append(name, _content(asset))
        yield output
        weights.crc = output.finish()
        if metadata is not None:
            append(METADATA, json.dumps(metadata()).encode())
        with explain(path):
            write_at(fd, weights.header, memoryview(weights.local()))
            write_at(fd, end, memoryview(directory(members, end)))


def _attribute_bytes(layout: Layout) -> int:
    """A generous bound of the bytes that attributes take."""
    values = [value for attributes in layout.groups.values() for value in attributes.values()]
    values += [value for spec in layout.tensors.values() for value in spec.attributes.values()]
    total = 0
    for value in values:
        if isinstance(value, str):
            total += 4 * len(value)
        elif isinstance(value, list):
            total += 8 * len(value) + 4 * len(value) * max((len(str(item)) for item in value), default=0)
    return 4 * total + _ROOM_PER_OBJECT * len(values)


def _content(asset: bytes | Asset) -> bytes:
    return asset if isinstance(asset, bytes) else asset.read()


def _full(path: str | Path) -> Path:
    path = Path(path)
    return path if path.name else path.absolute()
