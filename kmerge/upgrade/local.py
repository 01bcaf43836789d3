"""Locally connected layers, which current Keras has no more: patches of the input, each with a kernel of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.methods.registry import Array
from kmerge.store import Tensor
from kmerge.store.derived import derived
from kmerge.upgrade.part import Chain, Context, Part, multiplied, operation, reshaped
from kmerge.upgrade.settings import HARD_SIGMOID


@dataclass(frozen=True)
class _Grid:
    """Which places of the input a locally connected layer reads.

    Attributes:
        sizes: rows and columns of the input.
        channels, filters: of the input and of the output.
        size, strides: of the patches.
        places: rows and columns of patches.
        before: rows and columns of zeros before the input.
        first: whether channels stand first.
    """

    sizes: tuple[int, int]
    channels: int
    filters: int
    size: tuple[int, int]
    strides: tuple[int, int]
    places: tuple[int, int]
    before: tuple[int, int]
    first: bool

    @property
    def count(self) -> int:
        return self.places[0] * self.places[1]

    @property
    def inputs(self) -> int:
        """Entries of one patch."""
        return self.size[0] * self.size[1] * self.channels

    @property
    def after(self) -> tuple[int, int]:
        """Rows and columns of zeros that the last patches reach into."""
        ends = zip(self.places, self.strides, self.before, self.size, self.sizes, strict=True)
        return tuple(max(0, (count - 1) * step - lead + width - of) for count, step, lead, width, of in ends)  # type: ignore[return-value]

    @property
    def inside(self) -> tuple[Array, Array]:
        """Per axis, how many rows (columns) of each patch lie inside the input."""
        found = []
        for count, step, lead, width, of in zip(
            self.places, self.strides, self.before, self.size, self.sizes, strict=True
        ):
            first = np.arange(count) * step - lead
            found.append(np.minimum(first + width, of) - np.maximum(first, 0))
        return found[0], found[1]

    def positions(self, places: Array) -> Array:
        """Position in the flattened rows and columns per place and entry of the patch; -1 outside the input.

        Shape (places, rows, columns of a patch).
        """
        axes = []
        for number, step, lead, width, of in zip(
            np.divmod(places, self.places[1]), self.strides, self.before, self.size, self.sizes, strict=True
        ):
            found = number[:, None] * step - lead + np.arange(width)
            axes.append(np.where((found >= 0) & (found < of), found, -1))
        rows, columns = axes[0][:, :, None], axes[1][:, None, :]
        return np.where((rows < 0) | (columns < 0), -1, rows * self.sizes[1] + columns)


def locally_connected(part: Part, context: Context) -> Chain:
    """ExtractPatches, then an EinsumDense with one kernel per place, then a Reshape back to the places.

    A kernel is stored as (places, inputs, filters) by `implementation=1`, the only one before TensorFlow 1.13, as one
    number for each pair of an input and an output by 2, and for each pair that is connected by 3.
    """
    config = part.config
    rank = 1 if part.class_name.endswith("1D") else 2
    if context.input_shape is None or any(length is None for length in context.input_shape[1:]):
        context.refuse(part.class_name, "unknown", "is locally connected, on an input of unknown shape")
        return [part]
    if not part.tensors:
        raise ValueError("a locally connected layer has no weights")
    grid = _grid(part, rank, [int(length or 0) for length in context.input_shape[1:]])
    count, filters, first = grid.count, grid.filters, grid.first
    tensors = [_kernel(part.tensors[0], grid, int(config.get("implementation", 1)))]
    if len(part.tensors) > 1:
        tensors.append(_bias(part.tensors[1], count, filters, first))
    if context.old and config.get("activation") == "hard_sigmoid":
        tensors = [multiplied(tensor, HARD_SIGMOID, context) for tensor in tensors]
    linear = Part(
        "EinsumDense",
        {
            "name": config.get("name"),
            "trainable": config.get("trainable", True),
            "dtype": config.get("dtype", "float32"),
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
    chain: Chain = []
    if first:
        axes = [2, 1] if rank == 1 else [2, 3, 1]
        chain.append(Part("Permute", {"dims": axes}, suffix="channels_last"))
    if rank == 1:
        chain.append(Part("Reshape", {"target_shape": [*grid.sizes, grid.channels]}, suffix="rows"))
    if any(grid.before) or any(grid.after):
        sides = [list(ends) for ends in zip(grid.before, grid.after, strict=True)]
        chain.append(Part("ZeroPadding2D", {"padding": sides, "data_format": "channels_last"}, suffix="padding"))
    chain.append(
        operation(
            "ExtractPatches",
            "image",
            size=list(grid.size),
            strides=list(grid.strides),
            dilation_rate=1,
            padding="valid",
            data_format="channels_last",
        )
    )
    chain.append(Part("Reshape", {"target_shape": [count, grid.inputs]}, suffix="places"))
    chain.append(linear)
    if rank == 2:
        chain.append(Part("Reshape", {"target_shape": [*grid.places, filters]}, suffix="grid"))
    if first:
        axes = [2, 1] if rank == 1 else [3, 1, 2]
        chain.append(Part("Permute", {"dims": axes}, suffix="channels_first"))
    return chain


def _grid(part: Part, rank: int, shape: list[int]) -> _Grid:
    config = part.config
    size = _pair(config.get("kernel_size") or [config.get("nb_row"), config.get("nb_col")], rank)
    strides = _pair(config.get("strides") or [1] * rank, rank)
    first = config.get("data_format") == "channels_first"
    channels, spatial = (shape[0], shape[1:]) if first else (shape[-1], shape[:-1])
    sizes = _pair(spatial, rank)
    if config.get("padding") == "same":
        places = (-(-sizes[0] // strides[0]), -(-sizes[1] // strides[1]))
        before = (size[0] // 2, size[1] // 2)
        # Rows and columns of a patch that lie outside the input at every place are left out.
        left = [max(0, lead - of + 1) for lead, of in zip(before, sizes, strict=True)]
        ends = zip(size, before, sizes, left, strict=True)
        size = _pair([min(width, lead + of) - cut for width, lead, of, cut in ends], 2)
        before = (before[0] - left[0], before[1] - left[1])
    else:
        places = ((sizes[0] - size[0]) // strides[0] + 1, (sizes[1] - size[1]) // strides[1] + 1)
        before = (0, 0)
    filters = int(config.get("filters") or part.tensors[0].shape[-1])
    if min(*sizes, channels, filters, *size, *strides, *places) < 1:
        raise ValueError(f"patches of {size} in steps of {strides} do not fit an input of {sizes}")
    return _Grid(sizes, channels, filters, size, strides, places, before, first)


def _pair(value: Any, rank: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * rank
    first, second = [*values, 1][:2]
    return int(first), int(second)


def _kernel(kernel: Tensor, grid: _Grid, implementation: int) -> Tensor:
    """A kernel as (places, inputs of a patch by row, column and channel, filters).

    All sizes but the kernel's own are merely claimed, so it is compared with them before anything is made of them.
    """
    wanted = (grid.count, grid.inputs, grid.filters)
    if implementation == 1:
        expected: tuple[int, ...] = wanted
    elif implementation == 3:
        if kernel.size < grid.count * grid.channels * grid.filters:  # of one pixel at least, at each place
            raise ValueError(f"kernel is {kernel.shape}, too small for {grid.count} places")
        rows, columns = grid.inside
        expected = (int(rows.sum()) * int(columns.sum()) * grid.channels * grid.filters,)
    else:
        rank = len(kernel.shape) // 2 - 1
        spatial, places = grid.sizes[:rank], grid.places[:rank]
        ends = [(grid.channels, *spatial), (grid.filters, *places)]
        expected = tuple(n for end in ends for n in (end if grid.first else (*end[1:], end[0])))
    if kernel.shape != expected:
        raise ValueError(f"kernel is {kernel.shape}, expected {expected}")

    def make() -> Array:
        if implementation == 1:
            split = kernel.read().reshape(grid.count, grid.channels, *grid.size, grid.filters)
            return np.moveaxis(split, 1, 3).reshape(wanted)
        stored = kernel.read().reshape(-1)
        whole = np.empty(wanted, stored.dtype)
        step = max(1, _BLOCK // (grid.inputs * grid.filters))
        for start in range(0, grid.count, step):
            places = np.arange(start, min(start + step, grid.count))
            where = _pairs(grid, places) if implementation == 2 else _connected(grid, places)
            made = np.where(where < 0, 0, stored[where])
            whole[start : start + step] = made.reshape(len(places), grid.inputs, grid.filters)
        return whole

    if implementation == 1 and not grid.first:
        return kernel
    reorders = implementation == 1 or (implementation == 3 and kernel.size == math.prod(wanted))
    return derived(kernel, wanted, make, parts=(kernel,) if reorders else ())


_BLOCK = 1 << 16
"""Entries of a kernel that are looked up at a time."""


def _pairs(grid: _Grid, places: Array) -> Array:
    """Where `implementation=2` stores each entry; -1 outside. Shape (places, rows, columns, channels, filters)."""
    at = grid.positions(places)[..., None, None]
    place = places[:, None, None, None, None]
    channel, out = np.arange(grid.channels)[:, None], np.arange(grid.filters)
    if grid.first:
        before, after = channel * (grid.sizes[0] * grid.sizes[1]) + at, out * grid.count + place
    else:
        before, after = at * grid.channels + channel, place * grid.filters + out
    return np.where(at < 0, -1, before * (grid.count * grid.filters) + after)


def _connected(grid: _Grid, places: Array) -> Array:
    """Where `implementation=3` stores each entry: by output, then by input; -1 outside. Shape as `_pairs`."""
    inside = grid.positions(places) >= 0
    flat = inside.reshape(len(places), -1)
    rank = (np.cumsum(flat, axis=1) - 1).reshape(inside.shape)[..., None, None]
    rows, columns = grid.inside
    row, column = np.divmod(places, grid.places[1])
    pixels = rows[row] * columns[column]  # of each patch
    earlier = (np.cumsum(rows) - rows)[row] * columns.sum() + rows[row] * (np.cumsum(columns) - columns)[column]
    count = pixels[:, None, None, None, None]
    start = (earlier * grid.channels)[:, None, None, None, None]  # entries of the patches before
    channel, out = np.arange(grid.channels)[:, None], np.arange(grid.filters)
    if grid.first:
        where = out * (rows.sum() * columns.sum() * grid.channels) + start + channel * count + rank
    else:
        where = start * grid.filters + out * count * grid.channels + rank * grid.channels + channel
    return np.where(inside[..., None, None], where, -1)


def _bias(bias: Tensor, count: int, filters: int, first: bool) -> Tensor:
    """One number per place and filter, which Keras reads filter by filter where channels stand first."""
    if bias.size != count * filters:
        raise ValueError(f"bias is {bias.shape}, expected {count} places of {filters} numbers")
    if first:
        return derived(bias, (count, filters), lambda: bias.read().reshape(filters, count).T, parts=(bias,))
    return reshaped(bias, (count, filters))
