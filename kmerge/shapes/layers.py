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
