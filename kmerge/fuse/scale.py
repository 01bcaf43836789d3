"""Normalisations: scale and offset of each channel, and the statistics of what the merged network really gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import NORMALS
from kmerge.fuse.context import Context, Passes, Site
from kmerge.graph import Ref
from kmerge.methods.registry import Array

SCALES = (*NORMALS, "LayerNormalization", "GroupNormalization", "RMSNormalization")
_LEAST = 1e-12


def rebase(context: Context, layer: int, mean: Array, variance: Array, offset: Array) -> None:
    """BatchNormalization that passes on what it is given plus an offset, with the statistics of what it is given.

    Args:
        layer: in the merged graph.
        mean, variance: of what comes in, per channel.
        offset: to add.
    """
    names = context.weights(layer)
    epsilon = float(context.layer(layer).config.get("epsilon", 1e-3))
    if "gamma" in names:
        context.set(layer, names["gamma"], np.sqrt(variance + epsilon))
    else:
        variance = np.full_like(variance, 1 - epsilon)
    if "beta" in names:
        context.set(layer, names["beta"], offset + mean)
    else:
        mean = -offset
    context.set(layer, names["moving_mean"], mean)
    context.set(layer, names["moving_variance"], variance)


@dataclass(eq=False)
class ScaleTask:
    """One normalisation that no linear layer settles: least squares per channel, from what it normalises."""

    context: Context
    layer: int
    at: int

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        return tuple(ref for call in self.context.calls(self.layer) for _, ref in self.context.seen(call))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(self.context.input(call) for call in self.context.calls(self.layer)))

    def sites(self) -> Sequence[Site]:
        return ()

    def run(self, passes: Passes) -> str:
        context, layer = self.context, self.layer
        assert context.own is not None
        names, live = context.weights(layer), context.own.layers[layer]
        batch = context.layer(layer).class_name in NORMALS
        columns = context.columns(layer, 0, 0)
        axis = context.layer(layer).config.get("axis", -1)
        axis = axis[0] if isinstance(axis, (list, tuple)) else axis
        count, x1, x2, t1, xt = 0, *(np.zeros(next(iter(columns.values())).shape[1]) for _ in range(4))
        for theirs, ours, _ in passes:
            for call in context.calls(layer):
                target: Any = sum(
                    _rows(to_numpy(theirs[ref]), axis).astype(np.float64) @ columns[source]
                    for source, ref in context.seen(call)
                )
                given = ours[context.input(call)]
                x = _rows(to_numpy(given if batch else live(given)), axis).astype(np.float64)
                x = x if batch else self._bare(names, x)
                count += len(x)
                x1, x2, t1, xt = x1 + x.sum(0), x2 + (x * x).sum(0), t1 + target.sum(0), xt + (x * target).sum(0)
        mean, middle = x1 / count, t1 / count
        variance = np.maximum(x2 / count - mean**2, 0)
        slope = (xt / count - mean * middle) / np.maximum(variance, _LEAST)
        if "beta" not in names and not batch:
            slope = xt / np.maximum(x2, _LEAST)
        if batch:
            epsilon = float(context.layer(layer).config.get("epsilon", 1e-3))
            context.set(layer, names["moving_mean"], mean)
            context.set(layer, names["moving_variance"], variance)
            if "gamma" in names:
                context.set(layer, names["gamma"], slope * np.sqrt(variance + epsilon))
            if "beta" in names:
                context.set(layer, names["beta"], middle)
        else:
            scale = "gamma" if "gamma" in names else "scale"
            if scale in names:
                context.set(layer, names[scale], slope)
            if "beta" in names:
                context.set(layer, names["beta"], middle - (slope if scale in names else 1.0) * mean)
        return f"{context.layer(layer).name}: scale of {len(mean)} channels"

    def _bare(self, names: dict[str, int], x: Array) -> Array:
        """A result without the scale and offset that the layer has now."""
        if "beta" in names:
            x = x - self.context.values[self.layer, names["beta"]]
        scale = "gamma" if "gamma" in names else "scale"
        if scale in names:
            own = self.context.values[self.layer, names[scale]]
            x = x / np.where(np.abs(own) > 1e-6, own, 1e-6)
        return x


def _rows(values: Array, axis: int) -> Array:
    moved = np.moveaxis(values, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def scale_tasks(context: Context, absorbed: set[int]) -> list[ScaleTask]:
    """Tasks for the normalisations that no linear layer settles."""
    found: dict[int, ScaleTask] = {}
    for number, call in enumerate(context.merged.graph.calls):
        if call.layer not in absorbed and context.layer(call.layer).class_name in SCALES and context.weights(call.layer):
            found[call.layer] = ScaleTask(context, call.layer, number)
    return list(found.values())
