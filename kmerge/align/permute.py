"""Permutations of feature spaces, and sources whose weights read permuted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kmerge.methods.registry import Array
from kmerge.source import Source
from kmerge.spaces import AxisUse, Space, order_of
from kmerge.spaces.scope import Part
from kmerge.spaces.units import Labels
from kmerge.store import Tensor
from kmerge.store.derived import DerivedTensor


@dataclass(frozen=True)
class Step:
    """A change of order along one axis of a weight, or of a part of it."""

    axis: int
    part: Part
    order: Labels


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which unit of each source stands for which unit of the first.

    Attributes:
        labels: of the sources.
        spaces: of all of them together (`kmerge.spaces.layout_spaces`).
        permutations: per source and space, shape (units,): the source's own unit that comes to each place. The first
            source and fixed spaces keep their order.
    """

    labels: tuple[str, ...]
    spaces: tuple[Space, ...]
    permutations: tuple[tuple[Labels, ...], ...]

    @property
    def moved(self) -> int:
        """How many units of all sources change their places."""
        return sum(int(np.sum(order != np.arange(len(order)))) for row in self.permutations for order in row)


def steps_of(alignment: Alignment, number: int) -> dict[tuple[int, int], list[Step]]:
    """What has to be reordered in one source, by (layer, weight): whole axes first, then parts."""
    along: dict[tuple[int, int, int, Part], list[tuple[AxisUse, Labels]]] = {}
    for space, permutation in zip(alignment.spaces, alignment.permutations[number], strict=True):
        for use in space.axes:
            if use.source == number:
                along.setdefault((use.layer, use.weight, use.axis, use.part), []).append((use, permutation))
    steps: dict[tuple[int, int], list[Step]] = {}
    for (layer, weight, axis, part), pairs in along.items():
        order = order_of(pairs, len(pairs[0][0].units))
        if not np.array_equal(order, np.arange(len(order))):
            steps.setdefault((layer, weight), []).append(Step(axis, part, order))
    return {place: sorted(found, key=lambda step: bool(step.part)) for place, found in steps.items()}


def reordered(array: Array, steps: Sequence[Step]) -> Array:
    """A copy of a weight in its new order."""
    result: Array = np.array(array)
    for step in steps:
        if not step.part:
            result = np.take(result, step.order, axis=step.axis)
            continue
        piece = slices(step.part, result.ndim)
        result[piece] = np.take(result[piece], step.order, axis=step.axis)
    return result


def slices(part: Part, rank: int) -> tuple[slice, ...]:
    """Where a part of a weight lies in it."""
    bounds = {axis: slice(start, stop) for axis, start, stop in part}
    return tuple(bounds.get(axis, slice(None)) for axis in range(rank))


@dataclass(frozen=True, slots=True, eq=False)
class PermutedTensor(DerivedTensor):
    """A tensor whose numbers are read in another order.

    Attributes:
        original: the tensor as it is stored.
    """

    original: Tensor = field(kw_only=True)


def permuted(source: Source, alignment: Alignment) -> Source:
    """The source with its units in the order of the first: the same function, from weights that read permuted.

    Args:
        source: one of those that were aligned, known by its label.
        alignment: of all of them.

    Returns:
        A source in which a tensor that has to be reordered is a `PermutedTensor`; nothing is read yet.
    """
    steps: Mapping[tuple[int, int], list[Step]] = steps_of(alignment, alignment.labels.index(source.label))
    states = []
    for layer, state in enumerate(source.states):
        weights = list(state.weights)
        for number, weight in enumerate(weights):
            found = steps.get((layer, number))
            if found:
                weights[number] = replace(weight, tensor=_permuted(weight.tensor, found))
        states.append(replace(state, weights=tuple(weights)))
    return replace(source, states=tuple(states))


def _permuted(old: Tensor, steps: Sequence[Step]) -> PermutedTensor:
    def make() -> Array:
        return reordered(old.read(), steps)

    return PermutedTensor(old.shape, old.dtype, old.size, old.nbytes, old.where, make, original=old)
