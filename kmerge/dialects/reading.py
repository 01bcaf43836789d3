"""Configurations of Keras 2, tf.keras and Keras 3 to graphs.

A configuration is read level by level into `Nested`, which still knows which layers are models, because that is how
files name their weights. `dissolve` then makes the flat `Graph`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from kmerge.dialects.vocabulary import stored_class, to_snake_case
from kmerge.errors import GraphError, UnsafeFileError
from kmerge.graph import Call, Graph, Layer, Ref, Structure, flatten, layer_order, refs, sort_calls, substitute

MAX_DEPTH = 40
"""Models nested in models."""
MAX_CALLS = 200_000
"""Calls of layers in one network, once nested models are dissolved."""

MODEL_CLASSES = frozenset({"Functional", "Model", "Sequential"})


class Dialect(StrEnum):
    """How a configuration is spelled."""

    KERAS2 = "keras2"
    """Keras 2 and tf.keras: `[name, node, tensor, kwargs]` lists, no modules."""
    KERAS3_H5 = "keras3-h5"
    """Keras 3 in a legacy HDF5 file: new call arguments, no modules."""
    KERAS3 = "keras3"
    """Keras 3 in a `.keras` file."""


@dataclass(frozen=True)
class Nested:
    """One level of a model: its graph, and which of its layers are models themselves."""

    graph: Graph
    models: Mapping[int, Nested] = field(default_factory=dict)
    identities: Mapping[int, object] = field(default_factory=dict)
    """Layers that the file marks as one object wherever they appear (Keras 3's `shared_object_id`)."""
    sequential: bool = False

    def order(self) -> list[int]:
        """Layers in the order of Keras's `model.layers`."""
        if self.sequential:
            return [index for index, layer in enumerate(self.graph.layers) if not layer.is_input]
        return [index for index in layer_order(self.graph) if not self.graph.layers[index].is_operation]


def dialect_of(config: Mapping[str, Any]) -> Dialect:
    """The dialect of a whole model's configuration."""
    if "module" in config:
        return Dialect.KERAS3
    for entry in _entries(config):
        if isinstance(entry, Mapping):
            nodes = entry.get("inbound_nodes")
            if isinstance(nodes, list) and any(isinstance(node, Mapping) and "args" in node for node in nodes):
                return Dialect.KERAS3_H5
            inner = entry.get("config")
            if isinstance(inner, Mapping) and ("batch_shape" in inner or _is_policy(inner.get("dtype"))):
                return Dialect.KERAS3_H5
    return Dialect.KERAS2


def _is_policy(dtype: Any) -> bool:
    return isinstance(dtype, Mapping) and dtype.get("class_name") == "DTypePolicy" and "module" in dtype


def _entries(model: Mapping[str, Any]) -> list[Any]:
    config = model.get("config")
    if isinstance(config, list):
        return config
    layers = config.get("layers") if isinstance(config, Mapping) else None
    return layers if isinstance(layers, list) else []


def has_graph(model: Mapping[str, Any]) -> bool:
    """Whether a configuration spells out its network: Sequential, functional, or a subclass of those."""
    config = model.get("config")
    if model.get("class_name") == "Sequential":
        return bool(_entries(model))
    return (
        isinstance(config, Mapping)
        and isinstance(config.get("layers"), list)
        and "input_layers" in config
        and "output_layers" in config
    )


def read_model(model: Mapping[str, Any], dialect: Dialect, depth: int = 0) -> Nested:
    """One model's configuration, with the models inside it.

    Args:
        model: `{"class_name", "config", ...}`.
        dialect: how it is spelled.

    Raises:
        GraphError: if it describes no network that can be followed.
        UnsafeFileError: if models are nested deeper than any real one.
    """
    if depth > MAX_DEPTH:
        raise UnsafeFileError(f"Models are nested more than {MAX_DEPTH} deep: no real model is. Nothing was read.")
    if not has_graph(model):
        raise GraphError(
            f"'{model.get('class_name')}' is not a Sequential or functional model: its configuration holds no graph."
        )
    return (
        _read_sequential(model, dialect, depth)
        if model["class_name"] == "Sequential"
        else _read_functional(model, dialect, depth)
    )


def _layer(entry: Any, where: str) -> tuple[Layer, object]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
        raise GraphError(f"The configuration of '{where}' lists a layer without a class name.")
    config = entry.get("config")
    if not isinstance(config, (Mapping, list)):
        raise GraphError(f"The configuration of '{where}' lists a {entry['class_name']} without a configuration.")
    identity = entry.get("shared_object_id")
    name = entry.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
    rest = {
        key: value
        for key, value in entry.items()
        if key not in ("class_name", "config", "name", "inbound_nodes", "shared_object_id")
    }
    return (
        Layer(
            name=str(name) if name else "",
            class_name=entry["class_name"],
            config=config if isinstance(config, Mapping) else {"layers": config},
            entry=rest,
            is_operation=str(entry.get("module") or "").startswith(("keras.src.ops", "keras.ops")),
        ),
        identity if isinstance(identity, (int, str)) else None,
    )


def _keeps_graph(entry: Mapping[str, Any]) -> bool:
    """Whether a layer is a model that can be dissolved: one of Keras's own classes with its network spelled out."""
    return entry.get("class_name") in MODEL_CLASSES and has_graph(entry)


def _read_sequential(model: Mapping[str, Any], dialect: Dialect, depth: int) -> Nested:
    config = model["config"]
    name = str(model.get("name") or (config.get("name") if isinstance(config, Mapping) else "") or "sequential")
    layers: list[Layer] = []
    models: dict[int, Nested] = {}
    identities: dict[int, object] = {}
    if _joins_branches(next(iter(_entries(model)), None)):
        return _read_branches(model, name, dialect, depth)
    for number, entry in enumerate(_entries(model)):
        layer, identity = _layer(entry, name)
        if not layer.name:
            layer = replace(layer, name=f"{to_snake_case(layer.class_name)}_{number}")
        if number == 0 and not layer.is_input:
            layers.append(_missing_input(model, entry, name, dialect))
        if _keeps_graph(entry):
            models[len(layers)] = read_model(entry, dialect, depth + 1)
        if identity is not None:
            identities[len(layers)] = identity
        layers.append(layer)
    calls = [Call(0)]
    for number in range(1, len(layers)):
        shape = layers[number].entry.get("build_config")
        shape = shape.get("input_shape") if isinstance(shape, Mapping) else None
        tensor = Ref(number - 1, 0, _shape(shape))
        calls.append(Call(number, _positional(dialect, tensor)))
    graph = Graph(name, tuple(layers), tuple(calls), Ref(0), Ref(len(layers) - 1))
    return Nested(graph, models, identities, sequential=True)


def _joins_branches(entry: Any) -> bool:
    """Whether a Sequential's first layer is Keras 1's Merge with the models inside it that it joins."""
    config = entry.get("config") if isinstance(entry, Mapping) else None
    return (
        isinstance(config, Mapping)
        and entry.get("class_name") == "Merge"
        and isinstance(config.get("layers"), list)
        and bool(config["layers"])
    )


def _read_branches(model: Mapping[str, Any], name: str, dialect: Dialect, depth: int) -> Nested:
    """Keras 1's Sequential that begins with a Merge of models: one network with an input for each of them.

    Files name the weights of the layers inside as if they stood at the top, so here they do.
    """
    layers: list[Layer] = []
    models: dict[int, Nested] = {}
    calls: list[Call] = []
    inputs: list[Ref] = []

    def follow(part: Mapping[str, Any], level: int) -> Ref:
        if level > MAX_DEPTH:
            raise UnsafeFileError(f"Models are nested more than {MAX_DEPTH} deep: no real model is. Nothing was read.")
        entries = _entries(part)
        if part.get("class_name") != "Sequential" or not entries:
            raise GraphError(f"'{name}' merges something that is no Sequential model: it cannot be followed.")
        end: Ref | None = None
        for number, entry in enumerate(entries):
            if number == 0 and _joins_branches(entry):
                branches = [follow(branch, level + 1) for branch in entry["config"]["layers"]]
                layer, _ = _layer(entry, name)
                settings = {key: value for key, value in layer.config.items() if key != "layers"}
                layers.append(replace(layer, config=settings, name=layer.name or f"merge_{len(layers)}"))
                calls.append(Call(len(layers) - 1, [[ref, {}] for ref in branches]))
                end = Ref(len(calls) - 1)
                continue
            layer, _ = _layer(entry, name)
            layer = replace(layer, name=layer.name or f"{to_snake_case(layer.class_name)}_{len(layers)}")
            if end is None and not layer.is_input:
                layers.append(_missing_input(part, entry, layer.name, dialect))
                calls.append(Call(len(layers) - 1))
                end = Ref(len(calls) - 1)
                inputs.append(end)
            if _keeps_graph(entry):
                models[len(layers)] = read_model(entry, dialect, depth + 1)
            layers.append(layer)
            calls.append(Call(len(layers) - 1, None if end is None else _positional(dialect, end)))
            if end is None:
                inputs.append(Ref(len(calls) - 1))
            end = Ref(len(calls) - 1)
        assert end is not None
        return end

    output = follow(model, depth)
    return Nested(Graph(name, tuple(layers), tuple(calls), inputs, output), models, sequential=True)


def _positional(dialect: Dialect, tensor: Ref) -> Any:
    return [[tensor, {}]] if dialect is Dialect.KERAS2 else {"args": [tensor], "kwargs": {}}


def _shape(value: Any) -> tuple[int | None, ...] | None:
    if isinstance(value, (list, tuple)) and all(item is None or isinstance(item, int) for item in value):
        return tuple(value)
    return None


def input_shape(layer: Layer) -> tuple[int | None, ...] | None:
    """Shape of an input layer, batch first; None where the file does not tell."""
    return _shape(layer.config.get("batch_shape", layer.config.get("batch_input_shape")))


def _missing_input(model: Mapping[str, Any], entry: Mapping[str, Any], name: str, dialect: Dialect) -> Layer:
    """The input layer that Keras 2 leaves out of a Sequential model's configuration."""
    config = model["config"]
    shape: Any = None
    dtype: Any = "float32"
    inner: Any = entry
    while isinstance(inner, Mapping) and isinstance(inner.get("config"), (Mapping, list)):
        settings = inner["config"]
        if isinstance(settings, Mapping):
            shape = settings.get("batch_input_shape") or settings.get("batch_shape")
            if isinstance(settings.get("dtype"), str):
                dtype = settings["dtype"]
        if shape or inner.get("class_name") not in MODEL_CLASSES:
            break
        inner = next(iter(_entries(inner)), None)
    if not shape and isinstance(config, Mapping):
        build = model.get("build_config")
        shape = config.get("build_input_shape") or (build.get("input_shape") if isinstance(build, Mapping) else None)
    return make_input(f"{name}_input", shape, dtype, dialect)


def make_input(name: str, shape: Any, dtype: str, dialect: Dialect) -> Layer:
    """An input layer in the words of a dialect; `shape` None where it is not known (yet)."""
    settings: dict[str, Any] = {"dtype": dtype, "sparse": False, "name": name}
    if dialect is Dialect.KERAS2:
        return Layer(name, "InputLayer", {"batch_input_shape": shape, **settings})
    entry = {"module": "keras.layers", "registered_name": None} if dialect is Dialect.KERAS3 else {}
    return Layer(name, "InputLayer", {"batch_shape": shape, **settings}, entry)


def _read_functional(model: Mapping[str, Any], dialect: Dialect, depth: int) -> Nested:
    config = model["config"]
    name = str(config.get("name") or model.get("name") or "model")
    layers: list[Layer] = []
    models: dict[int, Nested] = {}
    identities: dict[int, object] = {}
    numbers: dict[str, int] = {}
    nodes: list[list[Any]] = []
    for number, entry in enumerate(config["layers"]):
        layer, identity = _layer(entry, name)
        if not layer.name:
            raise GraphError(f"The configuration of '{name}' lists a {layer.class_name} without a name.")
        if layer.name in numbers:
            raise GraphError(
                f"The configuration of '{name}' has two layers named '{layer.name}': names must be unique."
            )
        if _keeps_graph(entry):
            models[number] = read_model(entry, dialect, depth + 1)
        if identity is not None:
            identities[number] = identity
        numbers[layer.name] = number
        layers.append(layer)
        inbound = entry.get("inbound_nodes") or []
        if not isinstance(inbound, list):
            raise GraphError(f"Layer '{layer.name}' of '{name}' has calls that are not a list.")
        nodes.append(inbound if inbound else [None])
    arguments = [[_arguments(node, numbers, dialect) for node in inbound] for inbound in nodes]
    offsets = _node_offsets(layers, arguments, config)
    first = [0]
    for inbound in nodes:
        first.append(first[-1] + len(inbound))

    def resolve(tensor: _Name) -> Ref:
        layer = numbers.get(tensor.layer)
        if layer is None:
            raise GraphError(f"'{name}' refers to a layer '{tensor.layer}' that it does not have.")
        node = tensor.node - offsets[layer]
        if not 0 <= node < len(nodes[layer]):
            raise GraphError(f"'{name}' refers to call {tensor.node} of layer '{tensor.layer}', which is not there.")
        return Ref(first[layer] + node, tensor.output, tensor.shape, tensor.dtype)

    calls = tuple(
        Call(number, _map_names(argument, resolve)) for number, inbound in enumerate(arguments) for argument in inbound
    )
    inputs = _map_names(_tensors(config["input_layers"], numbers), resolve)
    outputs = _map_names(_tensors(config["output_layers"], numbers), resolve)
    for ref in refs(inputs):
        if not layers[calls[ref.call].layer].is_input:
            raise GraphError(
                f"'{name}' names '{layers[calls[ref.call].layer].name}' as input, which is no input layer."
            )
    if not refs(outputs):
        raise GraphError(f"'{name}' has no outputs.")
    graph = sort_calls(Graph(name, tuple(layers), calls, inputs, outputs))
    for call in graph.calls:
        layer = layers[call.layer]
        if not layer.is_input and not refs(call.arguments):
            raise GraphError(f"Layer '{layer.name}' of '{name}' is called on no tensor: the graph cannot be followed.")
    return Nested(graph, models, identities)


@dataclass(frozen=True)
class _Name:
    """A tensor as a configuration names it."""

    layer: str
    node: int
    output: int
    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None


def _map_names(structure: Any, resolve: Any) -> Any:
    if isinstance(structure, _Name):
        return resolve(structure)
    if isinstance(structure, dict):
        return {key: _map_names(value, resolve) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_map_names(item, resolve) for item in structure]
    return structure


def _is_name(value: Any, numbers: Mapping[str, int], lengths: tuple[int, ...] = (3, 4)) -> bool:
    return (
        isinstance(value, list)
        and len(value) in lengths
        and isinstance(value[0], str)
        and value[0] in numbers
        and isinstance(value[1], int)
        and isinstance(value[2], int)
        and (len(value) == 3 or isinstance(value[3], Mapping))
    )


def _tensors(structure: Any, numbers: Mapping[str, int]) -> Any:
    """`input_layers` and `output_layers`: `[name, node, tensor]` at the leaves."""
    if isinstance(structure, list) and len(structure) == 3 and isinstance(structure[0], str):
        if not (isinstance(structure[1], int) and isinstance(structure[2], int)):
            raise GraphError(f"An input or output is given as {structure!r}: expected [layer, call, tensor].")
        return _Name(structure[0], structure[1], structure[2])
    if isinstance(structure, Mapping):
        return {key: _tensors(value, numbers) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_tensors(item, numbers) for item in structure]
    raise GraphError(f"An input or output is given as {structure!r}: expected [layer, call, tensor].")


def _arguments(node: Any, numbers: Mapping[str, int], dialect: Dialect) -> Any:
    """The arguments of one call, with `_Name` in place of tensors."""
    if node is None:
        return None
    if isinstance(node, Mapping) and "args" in node:
        args, kwargs = node["args"], node.get("kwargs") or {}
        if not isinstance(args, list) or not isinstance(kwargs, Mapping):
            raise GraphError("A call has arguments that are no list, or keywords that are no object.")
        return {"args": _revive(args), "kwargs": _revive(kwargs)}
    arguments = _pairs(node, numbers)
    if dialect is not Dialect.KERAS2:
        if isinstance(arguments, list) and len(arguments) == 2 and isinstance(arguments[0], _Name):
            arguments = [arguments]  # the operations of tf.keras stand in no list of their own
        if _is_constant(arguments) or (isinstance(arguments, list) and arguments and _is_constant(arguments[0])):
            return arguments
        tensors = [pair[0] for pair in arguments] if isinstance(arguments, list) else []
        return {"args": [tensors[0] if len(tensors) == 1 else tensors], "kwargs": arguments[-1][1] if tensors else {}}
    return arguments


def _revive(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            config = value.get("config")
            history = config.get("keras_history") if isinstance(config, Mapping) else None
            if not (_is_history(history) and history and isinstance(config, Mapping)):
                raise GraphError("A call's argument is a tensor without a history: the graph cannot be followed.")
            dtype = config.get("dtype")
            layer, node, output = history
            return _Name(layer, node, output, _shape(config.get("shape")), dtype if isinstance(dtype, str) else None)
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value


def _is_history(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and isinstance(value[2], int)
    )


def _pairs(node: Any, numbers: Mapping[str, int]) -> Any:
    """Keras 2's `[name, node, tensor, kwargs]` to `[tensor, kwargs]`, wherever they stand in the node."""
    if _is_name(node, numbers):
        return [_Name(node[0], node[1], node[2]), _keywords(node[3] if len(node) == 4 else {}, numbers)]
    if _is_constant(node):
        return [*node[:3], _keywords(node[3], numbers)]
    if isinstance(node, list):
        return [_pairs(item, numbers) for item in node]
    if isinstance(node, Mapping):
        return {key: _pairs(item, numbers) for key, item in node.items()}
    return node


def _is_constant(node: Any) -> bool:
    """tf.keras's `["_CONSTANT_VALUE", -1, value, kwargs]`: a call whose first argument is a number."""
    return isinstance(node, list) and len(node) == 4 and node[0] == "_CONSTANT_VALUE" and isinstance(node[3], Mapping)


def _keywords(value: Any, numbers: Mapping[str, int]) -> Any:
    if _is_name(value, numbers, (3,)):
        return _Name(value[0], value[1], value[2])
    if isinstance(value, list):
        return [_keywords(item, numbers) for item in value]
    if isinstance(value, Mapping):
        return {key: _keywords(item, numbers) for key, item in value.items()}
    return value


def _names(structure: Any) -> Iterator[_Name]:
    if isinstance(structure, _Name):
        yield structure
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _names(value)
    elif isinstance(structure, list):
        for item in structure:
            yield from _names(item)


def _node_offsets(layers: list[Layer], arguments: list[list[Any]], config: Mapping[str, Any]) -> list[int]:
    """Per layer, the number of its first call.

    Models start with a call of their own (how they were built), so that the first call in the configuration is number
    1; whether they do depends on class and version. Every call of a network is referred to: the highest number tells.
    """
    highest: dict[str, int] = {}
    tensors = [_tensors(config["input_layers"], {}), _tensors(config["output_layers"], {}), arguments]
    for tensor in _names(tensors):
        highest[tensor.layer] = max(highest.get(tensor.layer, 0), tensor.node)
    return [
        1 if layer.name in highest and highest[layer.name] >= len(arguments[number]) else 0
        for number, layer in enumerate(layers)
    ]


# --------------------------------------------------------------------------------------------------- dissolving

Address = tuple[int, int]
"""A layer of one level: identity of its `Nested`, index in that level's graph."""


@dataclass(frozen=True)
class Dissolved:
    """A flat graph, and for each of its layers where it stood: one address, the first that Keras visits."""

    graph: Graph
    addresses: tuple[Address, ...]


def dissolve(root: Nested) -> Dissolved:
    """The flat graph of a model: models inside it are replaced by their layers.

    A layer that stands in several places (a shared sub-model, one object inside and outside a nested model) becomes one
    layer with several calls. `training=False` given to a model is handed to the layers inside it, as Keras does.
    """
    layers: list[Layer] = []
    addresses: list[Address] = []
    calls: list[Call] = []
    known: dict[object, int] = {}
    taken: set[str] = set()
    visits = 0

    def unique(name: str, origin: tuple[str, ...]) -> str:
        candidate, number = name, 0
        if candidate in taken and origin:
            candidate = f"{origin[-1]}_{name}"
        base = candidate
        while candidate in taken:
            number += 1
            candidate = f"{base}_{number}"
        return candidate

    for layer in root.graph.layers:
        taken.add(layer.name)

    def number_of(level: Nested, index: int, origin: tuple[str, ...]) -> int:
        identity = level.identities.get(index)
        key: object = ("shared", identity) if identity is not None else ("at", id(level), index)
        if key not in known:
            layer = level.graph.layers[index]
            name = layer.name if not origin else unique(layer.name, origin)
            taken.add(name)
            known[key] = len(layers)
            layers.append(replace(layer, name=name, origin=origin))
            addresses.append((id(level), index))
        return known[key]

    def run(level: Nested, given: dict[int, Ref], training: Any, origin: tuple[str, ...]) -> Structure:
        """Adds the calls of one level; returns its outputs."""
        nonlocal visits
        visits += 1
        if visits > MAX_CALLS:
            raise UnsafeFileError(
                f"The network calls models inside models more than {MAX_CALLS} times: no real one does."
            )
        made: dict[tuple[int, int], Ref] = {}
        bound = {ref.call for ref in refs(level.graph.inputs)} if origin else set()

        def move(ref: Ref) -> Ref:
            target = given[ref.call] if ref.call in bound else made.get((ref.call, ref.output))
            if target is None:
                target = Ref(made[ref.call, -1].call, ref.output)
            return Ref(target.call, target.output, ref.shape or target.shape, ref.dtype or target.dtype)

        for number, call in enumerate(level.graph.calls):
            if number in bound:
                continue
            arguments = substitute(call.arguments, move)
            if call.layer in level.models:
                inner = level.models[call.layer]
                outer = level.graph.layers[call.layer]
                flag = _training(arguments)
                outputs = run(
                    inner,
                    _bind(inner.graph, arguments, outer.name),
                    flag if flag is not None else training,
                    (*origin, outer.name),
                )
                for output, ref in enumerate(flatten(outputs)):
                    made[number, output] = ref
                continue
            if len(calls) >= MAX_CALLS:
                raise UnsafeFileError(f"The network has more than {MAX_CALLS} calls of layers: no real model has.")
            index = number_of(level, call.layer, origin)
            if training is not None and arguments is not None and not layers[index].is_operation:
                arguments = _with_training(arguments, training)
            made[number, -1] = Ref(len(calls))
            calls.append(Call(index, arguments))
        return substitute(level.graph.outputs, move)

    outputs = run(root, {}, None, ())
    inputs = substitute(root.graph.inputs, lambda ref: Ref(_call_of(calls, known, root, ref), 0, ref.shape, ref.dtype))
    graph = sort_calls(Graph(root.graph.name, tuple(layers), tuple(calls), inputs, outputs))
    called = {call.layer for call in graph.calls}
    kept = [index for index in range(len(layers)) if index in called]
    place = {index: number for number, index in enumerate(kept)}
    calls = [replace(call, layer=place[call.layer]) for call in graph.calls]
    graph = replace(graph, layers=tuple(layers[index] for index in kept), calls=tuple(calls))
    given = {ref.call for ref in refs(graph.inputs)}
    for number, call in enumerate(graph.calls):
        if graph.layers[call.layer].is_input and number not in given:
            name = graph.layers[call.layer].name
            raise GraphError(f"'{graph.name}' depends on the input '{name}', which is not among its inputs.")
    return Dissolved(graph, tuple(addresses[index] for index in kept))


def _call_of(calls: list[Call], known: Mapping[object, int], root: Nested, ref: Ref) -> int:
    index = root.graph.calls[ref.call].layer
    identity = root.identities.get(index)
    layer = known[("shared", identity) if identity is not None else ("at", id(root), index)]
    return next(number for number, call in enumerate(calls) if call.layer == layer)


def _bind(inner: Graph, arguments: Any, name: str) -> dict[int, Ref]:
    """Which outer tensor each input of a nested model is given, by the call number of its input layer."""
    given: Any = arguments["args"][0] if isinstance(arguments, dict) and "args" in arguments else None
    if given is None and isinstance(arguments, dict) and "args" not in arguments:
        given = {key: pair[0] for key, pair in arguments.items()}
    if given is None:
        given = [arguments[0]] if isinstance(arguments[0], Ref) else [pair[0] for pair in arguments]
    if isinstance(given, dict) and isinstance(inner.inputs, dict):
        pairs = [(inner.inputs[key], given.get(key)) for key in sorted(inner.inputs)]
    else:
        pairs = list(zip(flatten(inner.inputs), flatten(given), strict=False))
    tensors = {ref.call: tensor for ref, tensor in pairs if isinstance(tensor, Ref)}
    if len(tensors) != len(refs(inner.inputs)) or len(flatten(given)) != len(tensors):
        raise GraphError(
            f"The nested model '{name}' has {len(refs(inner.inputs))} inputs and is called with {len(flatten(given))}."
        )
    return tensors


def _keyword_places(arguments: Any) -> Iterator[dict[str, Any]]:
    """The keyword dictionaries of a call, in either dialect."""
    if isinstance(arguments, dict) and "args" in arguments:
        yield arguments["kwargs"]
    elif isinstance(arguments, list):
        if len(arguments) == 2 and isinstance(arguments[0], Ref):
            yield arguments[1]
        else:
            for item in arguments:
                yield from _keyword_places(item)
    elif isinstance(arguments, dict):
        for item in arguments.values():
            yield from _keyword_places(item)


def _training(arguments: Any) -> Any:
    return next((place["training"] for place in _keyword_places(arguments) if place.get("training") is not None), None)


def _with_training(arguments: Any, training: Any) -> Any:
    if _training(arguments) is not None:
        return arguments
    arguments = substitute(arguments, lambda ref: ref)
    for place in _keyword_places(arguments):
        place["training"] = training
    return arguments


# --------------------------------------------------------------------------------------------------- weight paths


def weight_paths(root: Nested) -> dict[Address, str]:
    """Where Keras 3 keeps each layer's weights: `layers/dense_1`, `layers/sequential/layers/dense`, ...

    Containers number classes in the order of `model.layers`; an object met twice is stored where it is met first
    (`keras/src/saving/saving_lib.py`). Models that are dissolved have no entry of their own.
    """
    paths: dict[Address, str] = {}
    seen: set[object] = set()

    def walk(level: Nested, prefix: str) -> None:
        counts: dict[str, int] = {}
        for index in level.order():
            layer = level.graph.layers[index]
            snake = stored_class(layer.class_name)
            number = counts.get(snake, 0)
            counts[snake] = number + 1
            path = f"{prefix}layers/{snake}_{number}" if number else f"{prefix}layers/{snake}"
            identity = level.identities.get(index)
            key: object = ("shared", identity) if identity is not None else ("at", id(level), index)
            if key in seen:
                continue
            seen.add(key)
            if index in level.models:
                walk(level.models[index], f"{path}/")
            else:
                paths[id(level), index] = path

    walk(root, "")
    return paths
