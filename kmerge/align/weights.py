"""Weight matching: permutations that bring the weights of networks together, without any data (arXiv:2209.04836).

Two sources: coordinate descent over spaces, one linear assignment each. More: each source in turn is matched to the
mean of the others until nothing changes (merge-many, there and in arXiv:2405.17897).

Departs from the paper: the descent starts from a walk that matches space after space along weights whose other axes are
matched already, from the inputs on, which finds a permuted twin exactly; and a step is taken only if the sum gains by
it, also where a space stands on two axes of one weight (recurrent kernels). Heads of an attention layer are matched
with the best order of the dimensions within each pair of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.align.permute import Alignment, Step, reordered, slices
from kmerge.dialects.vocabulary import WeightKind
from kmerge.errors import MergeError
from kmerge.layout import Layout, source_graph
from kmerge.methods.registry import Array
from kmerge.spaces import AxisUse, Space, order_of
from kmerge.spaces.scope import Part
from kmerge.spaces.units import Labels

ROUNDS = 100
"""Passes over all spaces, and over all sources, after which a descent that still gains is stopped."""
_BLOCK = 1 << 22
_GAIN = 1e-9

Key = tuple[int, int]
"""A weight of a shared layer: the layer's number in the first source, the weight's place in it."""
Permutations = list[Labels]
Pairing = tuple[Labels, Array]


def align_by_weights(
    layout: Layout, spaces: Sequence[Space], shared_layers: Collection[int], weights: Sequence[float], seed: int = 0
) -> Alignment:
    """Match the units of all sources to those of the first, by the weights of the layers they share.

    Args:
        layout: the sources, laid over the first.
        spaces: of all sources together (`kmerge.spaces.layout_spaces`).
        shared_layers: numbers in the first source. Weights of other layers do not count; they are reordered all the
            same where they read shared units.
        weights: importance per source in the means that more than two sources are matched to, shape (n,).
        seed: of the order in which spaces and sources are visited.

    Returns:
        One permutation per source and space; identity for the first source and for fixed spaces.

    Raises:
        MergeError: if a weight is not finite.

    Holds the shared weights of all sources in memory.
    """
    arrays = [_arrays(layout, number, shared_layers) for number in range(len(layout.sources))]
    matcher = _Matcher(spaces, set(shared_layers), np.random.default_rng(seed))
    count = len(layout.sources)
    found = [matcher.identity() for _ in range(count)]
    for number in range(1, count):
        found[number] = matcher.descend(arrays[0], arrays[number], matcher.walk(arrays[0], arrays[number]))
    share = np.asarray(weights, dtype=np.float64)
    for _ in range(ROUNDS if count > 2 else 0):
        changed = False
        for number in 1 + matcher.rng.permutation(count - 1):
            others = [other for other in range(count) if other != number and share[other] > 0]
            if not others:
                continue
            target = matcher.mean(
                [arrays[other] for other in others], [found[other] for other in others], share[others]
            )
            before = found[number]
            found[number] = matcher.descend(target, arrays[number], list(before))
            changed |= any(not np.array_equal(old, new) for old, new in zip(before, found[number], strict=True))
        if not changed:
            break
    labels = tuple(source.label for source in layout.sources)
    return Alignment(labels, tuple(spaces), tuple(tuple(row) for row in found))


def _arrays(layout: Layout, number: int, shared: Collection[int]) -> dict[Key, Array]:
    """The weights that count of one source; statistics and state do not."""
    source, matched = layout.sources[number], layout.matches[number].layers
    arrays: dict[Key, Array] = {}
    for place in shared:
        for weight, item in enumerate(source.states[matched[place]].weights):
            if item.kind is WeightKind.WEIGHT:
                values = item.tensor.read()
                plain = values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
                if not np.all(np.isfinite(plain)):
                    raise MergeError(
                        f"layer '{source_graph(source).layers[matched[place]].name}': {item.name} of '{source.label}' "
                        "holds values that are not finite numbers (NaN or infinity), and nothing can be aligned to "
                        f"them. Leave '{source.label}' out, or keep the layer per source."
                    )
                arrays[place, weight] = plain
    return arrays


@dataclass(frozen=True, eq=False)
class _Site:
    """A space on an axis of a shared weight."""

    key: Key
    space: int
    use: AxisUse

    def overlaps(self, other: _Site) -> bool:
        """Whether both are about some of the same numbers."""
        bounds = {axis: (start, stop) for axis, start, stop in other.use.part}
        return all(
            axis not in bounds or (start < bounds[axis][1] and bounds[axis][0] < stop)
            for axis, start, stop in self.use.part
        )


@dataclass(frozen=True)
class _Heads:
    """A space of heads: per head the spaces of its dimensions, of keys and of values."""

    inner: tuple[tuple[int, ...], ...]


class _Matcher:
    def __init__(self, spaces: Sequence[Space], shared: set[int], rng: np.random.Generator) -> None:
        self.spaces, self.rng = spaces, rng
        self.by_weight: dict[Key, list[_Site]] = {}
        self.by_space: list[list[_Site]] = [[] for _ in spaces]
        for number, space in enumerate(spaces):
            for use in space.axes:
                if use.source == 0 and use.layer in shared:
                    site = _Site((use.layer, use.weight), number, use)
                    self.by_weight.setdefault(site.key, []).append(site)
                    self.by_space[number].append(site)
        self.free = [
            number
            for number, space in enumerate(spaces)
            if not space.fixed and space.size > 1 and self.by_space[number]
        ]
        self.heads = {number: heads for number in self.free if (heads := self._heads(number)) is not None}

    def identity(self) -> Permutations:
        return [np.arange(space.size) for space in self.spaces]

    def _heads(self, number: int) -> _Heads | None:
        """The dimensions within the units of a space, where parts of weights are cut out unit by unit."""
        inner: list[set[int]] = [set() for _ in range(self.spaces[number].size)]
        for site in self.by_space[number]:
            if site.use.part:
                continue
            for other in self.by_weight[site.key]:
                for axis, start, stop in other.use.part:
                    unit = site.use.units[start]
                    if axis == site.use.axis and stop - start == 1 and unit >= 0:
                        inner[unit].add(other.space)
        return _Heads(tuple(tuple(sorted(found)) for found in inner)) if all(inner) else None

    # ---- values

    def moved(
        self, array: Array, key: Key, found: Permutations, skip: Callable[[_Site], bool] = lambda site: False
    ) -> Array:
        """A weight in its new order, but for the sites to skip."""
        along: dict[tuple[int, Part], list[tuple[AxisUse, Labels]]] = {}
        for site in self.by_weight.get(key, ()):
            if not self.spaces[site.space].fixed and not skip(site):
                along.setdefault((site.use.axis, site.use.part), []).append((site.use, found[site.space]))
        steps = [
            Step(axis, part, order)
            for (axis, part), pairs in along.items()
            if np.any((order := order_of(pairs, len(pairs[0][0].units)))[1:] < order[:-1])
        ]
        return reordered(array, sorted(steps, key=lambda step: bool(step.part))) if steps else array

    def mean(
        self, arrays: Sequence[Mapping[Key, Array]], found: Sequence[Permutations], share: Array
    ) -> dict[Key, Array]:
        """Mean of sources in their new order, shape of each weight kept, float64."""
        share = share / share.sum()
        return {
            key: sum(
                (
                    weight * self.moved(own[key], key, row).astype(np.float64)
                    for own, row, weight in zip(arrays, found, share.tolist(), strict=True)
                ),
                np.zeros(arrays[0][key].shape),
            )
            for key in arrays[0]
        }

    def gain(self, target: Mapping[Key, Array], own: Mapping[Key, Array], found: Permutations, space: int) -> float:
        """Sum of products of all weights that a space stands on."""
        keys = {site.key for site in self.by_space[space] if site.key in own}
        return sum(_dot(target[key], self.moved(own[key], key, found)) for key in keys)

    def similarities(
        self,
        target: Mapping[Key, Array],
        own: Mapping[Key, Array],
        found: Permutations,
        space: int,
        settled: Collection[int] | None,
    ) -> Array | None:
        """Products of the target's units with the source's own, shape (units, units); None where nothing tells.

        With `settled`, only weights all of whose other axes are in spaces that are settled count.
        """
        size = self.spaces[space].size
        result: Array | None = None
        for site in self.by_space[space]:
            if site.key not in own or not self._tells(site, settled):
                continue
            values = self.moved(own[site.key], site.key, found, lambda other, site=site: other is site)  # type: ignore[misc]
            result = np.zeros((size, size)) if result is None else result
            piece = slices(site.use.part, values.ndim)
            places = site.use.places
            _add_products(result, *(_rows(array[piece], site.use.axis, places) for array in (target[site.key], values)))
        return result

    def _tells(self, site: _Site, settled: Collection[int] | None, within: Collection[int] = ()) -> bool:
        return settled is None or all(
            other.space in settled or other.space in within or self.spaces[other.space].fixed
            for other in self.by_weight[site.key]
            if other is not site and other.overlaps(site)
        )

    # ---- matching

    def match(
        self,
        target: Mapping[Key, Array],
        own: Mapping[Key, Array],
        found: Permutations,
        space: int,
        settled: Collection[int] | None = None,
    ) -> dict[int, Labels] | None:
        """The best permutation of a space, and of the spaces within it; None where nothing tells."""
        if space in self.heads:
            return self._match_heads(target, own, found, space, settled)
        products = self.similarities(target, own, found, space, settled)
        return None if products is None or not products.any() else {space: _assign(products)[0]}

    def _match_heads(
        self,
        target: Mapping[Key, Array],
        own: Mapping[Key, Array],
        found: Permutations,
        space: int,
        settled: Collection[int] | None,
    ) -> dict[int, Labels] | None:
        heads = self.heads[space].inner
        within = {space, *(number for row in heads for number in row)}
        outer = {site.key: site.use for site in self.by_space[space] if not site.use.part}
        values = {
            key: self.moved(own[key], key, found, lambda site: site.space in within) for key in outer if key in own
        }
        size, kinds = len(heads), len(heads[0])
        sizes = [self.spaces[number].size for number in heads[0]]
        products = [np.zeros((size, size, length, length)) for length in sizes]
        told = False
        for one in range(size):
            for kind in range(kinds):
                for site in self.by_space[heads[one][kind]]:
                    if site.key not in values or not self._tells(site, settled, within):
                        continue
                    told = True
                    axis, start, _ = next(bound for bound in site.use.part if bound[0] == outer[site.key].axis)
                    places = outer[site.key].places
                    repeat = int(np.flatnonzero(places[one] == start)[0])
                    mine = _rows(target[site.key].take([start], axis), site.use.axis, site.use.places)
                    for two in range(size):
                        piece = values[site.key].take([places[two][repeat]], axis)
                        _add_products(products[kind][one, two], mine, _rows(piece, site.use.axis, site.use.places))
        if not told:
            return None
        best = [[[_assign(part[one, two]) for two in range(size)] for one in range(size)] for part in products]
        scores = sum(np.array([[pair[1] for pair in row] for row in part]) for part in best)
        chosen = _assign(np.asarray(scores))[0]
        result = {space: chosen}
        for one, two in enumerate(chosen.tolist()):
            for kind, number in enumerate(heads[one]):
                result[number] = best[kind][one][two][0]
        return result

    def walk(self, target: Mapping[Key, Array], own: Mapping[Key, Array]) -> Permutations:
        """A first match: space after space, as far as what is matched already tells."""
        found = self.identity()
        waiting = list(self.free)
        settled: set[int] = {number for number in range(len(self.spaces)) if number not in waiting}
        while waiting:
            for space in waiting:
                best = self.match(target, own, found, space, settled)
                if best is not None:
                    break
            else:
                space = waiting[0]
                best = self.match(target, own, found, space)
            for number, order in (best or {}).items():
                found[number] = order
            settled |= {space, *(best or {})}
            waiting = [number for number in waiting if number not in settled]
        return found

    def descend(self, target: Mapping[Key, Array], own: Mapping[Key, Array], found: Permutations) -> Permutations:
        """Better and better permutations, one space at a time, until none gains."""
        for _ in range(ROUNDS):
            changed = False
            for space in self.rng.permutation(self.free).tolist():
                best = self.match(target, own, found, space)
                if best is None or all(np.array_equal(found[number], order) for number, order in best.items()):
                    continue
                tried = list(found)
                for number, order in best.items():
                    tried[number] = order
                before, after = (self.gain(target, own, row, space) for row in (found, tried))
                if after > before + _GAIN * max(1.0, abs(before)):
                    found, changed = tried, True
            if not changed:
                break
        return found


def _dot(first: Array, second: Array) -> float:
    one, two = first.reshape(-1), second.reshape(-1)
    return sum(
        float(one[start : start + _BLOCK].astype(np.float64) @ two[start : start + _BLOCK].astype(np.float64))
        for start in range(0, one.size, _BLOCK)
    )


def _rows(array: Array, axis: int, places: Labels) -> Array:
    """One row per unit: all numbers of a weight that belong to it."""
    moved: Any = np.moveaxis(array, axis, 0)[places]
    rows: Array = moved.reshape(len(places), -1)
    return rows


def _add_products(result: Array, first: Array, second: Array) -> None:
    """Products of all rows with all rows, in float64."""
    width = max(1, _BLOCK // max(1, len(first)))
    for start in range(0, first.shape[1], width):
        block = slice(start, start + width)
        result += first[:, block].astype(np.float64) @ second[:, block].astype(np.float64).T


def _assign(products: Array) -> tuple[Labels, float]:
    """The permutation with the largest sum, and the sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(products, maximize=True)
    return np.asarray(columns, dtype=np.int64), float(products[rows, columns].sum())
