"""What every part of a fusion works with: both networks, the units, the weights so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from kmerge.calibration.network import Network, Tape
from kmerge.fuse.chains import Chains
from kmerge.fuse.pairs import Frame, Pair
from kmerge.graph import Layer, Ref, refs
from kmerge.methods.registry import Array
from kmerge.surgery import Merged, MergedLayer


@dataclass(frozen=True, eq=False)
class Site:
    """Where the units of some spaces can be seen in all sources at once.

    Attributes:
        tensors: of the sources' network.
    """

    tensors: tuple[Ref, ...]

    def views(self, values: Mapping[Ref, Any], picked: float, rng: np.random.Generator) -> Iterator[tuple[int, Array]]:
        """What units do.

        Args:
            values: of the tensors, for one batch.
            picked: how many rows are wanted per input.
            rng: to pick them.

        Yields:
            Number of a space and values of shape (rows, sources * units), those of the first source first.
        """
        raise NotImplementedError


class Task(Protocol):
    """One step of the walk: some layers of the merged network, solved together.

    Attributes:
        at: call of the merged network at which everything before it has been solved.
        sees: tensors of the sources' network that it needs.
        reads: tensors of the merged network that it needs.
    """

    at: int
    sees: tuple[Ref, ...]
    reads: tuple[Ref, ...]

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
        rng: source of random numbers.
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
    rng: np.random.Generator
    pairs: list[Pair] = field(default_factory=list)
    own: Network | None = None
    merged_tape: Tape | None = None
    values: dict[tuple[int, int], Array] = field(default_factory=dict)

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

    def seen(self, call: int, output: int = 0) -> list[tuple[int, Ref]]:
        """The same tensor in each source that a merged call stands for, in the sources' network."""
        return [(source, Ref(self._counterparts[source, own], output)) for source, own in self.merged.calls[call]]

    def results(self, call: int) -> list[tuple[int, Ref]]:
        """What a merged call gives before its own activation, in each source."""
        return [
            (source, self.every.target(self._counterparts[source, own])) for source, own in self.merged.calls[call]
        ]

    def columns(self, layer: int, place: int, axis: int) -> dict[int, Array]:
        """What takes an axis of a layer's weight to the merged network, per source that has the layer.

        Returns:
            Shapes (length, merged length). For a private layer that makes units of a shared space, each merged unit is
            the mean of this source's own part.
        """
        origin = self.origin(layer)
        found = {}
        for source, own in origin.members:
            size = self.frame.shape((source, own, place))[axis]
            axes = self.frame.axis((source, own, place), axis)
            share = 1.0 if origin.role == "private" else self.shares[source]
            matrix = np.eye(size) * share if axes is None else axes.matrix(self.pairs, source, size, share)
            if origin.role == "private":
                total = matrix.sum(axis=0)
                matrix = matrix / np.where(total > 0, total, 1.0)
            found[source] = matrix
        return found

    def set(self, layer: int, place: int, value: Array) -> None:
        """A weight of the merged network, in what will be written and in the live layer."""
        assert self.own is not None
        self.values[layer, place] = value
        variable = self.own.variable(layer, self._key(layer, place), place)
        variable.assign(value.astype(np.float32))

    def _key(self, layer: int, place: int) -> str:
        source, own = self.origin(layer).members[0]
        return self.frame.sources[source].states[own].weights[place].key

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
        chosen = np.sort(np.argsort(self.rng.random((inputs, each)), axis=1)[:, :count], axis=1)
        return (np.arange(inputs)[:, None] * each + chosen).ravel()
