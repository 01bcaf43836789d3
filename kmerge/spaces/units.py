"""Units and what ties them: the equations from which spaces follow.

Every axis that indexes units is an array of numbers, one per position: which unit stands there. Rules state that two
axes hold the same units, or that some units may not move; what may be permuted follows from all statements together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""The unit at each position of an axis."""


@dataclass(frozen=True)
class Order:
    """An axis whose positions keep their order: time steps, rows of pixels, inputs of the network.

    Attributes:
        size: its length; None where it is free.
        reason: why nothing on it may move, for people.
    """

    size: int | None
    reason: str


Axis = Any
"""`Labels` for an axis of units, `Order` for any other."""
Axes = tuple[Axis, ...]
"""The axes of a tensor, batch first."""


def is_units(axis: Axis) -> bool:
    return isinstance(axis, np.ndarray)


def length(axis: Axis) -> int | None:
    return len(axis) if is_units(axis) else axis.size


@dataclass(frozen=True)
class Solution:
    """Spaces and the unit of each number.

    Attributes:
        space: number of the space, per number of a unit.
        unit: place within its space, per number of a unit.
        sizes: units per space.
        reasons: why a space is fixed, "" where it is not.
        notes: remarks per space.
    """

    space: Labels
    unit: Labels
    sizes: tuple[int, ...]
    reasons: tuple[str, ...]
    notes: tuple[tuple[str, ...], ...]


class Equations:
    """Statements about units, collected while walking a graph."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.axes: list[Labels] = []
        self.pins: list[tuple[Labels, str]] = []
        self.remarks: list[tuple[Labels, str]] = []

    def fresh(self, size: int) -> Labels:
        """Units that nothing is known of yet."""
        start = len(self.parents)
        self.parents.extend(range(start, start + size))
        labels = np.arange(start, start + size)
        self.axes.append(labels)
        return labels

    def tie(self, first: Labels, second: Labels) -> None:
        """The same unit stands at each position of both axes."""
        if first is second:
            return
        for one, two in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._root(one), self._root(two)))
            self.parents[high] = low

    def pin(self, labels: Labels, reason: str) -> None:
        """These units stay where they are."""
        self.pins.append((labels, reason))

    def keep_whole(self, labels: Labels) -> None:
        """Units may only change places within this set: it is a tensor's axis, or a part of one that is cut out."""
        self.axes.append(labels)

    def remark(self, labels: Labels, text: str) -> None:
        self.remarks.append((labels, text))

    def _root(self, unit: int) -> int:
        parents = self.parents
        while parents[unit] != unit:
            parents[unit] = parents[parents[unit]]
            unit = parents[unit]
        return unit

    def solve(self) -> Solution:
        """The coarsest spaces within which units may change places.

        Units are of one space if they stand equally often on every axis and neither is pinned. Then any permutation
        of them moves every axis within itself: the k-th place of one unit becomes the k-th place of the other.
        """
        roots = np.array([self._root(unit) for unit in range(len(self.parents))], dtype=np.int64)
        _, unit = np.unique(roots, return_inverse=True)  # in order of first appearance: the least number is the root
        count = int(unit.max()) + 1 if unit.size else 0
        colour = np.zeros(count, dtype=np.int64)
        texts = [""]
        for labels, reason in reversed(self.pins):  # the first reason counts
            if reason not in texts:
                texts.append(reason)
            colour[unit[labels]] = texts.index(reason)
        fixed = colour.copy()
        seen: set[bytes] = set()
        for labels in self.axes:
            own = unit[labels]
            if own.tobytes() not in seen:
                seen.add(own.tobytes())
                self._refine(colour, own)
        found, first, space = np.unique(colour, return_index=True, return_inverse=True)
        order = np.argsort(first)  # spaces in order of first appearance
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        space = rank[space]
        place = np.zeros(count, dtype=np.int64)
        for number in range(len(found)):
            members = np.flatnonzero(space == number)
            place[members] = np.arange(len(members))
        remarks: list[list[str]] = [[] for _ in found]
        for labels, text in self.remarks:
            for number in np.unique(space[unit[labels]]):
                if text not in remarks[number]:
                    remarks[number].append(text)
        return Solution(
            space[unit],
            place[unit],
            tuple(np.bincount(space, minlength=len(found)).tolist()) if count else (),
            tuple(texts[fixed[first[number]]] for number in order),
            tuple(tuple(row) for row in remarks),
        )

    @staticmethod
    def _refine(colour: Labels, axis: Labels) -> None:
        """Tell units apart by how often they stand on an axis."""
        members, counts = np.unique(axis, return_counts=True)
        _, kinds = np.unique(np.stack([colour[members], counts]), axis=1, return_inverse=True)
        colour[members] = int(colour.max()) + 1 + kinds.ravel()
