"""What is in a file, as data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kmerge.dialects.reading import Dialect
from kmerge.dialects.vocabulary import WeightKind, is_quantized
from kmerge.errors import KmergeError
from kmerge.graph import Ref, flatten, refs
from kmerge.live import RUNS_CODE
from kmerge.report.facts import graph_size
from kmerge.shapes import infer_shapes
from kmerge.source import Source, State, is_parameter
from kmerge.upgrade import refusals, upgrade


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a file.

    Attributes:
        name, class_name: as in the file.
        origin: names of the nested models that hold it, joined by "/"; "" at the top.
        output: shape of its first output, batch first; None where it cannot be told.
        weights: name to shape; the key in the file where several have one name.
        parameters: entries of its weights.
        inputs: the layers that it reads.
        role: shared or private, in a file that kmerge merged; "" elsewhere.
        source: label of the source that a private layer comes from; "" elsewhere.
        trainable: as saved.
    """

    name: str
    class_name: str
    origin: str
    output: tuple[int | None, ...] | None
    weights: Mapping[str, tuple[int, ...]]
    parameters: int
    inputs: tuple[str, ...]
    role: str
    source: str
    trainable: bool


@dataclass(frozen=True)
class Inspection:
    """What `kmerge inspect` shows."""

    name: str
    kind: str
    writer: str
    size: int
    parameters: int
    multiply_adds: int | None
    inputs: Mapping[str, tuple[int | None, ...] | None]
    outputs: Mapping[str, tuple[int | None, ...] | None]
    layers: tuple[LayerFacts, ...]
    hazards: tuple[str, ...]
    merge: Mapping[str, Any] | None = None
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights of a file without a graph."""
    refused: tuple[Mapping[str, Any], ...] = ()
    """What current Keras refuses in the file, or (if `silent`) computes otherwise: reason, layers and silent each."""
    obstacles: tuple[Mapping[str, str], ...] = ()
    """What `kmerge convert` needs from the user, or cannot do: layer, class_name, kind and reason each."""

    def to_dict(self) -> dict[str, Any]:
        """JSON, as `kmerge inspect --json` prints it."""
        return json.loads(json.dumps({**vars(self), "layers": [vars(layer) for layer in self.layers]}))  # type: ignore[no-any-return]


def stored_merge(source: Source) -> Mapping[str, Any] | None:
    """What kmerge left in a file that it wrote: its version and the plan; None in any other."""
    stored = source.metadata.get("kmerge") or source.root.get("kmerge")
    if isinstance(stored, str):
        try:
            stored = json.loads(stored)
        except (ValueError, RecursionError):
            return None
    return stored if isinstance(stored, Mapping) and isinstance(stored.get("plan"), Mapping) else None


def inspect_source(source: Source) -> Inspection:
    """Facts of an opened file; no weight is read."""
    merge = stored_merge(source)
    graph = source.graph
    writer = f"Keras {source.version}" if source.version else "unknown"
    if source.backend:
        writer += f" ({source.backend})"
    common: dict[str, Any] = {
        "name": source.name,
        "kind": _KINDS[source.kind.value],
        "writer": writer,
        "size": source.size,
        "parameters": source.num_parameters,
        "hazards": tuple(_hazards(source)),
        "merge": merge,
    }
    if graph is None:
        shapes = {weight.key: weight.tensor.shape for state in source.states for weight in state.weights}
        return Inspection(**common, multiply_adds=None, inputs={}, outputs={}, layers=(), weights=shapes)
    common["refused"] = tuple({**vars(item), "layers": list(item.layers)} for item in refusals(source))
    common["obstacles"] = _obstacles(source) if common["refused"] else ()
    known = infer_shapes(graph)
    roles = _roles(merge)
    layers = []
    for number, layer in enumerate(graph.layers):
        calls = graph.calls_of(number)
        reads = dict.fromkeys(graph.layer_of(ref).name for call in calls for ref in refs(graph.calls[call].arguments))
        layers.append(
            LayerFacts(
                name=layer.name,
                class_name=layer.class_name,
                origin="/".join(layer.origin),
                output=known.get(Ref(calls[0])) if calls else None,
                weights=_weights(source.states[number]),
                parameters=sum(w.tensor.size for w in source.states[number].weights if is_parameter(w)),
                inputs=tuple(reads),
                role=roles.get(layer.name, ("", ""))[0],
                source=roles.get(layer.name, ("", ""))[1],
                trainable=layer.config.get("trainable") is not False,
            )
        )
    inputs = {graph.layer_of(ref).name: known.get(ref) for ref in refs(graph.inputs)}
    if isinstance(graph.outputs, dict):
        outputs = {str(key): known.get(ref) for key in graph.outputs for ref in flatten(graph.outputs[key])}
    else:
        outputs = {graph.layer_of(ref).name: known.get(ref) for ref in flatten(graph.outputs)}
    macs = graph_size(graph, source.states).multiply_adds
    return Inspection(**common, multiply_adds=macs, inputs=inputs, outputs=outputs, layers=tuple(layers))


_KINDS = {
    "h5": "whole model, HDF5 (.h5)",
    "h5_weights": "weights only, old HDF5",
    "weights": "weights only, Keras 3 (.weights.h5)",
    "keras": "whole model, Keras 3 (.keras)",
    "folder": "whole model, Keras 3, unzipped",
    "shards": "weights only, Keras 3, sharded (.weights.json)",
}


def _roles(merge: Mapping[str, Any] | None) -> dict[str, tuple[str, str]]:
    """Role, and source of a private layer, by the layer's name in the merged model."""
    stored = merge.get("layers") if merge else None
    if not isinstance(stored, Mapping):
        return {}
    known = {str(name): item for name, item in stored.items() if isinstance(item, Mapping)}
    return {name: (str(item.get("role", "")), str(item.get("source", ""))) for name, item in known.items()}


def _weights(state: State) -> dict[str, tuple[int, ...]]:
    """Shapes by name, or by key where several weights have one name (the two directions of `Bidirectional`)."""
    names = Counter(weight.name for weight in state.weights)
    return {weight.name if names[weight.name] == 1 else weight.key: weight.tensor.shape for weight in state.weights}


def _obstacles(source: Source) -> tuple[Mapping[str, str], ...]:
    try:
        return tuple(vars(item) for item in upgrade(source).obstacles)
    except KmergeError as error:
        return ({"layer": "", "class_name": "", "kind": "unknown", "reason": str(error)},)


def _hazards(source: Source) -> list[str]:
    """What may surprise somebody who loads the file or merges it."""
    found = list(source.warnings)
    if source.graph is None:
        return found
    for layer, state in zip(source.graph.layers, source.states, strict=True):
        where = f"'{layer.name}' ({layer.class_name})"
        if layer.class_name in RUNS_CODE:
            found.append(f"{where} {RUNS_CODE[layer.class_name]}: kmerge carries it along and never runs it")
        elif source.dialect is Dialect.KERAS3 and _is_custom(layer.entry):
            found.append(f"{where} is a custom layer: whoever loads the file needs its class")
        if is_quantized(layer.config):
            found.append(f"{where} is quantised: its weights can be taken from one source, not averaged")
        if any(weight.kind is WeightKind.LEARNED for weight in state.weights):
            found.append(f"{where} holds state adapted to data: shared only where it is equal")
    return found


def _is_custom(entry: Mapping[str, Any]) -> bool:
    module = str(entry.get("module") or "")
    return not module.startswith("keras") or (entry.get("registered_name") or "").find(">") >= 0
