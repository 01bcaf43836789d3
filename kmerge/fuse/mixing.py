"""What takes units to other units, block by block: as one matrix it would be as large as both axes multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kmerge.methods.registry import Array
from kmerge.spaces.units import Labels


@dataclass(frozen=True, eq=False)
class Block:
    """Units on a part of an axis, each with its copies.

    Attributes:
        old: places of the units, shape (units, copies).
        new: places of what is made of them, shape (merged units, copies).
        by: shape (units, merged units); a number where units keep their places and are multiplied by it.
    """

    old: Labels
    new: Labels
    by: Array | float

    def add(self, values: Array, result: Array) -> None:
        """Add what is made of values to a result; the axis is the last one of both."""
        old, new = _in_a_row(self.old), _in_a_row(self.new)
        if old is not None and new is not None:  # without the copies that lists of places make
            units = values[..., old]
            result[..., new] += units @ self.by if isinstance(self.by, np.ndarray) else self.by * units
        elif isinstance(self.by, np.ndarray):
            units = np.swapaxes(values[..., self.old], -1, -2)
            result[..., self.new] += np.swapaxes(units @ self.by, -1, -2)
        else:
            result[..., self.new] += self.by * values[..., self.old]


def _in_a_row(places: Labels) -> slice | None:
    """Places of units without copies that stand one after the other."""
    if places.shape[1] != 1 or not len(places):
        return None
    first = int(places[0, 0])
    return slice(first, first + len(places)) if np.all(np.diff(places[:, 0]) == 1) else None


@dataclass(frozen=True, eq=False)
class Line:
    """A linear map from one axis to another.

    Attributes:
        old, new: lengths of the axes.
        blocks: that it is the sum of; no two of them make the same units.
    """

    old: int
    new: int
    blocks: tuple[Block, ...]

    def apply(self, values: Array, axis: int = -1) -> Array:
        """Values with the axis mapped."""
        moved = np.moveaxis(values, axis, -1)
        result = np.zeros((*moved.shape[:-1], self.new), np.result_type(values, np.float64))
        for block in self.blocks:
            block.add(moved, result)
        return np.moveaxis(result, -1, axis)

    def reached(self) -> Array:
        """Which units are made of anything, shape (new,), bool."""
        found = np.zeros(self.new, dtype=bool)
        for block in self.blocks:
            made = np.any(np.atleast_2d(block.by) != 0, axis=0)
            found[block.new] |= made[:, None]
        return found

    def __abs__(self) -> Line:
        return replace(self, blocks=tuple(replace(block, by=np.abs(block.by)) for block in self.blocks))


def unmoved(length: int, factor: float) -> Line:
    """An axis whose entries keep their places."""
    places = np.arange(length)[:, None]
    return Line(length, length, (Block(places, places, factor),))


@dataclass(frozen=True, eq=False)
class Mixing:
    """A linear map between rows: entries stand on several axes, one after the other, each of which is mapped.

    `rows @ mixing` maps rows of shape (..., old).

    Attributes:
        lines: the map of each axis.
        scale: that the results are multiplied by, shape (product of the lines' new lengths,).
        copies: how many entries in a row belong to each place on the axes.
    """

    __array_ufunc__ = None  # NumPy leaves `rows @ mixing` to this class

    lines: tuple[Line, ...]
    scale: Array
    copies: int = 1

    def __rmatmul__(self, rows: Array) -> Array:
        lead = rows.shape[:-1]
        values = rows.reshape(*lead, *(line.old for line in self.lines), self.copies)
        for number, line in enumerate(self.lines):
            values = line.apply(values, len(lead) + number)
        values = values.reshape(*lead, len(self.scale), self.copies) * self.scale[:, None]
        return np.asarray(values.reshape(*lead, -1))

    def __abs__(self) -> Mixing:
        return replace(self, lines=tuple(abs(line) for line in self.lines), scale=abs(self.scale))

    def reached(self) -> Array:
        """Which results are made of anything, shape (new,), bool."""
        found = np.ones(1, dtype=bool)
        for line in self.lines:
            found = np.outer(found, line.reached()).ravel()
        return np.repeat(found & (self.scale != 0), self.copies)

    def matrix(self) -> Array:
        """The map as a matrix, shape (old, new): for short rows."""
        return np.asarray(np.eye(math.prod(line.old for line in self.lines) * self.copies) @ self)


def reached(mixings: Sequence[Mixing]) -> Array:
    """Which results are made of anything by some of them, shape (new,), bool."""
    return np.asarray(np.any([mixing.reached() for mixing in mixings], axis=0))
