"""Data sets that can be passed over again and again: arrays that stand whole, and streams of batches."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kmerge.data.checks import check_finite, check_rows, converted, converted_targets, converted_weights, fitted
from kmerge.data.columns import Column
from kmerge.data.entries import Entry
from kmerge.errors import DataError
from kmerge.methods.registry import Array


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows.

    Attributes:
        inputs: one array per input of the network, in the order of `flatten(graph.inputs)`, shapes (rows, ...), in the
            dtype of the input layer (float32 for bfloat16; objects, all `str`, for strings).
        targets: labels by head, shapes (rows, ...), as they were given; a head without labels in this batch is absent.
            Labels may be missing (NaN, -1).
        weights: sample weights by head, float32, shape (rows,); where absent, 1.
    """

    inputs: tuple[Array, ...]
    targets: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    def take(self, rows: Any) -> Batch:
        """Some rows, by number, mask or slice."""
        return Batch(
            tuple(array[rows] for array in self.inputs),
            {label: array[rows] for label, array in self.targets.items()},
            {label: array[rows] for label, array in self.weights.items()},
        )


class Dataset(ABC):
    """Something that can be passed over again and again, larger than memory too.

    Attributes:
        entries: the inputs of the network.
        rows: how many there are; None where that is not known before a pass.
        file: name of the file that the data come from; "" for none.
        classes: names of the classes by number, where the data have names for them.
    """

    entries: tuple[Entry, ...]
    rows: int | None
    file: str
    classes: tuple[str, ...]

    @property
    def description(self) -> str:
        """For people: "60,000 rows of x.npz"."""
        count = "rows" if self.rows is None else "1 row" if self.rows == 1 else f"{self.rows:,} rows"
        return f"{count} of {self.file}" if self.file else count if self.rows is not None else "a stream of batches"

    @abstractmethod
    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """One pass over all rows; the last batch may be smaller.

        Args:
            size: rows per batch.
            seed: of the order, the same on every platform; None for the order in which the data stand. Data that can
                be indexed are put into any order; streams go through a buffer. Sources that shuffle by themselves
                (a PyTorch loader with `shuffle=True`, `tf.data` with `shuffle`) are not held to the seed.
            start: how many batches to leave out at the front; data that can be indexed are not read for it.

        Raises:
            DataError: a row does not fit the network, or holds NaN or infinity.
            FormatError: a file is damaged.
        """

    @abstractmethod
    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Training rows and held-back rows: disjoint, and the same in every pass.

        A pass over either part of a stream raises DataError where the stream gives other rows in each pass.

        Args:
            share: of the rows to hold back, between 0 and 1.
            seed: of the draw.
        """

    @abstractmethod
    def draw(self, count: int, random: np.random.Generator) -> tuple[tuple[Array, ...], int]:
        """Inputs of some rows, each with the same chance, in their order; and how many rows there are.

        Args:
            count: how many at most.
            random: where from.
        """

    def _check_finite(self, batch: Batch, where: str) -> Batch:
        for array, entry in zip(batch.inputs, self.entries, strict=True):
            check_finite(array, entry, where)
        return batch


def generator(seed: int, address: str) -> np.random.Generator:
    """Random numbers that depend on a seed and on what they are for, and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{address}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@dataclass(frozen=True, eq=False)
class Indexed(Dataset):
    """Columns of which any rows can be read.

    Attributes:
        columns: one per input.
        targets, weights: by head.
        where: for errors: "", or " in x.npz".
        chosen: numbers of the rows that belong to the data set, ascending; None for all.
    """

    entries: tuple[Entry, ...]
    columns: tuple[Column, ...]
    targets: Mapping[str, Column] = field(default_factory=dict)
    weights: Mapping[str, Column] = field(default_factory=dict)
    where: str = ""
    file: str = ""
    classes: tuple[str, ...] = ()
    chosen: Array | None = None

    def __post_init__(self) -> None:
        """Raises:
        DataError: if shapes do not fit.
        """
        first = self._shapes[0][0]
        for shape, entry in zip(self._shapes[1:], self.entries[1:], strict=True):
            check_rows(first, shape[0], f"'{entry.name}'", self.entries[0], self.where)
        for what, columns in (("labels", self.targets), ("sample weights", self.weights)):
            for label, column in columns.items():
                rows = column.shape[0] if column.shape else 0
                check_rows(first, rows, f"the {what} of '{label}'", self.entries[0], self.where)

    @property
    def _shapes(self) -> Sequence[tuple[int, ...]]:
        return [
            fitted(column.shape, entry, self.where, False)
            for column, entry in zip(self.columns, self.entries, strict=True)
        ]

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self._shapes[0][0] if self.chosen is None else len(self.chosen)

    def _numbers(self) -> Array:
        return np.arange(self.rows) if self.chosen is None else self.chosen

    def _inputs(self, rows: Array, columns: Sequence[Column]) -> tuple[Array, ...]:
        """Rows by ascending number."""
        return tuple(
            converted(column.take(rows).reshape(len(rows), *shape[1:]), entry, self.where)
            for column, shape, entry in zip(columns, self._shapes, self.entries, strict=True)
        )

    def draw(self, count: int, random: np.random.Generator) -> tuple[tuple[Array, ...], int]:
        numbers = self._numbers()
        if len(numbers) > count:
            numbers = numbers[np.sort(random.choice(len(numbers), count, replace=False))]
        return self._inputs(numbers, self.columns), self.rows

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        numbers = self._numbers()
        if seed is not None:
            numbers = numbers[generator(seed, "order").permutation(len(numbers))]
        columns = [column.direct for column in self.columns]
        targets = {label: column.direct for label, column in self.targets.items()}
        weights = {label: column.direct for label, column in self.weights.items()}
        for begin in range(start * size, len(numbers), size):
            wanted = numbers[begin : begin + size]
            order = np.argsort(wanted)  # files are read from front to back
            rows = wanted[order]
            batch = Batch(
                self._inputs(rows, columns),
                {label: converted_targets(c.take(rows), label, self.where) for label, c in targets.items()},
                {label: converted_weights(c.take(rows), label, self.where) for label, c in weights.items()},
            )
            yield self._check_finite(batch.take(np.argsort(order)), self.where)

    def split(self, share: float, seed: int) -> tuple[Indexed, Indexed]:
        """As in `Dataset`; at least one row stands in either part where there are two, and exactly the share."""
        numbers = self._numbers()
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        held = np.zeros(len(numbers), bool)
        held[generator(seed, "split").permutation(len(numbers))[: max(count, 0)]] = True
        return replace(self, chosen=numbers[~held]), replace(self, chosen=numbers[held])


def check_one_shape(before: Sequence[Array], new: Sequence[Array], entries: Sequence[Entry], where: str) -> None:
    """Raises:
    DataError: if the rows of two batches have different shapes.
    """
    for entry, first, second in zip(entries, before, new, strict=True):
        if first.shape[1:] != second.shape[1:]:
            raise DataError(
                f"The batches for input '{entry.name}'{where} have rows of shapes {first.shape[1:]} and "
                f"{second.shape[1:]}: pad them to one."
            )
