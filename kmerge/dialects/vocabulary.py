"""What kmerge knows of Keras's own layer classes: their weights, their state, and what a configuration may differ in.

Nothing here is needed to carry a layer through a merge: an unknown class is an opaque carrier of weights. It is needed
to tell statistics and state from weights, to give weights their names, and to split the weights that an old `.h5` file
stores under one nested model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class WeightKind(StrEnum):
    """How a weight is combined when its layer is shared."""

    WEIGHT = "weight"
    """By the merge method."""
    MEAN = "mean"
    """Mean of a population of activations: pooled."""
    VARIANCE = "variance"
    """Variance of the same population: pooled, with the spread of the means."""
    STATE = "state"
    """Counters, seeds, vectors of a power iteration: taken from one source."""
    LEARNED = "learned"
    """State adapted to data (normalisation, vocabulary): shared only where it is equal."""


@dataclass(frozen=True)
class WeightSpec:
    name: str
    trainable: bool = True
    kind: WeightKind = WeightKind.WEIGHT


LEARNED_STATE = frozenset({"Normalization", "StringLookup", "IntegerLookup", "TextVectorization", "Discretization"})
"""Preprocessing layers whose state is adapted to data."""

RANDOM = frozenset(
    {
        "Dropout",
        "SpatialDropout1D",
        "SpatialDropout2D",
        "SpatialDropout3D",
        "GaussianDropout",
        "GaussianNoise",
        "AlphaDropout",
        "AugMix",
        "CutMix",
        "MixUp",
        "RandAugment",
        "RandomBrightness",
        "RandomColorDegeneration",
        "RandomColorJitter",
        "RandomContrast",
        "RandomCrop",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomFlip",
        "RandomGaussianBlur",
        "RandomGrayscale",
        "RandomHeight",
        "RandomHue",
        "RandomInvert",
        "RandomPerspective",
        "RandomPosterization",
        "RandomRotation",
        "RandomSaturation",
        "RandomSharpness",
        "RandomShear",
        "RandomTranslation",
        "RandomWidth",
        "RandomZoom",
        "Solarization",
    }
)
"""Layers that draw random numbers while training."""

_CONVOLUTION = re.compile(r"(Depthwise|Separable)?Conv(olution)?[123]D(Transpose)?$")
_RECURRENT = frozenset({"SimpleRNN", "LSTM", "GRU", "SimpleRNNCell", "LSTMCell", "GRUCell", "CuDNNLSTM", "CuDNNGRU"})
_BATCH_NORMALIZATION = frozenset({"BatchNormalization", "BatchNormalizationV1", "SyncBatchNormalization"})
_W = WeightSpec


def _bias(config: Mapping[str, Any], name: str = "bias") -> tuple[WeightSpec, ...]:
    return (_W(name),) if config.get("use_bias", config.get("bias", True)) else ()


def weight_specs(class_name: str, config: Mapping[str, Any]) -> tuple[WeightSpec, ...] | None:
    """Own weights of one of Keras's layers, in the order in which Keras stores them; None for a class not known.

    Sub-layers are not followed. A layer known to have no weights gives an empty tuple.
    """
    if class_name in _BATCH_NORMALIZATION:
        specs = ((_W("gamma"),) if config.get("scale", True) else ()) + (
            (_W("beta"),) if config.get("center", True) else ()
        )
        specs += (
            _W("moving_mean", False, WeightKind.MEAN),
            _W("moving_variance", False, WeightKind.VARIANCE),
        )
        if config.get("renorm"):
            training = ("moving_stddev", "renorm_mean", "renorm_stddev")
            specs += tuple(_W(name, False, WeightKind.STATE) for name in training)
        return specs
    if class_name in ("Dense", "EinsumDense"):
        return (_W("kernel"), *_bias(config)) if class_name == "Dense" else _einsum(config)
    if _CONVOLUTION.match(class_name):
        if class_name.startswith("Separable"):
            return (_W("depthwise_kernel"), _W("pointwise_kernel"), *_bias(config))
        return (_W("kernel"), *_bias(config))
    if class_name in _RECURRENT:
        return (_W("kernel"), _W("recurrent_kernel"), *_bias(config))
    if class_name == "Embedding":
        return (_W("embeddings"),)
    if class_name == "PReLU":
        return (_W("alpha"),)
    if class_name == "LayerNormalization" and config.get("rms_scaling"):
        return (_W("gamma"),)
    if class_name in ("LayerNormalization", "GroupNormalization"):
        return ((_W("gamma"),) if config.get("scale", True) else ()) + (
            (_W("beta"),) if config.get("center", True) else ()
        )
    if class_name == "RMSNormalization":
        return (_W("scale"),)
    if class_name == "Normalization":
        if config.get("mean") is not None:
            return ()
        return (
            _W("mean", False, WeightKind.LEARNED),
            _W("variance", False, WeightKind.LEARNED),
            _W("count", False, WeightKind.LEARNED),
        )
    if class_name in _WEIGHTLESS or class_name in RANDOM:
        return ()
    return None


def _einsum(config: Mapping[str, Any]) -> tuple[WeightSpec, ...]:
    return (_W("kernel"),) + ((_W("bias"),) if config.get("bias_axes") else ())


_WEIGHTLESS = frozenset(
    [
        "InputLayer",
        "Activation",
        "ReLU",
        "LeakyReLU",
        "ELU",
        "Softmax",
        "ThresholdedReLU",
        "Flatten",
        "Reshape",
        "Permute",
        "RepeatVector",
        "Masking",
        "Concatenate",
        "Add",
        "Subtract",
        "Multiply",
        "Average",
        "Maximum",
        "Minimum",
        "Dot",
        "Identity",
        "Rescaling",
        "Resizing",
        "CenterCrop",
        "MaxPooling1D",
        "MaxPooling2D",
        "MaxPooling3D",
        "AveragePooling1D",
        "AveragePooling2D",
        "AveragePooling3D",
        "GlobalMaxPooling1D",
        "GlobalMaxPooling2D",
        "GlobalMaxPooling3D",
        "GlobalAveragePooling1D",
        "GlobalAveragePooling2D",
        "GlobalAveragePooling3D",
        "AdaptiveAveragePooling1D",
        "AdaptiveAveragePooling2D",
        "AdaptiveAveragePooling3D",
        "AdaptiveMaxPooling1D",
        "AdaptiveMaxPooling2D",
        "AdaptiveMaxPooling3D",
        "UpSampling1D",
        "UpSampling2D",
        "UpSampling3D",
        "ZeroPadding1D",
        "ZeroPadding2D",
        "ZeroPadding3D",
        "Cropping1D",
        "Cropping2D",
        "Cropping3D",
        "ActivityRegularization",
        "UnitNormalization",
        "CategoryEncoding",
        "Hashing",
        "HashedCrossing",
        "Lambda",
    ]
)

_STORED_AS = {"GroupQueryAttention": "GroupedQueryAttention"}
"""Classes that a configuration calls by their public name and a weight path by the name in Keras's code."""


def stored_class(class_name: str) -> str:
    """Name of a layer's class in the weight paths of Keras 3."""
    return to_snake_case(_STORED_AS.get(class_name, class_name))


_SUBLAYERS = {"layer": "layer", "forward_layer": "layer", "backward_layer": "backward_layer", "cell": "cell"}


def weight_kind(class_name: str, config: Mapping[str, Any], key: str, dtype: str) -> WeightKind:
    """How one weight of a layer is combined.

    Args:
        class_name, config: the layer that Keras lists.
        key: where the weight lies under the layer, in Keras 3's layout (`vars/0`, `layer/vars/2`,
            `seed_generator/vars/0`) or by name (`batch_normalization_1/moving_mean:0`).
        dtype: what is stored.

    Returns:
        The kind. Weights of unknown layers are `WEIGHT` if they are floating point numbers, else `STATE`.
    """
    name = key.rsplit("/", 1)[-1].split(":")[0]
    if class_name in LEARNED_STATE:
        return WeightKind.LEARNED
    if "seed_generator" in key or re.match(
        r"(vector_u|sn_u|seed_generator_state|StateVar|count|moving_stddev|renorm_\w+)$", name
    ):
        return WeightKind.STATE
    if re.search(r"(moving|running)_mean$", name):
        return WeightKind.MEAN
    if re.search(r"(moving_variance|running_(std|variance))$", name):
        return WeightKind.VARIANCE
    if not re.match(r"(b?float|complex)", dtype):
        return WeightKind.STATE
    owner = _owner(class_name, config, key)
    if owner is not None and name.isdigit():
        if owner[0] == "SpectralNormalization":
            return WeightKind.STATE
        specs = weight_specs(*owner)
        if specs and int(name) < len(specs):
            return specs[int(name)].kind
    return WeightKind.WEIGHT


def weight_name(class_name: str, config: Mapping[str, Any], key: str) -> str:
    """A readable name of a weight: `kernel` for `vars/0` of a Dense layer; the key itself where nothing is known."""
    name = key.rsplit("/", 1)[-1].split(":")[0]
    owner = _owner(class_name, config, key)
    if owner is not None and name.isdigit():
        specs = weight_specs(*owner)
        if specs and int(name) < len(specs):
            return specs[int(name)].name
    return name if not name.isdigit() else key


def _owner(class_name: str, config: Mapping[str, Any], key: str) -> tuple[str, Mapping[str, Any]] | None:
    """Class and configuration of the sub-layer that owns the weight `key`, None where it cannot be followed."""
    parts = [part for part in key.split("/")[:-1] if part != "vars"]
    while parts:
        part = parts.pop(0)
        if part == "layers" and isinstance(config.get("layers"), list):
            if not parts:
                return None
            found = _numbered(config["layers"], parts.pop(0))
        elif part == "cell" and class_name in _RECURRENT:
            continue
        elif part in _SUBLAYERS:
            found = config.get(_SUBLAYERS[part]) or config.get("layer")
        else:
            return None
        if not isinstance(found, Mapping) or not isinstance(found.get("config"), Mapping):
            return None
        class_name, config = str(found.get("class_name")), found["config"]
    return class_name, config


def _numbered(entries: list[Any], name: str) -> Any:
    """The entry that Keras stores under `name` in a container of layers (`dense`, `dense_1`, ...)."""
    counts: dict[str, int] = {}
    for entry in entries:
        if isinstance(entry, Mapping) and entry.get("class_name") != "InputLayer":
            snake = stored_class(str(entry.get("class_name")))
            number = counts.get(snake, 0)
            counts[snake] = number + 1
            if name == (f"{snake}_{number}" if number else snake):
                return entry
    return None


def to_snake_case(name: str) -> str:
    """Class name as Keras spells it in weight paths: Conv2D -> conv2d, MyLayer -> my_layer.

    Source: `keras/src/utils/naming.py`.
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a layer holds quantised weights, whose integers mean nothing without their own scales."""
    dtype = config.get("dtype")
    name = dtype.get("class_name", "") if isinstance(dtype, Mapping) else str(dtype or "")
    return (
        config.get("quantization_config") is not None
        or name.startswith("Quantized")
        or "_from_" in name
        or config.get("quantization_mode") is not None
    )


def policy_name(dtype: Any) -> str | None:
    """Name of a dtype policy, however it is spelled (`"float32"`, a `DTypePolicy`, an old `Policy`)."""
    if isinstance(dtype, Mapping):
        config = dtype.get("config")
        if dtype.get("class_name") in ("DTypePolicy", "Policy", "FloatDTypePolicy") and isinstance(config, Mapping):
            return str(config.get("name"))
        return None
    return dtype if isinstance(dtype, str) else None


_IGNORED = re.compile(r"(name|trainable|seed|rng_type|batch_input_shape|input_dtype|shared_object_id|.*_initializer)$")
_DEFAULTS: dict[str, Any] = {
    "renorm": False,
    "renorm_momentum": 0.99,
    "synchronized": False,
    "ragged": False,
    "sparse": False,
    "optional": False,
    "groups": 1,
    "time_major": False,
    "zero_output_for_mask": False,
    "implementation": 2,
    "use_legacy_config": None,
    "keepdims": False,
    "autocast": True,
}


def comparable(config: Any) -> Any:
    """A configuration without what may differ between two layers that compute the same.

    Left out: names, seeds, initialisers (they say how training began), `trainable`, the saver's bookkeeping, keys that
    are null or at a default that older Keras does not write. Policies stand for their names.
    """
    if isinstance(config, Mapping):
        if isinstance(config.get("layers"), list) and "output_layers" in config:
            config = _with_numbers(config)
        if "class_name" in config:
            name = policy_name(config)
            if name is not None:
                return name
            return {"class_name": config["class_name"], "config": comparable(config.get("config"))}
        return {
            key: comparable(value)
            for key, value in config.items()
            if value is not None
            and not _IGNORED.match(key)
            and not (key in _DEFAULTS and value == _DEFAULTS[key])
            and key not in ("module", "registered_name", "build_config")
        }
    if isinstance(config, (list, tuple)):
        return [comparable(item) for item in config]
    return config


def _with_numbers(network: Mapping[str, Any]) -> dict[str, Any]:
    """A functional network inside a layer, with the numbers of its layers in place of their names."""
    names = [str(entry.get("name")) if isinstance(entry, Mapping) else "" for entry in network["layers"]]
    numbers = {name: f"layer {number}" for number, name in enumerate(names)}

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return numbers.get(value, value)
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, Mapping):
            return {key: replace(item) for key, item in value.items()}
        return value

    wired = {key: replace(network[key]) for key in ("input_layers", "output_layers") if key in network}
    layers = [
        {**entry, "inbound_nodes": replace(entry.get("inbound_nodes"))} if isinstance(entry, Mapping) else entry
        for entry in network["layers"]
    ]
    return {**network, **wired, "layers": [_entry(entry) for entry in layers]}


def _entry(entry: Any) -> Any:
    """A layer's entry with its calls inside its configuration, where `comparable` looks."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), Mapping):
        return entry
    return {**entry, "config": {**entry["config"], "inbound_nodes": entry.get("inbound_nodes")}}


def difference(first: Any, second: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Where two comparable configurations first differ: the key and both values; None if they are equal."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            found = difference(first.get(key), second.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if first == second else (path, first, second)


def compute_dtype(config: Mapping[str, Any]) -> str:
    """The dtype in which a layer computes: `float16` under the policy `mixed_float16`."""
    name = policy_name(config.get("dtype")) or "float32"
    return name.removeprefix("mixed_")
