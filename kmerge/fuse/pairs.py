"""Merge and unmerge: which unit of the merged network is made of which of the sources', and weights brought there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kmerge.fuse.mixing import Block, Line
from kmerge.methods.registry import Array
from kmerge.source import Source
from kmerge.spaces import AxisUse, Space
from kmerge.spaces.units import Labels

LEAST_PART = 1e-3
"""Share of a merged unit from which some sources alone can stand for it."""
Place = tuple[int, int, int]
"""A weight of a source: (source, layer, weight) numbers."""


@dataclass(frozen=True, eq=False)
class Pair:
    """How the units of one space become those of the merged network.

    Attributes:
        merge: shape (sources, units, merged units): a merged unit is the sum of all sources' units times this.
        unmerge: shape (sources, merged units, units): what stands for a source's unit among the merged ones.
    """

    merge: Array
    unmerge: Array

    def made(self, source: int, alone: bool) -> Array:
        """What merged units are made of a source's, shape (units, merged units).

        A layer that is one source's alone makes what stands for its units even where no merged unit is made of them.
        """
        own = self.merge[source]
        return np.asarray(self.unmerge[source].T if alone and not own.any() else own)

    def read(self, source: int) -> Array:
        """What takes those who read a source's units to the merged ones, shape (units, merged units)."""
        return np.asarray(self.unmerge[source].T)

    def part(self, source: int, alone: bool) -> Array:
        """How much of each merged unit comes from a source, by least squares, shape (merged units,)."""
        return np.asarray(np.einsum("ik,ki->k", self.made(source, alone), self.unmerge[source]))


@dataclass(frozen=True)
class Kept:
    """Units that keep their places: a `Pair` of multiples of the identity, of which there may be many.

    Attributes:
        shares: how much of each merged unit comes from each source.
    """

    shares: tuple[float, ...]

    def made(self, source: int, alone: bool) -> float:
        own = self.shares[source]
        return 1.0 if alone and not own else own

    def read(self, source: int) -> float:
        return 1.0

    def part(self, source: int, alone: bool) -> float:
        return self.made(source, alone)


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a weight, with the units on it.

    Attributes:
        length: of the axis in the merged network.
        merge: whether units are made there; else they are read.
        blocks: (space, places of each unit in the source, places of each merged unit in the merged network).
        kept: (places, merged places) where no units stand.
    """

    length: int
    merge: bool
    blocks: tuple[tuple[int, Labels, Labels], ...]
    kept: tuple[Labels, Labels]

    def line(self, pairs: Sequence[Pair | Kept], source: int, old: int, share: float, alone: bool = False) -> Line:
        """What takes this axis from a source to the merged network.

        Args:
            pairs: per space.
            source: its number.
            old: length in the source.
            share: of the source in what has no units.
            alone: whether the weight is that of this source alone.
        """
        blocks = [Block(self.kept[0][:, None], self.kept[1][:, None], share if self.merge else 1.0)]
        for space, places, merged in self.blocks:
            by = pairs[space].made(source, alone) if self.merge else pairs[space].read(source)
            blocks.append(Block(places, merged, by))
        return Line(old, self.length, tuple(blocks))

    def parts(self, pairs: Sequence[Pair | Kept], source: int, share: float, alone: bool = False) -> Array:
        """How much of each merged unit comes from a source, shape (length,); sums to 1 over all sources.

        It is the part of the merged unit that the source's own share of it makes up, by least squares.
        """
        result = np.zeros(self.length)
        result[self.kept[1]] = share
        for space, _, merged in self.blocks:
            own = np.asarray(pairs[space].part(source, alone))
            result[merged] = np.maximum(own, 0).reshape(-1, 1)
        return result


def arranged(
    places: Sequence[Labels], sizes: Sequence[int], length: int
) -> tuple[int, list[Labels], Labels, Labels] | None:
    """Where units stand on an axis when spaces change their sizes.

    Args:
        places: per space, positions of each unit, shape (units, copies).
        sizes: per space, how many units it is to have.
        length: of the axis now.

    Returns:
        The new length, new positions per space, and positions without units, old and new; None where units of a space
        that is to change stand in no simple order.
    """
    segments: list[tuple[int, int, int, int]] = []  # start, length, space, copy (-1: all copies of a unit in a row)
    for number, (own, size) in enumerate(zip(places, sizes, strict=True)):
        units, copies = own.shape
        if np.array_equal(own, own[:1] + np.arange(units)[:, None]):
            segments += [(int(own[0, copy]), units, number, copy) for copy in range(copies)]
        elif np.array_equal(own.ravel(), own[0, 0] + np.arange(own.size)):
            segments.append((int(own[0, 0]), own.size, number, -1))
        elif size != units:
            return None
        else:
            segments += [(int(place), 1, number, -2) for place in own.ravel()]
    new = [np.zeros((size, own.shape[1]), dtype=np.int64) for own, size in zip(places, sizes, strict=True)]
    segments.sort()
    kept_old: list[int] = []
    kept_new: list[int] = []
    at = end = 0
    single = {(number, int(place)): index for number, own in enumerate(places) for index, place in np.ndenumerate(own)}
    for start, width, number, copy in [*segments, (length, 0, -1, 0)]:
        kept_old += range(end, start)
        kept_new += range(at, at + start - end)
        at += start - end
        end = start + width
        if number < 0:
            break
        size = sizes[number]
        if copy >= 0:
            new[number][:, copy] = at + np.arange(size)
            at += size
        elif copy == -1:
            new[number][:] = (at + np.arange(new[number].size)).reshape(new[number].shape)
            at += new[number].size
        else:
            new[number][single[number, start]] = at
            at += 1
    return at, new, np.array(kept_old, dtype=np.int64), np.array(kept_new, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Frame:
    """All spaces of a merge, with what stands on each axis of each weight.

    Attributes:
        sources: opened.
        spaces: of all sources together.
        sizes: units of each space in the merged network.
    """

    sources: tuple[Source, ...]
    spaces: tuple[Space, ...]
    sizes: tuple[int, ...]

    @cached_property
    def uses(self) -> Mapping[Place, Mapping[int, tuple[tuple[int, AxisUse], ...]]]:
        """Per weight and axis, the spaces that stand on the whole of it; parts of weights are left out."""
        found: dict[Place, dict[int, list[tuple[int, AxisUse]]]] = {}
        for number, space in enumerate(self.spaces):
            for use in space.axes:
                if not use.part:
                    axes = found.setdefault((use.source, use.layer, use.weight), {})
                    axes.setdefault(use.axis, []).append((number, use))
        return {place: {axis: tuple(row) for axis, row in axes.items()} for place, axes in found.items()}

    def shape(self, place: Place) -> tuple[int, ...]:
        source, layer, weight = place
        return tuple(self.sources[source].states[layer].weights[weight].tensor.shape)

    def axis(self, place: Place, axis: int) -> Axis | None:
        """What stands on an axis; None where it has no units.

        Raises:
            ValueError: if units stand on it in no order that another size could have.
        """
        uses = self.uses.get(place, {}).get(axis)
        if not uses:
            return None
        length = self.shape(place)[axis]
        found = arranged([use.places for _, use in uses], [self.sizes[number] for number, _ in uses], length)
        if found is None:
            raise ValueError(f"units on axis {axis} stand in no order that another size could have")
        total, new, kept_old, kept_new = found
        blocks = tuple((number, use.places, places) for (number, use), places in zip(uses, new, strict=True))
        return Axis(total, uses[0][1].role == "output", blocks, (kept_old, kept_new))

    def merged_weight(self, pairs: Sequence[Pair | Kept], places: Sequence[Place], shares: Sequence[float]) -> Array:
        """One weight of all its sources in the merged network, float64.

        Args:
            pairs: per space.
            places: the weight in each source that has it; one for a private layer.
            shares: importance of these sources where nothing else tells it, sums to 1.
        """
        result: Array | None = None
        total: Array = np.ones(())
        for number, (place, share) in enumerate(zip(places, shares, strict=True)):
            source, layer, weight = place
            values = self.sources[source].states[layer].weights[weight].tensor.read().astype(np.float64)
            axes = {axis: found for axis in range(values.ndim) if (found := self.axis(place, axis)) is not None}
            for pieces in self._pieces(place):
                values = np.concatenate(
                    [_read(values, use, pairs[space], self.sizes[space], source) for space, use in pieces], -1
                )
                values = np.moveaxis(values, -1, pieces[0][1].part[0][0])
            alone = len(places) == 1
            for axis, found in axes.items():
                values = found.line(pairs, source, values.shape[axis], share, alone).apply(values, axis)
            made = [(axis, found) for axis, found in axes.items() if found.merge]
            if not made:
                values = share * values
            elif len(made) > 1 or alone:  # several parts multiplied, or one source's alone: brought to 1
                part: Array = np.ones(())
                for axis, found in made:
                    shape = [-1 if axis == other else 1 for other in range(values.ndim)]
                    part = part * found.parts(pairs, source, share, alone).reshape(shape)
                total = part if not number else total + part
            result = values if result is None else result + values
        assert result is not None
        return np.where(total > LEAST_PART, result / np.maximum(total, LEAST_PART), 0.0)

    @cached_property
    def _parts(self) -> Mapping[Place, list[tuple[int, AxisUse]]]:
        """Per weight, the spaces that parts of it read."""
        found: dict[Place, list[tuple[int, AxisUse]]] = {}
        for number, space in enumerate(self.spaces):
            for use in space.axes:
                if use.role == "input" and len(use.part) == 1:
                    found.setdefault((use.source, use.layer, use.weight), []).append((number, use))
        return found

    def _pieces(self, place: Place) -> list[list[tuple[int, AxisUse]]]:
        """Parts of a weight that read one space each, beside each other: the groups of a convolution."""
        found: dict[int, list[tuple[int, AxisUse]]] = {}
        for number, use in self._parts.get(place, ()):
            found.setdefault(use.axis, []).append((number, use))
        result = []
        for pieces in found.values():
            pieces.sort(key=lambda piece: piece[1].part[0][1])
            ends = [0, *(use.part[0][2] for _, use in pieces)]
            along = {use.part[0][0] for _, use in pieces}
            whole = len(along) == 1 and ends == [use.part[0][1] for _, use in pieces] + ends[-1:]
            plain = all(use.places.size == len(use.units) for _, use in pieces)
            sizes = {self.sizes[number] * use.places.shape[1] for number, use in pieces}
            if whole and plain and len(sizes) == 1 and ends[-1] == self.shape(place)[next(iter(along))]:
                result.append(pieces)
        return result


def _read(values: Array, use: AxisUse, pair: Pair | Kept, size: int, source: int) -> Array:
    """A part of a weight that reads units, from merged ones; the axis that it is a part of comes last."""
    ((along, start, stop),) = use.part
    piece = np.take(values, np.arange(start, stop), axis=along)
    copies = use.places.shape[1]
    in_a_row = copies > 1 and np.array_equal(use.places.ravel(), np.arange(use.places.size))
    new = np.arange(size * copies)
    new = new.reshape(size, copies) if in_a_row else new.reshape(copies, size).T
    piece = Line(len(use.units), size * copies, (Block(use.places, new, pair.read(source)),)).apply(piece, use.axis)
    return np.moveaxis(piece, along, -1)
