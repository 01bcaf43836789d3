"""Where a linear layer's result is aimed at: behind the normalisation and the sum that it goes through, if it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kmerge.dialects.vocabulary import RANDOM
from kmerge.fuse.design import Linear, linear_rows
from kmerge.graph import Layer, Ref, refs
from kmerge.shapes.calls import inputs_of
from kmerge.shapes.layers import inner_layer, is_keras
from kmerge.surgery import Merged

NORMALS = ("BatchNormalization", "BatchNormalizationV1", "SyncBatchNormalization")
_NOTHING = (*RANDOM, "Identity", "ActivityRegularization")
"""Layers that do nothing when a network predicts."""


@dataclass(frozen=True)
class Chain:
    """One call of a linear layer and what its result goes through before anything that is not linear.

    Attributes:
        call: of the linear layer.
        normal: call of the normalisation behind it, None without one.
        end: the tensor at which it is aimed; the layer's own result before its activation where nothing is absorbed.
        others: what is added to the result on the way.
    """

    call: int
    normal: int | None
    end: Ref | None
    others: tuple[Ref, ...] = ()

    @property
    def joins(self) -> int | None:
        """The call of the sum in which it ends."""
        return self.end.call if self.end is not None and self.others else None


@dataclass(frozen=True, eq=False)
class Chains:
    """All chains of a merged graph.

    Attributes:
        merged: the graph.
    """

    merged: Merged

    @cached_property
    def linear(self) -> dict[int, Linear]:
        """Layers that are linear, by number."""
        graph, found = self.merged.graph, {}
        for number, layer in enumerate(graph.layers):
            if not self.merged.layers[number].members or not is_keras(layer.class_name, layer.entry):
                continue
            calls = graph.calls_of(number)
            given = refs(graph.calls[calls[0]].arguments) if calls else []
            shape = given[0].shape if given else None
            rows = linear_rows(layer.class_name, layer.config, None if shape is None else len(shape))
            if rows is not None:
                found[number] = rows
        return found

    @cached_property
    def readers(self) -> Mapping[Ref, tuple[int, ...]]:
        """Calls that read each tensor; -1 stands for the network's outputs."""
        graph = self.merged.graph
        found: dict[Ref, list[int]] = {}
        for number, call in enumerate(graph.calls):
            for ref in dict.fromkeys(refs(call.arguments)):
                found.setdefault(Ref(ref.call, ref.output), []).append(number)
        for ref in refs(graph.outputs):
            found.setdefault(Ref(ref.call, ref.output), []).append(-1)
        return {ref: tuple(calls) for ref, calls in found.items()}

    @cached_property
    def _ranks(self) -> Mapping[Ref, int]:
        """How many axes each tensor has, where that is known."""
        found = [ref for call in self.merged.graph.calls for ref in refs(call.arguments)]
        return {Ref(ref.call, ref.output): len(ref.shape) for ref in found if ref.shape is not None}

    def chain(self, call: int) -> Chain:
        graph = self.merged.graph
        layer = graph.calls[call].layer
        if activation_of(graph.layers[layer]) not in (None, "linear"):
            return Chain(call, None, None)
        several = len(graph.calls_of(layer)) > 1
        normal: int | None = None
        at, end = Ref(call), None
        while True:
            readers = self.readers.get(at, ())
            if len(readers) != 1 or readers[0] < 0:
                return Chain(call, normal, end)
            reader = readers[0]
            own = graph.layers[graph.calls[reader].layer]
            if own.class_name in _NOTHING or (
                own.class_name == "Activation" and own.config.get("activation") == "linear"
            ):
                at = Ref(reader)
            elif own.class_name in NORMALS and normal is None and not several and self._normalises(layer, at, reader):
                normal, at = reader, Ref(reader)
                end = at
            elif own.class_name == "Add" and self._same(call, reader):
                terms = self._terms(reader)
                if terms.count(at) != 1:
                    return Chain(call, normal, end)
                return Chain(call, normal, Ref(reader), tuple(term for term in terms if term != at))
            else:
                return Chain(call, normal, end)

    def _same(self, call: int, other: int) -> bool:
        """Whether two calls stand for the same sources."""
        first, second = ({source for source, _ in self.merged.calls[number]} for number in (call, other))
        return first == second

    def _normalises(self, layer: int, at: Ref, reader: int) -> bool:
        """Whether a normalisation has a number for each of a linear layer's outputs, and is there for it alone."""
        graph, rank = self.merged.graph, self._ranks.get(at)
        own = graph.calls[reader].layer
        if rank is None or layer not in self.linear or len(graph.calls_of(own)) > 1 or not self._same(at.call, reader):
            return False
        if len(self.merged.layers[own].members) != len(self.merged.layers[layer].members):
            return False
        axis = graph.layers[own].config.get("axis")
        axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else -1 if axis is None else axis
        return isinstance(axis, int) and axis % rank == self.linear[layer].channel(rank)

    def _terms(self, reader: int) -> list[Ref]:
        """Tensors of one shape that a call adds up; none where it adds anything else."""
        arguments = self.merged.graph.calls[reader].arguments
        found = refs(arguments)
        inputs = inputs_of(arguments, {})
        whole = all(refs(value) for value in inputs.positional) and not inputs.keywords
        if len(found) < 2 or not whole or any(ref.shape is None or ref.shape != found[0].shape for ref in found):
            return []
        return [Ref(ref.call, ref.output) for ref in found]


def activation_of(layer: Layer) -> object:
    """The activation function in a layer's configuration; that of the inner layer of a wrapper."""
    inner = inner_layer(layer.config) if layer.class_name == "TimeDistributed" else None
    return (layer.config if inner is None else inner[1]).get("activation")
