"""What all sources give at the same output: where they do one task, it says more than what any of them gives alone.

Sources of one task differ by what each of them got wrong, mostly, so that their mean is nearer to the truth than they
are (Breiman, Bagging predictors, 1996). A head is fitted to what its own source gives, moved towards the mean of all as
far as the one-standard-error rule lets it (`kmerge.fuse.ridge.farthest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmerge.fuse.ridge import whole_rows
from kmerge.methods.registry import Array

ALIKE = 0.5
"""Share of what a source gives that the others' mean must explain, so that they are taken to do one task."""


@dataclass(eq=False)
class Common:
    """How alike the sources are at one output, told row by row.

    Attributes:
        shares: importance of the sources.
        source: whose output is to be moved.
        pooled: whether the columns of the output belong together, as those of a softmax do: they are alike all or none.
    """

    shares: Sequence[float]
    source: int
    pooled: bool = False
    _rows: int = 0
    _held: int = 0
    _gap: Array | float = 0.0
    _square: Array | float = 0.0
    _total: Array | float = 0.0
    _differ: bool = False

    def add(self, given: Sequence[Array], of: Array, held: Array) -> Array | None:
        """More rows.

        Args:
            given: what each source gives, shapes (rows, columns); nothing where their outputs have other shapes.
            of: number of the input that each row is of, shape (rows,).
            held: which inputs are held back, shape (inputs,).

        Returns:
            From what the source gives to the mean of all, shape (rows, columns), 0 in rows that are not finite in all
            sources; None where there is nothing.
        """
        if not given:
            self._differ = True
            return None
        values = [one.astype(np.float64) for one in given]
        own = values[self.source]
        gap = np.asarray(sum(share * one for share, one in zip(self.shares, values, strict=True)) - own)
        told = whole_rows(own, gap)
        gap[~told] = 0.0
        self._rows += int(told.sum())
        self._held += len(np.unique(of[told & held[of]]))
        self._gap = self._gap + np.sum(gap[told] ** 2, axis=0)
        self._square = self._square + np.sum(own[told] ** 2, axis=0)
        self._total = self._total + own[told].sum(axis=0)
        return gap

    def num_held(self, columns: int) -> Array:
        """Held-back inputs that may judge each column, shape (columns,): none of those that are not alike."""
        if self._differ:
            return np.zeros(columns, dtype=int)
        others = self._gap / (1 - self.shares[self.source]) ** 2  # squares of the others' mean less the source's own
        spread = self._square - np.square(self._total) / max(self._rows, 1)
        if self.pooled:
            others, spread = np.full(columns, np.sum(others)), np.full(columns, np.sum(spread))
        return np.where(others <= (1 - ALIKE) * spread, self._held, 0)
