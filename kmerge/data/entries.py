"""What a network takes: its inputs, with all names under which data may be given for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.dialects.vocabulary import compute_dtype
from kmerge.graph import Graph, Ref, flatten, refs
from kmerge.layout import source_graph
from kmerge.shapes import Shape, infer_shapes
from kmerge.source import Source

_SCALES = frozenset({"Rescaling", "Normalization", "TrueDivide", "Divide"})
"""Layers and operations that bring pixels into a small range."""


@dataclass(frozen=True)
class Entry:
    """One input of the network.

    Attributes:
        name: for people: its key where the inputs are a dictionary, else its layer's name.
        names: all names under which data may be given for it.
        shape: rows first; None for a free size, or for a shape that is not known.
        dtype: of the input layer; "string" too.
        scaled: whether the network itself brings its values into a small range, as a Rescaling at its front does.
    """

    name: str
    names: frozenset[str]
    shape: Shape | None
    dtype: str
    scaled: bool = False

    @property
    def is_text(self) -> bool:
        return self.dtype == "string"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """In which the rows are handed on."""
        if self.is_text:
            return np.dtype(object)
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            return np.dtype(np.float32)
        # NumPy knows bfloat16 and smaller only where the package ml_dtypes is loaded.
        return dtype if dtype.kind in "biufc" else np.dtype(np.float32)


def entries(source: Source) -> tuple[Entry, ...]:
    """The inputs of a network, in the order of `flatten(graph.inputs)`."""
    graph = source_graph(source)
    shapes = infer_shapes(graph)
    found = []
    leaves = paths(graph.inputs)
    for number, (path, ref) in enumerate(leaves):
        layer = graph.layer_of(ref)
        plain = {f"x{number}"} | ({"x"} if len(leaves) == 1 else set())
        name = path if isinstance(graph.inputs, Mapping) else layer.name
        shape = shapes.get(Ref(ref.call, ref.output))
        names = frozenset({name, path, layer.name} | plain)
        found.append(Entry(name, names, shape, compute_dtype(layer.config), _is_scaled(graph, ref)))
    assert [ref for _, ref in leaves] == flatten(graph.inputs)
    return tuple(found)


def paths(structure: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of a structure with the keys that lead to them: `("a/0", leaf)`; in Keras's order."""
    if isinstance(structure, Mapping):
        return [item for key in sorted(structure) for item in paths(structure[key], f"{path}/{key}")]
    if isinstance(structure, (list, tuple)) and not is_plain(structure):
        return [item for key, value in enumerate(structure) for item in paths(value, f"{path}/{key}")]
    return [(path.removeprefix("/"), structure)]


def is_plain(value: Any) -> bool:
    """Whether something is numbers, strings, or nested lists of them."""
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
    return isinstance(value, (bool, int, float, complex, str, bytes)) or (
        isinstance(value, (list, tuple)) and not len(value)
    )


def _is_scaled(graph: Graph, ref: Ref) -> bool:
    """Whether an input is rescaled or normalised by one of the first two layers behind it."""
    behind = {ref}
    for _ in range(2):
        calls = [number for number, call in enumerate(graph.calls) if behind & set(refs(call.arguments))]
        if any(graph.layers[graph.calls[number].layer].class_name in _SCALES for number in calls):
            return True
        behind = {Ref(number) for number in calls}
    return False
