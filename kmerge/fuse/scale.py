"""Normalisations and slopes: a number or two for each channel, by least squares from what they are given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import NORMALS
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.mixing import Mixing, reached
from kmerge.fuse.ridge import whole_rows
from kmerge.graph import Ref
from kmerge.methods.registry import Array
from kmerge.shapes.layers import inner_layer, is_keras

SCALES = (*NORMALS, "LayerNormalization", "GroupNormalization", "RMSNormalization", "PReLU")
_LEAST = 1e-12
_LEAST_SLOPE = 1e-3
_STILL = 1e-10
"""Share of the largest variance below which a channel tells nothing of its slope."""


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
    _put_statistics(context, layer, mean, variance)


def _put_statistics(context: Context, layer: int, mean: Array, variance: Array) -> None:
    """Statistics of BatchNormalization, with those that only its training looks at."""
    names = context.weights(layer)
    spread = np.sqrt(np.maximum(variance, 0))
    for name, value in (
        ("moving_mean", mean),
        ("moving_variance", variance),
        ("moving_stddev", spread),
        ("renorm_mean", mean),
        ("renorm_stddev", spread),
    ):
        if name in names:
            context.set(layer, names[name], value)


def unwrapped(context: Context, layer: int) -> tuple[str, Mapping[str, Any], int]:
    """Class and configuration of a layer, or of the one in a TimeDistributed, and how many axes that puts in front."""
    own = context.layer(layer)
    if not is_keras(own.class_name, own.entry):
        return "", {}, 0
    inner = inner_layer(own.config) if own.class_name == "TimeDistributed" else None
    return (own.class_name, own.config, 0) if inner is None else (*inner, 1)


@dataclass(eq=False)
class _Sums:
    """Sums over rows, per channel: of what comes in, what should come out, and their products."""

    x: Array
    xx: Array
    t: Array
    xt: Array
    count: Array

    @classmethod
    def empty(cls, size: int) -> _Sums:
        return cls(*(np.zeros(size) for _ in range(5)))

    def add(self, x: Array, target: Array, valid: Array) -> None:
        self.x += valid * x.sum(axis=0)
        self.xx += valid * (x * x).sum(axis=0)
        self.t += valid * target.sum(axis=0)
        self.xt += valid * (x * target).sum(axis=0)
        self.count += valid * len(x)


@dataclass(eq=False)
class ScaleTask:
    """One normalisation that no linear layer settles, or a PReLU: least squares per channel, from what it is given."""

    context: Context
    layer: int
    at: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        return tuple(ref for call in self.context.calls(self.layer) for _, ref in self.context.seen(call))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(self.context.input(call) for call in self.context.calls(self.layer)))

    def sites(self) -> Sequence[Site]:
        return ()

    @cached_property
    def _place(self) -> int:
        """A weight that has a number per channel."""
        return next(iter(self.context.weights(self.layer).values()))

    def _axes(self, rank: int) -> tuple[list[int], list[int]]:
        """Axes of the tensor with numbers of their own, and those of the weight that they are."""
        class_name, config, lead = unwrapped(self.context, self.layer)
        if class_name == "PReLU":
            sizes = self.context.values[self.layer, self._place].shape
            own = [number for number, size in enumerate(sizes) if size > 1]
            return [number + 1 + lead for number in own], own
        given = config.get("axis", -1)
        axes = [-1] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        axes = [axis + lead if axis >= 0 else axis + rank for axis in axes]
        return axes, list(range(len(axes)))

    def _columns(self, axes: Sequence[int], sources: Collection[int]) -> dict[int, Mixing]:
        return self.context.several(self.layer, [(self._place, axis) for axis in axes], sources)

    def run(self, passes: Passes) -> str:
        context, layer = self.context, self.layer
        assert context.own is not None
        names, live = context.weights(layer), context.own.layers[layer]
        class_name = unwrapped(context, layer)[0]
        scale = next((name for name in ("gamma", "scale", "alpha") if name in names), None)
        guess = {name: np.array(context.values[layer, place], dtype=np.float64) for name, place in names.items()}
        if class_name not in (*NORMALS, "PReLU"):  # what comes in is what the layer gives without these
            for name, value in (("gamma", 1.0), ("scale", 1.0), ("beta", 0.0)):
                if name in names:
                    context.set(layer, names[name], np.full_like(guess[name], value))
        sums = _Sums.empty(guess[next(iter(names))].size)
        given = _Sums.empty(len(sums.x))
        for theirs, ours, _ in passes:
            for call in context.calls(layer):
                tensor = ours[context.input(call)]
                axes, own = self._axes(len(tensor.shape))
                seen = context.seen(call)
                columns = self._columns(own, [source for source, _ in seen])
                target = sum(_rows(to_numpy(theirs[ref]), axes).astype(np.float64) @ columns[n] for n, ref in seen)
                valid = reached([*columns.values()]).astype(np.float64)
                whole = tensor if class_name in (*NORMALS, "PReLU") else live(tensor)
                x = _rows(to_numpy(whole), axes).astype(np.float64)
                target = np.asarray(target)
                told = whole_rows(x, target)
                x, target = x[told], target[told]
                given.add(x, x, np.ones(x.shape[1]))
                if class_name == "PReLU":
                    x, target = np.minimum(x, 0), target - np.maximum(x, 0)
                sums.add(x, target, valid)
        if class_name == "PReLU":
            self._put_slope(sums, names["alpha"], guess["alpha"])
        elif class_name in NORMALS:
            self._put_batch(sums, given, names, guess)
        else:
            self._put_scale(sums, names, guess, scale)
        return f"{context.layer(layer).name}: {class_name} of {len(sums.x)} channels"

    def _put_slope(self, sums: _Sums, place: int, guess: Array) -> None:
        """PReLU: what comes out below zero against what comes in."""
        told = sums.xx > _STILL * max(float(sums.xx.max(initial=0.0)), _LEAST)
        slope = np.where(told, sums.xt / np.where(told, sums.xx, 1.0), guess.ravel())
        self.context.set(self.layer, place, slope.reshape(guess.shape))

    def _put_batch(self, sums: _Sums, given: _Sums, names: Mapping[str, int], guess: Mapping[str, Array]) -> None:
        context, layer = self.context, self.layer
        epsilon = float(unwrapped(context, layer)[1].get("epsilon", 1e-3))
        own = guess["gamma"] if "gamma" in names else 1.0
        known = own / np.sqrt(np.maximum(guess["moving_variance"], 0) + epsilon)
        slope, middle, target = self._line(sums, np.asarray(known))
        count = np.maximum(given.count, 1)
        mean, variance = given.x / count, np.maximum(given.xx / count - (given.x / count) ** 2, 0)
        if "gamma" in names:
            context.set(layer, names["gamma"], slope * np.sqrt(variance + epsilon))
        else:
            slope = np.where(slope > _LEAST_SLOPE, slope, known)  # it cannot be negative, nor none
            variance = np.maximum(1 / slope**2 - epsilon, 0)
            slope = 1 / np.sqrt(variance + epsilon)
        if "beta" in names:
            context.set(layer, names["beta"], target + slope * (mean - middle))
        else:
            mean = middle - np.where(np.abs(slope) > _LEAST, target / np.where(slope == 0, 1.0, slope), 0.0)
        _put_statistics(context, layer, mean, variance)

    def _put_scale(self, sums: _Sums, names: Mapping[str, int], guess: Mapping[str, Array], scale: str | None) -> None:
        context, layer = self.context, self.layer
        known = np.ones(len(sums.x)) if scale is None else guess[scale].ravel()
        if "beta" in names:
            slope, middle, target = self._line(sums, known)
        else:
            told = sums.xx > _STILL * max(float(sums.xx.max(initial=0.0)), _LEAST)
            slope = np.where(told, sums.xt / np.where(told, sums.xx, 1.0), known)
            middle = target = np.zeros_like(slope)
        if scale is not None:
            context.set(layer, names[scale], slope.reshape(guess[scale].shape))
        else:
            slope = np.ones_like(slope)
        if "beta" in names:
            context.set(layer, names["beta"], (target - slope * middle).reshape(guess["beta"].shape))

    @staticmethod
    def _line(sums: _Sums, known: Array) -> tuple[Array, Array, Array]:
        """Slope, mean of what comes in and of what should come out; the known slope where nothing tells it."""
        count = np.maximum(sums.count, 1)
        middle, target = sums.x / count, sums.t / count
        variance = sums.xx / count - middle**2
        told = variance > _STILL * max(float(variance.max(initial=0.0)), _LEAST)
        slope = np.where(told, (sums.xt / count - middle * target) / np.where(told, variance, 1.0), known.ravel())
        return slope, middle, target


def _rows(values: Array, axes: Sequence[int]) -> Array:
    """Values with some axes, in their order, as columns."""
    moved = np.moveaxis(values, list(axes), list(range(values.ndim - len(axes), values.ndim)))
    return moved.reshape(-1, int(np.prod([values.shape[axis] for axis in axes])))


def scale_tasks(context: Context, absorbed: set[int]) -> list[ScaleTask]:
    """Tasks for the normalisations that no linear layer settles, and for PReLU."""
    found: dict[int, ScaleTask] = {}
    for number, call in enumerate(context.merged.graph.calls):
        layer = call.layer
        if layer not in absorbed and layer not in found and context.weights(layer):
            class_name = unwrapped(context, layer)[0]
            if class_name in SCALES and (class_name != "PReLU" or max(_shape(context, layer), default=1) > 1):
                found[layer] = ScaleTask(context, layer, number)
    return list(found.values())


def _shape(context: Context, layer: int) -> tuple[int, ...]:
    source, own = context.origin(layer).members[0]
    return tuple(context.frame.sources[source].states[own].weights[0].tensor.shape)
