"""Locally connected layers, which current Keras has no more: patches of the input, each with a kernel of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from kmerge.methods.registry import Array
from kmerge.store import Tensor
from kmerge.store.derived import derived
from kmerge.upgrade.keras1 import operation
from kmerge.upgrade.part import Chain, Context, Part, multiplied, reshaped
from kmerge.upgrade.settings import HARD_SIGMOID


def locally_connected(part: Part, context: Context) -> Chain:
    """ExtractPatches, then an EinsumDense with one kernel per place, then a Reshape back to the places.

    Only `implementation=1` (the only one before TensorFlow 1.13) stores kernels as (places, inputs, filters).
    """
    config = part.config
    rank = 1 if part.class_name.endswith("1D") else 2
    if config.get("implementation", 1) != 1 or not part.tensors or len(part.tensors[0].shape) != 3:
        context.refuse(part.class_name, "unknown", "is locally connected with implementation=2 or 3")
        return [part]
    size = _pair(config.get("kernel_size") or [config.get("nb_row"), config.get("nb_col")], rank)
    strides = _pair(config.get("strides") or [1] * rank, rank)
    if context.input_shape is None or any(length is None for length in context.input_shape[1:]):
        context.refuse(part.class_name, "unknown", "is locally connected, on an input of unknown shape")
        return [part]
    first = rank == 2 and config.get("data_format") == "channels_first"
    shape = [int(length or 0) for length in context.input_shape[1:]]
    channels, sizes = (shape[0], shape[1:]) if first else (shape[-1], shape[:-1])
    sizes = [*sizes, 1][:2]
    places = [(length - width) // step + 1 for length, width, step in zip(sizes, size, strides, strict=True)]
    count, filters = places[0] * places[1], part.tensors[0].shape[2]
    kernel = part.tensors[0]
    if kernel.shape[:2] != (count, size[0] * size[1] * channels):
        raise ValueError(f"kernel is {kernel.shape}, expected {(count, size[0] * size[1] * channels, filters)}")
    if first:
        kernel = _channels_last(kernel, channels, size)
    tensors = [kernel]
    if len(part.tensors) > 1:
        tensors.append(_bias(part.tensors[1], count, filters, first))
    if context.old and config.get("activation") == "hard_sigmoid":
        tensors = [multiplied(tensor, HARD_SIGMOID, context) for tensor in tensors]
    dtype = config.get("dtype", "float32")
    linear = Part(
        "EinsumDense",
        {
            "name": config.get("name"),
            "trainable": config.get("trainable", True),
            "dtype": dtype,
            "equation": "abc,bcd->abd",
            "output_shape": [count, filters],
            "bias_axes": "bd" if len(tensors) > 1 else None,
            "activation": config.get("activation", "linear"),
            **{
                key: config[key]
                for key in ("kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer")
                if key in config
            },
        },
        tuple(tensors),
    )
    patches = operation(
        "ExtractPatches",
        "image",
        size=list(size),
        strides=list(strides),
        dilation_rate=1,
        padding="valid",
        data_format="channels_last",
    )
    chain: Chain = []
    if first:
        chain.append(Part("Permute", {"dims": [2, 3, 1]}, suffix="channels_last"))
    if rank == 1:
        chain.append(Part("Reshape", {"target_shape": [*sizes, channels]}, suffix="rows"))
    chain.append(patches)
    chain.append(Part("Reshape", {"target_shape": [count, size[0] * size[1] * channels]}, suffix="places"))
    chain.append(linear)
    target = [count, filters] if rank == 1 else [*places, filters]
    if rank == 2:
        chain.append(Part("Reshape", {"target_shape": target}, suffix="grid"))
    if first:
        chain.append(Part("Permute", {"dims": [3, 1, 2]}, suffix="channels_first"))
    return chain


def _pair(value: Any, rank: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * rank
    first, second = [*values, 1][:2]
    return int(first), int(second)


def _channels_last(kernel: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Inputs of each patch from (channels, rows, columns) to (rows, columns, channels)."""
    count, inputs, filters = kernel.shape

    def make() -> Array:
        whole = kernel.read().reshape(count, channels, *size, filters)
        return np.moveaxis(whole, 1, 3).reshape(count, inputs, filters)

    return derived(kernel, kernel.shape, make, parts=(kernel,))


def _bias(bias: Tensor, count: int, filters: int, first: bool) -> Tensor:
    """tf.keras stores (filters, rows, columns) for channels first, Keras (rows, columns, filters)."""
    if bias.size != count * filters:
        raise ValueError(f"bias is {bias.shape}, expected {count} places of {filters} numbers")
    if first and bias.shape[0] == filters and bias.shape[-1] != filters:
        return derived(bias, (count, filters), lambda: bias.read().reshape(filters, count).T, parts=(bias,))
    return reshaped(bias, (count, filters))
