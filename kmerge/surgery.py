"""n graphs and a plan to one graph, and for each of its layers where its weights come from.

One rule decides everything: a call of the same layer on the same tensors happens once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kmerge.dialects.reading import Dialect
from kmerge.dialects.writing import knows_dictionaries
from kmerge.errors import PlanError
from kmerge.graph import (
    Call,
    Graph,
    Layer,
    Ref,
    Structure,
    call_order,
    canonical,
    flatten,
    refs,
    sort_calls,
    substitute,
)
from kmerge.layout import Layout, is_plain, source_graph
from kmerge.plan import Plan, Role
from kmerge.shapes import infer_shapes


@dataclass(frozen=True)
class MergedLayer:
    """Where one layer of the merged graph comes from.

    Attributes:
        role: shared or private.
        members: (source, layer) numbers; one for a private layer, one per source for a shared one, none for a layer
            that the merge itself adds.
        method, options: how shared weights are merged.
    """

    role: Role
    members: tuple[tuple[int, int], ...]
    method: str = ""
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Merged:
    """The merged graph, with one `MergedLayer` per layer of it."""

    graph: Graph
    layers: tuple[MergedLayer, ...]
    heads: dict[str, tuple[str, ...]]
    """Names of each source's outputs in the merged model, by label; one name for all where the sources became one."""
    calls: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Per call of the graph, the calls of the sources that it stands for: (source, call) numbers."""


_Key = tuple[Any, ...]


def merge_graphs(layout: Layout, plan: Plan) -> Merged:
    """Build the merged graph.

    Args:
        layout: the sources, laid over the first.
        plan: roles per layer.

    Raises:
        PlanError: if the heads cannot be joined as asked.
    """
    return _Surgeon(layout, plan).run()


class _Surgeon:
    def __init__(self, layout: Layout, plan: Plan) -> None:
        self.layout, self.plan = layout, plan
        self.calls: list[Call] = []
        self.layers: list[Layer] = []
        self.origins: list[MergedLayer] = []
        self.stands_for: list[list[tuple[int, int]]] = []
        self.keys: dict[_Key, int] = {}
        self.known: dict[str, int] = {}
        self.planned = plan.of_first
        self.prefixes = dict(zip(plan.labels, _told_apart([label_name(label) for label in plan.labels]), strict=True))

    def run(self) -> Merged:
        made = [self._add_source(number) for number in range(len(self.layout.sources))]
        inputs = self._inputs([inputs for inputs, _ in made])
        outputs, heads = self._outputs([outputs for _, outputs in made])
        graph = self._named(Graph(source_graph(self.layout.first).name, (), tuple(self.calls), inputs, outputs), heads)
        stands_for = tuple(tuple(self.stands_for[call]) for call in call_order(graph))
        graph = sort_calls(graph)
        # What reaches no output is left out: a source of weight 0 under an average.
        kept = sorted({call.layer for call in graph.calls})
        place = {layer: number for number, layer in enumerate(kept)}
        calls = tuple(Call(place[call.layer], call.arguments) for call in graph.calls)
        graph = replace(graph, layers=tuple(graph.layers[layer] for layer in kept), calls=calls)
        origins = tuple(self.origins[layer] for layer in kept)
        return Merged(_with_shapes(graph), origins, {label: tuple(names) for label, names in heads.items()}, stands_for)

    def _add_source(self, number: int) -> tuple[Structure, Structure]:
        """Adds the calls of one source; returns its inputs and outputs in the merged graph."""
        source = self.layout.sources[number]
        graph = source_graph(source)
        position = {theirs: mine for mine, theirs in self.layout.matches[number].layers.items()}
        moved: dict[int, int] = {}

        def move(ref: Ref) -> Ref:
            return ref.moved(moved[ref.call])

        for index, call in enumerate(graph.calls):
            place = position.get(call.layer)
            arguments = substitute(call.arguments, move)
            shared = place is not None and self.planned[place].role == "shared"
            if shared and not graph.layers[call.layer].is_input and is_plain(source, call.layer):
                shared = all(self._is_shared(ref) for ref in refs(arguments))
            moved[index] = self._call(self._layer(number, call.layer, place if shared else None), arguments)
            self.stands_for[moved[index]].append((number, index))
        return substitute(graph.inputs, move), substitute(graph.outputs, move)

    def _is_shared(self, ref: Ref) -> bool:
        layer = self.calls[ref.call].layer
        return self.origins[layer].role == "shared" or self.layers[layer].is_input

    def _layer(self, source: int, layer: int, place: int | None) -> int:
        key: _Key = ("shared", place) if place is not None else ("private", source, layer)
        if key not in self.keys:
            self.keys[key] = len(self.layers)
            own = source_graph(self.layout.sources[source]).layers[layer]
            if place is None:
                self.origins.append(MergedLayer("private", ((source, layer),)))
            else:
                planned = self.planned[place]
                options = tuple(sorted(planned.options.items()))
                members = tuple((n, found.layers[place]) for n, found in enumerate(self.layout.matches))
                self.origins.append(MergedLayer("shared", members, planned.method, options))
                own = source_graph(self.layout.first).layers[place]
                if self.plan.freeze:
                    own = frozen(own)
            self.layers.append(own)
        return self.keys[key]

    def _call(self, layer: int, arguments: Any) -> int:
        key = canonical([layer, _without_nulls(arguments)])
        if key not in self.known:
            self.known[key] = len(self.calls)
            self.calls.append(Call(layer, arguments))
            self.stands_for.append([])
        return self.known[key]

    def _add_layer(self, layer: Layer, arguments: Any) -> Ref:
        self.layers.append(layer)
        self.origins.append(MergedLayer("shared", ()))
        return Ref(self._call(len(self.layers) - 1, arguments))

    # ------------------------------------------------------------------------------------------ inputs, outputs

    def _inputs(self, made: Sequence[Structure]) -> Structure:
        if self.plan.inputs == "shared":
            return made[0]
        if all(isinstance(structure, dict) for structure in made):
            return {
                f"{self.prefixes[label]}_{key}": structure[key]
                for label, structure in zip(self.plan.labels, made, strict=True)
                for key in structure
            }
        return [ref for structure in made for ref in flatten(structure)]

    def _outputs(self, made: Sequence[Structure]) -> tuple[Structure, dict[str, list[str]]]:
        labels = self.plan.labels
        flat = [flatten(structure) for structure in made]
        if all(tensors == flat[0] for tensors in flat):
            names = self._output_names(0)
            return made[0], dict.fromkeys(labels, names)
        if self.plan.outputs == "mean":
            return self._mean(made[0], flat)
        heads = {
            label: [label]
            if len(tensors) == 1
            else _told_apart([f"{label}_{name}" for name in self._output_names(number)])
            for number, (label, tensors) in enumerate(zip(labels, flat, strict=True))
        }
        clash = _first_repeated([name for names in heads.values() for name in names])
        if clash:
            raise PlanError(f"Two outputs would be called '{clash}': choose other --labels.")
        first = self.layout.first
        dictionary = self.plan.outputs == "heads" and knows_dictionaries(first.dialect or Dialect.KERAS3, first.version)
        if not dictionary:
            return [ref for tensors in flat for ref in tensors], heads
        return {
            name: ref
            for label, tensors in zip(labels, flat, strict=True)
            for name, ref in zip(heads[label], tensors, strict=True)
        }, heads

    def _output_names(self, number: int) -> list[str]:
        """A source's own names for its outputs: keys of its dictionary, else the layers that make them."""
        graph = source_graph(self.layout.sources[number])
        if isinstance(graph.outputs, dict):
            return [str(key) for key in sorted(graph.outputs) for _ in flatten(graph.outputs[key])]
        return [graph.layer_of(ref).name for ref in flatten(graph.outputs)]

    def _mean(self, structure: Structure, flat: Sequence[list[Ref]]) -> tuple[Structure, dict[str, list[str]]]:
        """One output in the place of the first source's: the (weighted) average of all heads."""
        dialect = self.layout.first.dialect or Dialect.KERAS3
        names = self._output_names(0)
        means: list[Ref] = []
        for place, name in enumerate(names):
            tensors = [tensors[place] for tensors in flat]
            means.append(self._average(tensors, name, dialect))
        replaced = iter(means)
        # A dictionary's leaves are visited by sorted key, as `flatten` gives them.
        return _refill(structure, lambda: next(replaced)), dict.fromkeys(self.plan.labels, names)

    def _average(self, tensors: Sequence[Ref], name: str, dialect: Dialect) -> Ref:
        weights = self.plan.weights
        used = [
            (number, tensor, weight)
            for number, (tensor, weight) in enumerate(zip(tensors, weights, strict=True))
            if weight
        ]
        if len(used) == 1:
            return used[0][1]
        dtype = self.layers[self.calls[tensors[0].call].layer].config.get("dtype") or "float32"
        if len(used) == len(tensors) and len(set(weights)) == 1:
            return self._add_layer(_plain_layer("Average", name, dtype, {}, dialect), _merging(tensors, dialect))
        scaled = []
        for number, tensor, weight in used:
            settings = {"scale": weight, "offset": 0.0}
            layer = _plain_layer("Rescaling", f"{name}_share_{number + 1}", dtype, settings, dialect)
            scaled.append(self._add_layer(layer, _merging([tensor], dialect)))
        return self._add_layer(_plain_layer("Add", name, dtype, {}, dialect), _merging(scaled, dialect))

    # ---------------------------------------------------------------------------------------------------- names

    def _named(self, graph: Graph, heads: dict[str, list[str]]) -> Graph:
        """Names without collision: heads after their labels, trunk as in the first source, private ones prefixed."""
        makers = self._makers(graph, heads)
        names: dict[int, str] = {}
        taken: set[str] = set()

        def take(layer: int, wanted: str) -> None:
            candidate, number = wanted, 1
            while candidate in taken:
                number += 1
                candidate = f"{wanted}_{number}"
            taken.add(candidate)
            names[layer] = candidate

        for name, ref in _named_inputs(graph.inputs):
            layer = graph.calls[ref.call].layer
            if layer not in names:
                own = self.layers[layer].name
                if self.origins[layer].role == "private":
                    own = name or f"{self.prefixes[self.plan.labels[self.origins[layer].members[0][0]]]}_{own}"
                take(layer, own)
        for layer, name in makers.items():
            if layer not in names:
                take(layer, name)
        for private in (False, True):
            for layer, origin in enumerate(self.origins):
                if layer not in names and (origin.role == "private") is private:
                    own = self.layers[layer].name
                    if private:
                        own = f"{self.prefixes[self.plan.labels[origin.members[0][0]]]}_{own}"
                    take(layer, own)
        objects: dict[Any, int] = {}
        layers = [
            _rename(layer, names[number], origin, objects)
            for number, (layer, origin) in enumerate(zip(self.layers, self.origins, strict=True))
        ]
        return replace(graph, layers=tuple(layers))

    def _makers(self, graph: Graph, heads: dict[str, list[str]]) -> dict[int, str]:
        """Layers that make a head's output and can be named after it: private ones, and averages."""
        makers: dict[int, str] = {}
        if self.plan.outputs == "mean" and all(
            not self.origins[graph.calls[r.call].layer].members for r in refs(graph.outputs)
        ):
            for ref in refs(graph.outputs):
                makers.setdefault(graph.calls[ref.call].layer, self.layers[graph.calls[ref.call].layer].name)
            return makers
        if isinstance(graph.outputs, dict):
            named = [name for names in heads.values() for name in names if name in graph.outputs]
            pairs = [(name, ref) for name in named for ref in refs(graph.outputs[name])]
        else:
            names = [name for label in heads for name in heads[label]]
            pairs = list(zip(names, flatten(graph.outputs), strict=False))
        for name, ref in pairs:
            layer = graph.calls[ref.call].layer
            if self.origins[layer].role == "private":
                makers.setdefault(layer, label_name(name))
        return makers


def label_name(label: str) -> str:
    """A label as part of a layer's name: letters without accents, digits, `_` and `-`.

    TensorFlow allows no more but the full stop, and PyTorch does not allow that.
    """
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9_\-]+", "_", plain).strip("_")
    return plain if re.match(r"[A-Za-z0-9]", plain) else f"source_{plain}".rstrip("_")


def frozen(layer: Layer) -> Layer:
    """The layer with `trainable` false, and the layers inside it."""

    def freeze(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {key: freeze(item) for key, item in value.items()}
            return {**inner, "trainable": False} if "trainable" in inner else inner
        if isinstance(value, list):
            return [freeze(item) for item in value]
        return value

    return replace(layer, config=freeze(dict(layer.config)))


def _rename(layer: Layer, name: str, origin: MergedLayer, objects: dict[Any, int]) -> Layer:
    """The layer under a new name, with object numbers that cannot meet those of another source's file."""
    source = origin.members[0][0] if origin.members else 0

    def renumber(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: objects.setdefault((source, str(item)), len(objects) + 1)
                if key == "shared_object_id"
                else renumber(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [renumber(item) for item in value]
        return value

    return replace(layer, name=name, config=renumber(dict(layer.config)), entry=renumber(dict(layer.entry)))


def _named_inputs(inputs: Structure) -> list[tuple[str, Ref]]:
    """Inputs with their keys, "" where they are no dictionary: Keras wants key and input layer to be named alike."""
    if isinstance(inputs, dict):
        return [(key, ref) for key in inputs for ref in refs(inputs[key])]
    return [("", ref) for ref in refs(inputs)]


def _plain_layer(class_name: str, name: str, dtype: Any, settings: dict[str, Any], dialect: Dialect) -> Layer:
    entry = {"module": "keras.layers", "registered_name": None} if dialect is Dialect.KERAS3 else {}
    config = {"name": name, "trainable": True, "dtype": dtype, **settings}
    return Layer(name, class_name, config, entry)


def _merging(tensors: Sequence[Ref], dialect: Dialect) -> Any:
    """Arguments of a layer that takes one tensor, or a list of several."""
    if dialect is Dialect.KERAS2:
        return [[tensor, {}] for tensor in tensors]
    return {"args": [list(tensors) if len(tensors) > 1 else tensors[0]], "kwargs": {}}


def _refill(structure: Structure, next_ref: Callable[[], Ref]) -> Structure:
    if isinstance(structure, dict):
        filled = {key: _refill(structure[key], next_ref) for key in sorted(structure)}
        return {key: filled[key] for key in structure}
    if isinstance(structure, list):
        return [_refill(item, next_ref) for item in structure]
    return next_ref()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _told_apart(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in result:
            number += 1
            candidate = f"{name}_{number}"
        result.append(candidate)
    return result


def _first_repeated(names: Sequence[str]) -> str:
    return next((name for index, name in enumerate(names) if name in names[:index]), "")


def _with_shapes(graph: Graph) -> Graph:
    """Shapes on the tensors that have none, as far as they can be inferred."""
    if all(ref.shape is not None for call in graph.calls for ref in refs(call.arguments)):
        return graph
    shapes = infer_shapes(graph)

    def fill(ref: Ref) -> Ref:
        return ref if ref.shape is not None else replace(ref, shape=shapes.get(Ref(ref.call, ref.output)))

    calls = tuple(Call(call.layer, substitute(call.arguments, fill)) for call in graph.calls)
    return replace(graph, calls=calls)
