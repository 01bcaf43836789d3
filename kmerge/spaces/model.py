"""Spaces: what the derivation hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kmerge.spaces.scope import Part, Role
from kmerge.spaces.units import Labels


@dataclass(frozen=True, eq=False)
class AxisUse:
    """An axis of a weight on which units of a space stand.

    Attributes:
        source: number of the source.
        layer: number of the layer in that source's graph.
        weight: its place in `Source.states[layer].weights`.
        axis: of the weight.
        units: the unit at each position of the axis, -1 where a unit of another space stands.
        role: output, what the units are made with (kernel columns, biases, scales), which is merged; input, what reads
            them, which is unmerged.
        part: the piece of the weight that this is about, (axis, start, stop) for each axis that it does not span;
            empty for the whole weight.
    """

    source: int
    layer: int
    weight: int
    axis: int
    units: Labels
    role: Role
    part: Part = ()

    @cached_property
    def places(self) -> Labels:
        """Positions of each unit, shape (units, how often each stands there)."""
        positions = np.argsort(self.units, kind="stable")[int(np.sum(self.units < 0)) :]
        return positions.reshape(int(self.units.max()) + 1, -1)

    @property
    def mapping(self) -> str:
        """How units stand on the axis, in words."""
        places = self.places
        size, times = places.shape
        own = places.size
        if own == len(self.units) and times == 1:
            return "each once" if np.array_equal(self.units, np.arange(size)) else "each once, in another order"
        if own < len(self.units) and times == 1 and np.array_equal(places[:, 0], places[0, 0] + np.arange(size)):
            return f"at {places[0, 0]} to {places[-1, 0]} of {len(self.units)}"
        if own == len(self.units) and np.array_equal(self.units, np.tile(np.arange(size), times)):
            return f"{times} blocks of all"
        if own == len(self.units) and np.array_equal(self.units, np.repeat(np.arange(size), times)):
            return f"each {times} times in a row"
        return f"each {times} times among {len(self.units)}"


@dataclass(frozen=True, eq=False)
class Space:
    """Units that may change places with each other, everywhere at once.

    Attributes:
        size: number of units.
        axes: where they stand.
        fixed: whether they must stay as they are.
        reason: why they must.
        notes: layers that look at all units together, which permutations do not mind but other merges may.
    """

    size: int
    axes: tuple[AxisUse, ...]
    fixed: bool = False
    reason: str = ""
    notes: tuple[str, ...] = ()

    def uses(self, role: Role) -> tuple[AxisUse, ...]:
        return tuple(use for use in self.axes if use.role == role)


def order_of(axes: Sequence[tuple[AxisUse, Labels]], length: int) -> Labels:
    """Which old position comes to each position of an axis, for permutations of the spaces on it.

    Args:
        axes: uses of this axis, one per space, each with a permutation: the old unit that comes to each unit's place.
        length: of the axis.
    """
    order = np.arange(length)
    for use, permutation in axes:
        order[use.places] = use.places[permutation]
    return order
