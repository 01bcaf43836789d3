"""What each class of layer becomes: the layers of current Keras that compute the same, and their weights.

A rule takes a layer in the words of Keras 2 and gives one layer, or a chain of layers called one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kmerge.shapes.layers import canonical_class
from kmerge.upgrade import dropped, keras1, theano
from kmerge.upgrade.local import locally_connected
from kmerge.upgrade.part import LAYERS, Chain, Context, Part, Rule, cast, multiplied, operation, reshaped
from kmerge.upgrade.recurrent import recurrent_rules
from kmerge.upgrade.settings import HARD_SIGMOID, LATER, activation, is_known, kept_settings, plain_value


def upgrade_layer(part: Part, context: Context) -> Chain:
    """The layers of current Keras for one layer.

    Args:
        part: a layer as it stands in the file, with its weights in Keras's order.
        context: of the file; what cannot be told in current Keras is left in its `obstacles`.
    """
    if part.class_name in context.custom:
        module, registered = context.custom[part.class_name]
        return [Part(part.class_name.rpartition(">")[2], part.config, part.tensors, module, registered)]
    if part.module != LAYERS:
        context.refuse(part.class_name, "custom", "is none of Keras's own layers")
        return [part]
    if context.old and keras1.is_keras1(part.class_name, part.config):
        part = keras1.to_keras2(part, context)
    part = _with_plain_activations(part.called(canonical_class(part.class_name)))
    if context.theano:
        part = theano.unflipped(part)
    rule = _RULES.get(part.class_name)
    found = rule(part, context) if rule is not None else part
    chain = found if isinstance(found, list) else [found]
    return [_settled(item, context) for item in chain]


def _with_plain_activations(part: Part) -> Part:
    """Functions by name where tf.keras 2.13 and later write `{"class_name": "function", "config": "relu"}`."""
    named = {
        key: value["config"]
        for key in ("activation", "recurrent_activation")
        if isinstance(value := part.config.get(key), Mapping)
        and value.get("class_name") == "function"
        and isinstance(value.get("config"), str)
    }
    return part.having(**named) if named else part


def _settled(part: Part, context: Context) -> Part:
    """A layer with the settings that current Keras takes."""
    if part.registered is not None or part.module != "keras.layers":
        return part
    if not context.old and part.class_name in LATER:
        return part
    if not is_known(part.class_name):
        context.refuse(part.class_name, "custom", "is none of Keras's own layers")
        return part
    config = kept_settings(part.class_name, part.config, context)
    for key in ("activation", "recurrent_activation"):
        if key in config:
            config[key] = activation(config[key], context)
    return replace(part, config=config, registered=None)


# ------------------------------------------------------------------------------------------------ linear layers


def uses_hard_sigmoid(config: Mapping[str, Any], context: Context, key: str = "activation") -> bool:
    return context.old and plain_value(config.get(key)) == "hard_sigmoid"


def _linear(part: Part, context: Context) -> Part:
    """Kernel and bias in front of the old hard_sigmoid are multiplied by 1.2."""
    if uses_hard_sigmoid(part.config, context):
        first = 1 if part.class_name.startswith("Separable") else 0
        changed = [
            multiplied(tensor, HARD_SIGMOID, context) if place >= first else tensor
            for place, tensor in enumerate(part.tensors)
        ]
        part = part.weighing(*changed)
    return part


def _convolution(part: Part, context: Context) -> Chain:
    """Channels first is computed as channels last between two Permutes: TensorFlow knows it on few CPUs."""
    part = _linear(part, context)
    rank = _rank(part.class_name)
    if part.config.get("kernel_size") is not None and not isinstance(part.config["kernel_size"], list):
        part = part.having(kernel_size=[part.config["kernel_size"]] * rank)
    if part.class_name.endswith("Transpose"):
        chain = theano.transposed_convolution(part, rank, context) if context.old else [part]
    else:
        chain = theano.convolution(part, rank, context) if context.theano else [part]
    if not context.old or part.config.get("data_format") != "channels_first":
        return chain
    last = [item.having(data_format="channels_last") if "data_format" in item.config else item for item in chain]
    return [
        permute((*range(2, rank + 2), 1), "last"),
        *last,
        permute((rank + 1, *range(1, rank + 1)), "first"),
    ]


def _rank(class_name: str) -> int:
    return next(int(letter) for letter in class_name if letter.isdigit())


def permute(axes: tuple[int, ...], suffix: str) -> Part:
    return Part("Permute", {"dims": list(axes)}, suffix=f"channels_{suffix}")


# -------------------------------------------------------------------------------------------- other classes


def _batch_normalization(part: Part, context: Context) -> Chain:
    axis = part.config.get("axis", -1)
    if isinstance(axis, list) and len(axis) == 1:
        part = part.having(axis=axis[0])
    mode = part.config.get("mode", 0)
    if mode == 2:  # statistics of the batch, always
        part = replace(part, keywords={"training": True})
    elif mode == 1:
        return dropped.normalised_rows(part, context)
    return [part.without("mode")]


def _layer_normalization(part: Part, _: Context) -> Part:
    axis = part.config.get("axis", -1)
    return part.having(axis=axis[0]) if isinstance(axis, list) and len(axis) == 1 else part


def _leaky_relu(part: Part, _: Context) -> Part:
    if "negative_slope" in part.config:
        return part
    return part.having(negative_slope=plain_value(part.config.get("alpha", 0.3))).without("alpha")


def _thresholded_relu(part: Part, _: Context) -> Part:
    return part.called("ReLU").having(threshold=plain_value(part.config.get("theta", 1.0))).without("theta")


def _activation(part: Part, context: Context) -> Chain:
    if not uses_hard_sigmoid(part.config, context):
        return [part]
    settings = {"scale": HARD_SIGMOID, "offset": 0.0, "dtype": part.config.get("dtype", "float32")}
    return [Part("Rescaling", settings, suffix="scale"), part]


def _flatten(part: Part, context: Context) -> Part:
    """Before Keras 2.2 and without a data format, the numbers were flattened as they stood."""
    if context.old and part.config.get("data_format") is None:
        return part.having(data_format="channels_last")
    return part


def _normalization(part: Part, _: Context) -> Part:
    """The count of what it was adapted to is int32 today, and a single number."""
    tensors = list(part.tensors)
    if len(tensors) == 3:
        tensors[2] = cast(tensors[2], "int32")
        tensors[2] = reshaped(tensors[2], ()) if tensors[2].shape else tensors[2]
    axis = part.config.get("axis", -1)
    return part.having(axis=tuple(axis) if isinstance(axis, list) else axis).weighing(*tensors)


def _random(part: Part, _: Context) -> Part:
    """Layers that draw random numbers while training: the state of the old generators is not carried along."""
    return part.weighing()


def _resized_at_random(part: Part, context: Context) -> Part:
    context.note(f"'{context.layer}': {part.class_name} is gone from Keras; it only did something while training")
    return Part("Identity", {"dtype": part.config.get("dtype", "float32")})


def _attention(part: Part, context: Context) -> Part:
    if part.config.get("causal"):
        part = replace(part, keywords={"use_causal_mask": True})
    if part.config.get("score_mode") == "dot":  # the default, which Keras misreads from an .h5 file
        part = part.without("score_mode")
    return part.without("causal")


def _category_encoding(part: Part, _: Context) -> Part:
    mode = part.config.get("output_mode")
    tokens = part.config.get("num_tokens", part.config.get("max_tokens"))
    return part.having(output_mode="multi_hot" if mode == "binary" else mode, num_tokens=tokens)


def _lambda(part: Part, context: Context) -> Chain:
    found = context.replacements.get(context.layer.rpartition("/")[2]) or context.replacements.get(context.layer)
    if found is not None:
        return [
            Part(
                str(found["class_name"]),
                dict(found["config"]),
                (),
                str(found["module"]),
                str(found.get("registered_name") or found["class_name"]),
            )
        ]
    context.refuse("Lambda", "lambda", "holds Python bytecode, which is never run")
    return [Part("Identity", {})]


def _merge(part: Part, context: Context) -> Chain:
    """Keras 1's Merge, one class for what are several today."""
    mode = part.config.get("mode", "sum")
    classes = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum"}
    if mode in classes:
        return [Part(classes[mode], {})]
    if mode == "concat":
        return [Part("Concatenate", {"axis": part.config.get("concat_axis", -1)})]
    if mode in ("dot", "cos"):
        axes = part.config.get("dot_axes", -1)
        dot = Part("Dot", {"axes": axes, "normalize": mode == "cos"})
        return [dot, operation("ExpandDims", "numpy", axis=1)] if mode == "cos" else [dot]
    context.refuse("Merge", "lambda", "merges by a function of its own, which is never run")
    return [Part("Identity", {})]


def _zero_padding(part: Part, _: Context) -> Part:
    """Keras 1 has a dictionary by side."""
    padding = part.config.get("padding")
    if isinstance(padding, Mapping):
        sides = [("left_pad", "right_pad")] if "left_pad" in padding else [("top_pad", "bottom_pad")]
        if "top_pad" in padding:
            sides.append(("left_pad", "right_pad"))
        pairs = [[padding.get(low, 0), padding.get(high, 0)] for low, high in sides]
        return part.having(padding=pairs if len(pairs) > 1 else pairs[0])
    if isinstance(padding, list) and len(padding) == 4:
        top, bottom, left, right = padding
        return part.having(padding=[[top, bottom], [left, right]])
    return part


def _time_distributed(part: Part, context: Context) -> Chain:
    """What works on the last axes alone does so on each step without a wrapper."""
    entry = part.config.get("layer")
    name, config = (entry.get("class_name"), entry.get("config")) if isinstance(entry, Mapping) else (None, None)
    if not context.old or not isinstance(config, Mapping):
        return [part]
    if name in _DROPPED or (name == "BatchNormalization" and config.get("mode") == 1):
        return upgrade_layer(Part(str(name), {**config, "name": part.config.get("name")}, part.tensors), context)
    return [part]


_DROPPED: dict[str, Rule] = {
    "MaxoutDense": dropped.maxout_dense,
    "Highway": dropped.highway,
    "ParametricSoftplus": dropped.parametric_softplus,
    "SReLU": dropped.srelu,
}
_RULES: dict[str, Rule] = {
    **recurrent_rules(),
    **dict.fromkeys(("Dense", "EinsumDense"), _linear),
    **dict.fromkeys(
        [f"Conv{rank}D{kind}" for rank in (1, 2, 3) for kind in ("", "Transpose")]
        + [f"{kind}Conv{rank}D" for kind in ("Depthwise", "Separable") for rank in (1, 2)],
        _convolution,
    ),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), locally_connected),
    **dict.fromkeys(("BatchNormalization", "BatchNormalizationV1", "SyncBatchNormalization"), _batch_normalization),
    "LayerNormalization": _layer_normalization,
    "LeakyReLU": _leaky_relu,
    "ThresholdedReLU": _thresholded_relu,
    "Activation": _activation,
    "Flatten": _flatten,
    "Normalization": _normalization,
    "Attention": _attention,
    "AdditiveAttention": _attention,
    "CategoryEncoding": _category_encoding,
    "Lambda": _lambda,
    "Merge": _merge,
    "TimeDistributed": _time_distributed,
    **_DROPPED,
    **dict.fromkeys([f"{kind}Pooling{rank}D" for kind in ("Max", "Average") for rank in (1, 2, 3)], theano.pooling),
    **dict.fromkeys(("ZeroPadding1D", "ZeroPadding2D"), _zero_padding),
    **dict.fromkeys(
        [
            "Dropout",
            "SpatialDropout1D",
            "SpatialDropout2D",
            "SpatialDropout3D",
            "GaussianDropout",
            "GaussianNoise",
            "AlphaDropout",
            "RandomBrightness",
            "RandomContrast",
            "RandomCrop",
            "RandomFlip",
            "RandomRotation",
            "RandomTranslation",
            "RandomZoom",
        ],
        _random,
    ),
    **dict.fromkeys(("RandomHeight", "RandomWidth"), _resized_at_random),
}
