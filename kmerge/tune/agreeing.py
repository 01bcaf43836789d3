"""Agreement of heads with their sources, and what they lose, summed batch by batch: no output is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kmerge.agreement import Agreement, measure_agreement
from kmerge.methods.registry import Array
from kmerge.tune.heads import Head


@dataclass
class Loss:
    """The loss of one output, over batches."""

    total: float = 0.0
    labels: float = 0.0

    def add(self, loss: Any, wanted: Array, given: Array) -> None:
        """Count a batch, by its labels."""
        labels = float(loss.labels(wanted, given, None))
        self.total, self.labels = self.total + labels * float(loss(wanted, given)), self.labels + labels

    @property
    def mean(self) -> float:
        return self.total / self.labels if self.labels else 0.0


@dataclass
class Agreeing:
    """How well one head agrees with its source, over batches; as `measure_agreement` of all of them tells.

    Attributes:
        head: which.
        synthetic: whether the inputs are made up.
    """

    head: Head
    synthetic: bool
    _rows: int = field(default=0, init=False)
    _alike: float = field(default=0.0, init=False)
    _decides: bool = field(default=True, init=False)
    _finite: bool = field(default=True, init=False)
    _moments: _Moments | None = field(default=None, init=False)

    def add(self, wanted: Array, given: Array) -> None:
        """Count a batch of logits, or of values where the head ends in none: shapes (rows, ...)."""
        head = self.head
        theirs, mine = (_ended(head.ending, np.asarray(array, np.float64)) for array in (wanted, given))
        rows = len(theirs)
        self._rows += rows
        self._finite &= bool(np.isfinite(mine).all())
        if self._decides:
            found = measure_agreement(head.label, head.name, theirs, mine, self.synthetic, head.ending == "sigmoid")
            self._alike += found.value * rows
            self._decides = found.measure == "decisions"
        if not head.ending or not self._decides:
            self._moments = self._moments or _Moments(theirs[0])
            self._moments.add(theirs, mine)

    def found(self) -> Agreement:
        """The agreement on all rows."""
        if self._decides or self._moments is None:
            value = self._alike / self._rows if self._rows and self._finite else 0.0
            return Agreement(self.head.label, self.head.name, "decisions", value, self._rows, self.synthetic)
        value = self._moments.correlation()
        return Agreement(self.head.label, self.head.name, "correlation", value, self._rows, self.synthetic)


class _Moments:
    """Sums of two outputs, of their squares and of their products, per entry, around a value of the first."""

    def __init__(self, around: Array) -> None:
        self.around, self.rows, self.finite = around, 0, True
        self.sums = np.zeros((5, *around.shape))
        self.least, self.most = (np.full((2, *around.shape), sign * np.inf) for sign in (1, -1))
        self.apart = 0.0

    def add(self, theirs: Array, mine: Array) -> None:
        self.finite &= bool(np.isfinite(theirs).all() and np.isfinite(mine).all())
        if not self.finite:
            return
        one, two = theirs - self.around, mine - self.around
        self.rows += len(one)
        self.sums += np.stack([(part).sum(0) for part in (one, two, one * one, two * two, one * two)])
        self.least = np.minimum(self.least, np.stack([theirs.min(0), mine.min(0)]))
        self.most = np.maximum(self.most, np.stack([theirs.max(0), mine.max(0)]))
        self.apart = max(self.apart, float(np.abs(theirs - mine).max(initial=0)))

    def correlation(self) -> float:
        """Pearson's, over rows and entries, each entry centred."""
        if not self.finite or not self.rows or not self.around.size:
            return 0.0
        largest = [max(float(np.abs(self.least[n]).max()), float(np.abs(self.most[n]).max())) for n in (0, 1)]
        moves = [float((self.most[n] - self.least[n]).max()) > 2e-6 * largest[n] for n in (0, 1)]
        if not moves[0]:
            return float(self.apart <= 2e-6 * largest[0])
        if not moves[1]:
            return 0.0
        one, two, squares, others, products = self.sums
        both = float((products - one * two / self.rows).sum())
        spread = float((squares - one**2 / self.rows).sum()), float((others - two**2 / self.rows).sum())
        if min(spread) <= 0:
            return 0.0
        return float(np.clip(both / np.sqrt(spread[0] * spread[1]), -1, 1))


def _ended(ending: str, values: Array) -> Array:
    """Through what a head ends in."""
    if ending == "softmax":
        powers = np.exp(values - values.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True))
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -700, 700)))) if ending == "sigmoid" else values
