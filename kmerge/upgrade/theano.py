"""What Theano computed otherwise than TensorFlow: kernels read backwards, and "same" padding.

Theano pads convolutions by half a kernel on either side, whatever the steps, and pools by up to a whole window; it
pads the hidden state of a ConvLSTM likewise. Here that is spelled out: padding of its own in front of a "valid" layer.

Sources: the Theano backends of Keras 1.2 and 2.2, and Theano's own `AbstractConv` and `Pool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kmerge.store import Tensor
from kmerge.store.derived import derived
from kmerge.upgrade.part import Chain, Context, Part, flipped, operation

_FLIPPED = {"Conv1D": 1, "Conv2D": 2, "Conv3D": 3, "Conv2DTranspose": 2, "Conv3DTranspose": 3, "ConvLSTM2D": 2}
"""Classes whose kernels Theano reads backwards, and how many of their axes are spatial."""

_LOWEST = float(np.finfo(np.float32).min)
"""Stands for minus infinity, which JSON has not."""


def unflipped(part: Part) -> Part:
    """Theano computes convolutions proper, everybody else correlations: the same with kernels turned round."""
    if part.class_name not in _FLIPPED:
        return part
    axes = range(_FLIPPED[part.class_name])
    kernels = 2 if part.class_name == "ConvLSTM2D" else 1
    return part.weighing(*(flipped(item, axes) if n < kernels else item for n, item in enumerate(part.tensors)))


def numbers(value: Any, rank: int, default: int = 1) -> list[int]:
    """A setting that is one number for each axis, or one for all."""
    if value is None:
        return [default] * rank
    found = [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)] * rank
    return found * rank if len(found) == 1 else found


def _zeros(rank: int, sides: Sequence[Sequence[int]], part: Part) -> Part:
    settings: dict[str, Any] = {"padding": list(sides[0]) if rank == 1 else [list(side) for side in sides]}
    if rank > 1:
        settings["data_format"] = part.config.get("data_format") or "channels_last"
    return Part(f"ZeroPadding{rank}D", settings, suffix="padding")


def convolution(part: Part, rank: int, context: Context) -> Chain:
    """Half a kernel on each side, with one less behind where the kernel is even.

    Separable convolutions keep the place too many that an even kernel leads to, since Keras cuts it off by the size of
    the other kernel.
    """
    if part.config.get("padding") != "same":
        return [part]
    sizes, dilation = numbers(part.config["kernel_size"], rank), numbers(part.config.get("dilation_rate"), rank)
    strides = numbers(part.config.get("strides"), rank)
    if all(size % 2 and step == 1 for size, step in zip(sizes, strides, strict=True)):
        return [part]
    if rank == 3 and context.version < (2,) and not all(size % 2 for size in sizes):
        context.refuse(
            part.class_name,
            "unknown",
            "pads an even kernel, which Keras 1 did in one of two ways, as Theano was old or new",
        )
    reach = [(size - 1) * by + 1 for size, by in zip(sizes, dilation, strict=True)]
    cut = not part.class_name.startswith("Separable")
    sides = [[size // 2, size // 2 - (size % 2 == 0 and cut)] for size in reach]
    return [_zeros(rank, sides, part), part.having(padding="valid")]


def transposed_convolution(part: Part, rank: int, context: Context) -> Chain:
    """A "valid" one, cut to the places that are wanted: Theano's "same", and the output shape that Keras 1 was given.

    Along an axis with steps of s a kernel of size k makes (n - 1) s + k places of n; Theano's "same" leaves out the
    first k // 2 of them.
    """
    config = part.config
    sizes, dilation = numbers(config["kernel_size"], rank), numbers(config.get("dilation_rate"), rank)
    reach = [(size - 1) * by + 1 for size, by in zip(sizes, dilation, strict=True)]
    strides = numbers(config.get("strides"), rank)
    same = config.get("padding") == "same"
    given = _given_places(part, rank, strides, context)
    part = part.without("output_shape")
    if given is None and not (same and context.theano):
        return [part]
    if same and context.theano and not all(size % 2 for size in reach):
        context.refuse(part.class_name, "unknown", "has an even kernel and padding 'same', which Theano never computed")
    usual = strides if same else [max(size, step) for size, step in zip(reach, strides, strict=True)]
    if same and config.get("output_padding") is not None:
        extra = numbers(config["output_padding"], rank)
        usual = [size % 2 + more for size, more in zip(reach, extra, strict=True)]
    beyond = given or usual  # places beyond (n - 1) s
    if not same:
        front = [0] * rank
    elif context.theano:
        front = [size // 2 for size in reach]
    else:
        front = [max(size - more, 0) // 2 for size, more in zip(reach, beyond, strict=True)]
    if not context.theano and beyond == usual:
        return [part]
    more = [max(0, end + first - size) for end, first, size in zip(beyond, front, reach, strict=True)]
    cut = [
        [first, size + extra - first - end] for first, size, extra, end in zip(front, reach, more, beyond, strict=True)
    ]
    if any(extra >= step for extra, step in zip(more, strides, strict=True)) or any(min(ends) < 0 for ends in cut):
        context.refuse(part.class_name, "unknown", "has an output shape that its steps and kernel do not lead to")
        return [part]
    part = part.having(padding="valid", output_padding=more)
    if not any(any(ends) for ends in cut):
        return [part]
    settings = {"cropping": cut, "data_format": config.get("data_format") or "channels_last"}
    return [part, Part(f"Cropping{rank}D", settings, suffix="cropping")]


def _given_places(part: Part, rank: int, strides: Sequence[int], context: Context) -> list[int] | None:
    """Places beyond (n - 1) s that Keras 1's `output_shape` asks for; None where it says nothing."""
    shape = part.config.get("output_shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != rank + 2:
        return None
    spatial = slice(2, None) if part.config.get("data_format") == "channels_first" else slice(1, -1)
    wanted = list(shape)[spatial]
    inputs = list(context.input_shape or ())[spatial]
    if len(inputs) != rank or any(size is None for size in (*inputs, *wanted)):
        context.note(
            f"'{context.layer}': its output_shape {list(shape)} was left out, since its input's size is not known"
        )
        return None
    return [int(size) - (int(of) - 1) * step for size, of, step in zip(wanted, inputs, strides, strict=True)]  # type: ignore[arg-type]


def pooling(part: Part, context: Context) -> Chain:
    """Windows that begin up to a whole window before the input; what lies outside counts for nothing.

    The window at place i begins at i s - p, where p is k - 1, or k - 2 for odd sizes k from 3 on.
    """
    rank = next(int(letter) for letter in part.class_name if letter.isdigit())
    config = part.config
    if not context.theano or config.get("padding") != "same":
        return [part]
    sizes = numbers(config.get("pool_size"), rank, 2)
    steps = numbers(config.get("strides"), rank) if config.get("strides") is not None else sizes
    if all(size in (1, 3) for size in sizes):
        # Half a window on each side, as TensorFlow has it for steps of one: of those every s-th.
        if all(step == 1 for step in steps):
            return [part]
        shape = {"data_format": config["data_format"]} if config.get("data_format") else {}
        every = {"pool_size": [1] * rank, "strides": steps, "padding": "valid", **shape}
        return [replace(part.having(strides=[1] * rank), suffix="windows"), Part(f"MaxPooling{rank}D", every)]
    front = [size - 2 if size > 2 and size % 2 else size - 1 for size in sizes]
    sides = [[first, size - 1 - first] for first, size in zip(front, sizes, strict=True)]
    width = [[0, 0], *sides, [0, 0]]
    if config.get("data_format") == "channels_first":
        width = [[0, 0], [0, 0], *sides]

    def padded(value: float, back: int = 1) -> Part:
        pad = operation("Pad", "numpy", (back,), pad_width=width, mode="constant")
        return replace(pad, keywords={"constant_values": value})

    part = part.having(padding="valid", pool_size=sizes, strides=steps)
    if part.class_name.startswith("Max"):
        return [padded(_LOWEST), part]
    # The mean over what lies inside: the mean with zeros outside, divided by the share that lies inside.
    mean, share = replace(part, suffix="mean"), replace(part, suffix="share")
    ones = operation("OnesLike", "numpy", (3,))
    return [padded(0.0), mean, ones, padded(0.0), share, operation("Divide", "numpy", (4, 1))]


def conv_lstm(part: Part, context: Context) -> Chain:
    """Kernels of even size get a row of zeros behind, so that both paddings of the hidden state are the same."""
    sizes, dilation = numbers(part.config["kernel_size"], 2), numbers(part.config.get("dilation_rate"), 2)
    strides = numbers(part.config.get("strides"), 2)
    same = part.config.get("padding") == "same"
    even = [size % 2 == 0 for size in sizes]
    if not any(even) and not (same and any(step > 1 for step in strides)):
        return [part]
    sides = []
    for size, by, wider in zip(sizes, dilation, even, strict=True):
        reach = (size - 1) * by + 1
        first, last = (reach // 2, reach // 2 - (reach % 2 == 0)) if same else (0, 0)
        sides.append([first, last + by * wider])
    grown = [size + more for size, more in zip(sizes, even, strict=True)]
    kernel, recurrent, *bias = part.tensors
    part = part.weighing(_extended(kernel, grown), _extended(recurrent, grown), *bias)
    part = part.having(kernel_size=grown)
    if same and all(step == 1 for step in strides) and all(by == 1 for by in dilation):
        return [part]
    first = part.config.get("data_format") == "channels_first"
    settings = {"padding": [[0, 0], *sides], "data_format": "channels_last"}
    if first:  # (steps, channels, rows, columns): what is padded are the last two, with steps for channels
        settings = {"padding": [[0, 0], *sides], "data_format": "channels_first"}
    return [Part("ZeroPadding3D", settings, suffix="padding"), part.having(padding="valid")]


def _extended(kernel: Tensor, sizes: Sequence[int]) -> Tensor:
    """A kernel with zeros behind along its first axes."""
    shape = (*sizes, *kernel.shape[len(sizes) :])
    if shape == kernel.shape:
        return kernel
    width = [(0, new - old) for new, old in zip(shape, kernel.shape, strict=True)]
    return derived(kernel, shape, lambda: np.pad(kernel.read(), width))
