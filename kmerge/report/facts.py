"""Facts of a run, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.agreement import Agreement, warnings
from kmerge.assembly import Values
from kmerge.graph import Graph
from kmerge.layout import source_graph
from kmerge.plan import Plan
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
class LayerSize:
    """How large one layer of the plan is in each source; None where a source has no counterpart.

    Attributes:
        name: as in the plan.
        parameters: entries of its weights.
        outputs: shape of its first output, batch first; None also where it cannot be told.
    """

    name: str
    parameters: tuple[int | None, ...]
    outputs: tuple[tuple[int | None, ...] | None, ...]


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
        layers: sizes of the plan's layers, in its order.
        agreement: of each head with its source, where that was measured.
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
    layers: tuple[LayerSize, ...] = ()
    agreement: tuple[Agreement, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the result, and what would help."""
        fused = self.plan.calibration is not None
        return tuple(warnings(self.agreement, fused))

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
            "agreement": [vars(item) for item in self.agreement],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "layers": json.loads(json.dumps([vars(layer) for layer in self.layers])),
            "plan": self.plan.to_dict(),
        }


def graph_size(
    graph: Graph, states: Sequence[State], layers: set[int] | None = None, values: Values | None = None
) -> Size:
    """Size of a network, or of some of its layers; `values` are weights that have other shapes than the states'."""
    chosen = set(range(len(graph.layers))) if layers is None else layers
    found = values or {}
    weights = {
        number: [
            found[number, place].shape if (number, place) in found else weight.tensor.shape
            for place, weight in enumerate(state.weights)
        ]
        for number, state in enumerate(states)
    }
    costs = multiply_adds(graph, infer_shapes(graph), weights)
    weighted = {number for number in chosen if states[number].weights}
    calls = [number for number, call in enumerate(graph.calls) if call.layer in weighted]
    known = [costs.get(number) for number, call in enumerate(graph.calls) if call.layer in chosen]
    total = None if any(cost is None for cost in known) else sum(cost for cost in known if cost is not None)
    parameters = sum(
        math.prod(shape)
        for number in chosen
        for weight, shape in zip(states[number].weights, weights[number], strict=True)
        if is_parameter(weight)
    )
    return Size(len(weighted), parameters, total, len(calls))


def merged_states(merged: Merged, sources: Sequence[Source]) -> list[State]:
    """What the merged model will hold, by the shapes of each layer's first member."""
    return [
        sources[layer.members[0][0]].states[layer.members[0][1]] if layer.members else State()
        for layer in merged.layers
    ]


def merge_sizes(merged: Merged, sources: Sequence[Source], values: Values | None = None) -> dict[str, Size]:
    """Sizes of the merged model, its shared and private parts, and the sources together.

    Args:
        merged: the graph.
        sources: that it was made from.
        values: weights that were found otherwise than by merging, of whatever shape.
    """
    states = merged_states(merged, sources)
    shared = {number for number, layer in enumerate(merged.layers) if layer.role == "shared"}
    separate = [graph_size(source_graph(source), source.states) for source in sources]
    macs = [size.multiply_adds for size in separate]
    return {
        "merged": graph_size(merged.graph, states, None, values),
        "shared": graph_size(merged.graph, states, shared, values),
        "private": graph_size(merged.graph, states, set(range(len(merged.layers))) - shared, values),
        "separate": Size(
            sum(size.layers for size in separate),
            sum(size.parameters for size in separate),
            None if any(value is None for value in macs) else sum(value for value in macs if value is not None),
            sum(size.calls for size in separate),
        ),
    }


def layer_sizes(plan: Plan, sources: Sequence[Source]) -> tuple[LayerSize, ...]:
    """Size of every layer of a plan in each source."""
    if any(source.graph is None for source in sources):
        every = tuple(source.num_parameters for source in sources)
        return tuple(LayerSize(layer.name, every, (None,) * len(sources)) for layer in plan.layers)
    known = [_sizes_by_name(source) for source in sources]
    result = []
    for layer in plan.layers:
        found = [
            (None, None) if name is None else sizes.get(name, (None, None))
            for name, sizes in zip(layer.layers, known, strict=True)
        ]
        result.append(LayerSize(layer.name, tuple(item[0] for item in found), tuple(item[1] for item in found)))
    return tuple(result)


def _sizes_by_name(source: Source) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    graph = source_graph(source)
    shapes = infer_shapes(graph)
    outputs: dict[int, tuple[int | None, ...] | None] = {}
    for ref, shape in shapes.items():
        if ref.output == 0:
            outputs.setdefault(graph.calls[ref.call].layer, shape)
    return {
        layer.name: (sum(w.tensor.size for w in state.weights if is_parameter(w)), outputs.get(number))
        for number, (layer, state) in enumerate(zip(graph.layers, source.states, strict=True))
    }


def flat_sizes(sources: Sequence[Source]) -> dict[str, Size]:
    """The same for files without a graph, where layers and multiply-adds are not known."""
    one = Size(0, sources[0].num_parameters, None, 0)
    every = Size(0, sum(source.num_parameters for source in sources), None, 0)
    return {"merged": one, "shared": one, "private": Size(0, 0, None, 0), "separate": every}
