"""Units that are kept as they are, of whichever source, because a mean of several would be none of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmerge.fuse.pairs import Frame, Pair
from kmerge.fuse.units import Moments
from kmerge.methods.registry import Array
from kmerge.spaces import AxisUse, Space

ROUNDS = 4
SWEEPS = 3
"""How often all units that stay are tried against all others."""
WORK = 10**8
"""Products that these trials may take; very many units are chosen in half the rounds."""
RECURRENCE = 2.0
"""How much counts what units that stay read of each other, against what is read by other layers."""
_RIDGE, _TRUST = 1e-6, 1e-4


def selected(frame: Frame, number: int, moments: Moments, shares: Sequence[float]) -> Pair:
    """The pair of a space whose units are kept as they are.

    One unit after another joins those that stay: always the one from which, together with them, most of what is read
    of all sources' units follows by least squares. What is read are products with the weights of the layers behind,
    and with those recurrent weights that make units which stay.

    Args:
        frame: of the merge.
        number: of the space.
        moments: of its units.
        shares: importance of the sources.
    """
    space, size, count = frame.spaces[number], frame.sizes[number], len(frame.sources)
    mean = moments.total / max(moments.count, 1)
    spread = moments.products / max(moments.count, 1) - np.outer(mean, mean)
    recurrent = _recurrent(space)
    behind = _behind(frame, space, recurrent, spread, shares)
    within = [_between(frame, space, use) for use in space.uses("input") if _place(use) in recurrent]
    stay = np.arange(count * space.size)
    for _ in range(ROUNDS if stay.size**3 <= 5 * WORK else ROUNDS // 2):
        inner = np.zeros_like(behind)
        for source, values in within:
            part = slice(source * space.size, (source + 1) * space.size)
            own = stay[(stay >= part.start) & (stay < part.stop)] - part.start
            flat = values[:, :, own].reshape(space.size, -1)
            inner[part, part] += flat @ flat.T
        scale = RECURRENCE * float(np.sum(behind * spread)) / max(float(np.sum(inner * spread)), 1e-30)
        found = greedy(spread, behind + scale * inner, size)
        if np.array_equal(found, stay):
            break
        stay = found
    merge = np.zeros((count * space.size, size))
    merge[stay, np.arange(size)] = 1.0
    core = spread[np.ix_(stay, stay)] + _TRUST * max(float(np.trace(spread)) / len(spread), 1e-30) * np.eye(size)
    unmerge = np.linalg.solve(core, spread[stay]).reshape(size, count, -1)
    return Pair(merge.reshape(count, -1, size), np.ascontiguousarray(unmerge.transpose(1, 0, 2)))


class _Rest:
    """What does not follow from the units that stay.

    Attributes:
        spread: covariances of all units.
        metric: how errors count: the error of all units, e, costs e @ metric @ e.
        rest: covariances of what is left of all units.
        worth: diagonal of rest @ metric @ rest.
        stay: which units stay, (units,), bool.
    """

    def __init__(self, spread: Array, metric: Array) -> None:
        self.spread, self.metric, self.rest = spread, metric, spread.copy()
        self.ridge = _RIDGE * max(float(np.trace(spread)) / len(spread), 1e-30)
        self.worth = np.einsum("ij,ji->i", self.rest @ metric, self.rest)
        self.stay = np.zeros(len(spread), dtype=bool)

    @property
    def gains(self) -> Array:
        """How much less is left, in the metric, with each of the other units."""
        return np.where(self.stay, -np.inf, self.worth / (np.diagonal(self.rest) + self.ridge))

    def add(self, unit: int) -> None:
        self.stay[unit] = True
        self._change(self.rest[:, unit].copy(), -1 / (self.rest[unit, unit] + self.ridge))

    def remove(self, unit: int) -> None:
        stay = np.flatnonzero(self.stay)
        core = self.spread[np.ix_(stay, stay)] + self.ridge * np.eye(len(stay))
        own = np.linalg.solve(core, (stay == unit).astype(np.float64))
        self._change(own @ self.spread[stay], 1 / float(own[stay == unit][0]))
        self.stay[unit] = False

    def _change(self, column: Array, factor: float) -> None:
        """Add a multiple of the square of a column to the rest."""
        through = self.metric @ column
        self.worth = self.worth + 2 * factor * column * (self.rest @ through)
        self.worth += factor**2 * (column @ through) * column**2
        self.rest += factor * np.outer(column, column)


def greedy(spread: Array, metric: Array, size: int) -> Array:
    """Units from which the rest follows best by least squares: found one by one, then exchanged while that is better.

    Args:
        spread: covariances of all units, shape (units, units).
        metric: how errors count: the error of all units, e, costs e @ metric @ e.
        size: how many units to find, at most all.

    Returns:
        Their numbers, ascending.

    >>> greedy(np.diag([1., 4., 9.]), np.eye(3), 2).tolist()
    [1, 2]
    """
    rest = _Rest(spread, metric)
    for _ in range(size):
        rest.add(int(np.argmax(rest.gains)))
    trials = min(SWEEPS * size, WORK // spread.size) if size < len(spread) else 0
    while trials:
        swapped = False
        for unit in np.flatnonzero(rest.stay)[:trials].tolist():
            trials -= 1
            rest.remove(unit)
            gains = rest.gains
            best = int(np.argmax(gains))
            better = bool(gains[best] > gains[unit] * (1 + 1e-6))
            swapped |= better
            rest.add(best if better else unit)
        if not swapped:
            break
    return np.flatnonzero(rest.stay)


def readers(frame: Frame, number: int, source: int) -> Array:
    """All weights of a source that read units of a space from outside, shape (units, outputs); what counts are products
    of the rows with each other. The identity where there are none."""
    space = frame.spaces[number]
    values, vectors = np.linalg.eigh(_products(frame, space, _recurrent(space), source))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _place(use: AxisUse) -> tuple[int, int, int]:
    return use.source, use.layer, use.weight


def _recurrent(space: Space) -> set[tuple[int, int, int]]:
    """Weights that read units of a space and make them."""
    return {_place(use) for use in space.uses("input")} & {_place(use) for use in space.uses("output")}


def _rows(frame: Frame, use: AxisUse) -> Array:
    """A weight by unit and how often the unit stands there: (units, copies, all else)."""
    values = frame.sources[use.source].states[use.layer].weights[use.weight].tensor.read().astype(np.float64)
    moved = np.moveaxis(values, use.axis, 0)[use.places]
    return np.asarray(moved.reshape(*moved.shape[:2], -1))


def _products(frame: Frame, space: Space, recurrent: set[tuple[int, int, int]], source: int) -> Array:
    result = np.zeros((space.size, space.size))
    for use in space.uses("input"):
        if use.source == source and not use.part and _place(use) not in recurrent:
            rows = _rows(frame, use)
            for copy in range(rows.shape[1]):
                result += rows[:, copy] @ rows[:, copy].T
    return result if result.any() else np.eye(space.size)


def _behind(
    frame: Frame, space: Space, recurrent: set[tuple[int, int, int]], spread: Array, shares: Sequence[float]
) -> Array:
    """What is read by other layers; each source counts by its share."""
    result = np.zeros_like(spread)
    for source, share in enumerate(shares):
        part = slice(source * space.size, (source + 1) * space.size)
        products = _products(frame, space, recurrent, source)
        result[part, part] = share * products / max(float(np.sum(products * spread[part, part])), 1e-30)
    return result


def _between(frame: Frame, space: Space, use: AxisUse) -> tuple[int, Array]:
    """The source of a recurrent weight, and the weight by unit that it reads, gate, and unit that it makes."""
    made = next(other.places for other in space.uses("output") if _place(other) == _place(use))
    return use.source, _rows(frame, use)[:, 0][:, made.T]
