"""One stored tensor, read block by block: straight from its bytes, or through the HDF5 library where it must be."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py
import numpy as np
from h5py import h5s, h5t

from kmerge.errors import FormatError
from kmerge.store.dtypes import EXTENDED, numpy_dtype
from kmerge.store.rawio import Descriptor

if TYPE_CHECKING:
    from kmerge.store.hdf5 import Hdf5Weights


@dataclass(frozen=True, slots=True, eq=False)
class Tensor(ABC):
    """A tensor in a file: known by shape and type, its numbers read on demand.

    Attributes:
        shape: its shape; () for a single number.
        dtype: logical type, for example "float32" or "bfloat16".
        size: number of elements.
        nbytes: bytes of all elements in memory.
        where: file and path of the tensor, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int
    nbytes: int
    where: str

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read the flat elements [start, start + out.size) in C order; any thread may.

        Args:
            start: first element.
            out: where they go, shape (count,), contiguous, of `numpy_dtype(dtype)`.

        Raises:
            FormatError: if the file ends before the tensor does, or its compressed data are damaged.
        """
        if out.dtype != numpy_dtype(self.dtype) or out.ndim != 1 or not out.flags.c_contiguous:
            raise ValueError(f"{self.where}: `out` must be a contiguous 1-d array of {self.dtype}, not {out.dtype}.")
        if start < 0 or start + out.size > self.size:
            raise ValueError(f"{self.where}: elements {start} to {start + out.size} of {self.size} were asked for.")
        if out.size:
            self._read(start, out.view(np.uint8))

    def read(self) -> np.ndarray:
        """The whole tensor as an array of its shape."""
        out = np.empty(self.size, numpy_dtype(self.dtype))
        self.read_into(0, out)
        return out.reshape(self.shape)

    @abstractmethod
    def _read(self, start: int, raw: np.ndarray) -> None:
        """The bytes of the elements from `start` on, as many as fill `raw`."""


@dataclass(frozen=True, slots=True, eq=False)
class DirectTensor(Tensor):
    """A tensor whose bytes lie in one piece: read with positional reads, without HDF5's lock."""

    file: Descriptor
    offset: int
    word: int  # bytes per number if they must be swapped, else 0

    def _read(self, start: int, raw: np.ndarray) -> None:
        itemsize = self.nbytes // self.size
        try:
            count = self.file.read_into(self.offset + start * itemsize, memoryview(raw))  # type: ignore[arg-type]
        except OSError as error:
            raise FormatError(f"{self.where} cannot be read: {error.strerror}.") from None
        if count != raw.size:
            raise FormatError(
                f"{self.where} is truncated: the file ended {raw.size - count:,} bytes too early. "
                "Get the file again; was it written to while being read?"
            )
        if self.word:
            raw.view(f"u{self.word}").byteswap(inplace=True)
        elif self.dtype == "bool":
            np.minimum(raw, 1, out=raw)


@dataclass(frozen=True, slots=True, eq=False)
class LibraryTensor(Tensor):
    """A chunked, compressed or otherwise unusual tensor: read through the HDF5 library, one thread at a time."""

    owner: "Hdf5Weights"
    path: bytes

    def _read(self, start: int, raw: np.ndarray) -> None:
        itemsize = self.nbytes // self.size
        raw[:] = 0  # HDF5 leaves memory as it was where a file has no fill value
        plain = not (self.dtype in EXTENDED or self.dtype == "bool" or self.dtype.startswith("void"))
        with self.owner.dataset(self.path) as dataset:
            memory = h5t.py_create(numpy_dtype(self.dtype)) if plain else dataset.get_type()
            if not self.shape:
                dataset.read(h5s.ALL, h5s.ALL, raw, memory)
            else:
                space = dataset.get_space()
                if tuple(space.shape) != self.shape:
                    raise FormatError(f"{self.where} changed while being read.")
                done = 0
                for corner, count in slabs(self.shape, start, start + raw.size // itemsize):
                    size = int(np.prod(count, dtype=object)) * itemsize
                    space.select_hyperslab(corner, count)
                    dataset.read(h5s.create_simple((size // itemsize,)), space, raw[done : done + size], memory)
                    done += size
        if self.dtype == "bool":
            np.minimum(raw, 1, out=raw)


def slabs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the flat range [start, stop) of an array into boxes, each contiguous in C order: at most 2 x rank - 1.

    >>> list(slabs((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = 1
    for length in shape[1:]:
        inner *= length
    first, skip = divmod(start, inner)
    last, rest = divmod(stop, inner)
    if first == last:
        for corner, count in slabs(shape[1:], skip, rest):
            yield (first, *corner), (1, *count)
        return
    if skip:
        for corner, count in slabs(shape[1:], skip, inner):
            yield (first, *corner), (1, *count)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    for corner, count in slabs(shape[1:], 0, rest):
        yield (last, *corner), (1, *count)


def cache_for(dataset: h5py.h5d.DatasetID, limit: int) -> int:
    """Bytes of chunk cache so that reading a tensor in C order unpacks each chunk once, as far as `limit` allows."""
    chunk = dataset.get_create_plist().get_chunk()
    itemsize = dataset.get_type().get_size()
    band = itemsize * chunk[0]
    for length, piece in zip(dataset.shape[1:], chunk[1:], strict=True):
        band *= -(-length // piece) * piece
    return min(limit, 2 * int(band))
