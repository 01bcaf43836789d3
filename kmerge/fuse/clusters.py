"""Which units of all sources become one: weighted k-means over their activations, from second moments alone."""

from __future__ import annotations

import numpy as np

from kmerge.methods.registry import Array

ROUNDS = 60
RESTARTS = 8


def cluster_units(moments: Array, importance: Array, count: int, rng: np.random.Generator) -> Array:
    """Weighted k-means of units that are known by their second moments only.

    Args:
        moments: products of all units with all units, shape (units, units), summed or averaged over the same rows.
        importance: of each unit, shape (units,), at least 0.
        count: number of clusters, at most the number of units.
        rng: source of random numbers.

    Returns:
        Number of the cluster of each unit, shape (units,); every cluster has at least one.
    """
    weights = importance / max(float(importance.sum()), 1e-300) + 1e-9 / len(importance)
    best, least = np.arange(len(moments)) % count, np.inf
    for _ in range(RESTARTS):
        labels = _seeded(moments, weights, count, rng)
        for _ in range(ROUNDS):
            apart = distances(moments, weights, labels, count)
            changed = _filled(np.argmin(apart, axis=1), apart, weights, count)
            if np.array_equal(changed, labels):
                break
            labels = changed
        apart = distances(moments, weights, labels, count)
        loss = float(weights @ apart[np.arange(len(labels)), labels])
        if loss < least - 1e-12:
            best, least = labels, loss
    return best


def _seeded(moments: Array, weights: Array, count: int, rng: np.random.Generator) -> Array:
    """First clusters around units that are far from each other (k-means++, Arthur and Vassilvitskii 2007)."""
    square = np.diagonal(moments)
    chosen = [int(rng.choice(len(weights), p=weights / weights.sum()))]
    nearest = np.maximum(square - 2 * moments[chosen[0]] + square[chosen[0]], 0)
    while len(chosen) < count:
        chance = weights * nearest
        chance[chosen] = 0
        total = chance.sum()
        if total <= 0:
            left = np.setdiff1d(np.arange(len(weights)), chosen)
            chosen += left[: count - len(chosen)].tolist()
            break
        unit = int(rng.choice(len(weights), p=chance / total))
        chosen.append(unit)
        nearest = np.minimum(nearest, np.maximum(square - 2 * moments[unit] + square[unit], 0))
    apart = square[:, None] - 2 * moments[:, chosen] + square[chosen]
    labels: Array = np.argmin(apart, axis=1)
    labels[chosen] = np.arange(count)
    return labels


def distances(moments: Array, weights: Array, labels: Array, count: int) -> Array:
    """Squared distance of each unit to the centre of each cluster, shape (units, count)."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=count)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    totals = np.bincount(labels, weights, minlength=count)
    to_centres = np.add.reduceat((moments * weights)[:, order], starts, axis=1) / totals
    within = np.bincount(labels, weights * to_centres[np.arange(len(labels)), labels], minlength=count) / totals
    return np.diagonal(moments)[:, None] - 2 * to_centres + within


def _filled(labels: Array, apart: Array, weights: Array, count: int) -> Array:
    """Clusters that lost all units take those that lie farthest from their own centre."""
    sizes = np.bincount(labels, minlength=count)
    for empty in np.flatnonzero(sizes == 0):
        loss = weights * apart[np.arange(len(labels)), labels]
        loss[sizes[labels] < 2] = -np.inf
        unit = int(np.argmax(loss))
        sizes[labels[unit]] -= 1
        labels[unit] = empty
        sizes[empty] = 1
        apart[unit, empty] = 0
    return labels
