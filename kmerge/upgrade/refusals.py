"""What current Keras would make of an old file: what it refuses, and what it would silently compute otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kmerge.dialects.reading import MAX_DEPTH, MODEL_CLASSES, Dialect, has_graph
from kmerge.graph import Layer
from kmerge.source import Source
from kmerge.upgrade import keras1
from kmerge.upgrade.network import context_of
from kmerge.upgrade.settings import current_keys, is_known


@dataclass(frozen=True)
class Refusal:
    """One reason why current Keras does not do with a file what its writer did.

    Attributes:
        reason: what is the matter, with its cause.
        layers: names of the layers concerned.
        silent: whether current Keras opens the file all the same, and computes something else.
    """

    reason: str
    layers: tuple[str, ...]
    silent: bool = False


def refusals(source: Source) -> tuple[Refusal, ...]:
    """What current Keras refuses in a file, or computes otherwise; empty for files of Keras 3."""
    context = context_of(source)
    if source.graph is None or not context.old:
        return ()
    found: dict[tuple[str, bool], list[str]] = {}

    def add(reason: str, layer: str, silent: bool = False) -> None:
        names = found.setdefault((reason, silent), [])
        if layer not in names:
            names.append(layer)

    for reason, name in _of_models(source.model or {}):
        add(reason, name)
    for layer in source.graph.layers:
        if layer.is_input:
            continue
        for reason, silent in _of_layer(layer.class_name, layer.config, context.version):
            add(reason, layer.name, silent)
        if "/" in layer.name:
            add("names with a slash", layer.name)
        if context.theano and layer.class_name in _CONVOLUTIONS:
            add("Theano's convolutions read their kernels backwards", layer.name, True)
        if context.theano and _pads_otherwise(layer):
            add("pools whose padding Theano lays out otherwise", layer.name, True)
        if _channels_first(layer.class_name, layer.config):
            add("convolutions with channels first, which TensorFlow computes on few CPUs", layer.name)
    return tuple(Refusal(reason, tuple(filter(None, names)), silent) for (reason, silent), names in found.items())


_CONVOLUTIONS = (
    "Conv1D",
    "Conv2D",
    "Conv3D",
    "Conv2DTranspose",
    "ConvLSTM2D",
    "Convolution1D",
    "Convolution2D",
    "Convolution3D",
)


def _pads_otherwise(layer: Layer) -> bool:
    """Whether a pool is padded, and is not one of windows of 3 and steps of one, which comes out the same."""
    config = layer.config
    pads = "same" in (config.get("padding"), config.get("border_mode"))
    if not pads or not layer.class_name.startswith(("MaxPooling", "AveragePooling")):
        return False
    sizes, steps = config.get("pool_size", config.get("pool_length")), config.get("strides", config.get("stride"))
    alike = all(size in (1, 3) for size in (sizes if isinstance(sizes, list) else [sizes]))
    return not alike or any(step != 1 for step in (steps if isinstance(steps, list) else [steps]))


def _channels_first(class_name: str, config: Mapping[str, Any]) -> bool:
    first = config.get("data_format") == "channels_first" or config.get("dim_ordering") == "th"
    return first and ("Conv" in class_name) and not class_name.startswith(("Depthwise", "Separable"))


def _of_models(model: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    """Models inside a model, whose calls old files count from 1."""
    config = model.get("config")
    entries = config if isinstance(config, list) else config.get("layers") if isinstance(config, Mapping) else None
    first = entries[0] if isinstance(entries, list) and entries else None
    if (
        model.get("class_name") == "Sequential"
        and isinstance(first, Mapping)
        and first.get("class_name") != "InputLayer"
    ):
        yield "Sequential models without an input layer", str(model.get("name") or first.get("name") or "")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping) and entry.get("class_name") in MODEL_CLASSES and has_graph(entry):
            name = str(
                entry.get("name") or (entry["config"].get("name") if isinstance(entry["config"], Mapping) else "")
            )
            if model.get("class_name") != "Sequential":
                yield "models inside a model, whose calls old files number differently", name
            if depth < MAX_DEPTH:
                yield from _of_models(entry, depth + 1)


def _of_layer(
    class_name: str, config: Mapping[str, Any], version: tuple[int, ...], depth: int = 0
) -> Iterator[tuple[str, bool]]:
    if depth > MAX_DEPTH:
        return
    if class_name in ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer"):
        yield "TensorFlow operations recorded as layers", False
        return
    if class_name == "Lambda":
        yield "Lambda layers, whose code Keras runs only where safe mode is off", False
        return
    if keras1.is_keras1(class_name, config) or class_name == "Merge":
        yield "layers and arguments in the words of Keras 1", False
    elif class_name in _GONE:
        yield f"{class_name}, a layer that current Keras does not have", False
    elif is_known(class_name):
        keys = current_keys(class_name) | {"batch_input_shape", "input_length", "implementation", "input_shape"}
        unknown = sorted(
            key for key in config if key not in keys | _TAKEN.get(class_name, frozenset()) and key not in _POPPED
        )
        if unknown:
            yield f"arguments that current Keras does not know ({', '.join(unknown[:4])})", False
        if class_name == "Attention" and "score_mode" in config:
            yield "Attention's score_mode, which is misread from an .h5 file", False
        if any(_typed(value) for key, value in config.items() if key.endswith("_initializer")):
            yield "initialisers with a type", False
        if isinstance(config.get("dtype"), Mapping) and config["dtype"].get("class_name") == "Policy":
            yield "dtype policies in the words of tf.keras", False
    else:
        yield "custom layers, whose class Keras needs", False
    if _hard_sigmoid(class_name, config, version):
        yield "hard_sigmoid, clip(0.2x + 0.5) as it was, which is clip(x/6 + 0.5) today", True
    cells = config.get("cells")
    for wrapped in (
        *(config.get(key) for key in ("layer", "backward_layer", "cell")),
        *(cells if isinstance(cells, list) else ()),
    ):
        if isinstance(wrapped, Mapping) and isinstance(wrapped.get("config"), Mapping):
            if "module" not in wrapped:
                yield "layers inside wrappers without their module", False
            yield from _of_layer(str(wrapped.get("class_name")), wrapped["config"], version, depth + 1)


def _typed(initializer: Any) -> bool:
    config = initializer.get("config") if isinstance(initializer, Mapping) else None
    return isinstance(config, Mapping) and "dtype" in config


_GONE = frozenset(
    {
        "Highway",
        "MaxoutDense",
        "ParametricSoftplus",
        "SReLU",
        "CuDNNLSTM",
        "CuDNNGRU",
        "LocallyConnected1D",
        "LocallyConnected2D",
        "ThresholdedReLU",
        "RandomHeight",
        "RandomWidth",
        "BatchNormalizationV1",
        "SyncBatchNormalization",
    }
)
_TAKEN = {"LeakyReLU": frozenset({"alpha"}), "Embedding": frozenset({"input_length"})}
_POPPED = frozenset({"batch_input_shape", "ragged", "sparse"})


def _hard_sigmoid(class_name: str, config: Mapping[str, Any], version: tuple[int, ...]) -> bool:
    for key in ("activation", "recurrent_activation", "inner_activation"):
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("config")
        if value == "hard_sigmoid":
            return True
    gates = {"recurrent_activation", "inner_activation"}
    return version < (2, 3) and class_name in ("LSTM", "GRU", "ConvLSTM2D") and not gates & config.keys()


def is_outdated(source: Source) -> bool:
    """Whether current Keras would refuse a file, or compute something else."""
    return source.dialect is not Dialect.KERAS3_H5 and bool(refusals(source))
