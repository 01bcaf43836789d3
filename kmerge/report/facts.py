"""Facts of a run, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.graph import Graph
from kmerge.plan import Plan, source_graph
from kmerge.shapes import infer_shapes, multiply_adds
from kmerge.similarity import Ancestry
from kmerge.source import Source, State, is_parameter
from kmerge.surgery import Merged


@dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes:
        layers: number of layers with weights.
        parameters: entries of their weights.
        multiply_adds: for one input row; None where a layer's cannot be known without running it.
        calls: calls of layers with weights.
    """

    layers: int
    parameters: int
    multiply_adds: int | None
    calls: int


@dataclass(frozen=True)
class Report:
    """What a merge did: what `--json` prints.

    Attributes:
        plan: every decision.
        output: where the model was written, None for a dry run or a live model.
        bytes: of the output.
        shared, private: the merged model's two parts.
        merged, separate: the merged model against all sources together.
        heads: names of each source's outputs, by label.
        ancestry: what the weights said of a common ancestor, where that was looked at.
        seconds: the whole run took.
        notes: what a reader should know.
    """

    plan: Plan
    output: str | None
    bytes: int
    shared: Size
    private: Size
    merged: Size
    separate: Size
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ancestry: Ancestry | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON, as `kmerge combine --json` prints it."""
        ancestry = self.ancestry and {
            "related": self.ancestry.related,
            "cosine": None if math.isnan(self.ancestry.cosine) else round(self.ancestry.cosine, 6),
        }
        return {
            "output": self.output,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 4),
            "heads": {label: list(names) for label, names in self.heads.items()},
            "shared": vars(self.shared),
            "private": vars(self.private),
            "merged": vars(self.merged),
            "separate": vars(self.separate),
            "ancestry": ancestry,
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
        }


def graph_size(graph: Graph, states: Sequence[State], layers: set[int] | None = None) -> Size:
    """Size of a network, or of some of its layers."""
    chosen = set(range(len(graph.layers))) if layers is None else layers
    weights = {number: [weight.tensor.shape for weight in state.weights] for number, state in enumerate(states)}
    costs = multiply_adds(graph, infer_shapes(graph), weights)
    weighted = {number for number in chosen if states[number].weights}
    calls = [number for number, call in enumerate(graph.calls) if call.layer in weighted]
    known = [costs.get(number) for number, call in enumerate(graph.calls) if call.layer in chosen]
    total = None if any(cost is None for cost in known) else sum(cost for cost in known if cost is not None)
    parameters = sum(w.tensor.size for number in chosen for w in states[number].weights if is_parameter(w))
    return Size(len(weighted), parameters, total, len(calls))


def merged_states(merged: Merged, sources: Sequence[Source]) -> list[State]:
    """What the merged model will hold, by the shapes of each layer's first member."""
    return [
        sources[layer.members[0][0]].states[layer.members[0][1]] if layer.members else State() for layer in merged.layers
    ]


def merge_sizes(merged: Merged, sources: Sequence[Source]) -> dict[str, Size]:
    """Sizes of the merged model, its shared and private parts, and the sources together."""
    states = merged_states(merged, sources)
    shared = {number for number, layer in enumerate(merged.layers) if layer.role == "shared"}
    separate = [graph_size(source_graph(source), source.states) for source in sources]
    macs = [size.multiply_adds for size in separate]
    return {
        "merged": graph_size(merged.graph, states),
        "shared": graph_size(merged.graph, states, shared),
        "private": graph_size(merged.graph, states, set(range(len(merged.layers))) - shared),
        "separate": Size(
            sum(size.layers for size in separate),
            sum(size.parameters for size in separate),
            None if any(value is None for value in macs) else sum(value for value in macs if value is not None),
            sum(size.calls for size in separate),
        ),
    }


def flat_sizes(sources: Sequence[Source]) -> dict[str, Size]:
    """The same for files without a graph, where layers and multiply-adds are not known."""
    one = Size(0, sources[0].num_parameters, None, 0)
    every = Size(0, sum(source.num_parameters for source in sources), None, 0)
    return {"merged": one, "shared": one, "private": Size(0, 0, None, 0), "separate": every}
