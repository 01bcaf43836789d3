"""Settings of current Keras's layers, and how the values of old ones are spelled today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kmerge.dialects.vocabulary import is_quantized, policy_name
from kmerge.upgrade.part import LAYERS, Context

_WEIGHTED = "kernel_initializer bias_initializer kernel_regularizer bias_regularizer kernel_constraint bias_constraint"
_CONV = f"filters kernel_size strides padding data_format dilation_rate groups activation use_bias {_WEIGHTED}"
_TRANSPOSE = (
    f"filters kernel_size strides padding output_padding data_format dilation_rate activation use_bias {_WEIGHTED}"
)
_DEPTHWISE = (
    "kernel_size strides padding depth_multiplier data_format dilation_rate activation use_bias depthwise_initializer "
    "bias_initializer depthwise_regularizer bias_regularizer depthwise_constraint bias_constraint"
)
_SEPARABLE = f"{_DEPTHWISE} filters pointwise_initializer pointwise_regularizer pointwise_constraint"
_CELL = (
    f"units activation use_bias {_WEIGHTED} recurrent_initializer recurrent_regularizer recurrent_constraint "
    "dropout recurrent_dropout seed"
)
_RNN = "return_sequences return_state go_backwards stateful unroll zero_output_for_mask"
_CONV_LSTM = (
    f"filters kernel_size strides padding data_format dilation_rate activation recurrent_activation use_bias "
    f"{_WEIGHTED} recurrent_initializer recurrent_regularizer recurrent_constraint unit_forget_bias dropout "
    "recurrent_dropout seed return_sequences return_state go_backwards stateful"
)
_AFFINE = (
    "center scale beta_initializer gamma_initializer beta_regularizer gamma_regularizer beta_constraint "
    "gamma_constraint"
)
_POOL = "pool_size strides padding data_format"
_LOOKUP = (
    "max_tokens num_oov_indices mask_token oov_token vocabulary idf_weights invert output_mode sparse pad_to_max_tokens"
)


def _each(pattern: str, keys: str) -> dict[str, str]:
    return {pattern.format(rank): keys for rank in (1, 2, 3)}


_SETTINGS: dict[str, str] = {
    "Activation": "activation",
    "ActivityRegularization": "l1 l2",
    "AdditiveAttention": "use_scale dropout",
    "AlphaDropout": "rate noise_shape seed",
    "Attention": "use_scale score_mode dropout seed",
    "BatchNormalization": f"axis momentum epsilon moving_mean_initializer moving_variance_initializer {_AFFINE} "
    "renorm renorm_clipping renorm_momentum synchronized",
    "Bidirectional": "layer merge_mode backward_layer",
    "CategoryEncoding": "num_tokens output_mode sparse",
    "CenterCrop": "height width data_format",
    "Concatenate": "axis",
    "Dense": f"units activation use_bias {_WEIGHTED}",
    "Discretization": "bin_boundaries num_bins epsilon output_mode sparse",
    "Dot": "axes normalize",
    "Dropout": "rate noise_shape seed",
    "ELU": "alpha",
    "EinsumDense": f"equation output_shape activation bias_axes {_WEIGHTED}",
    "Embedding": "input_dim output_dim embeddings_initializer embeddings_regularizer embeddings_constraint mask_zero",
    "Flatten": "data_format",
    "GRU": f"{_CELL} recurrent_activation reset_after {_RNN}",
    "GRUCell": f"{_CELL} recurrent_activation reset_after",
    "GaussianDropout": "rate seed",
    "GaussianNoise": "stddev seed",
    "GroupNormalization": f"groups axis epsilon {_AFFINE}",
    "HashedCrossing": "num_bins output_mode sparse",
    "Hashing": "num_bins mask_value salt output_mode sparse",
    "InputLayer": "batch_shape sparse ragged",
    "IntegerLookup": f"{_LOOKUP} vocabulary_dtype",
    "LSTM": f"{_CELL} recurrent_activation unit_forget_bias {_RNN}",
    "LSTMCell": f"{_CELL} recurrent_activation unit_forget_bias",
    "LayerNormalization": f"axis epsilon {_AFFINE}",
    "LeakyReLU": "negative_slope",
    "Masking": "mask_value",
    "MultiHeadAttention": f"num_heads key_dim value_dim dropout use_bias output_shape attention_axes {_WEIGHTED} seed",
    "Normalization": "axis mean variance invert",
    "PReLU": "alpha_initializer alpha_regularizer alpha_constraint shared_axes",
    "Permute": "dims",
    "RNN": f"cell {_RNN}",
    "RandomBrightness": "factor value_range seed",
    "RandomContrast": "factor value_range seed",
    "RandomCrop": "height width seed data_format",
    "RandomFlip": "mode seed data_format",
    "RandomRotation": "factor fill_mode interpolation seed fill_value data_format",
    "RandomTranslation": "height_factor width_factor fill_mode interpolation seed fill_value data_format",
    "RandomZoom": "height_factor width_factor fill_mode interpolation seed fill_value data_format",
    "ReLU": "max_value negative_slope threshold",
    "RepeatVector": "n",
    "Rescaling": "scale offset",
    "Reshape": "target_shape",
    "Resizing": "height width interpolation crop_to_aspect_ratio pad_to_aspect_ratio antialias data_format",
    "SimpleRNN": f"{_CELL} {_RNN}",
    "SimpleRNNCell": _CELL,
    "Softmax": "axis",
    "SpatialDropout1D": "rate seed",
    "SpatialDropout2D": "rate seed data_format",
    "SpatialDropout3D": "rate seed data_format",
    "SpectralNormalization": "layer power_iterations",
    "StackedRNNCells": "cells",
    "StringLookup": f"{_LOOKUP} encoding",
    "TextVectorization": "max_tokens standardize split ngrams output_mode output_sequence_length pad_to_max_tokens "
    "vocabulary idf_weights sparse ragged encoding",
    "TimeDistributed": "layer",
    "UnitNormalization": "axis",
    "UpSampling1D": "size",
    "UpSampling2D": "size data_format interpolation",
    "UpSampling3D": "size data_format",
    "ZeroPadding1D": "padding",
    "ZeroPadding2D": "padding data_format",
    "ZeroPadding3D": "padding data_format",
    "Cropping1D": "cropping",
    "Cropping2D": "cropping data_format",
    "Cropping3D": "cropping data_format",
    **dict.fromkeys(("Add", "Average", "Identity", "Maximum", "Minimum", "Multiply", "Subtract"), ""),
    **_each("Conv{}D", _CONV),
    **_each("Conv{}DTranspose", _TRANSPOSE),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _DEPTHWISE),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _SEPARABLE),
    **_each("ConvLSTM{}D", _CONV_LSTM),
    **_each("MaxPooling{}D", _POOL),
    **_each("AveragePooling{}D", _POOL),
    **_each("GlobalMaxPooling{}D", "data_format keepdims"),
    **_each("GlobalAveragePooling{}D", "data_format keepdims"),
}
"""Arguments of current Keras's layers that old ones may have; every layer has those of `_ALL` too."""

_ALL = frozenset({"name", "trainable", "dtype", "activity_regularizer"})
_SETTLED = frozenset(
    [
        "batch_input_shape",
        "input_dtype",
        "input_shape",
        "input_dim",
        "input_length",
        "time_major",
        "implementation",
        "groups",
        "kernel_initializer",
        "kernel_regularizer",
        "kernel_constraint",
        "query_shape",
        "key_shape",
        "value_shape",
        "fused",
        "virtual_batch_size",
        "adjustment",
        "noise_shape",
        "data_format",
        "ragged",
        "sparse",
        "name_scope",
        "_keras_api_names",
        "_keras_api_names_v1",
        "input_spec",
        "dilation_rate",
        "unroll",
        "implementation",
        "output_padding",
        "build_input_shape",
        "max_tokens",
        "mode",
        "dropout",
    ]
)
"""Settings that may be left out unsaid: they repeat others, or say what is the same by default."""

LATER = frozenset(
    [
        "AdaptiveAveragePooling1D",
        "AdaptiveAveragePooling2D",
        "AdaptiveAveragePooling3D",
        "AdaptiveMaxPooling1D",
        "AdaptiveMaxPooling2D",
        "AdaptiveMaxPooling3D",
        "AugMix",
        "AutoContrast",
        "CutMix",
        "Equalization",
        "MelSpectrogram",
        "MixUp",
        "RMSNormalization",
        "RandAugment",
        "RandomColorDegeneration",
        "RandomColorJitter",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomGaussianBlur",
        "RandomGrayscale",
        "RandomHue",
        "RandomInvert",
        "RandomPerspective",
        "RandomPosterization",
        "RandomSaturation",
        "RandomSharpness",
        "RandomShear",
        "STFTSpectrogram",
        "Solarization",
    ]
)
"""Layers that Keras 3 added, whose configurations need no change."""

MODELS = ("Sequential", "Functional", "Model")


def is_known(class_name: str) -> bool:
    """Whether current Keras has a layer of that name, or this part knows what stands for it."""
    return class_name in _SETTINGS


def current_keys(class_name: str) -> frozenset[str]:
    """Settings of one of current Keras's layers."""
    return (_ALL - _NOT_TAKEN.get(class_name, frozenset())) | frozenset(_SETTINGS[class_name].split())


_NOT_TAKEN = {
    name: frozenset({"trainable", "activity_regularizer"})
    for name in (
        "SpatialDropout1D",
        "SpatialDropout2D",
        "SpatialDropout3D",
        "Discretization",
        "HashedCrossing",
        "InputLayer",
    )
}
"""What these classes do not take of what every other layer does."""


def kept_settings(class_name: str, config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """A configuration without what current Keras does not take; what would have mattered is noted."""
    allowed = current_keys(class_name)
    kept = {}
    for key, value in config.items():
        value = plain_value(value)
        if key in allowed:
            kept[key] = value
        elif value not in (None, False, [], {}) and key not in _SETTLED:
            context.note(f"'{context.layer}' ({class_name}): {key}={value!r} has no counterpart and was left out")
    if kept.get("activity_regularizer") is None:
        kept.pop("activity_regularizer", None)
    for key in ("data_format", "groups"):
        if kept.get(key, ...) is None:
            del kept[key]
    if not kept.get("ragged", True):
        del kept["ragged"]
    if isinstance(kept.get("dtype"), Mapping) and not is_quantized(kept):
        kept["dtype"] = policy_name(kept["dtype"]) or "float32"
    for key in list(kept):
        if key.endswith("_initializer"):
            kept[key] = initializer(kept[key], context)
        elif key.endswith("_regularizer"):
            kept[key] = regularizer(kept[key], context)
        elif key.endswith("_constraint"):
            kept[key] = constraint(kept[key], context)
    return kept


def plain_value(value: Any) -> Any:
    """A number that was saved as an array: `{"type": "ndarray", "value": 0.3}`."""
    if isinstance(value, Mapping) and value.get("type") == "ndarray" and "value" in value:
        return value["value"]
    return value


# ---------------------------------------------------------------------------------- initialisers and the like

_INITIALIZERS = {
    "Zeros": "",
    "Ones": "",
    "Constant": "value",
    "RandomNormal": "mean stddev seed",
    "RandomUniform": "minval maxval seed",
    "TruncatedNormal": "mean stddev seed",
    "VarianceScaling": "scale mode distribution seed",
    "Orthogonal": "gain seed",
    "Identity": "gain",
    **dict.fromkeys(
        ("GlorotUniform", "GlorotNormal", "HeUniform", "HeNormal", "LecunUniform", "LecunNormal"),
        "seed",
    ),
}
_SHORT = {
    "zero": "Zeros",
    "zeros": "Zeros",
    "one": "Ones",
    "ones": "Ones",
    "constant": "Constant",
    "normal": "RandomNormal",
    "random_normal": "RandomNormal",
    "uniform": "RandomUniform",
    "random_uniform": "RandomUniform",
    "truncated_normal": "TruncatedNormal",
    "orthogonal": "Orthogonal",
    "identity": "Identity",
    "glorot_uniform": "GlorotUniform",
    "glorot_normal": "GlorotNormal",
    "he_uniform": "HeUniform",
    "he_normal": "HeNormal",
    "lecun_uniform": "LecunUniform",
    "lecun_normal": "LecunNormal",
    "variance_scaling": "VarianceScaling",
}


def _object(module: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"module": module, "class_name": class_name, "config": dict(config), "registered_name": None}


def initializer(value: Any, context: Context) -> Any:
    """An initialiser of current Keras. It says how training began, so that an unknown one is let go."""
    name, config = (value, {}) if isinstance(value, str) else _named(value)
    if name is None:
        return "zeros"
    name = _SHORT.get(name, name)
    known = _INITIALIZERS.get(name)
    if known is None:
        context.note(f"'{context.layer}': the initialiser '{name}' is none of Keras's own and was left out")
        return "zeros"
    config = {key: item for key, item in config.items() if key in known.split()}
    if config.get("distribution") == "normal":
        config["distribution"] = "truncated_normal"
    return _object("keras.initializers", name, config)


def _named(value: Any) -> tuple[str | None, dict[str, Any]]:
    if isinstance(value, Mapping):
        config = value.get("config")
        if isinstance(value.get("class_name"), str):
            return value["class_name"], dict(config) if isinstance(config, Mapping) else {}
        if isinstance(value.get("name"), str):  # Keras 1: settings beside the name
            return value["name"], {key: item for key, item in value.items() if key != "name"}
    return (value, {}) if isinstance(value, str) else (None, {})


def regularizer(value: Any, context: Context) -> Any:
    """A regulariser of current Keras; only training needs it."""
    name, config = _named(value)
    if name is None:
        return None
    if name in ("L1", "L2", "L1L2", "WeightRegularizer", "L1L2Regularizer", "l1", "l2", "l1_l2"):
        amounts = {key: float(plain_value(config.get(key)) or 0.0) for key in ("l1", "l2")}
        if not config and name.lower() in ("l1", "l2", "l1_l2"):
            amounts = {key: 0.01 if key in name.lower() else 0.0 for key in ("l1", "l2")}
        return _object("keras.regularizers", "L1L2", amounts)
    if name == "OrthogonalRegularizer":
        return _object("keras.regularizers", name, config)
    context.note(f"'{context.layer}': the regulariser '{name}' is none of current Keras's and was left out")
    return None


_CONSTRAINTS = {
    "MaxNorm": "max_value axis",
    "MinMaxNorm": "min_value max_value rate axis",
    "NonNeg": "",
    "UnitNorm": "axis",
}
_CONSTRAINT_NAMES = {
    "maxnorm": "MaxNorm",
    "max_norm": "MaxNorm",
    "nonneg": "NonNeg",
    "non_neg": "NonNeg",
    "unitnorm": "UnitNorm",
    "unit_norm": "UnitNorm",
    "min_max_norm": "MinMaxNorm",
}


def constraint(value: Any, context: Context) -> Any:
    """A constraint of current Keras; only training needs it."""
    name, config = _named(value)
    if name is None:
        return None
    name = _CONSTRAINT_NAMES.get(name, name)
    known = _CONSTRAINTS.get(name)
    if known is None:
        context.note(f"'{context.layer}': the constraint '{name}' is none of current Keras's and was left out")
        return None
    config = {{"m": "max_value", "low": "min_value", "high": "max_value"}.get(key, key): v for key, v in config.items()}
    return _object("keras.constraints", name, {key: item for key, item in config.items() if key in known.split()})


# ------------------------------------------------------------------------------------------------- activations

ACTIVATIONS = frozenset(
    [
        "linear",
        "relu",
        "relu6",
        "sigmoid",
        "tanh",
        "softmax",
        "softplus",
        "softsign",
        "elu",
        "selu",
        "exponential",
        "gelu",
        "swish",
        "silu",
        "mish",
        "leaky_relu",
        "hard_sigmoid",
        "log_softmax",
        "hard_silu",
        "hard_swish",
    ]
)


HARD_SIGMOID = 1.2
"""Keras 1 and 2 compute hard_sigmoid as clip(0.2 x + 0.5), current Keras as clip(x / 6 + 0.5): 0.2 x = 1.2 x / 6."""

OLD_HARD_SIGMOID: dict[str, Any] = {
    "module": "keras",
    "class_name": "Sequential",
    "config": {
        "name": "old_hard_sigmoid",
        "layers": [
            {
                "module": "keras.layers",
                "class_name": "Rescaling",
                "config": {"name": "scale", "scale": HARD_SIGMOID, "offset": 0.0},
                "registered_name": None,
            },
            {
                "module": "keras.layers",
                "class_name": "Activation",
                "config": {"name": "clip", "activation": "hard_sigmoid"},
                "registered_name": None,
            },
        ],
    },
    "registered_name": None,
}
"""The old function where it is applied to a state that no weight can scale: an LSTM's cell."""


def activation(value: Any, context: Context) -> Any:
    """An activation function of current Keras: its name, or an object's entry."""
    value = plain_value(value)
    if value is None:
        return "linear"
    if isinstance(value, str):
        if value in ACTIVATIONS:
            return {"swish": "silu", "hard_swish": "hard_silu"}.get(value, value)
        if value in context.custom:
            return _custom(value, "function", value, context)
        context.refuse(value, "custom", f"uses the activation '{value}', which is none of Keras's own")
        return "linear"
    if value == OLD_HARD_SIGMOID or not context.old:
        return value
    name, config = _named(value)
    if name in ("LeakyReLU", "ReLU", "ELU", "Softmax", "ThresholdedReLU"):
        if name == "LeakyReLU":
            config = {"negative_slope": plain_value(config.get("negative_slope", config.get("alpha", 0.3)))}
        if name == "ThresholdedReLU":
            name, config = "ReLU", {"threshold": plain_value(config.get("theta", 1.0))}
        kept = {key: plain_value(item) for key, item in config.items() if key in current_keys(name)}
        return _object(LAYERS, name, {key: item for key, item in kept.items() if key != "dtype"})
    if name == "function" and isinstance(value.get("config"), str):
        return activation(value["config"], context)
    if name is not None and name in context.custom:
        return _custom(name, name, config, context)
    context.refuse(str(name), "custom", f"uses the activation '{name}', which is none of Keras's own")
    return "linear"


def _custom(name: str, class_name: str, config: Any, context: Context) -> dict[str, Any]:
    module, registered = context.custom[name]
    return {"module": module, "class_name": class_name, "config": config, "registered_name": registered}
