"""What a network is: layers, calls of layers, and the tensors between them.

A `Graph` is flat: models nested in a model are dissolved when a configuration is read (`kmerge.dialects`). It knows
nothing of files or frameworks. The arguments of a call are kept in the JSON form of the configuration that they came
from, with every tensor replaced by a `Ref`, so that whatever a dialect can express passes through unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from kmerge.errors import GraphError

Structure = Any
"""A `Ref`, or lists and dictionaries of structures."""


@dataclass(frozen=True)
class Ref:
    """One tensor: output number `output` of call number `call` of a graph.

    `shape` (batch first, None where free) and `dtype` are what the configuration records, None where it records
    nothing. They take no part in equality.
    """

    call: int
    output: int = 0
    shape: tuple[int | None, ...] | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)

    def moved(self, call: int, output: int | None = None) -> Ref:
        """The same tensor under another call number."""
        return Ref(call, self.output if output is None else output, self.shape, self.dtype)


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes:
        name: unique within its graph.
        class_name: as the configuration spells it.
        config: the layer's own configuration, in the words of its dialect.
        entry: what stands beside `class_name` and `config` in the file (`module`, `registered_name`, `build_config`).
        origin: names of the nested models that held the layer, outermost first.
        is_operation: a bare operation such as `x + y`, which Keras does not count among `model.layers`.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    entry: Mapping[str, Any] = field(default_factory=dict)
    origin: tuple[str, ...] = ()
    is_operation: bool = False

    @property
    def is_input(self) -> bool:
        return self.class_name == "InputLayer"


@dataclass(frozen=True)
class Call:
    """One call of a layer. `arguments` is JSON in the form of the dialect, with `Ref` in place of tensors."""

    layer: int
    arguments: Any = None


@dataclass(frozen=True)
class Graph:
    """A network: `calls` are in topological order, `inputs` and `outputs` are structures of `Ref`."""

    name: str
    layers: tuple[Layer, ...]
    calls: tuple[Call, ...]
    inputs: Structure
    outputs: Structure

    def calls_of(self, layer: int) -> tuple[int, ...]:
        return self._calls_by_layer.get(layer, ())

    @cached_property
    def _calls_by_layer(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for index, call in enumerate(self.calls):
            found.setdefault(call.layer, []).append(index)
        return {layer: tuple(calls) for layer, calls in found.items()}

    def layer_of(self, ref: Ref) -> Layer:
        return self.layers[self.calls[ref.call].layer]

    def layer_named(self, name: str) -> int:
        """Number of the layer of that name; KeyError if there is none."""
        return self._layers_by_name[name]

    @cached_property
    def _layers_by_name(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault(layer.name, index)
        return found


def flatten(structure: Structure) -> list[Any]:
    """Leaves of a structure in Keras's order: dictionaries by sorted key (`keras.tree.flatten`)."""
    return list(_leaves(structure))


def _leaves(structure: Structure) -> Iterator[Any]:
    if isinstance(structure, dict):
        for key in sorted(structure):
            yield from _leaves(structure[key])
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from _leaves(item)
    else:
        yield structure


def refs(structure: Structure) -> list[Ref]:
    """The tensors of a structure, in the order in which Keras sees them."""
    return [leaf for leaf in _leaves(structure) if isinstance(leaf, Ref)]


def substitute(structure: Structure, replace: Callable[[Ref], Any]) -> Structure:
    """A copy of the structure with every tensor replaced."""
    if isinstance(structure, Ref):
        return replace(structure)
    if isinstance(structure, dict):
        return {key: substitute(value, replace) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [substitute(item, replace) for item in structure]
    return structure


def canonical(value: Any) -> str:
    """A text that is equal for equal JSON values (and for equal tensors)."""

    def default(item: Any) -> Any:
        if isinstance(item, Ref):
            return {"": [item.call, item.output]}
        raise TypeError(f"not JSON: {type(item).__name__}")

    return json.dumps(value, sort_keys=True, default=default)


def parents(graph: Graph, call: int) -> list[int]:
    """The calls that made the arguments of a call, in Keras's order of its tensors."""
    return [ref.call for ref in refs(graph.calls[call].arguments)]


def traversal(graph: Graph) -> tuple[list[int], dict[int, int]]:
    """Calls from inputs to outputs, and each layer's place in the walk back from the outputs.

    The order is that of Keras (`keras/src/ops/function.py`, `_build_map`): depth first from the outputs, a call
    comes after everything it depends on; a layer's place is the moment when it is first met on the way back.
    """
    order: list[int] = []
    places: dict[int, int] = {}
    state: dict[int, int] = {}
    for output in refs(graph.outputs):
        stack: list[tuple[int, Iterator[int]]] = []

        def enter(call: int, stack: list[tuple[int, Iterator[int]]] = stack) -> None:
            if state.get(call) == 2:
                return
            if state.get(call) == 1:
                name = graph.layers[graph.calls[call].layer].name
                raise GraphError(f"The network has a loop through layer '{name}': no Keras model can have one.")
            state[call] = 1
            places.setdefault(graph.calls[call].layer, len(places))
            stack.append((call, iter(parents(graph, call))))

        enter(output.call)
        while stack:
            call, rest = stack[-1]
            for parent in rest:
                if state.get(parent) != 2:
                    enter(parent)
                    break
            else:
                stack.pop()
                state[call] = 2
                order.append(call)
    return order, places


def layer_order(graph: Graph) -> list[int]:
    """Layers in the order of Keras's `model.operations` for a functional model.

    Computed as Keras computes it after loading (`map_graph`): by depth, the longest distance to an output, a layer
    called several times counting at its deepest call; within a depth by `traversal`. Inputs that reach no output
    stand first within depth 0.
    """
    order, places = traversal(graph)
    call_depth: dict[int, int] = {}
    layer_depth: dict[int, int] = {}
    for call in reversed(order):
        layer = graph.calls[call].layer
        depth = max(call_depth.setdefault(call, 0), layer_depth.get(layer, 0))
        layer_depth[layer] = call_depth[call] = depth
        for parent in parents(graph, call):
            call_depth[parent] = max(depth + 1, call_depth.get(parent, 0))
    for ref in refs(graph.inputs):
        layer = graph.calls[ref.call].layer
        if layer not in layer_depth:
            layer_depth[layer] = 0
            places[layer] = -1
    return sorted(layer_depth, key=lambda layer: (-layer_depth[layer], places[layer]))


def call_order(graph: Graph) -> list[int]:
    """Calls in topological order, without those that reach no output and are no input."""
    order, _ = traversal(graph)
    reached = set(order)
    return order + [ref.call for ref in refs(graph.inputs) if ref.call not in reached]


def sort_calls(graph: Graph) -> Graph:
    """The same network with its calls in the order of `call_order`."""
    order = call_order(graph)
    place = {call: index for index, call in enumerate(order)}

    def move(ref: Ref) -> Ref:
        return ref.moved(place[ref.call])

    calls = tuple(Call(graph.calls[call].layer, substitute(graph.calls[call].arguments, move)) for call in order)
    return replace(graph, calls=calls, inputs=substitute(graph.inputs, move), outputs=substitute(graph.outputs, move))


def ancestors(graph: Graph, calls: Iterable[int]) -> set[int]:
    """The calls that some of the given calls depend on, themselves included."""
    seen: set[int] = set()
    waiting = list(calls)
    while waiting:
        call = waiting.pop()
        if call not in seen:
            seen.add(call)
            waiting.extend(parents(graph, call))
    return seen
