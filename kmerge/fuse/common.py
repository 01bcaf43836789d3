"""What all sources give at the same output: where they do one task, it says more than what any of them gives alone.

Sources of one task differ by what each of them got wrong, mostly. A head is fitted to what its own source gives, and as
far as the rows that are held back cannot tell the difference, to what all sources give on average, which is nearer to
the truth than any of them (the error of an average; Breiman, Bagging predictors, 1996).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kmerge.methods.registry import Array

ALIKE = 0.5
"""Share of what a source gives that the others' average must explain, so that they are taken to do one task."""


@dataclass(eq=False)
class Common:
    """How alike the sources are at one output, told row by row.

    Attributes:
        shares: importance of the sources.
        source: whose output is to be moved.
    """

    shares: Sequence[float]
    source: int
    _rows: int = 0
    _held: int = 0
    _apart: float = 0.0
    _square: float = 0.0
    _total: Array | float = 0.0
    _differ: bool = False

    def add(self, given: Sequence[Array], held: Array) -> Array:
        """More rows.

        Args:
            given: what each source gives, shapes (rows, outputs); sources of other shapes have nothing in common.
            held: which of the inputs that these rows are of are held back.

        Returns:
            From what the source gives to what all of them give on average, shape (rows, outputs).
        """
        own = given[self.source].astype(np.float64)
        self._differ |= len({values.shape for values in given}) > 1
        if self._differ:
            return np.zeros_like(own)
        gap = sum(share * values.astype(np.float64) for share, values in zip(self.shares, given, strict=True)) - own
        others = gap / (1 - self.shares[self.source])
        whole = np.isfinite(own).all(axis=1) & np.isfinite(others).all(axis=1)
        self._rows += int(whole.sum())
        self._held += int(held.sum())
        self._apart += float(np.sum(others[whole] ** 2))
        self._square += float(np.sum(own[whole] ** 2))
        self._total = self._total + own[whole].sum(axis=0)
        return np.asarray(gap)

    @property
    def apart(self) -> int:
        """How many inputs were held back, where the sources do one task; 0 where they do not."""
        spread = self._square - float(np.sum(np.square(self._total))) / max(self._rows, 1)
        one_task = not self._differ and self._apart <= (1 - ALIKE) * spread
        return self._held if one_task else 0
