"""Output shapes of layers that move a window over their input: convolutions and pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kmerge.shapes.calls import Inputs
from kmerge.shapes.values import Shape, Size, axes, integer, integers, product, replaced

Config = Mapping[str, Any]


def windows(
    sizes: Sequence[Size], kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: Any
) -> tuple[Size, ...] | None:
    """Number of places of a window along each axis; None where it does not fit or `padding` is not known."""
    padding = padding.lower() if isinstance(padding, str) else None
    if padding not in ("valid", "same", "causal"):
        return None
    places: list[Size] = []
    for size, width, step, spread in zip(sizes, kernel, strides, dilation, strict=True):
        if size is None:
            places.append(None)
            continue
        covered = (width - 1) * spread if padding == "valid" else 0
        count = (size - covered - 1) // step + 1
        if count <= 0:
            return None
        places.append(count)
    return tuple(places)


def moved(rank: int, config: Config, shape: Shape | None, window: Any, channels: Size, keep: bool) -> Shape | None:
    """Shape after a window moved over it; `keep` leaves the channels as they are."""
    found = axes(shape, rank, config)
    kernel = integers(window, rank)
    strides = kernel if keep and config.get("strides") is None else integers(config.get("strides", 1), rank)
    dilation = integers(config.get("dilation_rate", 1), rank)
    if shape is None or found is None or kernel is None or strides is None or dilation is None:
        return None
    spatial, channel = found
    places = windows([shape[axis] for axis in spatial], kernel, strides, dilation, config.get("padding", "valid"))
    if places is None or not (keep or channels is not None):
        return None
    changes: dict[int, Size] = dict(zip(spatial, places, strict=True))
    return replaced(shape, changes if keep else {**changes, channel: channels})


def conv(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    """Conv, SeparableConv, and LocallyConnected of Keras 2."""
    return moved(rank, config, inputs.first, config.get("kernel_size"), integer(config.get("filters")), False)


def depthwise(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    """DepthwiseConv: every channel becomes `depth_multiplier` channels."""
    shape, found = inputs.first, axes(inputs.first, rank, config)
    if shape is None or found is None:
        return None
    channels = product((shape[found[1]], integer(config.get("depth_multiplier", 1))))
    places = moved(rank, config, shape, config.get("kernel_size"), None, True)
    return replaced(places, {found[1]: channels}) if places is not None else None


def pooling(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    """MaxPooling and AveragePooling."""
    return moved(rank, config, inputs.first, config.get("pool_size"), None, True)


def conv_transpose(rank: int, config: Config, inputs: Inputs) -> Shape | None:
    """ConvTranspose. Source: `keras/src/backend/common/backend_utils.py`, `_get_output_shape_given_tf_padding`."""
    shape, found = inputs.first, axes(inputs.first, rank, config)
    kernel, filters = integers(config.get("kernel_size"), rank), integer(config.get("filters"))
    strides, dilation = integers(config.get("strides", 1), rank), integers(config.get("dilation_rate", 1), rank)
    more = config.get("output_padding")
    extra = integers(more, rank, 0) if more is not None else (None,) * rank
    padding = str(config.get("padding", "valid")).lower()
    if shape is None or found is None or filters is None or padding not in ("valid", "same"):
        return None
    if kernel is None or strides is None or dilation is None or extra is None:
        return None
    changes: dict[int, Size] = {found[1]: filters}
    for number, axis in enumerate(found[0]):
        size, step, added = shape[axis], strides[number], extra[number]
        width = (kernel[number] - 1) * dilation[number] + 1
        if size is None:
            changes[axis] = None
        elif padding == "valid":
            changes[axis] = (size - 1) * step + (max(width, step) if added is None else width + added)
        else:
            changes[axis] = size * step if added is None else (size - 1) * step + width % 2 + added
    return replaced(shape, changes)
