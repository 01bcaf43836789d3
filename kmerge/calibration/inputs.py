"""Calibration inputs: a sample of the rows that the user gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kmerge.data import Dataset, Reading, entries, generator, open_parts
from kmerge.data.checks import check_finite
from kmerge.errors import DataError, PlanError
from kmerge.layout import source_graph
from kmerge.methods.registry import Array
from kmerge.rules import FEWEST_SAMPLES
from kmerge.shapes import infer_shapes, multiply_adds
from kmerge.source import Source

ROWS, LEAST_ROWS = 2000, 256
"""How many rows are drawn where nobody says; fewer, but not below the second number, where they take long to run."""
MULTIPLY_ADDS = 1 << 39
"""What one pass of all sources over them may take then: some ten seconds on two cores."""
FEWEST = FEWEST_SAMPLES


@dataclass(frozen=True, eq=False)
class Inputs:
    """Calibration inputs, unlabelled.

    Attributes:
        arrays: one per input of the network, in the order of `flatten(graph.inputs)`, shapes (rows, ...), in the dtype
            of the input layer (float32 for bfloat16; objects, all `str`, for strings).
        owners: number of the source that each row was given for, shape (rows,); -1 where for all.
        synthetic: whether they are made up.
        description: for people: "400 of 60,000 inputs from x.npz".
    """

    arrays: tuple[Array, ...]
    owners: Array
    synthetic: bool = False
    description: str = ""

    @property
    def rows(self) -> int:
        return len(self.owners)

    def take(self, indices: Array) -> Inputs:
        """Some rows, in the given order."""
        return replace(self, arrays=tuple(array[indices] for array in self.arrays), owners=self.owners[indices])

    def batches(self, size: int) -> Iterator[tuple[Array, ...]]:
        """All rows in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, self.rows, size):
            yield tuple(array[start : start + size] for array in self.arrays)

    def split(self, share: float, seed: int) -> tuple[Inputs, Inputs]:
        """Two parts: what is used, and what is held back.

        Args:
            share: of the rows to hold back, between 0 and 1; the same share of each source's own rows. At least one
                row stands in either part where there are two.
            seed: of the draw.
        """
        random = generator(seed, "split")
        groups = [np.flatnonzero(self.owners == owner) for owner in np.unique(self.owners)]
        if self.rows > 1 and all(len(group) == 1 for group in groups):
            groups = [np.arange(self.rows)]
        held = np.zeros(self.rows, bool)
        for group in groups:
            count = min(max(round(share * len(group)), 1), len(group) - 1)
            held[random.permutation(group)[:count]] = True
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


# ---------------------------------------------------------------------------------------------------- reading


def usual_rows(sources: Sequence[Source], rows: int = ROWS) -> int:
    """So many rows, or fewer where the sources are so large that running them on these takes long.

    Args:
        sources: with graphs; layers whose work cannot be told count as none.
        rows: wanted.
    """
    each = 0
    for source in sources:
        graph = source_graph(source)
        weights = {n: [weight.tensor.shape for weight in state.weights] for n, state in enumerate(source.states)}
        each += sum(cost or 0 for cost in multiply_adds(graph, infer_shapes(graph), weights).values())
    return min(rows, max(LEAST_ROWS, MULTIPLY_ADDS // max(each, 1)))


def read_inputs(data: Any, sources: Sequence[Source], samples: int | None = None, seed: int = 0) -> Inputs:
    """Draw calibration inputs from what the user gives.

    Args:
        data: anything that `kmerge.data.open_dataset` takes, of which labels are not read; or a dictionary of such
            things by the labels of the sources, of each of which equally many rows are drawn.
        sources: that are merged, with graphs; the inputs of the first decide.
        samples: how many rows to draw in all; by default as many as `usual_rows` says, or all where there are fewer.
        seed: of the draw.

    Returns:
        The rows, in the order in which they were given.

    Raises:
        DataError: the data do not fit the network.
        FormatError: a file is missing, damaged or something else.
        PlanError: `samples` is too small.
    """
    if samples is not None and (not isinstance(samples, int) or samples < FEWEST):
        raise PlanError(f"samples is {samples}: expected at least {FEWEST} rows.")
    samples = usual_rows(sources) if samples is None else samples
    network, labels = entries(sources[0]), tuple(source.label for source in sources)
    parts = open_parts(data, network, labels, Reading(targets=False, again=False))
    if None in parts:
        drawn = _draw(parts[None], samples, generator(seed, "rows"), "")
        owners = np.full(len(drawn.arrays[0]), -1)
        return Inputs(drawn.arrays, owners, description=_described([drawn]))
    missing = [label for label in labels if label not in parts]
    if missing:
        have = [f"'{label}'" for label in parts]
        listed = f"{', '.join(have[:-1])} and {have[-1]}" if len(have) > 1 else have[0]
        raise DataError(
            f"There are data for {listed} but none for '{missing[0]}': give some for every source, or one data set for "
            "all."
        )
    share = max(1, samples // len(sources))
    found = [
        _draw(parts[label], share, generator(seed, f"rows/{number}"), f" of '{label}'")
        for number, label in enumerate(labels)
    ]
    rows = min(len(drawn.arrays[0]) for drawn in found)
    kept = []
    for number, drawn in enumerate(found):
        chosen = generator(seed, f"rows/{number}/kept").permutation(len(drawn.arrays[0]))[:rows]
        kept.append(replace(drawn, arrays=tuple(array[np.sort(chosen)] for array in drawn.arrays)))
    arrays = []
    for number, entry in enumerate(network):
        columns = [drawn.arrays[number] for drawn in kept]
        if len({column.shape for column in columns}) > 1:
            sizes = " and ".join(str(shape) for shape in sorted({column.shape[1:] for column in columns}))
            raise DataError(
                f"The data for input '{entry.name}' have rows of shapes {sizes} for different sources: bring them to "
                "one shape."
            )
        arrays.append(np.concatenate(columns))
    return Inputs(tuple(arrays), np.repeat(np.arange(len(sources)), rows), description=_described(kept))


@dataclass(frozen=True)
class _Drawn:
    """Rows drawn from one data set: of how many, and from which file."""

    arrays: tuple[Array, ...]
    total: int
    file: str


def _draw(dataset: Dataset, count: int, random: np.random.Generator, where: str) -> _Drawn:
    """Rows of one data set, at most `count`; `where` is for errors: "", or " of 'a'"."""
    inside = f"{where} in {dataset.file}" if dataset.file else where
    arrays, total = dataset.draw(count, random)
    if total < FEWEST:
        raise _too_few(total, inside)
    for array, entry in zip(arrays, dataset.entries, strict=True):
        check_finite(array, entry, inside)
    return _Drawn(arrays, total, dataset.file)


def _described(drawn: Sequence[_Drawn]) -> str:
    rows, total = len(drawn[0].arrays[0]) * len(drawn), sum(part.total for part in drawn)
    text = f"{rows:,} inputs" if rows == total else f"{rows:,} of {total:,} inputs"
    files = list(dict.fromkeys(part.file for part in drawn if part.file))
    if len(files) > 3:
        files = [f"{len(files)} files"]
    if files:
        text += " from " + " and ".join(filter(None, (", ".join(files[:-1]), files[-1])))
    return text if len(drawn) == 1 else f"{text}, {rows // len(drawn):,} for each source"


def _too_few(total: int, where: str) -> DataError:
    if not total:
        return DataError(f"The data{where} hold no rows: expected at least {FEWEST}.")
    rows = "1 row" if total == 1 else f"{total} rows"
    return DataError(
        f"The data{where} hold {rows}, too few to calibrate on and to hold some back: give at least {FEWEST}, better "
        "some hundreds."
    )
