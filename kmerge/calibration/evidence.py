"""What a network's graph and weights tell about its inputs: which layers read them first, and what those expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kmerge.graph import Call, Layer, Ref, refs
from kmerge.layout import source_graph
from kmerge.methods.registry import Array
from kmerge.shapes import Shape, infer_shapes
from kmerge.shapes.calls import inputs_of
from kmerge.shapes.layers import canonical_class, inner_layer, is_keras
from kmerge.shapes.values import integers, items, names
from kmerge.source import Source

_WRAPPERS = frozenset({"Bidirectional", "SpectralNormalization", "TimeDistributed"})
_PASSED = names(
    """ActivityRegularization AlphaDropout CenterCrop Concatenate Cropping1D Cropping2D Cropping3D Dropout Flatten
    GaussianDropout GaussianNoise Identity Masking Permute RandomBrightness RandomContrast RandomCrop RandomFlip
    RandomHeight RandomRotation RandomTranslation RandomWidth RandomZoom RepeatVector Reshape Resizing SpatialDropout1D
    SpatialDropout2D SpatialDropout3D UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D
    ZeroPadding3D"""
)
"""Layers that move values and do not change them, or only in training."""
_COMPARISONS = names("all any equal greater greaterequal less lessequal logicalnot notequal")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -30, 30))),
    "softplus": lambda x: np.logaddexp(0, x),
    "swish": lambda x: x / (1 + np.exp(-np.clip(x, -30, 30))),
    "silu": lambda x: x / (1 + np.exp(-np.clip(x, -30, 30))),
}


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer that reads an input, with at most layers in between that leave the values, rescale or normalise them.

    Attributes:
        class_name: of the layer, or of the one in a wrapper; "" for a custom one.
        config: of the same.
        call: number of the call.
        shape: of the tensor that is read, rows first.
        timed: whether it is read step by step (TimeDistributed).
        scale, offset: what the values are multiplied with, and what is added then.
        moments: mean and variance of the input, from the first normalisation on the way, each of as many axes as the
            input without its rows; None without one, or where they cannot be told of the input itself.
    """

    class_name: str
    config: Mapping[str, Any]
    call: int
    shape: Shape | None
    timed: bool = False
    scale: float = 1
    offset: float = 0
    moments: tuple[Array, Array] | None = None


def readings(source: Source, ref: Ref) -> list[Reading]:
    """The first layers that read an input, in the order of their calls."""
    graph = source_graph(source)
    shapes = infer_shapes(graph)
    readers: dict[Ref, list[int]] = {}
    for number, call in enumerate(graph.calls):
        for read in dict.fromkeys(refs(call.arguments)):
            readers.setdefault(read, []).append(number)
    found: list[Reading] = []
    waiting = [(ref, Reading("", {}, ref.call, shapes.get(ref)))]
    seen = {ref}
    while waiting:
        tensor, so_far = waiting.pop()
        for number in readers.get(tensor, ()):
            call = graph.calls[number]
            layer = graph.layers[call.layer]
            here = replace(_named(layer, so_far), call=number, shape=shapes.get(tensor))
            if layer.is_operation:
                behind = _operated(layer, call, here)
            elif here.class_name == "Rescaling":
                behind = _scaled(here, _number(here.config.get("scale")), _number(here.config.get("offset", 0)))
            elif here.class_name in ("Normalization", "BatchNormalization"):
                behind = _normalised(source, call.layer, here, shapes.get(ref))
            elif here.class_name in _PASSED:
                behind = here
            else:
                found.append(here)
                continue
            for output in (Ref(number), *(read for read in readers if read.call == number and read.output)):
                if behind is not None and output not in seen:
                    seen.add(output)
                    waiting.append((output, behind))
    return sorted(found, key=lambda reading: reading.call)


def _named(layer: Layer, so_far: Reading) -> Reading:
    class_name, config, timed = layer.class_name, layer.config, so_far.timed
    while class_name in _WRAPPERS and is_keras(class_name, layer.entry):
        timed |= class_name == "TimeDistributed"
        inner = inner_layer(config)
        if inner is None:
            break
        class_name, config = inner
    known = layer.is_operation or is_keras(class_name, layer.entry)
    return replace(so_far, class_name=canonical_class(class_name) if known else "", config=config, timed=timed)


def _number(value: Any) -> float | None:
    """A number; of an array its mean."""
    if isinstance(value, Mapping):
        value = value.get("config")
        value = value.get("value") if isinstance(value, Mapping) else None
    try:
        return float(np.mean(np.asarray(value, np.float64)))
    except (TypeError, ValueError):
        return None


def _scaled(reading: Reading, scale: float | None, offset: float | None) -> Reading | None:
    if scale is None or offset is None or not np.isfinite([scale, offset]).all() or scale == 0:
        return reading
    return replace(reading, scale=reading.scale * scale, offset=reading.offset * scale + offset)


def _operated(layer: Layer, call: Call, reading: Reading) -> Reading | None:
    """Behind a bare operation: `x / 255`, `x - 0.5`; None behind a comparison, which is a mask."""
    name = layer.class_name.lower()
    if name == "tfoplambda":
        name = str(layer.config.get("function", "")).rsplit(".", 1)[-1].replace("_", "")
    if name in _COMPARISONS:
        return None
    arguments = inputs_of(call.arguments, {})
    if not arguments.given("x", 0) and not arguments.given("x1", 0):
        return reading
    second = arguments.argument("x2" if "x2" in arguments.keywords else "y", 1)
    value = None if second is None or refs(second) else _number(second)
    if value is None:
        return reading
    if name in ("truedivide", "truediv", "divide", "realdiv") and value:
        return _scaled(reading, 1 / value, 0)
    if name in ("multiply", "mul"):
        return _scaled(reading, value, 0)
    if name in ("add", "addv2", "subtract", "sub"):
        return _scaled(reading, 1, -value if name.startswith("sub") else value)
    return reading


def _normalised(source: Source, layer: int, reading: Reading, wanted: Shape | None) -> Reading:
    """Behind a normalisation, with the statistics that it has seen."""
    if reading.moments is not None or reading.shape is None or wanted is None or reading.config.get("invert"):
        return reading
    values = {weight.name: weight.tensor for weight in source.states[layer].weights}
    keys = ("moving_mean", "moving_variance") if reading.class_name == "BatchNormalization" else ("mean", "variance")
    stored = [values[key].read() if key in values else reading.config.get(key) for key in keys]
    axis = reading.config.get("axis", -1)
    kept = [number % len(reading.shape) for number in items(axis) or ([axis] if isinstance(axis, int) else [])]
    sizes = tuple((size or 1) if number in kept else 1 for number, size in enumerate(reading.shape))[1:]
    read, given = (tuple(size or 1 for size in shape[1:]) for shape in (reading.shape, wanted))
    try:
        mean, variance = (_placed(item, sizes, read, given) for item in stored)
    except (TypeError, ValueError):
        return reading
    if not np.isfinite(mean).all() or not (variance >= 0).all():
        return reading
    return replace(reading, moments=((mean - reading.offset) / reading.scale, variance / reading.scale**2))


def _placed(value: Any, sizes: tuple[int, ...], read: tuple[int, ...], given: tuple[int, ...]) -> Array:
    """A statistic along the axes of the input: `sizes` where it is read from shape `read`, `given` at the input."""
    array = np.asarray(value, np.float64)
    array = np.broadcast_to(array, sizes) if array.size == 1 else array.reshape(sizes)
    if len(read) != len(given):  # a Reshape or Flatten on the way
        array = np.broadcast_to(array, read).reshape(given)
    np.broadcast_shapes(array.shape, given)
    return array


def first_kernels(source: Source, found: Sequence[Reading]) -> list[Array]:
    """The kernels of the Dense layers among first layers, shapes (features, units)."""
    graph = source_graph(source)
    kernels = []
    for reading in found:
        layer = graph.calls[reading.call].layer
        if graph.layers[layer].class_name == "Dense":
            tensors = [weight.tensor for weight in source.states[layer].weights if weight.name == "kernel"]
            kernels += [tensor.read().astype(np.float64) for tensor in tensors if len(tensor.shape) == 2]
    return kernels


# ------------------------------------------------------------------------------- statistics behind the first layer


_PLACES = 14
"""Places along each side of an input on which a convolution is computed: enough for its statistics."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the first BatchNormalization behind a first layer has seen, and how to compute it for made-up inputs.

    Attributes:
        reading: the first layer.
        kernel, bias: its weights.
        activations: names of the functions between it and the normalisation.
        mean, variance: moving statistics, shape (channels,).
    """

    reading: Reading
    kernel: Array
    bias: Array | None
    activations: tuple[str, ...]
    mean: Array
    variance: Array

    def of(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and mean square per row and channel, each of shape (rows, channels)."""
        x = inputs.astype(np.float32) * np.float32(self.reading.scale) + np.float32(self.reading.offset)
        shape, config = self.reading.shape, self.reading.config
        if shape is not None and len(shape) != x.ndim:
            x = x.reshape(len(x), *(-1 if size is None else size for size in shape[1:]))
        if self.reading.class_name == "Dense":
            x = x @ self.kernel
        else:
            if config.get("data_format") == "channels_first":
                x = np.moveaxis(x, 1, -1)
            x = _convolved(x, self.kernel, config)
        if self.bias is not None:
            x = x + self.bias
        for name in self.activations:
            x = _ACTIVATIONS[name](x)
        x = x.reshape(len(x), -1, x.shape[-1])
        return x.mean(1, dtype=np.float64), np.square(x).mean(1, dtype=np.float64)


def first_statistics(source: Source, reading: Reading) -> Statistics | None:
    """The statistics of the first BatchNormalization behind a layer; None where there is none that can be computed."""
    graph = source_graph(source)
    layer = graph.calls[reading.call].layer
    weights = {weight.name: weight.tensor for weight in source.states[layer].weights}
    plain = graph.layers[layer].class_name in ("Dense", "Conv1D", "Conv2D", "Conv3D")
    if not plain or "kernel" not in weights or reading.moments is not None or reading.config.get("groups", 1) != 1:
        return None
    activations = [str(reading.config.get("activation") or "linear")]
    tensor = Ref(reading.call)
    while True:
        following = [call for call in graph.calls if tensor in refs(call.arguments)]
        if len(following) != 1:
            return None
        behind = graph.layers[following[0].layer]
        if behind.class_name == "BatchNormalization":
            break
        if behind.class_name in ("Activation", "ReLU"):
            activations.append("relu" if behind.class_name == "ReLU" else str(behind.config.get("activation")))
        elif not behind.class_name.endswith("Dropout"):
            return None
        tensor = Ref(graph.calls.index(following[0]))
    values = {weight.name: weight.tensor for weight in source.states[following[0].layer].weights}
    kernel = weights["kernel"].read().astype(np.float32)
    if not set(activations) <= _ACTIVATIONS.keys() or not {"moving_mean", "moving_variance"} <= values.keys():
        return None
    mean, variance = (values[name].read().astype(np.float64) for name in ("moving_mean", "moving_variance"))
    if mean.shape != kernel.shape[-1:] or not np.isfinite(mean).all() or not (variance >= 0).all():
        return None
    bias = weights["bias"].read().astype(np.float32) if "bias" in weights else None
    return Statistics(reading, kernel, bias, tuple(activations), mean, variance)


def _convolved(x: Array, kernel: Array, config: Mapping[str, Any]) -> Array:
    """A convolution of one to three dimensions, channels last, at some of its places."""
    rank = kernel.ndim - 2
    strides = integers(config.get("strides", 1), rank) or (1,) * rank
    dilation = integers(config.get("dilation_rate", 1), rank) or (1,) * rank
    spans = [(size - 1) * step + 1 for size, step in zip(kernel.shape[:rank], dilation, strict=True)]
    sides = x.shape[1:-1]
    padding = config.get("padding")
    if padding in ("same", "causal"):
        total = [
            max((-(-side // stride) - 1) * stride + span - side, 0)
            for side, stride, span in zip(sides, strides, spans, strict=True)
        ]
        before = [size if padding == "causal" else size // 2 for size in total]
        x = np.pad(x, [(0, 0), *((b, size - b) for b, size in zip(before, total, strict=True)), (0, 0)])
    places = [stride * max(1, side // stride // _PLACES) for stride, side in zip(strides, sides, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(1, rank + 1)))
    windows = windows[(slice(None), *(slice(None, None, step) for step in places))]
    windows = windows[(slice(None),) * (rank + 2) + tuple(slice(None, None, step) for step in dilation)]
    sizes = windows.shape[: rank + 1]
    # Windows come as (rows, places, channels, taps), kernels as (taps, channels, filters).
    flat = windows.reshape(math.prod(sizes), -1)
    return (flat @ np.moveaxis(kernel, rank, 0).reshape(-1, kernel.shape[-1])).reshape(*sizes, -1)
