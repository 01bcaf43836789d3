"""Data sets that come in batches, from front to back: brought to batches of one size, shuffled through a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kmerge.data.checks import as_array, check_rows, converted, converted_targets, converted_weights, fitted
from kmerge.data.columns import Held
from kmerge.data.dataset import Batch, Dataset, Indexed, check_one_shape, generator
from kmerge.data.digests import Repeated, Sketch, row_digests, row_draws
from kmerge.data.entries import Entry
from kmerge.data.names import Names
from kmerge.errors import DataError, KmergeError
from kmerge.methods.registry import Array

BUFFER = 1 << 14
"""Rows of a stream among which it is shuffled, at most."""
BUFFER_BYTES = 1 << 28
"""Bytes of them, at most."""
HELD_BYTES = 1 << 28
"""What is read from front to back is held in memory up to here, and can then be put into any order."""

Source = Callable[[int | None], Iterator[Any]]
"""Makes the batches of one pass, by a seed where they can be made in another order."""


@dataclass(frozen=True, eq=False)
class Streamed(Dataset):
    """Batches that come one after the other.

    Attributes:
        entries, names: of the network.
        source: makes the batches of a pass.
        where: for errors: "", or " in x.csv".
        part: share that is held back, seed, and whether this is the part that is held back; of nested splits all.
        repeated: holds the passes over the parts against each other.
    """

    entries: tuple[Entry, ...]
    names: Names
    source: Source
    where: str = ""
    file: str = ""
    classes: tuple[str, ...] = ()
    rows: int | None = None
    part: tuple[tuple[float, int, bool], ...] = field(default=())
    repeated: Repeated = field(default_factory=Repeated)

    def split(self, share: float, seed: int) -> tuple[Streamed, Streamed]:
        """As in `Dataset`; a row falls by what it holds, so that the share is met only roughly, equal rows are in one
        part, and sources that shuffle by themselves give the same parts in each pass.
        """
        used, held = (replace(self, rows=None, part=(*self.part, (share, seed, back))) for back in (False, True))
        return used, held

    # ------------------------------------------------------------------------------------------------ reading

    def given(self, seed: int | None = None) -> Iterator[Batch]:
        """The batches of one pass as they come, checked and converted."""
        draws = [(share, f"{number}/split/{level}", back) for level, (share, number, back) in enumerate(self.part)]
        before: Batch | None = None
        sketch = Sketch()
        batches = self.source(seed)
        while True:
            try:
                raw = next(batches)
            except StopIteration:
                self.repeated.check(sketch, self.where)
                return
            except KmergeError:
                raise
            except Exception as error:
                raise DataError(f"Reading the data{self.where} failed ({type(error).__name__}: {error}).") from error
            batch = self._batch(raw)
            if before is not None:
                check_one_shape(before.inputs, batch.inputs, self.entries, self.where)
            before = batch.take(slice(0, 0))
            if draws:
                sketch.add(row_digests(batch.inputs))
            for share, address, back in draws:
                batch = batch.take((row_draws(batch.inputs, address) < share) == back)
            if batch.rows:
                yield batch

    def _batch(self, raw: Any) -> Batch:
        parts = self.names.parts(raw, self.where)
        arrays = [as_array(leaf, self.where) for leaf in parts.inputs]
        shapes = [fitted(a.shape, e, self.where, True) for a, e in zip(arrays, self.entries, strict=True)]
        first, rows = self.entries[0], shapes[0][0]
        for shape, entry in zip(shapes[1:], self.entries[1:], strict=True):
            check_rows(rows, shape[0], f"'{entry.name}'", first, self.where)
        beside: list[dict[str, Array]] = []
        for what, given in (("labels", parts.targets), ("sample weights", parts.weights)):
            found = {label: as_array(value, self.where) for label, value in given.items()}
            for label, array in found.items():
                check_rows(rows, len(array) if array.ndim else 0, f"the {what} of '{label}'", first, self.where)
            beside.append(found)
        return Batch(
            tuple(
                converted(array.reshape(shape), entry, self.where)
                for array, shape, entry in zip(arrays, shapes, self.entries, strict=True)
            ),
            {label: converted_targets(array, label, self.where) for label, array in beside[0].items()},
            {label: converted_weights(array, label, self.where) for label, array in beside[1].items()},
        )

    def draw(self, count: int, random: np.random.Generator) -> tuple[tuple[Array, ...], int]:
        """As in `Dataset`, by Vitter's algorithm R, whatever the sizes of the batches."""
        kept: list[tuple[int, list[Array]]] = []
        total = 0
        for batch in self.given():
            numbers = np.arange(total, total + batch.rows)
            slots = np.where(numbers < count, numbers, (random.random(batch.rows) * (numbers + 1)).astype(np.int64))
            total += batch.rows
            for row in np.flatnonzero(slots < count):
                # Copies, so that no batch stays in memory.
                item = (int(numbers[row]), [array[row : row + 1].copy() for array in batch.inputs])
                if numbers[row] < count:
                    kept.append(item)
                else:
                    kept[slots[row]] = item
        kept.sort(key=lambda item: item[0])
        return tuple(np.concatenate(column) for column in zip(*(arrays for _, arrays in kept), strict=True)), total

    # ----------------------------------------------------------------------------------------------- batches

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """As in `Dataset`; what `start` leaves out is read all the same."""
        given = self.given(seed)
        batches = resized(given, size) if seed is None else shuffled(given, size, generator(seed, "order"))
        for number, batch in enumerate(batches):
            if number >= start:
                yield self._check_finite(batch, self.where)

    def held(self, limit: int = HELD_BYTES) -> Dataset:
        """The same in memory, if it takes no more than `limit` bytes."""
        batches, nbytes = [], 0
        for batch in self.given():
            batches.append(batch)
            nbytes += _nbytes(batch)
            if nbytes > limit:
                return self
        if not batches:
            return self
        whole = concatenated(batches)
        return Indexed(
            self.entries,
            tuple(map(Held.of, whole.inputs)),
            {label: Held.of(array) for label, array in whole.targets.items()},
            {label: Held.of(array) for label, array in whole.weights.items()},
            self.where,
            self.file,
            self.classes,
        )


def resized(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Batches of one size, in order; the last may be smaller."""
    waiting: list[Batch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.rows
        if rows >= size:
            joined = concatenated(waiting)
            for begin in range(0, rows - size + 1, size):
                yield joined.take(slice(begin, begin + size))
            rest = rows % size
            waiting = [joined.take(slice(rows - rest, rows))] if rest else []
            rows = rest
    if rows:
        yield concatenated(waiting)


def shuffled(batches: Iterator[Batch], size: int, random: np.random.Generator) -> Iterator[Batch]:
    """Batches of one size, each drawn from a buffer that is filled up again; the last may be smaller."""
    pool: Batch | None = None
    room = 0
    for batch in resized(batches, size):
        if pool is None or pool.rows < room:
            # A copy, because rows of it will be replaced, and arrays that were given are not to change.
            pool = batch.take(np.arange(batch.rows)) if pool is None else concatenated([pool, batch])
            room = max(size, min(BUFFER, BUFFER_BYTES * batch.rows // max(1, _nbytes(batch))))
            continue
        chosen = random.choice(pool.rows, size, replace=False)
        yield pool.take(chosen)
        if not _replace(pool, chosen, batch):
            pool = concatenated([pool.take(np.delete(np.arange(pool.rows), chosen)), batch])
    if pool is not None:
        pool = pool.take(random.permutation(pool.rows))
        for begin in range(0, pool.rows, size):
            yield pool.take(slice(begin, begin + size))


def _replace(pool: Batch, rows: Array, batch: Batch) -> bool:
    """Put a batch into rows of a pool, if it is as large and has the same labels."""
    pairs = list(zip(pool.inputs, batch.inputs, strict=True))
    for kind in ("targets", "weights"):
        into, new = getattr(pool, kind), getattr(batch, kind)
        if into.keys() != new.keys():
            return False
        pairs += [(into[label], new[label]) for label in into]
    if len(rows) != batch.rows or any(a.dtype != b.dtype or a.shape[1:] != b.shape[1:] for a, b in pairs):
        return False
    for array, new in pairs:
        array[rows] = new
    return True


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Several batches as one; labels that some of them do not have are missing there: -1, or NaN for fractions.

    Raises:
        DataError: if the labels of a head have rows of different shapes.
    """
    if len(batches) == 1:
        return batches[0]
    inputs = tuple(np.concatenate(column) for column in zip(*(batch.inputs for batch in batches), strict=True))
    targets = {label: _joined(batches, "targets", label) for label in _labels(batch.targets for batch in batches)}
    weights = {label: _joined(batches, "weights", label) for label in _labels(batch.weights for batch in batches)}
    return Batch(inputs, targets, weights)


def _labels(found: Iterator[Mapping[str, Array]]) -> list[str]:
    return list(dict.fromkeys(label for part in found for label in part))


def _joined(batches: Sequence[Batch], kind: str, label: str) -> Array:
    parts = [getattr(batch, kind).get(label) for batch in batches]
    first = next(part for part in parts if part is not None)
    dtype = np.result_type(*(part for part in parts if part is not None))
    if None not in [None if part is None else 0 for part in parts]:
        missing: Any = None
    elif kind == "weights":
        missing = 1
    else:
        missing = np.nan if dtype.kind == "f" else -1
        dtype = dtype if dtype.kind in "fi" else np.dtype(np.int64)
    filled = [
        np.full((batch.rows, *first.shape[1:]), missing, dtype) if part is None else part
        for batch, part in zip(batches, parts, strict=True)
    ]
    if len({part.shape[1:] for part in filled}) > 1:
        shapes = " and ".join(str(shape) for shape in sorted({part.shape[1:] for part in filled}))
        raise DataError(f"The labels of '{label}' have rows of shapes {shapes}: bring them to one.")
    return np.concatenate(filled).astype(dtype, copy=False)


def _nbytes(batch: Batch) -> int:
    return sum(array.nbytes for array in (*batch.inputs, *batch.targets.values(), *batch.weights.values()))
