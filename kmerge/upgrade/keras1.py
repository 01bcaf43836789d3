"""Keras 1 in the words of Keras 2: names of classes and arguments, and the layout of weights.

Sources: the documentation and saved files of Keras 1.0 to 1.2, and Keras 2's own `preprocess_weights_for_loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kmerge.upgrade.part import Context, Part, made_from, side_by_side, transposed

_COMMON = {
    "init": "kernel_initializer",
    "W_regularizer": "kernel_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "b_constraint": "bias_constraint",
    "bias": "use_bias",
    "border_mode": "padding",
    "dim_ordering": "data_format",
}
_RECURRENT = {
    **_COMMON,
    "output_dim": "units",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "U_regularizer": "recurrent_regularizer",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
}
_CONVOLUTION = {
    **_COMMON,
    "nb_filter": "filters",
    "subsample": "strides",
    "subsample_length": "strides",
    "filter_length": "kernel_size",
    "atrous_rate": "dilation_rate",
}
_POOLING = {**_COMMON, "pool_length": "pool_size", "stride": "strides"}
_RENAMED: dict[str, dict[str, str]] = {
    "Dense": {**_COMMON, "output_dim": "units"},
    "TimeDistributedDense": {**_COMMON, "output_dim": "units"},
    "MaxoutDense": {**_COMMON, "output_dim": "units"},
    "Highway": _COMMON,
    "Embedding": {
        "init": "embeddings_initializer",
        "W_regularizer": "embeddings_regularizer",
        "W_constraint": "embeddings_constraint",
    },
    "Dropout": {"p": "rate"},
    "SpatialDropout1D": {"p": "rate"},
    "SpatialDropout2D": {"p": "rate", "dim_ordering": "data_format"},
    "SpatialDropout3D": {"p": "rate", "dim_ordering": "data_format"},
    "GaussianDropout": {"p": "rate"},
    "GaussianNoise": {"sigma": "stddev"},
    "UpSampling1D": {"length": "size"},
    "PReLU": {"init": "alpha_initializer", "alpha_regularizer": "alpha_regularizer"},
    "BatchNormalization": {"beta_init": "beta_initializer", "gamma_init": "gamma_initializer"},
    "InputLayer": {"input_dtype": "dtype"},
}
_CLASSES = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconvolution3D": "Conv3DTranspose",
    "Deconv2D": "Conv2DTranspose",
    "Deconv3D": "Conv3DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "TimeDistributedDense": "Dense",
}
_ORDERINGS = {"th": "channels_first", "tf": "channels_last", "default": None}
_LEFT_OUT = ("input_dim", "input_length", "input_dtype", "consume_less", "forget_bias_init", "weights")
_GATES = {"LSTM": "ifco", "GRU": "zrh", "ConvLSTM2D": "ifco"}
_STORED = {"LSTM": "icfo", "GRU": "zrh", "ConvLSTM2D": "icfo"}
"""Order of the gates in files of Keras 1, which store three arrays for each: kernel, recurrent kernel, bias."""


def _names_of(class_name: str) -> Mapping[str, str]:
    if class_name in ("LSTM", "GRU", "SimpleRNN"):
        return _RECURRENT
    if class_name == "ConvLSTM2D":
        return {**_RECURRENT, **_CONVOLUTION}
    if "Conv" in class_name or class_name.startswith(("Atrous", "Deconv", "LocallyConnected")):
        return _CONVOLUTION
    if "Pooling" in class_name:
        return _POOLING
    if class_name.startswith(("UpSampling", "ZeroPadding", "Cropping")):
        return {**_RENAMED.get(class_name, {}), "dim_ordering": "data_format"}
    return _RENAMED.get(class_name, {})


def is_keras1(class_name: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer's configuration is in the words of Keras 1."""
    return class_name in _CLASSES or any(
        old in config and old != new and old not in ("init",) for old, new in _names_of(class_name).items()
    )


def to_keras2(part: Part, context: Context) -> Part:
    """A layer of Keras 1 as Keras 2 would have saved it."""
    names = _names_of(part.class_name)
    first = part.config.get("dim_ordering") == "th"
    config: dict[str, Any] = {}
    for key, value in part.config.items():
        if key == "dim_ordering":
            value = _ORDERINGS.get(value, value)
        if key in names:
            config.setdefault(names[key], value)
        else:
            config[key] = value
    class_name = part.class_name
    for rank, keys in ((2, ("nb_row", "nb_col")), (3, ("kernel_dim1", "kernel_dim2", "kernel_dim3"))):
        if all(key in config for key in keys):
            config["kernel_size"] = [config.pop(key) for key in keys][:rank]
    keep = () if class_name == "Embedding" else ("input_dim",)
    for key in (*keep, *(key for key in _LEFT_OUT if key != "input_dim")):
        config.pop(key, None)
    part = Part(_CLASSES.get(class_name, class_name), config, part.tensors)
    change = _WEIGHTS.get(part.class_name)
    if class_name == "Embedding" and config.pop("dropout", 0):
        context.note(f"'{context.layer}': Embedding has no dropout of its own any more; while training only")
    if class_name == "UpSampling1D" and isinstance(config.get("size"), list):
        config["size"] = config["size"][0]
    return change(part, first) if change is not None else part


# --------------------------------------------------------------------------------------------------- weights


def _conv1d(part: Part, _: bool) -> Part:
    """(length, 1, inputs, filters), or the older (filters, inputs, length, 1), to (length, inputs, filters)."""
    kernel, *rest = part.tensors
    if len(kernel.shape) != 4:
        return part
    size = part.config.get("kernel_size")
    length = size[0] if isinstance(size, list) else size
    if kernel.shape[:2] != (length, 1) or kernel.shape[3] != part.config.get("filters"):
        kernel = transposed(kernel, (2, 3, 1, 0))
    shape = (kernel.shape[0], *kernel.shape[2:])
    return part.weighing(made_from([kernel], shape, lambda arrays: arrays[0][:, 0], reorders=True), *rest)


def _conv(part: Part, first: bool) -> Part:
    """Theano ordering stores (filters, inputs, *sizes); Keras 2 stores (*sizes, inputs, filters) in either ordering."""
    kernel, *rest = part.tensors
    rank = len(kernel.shape) - 2
    if first and rank >= 2:
        kernel = transposed(kernel, (*range(2, 2 + rank), 1, 0))
    return part.weighing(kernel, *rest)


def _separable(part: Part, first: bool) -> Part:
    if not first:
        return part
    depthwise, pointwise, *rest = part.tensors
    return part.weighing(transposed(depthwise, (2, 3, 1, 0)), transposed(pointwise, (2, 3, 1, 0)), *rest)


def _conv_transpose(part: Part, first: bool) -> Part:
    """(*sizes, inputs, filters), or in Theano ordering (filters, inputs, *sizes), to (*sizes, filters, inputs)."""
    kernel, *rest = part.tensors
    rank = len(kernel.shape) - 2
    sizes = tuple(range(rank))
    kernel = transposed(kernel, (*range(2, 2 + rank), 0, 1) if first else (*sizes, rank + 1, rank))
    return part.weighing(kernel, *rest)


def _gates(part: Part, first: bool) -> Part:
    """Three arrays per gate, or already joined ones (`consume_less="gpu"`, same order), to three in all."""
    wanted, stored = _GATES[part.class_name], _STORED[part.class_name]
    tensors = part.tensors
    if len(tensors) == 3 * len(stored):
        order = [stored.index(gate) for gate in wanted]
        groups = [[tensors[3 * place + kind] for place in order] for kind in range(3)]
        if first and part.class_name == "ConvLSTM2D":
            groups[:2] = [[transposed(tensor, (2, 3, 1, 0)) for tensor in group] for group in groups[:2]]
        tensors = tuple(side_by_side(group) for group in groups)
    return part.weighing(*tensors)


_WEIGHTS: dict[str, Callable[[Part, bool], Part]] = {
    "Conv1D": _conv1d,
    "Conv2D": _conv,
    "Conv3D": _conv,
    "SeparableConv2D": _separable,
    "Conv2DTranspose": _conv_transpose,
    "Conv3DTranspose": _conv_transpose,
    "LSTM": _gates,
    "GRU": _gates,
    "ConvLSTM2D": _gates,
}
