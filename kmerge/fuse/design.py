"""Layers that are linear in their weights, as matrices: rows of inputs, and a kernel with a column per output.

Every such layer is, group by group of its channels, `outputs = rows @ kernel + bias`. What stands in a row follows from
the layer's configuration; whether that is right is tried on the live layer before it is relied upon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.methods.registry import Array


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        groups: of channels that do not see each other.
        bias: whether it has one.
    """

    groups: int
    bias: bool

    @property
    def axis(self) -> int:
        """The axis of the kernel on which the outputs stand, counted from the end."""
        return -1

    def widened(self, columns: Array, kernel: tuple[int, ...]) -> Array:
        """A matrix for units on the kernel's axis as one for the layer's outputs."""
        return columns

    def places(self, shape: Sequence[int]) -> int:
        """How many rows inputs of this shape give, per input."""
        raise NotImplementedError

    def rows(self, inputs: Array, picked: Array) -> Array:
        """Design rows at some places of the output, shape (picked, groups, p)."""
        raise NotImplementedError

    def outputs(self, outputs: Array) -> Array:
        """Outputs of the layer as (rows, channels)."""
        raise NotImplementedError

    def matrix(self, kernel: Array) -> Array:
        """The layer's kernel as (groups, p, q)."""
        raise NotImplementedError

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        """The matrix as a kernel of the layer; `like` gives the sizes that are no channels."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseRows(Linear):
    def places(self, shape: Sequence[int]) -> int:
        return int(np.prod(shape[1:-1]))

    def rows(self, inputs: Array, picked: Array) -> Array:
        return inputs.reshape(-1, 1, inputs.shape[-1])[picked]

    def outputs(self, outputs: Array) -> Array:
        return outputs.reshape(-1, outputs.shape[-1])

    def matrix(self, kernel: Array) -> Array:
        return kernel[None]

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        return matrix[0]


@dataclass(frozen=True)
class ConvolutionRows(Linear):
    """A convolution, transposed or not, plain, in groups or depthwise; channels last."""

    size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: str = "valid"
    transposed: bool = False
    depthwise: bool = False
    first: bool = False
    """Whether the file has channels first."""

    @property
    def axis(self) -> int:
        return -2 if self.transposed or self.depthwise else -1

    def widened(self, columns: Array, kernel: tuple[int, ...]) -> Array:
        return np.kron(columns, np.eye(kernel[-1])) if self.depthwise else columns

    def _last(self, values: Array) -> Array:
        return np.moveaxis(values, 1, -1) if self.first else values

    def _sides(self, sides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Length of the output along each axis, and the padding before the input."""
        lengths, before = [], []
        for side, size, stride, dilation in zip(sides, self.size, self.strides, self.dilation, strict=True):
            reach = (size - 1) * dilation + 1
            if self.transposed:
                same = self.padding == "same"
                lengths.append(side * stride if same else side * stride + max(reach - stride, 0))
                before.append(max(reach - stride, 0) // 2 if same else 0)
            elif self.padding == "same":
                length = -(-side // stride)
                lengths.append(length)
                before.append(max((length - 1) * stride + reach - side, 0) // 2)
            elif self.padding == "causal":
                lengths.append(-(-side // stride))
                before.append(reach - 1)
            else:
                lengths.append((side - reach) // stride + 1)
                before.append(0)
        return tuple(lengths), tuple(before)

    def places(self, shape: Sequence[int]) -> int:
        sides = shape[2:] if self.first else shape[1:-1]
        return int(np.prod(self._sides(sides)[0]))

    def rows(self, inputs: Array, picked: Array) -> Array:
        inputs = self._last(inputs)
        sides = inputs.shape[1:-1]
        lengths, before = self._sides(sides)
        batch, *place = np.unravel_index(picked, (len(inputs), *lengths))
        taps = np.unravel_index(np.arange(int(np.prod(self.size))), self.size)
        index: list[Array] = [batch[:, None]]
        valid = np.ones((len(picked), len(taps[0])), dtype=bool)
        for axis, side in enumerate(sides):
            offset = taps[axis] * self.dilation[axis]
            if self.transposed:
                found = place[axis][:, None] + before[axis] - offset
                valid &= found % self.strides[axis] == 0
                found = found // self.strides[axis]
            else:
                found = place[axis][:, None] * self.strides[axis] - before[axis] + offset
            valid &= (found >= 0) & (found < side)
            index.append(np.clip(found, 0, side - 1))
        values = inputs[tuple(index)]  # (picked, taps, channels)
        if not valid.all():
            values = values * valid[..., None]
        channels = values.shape[-1]
        grouped = values.reshape(len(picked), -1, self._groups(channels), channels // self._groups(channels))
        return grouped.transpose(0, 2, 1, 3).reshape(len(picked), self._groups(channels), -1)

    def _groups(self, channels: int) -> int:
        return channels if self.depthwise else self.groups

    def outputs(self, outputs: Array) -> Array:
        outputs = self._last(outputs)
        return outputs.reshape(-1, outputs.shape[-1])

    def matrix(self, kernel: Array) -> Array:
        if self.transposed:
            kernel = np.swapaxes(kernel, -1, -2)
        taps = int(np.prod(self.size))
        channels, filters = kernel.shape[-2:]
        if self.depthwise:
            return kernel.reshape(taps, channels, filters).transpose(1, 0, 2)
        grouped = kernel.reshape(taps * channels, self.groups, filters // self.groups)
        return grouped.transpose(1, 0, 2)

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        taps = int(np.prod(self.size))
        if self.depthwise:
            channels, _, filters = matrix.shape
            return matrix.transpose(1, 0, 2).reshape(*self.size, channels, filters)
        groups, width, filters = matrix.shape
        kernel = matrix.transpose(1, 0, 2).reshape(*self.size, width // taps, groups * filters)
        return np.swapaxes(kernel, -1, -2) if self.transposed else kernel


@dataclass(frozen=True)
class EinsumRows(Linear):
    """An einsum of one input with the kernel: contracted letters make rows, new letters make outputs."""

    inputs_: str = ""
    kernel_: str = ""
    outputs_: str = ""

    @property
    def _contracted(self) -> str:
        return "".join(letter for letter in self.inputs_ if letter in self.kernel_)

    @property
    def _new(self) -> str:
        return "".join(letter for letter in self.outputs_ if letter in self.kernel_)

    @property
    def _kept(self) -> str:
        return "".join(letter for letter in self.inputs_ if letter not in self.kernel_)

    def places(self, shape: Sequence[int]) -> int:
        return int(np.prod([size for letter, size in zip(self.inputs_, shape, strict=True) if letter in self._kept[1:]]))

    def rows(self, inputs: Array, picked: Array) -> Array:
        moved = inputs.transpose([self.inputs_.index(letter) for letter in self._kept + self._contracted])
        width = int(np.prod(moved.shape[len(self._kept) :]))
        return moved.reshape(-1, 1, width)[picked]

    def outputs(self, outputs: Array) -> Array:
        moved = outputs.transpose([self.outputs_.index(letter) for letter in self._kept + self._new])
        return moved.reshape(-1, int(np.prod(moved.shape[len(self._kept) :])))

    def matrix(self, kernel: Array) -> Array:
        moved = kernel.transpose([self.kernel_.index(letter) for letter in self._contracted + self._new])
        rows = int(np.prod(moved.shape[: len(self._contracted)]))
        return moved.reshape(1, rows, -1)

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        letters = self._contracted + self._new
        sizes = [like[self.kernel_.index(letter)] for letter in letters]
        return matrix[0].reshape(sizes).transpose([letters.index(letter) for letter in self.kernel_])


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(item) for item in value)


def linear_rows(class_name: str, config: Mapping[str, Any]) -> Linear | None:
    """How a layer is linear; None for one that is not, or not in one piece."""
    bias = bool(config.get("use_bias", True))
    if class_name == "Dense":
        return None if config.get("lora_rank") else DenseRows(1, bias)
    if class_name == "EinsumDense":
        found = re.fullmatch(r"([a-z]+),([a-z]+)->([a-z]+)", str(config.get("equation", "")).replace(" ", ""))
        if not found or config.get("lora_rank"):
            return None
        inputs, kernel, outputs = found.groups()
        plain = len({*inputs}) == len(inputs) and len({*outputs}) == len(outputs) and inputs[0] not in kernel
        one = all((letter in inputs) != (letter in outputs) for letter in kernel)
        kept = [letter for letter in inputs if letter not in kernel]
        if not plain or not one or any(letter not in outputs for letter in kept):
            return None
        return EinsumRows(1, config.get("bias_axes") is not None, inputs, kernel, outputs)
    found = re.fullmatch(r"(Depthwise)?Conv([123])D(Transpose)?", class_name)
    if not found:
        return None
    rank = int(found[2])
    if config.get("lora_rank") or (found[3] and config.get("output_padding") is not None):
        return None
    return ConvolutionRows(
        int(config.get("groups") or 1),
        bias,
        _tuple(config["kernel_size"], rank),
        _tuple(config.get("strides", 1), rank),
        _tuple(config.get("dilation_rate", 1), rank),
        str(config.get("padding", "valid")).lower(),
        bool(found[3]),
        bool(found[1]),
        config.get("data_format") == "channels_first",
    )
