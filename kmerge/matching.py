"""Which layer of one source is which layer of another, and what forbids two to be shared.

Sources match by position in the graph, never by name: automatic names differ in every file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.dialects.reading import input_shape
from kmerge.dialects.vocabulary import LEARNED_STATE, comparable, difference, is_quantized, policy_name
from kmerge.errors import FormatError
from kmerge.graph import Call, Graph, Ref, canonical, flatten, refs, substitute
from kmerge.source import Source, State
from kmerge.store import Tensor, numpy_dtype


@dataclass(frozen=True)
class Match:
    """Two graphs laid over each other: numbers of `first` to numbers of the other, where they correspond."""

    layers: Mapping[int, int]
    calls: Mapping[int, int]


@dataclass(frozen=True)
class Difference:
    """What two layers at the same position differ in."""

    what: str
    first: Any
    second: Any
    kind: str
    """shape, configuration, state, call, place or class"""

    def sentence(self, first: str, second: str) -> str:
        return f"{self.what} is {_show(self.first)} in '{first}' but {_show(self.second)} in '{second}'"


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if value is None:
        return "not set"
    text = str(tuple(value)) if isinstance(value, list) and all(isinstance(item, int) for item in value) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def match(first: Source, other: Source) -> Match:
    """Lay two networks over each other.

    Forward from the inputs: calls of one class and configuration on corresponding tensors correspond. Then backward
    from the outputs, for what stands behind parts that differ. What is left goes the same two ways by its class alone,
    so that a difference can be told.
    """
    one, two = _graph(first), _graph(other)
    matcher = _Matcher(one, two)
    for equal in (True, False):
        matcher.forward(equal)
        matcher.backward(equal)
    return Match(matcher.layers, matcher.calls)


def identity(graph: Graph) -> Match:
    """A graph laid over itself."""
    return Match({n: n for n in range(len(graph.layers))}, {n: n for n in range(len(graph.calls))})


def _graph(source: Source) -> Graph:
    if source.graph is None:
        raise FormatError(f"'{source.label}' holds no graph.")
    return source.graph


class _Matcher:
    def __init__(self, first: Graph, other: Graph) -> None:
        self.first, self.other = first, other
        self.layers: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.taken_layers: dict[int, int] = {}
        self.taken_calls: set[int] = set()
        self.first_plain = [canonical(comparable(layer.config)) for layer in first.layers]
        self.other_plain = [canonical(comparable(layer.config)) for layer in other.layers]
        self.first_alike, self.other_alike = self._alike(first), self._alike(other)

    def pair(self, call: int, other_call: int) -> None:
        layer, other_layer = self.first.calls[call].layer, self.other.calls[other_call].layer
        self.calls[call] = other_call
        self.taken_calls.add(other_call)
        self.layers[layer] = other_layer
        self.taken_layers[other_layer] = layer

    def fits(self, call: int, other_call: int) -> bool:
        layer, other_layer = self.first.calls[call].layer, self.other.calls[other_call].layer
        return (
            call not in self.calls
            and other_call not in self.taken_calls
            and self.first.layers[layer].class_name == self.other.layers[other_layer].class_name
            and self.layers.get(layer, other_layer) == other_layer
            and self.taken_layers.get(other_layer, layer) == layer
        )

    def forward(self, equal: bool) -> None:
        for mine, theirs in zip(refs(self.first.inputs), refs(self.other.inputs), strict=False):
            if self.fits(mine.call, theirs.call):
                self.pair(mine.call, theirs.call)
        for alike in self.first_alike.values():
            key = self._key(self.first, self.first.calls[alike[0]], self.calls)
            if key:
                self._pair_alike(alike, self.other_alike.get(key, []), equal)

    def _alike(self, graph: Graph) -> dict[str, list[int]]:
        """Calls of one class on the same tensors, by what they have in common, in topological order."""
        groups: dict[str, list[int]] = {}
        for number, call in enumerate(graph.calls):
            if call.arguments is not None:
                groups.setdefault(self._key(graph, call, None), []).append(number)
        return groups

    def _pair_alike(self, mine: Sequence[int], theirs: Sequence[int], equal: bool) -> None:
        """Pair calls of one class on the same tensors, in order: those of equal configuration, or whatever is left.

        Where as many stand on both sides but of other configurations, those that stand at the same place come before.
        """
        wanted = sorted(self.first_plain[self.first.calls[call].layer] for call in mine)
        found = sorted(self.other_plain[self.other.calls[call].layer] for call in theirs)
        if len(mine) == len(theirs) and wanted != found:
            for call, other in zip(mine, theirs, strict=True):
                if self._same(call, other) and self.fits(call, other):
                    self.pair(call, other)
        left: dict[str, deque[int]] = {}
        for other in theirs:
            if other not in self.taken_calls:
                left.setdefault(self.other_plain[self.other.calls[other].layer] if equal else "", deque()).append(other)
        for call in mine:
            if call in self.calls:
                continue
            candidates = left.get(self.first_plain[self.first.calls[call].layer] if equal else "", deque())
            chosen = next((other for other in candidates if self.fits(call, other)), None)
            if chosen is not None:
                self.pair(call, chosen)
                candidates.remove(chosen)  # nearly always the first

    def _same(self, call: int, other_call: int) -> bool:
        return self.first_plain[self.first.calls[call].layer] == self.other_plain[self.other.calls[other_call].layer]

    @staticmethod
    def _key(graph: Graph, call: Call, moved: Mapping[int, int] | None) -> str:
        """Class and tensors of a call, in the numbers of the other graph; "" where a tensor has no counterpart."""
        places = []
        for ref in refs(call.arguments):
            if moved is not None and ref.call not in moved:
                return ""
            places.append([moved[ref.call] if moved is not None else ref.call, ref.output])
        return canonical([graph.layers[call.layer].class_name, places])

    def backward(self, equal: bool) -> None:
        waiting = deque(_pairs(self.first.outputs, self.other.outputs))
        seen: set[tuple[int, int]] = set()
        while waiting:
            mine, theirs = waiting.popleft()
            if (mine.call, theirs.call) in seen or mine.output != theirs.output:
                continue
            seen.add((mine.call, theirs.call))
            if self.calls.get(mine.call) != theirs.call:
                if not self.fits(mine.call, theirs.call) or (equal and not self._same(mine.call, theirs.call)):
                    continue
                self.pair(mine.call, theirs.call)
            before = refs(self.first.calls[mine.call].arguments)
            behind = refs(self.other.calls[theirs.call].arguments)
            if len(before) == len(behind):
                waiting.extend(zip(before, behind, strict=True))


def _pairs(first: Any, second: Any) -> Iterator[tuple[Ref, Ref]]:
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in sorted(first):
            yield from _pairs(first[key], second[key])
    else:
        yield from zip(flatten(first), flatten(second), strict=False)


def layer_difference(first: Source, other: Source, found: Match, layer: int) -> Difference | None:
    """What forbids a layer of `first` to be shared with its counterpart in `other`; None if nothing does.

    Compared: shapes of the weights, configuration apart from names and bookkeeping, what the layer is called with, and
    state that was adapted to data.
    """
    one, two = _graph(first), _graph(other)
    mine = one.layers[layer]
    if layer not in found.layers:
        return Difference("its place", f"layer {layer + 1}, a {mine.class_name}", None, "place")
    number = found.layers[layer]
    theirs = two.layers[number]
    if mine.is_input:
        return _input_difference(mine.config, theirs.config, input_shape(mine), input_shape(theirs))
    shapes = _shape_difference(first.states[layer], other.states[number])
    if shapes:
        return shapes
    config = difference(comparable(mine.config), comparable(theirs.config))
    if config:
        return Difference(config[0], config[1], config[2], "configuration")
    for call in one.calls_of(layer):
        if call not in found.calls:
            return Difference("the number of its calls", len(one.calls_of(layer)), len(two.calls_of(number)), "call")
        arguments = _plain_arguments(one.calls[call].arguments)
        others = _plain_arguments(two.calls[found.calls[call]].arguments)
        if canonical(arguments) != canonical(others):
            found_difference = difference(arguments, others) or ("its call", arguments, others)
            return Difference("the call's " + found_difference[0], found_difference[1], found_difference[2], "call")
    if len(one.calls_of(layer)) != len(two.calls_of(number)):
        return Difference("the number of its calls", len(one.calls_of(layer)), len(two.calls_of(number)), "call")
    if mine.class_name in LEARNED_STATE or is_quantized(mine.config):
        return state_difference(first.states[layer], other.states[number])
    return None


def _plain_arguments(arguments: Any) -> Any:
    """Arguments without tensors and without keywords that are not set."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if item is not None and key != "name"}
        if isinstance(value, list):
            return [strip(item) for item in value]
        return value

    return strip(substitute(arguments, lambda ref: f"tensor {ref.output}"))


def _input_difference(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    one: Sequence[int | None] | None,
    two: Sequence[int | None] | None,
) -> Difference | None:
    if one is not None and two is not None and tuple(one[1:]) != tuple(two[1:]):
        return Difference("the input's shape", tuple(one), tuple(two), "shape")
    if policy_name(first.get("dtype")) != policy_name(second.get("dtype")):
        return Difference(
            "the input's dtype", policy_name(first.get("dtype")), policy_name(second.get("dtype")), "shape"
        )
    return None


def _shape_difference(first: State, second: State) -> Difference | None:
    for mine, theirs in zip(first.weights, second.weights, strict=False):
        if mine.tensor.shape != theirs.tensor.shape:
            return Difference(mine.name, mine.tensor.shape, theirs.tensor.shape, "shape")
    if len(first.weights) != len(second.weights):
        return Difference("the number of its weights", len(first.weights), len(second.weights), "shape")
    return None


def state_difference(first: State, second: State) -> Difference | None:
    for mine, theirs in zip(first.weights, second.weights, strict=True):
        different = _unequal_entries(mine.tensor, theirs.tensor)
        if different:
            return Difference(f"an entry of {mine.name}", *different, "state")
    for name in sorted(first.assets.keys() | second.assets.keys()):
        mine_asset, their_asset = first.assets.get(name), second.assets.get(name)
        if mine_asset is None or their_asset is None or mine_asset.read() != their_asset.read():
            sizes = [0 if asset is None else asset.size for asset in (mine_asset, their_asset)]
            return Difference(name.rsplit("/", 1)[-1], f"{sizes[0]} bytes", f"{sizes[1]} other bytes", "state")
    return None


_BLOCK = 1 << 20


def _unequal_entries(first: Tensor, second: Tensor) -> tuple[Any, Any] | None:
    """The first two entries that differ, NaN being equal to itself; None if there are none."""
    for start in range(0, first.size, _BLOCK):
        length = min(_BLOCK, first.size - start)
        one, two = (np.empty(length, dtype=numpy_dtype(tensor.dtype)) for tensor in (first, second))
        first.read_into(start, one)
        second.read_into(start, two)
        unequal = np.flatnonzero((one != two) & ~((one != one) & (two != two)))
        if unequal.size:
            return one[unequal[0]].item(), two[unequal[0]].item()
    return None
