"""Linear layers: solved from the merged network's own inputs, aimed at the mean of the units that became one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import Chain
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.design import Linear
from kmerge.fuse.ridge import Regression
from kmerge.fuse.scale import rebase
from kmerge.graph import Ref, refs
from kmerge.methods.registry import Array

ROWS_PER_COLUMN = 40
LEAST_ROWS = 20_000
MOST_COLUMNS = 4096
"""Columns from which no more rows than that are taken, so that they are solved row by row."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One linear layer, with what each of its calls goes through."""

    layer: int
    chains: tuple[Chain, ...]


@dataclass(frozen=True, eq=False)
class LinearSite(Site):
    """Results of one call of a linear layer."""

    sources: tuple[int, ...] = ()
    linear: Linear | None = None
    blocks: Mapping[int, Mapping[int, Array]] | None = None
    """Per space and source, the places of its units among the outputs."""

    def views(self, values: Mapping[Ref, Any], picked: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
        assert self.linear is not None and self.blocks is not None
        arrays = [self.linear.outputs(to_numpy(values[ref])) for ref in self.tensors]
        rows = len(arrays[0])
        chance = picked * len(values[self.tensors[0]]) / rows
        chosen = np.flatnonzero(rng.random(rows) < chance) if chance < 1 else np.arange(rows)
        for space, places in self.blocks.items():
            parts = [array[chosen][:, places[source]] for source, array in zip(self.sources, arrays, strict=True)]
            stacked = np.concatenate(parts, axis=1)  # (rows, sources * units, copies)
            yield space, stacked.transpose(0, 2, 1).reshape(-1, stacked.shape[1])


@dataclass(eq=False)
class LinearTask:
    """One linear layer, or all whose results end in the same sum."""

    context: Context
    pieces: list[Piece]
    at: int = 0

    @property
    def first(self) -> Piece:
        return self.pieces[0]

    @cached_property
    def linear(self) -> dict[int, Linear]:
        return {piece.layer: self.context.chains.linear[piece.layer] for piece in self.pieces}

    def _targets(self, chain: Chain) -> list[tuple[int, Ref]]:
        return self.context.results(chain.call) if chain.end is None else self.context.seen(chain.end.call)

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(ref for chain in self.first.chains for _, ref in self._targets(chain)))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        found = [self.context.input(chain.call) for piece in self.pieces for chain in piece.chains]
        found += [ref for chain in self.first.chains for ref in self._others(chain)]
        return tuple(dict.fromkeys(found))

    def _others(self, chain: Chain) -> list[Ref]:
        """What is added to the result and is known already."""
        return [ref for ref in chain.others if not self._solved_here(ref)]

    def _solved_here(self, ref: Ref) -> bool:
        graph = self.context.merged.graph
        members = {piece.layer for piece in self.pieces}
        while True:
            layer = graph.calls[ref.call].layer
            if layer in members:
                return True
            found = refs(graph.calls[ref.call].arguments)
            if layer in self.context.chains.linear or len(found) != 1:
                return False
            ref = found[0]

    def place(self, layer: int) -> int:
        names = self.context.weights(layer)
        return names["depthwise_kernel"] if "depthwise_kernel" in names else names["kernel"]

    def sites(self) -> Sequence[Site]:
        context, found = self.context, []
        if context.origin(self.first.layer).role != "shared":
            return ()
        for piece in self.pieces[:1]:
            place, axis = self.place(piece.layer), self.linear[piece.layer].axis
            for chain in piece.chains:
                tensors = self._targets(chain)
                if len(tensors) < len(context.frame.sources):
                    continue
                blocks: dict[int, dict[int, Array]] = {}
                for source, own in context.origin(piece.layer).members:
                    rank = len(context.frame.shape((source, own, place)))
                    for space, use in context.frame.uses.get((source, own, place), {}).get(rank + axis, ()):
                        blocks.setdefault(space, {})[source] = use.places
                refs_, numbers = tuple(ref for _, ref in tensors), tuple(source for source, _ in tensors)
                found.append(LinearSite(refs_, numbers, self.linear[piece.layer], blocks))
        return found

    def run(self, passes: Passes) -> str:
        context, first = self.context, self.first
        linear = self.linear[first.layer]
        kernels = {layer: rows.matrix(context.values[layer, self.place(layer)]) for layer, rows in self.linear.items()}
        guess = np.concatenate([kernels[piece.layer] for piece in self.pieces], axis=1)
        groups, width, outputs = guess.shape
        columns = self._columns(first.layer)
        regressions = [Regression(width, outputs) for _ in range(groups)]
        wanted = MOST_COLUMNS if width > MOST_COLUMNS else max(LEAST_ROWS, ROWS_PER_COLUMN * width)
        per_input = wanted / len(first.chains) / context.examples
        for theirs, ours, away in passes:
            for number, chain in enumerate(first.chains):
                inputs = [to_numpy(ours[context.input(piece.chains[number].call)]) for piece in self.pieces]
                seen = [
                    (source, linear.outputs(to_numpy(theirs[ref]))) for source, ref in self._targets(chain)
                ]
                rows = len(seen[0][1])
                picked = context.pick(rows, len(away), per_input)
                target = sum(values[picked].astype(np.float64) @ columns[source] for source, values in seen)
                for ref in self._others(chain):
                    target = target - linear.outputs(to_numpy(ours[ref]))[picked]
                designs = [
                    self.linear[piece.layer].rows(own, picked) for piece, own in zip(self.pieces, inputs, strict=True)
                ]
                design = np.concatenate(designs, axis=2)
                targets = np.asarray(target).reshape(len(picked), groups, -1)
                back = away[picked // (rows // len(away))]
                for group, regression in enumerate(regressions):
                    regression.add(design[:, group], targets[:, group], back)
        bearers = [piece for piece in self.pieces if self._has_offset(piece)]
        solved = [regression.solve(guess[n], bool(bearers)) for n, regression in enumerate(regressions)]
        kernel = np.stack([item.kernel for item in solved])
        offset = np.concatenate([item.offset for item in solved])
        start = 0
        for piece in self.pieces:
            stop = start + kernels[piece.layer].shape[1]
            own = slice(start, stop)
            moments = [item.moments(kernel[n, own], own) for n, item in enumerate(regressions)]
            mean, variance = (np.concatenate([item[n] for item in moments]) for n in range(2))
            bears = bool(bearers) and piece is bearers[-1]
            self._put(piece, kernel[:, own], offset if bears else np.zeros_like(offset), mean, variance)
            start = stop
        explained = float(np.mean([item.explained for item in solved]))
        names = " + ".join(context.layer(piece.layer).name for piece in self.pieces)
        return f"{names}: {width} to {outputs * groups}, {explained:.4f} explained, strength {solved[0].strength:.0e}"

    def _columns(self, layer: int) -> dict[int, Array]:
        place, linear = self.place(layer), self.linear[layer]
        rank = len(self.context.values[layer, place].shape)
        found = self.context.columns(layer, place, rank + linear.axis)
        return {source: linear.widened(matrix, self.context.values[layer, place].shape) for source, matrix in found.items()}

    def _has_offset(self, piece: Piece) -> bool:
        return piece.chains[0].normal is not None or self.linear[piece.layer].bias

    def _put(self, piece: Piece, matrix: Array, offset: Array, mean: Array, variance: Array) -> None:
        context, layer = self.context, piece.layer
        place, names = self.place(layer), context.weights(layer)
        normal = piece.chains[0].normal
        context.set(layer, place, self.linear[layer].kernel(matrix, context.values[layer, place].shape))
        if "bias" in names:
            bias = offset if normal is None else np.zeros_like(offset)
            context.set(layer, names["bias"], bias.reshape(context.values[layer, names["bias"]].shape))
        if normal is not None:
            rebase(context, context.merged.graph.calls[normal].layer, mean, variance, offset)


def linear_tasks(context: Context) -> tuple[list[LinearTask], set[int]]:
    """Tasks for all linear layers, and the normalisations that they settle on the way."""
    groups: dict[object, LinearTask] = {}
    absorbed: set[int] = set()
    graph = context.merged.graph
    done: set[int] = set()
    for number, call in enumerate(graph.calls):
        if call.layer in done or call.layer not in context.chains.linear:
            continue
        done.add(call.layer)
        chains = tuple(context.chains.chain(other) for other in graph.calls_of(call.layer))
        absorbed |= {graph.calls[chain.normal].layer for chain in chains if chain.normal is not None}
        joins = chains[0].joins if len(chains) == 1 else None
        key: object = ("layer", call.layer) if joins is None else ("sum", joins)
        task = groups.setdefault(key, LinearTask(context, []))
        task.pieces.append(Piece(call.layer, chains))
        task.at = number
    return list(groups.values()), absorbed
