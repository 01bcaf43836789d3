"""Which units of all sources become one: what they do on the same inputs, and how much they matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kmerge.fuse.clusters import cluster_units
from kmerge.fuse.context import Context, Site, Task
from kmerge.fuse.pairs import Frame, Pair, by_position, from_first
from kmerge.methods.registry import Array
from kmerge.spaces import Space

ROWS = 20_000


@dataclass(eq=False)
class Moments:
    """Sums over rows for one space: values of all sources' units, (sources * units,), and their products."""

    total: Array
    products: Array
    count: int = 0

    def add(self, values: Array) -> None:
        values = values.astype(np.float64)
        self.total += values.sum(axis=0)
        self.products += values.T @ values
        self.count += len(values)


def unit_moments(context: Context, tasks: Sequence[Task]) -> dict[int, Moments]:
    """One pass of the sources over all inputs: moments of every space that can be seen."""
    sites: list[Site] = [site for task in tasks for site in task.sites()]
    wanted = tuple(dict.fromkeys(ref for site in sites for ref in site.tensors))
    result: dict[int, Moments] = {}
    for values in context.source_tape.passes(wanted, ()):
        for site in sites:
            for space, rows in site.views(values, ROWS / context.examples, context.rng):
                size = rows.shape[1]
                found = result.setdefault(space, Moments(np.zeros(size), np.zeros((size, size))))
                found.add(rows)
    return result


def importance(frame: Frame, space: Space) -> Array:
    """How strongly each unit is read: sum of squared weights of all layers that read it, shape (sources, units)."""
    result = np.zeros((len(frame.sources), space.size))
    for use in space.axes:
        if use.role == "input" and not use.part:
            values = frame.sources[use.source].states[use.layer].weights[use.weight].tensor.read().astype(np.float64)
            moved = np.moveaxis(values, use.axis, 0)[use.places]
            result[use.source] += np.sum(moved.reshape(space.size, -1) ** 2, axis=1)
    return result


def clustered(frame: Frame, number: int, moments: Moments, scaled: bool, rng: np.random.Generator) -> Pair:
    """Units of one space by weighted k-means.

    Args:
        frame: of the merge.
        number: of the space.
        moments: of its units.
        scaled: whether a unit's size means nothing, because what follows keeps multiples multiples (ReLU).
        rng: source of random numbers.
    """
    space, size, count = frame.spaces[number], frame.sizes[number], len(frame.sources)
    products = moments.products / max(moments.count, 1)
    square = np.maximum(np.diagonal(products), 1e-12)
    length = np.sqrt(square) if scaled else np.ones_like(square)
    matters = importance(frame, space) * (square.reshape(count, -1) if scaled else 1.0)
    matters = matters / np.maximum(matters.sum(axis=1, keepdims=True), 1e-300)
    weights = matters.ravel() if matters.any() else np.ones(len(square))
    labels = cluster_units(products / np.outer(length, length), weights, size, rng)
    merge = np.zeros((len(square), size))
    merge[np.arange(len(square)), labels] = weights + 1e-9 * weights.mean()
    merge = merge / merge.sum(axis=0) / length[:, None]
    made = np.einsum("ic,ij,jc->c", merge, products, merge, optimize=True)
    with_made = np.einsum("ij,ji->i", products, merge[:, labels])
    unmerge = np.zeros((size, len(square)))
    unmerge[labels, np.arange(len(square))] = with_made / np.maximum(made[labels], 1e-12)
    return Pair(
        merge.reshape(count, -1, size), np.ascontiguousarray(unmerge.reshape(size, count, -1).transpose(1, 0, 2))
    )


def is_ours(frame: Frame, space: Space, shared: Mapping[int, frozenset[int]]) -> bool:
    """Whether a space is one of the trunk: axes of shared layers stand on it.

    Args:
        shared: per source, numbers of its shared layers.
    """
    return any(use.layer in shared[use.source] for use in space.axes)


def means_the_same(space: Space) -> bool:
    """Whether fixed units mean the same at the same place in every source: outputs of the networks, and their inputs."""
    return space.reason.startswith(("output of", "input "))


def settled(frame: Frame, space: Space, ours: bool, shares: Sequence[float]) -> Pair:
    """The pair of a space whose units keep their places."""
    count = len(frame.sources)
    if not ours:  # units of one source alone
        return Pair(*(np.stack([np.eye(space.size)] * count) for _ in range(2)))
    return by_position(count, space.size, shares) if means_the_same(space) else from_first(count, space.size)
