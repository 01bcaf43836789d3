"""From a merged graph to all that a file of it holds: configuration, groups, attributes, where each weight goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kmerge.dialects.reading import Dialect
from kmerge.dialects.vocabulary import WeightKind, stored_class
from kmerge.dialects.writing import parse_version, write_model
from kmerge.engine import Target
from kmerge.graph import layer_order
from kmerge.methods.registry import Array
from kmerge.plan import Plan
from kmerge.source import Source, State, Weight
from kmerge.store import Asset, Kind, Layout, TensorSpec
from kmerge.surgery import Merged, MergedLayer


@dataclass(frozen=True)
class Assembly:
    """A file, complete but for the values of its weights.

    Attributes:
        kind: of the file.
        config: whole-model configuration; None for weights only.
        layout: groups, attributes and tensors.
        targets: where each tensor's values come from, by its path in `layout`.
        assets: files beside the weights, by path.
    """

    kind: Kind
    config: Mapping[str, Any] | None
    layout: Layout
    targets: tuple[Target, ...]
    assets: Mapping[str, Asset] = field(default_factory=dict)
    version: str = ""
    """Keras version that the file says it was written by: that of the first source."""


Values = Mapping[tuple[int, int], Array]
"""Weights found otherwise than by merging the sources' own: by the layer's number in the merged graph and the weight's
place among those of the layer's first member."""


def assemble(merged: Merged, sources: Sequence[Source], values: Values | None = None) -> Assembly:
    """The file of a merged graph, in the format and dialect of the first source.

    Args:
        merged: the graph.
        sources: that it was made from.
        values: weights to write as they are, of whatever shape.
    """
    first = sources[0]
    dialect = first.dialect or Dialect.KERAS3
    config = write_model(merged.graph, dialect, first.version)
    if dialect is Dialect.KERAS3:
        layout, targets, assets = _keras3(merged, sources, values or {})
        return Assembly(first.kind, config, layout, targets, assets, first.version)
    layout, targets = _h5(merged, sources, config, values or {})
    return Assembly(Kind.H5, config, layout, targets, {}, first.version)


def assemble_flat(sources: Sequence[Source], plan: Plan) -> Assembly:
    """Files without a graph: the first one's layout, every weight merged."""
    first = sources[0]
    origin = MergedLayer(
        "shared", tuple((number, 0) for number in range(len(sources))), plan.method, tuple(plan.options.items())
    )
    by_key = [{weight.key: weight for weight in source.states[0].weights} for source in sources]
    targets = []
    tensors: dict[str, TensorSpec] = {}
    groups: dict[str, dict[str, Any]] = {}
    state = first.states[0]
    old = first.kind in (Kind.H5_WEIGHTS, Kind.H5)
    prefix = "model_weights/" if first.kind is Kind.H5 else ""
    attributes: dict[str, Any] = {key: value for key, value in first.root.items() if key != "kmerge"}
    if first.kind is Kind.H5:
        attributes = _root_attributes(first, first.model or {})
    if old:
        layers: dict[str, list[str]] = {}
        for weight in state.weights:
            layer, _, name = weight.key.partition("/")
            layers.setdefault(layer, []).append(name)
        top = {**_writer(first), "layer_names": list(layers)}
        groups[prefix.rstrip("/")] = {**attributes, **top} if not prefix else top
        groups |= {f"{prefix}{layer}": {"weight_names": names} for layer, names in layers.items()}
    else:
        groups |= {place: dict(items) for place, items in state.groups.items()}
    if prefix or not old:
        groups = {"": attributes, **{path: items for path, items in groups.items() if path}}
    for key, weight in by_key[0].items():
        members = tuple((number, weights[key]) for number, weights in enumerate(by_key))
        means = _means(weight, [list(weights.values()) for weights in by_key])
        targets.append(
            _target(f"{prefix}{key}", str((first.model or {}).get("class_name") or key), origin, members, means)
        )
        tensors[f"{prefix}{key}"] = TensorSpec(weight.tensor.shape, weight.tensor.dtype, dict(weight.attributes))
    assets = {f"assets/{place}": asset for place, asset in state.assets.items()}
    return Assembly(first.kind, first.model, Layout(groups, tensors), tuple(targets), assets, first.version)


def _means(variance: Weight, candidates: Sequence[Sequence[Weight]]) -> tuple[Weight, ...]:
    """The mean that stands beside a variance in the same layer, per source."""
    if variance.kind is not WeightKind.VARIANCE:
        return ()
    group = variance.key.rpartition("/")[0]
    found = []
    for weights in candidates:
        own = [weight for weight in weights if weight.kind is WeightKind.MEAN]
        beside = [weight for weight in own if weight.key.rpartition("/")[0] == group] or own
        found.append(beside[0])
    return tuple(found)


def _target(
    key: str, layer: str, origin: MergedLayer, members: tuple[tuple[int, Weight], ...], means: tuple[Weight, ...] = ()
) -> Target:
    return Target(key, layer, members, origin.role, origin.method, dict(origin.options), means)


def _states(origin: MergedLayer, sources: Sequence[Source]) -> list[tuple[int, State]]:
    return [(source, sources[source].states[layer]) for source, layer in origin.members]


def _layer_targets(
    origin: MergedLayer,
    sources: Sequence[Source],
    name: str,
    places: Sequence[tuple[Weight, str]],
    order: Sequence[int],
    values: Sequence[Array | None],
) -> list[Target]:
    """Targets of one layer: its first member's weights in the given order, and the counterparts in the others."""
    states = _states(origin, sources)
    lists = [[state.weights[index] for index in order] for _, state in states]
    targets = []
    for number, (weight, key) in enumerate(places):
        members = tuple((source, weights[number]) for (source, _), weights in zip(states, lists, strict=True))
        means = _means_at(lists, number) if weight.kind is WeightKind.VARIANCE else ()
        targets.append(replace(_target(key, name, origin, members, means), values=values[number]))
    return targets


def _means_at(lists: Sequence[Sequence[Weight]], number: int) -> tuple[Weight, ...]:
    """The last mean before a variance, in each source."""
    place = max(index for index in range(number) if lists[0][index].kind is WeightKind.MEAN)
    return tuple(weights[place] for weights in lists)


# ---------------------------------------------------------------------------------------------------- Keras 3


def _keras3(
    merged: Merged, sources: Sequence[Source], values: Values
) -> tuple[Layout, tuple[Target, ...], dict[str, Asset]]:
    """Keras 3's layout: `layers/<class>[_n]/...`, numbered in the order of `model.layers`."""
    named = any("name" in items for state in sources[0].states for items in state.groups.values())
    groups: dict[str, dict[str, Any]] = {"": {}}
    tensors: dict[str, TensorSpec] = {}
    targets: list[Target] = []
    assets: dict[str, Asset] = {}
    counts: dict[str, int] = {}
    groups["vars"] = {"name": merged.graph.name} if named else {}
    for index in layer_order(merged.graph):
        layer, origin = merged.graph.layers[index], merged.layers[index]
        if layer.is_operation:
            continue
        snake = stored_class(layer.class_name)
        number = counts.get(snake, 0)
        counts[snake] = number + 1
        path = f"layers/{snake}_{number}" if number else f"layers/{snake}"
        state = sources[origin.members[0][0]].states[origin.members[0][1]] if origin.members else State()
        inner = dict(state.groups)
        inner.setdefault("", {})
        inner["vars"] = {**inner.get("vars", {}), "name": layer.name} if named else dict(inner.get("vars", {}))
        groups |= {f"{path}/{local}".rstrip("/"): dict(items) for local, items in inner.items()}
        places = [(weight, f"{path}/{weight.key}") for weight in state.weights]
        known = [values.get((index, number)) for number in range(len(places))]
        for (weight, key), value in zip(places, known, strict=True):
            tensors[key] = _spec(weight, value)
        if origin.members:
            targets += _layer_targets(origin, sources, layer.name, places, range(len(places)), known)
        assets |= {f"assets/{path}/{local}": asset for local, asset in state.assets.items()}
    return Layout(groups, tensors), tuple(targets), assets


# ------------------------------------------------------------------------------------------------- old HDF5


def _writer(source: Source) -> dict[str, Any]:
    known = {"backend": source.backend, "keras_version": source.version}
    return {key: value for key, value in known.items() if value}


def _root_attributes(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_writer(source), "model_config": json.dumps(config)}


def _spec(weight: Weight, value: Array | None) -> TensorSpec:
    shape = weight.tensor.shape if value is None else value.shape
    return TensorSpec(shape, weight.tensor.dtype, dict(weight.attributes))


def _h5(
    merged: Merged, sources: Sequence[Source], config: Mapping[str, Any], values: Values
) -> tuple[Layout, tuple[Target, ...]]:
    """The old layout: `model_weights/<layer>/<weight name>`, listed in the order of `model.layers`."""
    first = sources[0]
    graph = merged.graph
    order = [
        index for index in layer_order(graph) if first.dialect is Dialect.KERAS2 or not graph.layers[index].is_operation
    ]
    names = [graph.layers[index].name for index in order]
    groups: dict[str, dict[str, Any]] = {
        "": _root_attributes(first, config),
        "model_weights": {**_writer(first), "layer_names": names},
    }
    tensors: dict[str, TensorSpec] = {}
    targets: list[Target] = []
    for index in sorted(order, key=lambda index: graph.layers[index].name):
        layer, origin = graph.layers[index], merged.layers[index]
        state = sources[origin.members[0][0]].states[origin.members[0][1]] if origin.members else State()
        own = sources[origin.members[0][0]].graph if origin.members else None
        old_name = own.layers[origin.members[0][1]].name if own else layer.name
        weights = list(range(len(state.weights)))
        if layer.config.get("trainable") is False:
            weights = _by_owner(state.weights)
        listed: list[str] = []
        places = []
        for number in weights:
            weight = state.weights[number]
            name = "/".join(layer.name if part == old_name else part for part in weight.key.split("/"))
            listed.append(name)
            path = f"model_weights/{layer.name}/{name}"
            places.append((weight, path))
            tensors[path] = _spec(weight, values.get((index, number)))
        groups[f"model_weights/{layer.name}"] = {"weight_names": listed}
        if origin.members:
            known = [values.get((index, number)) for number in weights]
            targets += _layer_targets(origin, sources, layer.name, places, weights, known)
    if first.dialect is not Dialect.KERAS2 or parse_version(first.version) >= (2, 6):
        groups["model_weights/top_level_model_weights"] = {"weight_names": []}
    return Layout(groups, tensors), tuple(targets)


def _by_owner(weights: Sequence[Weight]) -> list[int]:
    """The order in which Keras lists the weights of a frozen layer: sub-layer by sub-layer.

    A trainable layer's file lists trainable weights first, then the others, over all its sub-layers together.
    """
    owners: dict[str, list[int]] = {}
    for number, weight in enumerate(weights):
        owners.setdefault(weight.key.rpartition("/")[0], []).append(number)
    return [number for numbers in owners.values() for number in numbers]
