"""Where a linear layer's result is aimed at: behind the normalisation and the sum that it goes through, if it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kmerge.dialects.vocabulary import RANDOM
from kmerge.fuse.design import Linear, linear_rows
from kmerge.graph import Graph, Ref, refs
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
    """All chains of a merged graph."""

    merged: Merged

    @cached_property
    def linear(self) -> Mapping[int, Linear]:
        """Layers that are linear, by number."""
        found = {
            number: linear_rows(layer.class_name, layer.config)
            for number, layer in enumerate(self.merged.graph.layers)
            if self.merged.layers[number].members
        }
        return {number: rows for number, rows in found.items() if rows is not None}

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

    def chain(self, call: int) -> Chain:
        graph = self.merged.graph
        layer = graph.calls[call].layer
        if not _is_plain_activation(graph, layer):
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
            same = len(self.merged.calls[reader]) == len(self.merged.calls[call])
            if own.class_name in _NOTHING or (own.class_name == "Activation" and own.config.get("activation") == "linear"):
                at = Ref(reader)
            elif (
                own.class_name in NORMALS
                and normal is None
                and same
                and not several
                and len(graph.calls_of(graph.calls[reader].layer)) == 1
                and own.config.get("axis") in (-1, [-1], None, *_last(graph, at))
            ):
                normal, at = reader, Ref(reader)
                end = at
            elif own.class_name == "Add" and same:
                terms = [Ref(ref.call, ref.output) for ref in refs(graph.calls[reader].arguments)]
                if terms.count(at) != 1:
                    return Chain(call, normal, end)
                return Chain(call, normal, Ref(reader), tuple(term for term in terms if term != at))
            else:
                return Chain(call, normal, end)


def _last(graph: Graph, ref: Ref) -> tuple[object, ...]:
    """How the last axis of a tensor may be written in a configuration."""
    found = next(
        (own for call in graph.calls for own in refs(call.arguments) if (own.call, own.output) == (ref.call, ref.output)),
        ref,
    )
    rank = None if found.shape is None else len(found.shape)
    return () if rank is None else (rank - 1, [rank - 1])


def _is_plain_activation(graph: Graph, layer: int) -> bool:
    return graph.layers[layer].config.get("activation") in (None, "linear")
