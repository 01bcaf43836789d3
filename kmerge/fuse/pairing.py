"""Units of different sources brought together by what they do: assignment, zip, transport.

All three give the same thing as clustering does, a `Pair`: which units make a merged one, and what stands for a unit
among the merged ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmerge.fuse.pairs import Pair
from kmerge.methods.registry import Array

ROUNDS = 50
"""Passes over all sources after which an alignment that still changes is stopped."""


def correlations(total: Array, products: Array, count: int) -> Array:
    """Correlation of all units with all units; 0 for units that never change.

    Args:
        total: sums of values, shape (units,).
        products: sums of products, shape (units, units).
        count: rows.
    """
    mean = total / max(count, 1)
    covariance = products / max(count, 1) - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    alive = spread > 1e-6 * max(float(spread.max()), 1e-300)
    safe = np.where(alive, spread, 1.0)
    result = covariance / np.outer(safe, safe)
    result[~alive] = 0
    result[:, ~alive] = 0
    np.fill_diagonal(result, 1.0)
    return np.asarray(np.clip(result, -1, 1))


def assigned(correlation: Array, shares: Sequence[float], rng: np.random.Generator) -> Pair:
    """One unit of each source for each merged one: linear assignments (arXiv:2209.04836, activation matching).

    Args:
        correlation: of all units of all sources, shape (sources * units,) squared.
        shares: importance of the sources, sums to 1.
        rng: of the order in which sources are visited.

    Returns:
        Units in the order of the first source. More than two sources are each matched to the mean of the others until
        nothing changes (merge-many).
    """
    from scipy.optimize import linear_sum_assignment

    count = len(shares)
    size = len(correlation) // count
    blocks = correlation.reshape(count, size, count, size)
    orders = [np.arange(size) for _ in range(count)]
    for number in range(1, count):
        orders[number] = linear_sum_assignment(blocks[0, :, number], maximize=True)[1]
    for _ in range(ROUNDS if count > 2 else 0):
        changed = False
        for number in (1 + rng.permutation(count - 1)).tolist():
            others = [other for other in range(count) if other != number and shares[other] > 0]
            if not others:
                continue
            likeness = sum(shares[other] * blocks[other, orders[other], number] for other in others)
            order = linear_sum_assignment(likeness, maximize=True)[1]
            places = np.arange(size)
            gain = np.asarray(likeness)[places, order].sum() - np.asarray(likeness)[places, orders[number]].sum()
            if gain > 1e-9:
                orders[number], changed = order, True
        if not changed:
            break
    steps = np.stack([np.eye(size)[order] for order in orders])  # (sources, merged units, units)
    return Pair(steps.transpose(0, 2, 1) * np.asarray(shares)[:, None, None], steps)


def zipped(correlation: Array, shares: Sequence[float], size: int) -> Pair:
    """Groups of units, within sources too, joined greedily by correlation (arXiv:2305.03053).

    Args:
        correlation: of all units of all sources, shape (sources * units,) squared.
        shares: importance of the sources: of the members of a group in its mean. Units of a source without one join a
            group when all are made.
        size: merged units.

    Departs from the paper: joins are by the lowest correlation between members, and stop when `size` groups are left,
    without a limit on how many units of one source a group may hold.
    """
    count, units = len(shares), len(correlation)
    weights = np.repeat(np.asarray(shares), units // count)
    counts = np.flatnonzero(weights > 0)
    likeness = correlation[np.ix_(counts, counts)]
    np.fill_diagonal(likeness, -np.inf)
    groups: list[list[int]] = [[unit] for unit in counts.tolist()]
    best = likeness.argmax(axis=1)
    top = likeness[np.arange(len(counts)), best]
    for _ in range(len(counts) - size):
        one = int(np.argmax(top))
        two = int(best[one])
        groups[one] += groups[two]
        groups[two] = []
        joined = np.minimum(likeness[one], likeness[two])
        likeness[one], likeness[:, one] = joined, joined
        likeness[two], likeness[:, two] = -np.inf, -np.inf
        likeness[one, one] = -np.inf
        top[two] = -np.inf
        stale = np.flatnonzero(((best == one) | (best == two)) & np.isfinite(top))
        for row in {*stale.tolist(), one}:
            best[row] = int(likeness[row].argmax())
            top[row] = likeness[row, best[row]]
    kept = [group for group in groups if group]
    lowest = np.stack([correlation[:, group].min(axis=1) for group in kept], axis=1)
    for unit in np.flatnonzero(weights == 0).tolist():
        kept[int(lowest[unit].argmax())].append(unit)
    merge = np.zeros((units, size))
    unmerge = np.zeros((size, units))
    for number, group in enumerate(kept):
        merge[group, number] = weights[group] / weights[group].sum()
        unmerge[number, group] = 1.0
    return Pair(
        merge.reshape(count, -1, size), np.ascontiguousarray(unmerge.reshape(size, count, -1).transpose(1, 0, 2))
    )


def transported(correlation: Array, shares: Sequence[float], epsilon: float) -> Pair:
    """Soft assignment of each source's units to those of the first, by optimal transport (arXiv:1910.05653).

    Args:
        correlation: of all units of all sources, shape (sources * units,) squared; the cost is 1 minus it.
        shares: importance of the sources.
        epsilon: entropic regularisation, above 0: the smaller, the closer to one unit for one.

    Departs from the paper: entropic transport in place of an exact one, on correlations of activations; every unit
    weighs the same.
    """
    count = len(shares)
    size = len(correlation) // count
    blocks = correlation.reshape(count, size, count, size)
    plans = [np.eye(size)] + [_sinkhorn(1 - blocks[number, :, 0], epsilon) for number in range(1, count)]
    stacked = np.stack(plans)  # (sources, units, merged units), rows and columns sum to 1
    return Pair(stacked * np.asarray(shares)[:, None, None], stacked.transpose(0, 2, 1))


def _sinkhorn(cost: Array, epsilon: float) -> Array:
    """The entropic transport plan between equal masses, rows and columns scaled to sum 1 (Cuturi, 2013)."""
    scores = -cost / epsilon
    rows, columns = np.zeros(len(cost)), np.zeros(len(cost))
    for _ in range(500):
        rows = -_logsumexp(scores + columns, 1)
        before = columns
        columns = -_logsumexp(scores + rows[:, None], 0)
        if np.max(np.abs(columns - before)) < 1e-9:
            break
    return np.asarray(np.exp(scores + rows[:, None] + columns))


def _logsumexp(values: Array, axis: int) -> Array:
    top = values.max(axis=axis, keepdims=True)
    return np.asarray(np.log(np.exp(values - top).sum(axis=axis)) + np.squeeze(top, axis))
