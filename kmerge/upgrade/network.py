"""A whole network of any age in the words of current Keras."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kmerge.dialects.reading import Dialect, dissolve, has_graph, input_shape, read_model
from kmerge.dialects.vocabulary import policy_name, weight_kind
from kmerge.dialects.writing import parse_version, write_model
from kmerge.graph import Call, Graph, Layer, Ref, Structure, refs, sort_calls, substitute
from kmerge.shapes import infer_shapes
from kmerge.source import Source, State, Weight, natural, split_weights
from kmerge.store import Tensor
from kmerge.upgrade.layers import upgrade_layer
from kmerge.upgrade.operations import is_operation, operation_calls
from kmerge.upgrade.part import LAYERS, Context, Part, branches
from kmerge.upgrade.recurrent import RECURRENT
from kmerge.upgrade.settings import MODELS
from kmerge.upgrade.slots import listed_weights, slots

CURRENT = "3.15.1"
"""The Keras whose words are written."""


@dataclass(frozen=True)
class Network:
    """A graph in current words, and per layer of it the weights, in the order in which Keras lists them."""

    graph: Graph
    states: tuple[tuple[Weight, ...], ...]


def upgrade_network(source: Source, context: Context) -> Network:
    """The network of a source in current words.

    Args:
        source: opened, with a graph.
        context: of its file; gathers notes and obstacles.
    """
    assert source.graph is not None
    by_path = source.dialect is Dialect.KERAS3
    weights = []
    for layer, state in zip(source.graph.layers, source.states, strict=True):
        found = listed_weights(layer.class_name, layer.config, state.weights) if by_path else state.weights
        weights.append(tuple(weight.tensor for weight in found))
        if by_path:
            context.paths.update((id(weight.tensor), weight.key) for weight in found)
    return _Upgrade(source.graph, weights, context).run()


def context_of(source: Source, **settings: Any) -> Context:
    """What the rules have to know of a source's file."""
    theano = source.backend == "theano"
    if not source.backend and parse_version(source.version)[:1] in ((1,), ()):
        # Keras 1 records no backend, but TensorFlow's variables have names that end in ":0", and Theano's have not.
        keys = [weight.key for state in source.states for weight in state.weights]
        theano = bool(keys) and not any(key.endswith(":0") for key in keys)
    dialect = source.dialect or Dialect.KERAS3
    return Context(parse_version(source.version), dialect, theano and dialect is Dialect.KERAS2, **settings)


class _Upgrade:
    """One walk over a graph, call by call, which makes another one."""

    def __init__(self, graph: Graph, tensors: Sequence[tuple[Tensor, ...]], context: Context, path: str = "") -> None:
        self.graph, self.tensors, self.context, self.path = graph, tensors, context, path
        self.shapes = infer_shapes(graph)
        self.layers: list[Layer] = []
        self.states: list[tuple[Weight, ...]] = []
        self.calls: list[Call] = []
        self.made: dict[Ref, Ref] = {}
        self.chains: dict[int, list[int]] = {}
        self.keywords: dict[int, Mapping[str, Any]] = {}
        self.back: dict[int, tuple[int, ...]] = {}
        self.taken = {plain_name(layer.name) for layer in graph.layers}
        self.names = _plain_names(graph)

    def run(self) -> Network:
        for number, call in enumerate(self.graph.calls):
            layer = self.graph.layers[call.layer]
            self.context.layer = "/".join([*filter(None, [self.path]), *layer.origin, layer.name])
            tensors = refs(call.arguments)
            self.context.input_shape = self.shapes.get(Ref(tensors[0].call, tensors[0].output)) if tensors else None
            self._call(number, call, layer)
        inputs = substitute(self.graph.inputs, self._moved)
        outputs = substitute(self.graph.outputs, self._moved)
        graph = Graph(self.graph.name, tuple(self.layers), tuple(self.calls), _bare(inputs), _bare(outputs))
        graph = sort_calls(graph)
        kept = sorted({call.layer for call in graph.calls})
        place = {layer: number for number, layer in enumerate(kept)}
        calls = tuple(Call(place[call.layer], call.arguments) for call in graph.calls)
        graph = replace(graph, layers=tuple(graph.layers[layer] for layer in kept), calls=calls)
        return Network(_with_shapes(graph), tuple(self.states[layer] for layer in kept))

    def _moved(self, ref: Ref) -> Ref:
        found = self.made.get(Ref(ref.call, ref.output))
        if found is None:
            found = Ref(self.made[Ref(ref.call)].call, ref.output)
        return found

    def _call(self, number: int, call: Call, layer: Layer) -> None:
        if layer.is_input:
            self.made[Ref(number)] = self._add_call(self._input(call.layer, layer), None)
            return
        arguments = substitute(call.arguments, self._moved)
        if is_operation(layer):
            ref = self._operation(layer, arguments)
            self.made[Ref(number)] = ref
            return
        if layer.is_operation:
            added = self._add_layer(layer, ())
            self.made[Ref(number)] = self._add_call(added, arguments)
            return
        if call.layer not in self.chains:
            parts = upgrade_layer(_part(layer, self.tensors[call.layer]), self.context)
            self.chains[call.layer] = [self._add_part(part, layer, call.layer) for part in parts]
        args = new_arguments(layer.class_name, arguments)
        made: list[Any] = []
        for index in self.chains[call.layer]:
            given = args if not made else self._given(index, [args["args"][0], *made])
            given = {**given, "kwargs": {**given["kwargs"], **self.keywords.get(index, {})}}
            made.append(self._add_call(index, given))
        self.made[Ref(number)] = made[-1]

    def _given(self, index: int, made: Sequence[Any]) -> dict[str, Any]:
        """What a later layer of a chain is called with, of all tensors made so far."""
        tensors = [made[-step] for step in self.back.get(index, (1,))]
        together = len(tensors) > 1 and not self.layers[index].is_operation
        return {"args": [tensors] if together else tensors, "kwargs": {}}

    def _input(self, index: int, layer: Layer) -> int:
        shape = input_shape(layer)
        settings = {
            "batch_shape": list(shape) if shape is not None else None,
            "dtype": policy_name(layer.config.get("dtype")) or layer.config.get("input_dtype") or "float32",
            "sparse": bool(layer.config.get("sparse")),
            "name": self.names[index],
        }
        if layer.config.get("ragged"):
            settings["ragged"] = True
        return self._add_layer(Layer(self.names[index], "InputLayer", settings, _entry(LAYERS, None)), ())

    def _add_part(self, part: Part, layer: Layer, index: int) -> int:
        """Adds one layer of a chain; returns its number."""
        name = self.names[index]
        if part.suffix or part.module.startswith("keras.src.ops"):
            name = self._unique(f"{name}_{part.suffix or part.class_name.lower()}")
        part = self._wrapped(part)
        config = {**part.config, "name": name}
        if part.module == LAYERS and part.class_name != "InputLayer":
            config.setdefault("dtype", layer.config.get("dtype") or "float32")
            if isinstance(config["dtype"], Mapping):
                config["dtype"] = policy_name(config["dtype"]) or "float32"
        is_bare = part.module.startswith("keras.src.ops")
        if is_bare:
            config.pop("dtype", None) if part.class_name != "Cast" else None
        new = Layer(name, part.class_name, config, _entry(part.module, part.registered), is_operation=is_bare)
        added = self._add_layer(new, self._weights(part, new))
        if part.keywords:
            self.keywords[added] = part.keywords
        if part.back != (1,):
            self.back[added] = part.back
        return added

    def _add_layer(self, layer: Layer, weights: tuple[Weight, ...]) -> int:
        self.layers.append(layer)
        self.states.append(weights)
        return len(self.layers) - 1

    def _add_call(self, layer: int, arguments: Any) -> Ref:
        undone = self._undone(self.layers[layer], arguments)
        if undone is not None:
            return undone
        self.calls.append(Call(layer, arguments))
        return Ref(len(self.calls) - 1)

    def _undone(self, layer: Layer, arguments: Any) -> Ref | None:
        """What a Permute gives that takes another one back: what that one was given."""
        if layer.class_name != "Permute":
            return None
        before = self.calls[arguments["args"][0].call]
        other = self.layers[before.layer]
        first, second = other.config.get("dims"), layer.config.get("dims")
        if other.class_name != "Permute" or not isinstance(first, list) or not isinstance(second, list):
            return None
        if len(first) != len(second) or [first[axis - 1] for axis in second] != list(range(1, len(first) + 1)):
            return None
        found = before.arguments["args"][0]
        return found if isinstance(found, Ref) else None

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            number += 1
            candidate = f"{name}_{number}"
        self.taken.add(candidate)
        return candidate

    def _operation(self, layer: Layer, arguments: Any) -> Ref:
        """A TensorFlow operation of tf.keras as operations of current Keras."""

        def add(part: Part, args: list[Any], kwargs: Mapping[str, Any] | None = None) -> Ref:
            name = self._unique(plain_name(layer.name)) if plain_name(layer.name) in used else plain_name(layer.name)
            used.add(name)
            new = Layer(
                name,
                part.class_name,
                {**part.config, "name": name},
                _entry(part.module, part.registered),
                is_operation=part.module != LAYERS,
            )
            return self._add_call(self._add_layer(new, ()), {"args": args, "kwargs": dict(kwargs or {})})

        used = {item.name for item in self.layers}
        found = operation_calls(layer, arguments, add, self.context)
        return found if found is not None else refs(arguments)[0] if refs(arguments) else Ref(0)

    # --------------------------------------------------------------------------------------------- weights

    def _weights(self, part: Part, layer: Layer) -> tuple[Weight, ...]:
        """The weights of a layer where current Keras keeps them."""
        if not part.tensors:
            return ()
        found = slots(part.class_name, part.config) if part.registered is None else None
        if found is not None and len(found) != len(part.tensors):
            self.context.refuse(
                part.class_name, "unknown", f"has {len(part.tensors)} weights where current Keras has {len(found)}"
            )
            return ()
        weights = []
        for number, tensor in enumerate(part.tensors):
            key = found[number].key if found else self.context.paths.get(id(tensor), f"vars/{number}")
            name = found[number].name if found else key
            kind = weight_kind(part.class_name, layer.config, key, tensor.dtype)
            weights.append(Weight(key, name, kind, tensor))
        return tuple(weights)

    def _wrapped(self, part: Part) -> Part:
        """A wrapper with the layers inside it upgraded as well."""
        if part.class_name not in (
            "TimeDistributed",
            "Bidirectional",
            "RNN",
            "StackedRNNCells",
            "SpectralNormalization",
        ):
            return part
        config = dict(part.config)
        tensors = list(part.tensors)
        if part.class_name == "Bidirectional":
            half = len(tensors) // 2
            forward, first = self._inner(config.get("layer"), tensors[:half], True)
            backward, second = self._inner(config.get("backward_layer") or config.get("layer"), tensors[half:], True)
            config["layer"] = forward
            if config.get("backward_layer") is not None:
                config["backward_layer"] = backward
            elif forward["config"].get("go_backwards"):
                # Current Keras would have both run backwards: the second one is the other way round.
                turned = {**backward["config"], "go_backwards": False, "name": f"backward_{backward['config']['name']}"}
                config["backward_layer"] = {**backward, "config": turned}
            return replace(part, config=config, tensors=(*first, *second))
        if part.class_name == "StackedRNNCells":
            return self._stacked(part)
        key = "cell" if part.class_name == "RNN" else "layer"
        own = tensors[-1:] if part.class_name == "SpectralNormalization" else []
        config[key], inner = self._inner(config.get(key), tensors[: len(tensors) - len(own)])
        return replace(part, config=config, tensors=(*inner, *own))

    def _stacked(self, part: Part) -> Part:
        cells, tensors, used = [], [], 0
        for entry in part.config.get("cells") or []:
            count = 2 + bool(entry["config"].get("use_bias", True))
            cell, found = self._inner(entry, list(part.tensors[used : used + count]))
            used += count
            cells.append(cell)
            tensors += found
        return replace(part, config={**part.config, "cells": cells}, tensors=tuple(tensors))

    def _inner(self, entry: Any, tensors: list[Tensor], recurrent: bool = False) -> tuple[Any, list[Tensor]]:
        """A layer inside a wrapper: its entry, and its weights in Keras's order."""
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
            self.context.refuse("", "unknown", "wraps something that is no layer")
            return entry, tensors
        outer, path, shape = self.context.layer, self.path, self.context.input_shape
        config = entry.get("config")
        name = str(config.get("name") or entry.get("name") or "") if isinstance(config, Mapping) else ""
        self.context.layer = f"{outer}/{name}" if name else outer
        try:
            if entry["class_name"] in MODELS and has_graph(entry):
                return self._model(entry, tensors)
            settings = config if isinstance(config, Mapping) else {}
            part = Part(entry["class_name"], settings, tuple(tensors))
            is_custom = entry.get("registered_name") and ">" in str(entry["registered_name"])
            if is_custom and entry["class_name"] not in self.context.custom:
                self.context.refuse(entry["class_name"], "custom", "is none of Keras's own layers")
            self.context.inside, self.context.input_shape = recurrent, None
            chain = [self._wrapped(part) for part in upgrade_layer(part, self.context)]
            if branches(chain) or any(part.module.startswith("keras.src.ops") for part in chain):
                reason = "becomes operations, which cannot stand inside a wrapper"
                self.context.refuse(entry["class_name"], "unknown", reason)
            elif any(part.keywords for part in chain):
                self.context.refuse(entry["class_name"], "unknown", "takes arguments in each call, inside a wrapper")
            entries = [_entry_of(part, name or "layer") for part in chain]
            found = [tensor for part in chain for tensor in part.tensors]
            if len(chain) == 1:
                return entries[0], found
            return {
                "module": "keras",
                "class_name": "Sequential",
                "config": {"name": f"{plain_name(name)}_steps", "layers": entries},
                "registered_name": None,
            }, found
        finally:
            self.context.layer, self.path, self.context.inside = outer, path, False
            self.context.input_shape = shape

    def _model(self, entry: Mapping[str, Any], tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """A whole model inside a wrapper."""
        nested = read_model(entry, self.context.dialect)
        dissolved = dissolve(nested)
        stored = [
            Weight(f"{number}", f"{number}", weight_kind("", {}, "", "float32"), tensor)
            for number, tensor in enumerate(tensors)
        ]
        parts = split_weights(nested, stored, self.context.layer, "the file")
        inner = [tuple(weight.tensor for weight in parts.get(address, ())) for address in dissolved.addresses]
        network = _Upgrade(dissolved.graph, inner, self.context, self.context.layer).run()
        written = write_model(network.graph, Dialect.KERAS3, CURRENT)
        by_key = {}
        again = read_model(written, Dialect.KERAS3)
        counts: dict[str, int] = {}
        for index in again.order():
            layer = again.graph.layers[index]
            number = network.graph.layer_named(layer.name)
            for weight in network.states[number]:
                by_key[layer.name, weight.key] = weight.tensor
            counts[layer.name] = number
        ordered = []
        for index in again.order():
            layer = again.graph.layers[index]
            for slot in slots(layer.class_name, layer.config) or []:
                ordered.append((slot.trainable, by_key[layer.name, slot.key]))
        first = [tensor for trainable, tensor in ordered if trainable]
        return written, first + [tensor for trainable, tensor in ordered if not trainable]


def _part(layer: Layer, tensors: tuple[Tensor, ...]) -> Part:
    if layer.entry.get("registered_name") and ">" in str(layer.entry["registered_name"]):
        return Part(layer.class_name, layer.config, tensors, str(layer.entry.get("module")))
    return Part(layer.class_name, layer.config, tensors)


def _entry(module: str, registered: str | None) -> dict[str, Any]:
    return {"module": module, "registered_name": registered}


def _entry_of(part: Part, name: str) -> dict[str, Any]:
    own = f"{plain_name(name)}_{part.suffix}" if part.suffix else plain_name(name)
    return {
        "module": part.module,
        "class_name": part.class_name,
        "config": {**part.config, "name": own},
        "registered_name": part.registered,
    }


def _bare(structure: Structure) -> Structure:
    """Old files list a single input or output; current Keras gives the tensor itself."""
    return structure[0] if isinstance(structure, list) and len(structure) == 1 else structure


def plain_name(name: str) -> str:
    """A layer's name without what current Keras refuses."""
    plain = re.sub(r"[^A-Za-z0-9_.\-]+", "_", name)
    return plain if re.match(r"[A-Za-z0-9.]", plain) else f"layer{plain}"


def _plain_names(graph: Graph) -> list[str]:
    taken: set[str] = set()
    names = []
    for layer in graph.layers:
        name, number = plain_name(layer.name), 1
        while name in taken:
            number += 1
            name = f"{plain_name(layer.name)}_{number}"
        taken.add(name)
        names.append(name)
    return names


def _with_shapes(graph: Graph) -> Graph:
    """Every tensor with its shape, as far as it can be told; Keras itself computes it anew."""
    shapes = infer_shapes(graph)

    def fill(ref: Ref) -> Ref:
        return replace(ref, shape=shapes.get(Ref(ref.call, ref.output)) or ref.shape or ())

    calls = tuple(Call(call.layer, substitute(call.arguments, fill)) for call in graph.calls)
    return replace(graph, calls=calls)


# ---------------------------------------------------------------------------------------------- arguments of calls


def new_arguments(class_name: str, arguments: Any) -> dict[str, Any]:
    """Arguments of an old call as `args` and `kwargs`."""
    if isinstance(arguments, Mapping) and "args" in arguments:
        args, kwargs = list(arguments["args"]), dict(arguments["kwargs"])
        if class_name in RECURRENT and len(args) == 1 and isinstance(args[0], list):  # tf.keras 2.12 to 2.15
            args, kwargs = [args[0][0]], {**kwargs, "initial_state": args[0][1:]}
        return {"args": args, "kwargs": kwargs}
    if isinstance(arguments, Mapping):  # a dictionary of tensors
        return {"args": [{key: pair[0] for key, pair in arguments.items()}], "kwargs": {}}
    pairs = list(_pairs(arguments))
    tensors = [tensor for tensor, _ in pairs]
    keywords = _plain_keywords(pairs[0][1] if pairs else {})
    if class_name in RECURRENT and len(tensors) > 1:
        # Keras 2 gives the states of a recurrent layer as further inputs.
        return {"args": [tensors[0]], "kwargs": {**keywords, "initial_state": tensors[1:]}}
    if class_name in ("MultiHeadAttention",) and len(tensors) > 1:
        return {"args": tensors, "kwargs": keywords}
    return {"args": [tensors[0] if len(tensors) == 1 else tensors], "kwargs": keywords}


def _plain_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if value is not None or key not in ("mask", "training")}


def _pairs(arguments: Any) -> Iterator[tuple[Ref, Mapping[str, Any]]]:
    if isinstance(arguments, Ref):
        yield arguments, {}
    elif isinstance(arguments, list):
        if len(arguments) == 2 and isinstance(arguments[0], Ref) and isinstance(arguments[1], Mapping):
            yield arguments[0], arguments[1]
        else:
            for item in arguments:
                yield from _pairs(item)


def state_of(layer: Layer, weights: Sequence[Weight]) -> State:
    """What a `.keras` file holds for a layer."""
    return State(tuple(sorted(weights, key=lambda weight: natural(weight.key))), {"vars": {"name": layer.name}})
