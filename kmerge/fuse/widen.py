"""A trunk wider than a source's: which spaces get more units, and the graph with layers of these sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kmerge.fuse.context import Context
from kmerge.fuse.pairs import Frame, arranged
from kmerge.graph import Call, Ref, substitute
from kmerge.surgery import Merged

_SIZES = {
    "Dense": "units",
    "Embedding": "output_dim",
    "SimpleRNN": "units",
    "LSTM": "units",
    "GRU": "units",
    **{f"{kind}Conv{rank}D": "filters" for kind in ("", "Separable") for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": "filters" for rank in (1, 2, 3)},
}
"""The setting of each class that says how many units it makes."""
_ANY = (
    "BatchNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "PReLU",
    *(f"DepthwiseConv{rank}D" for rank in (1, 2)),
)
"""Classes that take the number of units from what they are given."""
_ATTENTION = ("MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention")
_COUNTED = ("Reshape", "RepeatVector", "Normalization", "Rescaling", "GroupNormalization", *_ATTENTION)
STEPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Widths of a space that are tried, as multiples of a source's."""


def can_change(context: Context, number: int) -> bool:
    """Whether a space may have another size in the merged network than in a source."""
    frame, merged = context.frame, context.merged
    space = frame.spaces[number]
    if space.fixed or any(use.part for use in space.axes):
        return False
    own = {member: layer for layer, origin in enumerate(merged.layers) for member in origin.members}
    makers = set()
    for use in space.axes:
        layer = own.get((use.source, use.layer))
        if layer is None:
            return False
        if arranged([use.places], [space.size + 1], len(use.units)) is None:
            return False
        if use.role == "output":
            class_name = merged.graph.layers[layer].class_name
            config = merged.graph.layers[layer].config
            if class_name not in (*_SIZES, *_ANY) or int(config.get("groups") or 1) > 1:
                return False
            if class_name in _SIZES and use.places.shape[1] > 1 and class_name not in ("LSTM", "GRU"):
                return False
            makers.add(layer)
    return not any(_meets_counted(context, layer) for layer in makers)


def _meets_counted(context: Context, layer: int) -> bool:
    """Whether what a layer makes reaches, before other weights, a layer whose settings count units."""
    graph = context.merged.graph
    waiting = [Ref(call) for call in graph.calls_of(layer)]
    seen = set(waiting)
    while waiting:
        for call in context.chains.readers.get(waiting.pop(), ()):
            if call < 0:
                continue
            reader = graph.calls[call].layer
            own = graph.layers[reader]
            if own.class_name in _COUNTED or (own.is_operation and own.class_name not in ("Add", "Multiply", "Relu")):
                return True
            if not context.weights(reader) or own.class_name in _ANY:
                following = Ref(call)
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return False


def spent(
    context: Context, width: float, candidates: Sequence[int], unexplained: Callable[[int, int], float]
) -> tuple[int, ...]:
    """Sizes of all spaces: more units where they explain most per parameter, as many parameters as a trunk of that
    width throughout would have.

    Args:
        context: with the frame of the sources' own sizes.
        width: of the trunk, as a multiple of a source's.
        candidates: spaces that may change.
        unexplained: share of what a space's units do that is lost at a size: (space, size) to 0 to 1.
    """
    frame = context.frame
    sizes = list(frame.sizes)
    if width == 1 or not candidates:
        return tuple(sizes)
    even = list(sizes)
    for number in candidates:
        even[number] = max(1, round(frame.spaces[number].size * width))
    if width < 1:
        return tuple(even)
    budget = _parameters(context, even)
    tried: dict[tuple[int, int], float] = {}

    def loss(number: int, size: int) -> float:
        if (number, size) not in tried:
            tried[number, size] = unexplained(number, size)
        return tried[number, size]

    waiting = set(candidates)
    while waiting:
        best, gain = None, 0.0
        now = _parameters(context, sizes)
        for number in sorted(waiting):
            larger = _next(frame, number, sizes[number])
            step = None if larger is None else [*sizes[:number], larger, *sizes[number + 1 :]]
            cost = None if step is None else _parameters(context, step)
            if larger is None or cost is None or cost > budget:
                waiting.discard(number)
                continue
            value = (loss(number, sizes[number]) - loss(number, larger)) / max(cost - now, 1)
            if best is None or value > gain:
                best, gain = (number, larger), value
        if best is not None:
            sizes[best[0]] = best[1]
    return tuple(sizes)


def _next(frame: Frame, number: int, size: int) -> int | None:
    own = frame.spaces[number].size
    most = own * len(frame.sources)
    found = [round(own * step) for step in STEPS if round(own * step) > size]
    return min(found[0], most) if found and size < most else None


def _parameters(context: Context, sizes: Sequence[int]) -> int:
    """Entries of the shared weights, where spaces have these sizes."""
    frame = replace(context.frame, sizes=tuple(sizes))
    total = 0
    for origin in context.merged.layers:
        if origin.role != "shared" or not origin.members:
            continue
        source, own = origin.members[0]
        for place in range(len(frame.sources[source].states[own].weights)):
            shape = list(frame.shape((source, own, place)))
            for axis in range(len(shape)):
                found = frame.axis((source, own, place), axis)
                shape[axis] = shape[axis] if found is None else found.length
            total += int(np.prod(shape))
    return total


def widened(context: Context, merged: Merged) -> Merged:
    """The graph with layers of the frame's sizes; unchanged where no space has another size than in the sources.

    Args:
        context: with the frame of the sizes that are wanted.
        merged: the graph: that of the context, or another of the same layers.
    """
    frame = context.frame
    if all(size == space.size for size, space in zip(frame.sizes, frame.spaces, strict=True)):
        return merged
    layers = list(merged.graph.layers)
    for number, (layer, origin) in enumerate(zip(layers, merged.layers, strict=True)):
        setting = _SIZES.get(layer.class_name)
        if not origin.members:
            continue
        layer = replace(layer, config=_unbuilt(layer.config), entry=_unbuilt(layer.entry))
        layers[number] = layer
        if setting is None:
            continue
        source, own = origin.members[0]
        state = frame.sources[source].states[own]
        place = next((n for n, weight in enumerate(state.weights) if weight.name in _KERNELS), None)
        if place is None:
            continue
        shape = frame.shape((source, own, place))
        axis = len(shape) - (2 if layer.class_name.endswith("Transpose") else 1)
        found = frame.axis((source, own, place), axis)
        if found is not None and found.length != shape[axis]:
            size = int(layer.config[setting]) * found.length // shape[axis]
            layers[number] = replace(layer, config={**layer.config, setting: size})

    def bare(ref: Ref) -> Ref:
        return replace(ref, shape=None)

    calls = tuple(Call(call.layer, substitute(call.arguments, bare)) for call in merged.graph.calls)
    graph = replace(merged.graph, layers=tuple(layers), calls=calls)
    return replace(merged, graph=_shaped(graph))


def _unbuilt(value: Any) -> Any:
    """A configuration without the sizes that layers, and layers inside them, were built for."""
    if isinstance(value, Mapping):
        return {key: _unbuilt(item) for key, item in value.items() if key != "build_config"}
    return [_unbuilt(item) for item in value] if isinstance(value, list) else value


_KERNELS = ("kernel", "pointwise_kernel", "embeddings")


def _shaped(graph: Any) -> Any:
    """The graph with the shapes of its tensors where they can be told."""
    from kmerge.shapes import infer_shapes

    shapes: Mapping[Ref, Any] = infer_shapes(graph)

    def fill(ref: Ref) -> Ref:
        return replace(ref, shape=shapes.get(Ref(ref.call, ref.output)))

    calls = tuple(Call(call.layer, substitute(call.arguments, fill)) for call in graph.calls)
    return replace(graph, calls=calls)
