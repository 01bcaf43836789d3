"""Output shapes by class of layer, from configurations of Keras 2, tf.keras and Keras 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kmerge.shapes.calls import Inputs
from kmerge.shapes.recurrent import GATES, conv_lstm, recurrent
from kmerge.shapes.values import (
    Shape,
    Size,
    as_shape,
    axes,
    integer,
    integers,
    items,
    merged,
    names,
    pairs,
    product,
    replaced,
)
from kmerge.shapes.windows import conv, conv_transpose, depthwise, pooling

Config = Mapping[str, Any]
Rule = Callable[[Config, Inputs], "Shape | list[Shape | None] | None"]

_ALIAS = re.compile(
    r"(?P<start>(Depthwise|Separable)?Conv)olution(?P<end>[123]D(Transpose)?)|(?P<pool>\w+Pool)(?P<rank>[123]D)"
)


def canonical_class(class_name: str) -> str:
    """The name under which Keras saves a class: `Convolution2D` -> `Conv2D`, `MaxPool2D` -> `MaxPooling2D`."""
    found = _ALIAS.fullmatch(class_name)
    if not found:
        return class_name
    if found["pool"]:
        return f"{found['pool'].replace('Avg', 'Average')}ing{found['rank']}"
    return found["start"] + found["end"]


def is_keras(class_name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a layer's entry means the class of that name in Keras, not a custom one."""
    module, registered = entry.get("module"), entry.get("registered_name")
    if isinstance(registered, str) and ">" in registered:
        return False
    return not isinstance(module, str) or re.match(r"(keras|tf_keras|tensorflow)(\.|$)", module) is not None


def layer_outputs(class_name: str, config: Config, inputs: Inputs) -> list[Shape | None]:
    """Shapes of the outputs of one of Keras's layers; one unknown shape for a class that is not known."""
    rule = _RULES.get(canonical_class(class_name))
    found = rule(config, inputs) if rule is not None else None
    return found if isinstance(found, list) else [found]


def operation_outputs(class_name: str, config: Config, inputs: Inputs) -> list[Shape | None]:
    """Shapes of the outputs of a bare operation: element-wise ones only, as Keras 3 records the others."""
    name = class_name.lower()
    if class_name == "TFOpLambda":
        name = str(config.get("function", "")).rsplit(".", 1)[-1].replace("_", "")
    unary, binary = name in _UNARY, name in _BINARY
    values = [*inputs.positional, *(inputs.keywords[key] for key in ("x", "x1", "x2", "y") if key in inputs.keywords)]
    shapes: list[Shape | None] = []
    for value in values[: 2 if binary else 1]:
        tensor = Inputs((value,), {}, inputs.known).shapes
        if tensor:
            shapes += tensor
        elif not isinstance(value, (int, float)):
            return [None]
    return [merged(shapes) if unary or binary else None]


_UNARY = names(
    """abs absolute cast ceil clip cos elu erf exp floor gelu hardsigmoid hardswish identity leakyrelu log log10 log1p
    logsigmoid negative neg relu relu6 round rsqrt selu sigmoid sign silu sin softmax softplus softsign sqrt square
    stopgradient swish tanh"""
)
_BINARY = names(
    """add addv2 divide floordivide floordiv maximum minimum mod mul multiply power pow realdiv sub subtract truediv
    truedivide"""
)


def inner_layer(config: Config, key: str = "layer") -> tuple[str, Config] | None:
    """Class and configuration of the layer in a wrapper; no name for a custom class."""
    entry = config.get(key)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
        return None
    inner = entry.get("config")
    if isinstance(inner, list):  # a Sequential of Keras 2.1 and before
        inner = {"layers": inner}
    if not isinstance(inner, Mapping):
        return None
    return (entry["class_name"] if is_keras(entry["class_name"], entry) else ""), inner


def chain(config: Config) -> list[tuple[str, Config]] | None:
    """The layers of a Sequential in a wrapper."""
    layers = [inner_layer({"layer": entry}) for entry in items(config.get("layers")) or ()]
    found = [layer for layer in layers if layer is not None and layer[0] != "InputLayer"]
    return found if None not in layers else None


def _same(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    return inputs.shapes if len(inputs.shapes) > 1 else inputs.first


def _first(config: Config, inputs: Inputs) -> Shape | None:
    return inputs.first


def _input(config: Config, inputs: Inputs) -> Shape | None:
    return as_shape(config.get("batch_shape", config.get("batch_input_shape")))


def _dense(config: Config, inputs: Inputs) -> Shape | None:
    shape, units = inputs.first, integer(config.get("units"))
    return (*shape[:-1], units) if shape and units is not None else None


def _einsum_dense(config: Config, inputs: Inputs) -> Shape | None:
    shape, labels = inputs.first, einsum(config)
    sizes = items(config.get("output_shape"))
    given = as_shape([config.get("output_shape")] if sizes is None else sizes)
    if not shape or labels is None or given is None:
        return None
    source, _, target, left = labels
    elided = len(shape) - len(source)
    if elided < 0 or (elided and left is None):
        return None
    if left:
        full = shape[:elided] + (given if elided else (shape[0], *given))
        known = dict(zip(source, shape[elided:], strict=True))
        labelled = [*[None] * elided, *target]
    else:
        full = (shape[0], *given, *shape[len(shape) - elided :])
        known = dict(zip(source, shape, strict=False))
        labelled = [*target, *[None] * elided]
    if len(full) != len(labelled):
        return None
    # Keras leaves a size open that is given as None; the input knows it.
    return tuple(known.get(name) if size is None and name else size for size, name in zip(full, labelled, strict=True))


def einsum(config: Config) -> tuple[str, str, str, bool | None] | None:
    """Labels of input, kernel and output of an EinsumDense, and where "..." stands: left, not left, nowhere (None)."""
    equation = config.get("equation")
    letters = "([a-zA-Z]+)"
    if not isinstance(equation, str):
        return None
    equation = equation.replace(" ", "")
    for pattern, left in (
        (f"{letters},{letters}->{letters}", None),
        (rf"\.\.\.{letters},{letters}->\.\.\.{letters}", True),
        (rf"{letters}\.\.\.,{letters}->{letters}\.\.\.", False),
    ):
        found = re.fullmatch(pattern, equation)
        if found:
            return found[1], found[2], found[3], left
    return None


def _embedding(config: Config, inputs: Inputs) -> Shape | None:
    shape, depth = inputs.first, integer(config.get("output_dim"))
    if shape is None or depth is None:
        return None
    if inputs.argument("reverse", 1) is True:  # ReversibleEmbedding: from vectors back to words
        words = integer(config.get("input_dim"))
        return (*shape[:-1], words) if shape and words is not None else None
    return (*shape, depth)


def _global_pooling(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    shape, found = inputs.first, axes(inputs.first, rank, config)
    if shape is None or found is None or len(shape) != rank + 2:
        return None
    spatial, channel = found
    if config.get("keepdims"):
        return replaced(shape, dict.fromkeys(spatial, 1))
    return (shape[0], shape[channel])


def _adaptive_pooling(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    shape, found = inputs.first, axes(inputs.first, rank, config)
    sizes = integers(config.get("output_size"), rank)
    if shape is None or found is None or sizes is None:
        return None
    return replaced(shape, dict(zip(found[0], sizes, strict=True)))


def _up_sampling(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    shape, found = inputs.first, axes(inputs.first, rank, config)
    factors = integers(config.get("size"), rank)
    if shape is None or found is None or factors is None:
        return None
    return replaced(
        shape, {axis: product((shape[axis], factor)) for axis, factor in zip(found[0], factors, strict=True)}
    )


def _resize(key: str, sign: int, rank: int, config: Config, inputs: Inputs) -> Shape | None:
    """ZeroPadding (`sign` 1) and Cropping (-1)."""
    shape, found = inputs.first, axes(inputs.first, rank, config)
    sides = pairs(config.get(key), rank)
    if shape is None or found is None or sides is None:
        return None
    changes: dict[int, Size] = {}
    for axis, side in zip(found[0], sides, strict=True):
        size = shape[axis]
        changes[axis] = None if size is None else size + sign * sum(side)
    if any(size is not None and size <= 0 for size in changes.values()):
        return None
    return replaced(shape, changes)


def _image_size(config: Config, inputs: Inputs) -> Shape | None:
    """Resizing, CenterCrop, RandomCrop; RandomHeight and RandomWidth leave their size open."""
    shape = inputs.first
    if shape is None or len(shape) not in (3, 4):
        return None
    found = axes(shape if len(shape) == 4 else (None, *shape), 2, config)
    height, width = integer(config.get("height")), integer(config.get("width"))
    if found is None or height is None or width is None:
        return None
    offset = 4 - len(shape)
    return replaced(shape, {found[0][0] - offset: height, found[0][1] - offset: width})


def _random_size(axis: int, config: Config, inputs: Inputs) -> Shape | None:
    return replaced(inputs.first, {len(inputs.first) + axis: None}) if inputs.first and len(inputs.first) > 2 else None


def _flatten(config: Config, inputs: Inputs) -> Shape | None:
    return (inputs.first[0], product(inputs.first[1:])) if inputs.first else None


def _reshape(config: Config, inputs: Inputs) -> Shape | None:
    target = items(config.get("target_shape"))
    if target is None or any(size is not None and integer(size, -1) is None for size in target):
        return None
    batch = inputs.first[0] if inputs.first else None
    total = product(inputs.first[1:]) if inputs.first else None
    rest = product(None if size == -1 else size for size in target if size != -1)
    if target.count(-1) > 1:
        return None
    if total is None or rest is None:
        return (batch, *(None if size == -1 else size for size in target))
    if -1 not in target:
        return (batch, *target) if total == rest else None
    if rest == 0 or total % rest:
        return None
    return (batch, *(total // rest if size == -1 else size for size in target))


def _permute(config: Config, inputs: Inputs) -> Shape | None:
    shape, order = inputs.first, items(config.get("dims"))
    if not shape or order is None or any(integer(axis) is None for axis in order):
        return None
    return (shape[0], *(shape[axis] for axis in order)) if sorted(order) == list(range(1, len(shape))) else None


def _repeat(config: Config, inputs: Inputs) -> Shape | None:
    shape, times = inputs.first, integer(config.get("n"))
    return (shape[0], times, shape[1]) if shape is not None and len(shape) == 2 and times is not None else None


def _elementwise(config: Config, inputs: Inputs) -> Shape | None:
    """Add, Multiply, ...: Keras would leave a size open where one input does, which broadcasting need not."""
    shapes = inputs.shapes
    tail = merged(shapes, 1)
    batches = {shape[0] for shape in shapes if shape} - {None}
    if tail is None or not all(shapes):
        return None
    return (batches.pop() if len(batches) == 1 else None, *tail)


def _concatenate(config: Config, inputs: Inputs) -> Shape | None:
    shapes = [shape for shape in inputs.shapes if shape]
    axis = config.get("axis", -1)
    if not shapes or len(shapes) != len(inputs.shapes) or integer(axis, -len(shapes[0])) is None:
        return None
    rank = len(shapes[0])
    if axis >= rank or any(len(shape) != rank for shape in shapes):
        return None
    sizes: list[Size] = []
    for number, column in enumerate(zip(*shapes, strict=True)):
        known = [size for size in column if size is not None]
        if number == axis % rank:
            sizes.append(sum(known) if len(known) == len(column) else None)
        elif len(set(known)) > 1:
            return None
        else:
            sizes.append(known[0] if known else None)
    return tuple(sizes)


def _dot(config: Config, inputs: Inputs) -> Shape | None:
    shapes = inputs.shapes
    if len(shapes) != 2 or not shapes[0] or not shapes[1]:
        return None
    given = config.get("axes")
    chosen = [given, given] if integer(given, -10) is not None else items(given)
    if chosen is None or len(chosen) != 2:
        return None
    rest: list[Size] = [shapes[0][0]]
    for shape, axis in zip((shapes[0], shapes[1]), chosen, strict=True):
        if integer(axis, -len(shape)) is None or axis >= len(shape) or axis % len(shape) == 0:
            return None
        rest += [size for number, size in enumerate(shape) if number not in (0, axis % len(shape))]
    return tuple(rest) if len(rest) > 1 else (rest[0], 1)


def _attention(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    """Attention and AdditiveAttention, called on [query, value] or [query, value, key]."""
    shapes = inputs.shapes
    if len(shapes) < 2 or not shapes[0] or not shapes[1] or len(shapes[1]) < 2:
        return None
    output = (*shapes[0][:-1], shapes[1][-1])
    if inputs.keywords.get("return_attention_scores") is True:
        return [output, (*shapes[0][:-1], shapes[1][-2])]
    return output


def _multi_head(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    query, value = inputs.tensor("query", 0), inputs.tensor("value", 1)
    if not query:
        return None
    output: Shape | None = query
    if config.get("output_shape") is not None:
        given = config["output_shape"]
        last = as_shape([given] if integer(given) is not None else given)
        output = (*query[:-1], *last) if last else None
    if inputs.keywords.get("return_attention_scores") is not True:
        return output
    heads = integer(config.get("num_heads", config.get("num_query_heads")))
    if heads is None or value is None or len(query) != 3 or len(value) != 3:
        return [output, None]
    return [output, (query[0], heads, query[1], value[1])]


def _lambda(config: Config, inputs: Inputs) -> Shape | None:
    shape = as_shape(config.get("output_shape"))
    return (inputs.first[0] if inputs.first else None, *shape) if shape is not None else None


def _encoded(depth: Callable[[Config], Size], config: Config, inputs: Inputs) -> Shape | None:
    """Preprocessing layers that number their inputs or encode the numbers as vectors of `depth`."""
    shape, mode = inputs.first, config.get("output_mode", "int")
    if shape is None or mode == "int":
        return shape
    if mode == "one_hot" and not (len(shape) > 1 and shape[-1] == 1):
        return (*shape, depth(config))
    return (*shape[:-1], depth(config))


def _tokens(config: Config) -> Size:
    return integer(config.get("num_tokens", config.get("max_tokens")))


def _bins(config: Config) -> Size:
    boundaries = items(config.get("bin_boundaries"))
    return integer(config.get("num_bins")) if boundaries is None else len(boundaries) + 1


def _words(config: Config) -> Size:
    return integer(config.get("max_tokens" if config.get("pad_to_max_tokens") else "vocabulary_size"))


def _categories(config: Config, inputs: Inputs) -> Shape | None:
    return _encoded(_tokens, {"output_mode": "multi_hot", **config}, inputs)


def _discretization(config: Config, inputs: Inputs) -> Shape | None:
    shape = inputs.first
    if config.get("output_mode") in ("multi_hot", "count") and (shape is None or len(shape) > 2):
        return None  # Keras's own answers differ
    return _encoded(_bins, config, inputs)


def _hashing(config: Config, inputs: Inputs) -> Shape | None:
    if config.get("output_mode", "int") == "int":
        return inputs.first
    return (*inputs.first[:-1], integer(config.get("num_bins"))) if inputs.first else None


def _crossing(config: Config, inputs: Inputs) -> Shape | None:
    return _encoded(lambda values: integer(values.get("num_bins")), config, inputs)


def _text(config: Config, inputs: Inputs) -> Shape | None:
    shape, mode = inputs.first, config.get("output_mode", "int")
    if not shape or config.get("ragged"):
        return None
    if mode == "int":
        return (shape[0], integer(config.get("output_sequence_length")))
    split = (*shape, None) if config.get("split") is not None else shape if len(shape) > 1 else (*shape, 1)
    return (*split[:-1], _words(config)) if len(split) <= 2 else (*split[:1], _words(config))


def _bidirectional(config: Config, inputs: Inputs) -> list[Shape | None]:
    """Outputs joined along the last axis, combined, or side by side; then the states of both directions."""
    inner, mode = inner_layer(config), config.get("merge_mode", "concat")
    if inner is None or mode not in ("concat", "sum", "mul", "ave", None):
        return [None]
    first, *states = layer_outputs(*inner, inputs)
    if mode == "concat" and first is not None:
        first = (*first[:-1], product((2, first[-1])))
    return [first] * (2 if mode is None else 1) + states * 2


def _time_distributed(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    shape, inner = inputs.first, inner_layer(config)
    if shape is None or len(shape) < 2 or inner is None:
        return None
    found = layer_outputs(*inner, Inputs.of((shape[0], *shape[2:])))
    return [(output[0], shape[1], *output[1:]) if output else None for output in found]


def _sequential(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    layers = chain(config)
    if layers is None:
        return None
    outputs: list[Shape | None] = [inputs.first]
    for layer in layers:
        if len(outputs) != 1:
            return None
        outputs = layer_outputs(*layer, Inputs.of(outputs[0]))
    return outputs


def _wrapped(config: Config, inputs: Inputs) -> Shape | list[Shape | None] | None:
    inner = inner_layer(config)
    return layer_outputs(*inner, inputs) if inner is not None else None


UNCHANGED = names(
    """Activation ActivityRegularization AlphaDropout BatchNormalization BatchNormalizationV1 Dropout ELU
    GaussianDropout GaussianNoise GroupNormalization LayerNormalization LeakyReLU Masking Normalization PReLU
    RMSNormalization ReLU Rescaling Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D SyncBatchNormalization
    ThresholdedReLU UnitNormalization AugMix AutoContrast ContrastLimitedAdaptiveHistogramEqualization CutMix
    Equalization MixUp RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast
    RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert
    RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear
    RandomTranslation RandomZoom Solarization"""
)
"""Layers whose output has the shape of their first input."""

_RULES: dict[str, Rule] = {
    **dict.fromkeys(UNCHANGED, _first),
    "Identity": _same,
    "InputLayer": _input,
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "Embedding": _embedding,
    "ReversibleEmbedding": _embedding,
    "Resizing": _image_size,
    "CenterCrop": _image_size,
    "RandomCrop": _image_size,
    "RandomHeight": partial(_random_size, -3),
    "RandomWidth": partial(_random_size, -2),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": _repeat,
    **dict.fromkeys(("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract"), _elementwise),
    "Concatenate": _concatenate,
    "Dot": _dot,
    "Attention": _attention,
    "AdditiveAttention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _multi_head,
    "Lambda": _lambda,
    "CategoryEncoding": _categories,
    "Discretization": _discretization,
    "Hashing": _hashing,
    "HashedCrossing": _crossing,
    "StringLookup": partial(_encoded, _words),
    "IntegerLookup": partial(_encoded, _words),
    "TextVectorization": _text,
    **{name: partial(recurrent, name) for name in (*GATES, "RNN")},
    "Bidirectional": _bidirectional,
    "TimeDistributed": _time_distributed,
    "SpectralNormalization": _wrapped,
    "Sequential": _sequential,
    "Pipeline": _sequential,
}
for _rank in (1, 2, 3):
    _RULES |= {
        f"Conv{_rank}D": partial(conv, _rank),
        f"SeparableConv{_rank}D": partial(conv, _rank),
        f"DepthwiseConv{_rank}D": partial(depthwise, _rank),
        f"Conv{_rank}DTranspose": partial(conv_transpose, _rank),
        f"LocallyConnected{_rank}D": partial(conv, _rank),
        f"ConvLSTM{_rank}D": partial(conv_lstm, _rank),
        f"MaxPooling{_rank}D": partial(pooling, _rank),
        f"AveragePooling{_rank}D": partial(pooling, _rank),
        f"GlobalMaxPooling{_rank}D": partial(_global_pooling, _rank),
        f"GlobalAveragePooling{_rank}D": partial(_global_pooling, _rank),
        f"AdaptiveMaxPooling{_rank}D": partial(_adaptive_pooling, _rank),
        f"AdaptiveAveragePooling{_rank}D": partial(_adaptive_pooling, _rank),
        f"UpSampling{_rank}D": partial(_up_sampling, _rank),
        f"ZeroPadding{_rank}D": partial(_resize, "padding", 1, _rank),
        f"Cropping{_rank}D": partial(_resize, "cropping", -1, _rank),
    }
