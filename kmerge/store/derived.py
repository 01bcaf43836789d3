"""Tensors that are made from stored ones while they are read: reordered, concatenated, scaled, flipped."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kmerge.store.dtypes import numpy_dtype
from kmerge.store.tensors import Tensor


@dataclass
class Memory:
    """The numbers of a tensor, while it is being read."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    values: np.ndarray | None = None
    left: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class DerivedTensor(Tensor):
    """A tensor whose numbers are made from those of others.

    Its first read brings the whole tensor into memory; when as many numbers have been asked for as it has, it is let
    go again. So a merge that reads every tensor once, block by block, holds few of them at a time, each whole.

    Attributes:
        make: gives all numbers, of the tensor's shape and type.
        parts: the tensors whose numbers it holds in another order, each once; () where its numbers are computed.
    """

    make: Callable[[], np.ndarray]
    parts: tuple[Tensor, ...] = ()
    memory: Memory = field(default_factory=Memory)

    def _read(self, start: int, raw: np.ndarray) -> None:
        itemsize = self.nbytes // self.size
        with self.memory.lock:
            if self.memory.values is None:
                values = np.ascontiguousarray(self.make(), dtype=numpy_dtype(self.dtype))
                self.memory.values = values.reshape(-1).view(np.uint8)
                self.memory.left = self.size
            raw[:] = self.memory.values[start * itemsize : start * itemsize + raw.size]
            self.memory.left -= raw.size // itemsize
            if self.memory.left <= 0:
                self.memory.values = None


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensor(Tensor):
    """A tensor of which some columns (entries of the last axis) are multiplied: read block by block, as it is stored.

    Attributes:
        original: the tensor as it is stored.
        factors: one per column, shape (columns,), float64.
    """

    original: Tensor
    factors: np.ndarray

    def _read(self, start: int, raw: np.ndarray) -> None:
        values = raw.view(numpy_dtype(self.dtype))
        self.original.read_into(start, values)
        columns = (np.arange(values.size) + start) % len(self.factors)
        values[:] = (values.astype(np.float64) * self.factors[columns]).astype(values.dtype)


def derived(
    first: Tensor,
    shape: tuple[int, ...],
    make: Callable[[], np.ndarray],
    dtype: str = "",
    parts: tuple[Tensor, ...] = (),
) -> Tensor:
    """A tensor made from `first` (and perhaps others), of the given shape, and of its type unless another is given.

    `parts` are those whose numbers it holds in another order, where it is no more than that.
    """
    dtype = dtype or first.dtype
    size = int(np.prod(shape, dtype=object))
    return DerivedTensor(shape, dtype, size, size * numpy_dtype(dtype).itemsize, first.where, make, parts)


def scaled(original: Tensor, factors: np.ndarray) -> Tensor:
    """The tensor with each column multiplied."""
    shape, dtype, size, nbytes, where = (
        original.shape,
        original.dtype,
        original.size,
        original.nbytes,
        original.where,
    )
    return ScaledTensor(shape, dtype, size, nbytes, where, original, np.asarray(factors, dtype=np.float64))


def origins(tensor: Tensor) -> tuple[Tensor, ...] | None:
    """The stored tensors whose numbers a tensor holds, reordered and perhaps scaled; None where it computes others."""
    if isinstance(tensor, ScaledTensor):
        return origins(tensor.original)
    if not isinstance(tensor, DerivedTensor):
        return (tensor,)
    found: list[Tensor] = []
    for part in tensor.parts:
        inner = origins(part)
        if inner is None:
            return None
        found += inner
    return tuple(found) or None


def is_scaled(tensor: Tensor) -> bool:
    """Whether some numbers of a tensor are multiplied."""
    if isinstance(tensor, ScaledTensor):
        return True
    return isinstance(tensor, DerivedTensor) and any(is_scaled(part) for part in tensor.parts)
