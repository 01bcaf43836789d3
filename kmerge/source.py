"""Open anything that holds a Keras model, or the weights of one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kmerge.dialects.reading import (
    Address,
    Dialect,
    Dissolved,
    Nested,
    dialect_of,
    dissolve,
    has_graph,
    input_shape,
    make_input,
    read_model,
    weight_paths,
)
from kmerge.dialects.vocabulary import WeightKind, weight_kind, weight_name, weight_specs
from kmerge.errors import FormatError, GraphError, KmergeError, PlanError
from kmerge.graph import Graph, Layer, refs
from kmerge.store import Asset, Kind, Tensor, Tree, Weights, identify, open_archive, open_hdf5, open_shards, read_json
from kmerge.store.shards import ShardedWeights

SUFFIXES = (".weights.h5", ".weights.json", ".keras", ".hdf5", ".h5")


@dataclass(frozen=True)
class Weight:
    """One weight of a layer: where it lies under the layer, what it is called, how it is combined, its bytes."""

    key: str
    name: str
    kind: WeightKind
    tensor: Tensor
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a file stores for one layer.

    Attributes:
        weights: in the order in which Keras stores them.
        groups: HDF5 groups under the layer with their attributes (Keras 3's layout only).
        assets: files of the layer, such as a vocabulary, by path under the layer.
    """

    weights: tuple[Weight, ...] = ()
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    assets: Mapping[str, Asset] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One model or set of weights, opened.

    Attributes:
        label: how the user calls it.
        name: the file's own name, or the live model's.
        path: None for a live model.
        kind: what kind of file.
        size: bytes of the file.
        version: Keras version of the writer, "" where it is not recorded.
        backend: backend of the writer, "" where it is not recorded.
        dialect: how its configuration is spelled; None without one.
        model: the whole model's configuration as stored; None for weights only.
        graph: the flat network; None where the file holds none.
        states: one per layer of `graph`; a single one with everything where there is no graph.
        training: losses and metrics that the file records.
        warnings: what a reader should know.
    """

    label: str
    name: str
    path: Path | None
    kind: Kind
    size: int
    version: str = ""
    backend: str = ""
    dialect: Dialect | None = None
    model: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    graph: Graph | None = None
    states: tuple[State, ...] = ()
    training: Any = None
    warnings: tuple[str, ...] = ()
    bound: bool = False
    """Whether the graph is that of a base, given beside weights only."""
    files: tuple[Path, ...] = ()
    """All files that it is read from: the path itself, and shards."""
    root: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the file's root group (weights without a graph)."""
    nested: Nested | None = field(default=None, repr=False)
    optimizer: Callable[[], tuple[tuple[str, Tensor], ...]] = field(default=tuple, repr=False, compare=False)
    """Gives the state of its optimizer, names and values in the order in which it was saved; () where none is."""
    close: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def num_parameters(self) -> int:
        return sum(weight.tensor.size for state in self.states for weight in state.weights if is_parameter(weight))

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_parameter(weight: Weight) -> bool:
    """Whether a weight counts as parameters of the model, as `model.summary()` counts: not the state of seeds."""
    return "seed_generator" not in weight.key


def stem(path: str | os.PathLike[str]) -> str:
    """File name without what marks it as a model: `a.weights.h5` -> `a`.

    Raises:
        PlanError: if it is no path.
    """
    name = as_path(path).name
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


def as_path(value: Any) -> Path:
    """A path from what a caller gave.

    Raises:
        PlanError: if it is none.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise PlanError(f"A source is a {type(value).__name__}: expected a path or a Keras model.")
    return Path(value)


def open_source(path: str | os.PathLike[str], label: str | None = None, base: Source | None = None) -> Source:
    """Open a model file, or a file with weights, without a framework and without reading a weight.

    Args:
        path: a `.h5`, `.keras` (zip or folder), `.weights.h5` or `.weights.json`; the kind is told by content.
        label: how to call it; default the file's stem.
        base: a source with a graph, for files that hold weights only.

    Returns:
        The source; close it, or use it as a context manager.

    Raises:
        FormatError: the file is something else, damaged, or does not hold what its configuration says.
        UnsafeFileError: the file asks for something that no model needs.
        GraphError: the configuration describes no network.
        PlanError: what is given is no path.
    """
    path = as_path(path)
    label = stem(path) if label is None else label
    kind = identify(path)
    opened = ExitStack()
    try:
        if kind is Kind.H5:
            source = _open_h5(path, label, opened)
        elif kind in (Kind.KERAS, Kind.FOLDER):
            source = _open_archive(path, label, kind, opened)
        else:
            source = _open_weights(path, label, kind, opened)
            if base is not None:
                source = _with_graph(source, base)
    except KmergeError as error:
        opened.close()
        error.add_note(f"while opening '{path}'")
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        opened.close()
        raise GraphError(
            f"'{path.name}' holds a configuration that makes no sense ({type(error).__name__}: {error}): it was edited "
            "or is damaged. Save the model again."
        ) from error
    except BaseException:
        opened.close()
        raise
    return replace(source, files=(path, *source.files), close=opened.close)


def _file_size(path: Path) -> int:
    if path.is_dir():
        return sum(item.lstat().st_size for item in path.rglob("*") if item.is_file() and not item.is_symlink())
    return path.stat().st_size


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


# ------------------------------------------------------------------------------------------- whole models, HDF5


def _open_h5(path: Path, label: str, opened: ExitStack) -> Source:
    weights = opened.enter_context(open_hdf5(path))
    root = weights.attributes()
    model = read_json(_text(root.get("model_config")).encode(), f"model_config of '{path.name}'")
    model = {"config": {}, **_checked_model(model, f"'{path.name}' holds a model_config")}
    inside = weights.attributes("model_weights") if "model_weights" in weights.names() else {}
    version = _text(root.get("keras_version")) or _text(inside.get("keras_version"))
    training = root.get("training_config")
    source = Source(
        label=label,
        name=path.name,
        path=path,
        kind=Kind.H5,
        size=_file_size(path),
        version=version,
        backend=_text(root.get("backend")) or _text(inside.get("backend")),
        model=model,
        metadata={"kmerge": root["kmerge"]} if "kmerge" in root else {},
        training=read_json(training.encode(), "training_config") if isinstance(training, str) else None,
        optimizer=lambda: _optimizer_h5(weights),
    )
    if "model_weights" not in weights.names():
        raise FormatError(
            f"'{path.name}' holds a configuration but no weights (no group 'model_weights'): save the trained "
            "model again."
        )
    if not has_graph(model):
        warning = f"'{model['class_name']}' is a subclassed model: its configuration holds no graph."
        return replace(source, states=(_flat_h5(weights, "model_weights"),), warnings=(warning,))
    return _with_states(source, model, dialect_of(model), weights, "model_weights")


def _checked_model(model: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(model, Mapping) or not isinstance(model.get("class_name"), str):
        raise FormatError(f"{what} that is no model: expected class_name and config.")
    return model


def _with_states(
    source: Source, model: Mapping[str, Any], dialect: Dialect, weights: Weights, group: str = ""
) -> Source:
    nested = read_model(model, dialect)
    dissolved = dissolve(nested)
    if source.kind in (Kind.H5, Kind.H5_WEIGHTS):
        states, warnings = _states_h5(nested, dissolved, weights, group)
    else:
        states, warnings = _states_keras3(nested, dissolved, weights, {})
    graph = _with_input_shapes(dissolved.graph, states, dialect)
    return replace(source, dialect=dialect, graph=graph, states=states, nested=nested, warnings=warnings)


def _names(weights: Weights, group: str, name: str) -> list[str]:
    return weights.names_attribute(group, name)


def _weights_named(weights: Weights, group: str, layer: Layer | None) -> list[Weight]:
    names = _names(weights, group, "weight_names")
    if not names:
        return []
    tree = weights.tree(group)
    found = []
    for name in names:
        if name not in tree.tensors:
            raise FormatError(f"'{weights.path.name}' lists the weight '{name}' under '{group}' but does not hold it.")
        tensor = tree.tensors[name]
        class_name, config = (layer.class_name, layer.config) if layer else ("", {})
        found.append(
            Weight(
                name,
                weight_name(class_name, config, name),
                weight_kind(class_name, config, name, tensor.dtype),
                tensor,
                tree.attributes.get(name, {}),
            )
        )
    return found


def _optimizer_h5(weights: Weights) -> tuple[tuple[str, Tensor], ...]:
    if "optimizer_weights" not in weights.names():
        return ()
    tree = weights.tree("optimizer_weights")
    names = _names(weights, "optimizer_weights", "weight_names")
    if not all(name in tree.tensors for name in names):
        raise FormatError(f"'{weights.path.name}' lists variables of its optimizer that it does not hold.")
    return tuple((name, tree.tensors[name]) for name in names)


def _optimizer_keras3(weights: Weights) -> tuple[tuple[str, Tensor], ...]:
    if not weights.has("optimizer/vars"):
        return ()
    tensors = weights.tree("optimizer/vars").tensors
    return tuple((name, tensors[name]) for name in sorted(tensors, key=natural))


def _flat_h5(weights: Weights, group: str) -> State:
    """Everything under a group of an old HDF5 file, by layer and weight."""
    found: list[Weight] = []
    for layer in _names(weights, group, "layer_names"):
        place = f"{group}/{layer}" if group else layer
        found += [replace(weight, key=f"{layer}/{weight.key}") for weight in _weights_named(weights, place, None)]
    return State(tuple(found))


def _states_h5(
    nested: Nested, dissolved: Dissolved, weights: Weights, group: str
) -> tuple[tuple[State, ...], tuple[str, ...]]:
    """Weights of an old HDF5 file per layer of the flat graph.

    The groups are named after the layers of the top level. Where the names do not fit the configuration, layers with
    weights are matched in order, as Keras itself does.
    """
    states: dict[Address, State] = {}
    stored = _names(weights, group, "layer_names")
    prefix = f"{group}/" if group else ""
    order = nested.order()
    own = {nested.graph.layers[index].name: index for index in order}
    if all(name in own or not _names(weights, prefix + name, "weight_names") for name in stored):
        pairs = [(own[name], name) for name in stored if name in own]
    else:
        filled = [name for name in stored if _names(weights, prefix + name, "weight_names")]
        with_weights = [index for index in order if _may_have_weights(nested, index)]
        if len(filled) != len(with_weights):
            raise FormatError(
                f"'{weights.path.name}' stores weights for {len(filled)} layers, but the network has "
                f"{len(with_weights)} with weights, under other names: it is another network's file, or was edited."
            )
        pairs = list(zip(with_weights, filled, strict=True))
    for index, name in pairs:
        layer = nested.graph.layers[index]
        found = _weights_named(weights, prefix + name, layer)
        if index not in nested.models:
            states[id(nested), index] = State(tuple(found))
            continue
        for address, part in split_weights(nested.models[index], found, name, weights.path.name).items():
            states[address] = State(tuple(part))
    for address, layer in zip(dissolved.addresses, dissolved.graph.layers, strict=True):
        specs = weight_specs(layer.class_name, layer.config) or ()
        count = len(states.get(address, State()).weights)
        if count < len(specs):
            raise FormatError(
                f"'{weights.path.name}' holds {count or 'no'} weights for layer '{layer.name}' ({layer.class_name}): "
                f"expected {len(specs)}. Save the trained model again."
            )
    warnings: tuple[str, ...] = ()
    top = f"{prefix}top_level_model_weights"
    if "top_level_model_weights" in weights.names(group) and _names(weights, top, "weight_names"):
        warnings = ("weights of the model object itself, outside its layers, are not merged",)
    return tuple(states.get(address, State()) for address in dissolved.addresses), warnings


def _may_have_weights(nested: Nested, index: int) -> bool:
    if index in nested.models:
        inner = nested.models[index]
        return any(_may_have_weights(inner, item) for item in inner.order())
    layer = nested.graph.layers[index]
    specs = weight_specs(layer.class_name, layer.config)
    return specs is None or bool(specs)


def stored_layers(nested: Nested) -> Iterator[tuple[Address, Layer]]:
    """The layers of a model and of those inside it, with their addresses, in the order in which Keras lists weights."""
    for index in nested.order():
        if index in nested.models:
            yield from stored_layers(nested.models[index])
        else:
            yield (id(nested), index), nested.graph.layers[index]


def split_weights(model: Nested, found: Sequence[Weight], name: str, file: str) -> dict[Address, list[Weight]]:
    """The weights that an old file stores under one nested model, per layer inside it.

    The file lists trainable weights first, then the others. Names tell which layer is meant where each fits exactly
    one; else Keras's order and the known weights of each class do.
    """
    leaves = list(stored_layers(model))
    by_name = _split_by_name(leaves, found)
    if by_name is not None:
        return by_name
    specs = [(address, layer, weight_specs(layer.class_name, layer.config)) for address, layer in leaves]
    unknown = [layer for _, layer, known in specs if known is None]
    frozen = {address for address, layer in leaves if layer.config.get("trainable") is False}
    places = [
        (address, spec, number)
        for wanted in (True, False)
        for address, _, known in specs
        for number, spec in enumerate(known or ())
        if (spec.trainable and address not in frozen) is wanted
    ]
    if unknown or len(places) != len(found):
        who = f"layer '{unknown[0].name}' ({unknown[0].class_name})" if unknown else "its layers"
        raise FormatError(
            f"'{file}' stores the weights of the nested model '{name}' in one list, and kmerge cannot tell "
            "which belong to "
            f"{who}: load it with Keras and save it as .keras."
        )
    numbered: dict[Address, list[tuple[int, Weight]]] = {}
    for (address, spec, number), weight in zip(places, found, strict=True):
        numbered.setdefault(address, []).append((number, replace(weight, name=spec.name, kind=spec.kind)))
    return {
        address: [weight for _, weight in sorted(items, key=lambda item: item[0])]
        for address, items in numbered.items()
    }


def _split_by_name(leaves: list[tuple[Address, Layer]], found: Sequence[Weight]) -> dict[Address, list[Weight]] | None:
    names = [layer.name for _, layer in leaves]
    if len(set(names)) != len(names):
        return None
    parts: dict[Address, list[Weight]] = {}
    for weight in found:
        inside = set(weight.key.split("/")[:-1])
        fitting = [(address, layer) for address, layer in leaves if layer.name in inside]
        if len(fitting) != 1:
            return None
        address, layer = fitting[0]
        kind = weight_kind(layer.class_name, layer.config, weight.key, weight.tensor.dtype)
        parts.setdefault(address, []).append(replace(weight, kind=kind))
    for address, layer in leaves:
        specs = weight_specs(layer.class_name, layer.config)
        if specs is not None and len(specs) != len(parts.get(address, [])):
            return None
    return parts


# --------------------------------------------------------------------------------------- whole models, Keras 3


def _open_archive(path: Path, label: str, kind: Kind, opened: ExitStack) -> Source:
    archive = opened.enter_context(open_archive(path))
    model = _checked_model(archive.config, f"'{path.name}' holds a configuration")
    source = Source(
        label=label,
        name=path.name,
        path=path,
        kind=kind,
        size=_file_size(path),
        version=_text(archive.metadata.get("keras_version")),
        model=model,
        metadata=archive.metadata,
        training=model.get("compile_config"),
        optimizer=lambda: _optimizer_keras3(archive.weights),
    )
    if not has_graph(model):
        warning = f"'{model.get('class_name')}' is a subclassed model: its configuration holds no graph."
        state = _flat_keras3(archive.weights)
        assets = {name.removeprefix("assets/"): asset for name, asset in archive.assets.items()}
        return replace(
            source,
            dialect=Dialect.KERAS3,
            states=(replace(state, assets=assets),),
            root=archive.weights.attributes(),
            warnings=(warning,),
        )
    nested = read_model(model, Dialect.KERAS3)
    dissolved = dissolve(nested)
    states, warnings = _states_keras3(nested, dissolved, archive.weights, archive.assets)
    graph = _with_input_shapes(dissolved.graph, states, Dialect.KERAS3)
    return replace(source, dialect=Dialect.KERAS3, graph=graph, states=states, nested=nested, warnings=warnings)


def _flat_keras3(weights: Weights) -> State:
    tree = weights.tree()
    known = _Batches(tree)
    found = [
        known.weight(key, key, "", {}) for key in tree.tensors if key.split("/")[0] not in ("optimizer", "_optimizer")
    ]
    groups = {
        place: items for place, items in tree.groups.items() if place.split("/")[0] not in ("optimizer", "_optimizer")
    }
    return State(tuple(found), groups)


class _Batches:
    """Weights of one tree, with BatchNormalization found where no configuration tells of it.

    Inside custom layers and in files without a graph, a path or an automatic name (which Keras writes since 3.6) tells.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.counts = Counter(key.rpartition("/")[0] for key in tree.tensors)

    def weight(self, key: str, local: str, class_name: str, config: Mapping[str, Any]) -> Weight:
        """The weight at `key`, which lies at `local` under a layer of that class."""
        tensor = self.tree.tensors[key]
        name = weight_name(class_name, config, local)
        kind = weight_kind(class_name, config, local, tensor.dtype)
        if name == local and self._is_batch_normalization(key):
            count = self.counts[key.rpartition("/")[0]]
            guessed = {"scale": count >= 3, "center": count >= 4}
            place = "vars/" + key.rpartition("/")[2]
            name = weight_name("BatchNormalization", guessed, place)
            kind = weight_kind("BatchNormalization", guessed, place, tensor.dtype)
        return Weight(local, name, kind, tensor, self.tree.attributes.get(key, {}))

    def _is_batch_normalization(self, key: str) -> bool:
        group = key.rpartition("/")[0]
        path = group.removesuffix("/vars").rpartition("/")[2]
        name = _text(self.tree.groups.get(group, {}).get("name"))
        return path.startswith("batch_normalization") or name.startswith("batch_normalization")


def _states_keras3(
    nested: Nested, dissolved: Dissolved, weights: Weights, assets: Mapping[str, Asset]
) -> tuple[tuple[State, ...], tuple[str, ...]]:
    paths = weight_paths(nested)
    old = "layers" not in weights.names() and "_layer_checkpoint_dependencies" in weights.names()
    tree = weights.tree()
    known = _Batches(tree)
    states = []
    used: set[str] = set()
    inside: dict[str, list[str]] = {}
    wanted = {_stored(path, old): path for path in paths.values()}
    for key in [*tree.groups, *tree.tensors]:
        place = _owner(key, wanted)
        if place is not None:
            inside.setdefault(place, []).append(key)
    wanted_assets = {path: path for path in paths.values()}
    owned_assets: dict[str, dict[str, Asset]] = {}
    for key, asset in assets.items():
        place = _owner(key.removeprefix("assets/"), wanted_assets)
        if place is not None:
            owned_assets.setdefault(place, {})[key.removeprefix(f"assets/{place}/")] = asset
    for address, layer in zip(dissolved.addresses, dissolved.graph.layers, strict=True):
        path = paths.get(address)
        if path is None:
            states.append(State())
            continue
        place = _stored(path, old)
        groups, found = {}, []
        for key in inside.get(place, []):
            local = key.removeprefix(place).removeprefix("/")
            if key in tree.groups:
                groups[local] = tree.groups[key]
            else:
                used.add(key)
                found.append(known.weight(key, local, layer.class_name, layer.config))
        found.sort(key=lambda weight: natural(weight.key))
        specs = weight_specs(layer.class_name, layer.config)
        own = [weight for weight in found if weight.key.startswith("vars/")]
        if specs and not found:
            raise FormatError(
                f"'{weights.path.name}' holds no weights for layer '{layer.name}' ({layer.class_name}): "
                "expected them under "
                f"'{place}'. Save the trained model again."
            )
        if specs and own and len(own) < len(specs):
            raise FormatError(
                f"'{weights.path.name}' holds {len(own)} weights for layer '{layer.name}' ({layer.class_name}) under "
                f"'{place}': expected {len(specs)}."
            )
        states.append(State(tuple(found), groups, owned_assets.get(path, {})))
    left = [key for key in tree.tensors if key not in used and key.split("/")[0] not in ("optimizer", "_optimizer")]
    warnings = (f"state outside the layers is not merged: '{left[0]}'",) if left else ()
    return tuple(states), warnings


def _stored(path: str, old: bool) -> str:
    """Where Keras 2.12 and 2.13 keep what Keras 3 keeps under `path`."""
    return path.replace("layers/", "_layer_checkpoint_dependencies/") if old else path


def _owner(key: str, paths: Mapping[str, Any]) -> str | None:
    """The layer's path that a key lies under (paths of layers never lie under one another)."""
    parts = key.split("/")
    for length in range(2, len(parts) + 1):
        place = "/".join(parts[:length])
        if place in paths:
            return place
    return None


def natural(key: str) -> tuple[tuple[bool, int, str], ...]:
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key.split("/"))


# ------------------------------------------------------------------------------------------------- weights only


def _open_weights(path: Path, label: str, kind: Kind, opened: ExitStack) -> Source:
    weights = opened.enter_context(open_shards(path) if kind is Kind.SHARDS else open_hdf5(path))
    shards = weights.files if isinstance(weights, ShardedWeights) else ()
    size = _file_size(path) + sum(_file_size(shard) for shard in shards)
    root = weights.attributes()
    state = _flat_h5(weights, "") if kind is Kind.H5_WEIGHTS else _flat_keras3(weights)
    if not state.weights:
        raise FormatError(f"'{path.name}' holds no weights.")
    return Source(
        label=label,
        name=path.name,
        path=path,
        kind=kind,
        size=size,
        version=_text(root.get("keras_version")),
        backend=_text(root.get("backend")),
        states=(state,),
        root=root,
        warnings=("weights only: the file holds no graph",),
        files=shards,
        metadata={"weights": weights},
    )


def _with_graph(source: Source, base: Source) -> Source:
    """A file with weights only, read as the weights of another file's network."""
    if base.nested is None or base.model is None or base.dialect is None:
        raise FormatError(
            f"The base '{base.name}' holds no graph either: give a whole model (.h5 or .keras) of the same "
            "architecture."
        )
    old = source.kind is Kind.H5_WEIGHTS
    if old is not (base.kind is Kind.H5):
        raise FormatError(
            f"'{source.name}' is laid out like {'an .h5' if old else 'a .keras'} file and the base "
            f"'{base.name}' is not: "
            f"give a base in {'.h5' if old else '.keras'} format."
        )
    bound = _with_states(source, base.model, base.dialect, source.metadata["weights"])
    stored = [weight for state in source.states for weight in state.weights if weight.key.split("/")[0] != "vars"]
    more = len(stored) - sum(len(state.weights) for state in bound.states)
    if more > 0:
        raise FormatError(f"'{source.name}' does not fit '{base.name}': it holds {more} weights more than that has.")
    for mine, theirs, layer in zip(bound.states, base.states, bound.graph.layers if bound.graph else (), strict=True):
        if len(mine.weights) != len(theirs.weights):
            raise FormatError(
                f"'{source.name}' does not fit '{base.name}': layer '{layer.name}' has {len(mine.weights)} weights, "
                f"expected {len(theirs.weights)}."
            )
        for first, second in zip(mine.weights, theirs.weights, strict=True):
            if first.tensor.shape != second.tensor.shape:
                raise FormatError(
                    f"'{source.name}' does not fit '{base.name}': layer '{layer.name}' has {first.name} of shape "
                    f"{first.tensor.shape}, expected {second.tensor.shape}."
                )
    return replace(
        bound,
        bound=True,
        kind=base.kind,
        model=base.model,
        version=source.version or base.version,
        backend=source.backend or base.backend,
        warnings=(f"weights only: the graph is that of '{base.name}'",),
    )


# ------------------------------------------------------------------------------------------------------- inputs


def _with_input_shapes(graph: Graph, states: Sequence[State], dialect: Dialect) -> Graph:
    """Old Sequential models may record no input shape: the first layer's kernel tells it."""
    layers = list(graph.layers)
    for number, layer in enumerate(layers):
        if not layer.is_input or input_shape(layer) is not None:
            continue
        consumer = next(
            (
                call.layer
                for call in graph.calls
                if any(graph.calls[ref.call].layer == number for ref in refs(call.arguments))
            ),
            None,
        )
        shape = _shape_from_kernel(layers[consumer], states[consumer]) if consumer is not None else None
        if shape is None:
            raise GraphError(
                f"The input '{layer.name}' has no recorded shape, and the first layer does not tell it: "
                "open the model with the Keras that wrote it, call it once and save it again."
            )
        dtype = str(layer.config.get("dtype") or "float32")
        layers[number] = replace(make_input(layer.name, list(shape), dtype, dialect), origin=layer.origin)
    return replace(graph, layers=tuple(layers))


def _shape_from_kernel(layer: Layer, state: State) -> tuple[int | None, ...] | None:
    if not state.weights:
        return None
    kernel = state.weights[0].tensor.shape
    if layer.class_name == "Embedding":
        return (None, None)
    if layer.class_name == "Dense" and len(kernel) == 2:
        return (None, kernel[0])
    if layer.class_name in ("LSTM", "GRU", "SimpleRNN") and len(kernel) == 2:
        return (None, None, kernel[0])
    for rank in (1, 2, 3):
        if layer.class_name in (f"Conv{rank}D", f"SeparableConv{rank}D", f"DepthwiseConv{rank}D"):
            channels = kernel[rank] * int(layer.config.get("groups") or 1)
            free: tuple[int | None, ...] = (None,) * rank
            first = layer.config.get("data_format") == "channels_first"
            return (None, channels, *free) if first else (None, *free, channels)
    return None
