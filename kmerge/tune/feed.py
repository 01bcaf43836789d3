"""Batches for a training: from one data set or from one per head, mixed in a ratio, found again at any step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.data import Batch
from kmerge.errors import DataError, KmergeError
from kmerge.tune.columns import Column, column_of
from kmerge.tune.processes import Processes
from kmerge.tune.teachers import Passes, Streamed

__all__ = ["Column", "Feed", "Part", "column_of", "count_rows", "shares"]


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
    """Batches as `fit` takes them: inputs, labels by head, and weights by head.

    Args:
        parts: data sets; several are mixed within each batch where their rows have one shape, and take turns where
            they do not.
        columns: what the heads learn from.
        copies: how often a model with separate inputs takes what is given.
        seed: of the order of the rows.
        processes: of which this is one, and takes its rows of each batch.

    Attributes:
        failure: what went wrong while rows were read; Keras raises an error of its own for it.
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
        self.failure: KmergeError | None = None
        shapes = {tuple(array.shape[1:] for array in batch.inputs) for batch in firsts}
        self.together = len(shapes) == 1
        longest = max(part.steps for part in self.parts)
        self.steps = longest if self.together else longest * len(self.parts)

    def stream(self, step: int = 0) -> Iterator[Any]:
        """This process's part of batches without end, from a step on."""
        yield from map(self.processes.own, self._told(self.whole(step)))

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
        yield from map(self.processes.own, self._told(self.once()))

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except KmergeError as error:
            self.failure = error
            raise

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
                found.append(column.read(batch.targets[column.name]) if own else None)
                given = batch.weights.get(column.name) if own else None
                sums.append(np.ones(count, np.float32) if given is None else np.asarray(given, np.float32))
            shape = next((y.shape[1:] for y in found if y is not None), None)
            filled = [column.missing(n, shape) if y is None else y for y, n in zip(found, rows, strict=True)]
            labels[column.name], weights[column.name] = np.concatenate(filled), np.concatenate(sums)
        repeated = inputs * self.copies
        x = repeated[0] if len(repeated) == 1 else tuple(repeated)
        return x, labels, weights


def _first(part: Part) -> Batch:
    for batch in part.data.batches(min(part.share, 8)):
        return batch
    raise DataError("There are no rows to learn from.")


def _seed(seed: int, part: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/feed/{part}/{number}".encode()).digest()[:6], "big")
