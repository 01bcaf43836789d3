"""Recurrent layers: gates solved from the merged network's own states, each unit after the example of one source's.

What goes into the gates of SimpleRNN, LSTM and GRU is linear in the input of a step and in the state before it, so that
it is fitted as a linear layer is. What tanh and sigmoid make of a mean of unlike units is none of them: units are not
averaged, those from which the others follow best stay (`kmerge.fuse.selection`) and the merged network imitates them.
It is fitted first to states as they should be, then also to those that it really comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.cells import KINDS, Cell, CellWeights, Trace
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.ridge import Regression
from kmerge.fuse.selection import readers
from kmerge.graph import Ref, refs
from kmerge.methods.registry import Array

ROUNDS = 3
"""How often a layer is fitted again to the states that it comes to."""
ROWS_PER_COLUMN = 40
LEAST_ROWS = 20_000
LEAST_SEQUENCES = 200
WORK = 4e10
"""Multiplications that running a layer once over all sequences may take, as long as there are enough of them."""


@dataclass(frozen=True, eq=False)
class Part:
    """One direction of a recurrent layer.

    Attributes:
        cell: that runs.
        places: of its kernel, recurrent kernel and bias (None without) among the weights of the layer.
        backwards: whether it reads the last step first.
    """

    cell: Cell
    places: tuple[int, int, int | None]
    backwards: bool

    def weights(self, read: Callable[[int], Array]) -> CellWeights:
        """Weights of its cell, from those of the layer by their places."""
        kernel, recurrent = (read(place).astype(np.float32) for place in self.places[:2])
        biases = np.zeros((2, kernel.shape[1]), np.float32)
        if self.places[2] is not None:
            bias = np.atleast_2d(read(self.places[2]))
            biases[: len(bias)] = bias
        return CellWeights(kernel, recurrent, *biases)


@dataclass(frozen=True)
class Given:
    """What a call of a recurrent layer is given: sequences, states to start from, steps that count."""

    x: Ref
    states: tuple[Ref, ...]
    mask: Ref | None

    @classmethod
    def of(cls, arguments: Any) -> Given:
        masks = [Ref(ref.call, ref.output) for found in _under(arguments, "mask") for ref in refs(found)]
        x, *states = (Ref(ref.call, ref.output) for ref in refs(arguments))
        return cls(x, tuple(state for state in states if state not in masks), masks[0] if masks else None)

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.x, *self.states, *([] if self.mask is None else [self.mask]))

    def read(self, values: Mapping[Ref, Any], part: int, parts: int, backwards: bool) -> Sequences:
        """What one direction of several is given, in the order in which it reads."""
        tensor = values[self.x]
        mask = getattr(tensor, "_keras_mask", None) if self.mask is None else values[self.mask]
        turn = slice(None, None, -1 if backwards else 1)
        each = len(self.states) // parts
        return Sequences(
            to_numpy(tensor)[:, turn],
            None if mask is None else to_numpy(mask).astype(bool)[:, turn],
            tuple(to_numpy(values[ref]) for ref in self.states[part * each : (part + 1) * each]),
        )


def _under(arguments: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep."""
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            yield from [value] if name == key else _under(value, key)
    elif isinstance(arguments, (list, tuple)):
        for value in arguments:
            yield from _under(value, key)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences in the order in which a cell reads them.

    Attributes:
        x: shape (sequences, steps, inputs).
        mask: steps that count, shape (sequences, steps); None where all do.
        states: to start from, each of shape (sequences, units); none for zeros.
    """

    x: Array
    mask: Array | None
    states: tuple[Array, ...]

    def __getitem__(self, chosen: Array) -> Sequences:
        mask = None if self.mask is None else self.mask[chosen]
        return Sequences(self.x[chosen], mask, tuple(state[chosen] for state in self.states))

    def run(self, cell: Cell, weights: CellWeights, picked: Array | None = None) -> Trace:
        return cell.run(weights, self.x, self.mask, self.states, picked)


@dataclass(frozen=True, eq=False)
class RecurrentSite(Site):
    """States of one direction of a layer, in all sources."""

    scaled: ClassVar[bool] = False
    averaged: ClassVar[bool] = False

    task: RecurrentTask
    part: int
    call: int
    space: int

    @property
    def spaces(self) -> tuple[int, ...]:
        return (self.space,)

    def views(self, values: Mapping[Ref, Any], picked: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
        found = self.task.examples(self.part, self.call, values)
        count, steps = found[0][1].x.shape[:2]
        each = min(steps, max(1, int(np.ceil(picked))))
        many = np.flatnonzero(rng.random(count) < max(8 * picked / steps, 0.1))
        times = _steps(len(many), steps, each, rng)
        traces = [own[many].run(self.task.parts[self.part].cell, weights, times) for _, own, weights in found]
        states = np.concatenate([trace.after for trace in traces], axis=2)
        if not self.task.sequences:  # those who read the last state alone count as much as the layer itself
            last = np.concatenate([trace.last for trace in traces], axis=1)
            states = np.concatenate([states, np.repeat(last[:, None], each, axis=1)], axis=1)
        yield self.space, states.reshape(-1, states.shape[2])


def _steps(count: int, steps: int, each: int, rng: np.random.Generator) -> Array:
    """Some steps of each sequence, shape (count, each)."""
    if each >= steps:
        return np.broadcast_to(np.arange(steps), (count, steps))
    return np.asarray(np.argsort(rng.random((count, steps)), axis=1)[:, :each])


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one direction is to do on some sequences of the merged network.

    Attributes:
        given: to it.
        picked: steps at which it is fitted, shape (sequences, picked).
        counts: those of them that are not masked, (sequences, picked), bool.
        aim: what it is to do there.
        read: what those who read the sources' states see in them, (sequences, picked or 1, outputs).
        away: which sequences are held back.
    """

    given: Sequences
    picked: Array
    counts: Array
    aim: Trace
    read: Array
    away: Array


@dataclass(eq=False)
class RecurrentTask:
    """One recurrent layer, both directions of it."""

    context: Context
    layer: int
    parts: tuple[Part, ...]
    at: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @cached_property
    def sequences(self) -> bool:
        """Whether the layer gives its states after all steps."""
        config = self.context.layer(self.layer).config
        inner = config.get("layer")
        return bool((inner.get("config", {}) if isinstance(inner, Mapping) else config).get("return_sequences"))

    @cached_property
    def given(self) -> Mapping[int, tuple[Given, Mapping[int, Given]]]:
        """Per call what the merged network gives it, and what each source does."""
        context = self.context
        ours, every = context.merged.graph.calls, context.every.merged.graph.calls
        return {
            call: (
                Given.of(ours[call].arguments),
                {source: Given.of(every[ref.call].arguments) for source, ref in context.seen(call)},
            )
            for call in context.calls(self.layer)
        }

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        found = (ref for _, theirs in self.given.values() for given in theirs.values() for ref in given.refs)
        return tuple(dict.fromkeys(found))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(ref for ours, _ in self.given.values() for ref in ours.refs))

    @cached_property
    def _stored(self) -> Mapping[tuple[int, int], CellWeights]:
        """Weights by source and direction."""
        return {
            (source, number): part.weights(lambda place, s=source, own=own: self.context.stored(s, own, place))  # type: ignore[misc]
            for source, own in self.context.origin(self.layer).members
            for number, part in enumerate(self.parts)
        }

    def examples(self, number: int, call: int, values: Mapping[Ref, Any]) -> list[tuple[int, Sequences, CellWeights]]:
        """Per source what it gives to one direction, and the weights with which that runs."""
        backwards, parts = self.parts[number].backwards, len(self.parts)
        return [
            (source, given.read(values, number, parts, backwards), self._stored[source, number])
            for source, given in self.given[call][1].items()
        ]

    def space(self, number: int) -> int | None:
        """The space of a direction's units; None where they are of no space, or of several."""
        source, own = self.context.origin(self.layer).members[0]
        uses = self.context.frame.uses.get((source, own, self.parts[number].places[1]), {}).get(0, ())
        return uses[0][0] if len(uses) == 1 else None

    def sites(self) -> Sequence[Site]:
        context, found = self.context, []
        if context.origin(self.layer).role != "shared":
            return ()
        for call, (_, theirs) in self.given.items():
            for number in range(len(self.parts)):
                space = self.space(number)
                if space is not None and len(theirs) == len(context.frame.sources):
                    tensors = tuple(dict.fromkeys(ref for given in theirs.values() for ref in given.refs))
                    found.append(RecurrentSite(tensors, self, number, call, space))
        return found

    def run(self, passes: Passes) -> str:
        lessons: list[list[Lesson]] = [[] for _ in self.parts]
        for theirs, ours, away in passes:
            for call, (given, _) in self.given.items():
                chosen: Array | None = None
                for number, part in enumerate(self.parts):
                    own = given.read(ours, number, len(self.parts), part.backwards)
                    if chosen is None:
                        chosen = np.flatnonzero(passes.random.random(len(away)) < self._share(own, part))
                    if len(chosen):
                        lessons[number].append(self._lesson(number, call, theirs, own, chosen, away, passes.random))
        lines = [self._solve(number, own) for number, own in enumerate(lessons)]
        return f"{self.context.layer(self.layer).name}: {'; '.join(lines)}"

    def _share(self, given: Sequences, part: Part) -> float:
        """Of all sequences that are used."""
        work = 2.0 * self._units(part) ** 2 * part.cell.copies * self.context.examples * given.x.shape[1]
        return float(max(WORK / (work * len(self.given)), LEAST_SEQUENCES / self.context.examples))

    def _units(self, part: Part) -> int:
        """In the merged network."""
        return len(self.context.values[self.layer, part.places[1]])

    # ---- what to aim at

    @cached_property
    def _ways(self) -> list[dict[int, tuple[Array, Array]]]:
        """Per direction and source: what takes its units to the merged ones, and what reads them."""
        context, found = self.context, []
        for number, part in enumerate(self.parts):
            space, merged = self.space(number), self._units(part)
            columns = context.columns(self.layer, part.places[0], 1)
            ways = {}
            for source, _ in context.origin(self.layer).members:
                units = len(self._stored[source, number].recurrent)
                read = np.eye(units) if space is None else readers(context.frame, space, source)
                ways[source] = (columns[source].matrix()[:units, :merged].astype(np.float32), read.astype(np.float32))
            found.append(ways)
        return found

    def _lesson(
        self,
        number: int,
        call: int,
        values: Mapping[Ref, Any],
        given: Sequences,
        chosen: Array,
        away: Array,
        rng: np.random.Generator,
    ) -> Lesson:
        part, context = self.parts[number], self.context
        count, steps, inputs = given.x.shape
        wanted = max(LEAST_ROWS, ROWS_PER_COLUMN * (inputs + self._units(part)))
        share = len(chosen) / count
        each = max(1, int(np.ceil(wanted / (context.examples * share * len(self.given)))))
        picked = _steps(len(chosen), steps, each, rng)
        sums: list[Any] = [0.0] * 5
        read = []
        for source, theirs, weights in self.examples(number, call, values):
            merge, reader = self._ways[number][source]
            trace = theirs[chosen].run(part.cell, weights, picked)
            gates = trace.gates.reshape(*picked.shape, part.cell.copies, -1) @ merge
            reset = trace.before if trace.reset is None else trace.reset
            own = (trace.before @ merge, trace.after @ merge, gates, reset @ merge, trace.last @ merge)
            sums = [one + other for one, other in zip(sums, own, strict=True)]
            read.append((trace.after if self.sequences else trace.last[:, None]) @ reader)
        before, after, gates, reset, last = sums
        aim = Trace(before, after, gates.reshape(*picked.shape, -1), reset, last)
        counts = np.ones(picked.shape, dtype=bool)
        if given.mask is not None:
            counts = np.take_along_axis(given.mask[chosen], picked, axis=1)
        return Lesson(given[chosen], picked, counts, aim, np.concatenate(read, axis=2), away[chosen])

    # ---- solving

    def _solve(self, number: int, lessons: Sequence[Lesson]) -> str:
        part = self.parts[number]
        guess = part.weights(lambda place: self.context.values[self.layer, place])
        fit = GateFit(part.cell, guess, part.places[2] is not None)
        tried = [(self._unread(lessons, self._runs(part, guess, lessons)), guess)]
        traces = [lesson.aim for lesson in lessons]
        for _ in range(ROUNDS + 1):
            fit.add(lessons, traces)
            weights = fit.solve()
            traces = self._runs(part, weights, lessons)
            tried.append((self._unread(lessons, traces), weights))
            if not tried[-1][0] < 1:
                break
        best = min(range(len(tried)), key=lambda turn: tried[turn][0])
        self._put(part, tried[best][1])
        scores = " ".join(f"{1 - score:.4f}" for score, _ in tried)
        return f"{len(guess.kernel)} to {len(guess.recurrent)} units, {scores} readable"

    def _runs(self, part: Part, weights: CellWeights, lessons: Sequence[Lesson]) -> list[Trace]:
        return [lesson.given.run(part.cell, weights, lesson.picked) for lesson in lessons]

    def _unread(self, lessons: Sequence[Lesson], traces: Sequence[Trace]) -> float:
        """Share of what is read of the sources' states that does not follow from the merged ones, held-back inputs."""
        width, outputs = traces[0].last.shape[1], lessons[0].read.shape[2]
        regression = Regression(width, outputs)
        scale = self._scale(lessons)
        for lesson, trace in zip(lessons, traces, strict=True):
            states = trace.after if self.sequences else trace.last[:, None]
            if not np.isfinite(states).all():
                return np.inf
            counts = lesson.counts if self.sequences else np.ones((len(states), 1), dtype=bool)
            back = np.broadcast_to(lesson.away[:, None], counts.shape)[counts]
            regression.add(states[counts], lesson.read[counts] / scale, back)
        return 1.0 - regression.solve(np.zeros((width, outputs)), True).explained

    def _scale(self, lessons: Sequence[Lesson]) -> Array:
        """What makes all sources count alike in what is read of them."""
        everything = np.concatenate([lesson.read.reshape(-1, lesson.read.shape[2]) for lesson in lessons])
        members = len(self.context.origin(self.layer).members)
        total = everything.var(axis=0).reshape(members, -1).sum(axis=1, keepdims=True)
        return np.repeat(np.sqrt(np.maximum(total, 1e-12)), everything.shape[1] // members)

    def _put(self, part: Part, weights: CellWeights) -> None:
        context, layer = self.context, self.layer
        context.set(layer, part.places[0], weights.kernel)
        context.set(layer, part.places[1], weights.recurrent)
        if part.places[2] is not None:
            wide = context.values[layer, part.places[2]].ndim == 2
            context.set(layer, part.places[2], np.stack([weights.bias, weights.inner]) if wide else weights.bias)


class GateFit:
    """Regressions for all gates of a cell, to which more and more states are added."""

    def __init__(self, cell: Cell, guess: CellWeights, has_bias: bool) -> None:
        self.guess, self.has_bias = guess, has_bias
        self.blocks = cell.blocks(len(guess.recurrent))
        starts = [
            np.concatenate(
                [guess.kernel[:, block.columns]] * block.inputs
                + [guess.recurrent[:, block.columns]] * bool(block.state)
            )
            for block in self.blocks
        ]
        self.starts = [start.astype(np.float64) for start in starts]
        self.regressions = [Regression(*start.shape) for start in self.starts]

    def add(self, lessons: Sequence[Lesson], traces: Sequence[Trace]) -> None:
        """The gates are to come out as the lessons have it in the states of these traces."""
        for lesson, trace in zip(lessons, traces, strict=True):
            counts = lesson.counts
            back = np.broadcast_to(lesson.away[:, None], counts.shape)[counts]
            x = lesson.given.x[np.arange(len(counts))[:, None], lesson.picked][counts]
            for block, regression in zip(self.blocks, self.regressions, strict=True):
                columns = [x] * block.inputs
                columns += [getattr(trace, block.state)[counts]] if block.state else []
                regression.add(np.concatenate(columns, axis=1), lesson.aim.gates[counts][:, block.gates], back)

    def solve(self) -> CellWeights:
        inputs, units = len(self.guess.kernel), len(self.guess.recurrent)
        kernel, recurrent = np.zeros_like(self.guess.kernel), np.zeros_like(self.guess.recurrent)
        biases = np.zeros((2, kernel.shape[1]), np.float32)
        for block, regression, start in zip(self.blocks, self.regressions, self.starts, strict=True):
            solved = regression.solve(start, self.has_bias)
            if block.inputs:
                kernel[:, block.columns] = solved.kernel[:inputs]
            if block.state:
                recurrent[:, block.columns] = solved.kernel[-units:]
            biases[int(block.inner), block.columns] = solved.offset
        return CellWeights(kernel, recurrent, *biases)


def recurrent_tasks(context: Context) -> list[RecurrentTask]:
    """Tasks for all recurrent layers that are understood."""
    return [
        RecurrentTask(context, number, parts, context.calls(number)[0])
        for number in range(len(context.merged.graph.layers))
        if (parts := _parts(context, number))
    ]


def _parts(context: Context, layer: int) -> tuple[Part, ...]:
    """Directions of a layer; none for a layer that is not recurrent, or not in a way that is known."""
    origin, class_name = context.origin(layer), context.layer(layer).class_name
    if not origin.members or not context.calls(layer) or class_name not in (*KINDS, "RNN", "Bidirectional"):
        return ()
    _, example = context.seen(context.calls(layer)[0])[0]
    live = context.every.layers[context.every.merged.graph.calls[example.call].layer]
    source, own = origin.members[0]
    weights = list(enumerate(context.frame.sources[source].states[own].weights))
    both = class_name == "Bidirectional"
    found = []
    for direction in ("forward", "backward") if both else ("",):
        runs = getattr(live, f"{direction}_layer") if both else live
        names = {
            weight.name: place
            for place, weight in weights
            if not both or (direction == "forward") == any(key.startswith("forward") for key in weight.key.split("/"))
        }
        cell = Cell.of(runs.cell)
        if cell is None or not {"kernel", "recurrent_kernel"} <= set(names) <= {"kernel", "recurrent_kernel", "bias"}:
            return ()
        places = (names["kernel"], names["recurrent_kernel"], names.get("bias"))
        found.append(Part(cell, places, bool(runs.go_backwards)))
    return tuple(found)
