"""What every part of a fusion works with: both networks, the units, the weights so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from kmerge.calibration.network import BEFORE, Network, Tape
from kmerge.data import generator
from kmerge.dialects.vocabulary import RANDOM
from kmerge.fuse.batches import FEWEST_HELD
from kmerge.fuse.blend import Function, function_of
from kmerge.fuse.chains import Chains, activation_of
from kmerge.fuse.mixing import Line, Mixing, unmoved
from kmerge.fuse.pairs import LEAST_PART, Frame, Kept, Pair
from kmerge.graph import Layer, Ref, flatten, refs
from kmerge.layout import source_graph
from kmerge.methods.registry import Array
from kmerge.surgery import Merged, MergedLayer

ACTIVATIONS = ("Activation", "Softmax", "ReLU", "LeakyReLU")
"""Layers that are nothing but an activation."""

MIXING = (
    "Flatten",
    "Reshape",
    "Permute",
    "RepeatVector",
    "Identity",
    "ActivityRegularization",
    "Add",
    "Average",
    "Subtract",
    "Concatenate",
    *RANDOM,
    *(f"{kind}Pooling{rank}D" for kind in ("Average", "GlobalAverage") for rank in (1, 2, 3)),
    *(f"{kind}{rank}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for rank in (1, 2, 3)),
)
"""Layers that give of a mixture of units the mixture of what they give of each."""
MAXIMA = (
    *("Maximum", "Minimum", "MaxPool", "Max", "Amax", "Min", "Amin"),
    *(f"{kind}Pooling{rank}D" for kind in ("Max", "GlobalMax") for rank in (1, 2, 3)),
)
"""Layers and operations that give the largest of several, or the smallest."""


@dataclass(frozen=True)
class Final:
    """One output of a source, before its last activation.

    Attributes:
        ref: in the sources' network.
        activation: by Keras's name, or as a layer holds it.
    """

    ref: Ref
    activation: object

    @property
    def softmax(self) -> bool:
        return self.activation == "softmax"


@dataclass(frozen=True, eq=False)
class Site(ABC):
    """Where the units of some spaces can be seen in all sources at once.

    Attributes:
        tensors: of the sources' network.
    """

    tensors: tuple[Ref, ...]
    scaled: ClassVar[bool] = True
    """Whether a unit's size may mean nothing: it depends on what follows; False where it never does."""
    averaged: ClassVar[bool] = True
    """Whether a merged unit is a mean of several; False where some units are kept as they are instead."""

    @property
    @abstractmethod
    def spaces(self) -> tuple[int, ...]:
        """Numbers of the spaces whose units are seen."""

    @abstractmethod
    def views(self, values: Mapping[Ref, Any], picked: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
        """What units do.

        Args:
            values: of the tensors, for one batch.
            picked: how many rows are wanted per input.
            rng: to pick them.

        Yields:
            Number of a space and values of shape (rows, sources * units), those of the first source first.
        """


class Task(Protocol):
    """One step of the walk: some layers of the merged network, solved together.

    Attributes:
        at: call of the merged network at which everything before it has been solved.
        layers: of the merged network, that it settles.
        sees: tensors of the sources' network that it needs.
        reads: tensors of the merged network that it needs.
    """

    at: int

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def sees(self) -> tuple[Ref, ...]: ...

    @property
    def reads(self) -> tuple[Ref, ...]: ...

    def sites(self) -> Sequence[Site]: ...

    def run(self, passes: Passes) -> str:
        """Solve; returns a line for the log."""


@dataclass(frozen=True, eq=False)
class Passes:
    """Both networks on all batches of inputs, as often as a task wants; what later tasks need is kept."""

    context: Context
    task: Task
    later_sources: frozenset[Ref]
    later_merged: frozenset[Ref]

    @cached_property
    def random(self) -> np.random.Generator:
        """Random numbers for the task alone, whatever its layers are called."""
        return self.context.random(f"task/{'/'.join(map(str, self.task.layers))}")

    def pick(self, rows: int, inputs: int, wanted: float) -> Array:
        """Numbers of some rows, equally many of each input.

        Args:
            rows: in all, those of each input in a row.
            inputs: how many inputs they belong to.
            wanted: rows per input.
        """
        each = rows // inputs
        count = max(1, int(np.ceil(wanted)))
        if count >= each:
            return np.arange(rows)
        chosen = np.sort(np.argsort(self.random.random((inputs, each)), axis=1)[:, :count], axis=1)
        return (np.arange(inputs)[:, None] * each + chosen).ravel()

    def __iter__(self) -> Iterator[tuple[dict[Ref, Any], dict[Ref, Any], Array]]:
        """The last pass of a task. Per batch: tensors of the sources, tensors of the merged network, which inputs are
        held back."""
        return self._run(frozenset(), frozenset())

    def again(self) -> Iterator[tuple[dict[Ref, Any], dict[Ref, Any], Array]]:
        """The same, for a task that needs another pass after this one."""
        return self._run(frozenset(self.task.sees), frozenset(self.task.reads))

    def _run(
        self, sees: frozenset[Ref], reads: frozenset[Ref]
    ) -> Iterator[tuple[dict[Ref, Any], dict[Ref, Any], Array]]:
        context = self.context
        assert context.merged_tape is not None
        yield from zip(
            context.source_tape.passes(self.task.sees, sees | self.later_sources),
            context.merged_tape.passes(self.task.reads, reads | self.later_merged),
            context.held,
            strict=True,
        )


@dataclass(eq=False)
class Context:
    """A fusion under way.

    Attributes:
        every: the network of all sources side by side, live.
        merged: the merged graph.
        frame: spaces of all sources, and their sizes in the merged network.
        shares: importance of the sources, sums to 1.
        source_tape: the sources' network on all batches.
        held: per batch, which inputs are held back, shape (batch,), bool.
        seed: of all random numbers.
        lean: whether heads of one task lean on each other.
        pairs: per space, how its units are made from the sources'.
        own: the merged network, live.
        merged_tape: the merged network on all batches.
        values: weights of the merged network by (layer, place).
    """

    every: Network
    merged: Merged
    frame: Frame
    shares: Sequence[float]
    source_tape: Tape
    held: Sequence[Array]
    seed: int
    lean: bool = False
    pairs: list[Pair | Kept] = field(default_factory=list)
    own: Network | None = None
    merged_tape: Tape | None = None
    values: dict[tuple[int, int], Array] = field(default_factory=dict)
    refused: dict[int, str] | None = None
    """Layers that turned out not to do what their configuration says, once all were tried."""
    moved: dict[int, float] = field(default_factory=dict)
    """Layers that give a source's output, and how far it was moved towards what all sources give."""
    _followers: dict[int, frozenset[int]] = field(default_factory=dict)

    @cached_property
    def chains(self) -> Chains:
        return Chains(self.merged)

    @cached_property
    def _counterparts(self) -> Mapping[tuple[int, int], int]:
        return {pair: number for number, stands in enumerate(self.every.merged.calls) for pair in stands}

    @property
    def examples(self) -> int:
        return sum(len(batch[0]) for batch in self.source_tape.batches)

    def layer(self, number: int) -> Layer:
        return self.merged.graph.layers[number]

    def origin(self, number: int) -> MergedLayer:
        return self.merged.layers[number]

    def calls(self, layer: int) -> tuple[int, ...]:
        return self.merged.graph.calls_of(layer)

    def weights(self, layer: int) -> dict[str, int]:
        """Places of a layer's weights by name; of a layer with several parts, those of the first with that name."""
        origin = self.origin(layer)
        if not origin.members:
            return {}
        source, own = origin.members[0]
        found: dict[str, int] = {}
        for place, weight in enumerate(self.frame.sources[source].states[own].weights):
            found.setdefault(weight.name, place)
        return found

    def stored(self, source: int, layer: int, place: int) -> Array:
        """A weight of a source, by the number of its layer in that source."""
        return self.frame.sources[source].states[layer].weights[place].tensor.read()

    def input(self, call: int) -> Ref:
        """The first tensor that a merged call reads."""
        ref = refs(self.merged.graph.calls[call].arguments)[0]
        return Ref(ref.call, ref.output)

    def every_input(self, call: int) -> Ref:
        """The first tensor that a call of the sources' network reads."""
        ref = refs(self.every.merged.graph.calls[call].arguments)[0]
        return Ref(ref.call, ref.output)

    def seen(self, call: int, output: int = 0) -> list[tuple[int, Ref]]:
        """The same tensor in each source that a merged call stands for, in the sources' network."""
        return [(source, Ref(self._counterparts[source, own], output)) for source, own in self.merged.calls[call]]

    def outputs(self) -> list[Ref]:
        """What the sources give, in the sources' network: all outputs of the first in their order, then of the next."""
        return [
            Ref(self._counterparts[number, ref.call], ref.output)
            for number, source in enumerate(self.frame.sources)
            for ref in flatten(source_graph(source).outputs)
            if isinstance(ref, Ref)
        ]

    @cached_property
    def finals(self) -> tuple[tuple[Final, ...], ...]:
        """The same before the last activation, of each source in the order of its outputs."""
        graph, waiting = self.every.merged.graph, iter(self.outputs())
        found = []
        for source in self.frame.sources:
            own = []
            for _ in [ref for ref in flatten(source_graph(source).outputs) if isinstance(ref, Ref)]:
                ref = next(waiting)
                layer = graph.layers[graph.calls[ref.call].layer]
                target = self.every.target(ref.call) if not ref.output else Ref(ref.call, ref.output)
                name = activation_of(layer)
                if layer.class_name in ACTIVATIONS:
                    target = self.every_input(ref.call)
                    name = name or layer.class_name.lower()
                own.append(Final(target, name))
            found.append(tuple(own))
        return tuple(found)

    @property
    def num_held(self) -> int:
        """Inputs that are held back; none where they are too few to tell much."""
        count = int(sum(held.sum() for held in self.held))
        return count if count >= FEWEST_HELD else 0

    def results(self, call: int) -> list[tuple[int, Ref]]:
        """What a merged call gives before its own activation, in each source."""
        return [(source, self.every.target(self._counterparts[source, own])) for source, own in self.merged.calls[call]]

    def follows(self, ref: Ref) -> Function | None:
        """The activation function that follows a tensor of the sources; None where it is not known."""
        graph = self.every.merged.graph
        if ref.output == BEFORE:
            layer = graph.layers[graph.calls[ref.call].layer]
            return function_of(activation_of(layer), layer.config)
        readers = self.every_chains.readers.get(ref, ())
        if len(readers) != 1 or readers[0] < 0:
            return function_of("linear", {})
        layer = graph.layers[graph.calls[readers[0]].layer]
        if layer.class_name == "Activation":
            return function_of(activation_of(layer), layer.config)
        if layer.class_name in ("ReLU", "LeakyReLU", "ELU", "Softmax", "PReLU") or layer.is_operation:
            return function_of(layer.class_name, layer.config)
        return function_of("linear", {})

    def meets_maximum(self, ref: Ref) -> bool:
        """Whether the largest of several is taken of a tensor, as it stands or after it was moved, padded or averaged:
        the largest of several mixtures of units is no mixture of the largest units."""
        graph, readers = self.every.merged.graph, self.every_chains.readers
        waiting = [Ref(ref.call, 0 if ref.output == BEFORE else ref.output)]
        seen = set(waiting)
        while waiting:
            for call in (call for call in readers.get(waiting.pop(), ()) if call >= 0):
                name = graph.layers[graph.calls[call].layer].class_name
                if name in MAXIMA:
                    return True
                if name in MIXING and Ref(call) not in seen:
                    seen.add(Ref(call))
                    waiting.append(Ref(call))
        return False

    @cached_property
    def every_chains(self) -> Chains:
        """Chains of the sources' network."""
        return Chains(self.every.merged)

    def columns(self, layer: int, place: int, axis: int, sources: Collection[int] | None = None) -> dict[int, Mixing]:
        """What takes an axis of a layer's weight to the merged network, per source.

        Args:
            layer: in the merged graph.
            place: of the weight among those of the layer.
            axis: of the weight.
            sources: those that are asked for; all that have the layer by default.

        Returns:
            Maps of rows of the axis. A merged unit is the mean of what these sources have of it, and 0 for all
            of them where they have nothing of it.
        """
        return self.several(layer, [(place, axis)], sources)

    def several(
        self, layer: int, axes: Sequence[tuple[int, int]], sources: Collection[int] | None = None
    ) -> dict[int, Mixing]:
        """The same for several axes of weights that are laid out one after the other, as one map each source."""
        origin = self.origin(layer)
        found: dict[int, tuple[Line, ...]] = {}
        parts: dict[int, Array] = {}
        for source, own in origin.members:
            if sources is not None and source not in sources:
                continue
            alone = len(origin.members) == 1
            share = 1.0 if alone else self.shares[source]
            lines: list[Line] = []
            part: Array = np.ones(1)
            for place, axis in axes:
                size = self.frame.shape((source, own, place))[axis]
                units = self.frame.axis((source, own, place), axis)
                lines.append(
                    unmoved(size, share) if units is None else units.line(self.pairs, source, size, share, alone)
                )
                mine = np.full(size, share) if units is None else units.parts(self.pairs, source, share, alone)
                part = np.kron(part, mine)
            found[source], parts[source] = tuple(lines), part
        total = sum(parts.values(), np.zeros(1))
        if len(axes) == 1 and len(origin.members) == len(found) > 1:  # all of it: made of parts that sum to 1
            scale = np.ones(len(total))
        else:
            scale = np.where(total > LEAST_PART, 1 / np.maximum(total, LEAST_PART), 0.0)
        return {source: Mixing(own, scale) for source, own in found.items()}

    def set(self, layer: int, place: int, value: Array) -> None:
        """A weight of the merged network, in what will be written and in the live layer."""
        assert self.own is not None
        self.values[layer, place] = value
        variable = self.own.variable(layer, self._key(layer, place), place)
        variable.assign(value.astype(np.float32))
        if self.merged_tape is not None:
            self.merged_tape.drop(self._behind(layer))

    def _behind(self, layer: int) -> frozenset[int]:
        """Calls of a layer in the merged network, and all that follow from them."""
        if layer not in self._followers:
            graph, found = self.merged.graph, set(self.merged.graph.calls_of(layer))
            for number, call in enumerate(graph.calls):
                if any(ref.call in found for ref in refs(call.arguments)):
                    found.add(number)
            self._followers[layer] = frozenset(found)
        return self._followers[layer]

    def _key(self, layer: int, place: int) -> str:
        source, own = self.origin(layer).members[0]
        return self.frame.sources[source].states[own].weights[place].key

    def random(self, address: str) -> np.random.Generator:
        """Random numbers for what the address says, the same whatever else is drawn."""
        return generator(self.seed, f"fuse/{address}")
