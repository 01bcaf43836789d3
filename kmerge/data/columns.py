"""Arrays of which some rows are read: in memory, in a `.npy`, in a member of an `.npz`. Nothing is ever unpickled."""

from __future__ import annotations

import math
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from kmerge.errors import DataError, FormatError, UnsafeFileError
from kmerge.methods.registry import Array
from kmerge.store.rawio import special, why_unreadable

BLOCK = 1 << 22
_IN_MEMORY = 1 << 26
"""A member of an `.npz` that is compressed is unpacked in memory up to here, into a temporary file beyond."""
NPY, ZIP = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06")
_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Column(ABC):
    """An array whose rows are read when they are asked for."""

    shape: tuple[int, ...]

    @abstractmethod
    def take(self, rows: Array) -> Array:
        """Some rows, by ascending number."""

    @property
    def direct(self) -> Column:
        """The same, for rows in any order, often."""
        return self


@dataclass(frozen=True, eq=False)
class Held(Column):
    """An array in memory, or mapped into it."""

    shape: tuple[int, ...]
    array: Array

    @classmethod
    def of(cls, array: Array) -> Held:
        return cls(array.shape, array)

    def take(self, rows: Array) -> Array:
        return np.asarray(self.array[rows])


@dataclass(frozen=True, eq=False)
class Member(Column):
    """An array in an `.npz`, read from front to back and never held as a whole."""

    shape: tuple[int, ...]
    path: Path
    name: str

    def take(self, rows: Array) -> Array:
        what = f"'{self.name}' in {self.path.name}"
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            shape, fortran, dtype = _header(file, what)
            if fortran:
                whole = _read(file, math.prod(shape) * dtype.itemsize, what)
                return np.ndarray(shape, dtype, whole, order="F")[rows]
            width = math.prod(shape[1:]) * dtype.itemsize
            step = max(1, BLOCK // max(1, width))
            parts = []
            for start in range(0, int(rows[-1]) + 1, step):
                count = min(step, shape[0] - start)
                block = np.ndarray((count, *shape[1:]), dtype, _read(file, count * width, what))
                first, last = np.searchsorted(rows, (start, start + count))
                parts.append(block[rows[first:last] - start])
            return np.concatenate(parts)

    @cached_property
    def direct(self) -> Column:
        """Mapped where it stands, or unpacked once."""
        what = f"'{self.name}' in {self.path.name}"
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            shape, fortran, dtype = _header(file, what)
            order: Literal["C", "F"] = "F" if fortran else "C"
            nbytes = math.prod(shape) * dtype.itemsize
            if not nbytes:
                return Held(shape, np.zeros(0, dtype))
            item = archive.getinfo(f"{self.name}.npy")
            if item.compress_type == zipfile.ZIP_STORED and not item.flag_bits & 1:
                start = _start(self.path, item, what) + file.tell()
                return Held(shape, np.memmap(self.path, dtype, "r", start, shape, order))
            if nbytes <= _IN_MEMORY:
                whole = np.frombuffer(_read(file, nbytes, what), dtype)
                return Held(shape, whole.reshape(shape, order=order))
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if nbytes > free:
                raise DataError(
                    f"{what} takes {nbytes:,} bytes unpacked, and {free:,} are free in {tempfile.gettempdir()}: make "
                    "room, or write it without compression, with np.savez."
                )
            with tempfile.TemporaryFile(prefix="kmerge-") as copy:
                for begin in range(0, nbytes, BLOCK):
                    copy.write(_read(file, min(BLOCK, nbytes - begin), what))
                copy.flush()
                return Held(shape, np.memmap(copy, dtype, "r", 0, shape, order))


def _check_size(item: zipfile.ZipInfo, expected: int, path: Path, what: str) -> None:
    """Hold what a header tells against the zip, and what the zip tells against what Deflate can do.

    Raises:
        FormatError: there cannot be as many bytes as are told.
    """
    packed = min(item.compress_size, path.stat().st_size)
    possible = packed if item.compress_type == zipfile.ZIP_STORED else 1100 * (packed + 100)
    if item.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and item.file_size > possible:
        raise FormatError(f"{what} is told to be {item.file_size:,} bytes, more than there can be. Write it again.")
    if expected > item.file_size:
        missing = expected - item.file_size
        raise FormatError(f"{what} is cut short: {missing:,} bytes are missing. Write it again.")


def _start(path: Path, item: zipfile.ZipInfo, what: str) -> int:
    """Where the bytes of a stored member of a zip begin."""
    with path.open("rb") as file:
        file.seek(item.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(ZIP[0]):
            raise FormatError(f"{what} has no header: write it again.")
        name, extra = struct.unpack("<HH", header[26:30])
    start = item.header_offset + 30 + int(name) + int(extra)
    if path.stat().st_size < start + item.file_size:
        raise FormatError(f"{what} is cut short. Write it again.")
    return start


def open_stored(path: str | os.PathLike[str]) -> Column | Mapping[str, Column]:
    """What a `.npy` or `.npz` holds, told by content; no value is read yet.

    Args:
        path: the file.

    Returns:
        The array of a `.npy`, or the arrays of an `.npz` by name.

    Raises:
        FormatError: the file is missing, damaged or something else.
        UnsafeFileError: it holds pickled objects.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "folder" if stat.S_ISDIR(mode) else special(mode)
            raise FormatError(f"{path} is a {what}: expected a file with inputs.")
        with path.open("rb") as file:
            head = file.read(6)
            file.seek(0)
            if head == NPY:
                shape, fortran, dtype = _header(file, path.name)
                offset = file.tell()
                if path.stat().st_size < offset + math.prod(shape) * dtype.itemsize:
                    raise FormatError(f"{path.name} is cut short: its header tells of shape {shape}. Write it again.")
                if 0 in shape or not shape:
                    return Held(shape, np.zeros(0, dtype))
                return Held.of(np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C"))
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
    if not head.startswith(ZIP):
        raise FormatError(
            f"{path.name} is no file of data that kmerge reads (.npz, .npy, .csv, .tsv, .parquet, .tfrecord, or a "
            f"folder of images): write inputs with np.savez('{path.stem}.npz', x=x)."
        )
    return _members(path)


def _members(path: Path) -> dict[str, Column]:
    members: dict[str, Column] = {}
    with _opened(path) as archive:
        for item in archive.namelist():
            if not item.endswith(".npy"):
                raise FormatError(
                    f"{path.name} holds '{item}', which is no array: expected an .npz as np.savez writes it."
                )
            name = item.removesuffix(".npy")
            with archive.open(item) as file:
                what = f"'{name}' in {path.name}"
                shape, _, dtype = _header(file, what)
                _check_size(archive.getinfo(item), file.tell() + math.prod(shape) * dtype.itemsize, path, what)
            members[name] = Member(shape, path, name)
    return members


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise FormatError(f"{path.name} cannot be read as an .npz ({error}): write it again with np.savez.") from error


def _header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = _VERSIONS[version](file)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, TypeError, SyntaxError, OverflowError) as error:
        raise FormatError(f"{what} is no array that NumPy reads ({error}): write it again.") from error
    if dtype.hasobject:
        raise UnsafeFileError(
            f"{what} holds pickled Python objects, which kmerge never opens: write an array of numbers or strings, "
            "with all rows of one shape."
        )
    return shape, fortran, dtype


def _read(file: IO[bytes], count: int, what: str) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise FormatError(f"{what} is cut short: {count - len(data):,} bytes are missing. Write it again.")
    return data
