"""Linear layers: solved from the merged network's own inputs, aimed at the mean of the units that became one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import Chain
from kmerge.fuse.common import Common
from kmerge.fuse.context import Context, Final, Passes, Site
from kmerge.fuse.design import Linear, agrees
from kmerge.fuse.mixing import Mixing, reached
from kmerge.fuse.ridge import Regression, Solution, whole_rows
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
    """Results of one call of a linear layer in each source."""

    sources: tuple[int, ...] = ()
    linears: tuple[Linear, ...] = ()
    blocks: Mapping[int, Mapping[int, Array]] = field(default_factory=dict)
    """Per space and source, the places of its units among the outputs."""

    @property
    def spaces(self) -> tuple[int, ...]:
        return tuple(self.blocks)

    def views(self, values: Mapping[Ref, Any], picked: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
        arrays = [one.outputs(to_numpy(values[ref])) for one, ref in zip(self.linears, self.tensors, strict=True)]
        rows = len(arrays[0])
        if any(len(array) != rows for array in arrays):  # sequences of other lengths: nothing to lay side by side
            return
        chance = picked * len(values[self.tensors[0]]) / rows
        chosen = np.flatnonzero(rng.random(rows) < chance) if chance < 1 else np.arange(rows)
        order = np.argsort(self.sources)
        for space, places in self.blocks.items():
            parts = [arrays[number][chosen][:, places[self.sources[number]]] for number in order]
            stacked = np.concatenate(parts, axis=1)  # (rows, sources * units, copies)
            found = stacked.transpose(0, 2, 1).reshape(-1, stacked.shape[1])
            yield space, found[whole_rows(found)]


Found = tuple[int, Ref, Linear, Mapping[int, Array]]
"""Source, tensor, how its outputs stand in it, and the places of units by space."""


def side_by_side(found: Iterable[Found], sources: int) -> list[LinearSite]:
    """Tensors of all sources in which the same units stand, the first of each, the second of each, and so on."""
    rows: list[list[Found]] = [[] for _ in range(sources)]
    for one in found:
        rows[one[0]].append(one)
    sites = []
    for group in zip(*rows, strict=False):
        spaces = set.intersection(*(set(places) for *_, places in group))
        blocks = {space: {source: places[space] for source, _, _, places in group} for space in sorted(spaces)}
        numbers = tuple(source for source, *_ in group)
        sites.append(LinearSite(tuple(ref for _, ref, *_ in group), numbers, tuple(one[2] for one in group), blocks))
    return [site for site in sites if site.blocks]


class Columns:
    """Least squares for outputs of which some have a target in some calls only.

    A call that stands for some of the sources has no target for units that none of these sources has.
    """

    def __init__(self, width: int, valid: Sequence[Array], movable: bool = False) -> None:
        """Args:
        width: columns of the inputs.
        valid: for each kind of call, which outputs have a target, shape (outputs,), bool.
        movable: whether rows of targets are twice as long: all targets, then what each may be moved by.
        """
        self._movable = movable
        patterns, group = np.unique(np.stack(valid), axis=1, return_inverse=True)
        self.outputs = len(valid[0])
        self.groups = [
            (
                np.flatnonzero(group.ravel() == number),
                patterns[:, number],
                Regression(width, int(np.sum(group == number)), movable),
            )
            for number in range(patterns.shape[1])
        ]

    def add(self, kind: int, inputs: Array, targets: Array, held: Array) -> None:
        for columns, pattern, regression in self.groups:
            if pattern[kind]:
                chosen = np.concatenate([columns, columns + self.outputs]) if self._movable else columns
                regression.add(inputs, targets[:, chosen], held)

    def solve(self, guess: Array, intercept: bool, num_held: Array | None = None, pooled: bool = False) -> Solution:
        """See `Regression.solve`."""
        kernel, offset = np.array(guess, dtype=np.float64), np.zeros(self.outputs)
        strength, explained, pull = 0.0, 0.0, np.zeros(self.outputs)
        for columns, pattern, regression in self.groups:
            if pattern.any():
                told = None if num_held is None else num_held[columns]
                found = regression.solve(guess[:, columns], intercept, told, pooled)
                kernel[:, columns], offset[columns], pull[columns] = found.kernel, found.offset, found.pull
                strength = max(strength, found.strength)
                explained += found.explained * len(columns) / self.outputs
        return Solution(kernel, offset, strength, explained, pull)

    def moments(self, kernel: Array, rows: slice) -> tuple[Array, Array]:
        """Mean and variance of what some of the inputs make of each output, shape (outputs,) each."""
        mean, variance = np.zeros(self.outputs), np.ones(self.outputs)
        for columns, pattern, regression in self.groups:
            if pattern.any():
                mean[columns], variance[columns] = regression.moments(kernel[:, columns], rows)
        return mean, variance


@dataclass(eq=False)
class LinearTask:
    """One linear layer, or all whose results end in the same sum."""

    context: Context
    pieces: list[Piece]
    at: int = 0
    more: list[Site] = field(default_factory=list)
    """Where units can be seen that other layers make as well, each in its own source."""

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
        own = [ref for chain in self.first.chains for _, ref in self._targets(chain)]
        return tuple(dict.fromkeys([*own, *(final.ref for final in self._peers)]))

    @cached_property
    def _peers(self) -> tuple[Final, ...]:
        """The same output of every source, where this layer alone gives that of its own: heads that may lean on each
        other. None where sources have other numbers of outputs or other last activations, and none for a head that
        several calls or several layers give, that others share, or behind which more is done than a last activation.
        """
        context, chains = self.context, self.first.chains
        private = context.origin(self.first.layer).role == "private"
        if not (context.lean and context.num_held and private and len(self.pieces) == len(chains) == 1):
            return ()
        ((source, ref),) = self._targets(chains[0])
        places = [number for number, final in enumerate(context.finals[source]) if final.ref == ref]
        if len(places) != 1 or len({len(own) for own in context.finals}) > 1 or context.shares[source] == 1:
            return ()
        peers = tuple(own[places[0]] for own in context.finals)
        return peers if all(peer.activation == peers[0].activation for peer in peers) else ()

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

    @property
    def layers(self) -> tuple[int, ...]:
        normals = [chain.normal for piece in self.pieces for chain in piece.chains if chain.normal is not None]
        graph = self.context.merged.graph
        return (*(piece.layer for piece in self.pieces), *(graph.calls[normal].layer for normal in normals))

    def place(self, layer: int) -> int:
        return kernel_place(self.context, layer)

    @cached_property
    def entangled(self) -> bool:
        """Whether units may move on several axes of the kernel: which belong together cannot be told axis by axis."""
        frame, place = self.context.frame, self.place(self.first.layer)
        source, own = self.context.origin(self.first.layer).members[0]
        uses = frame.uses.get((source, own, place), {})
        axes = self.linear[self.first.layer].axes(frame.shape((source, own, place)))
        spaces = [[frame.spaces[space] for space, _ in uses.get(axis, ())] for axis in axes]
        return sum(any(not space.fixed and space.size > 1 for space in row) for row in spaces) > 1

    def found(self) -> Iterator[Found]:
        """Where units that are made here can be seen."""
        context, piece = self.context, self.first
        place, linear = self.place(piece.layer), self.linear[piece.layer]
        members = dict(context.origin(piece.layer).members)
        for chain in piece.chains:
            for source, ref in self._targets(chain):
                own = (source, members[source], place)
                shape = context.frame.shape(own)
                uses = context.frame.uses.get(own, {})
                places = {
                    space: linear.positions(use.places, number, shape)
                    for number, axis in enumerate(linear.axes(shape))
                    for space, use in uses.get(axis, ())
                    if not self.entangled
                }
                yield source, ref, linear, places

    def sites(self) -> Sequence[Site]:
        if self.context.origin(self.first.layer).role != "shared":
            return self.more
        return (*side_by_side(self.found(), len(self.context.frame.sources)), *self.more)

    def run(self, passes: Passes) -> str:
        context, first = self.context, self.first
        linear = self.linear[first.layer]
        kernels = {layer: rows.matrix(context.values[layer, self.place(layer)]) for layer, rows in self.linear.items()}
        guess = np.concatenate([kernels[piece.layer] for piece in self.pieces], axis=1)
        groups, width, outputs = guess.shape
        kinds = [tuple(source for source, _ in self._targets(chain)) for chain in first.chains]
        known = {kind: self._columns(first.layer, kind) for kind in dict.fromkeys(kinds)}
        valid = [reached([*own.values()]).reshape(groups, -1) for own in known.values()]
        common = self._common()
        regressions = [Columns(width, [own[group] for own in valid], common is not None) for group in range(groups)]
        wanted = MOST_COLUMNS if width > MOST_COLUMNS else max(LEAST_ROWS, ROWS_PER_COLUMN * width)
        per_input = wanted / len(first.chains) / context.examples
        bearers = [piece for piece in self.pieces if self._has_offset(piece)]
        bias = self._bias(bearers[-1]) if bearers else None
        for theirs, ours, away in passes:
            for number, chain in enumerate(first.chains):
                inputs = [to_numpy(ours[context.input(piece.chains[number].call)]) for piece in self.pieces]
                given = [(source, to_numpy(theirs[ref])) for source, ref in self._targets(chain)]
                shape = given[0][1].shape
                seen = [(source, linear.outputs(values)) for source, values in given]
                rows = len(seen[0][1])
                picked = passes.pick(rows, len(away), per_input)
                of = picked * len(away) // rows
                columns = known[kinds[number]]
                target = sum(values[picked].astype(np.float64) @ columns[source] for source, values in seen)
                for ref in self._others(chain):
                    target = target - linear.outputs(to_numpy(ours[ref]))[picked]
                if bias is not None:
                    added = self.linear[bearers[-1].layer].biases(bias, shape)
                    target = target - added[picked % len(added)]
                designs = [
                    self.linear[piece.layer].rows(own, picked) for piece, own in zip(self.pieces, inputs, strict=True)
                ]
                design = np.concatenate(designs, axis=2)
                targets = np.asarray(target).reshape(len(picked), groups, -1)
                if common is not None:
                    every = [to_numpy(theirs[final.ref]) for final in self._peers]
                    alike = len({values.shape for values in every}) == 1
                    seen_by_all = [linear.outputs(values)[picked] for values in every] if alike else []
                    gap = common.add(seen_by_all, of, away)
                    more = np.zeros_like(target) if gap is None else gap @ columns[common.source]
                    targets = np.concatenate([targets, np.asarray(more).reshape(targets.shape)], axis=2)
                back = away[of]
                kind = list(known).index(kinds[number])
                for group, regression in enumerate(regressions):
                    regression.add(kind, design[:, group], targets[:, group], back)
        num_held = [None] * groups if common is None else common.num_held(outputs * groups).reshape(groups, -1)
        solved = [
            regression.solve(guess[n], bool(bearers), num_held[n], common is not None and common.pooled)
            for n, regression in enumerate(regressions)
        ]
        pull = max(float(np.max(item.pull)) for item in solved)
        if common is not None:
            context.moved[first.layer] = pull
        kernel = np.stack([item.kernel for item in solved])
        offset = np.concatenate([item.offset for item in solved])
        start = 0
        for piece in self.pieces:
            stop = start + kernels[piece.layer].shape[1]
            own = slice(start, stop)
            moments = [item.moments(kernel[n, own], own) for n, item in enumerate(regressions)]
            mean, variance = (np.concatenate([item[n] for item in moments]) for n in range(2))
            bears = bool(bearers) and piece is bearers[-1]
            self._put(piece, kernel[:, own], offset if bears else None, mean, variance)
            start = stop
        explained = float(np.mean([item.explained for item in solved]))
        names = " + ".join(context.layer(piece.layer).name for piece in self.pieces)
        moved = f", moved by up to {pull:.2f}" if pull else ""
        told = f"{explained:.4f} explained, strength {solved[0].strength:.0e}{moved}"
        return f"{names}: {width} to {outputs * groups}, {told}"

    def _common(self) -> Common | None:
        """What tells how alike the sources are at the output that this layer gives; None where nothing is to lean."""
        if not self._peers:
            return None
        ((source, _),) = self.context.origin(self.first.layer).members
        return Common(self.context.shares, source, self._peers[source].softmax)

    def _columns(self, layer: int, sources: Collection[int]) -> dict[int, Mixing]:
        """What takes outputs of each source to those of the merged layer."""
        place, linear = self.place(layer), self.linear[layer]
        shape = self.context.values[layer, place].shape
        found = self.context.several(layer, [(place, axis) for axis in linear.axes(shape)], sources)
        return {source: linear.widened(matrix, shape) for source, matrix in found.items()}

    def _has_offset(self, piece: Piece) -> bool:
        return piece.chains[0].normal is not None or self.linear[piece.layer].bias

    def _bias(self, piece: Piece) -> Array | None:
        """The bias that bears what is left over, as it is before."""
        names = self.context.weights(piece.layer)
        if piece.chains[0].normal is not None or "bias" not in names:
            return None
        return self.context.values[piece.layer, names["bias"]]

    def _put(self, piece: Piece, matrix: Array, offset: Array | None, mean: Array, variance: Array) -> None:
        """Set a layer; `offset` is None for one of several that leaves the offset to another."""
        context, layer = self.context, piece.layer
        place, names = self.place(layer), context.weights(layer)
        normal = piece.chains[0].normal
        shape = context.values[layer, place].shape
        context.set(layer, place, self.linear[layer].kernel(matrix, shape))
        if "bias" in names:
            bias = context.values[layer, names["bias"]]
            if normal is not None or offset is None:
                bias = np.zeros_like(bias)
            else:
                bias = self.linear[layer].offset(bias, offset, shape)
            context.set(layer, names["bias"], bias)
        if normal is not None:
            rest = np.zeros_like(mean) if offset is None else offset
            rebase(context, context.merged.graph.calls[normal].layer, mean, variance, rest)


def kernel_place(context: Context, layer: int) -> int:
    """Which of a linear layer's weights is its kernel."""
    names = context.weights(layer)
    return names["depthwise_kernel"] if "depthwise_kernel" in names else names["kernel"]


def try_designs(context: Context) -> dict[int, str]:
    """Hold every linear layer against the live one on a few inputs.

    Returns:
        Those that do something else than their configuration says, with a reason.
    """
    graph, linear, every = context.merged.graph, context.chains.linear, context.every
    made = {layer: context.results(graph.calls_of(layer)[0])[0][1] for layer in linear}
    given = {}
    for layer, ref in made.items():
        found = refs(every.merged.graph.calls[ref.call].arguments)[0]
        given[layer] = Ref(found.call, found.output)
    values = dict(zip(every.inputs, (array[:4] for array in context.source_tape.inputs(0)), strict=True))
    every.run(values, [*made.values(), *given.values()])
    refused: dict[int, str] = {}
    for layer, ref in made.items():
        names = context.weights(layer)
        source, own = context.origin(layer).members[0]
        if not {"kernel", "depthwise_kernel"} & set(names) or not set(names) <= {"kernel", "depthwise_kernel", "bias"}:
            refused[layer] = "it holds other weights than its class has"
            continue
        kernel = context.stored(source, own, kernel_place(context, layer)).astype(np.float64)
        bias = context.stored(source, own, names["bias"]).astype(np.float64) if "bias" in names else None
        result = to_numpy(values[ref])
        tolerance = 1e-3 if result.dtype.kind == "f" and result.dtype.itemsize >= 4 else 3e-2
        if not agrees(linear[layer], to_numpy(values[given[layer]]), result, kernel, bias, tolerance):
            refused[layer] = "it gives something else than its configuration says"
    return refused


def linear_tasks(context: Context) -> tuple[list[LinearTask], set[int]]:
    """Tasks for all linear layers, and the normalisations that they settle on the way."""
    if context.refused is None:
        context.refused = try_designs(context)
    for layer in context.refused:
        context.chains.linear.pop(layer, None)
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
        late = [ref.call for chain in chains for ref in chain.others if len(chains) == 1]
        task.at = max(task.at, number, *late)
    tasks = list(groups.values())
    _see_private(context, tasks)
    return tasks, absorbed


def _see_private(context: Context, tasks: Sequence[LinearTask]) -> None:
    """Sites for units that every source makes in a layer of its own, and that a shared layer reads."""
    made: dict[int, list[tuple[Found, LinearTask]]] = {}
    shared: set[int] = set()
    for task in tasks:
        private = context.origin(task.first.layer).role == "private"
        for one in task.found():
            source, ref, linear, places = one
            if private:
                for space, own in places.items():
                    made.setdefault(space, []).append(((source, ref, linear, {space: own}), task))
            else:
                shared |= set(places)
    for space, rows in made.items():
        if space not in shared and not context.frame.spaces[space].fixed:
            rows[0][1].more += side_by_side([one for one, _ in rows], len(context.frame.sources))
