"""Graphs to configurations of Keras 2, tf.keras and Keras 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kmerge.dialects.reading import Dialect
from kmerge.dialects.vocabulary import compute_dtype
from kmerge.graph import Graph, Layer, Ref, Structure, layer_order, substitute

Version = tuple[int, ...]

_NULLS = frozenset({"quantization_config", "input_axes", "output_axes"})
"""Keys that newer Keras 3 writes in several classes, and that older Keras 3 chokes on even where they are null."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "BatchNormalization": {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99},
    "InputLayer": {"optional": False, "ragged": False},
}
"""The same, for keys of one class at their defaults."""


def knows_dictionaries(dialect: Dialect, version: str) -> bool:
    """Whether this writer's networks can have a dictionary of outputs: Keras 3, and tf.keras from TensorFlow 2.2 on."""
    if dialect is not Dialect.KERAS2:
        return True
    number = parse_version(version)
    return number >= (2, 4) or (number >= (2, 3) and version.endswith("-tf"))


def parse_version(version: str) -> Version:
    """Leading numbers of a version: `2.3.0-tf` is (2, 3, 0); unknown is ()."""
    numbers = []
    for part in version.split("-")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def write_model(graph: Graph, dialect: Dialect, version: str) -> dict[str, Any]:
    """A functional model's configuration.

    Args:
        graph: the network; unique layer names.
        dialect: how to spell it.
        version: Keras version of the writer that is imitated.

    Returns:
        What stands in `config.json` or in the attribute `model_config`.
    """
    order = layer_order(graph)
    calls: dict[int, list[int]] = {index: [] for index in range(len(graph.layers))}
    for number, call in enumerate(graph.calls):
        calls[call.layer].append(number)
    node = {number: index for inside in calls.values() for index, number in enumerate(inside)}

    def history(ref: Ref) -> list[Any]:
        call = graph.calls[ref.call]
        return [graph.layers[call.layer].name, node[ref.call], ref.output]

    entries = []
    for index in order:
        layer = graph.layers[index]
        inbound = [
            _write_arguments(graph, graph.calls[number].arguments, dialect, history)
            for number in calls[index]
            if graph.calls[number].arguments is not None
        ]
        entries.append(_write_layer(layer, dialect, inbound))
    config: dict[str, Any] = {"name": graph.name}
    if dialect is not Dialect.KERAS2:
        config["trainable"] = True
    config["layers"] = entries
    bare = dialect is not Dialect.KERAS2 and not (3,) <= parse_version(version) < (3, 6)
    config["input_layers"] = _write_structure(graph.inputs, bare, history)
    config["output_layers"] = _write_structure(graph.outputs, bare, history)
    if dialect is Dialect.KERAS3:
        return {
            "module": "keras.src.models.functional",
            "class_name": "Functional",
            "config": config,
            "registered_name": "Functional",
            "build_config": {"input_shape": None},
        }
    old = dialect is Dialect.KERAS2 and parse_version(version) < (2, 4)
    return {"class_name": "Model" if old else "Functional", "config": config}


def _write_structure(structure: Structure, bare: bool, history: Any) -> Any:
    """Inputs or outputs. Keras 2 and early Keras 3 know no bare tensor there: a single one is a list of one."""
    if not bare and isinstance(structure, Ref):
        return [history(structure)]
    return substitute(structure, history)


def _write_layer(layer: Layer, dialect: Dialect, inbound: list[Any]) -> dict[str, Any]:
    config = dict(layer.config)
    if dialect is not Dialect.KERAS2:
        config = _for_any_version(layer.class_name, config)
    if "name" in config:
        config["name"] = layer.name
    entry: dict[str, Any] = {}
    if dialect is Dialect.KERAS3:
        entry = {"module": layer.entry.get("module"), "class_name": layer.class_name, "config": config}
        entry["registered_name"] = layer.entry.get("registered_name")
        entry |= {key: value for key, value in layer.entry.items() if key not in entry}
    else:
        entry = {"class_name": layer.class_name, "config": config}
    return {**entry, "name": layer.name, "inbound_nodes": inbound}


def _for_any_version(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what older Keras 3 chokes on and newer Keras 3 takes for granted."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            inner, name = value.get("config"), value.get("class_name")
            if isinstance(inner, Mapping) and isinstance(name, str):
                return {**value, "config": _for_any_version(name, inner)}
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    defaults = _DEFAULTS.get(class_name, {})
    return {
        key: plain(value)
        for key, value in config.items()
        if not (key in _NULLS and value is None) and not (key in defaults and value == defaults[key])
    }


def _write_arguments(graph: Graph, arguments: Any, dialect: Dialect, history: Any) -> Any:
    if dialect is Dialect.KERAS2:
        return _write_pairs(arguments, history)
    if not (isinstance(arguments, Mapping) and "args" in arguments):  # tf.keras's operations on constants
        return _write_pairs(arguments, history)
    if _all_shapes_known(arguments):
        return substitute(
            arguments,
            lambda ref: {
                "class_name": "__keras_tensor__",
                "config": {
                    "shape": list(ref.shape or ()),
                    "dtype": ref.dtype or compute_dtype(graph.layer_of(ref).config),
                    "keras_history": history(ref),
                },
            },
        )
    # Keras 3 reads old calls too; a new one needs the shapes of its tensors, which this network's file does not tell.
    tensors = arguments["args"][0] if arguments["args"] else []
    keywords = substitute(arguments["kwargs"], history)
    return [[*history(ref), keywords] for ref in (tensors if isinstance(tensors, list) else [tensors])]


def _all_shapes_known(arguments: Any) -> bool:
    if isinstance(arguments, Ref):
        return arguments.shape is not None
    if isinstance(arguments, Mapping):
        return all(_all_shapes_known(value) for value in arguments.values())
    if isinstance(arguments, list):
        return all(_all_shapes_known(item) for item in arguments)
    return True


def _write_pairs(arguments: Any, history: Any) -> Any:
    """Keras 2's arguments: `[tensor, kwargs]` becomes `[layer, node, tensor, kwargs]`."""
    if isinstance(arguments, Ref):
        return history(arguments)
    if isinstance(arguments, list):
        if len(arguments) == 2 and isinstance(arguments[0], Ref) and isinstance(arguments[1], Mapping):
            return [*history(arguments[0]), substitute(arguments[1], history)]
        return [_write_pairs(item, history) for item in arguments]
    if isinstance(arguments, dict):
        return {key: _write_pairs(item, history) for key, item in arguments.items()}
    return arguments
