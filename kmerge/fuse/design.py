"""Layers that are linear in their weights, as matrices: rows of inputs, and a kernel with a column per output.

Every such layer is, group by group of its outputs, `outputs = rows @ kernel + bias`. What stands in a row follows from
the layer's configuration; whether that is right is tried on the live layer before it is relied upon.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from kmerge.dialects.vocabulary import is_quantized
from kmerge.fuse.mixing import Mixing
from kmerge.methods.registry import Array
from kmerge.shapes.layers import einsum, inner_layer


@dataclass(frozen=True)
class Linear(ABC):
    """One linear layer.

    Attributes:
        bias: whether it has one.
    """

    bias: bool

    def axes(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """Axes of the kernel on which the outputs stand, in their order, for a kernel of this shape."""
        return (len(kernel) - 1,)

    def copies(self, kernel: Sequence[int]) -> int:
        """How many outputs in a row there are for each place on these axes."""
        return 1

    def channel(self, rank: int) -> int | None:
        """The axis of the layer's result on which all its outputs stand; None where they stand on several."""
        return rank - 1

    def widened(self, columns: Mixing, kernel: Sequence[int]) -> Mixing:
        """A map of units on the kernel's axes as one of the layer's outputs."""
        return replace(columns, copies=self.copies(kernel))

    def positions(self, places: Array, number: int, kernel: Sequence[int]) -> Array:
        """Where units on one of the kernel's axes stand among the outputs.

        Args:
            places: shape (units, copies), along the axis.
            number: of the axis among `axes`.
            kernel: its shape.
        """
        sizes = [kernel[axis] for axis in self.axes(kernel)] + [self.copies(kernel)]
        grid: Array = np.moveaxis(np.arange(int(np.prod(sizes))).reshape(sizes), number, 0)
        found: Array = grid[places].reshape(len(places), -1)
        return found

    @abstractmethod
    def rows(self, inputs: Array, picked: Array) -> Array:
        """Design rows at some places of the output, shape (picked, groups, p)."""

    @abstractmethod
    def outputs(self, outputs: Array) -> Array:
        """Outputs of the layer as (rows, channels)."""

    @abstractmethod
    def matrix(self, kernel: Array) -> Array:
        """The layer's kernel as (groups, p, q)."""

    @abstractmethod
    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        """The matrix as a kernel of the layer; `like` gives the sizes that are no channels."""

    def offset(self, bias: Array, offset: Array, like: tuple[int, ...]) -> Array:
        """A bias of the layer after `offset`, shape (channels,), was added to it."""
        return (bias.ravel() + offset).reshape(bias.shape)

    def biases(self, bias: Array, shape: Sequence[int]) -> Array:
        """The layer's bias as it is added to a result of some shape, as (rows, channels) or (1, channels)."""
        return bias.reshape(1, -1)


@dataclass(frozen=True)
class DenseRows(Linear):
    def rows(self, inputs: Array, picked: Array) -> Array:
        return inputs.reshape(-1, 1, inputs.shape[-1])[picked]

    def outputs(self, outputs: Array) -> Array:
        return outputs.reshape(-1, outputs.shape[-1])

    def matrix(self, kernel: Array) -> Array:
        return kernel[None]

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        return np.asarray(matrix[0])


@dataclass(frozen=True)
class ConvolutionRows(Linear):
    """A convolution, transposed or not, plain, in groups or depthwise."""

    size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: str = "valid"
    transposed: bool = False
    depthwise: bool = False
    first: bool = False
    """Whether channels come before positions."""
    groups: int = 1
    more: tuple[int, ...] | None = None
    """What is added to the length of the output of a transposed one; None where that is left open."""

    def axes(self, kernel: Sequence[int]) -> tuple[int, ...]:
        return (len(kernel) - (2 if self.transposed or self.depthwise else 1),)

    def copies(self, kernel: Sequence[int]) -> int:
        return kernel[-1] if self.depthwise else 1

    def channel(self, rank: int) -> int | None:
        return 1 if self.first else rank - 1

    def _last(self, values: Array) -> Array:
        return np.moveaxis(values, 1, -1) if self.first else values

    def _sides(self, sides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Length of the output along each axis, and the padding before the input."""
        lengths, before = [], []
        for axis, side in enumerate(sides):
            size, stride, dilation = self.size[axis], self.strides[axis], self.dilation[axis]
            reach = (size - 1) * dilation + 1
            same = self.padding == "same"
            if self.transposed:
                if self.more is not None:
                    length = (side - 1) * stride + reach - (2 * (reach // 2) if same else 0) + self.more[axis]
                else:
                    length = side * stride if same else side * stride + max(reach - stride, 0)
                lengths.append(length)
                before.append(max((side - 1) * stride + reach - length, 0) // 2 if same else 0)
            elif same:
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
        groups = channels if self.depthwise else self.groups
        grouped = values.reshape(len(picked), -1, groups, channels // groups)
        return grouped.transpose(0, 2, 1, 3).reshape(len(picked), groups, -1)

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
    """An einsum of one input with the kernel: letters of both that are summed over make rows, those of the kernel and
    the result make outputs; those of all three are groups."""

    inputs_: str = ""
    kernel_: str = ""
    outputs_: str = ""
    biased: str = ""
    """Letters of the bias."""

    def _letters(self, where: str, *, inside: bool, outside: bool) -> str:
        """Letters of the kernel (or not), in the order of `where`, that are in the other tensor or not."""
        other = self.outputs_ if where is self.inputs_ else self.inputs_
        return "".join(one for one in where if (one in self.kernel_) is inside and (one in other) is outside)

    @property
    def _contracted(self) -> str:
        return self._letters(self.inputs_, inside=True, outside=False)

    @property
    def _grouped(self) -> str:
        return self._letters(self.outputs_, inside=True, outside=True)

    @property
    def _new(self) -> str:
        return self._letters(self.outputs_, inside=True, outside=False)

    @property
    def _kept(self) -> str:
        return self._letters(self.inputs_, inside=False, outside=True)

    def axes(self, kernel: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.kernel_.index(letter) for letter in self._grouped + self._new)

    def channel(self, rank: int) -> int | None:
        own = self._grouped + self._new
        return self.outputs_.index(own) if len(own) == 1 else None

    def rows(self, inputs: Array, picked: Array) -> Array:
        letters = self._kept + self._grouped + self._contracted
        moved = inputs.transpose([self.inputs_.index(letter) for letter in letters])
        kept, groups = len(self._kept), len(self._grouped)
        sizes = moved.shape[kept : kept + groups]
        return moved.reshape(-1, int(np.prod(sizes)), int(np.prod(moved.shape[kept + groups :])))[picked]

    def outputs(self, outputs: Array) -> Array:
        letters = self._kept + self._grouped + self._new
        moved = outputs.transpose([self.outputs_.index(letter) for letter in letters])
        return moved.reshape(-1, int(np.prod(moved.shape[len(self._kept) :])))

    def matrix(self, kernel: Array) -> Array:
        parts = (self._grouped, self._contracted, self._new)
        moved = kernel.transpose([self.kernel_.index(letter) for letter in "".join(parts)])
        ends = np.cumsum([0, *map(len, parts)])
        return moved.reshape([int(np.prod(moved.shape[start:stop])) for start, stop in pairwise(ends)])

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        letters = self._grouped + self._contracted + self._new
        sizes = [like[self.kernel_.index(letter)] for letter in letters]
        return matrix.reshape(sizes).transpose([letters.index(letter) for letter in self.kernel_])

    def offset(self, bias: Array, offset: Array, like: tuple[int, ...]) -> Array:
        """A number for outputs that have one bias together is the mean of theirs."""
        letters = self._grouped + self._new
        full = offset.reshape([like[self.kernel_.index(letter)] for letter in letters])
        full = np.mean(full, axis=tuple(n for n, letter in enumerate(letters) if letter not in self.biased))
        left = [letter for letter in letters if letter in self.biased]
        wanted = [letter for letter in self.outputs_ if letter in left]
        sizes = [full.shape[left.index(letter)] for letter in wanted]
        named = [letter for letter in self.outputs_ if letter in self.biased]
        shape = [sizes[wanted.index(letter)] if letter in wanted else 1 for letter in named]
        moved = full.transpose([left.index(letter) for letter in wanted]).reshape(shape)
        return bias + _fitted(moved, bias.shape)

    def biases(self, bias: Array, shape: Sequence[int]) -> Array:
        return self.outputs(np.broadcast_to(bias, (1, *shape[1:])))


def _fitted(values: Array, shape: tuple[int, ...]) -> Array:
    """Values with the axes of length 1 that a shape has among its own."""
    sizes = [size for size in values.shape if size != 1]
    return values.reshape(shape) if sizes == [size for size in shape if size != 1] else values


@dataclass(frozen=True)
class Repeated(Linear):
    """A linear layer at every place of the axis that follows the batch: one in a TimeDistributed."""

    inner: Linear = field(default_factory=lambda: DenseRows(True))

    def _joined(self, values: Array) -> Array:
        return values.reshape(-1, *values.shape[2:])

    def axes(self, kernel: Sequence[int]) -> tuple[int, ...]:
        return self.inner.axes(kernel)

    def copies(self, kernel: Sequence[int]) -> int:
        return self.inner.copies(kernel)

    def channel(self, rank: int) -> int | None:
        axis = self.inner.channel(rank - 1)
        return None if axis is None else axis + 1

    def rows(self, inputs: Array, picked: Array) -> Array:
        return self.inner.rows(self._joined(inputs), picked)

    def outputs(self, outputs: Array) -> Array:
        return self.inner.outputs(self._joined(outputs))

    def matrix(self, kernel: Array) -> Array:
        return self.inner.matrix(kernel)

    def kernel(self, matrix: Array, like: tuple[int, ...]) -> Array:
        return self.inner.kernel(matrix, like)

    def offset(self, bias: Array, offset: Array, like: tuple[int, ...]) -> Array:
        return self.inner.offset(bias, offset, like)

    def biases(self, bias: Array, shape: Sequence[int]) -> Array:
        return self.inner.biases(bias, (shape[0], *shape[2:]))


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(item) for item in value)


def linear_rows(class_name: str, config: Mapping[str, Any], rank: int | None = None) -> Linear | None:
    """How a layer is linear; None for one that is not, or not in one piece.

    Args:
        class_name, config: of the layer.
        rank: axes of its input, batch included; None where that is not known.
    """
    if is_quantized(config):
        return None
    bias = bool(config.get("use_bias", True))
    if class_name == "TimeDistributed":
        found = inner_layer(config)
        inner = None if found is None else linear_rows(*found, None if rank is None else rank - 1)
        return None if inner is None else Repeated(inner.bias, inner)
    if class_name == "Dense":
        return DenseRows(bias)
    if class_name == "EinsumDense":
        return _einsum_rows(config, rank)
    shape = re.fullmatch(r"(Depthwise)?Conv([123])D(Transpose)?", class_name)
    return None if shape is None else _convolution(config, int(shape[2]), bool(shape[1]), bool(shape[3]), bias)


def _convolution(
    config: Mapping[str, Any], dimensions: int, depthwise: bool, transposed: bool, bias: bool
) -> ConvolutionRows:
    more = config.get("output_padding") if transposed else None
    return ConvolutionRows(
        bias,
        _tuple(config["kernel_size"], dimensions),
        _tuple(config.get("strides", 1), dimensions),
        _tuple(config.get("dilation_rate", 1), dimensions),
        str(config.get("padding", "valid")).lower(),
        transposed,
        depthwise,
        config.get("data_format") == "channels_first",
        int(config.get("groups") or 1),
        None if more is None else _tuple(more, dimensions),
    )


def _einsum_rows(config: Mapping[str, Any], rank: int | None) -> Linear | None:
    labels = einsum(config)
    if labels is None:
        return None
    inputs, kernel, outputs, left = labels
    if left is not None:
        if rank is None or rank < len(inputs):
            return None
        free = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in inputs + kernel + outputs]
        more = "".join(free[: rank - len(inputs)])
        inputs, outputs = (more + inputs, more + outputs) if left else (inputs + more, outputs + more)
    plain = len({*inputs}) == len(inputs) and len({*outputs}) == len(outputs) and len({*kernel}) == len(kernel)
    used = all(letter in inputs or letter in outputs for letter in kernel)
    kept = [letter for letter in inputs if letter not in kernel]
    if not plain or not used or inputs[0] in kernel or any(letter not in outputs for letter in kept):
        return None
    if any(letter not in inputs and letter not in kernel for letter in outputs):
        return None
    biased = str(config.get("bias_axes") or "")
    return EinsumRows(bool(biased), inputs, kernel, outputs, biased)


def agrees(linear: Linear, given: Array, made: Array, kernel: Array, bias: Array | None, tolerance: float) -> bool:
    """Whether a layer really is what is taken for its design.

    Args:
        linear: the design.
        given, made: a tensor that the layer read, and what it gave, before an activation function of its own.
        kernel, bias: of the layer; None where it has none.
        tolerance: largest error, in shares of the largest number.
    """
    try:
        expected = linear.outputs(made)
        picked = np.unique(np.linspace(0, len(expected) - 1, 64).astype(np.int64))
        found = np.einsum("rgp,gpq->rgq", linear.rows(given, picked).astype(np.float64), linear.matrix(kernel))
        found = found.reshape(len(picked), -1)
        if bias is not None:
            rows = linear.biases(bias, made.shape)
            found = found + rows[picked % len(rows)]
    except (ValueError, IndexError):
        return False
    if found.shape != expected[picked].shape:
        return False
    error = np.max(np.abs(found - expected[picked]), initial=0.0)
    return bool(error <= tolerance * max(float(np.max(np.abs(expected), initial=0.0)), 1e-6))
