"""Batches for a training: from one data set or from one per head, mixed in a ratio, found again at any step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.data import Batch
from kmerge.errors import DataError
from kmerge.methods.registry import Array
from kmerge.tune.processes import Processes
from kmerge.tune.teachers import Passes, Streamed


@dataclass(frozen=True)
class Column:
    """What a head learns from: dtype and shape per row; None for a free size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def missing(self, rows: int) -> Array:
        """Labels that are not there."""
        shape = (rows, *(size or 1 for size in self.shape))
        return np.full(shape, -1, self.dtype) if self.dtype.startswith("int") else np.full(shape, np.nan, self.dtype)

    def read(self, values: Any) -> Array:
        """Labels as given, in the dtype of this column; −1 where they are NaN.

        Raises:
            DataError: if they are no numbers, or class numbers are not whole.
        """
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"The labels of '{self.name}' are {array.dtype}: expected numbers; give classes as whole numbers."
            )
        if self.dtype.startswith("int"):
            if array.dtype.kind == "f":
                array = np.where(np.isnan(array), -1, array)
                if not np.all(array == np.floor(array)):
                    raise DataError(f"The labels of '{self.name}' are not whole: expected numbers of classes.")
        elif array.ndim == 1 and len(self.shape) == 1:
            array = array[:, None]
        return array.astype(self.dtype)


@dataclass(frozen=True, eq=False)
class Part:
    """One data set among those that are mixed.

    Attributes:
        data: the rows.
        heads: that learn from it.
        share: rows of each batch.
        rows: in one pass.
    """

    data: Passes
    heads: tuple[str, ...]
    share: int
    rows: int

    @property
    def steps(self) -> int:
        return math.ceil(self.rows / self.share)


def count_rows(data: Passes) -> int:
    """How many rows a data set has, by a pass where it does not say; no teacher is asked for that."""
    data = data.data if isinstance(data, Streamed) else data
    return data.rows if data.rows is not None else sum(len(batch.inputs[0]) for batch in data.batches(256))


def shares(size: int, ratio: Sequence[float]) -> list[int]:
    """Rows per part of a batch, at least one each.

    >>> shares(64, [1, 1, 2])
    [16, 16, 32]
    """
    total = sum(ratio)
    return [max(1, round(size * part / total)) for part in ratio]


class Feed:
    """Batches as `fit` takes them: inputs, labels by head, and weights by head where there are any.

    Args:
        parts: data sets; several are mixed within each batch where their rows have one shape, and take turns where
            they do not.
        columns: what the heads learn from.
        copies: how often a model with separate inputs takes what is given.
        seed: of the order of the rows.
        processes: of which this is one, and takes its rows of each batch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        columns: Sequence[Column],
        copies: int,
        seed: int,
        processes: Processes = Processes(),  # noqa: B008
    ) -> None:
        self.processes = processes
        self.parts, self.columns, self.copies, self.seed = tuple(parts), tuple(columns), copies, seed
        firsts = [_first(part) for part in self.parts]
        self.weighted = any(batch.weights for batch in firsts)
        shapes = {tuple(array.shape[1:] for array in batch.inputs) for batch in firsts}
        self.together = len(shapes) == 1
        longest = max(part.steps for part in self.parts)
        self.steps = longest if self.together else longest * len(self.parts)

    def stream(self, step: int = 0) -> Iterator[Any]:
        """This process's part of batches without end, from a step on."""
        yield from map(self.processes.own, self.whole(step))

    def whole(self, step: int = 0) -> Iterator[Any]:
        """Batches without end, from a step on."""
        if self.together:
            sources = [self._endless(number, step) for number in range(len(self.parts))]
            while True:
                yield self._joined([(part, next(source)) for part, source in zip(self.parts, sources, strict=True)])
        count = len(self.parts)
        sources = [self._endless(number, (step + count - 1 - number) // count) for number in range(count)]
        while True:
            yield self._joined([(self.parts[step % count], next(sources[step % count]))])
            step += 1

    def own(self) -> Iterator[Any]:
        """This process's part of `once`."""
        yield from map(self.processes.own, self.once())

    def once(self) -> Iterator[Any]:
        """All rows of all parts, one part after the other, in order."""
        for part in self.parts:
            for batch in part.data.batches(256):
                yield self._joined([(part, batch)])

    def _endless(self, number: int, step: int) -> Iterator[Batch]:
        part = self.parts[number]
        done, start = divmod(step, part.steps)
        while True:
            yield from part.data.batches(part.share, _seed(self.seed, number, done), start)
            done, start = done + 1, 0

    def _joined(self, batches: Sequence[tuple[Part, Batch]]) -> Any:
        inputs = [np.concatenate(column) for column in zip(*(batch.inputs for _, batch in batches), strict=True)]
        rows = [len(batch.inputs[0]) for _, batch in batches]
        labels, weights = {}, {}
        for column in self.columns:
            found, sums = [], []
            for (part, batch), count in zip(batches, rows, strict=True):
                own = column.name in part.heads and column.name in batch.targets
                found.append(column.read(batch.targets[column.name]) if own else column.missing(count))
                given = batch.weights.get(column.name) if own else None
                sums.append(np.ones(count, np.float32) if given is None else np.asarray(given, np.float32))
            labels[column.name], weights[column.name] = _stacked(found), np.concatenate(sums)
        repeated = inputs * self.copies
        x = repeated[0] if len(repeated) == 1 else tuple(repeated)
        return (x, labels, weights) if self.weighted else (x, labels)


def _stacked(arrays: Sequence[Array]) -> Array:
    """Labels of several parts; missing ones take the shape of those that are there."""
    if len({array.shape[1:] for array in arrays}) > 1:
        shape = max((array.shape[1:] for array in arrays), key=math.prod)
        arrays = [np.broadcast_to(array, (len(array), *shape)) for array in arrays]
    return np.concatenate(arrays)


def _first(part: Part) -> Batch:
    for batch in part.data.batches(min(part.share, 8)):
        return batch
    raise DataError("There are no rows to learn from.")


def _seed(seed: int, part: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/feed/{part}/{number}".encode()).digest()[:6], "big")
