"""Repair: each merged unit gets the mean and the spread that its units have in the sources (arXiv:2211.08403)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import Chain
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.design import Linear
from kmerge.fuse.linear import kernel_place
from kmerge.graph import Ref
from kmerge.methods.registry import Array

_LEAST = 1e-8


@dataclass(eq=False)
class RepairTask:
    """One linear layer, with the normalisation behind it if there is one.

    Departs from the paper: where a BatchNormalization follows, it is given the statistics of what comes in and the mean
    and spread of what should come out, in one step and without running the network in training mode.
    """

    context: Context
    layer: int
    chain: Chain
    at: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def _normal(self) -> int | None:
        return self.chain.normal

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        context = self.context
        if self._normal is not None:
            return tuple(ref for _, ref in context.seen(self._normal))
        return tuple(ref for call in context.calls(self.layer) for _, ref in context.results(call))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(self.context.input(call) for call in self.context.calls(self.layer)))

    def sites(self) -> Sequence[Site]:
        return ()

    def run(self, passes: Passes) -> str:
        context, layer = self.context, self.layer
        assert context.own is not None
        linear: Linear = context.chains.linear[layer]
        live = context.own.layers[layer]
        sums: dict[Any, tuple[Array, Array, int]] = {}

        def add(key: Any, values: Any) -> None:
            rows = linear.outputs(to_numpy(values)).astype(np.float64)
            one, two, count = sums.get(key, (0.0, 0.0, 0))
            sums[key] = (one + rows.sum(axis=0), two + (rows * rows).sum(axis=0), count + len(rows))

        for theirs, ours, _ in passes:
            for call in context.calls(layer):
                seen = context.results(call) if self._normal is None else context.seen(self._normal)
                for source, ref in seen:
                    add(source, theirs[ref])
                add("merged", live(ours[context.input(call)]))
        place = kernel_place(context, layer)
        shape = context.values[layer, place].shape
        columns = context.several(layer, [(place, axis) for axis in linear.axes(shape)])
        mean, spread = np.zeros(()), np.zeros(())
        for source, matrix in columns.items():
            wide = linear.widened(matrix, shape)
            own_mean, own_variance = _moments(*sums[source])
            mean, spread = mean + own_mean @ wide, spread + np.sqrt(own_variance) @ abs(wide)
        given, variance = _moments(*sums["merged"])
        if self._normal is not None:
            self._rebase(context.merged.graph.calls[self._normal].layer, given, variance, mean, spread)
        else:
            self._rescale(linear, place, given, variance, mean, spread)
        return f"{context.layer(layer).name}: {len(given)} units repaired"

    def _rebase(self, normal: int, given: Array, variance: Array, mean: Any, spread: Any) -> None:
        context = self.context
        names = context.weights(normal)
        epsilon = float(context.layer(normal).config.get("epsilon", 1e-3))
        if "gamma" in names:
            slope = spread / np.sqrt(variance + _LEAST)
            context.set(normal, names["gamma"], slope * np.sqrt(variance + epsilon))
        else:  # the statistics bear the spread; as far as it is at most what epsilon allows
            divided = np.maximum(variance / np.maximum(spread**2, _LEAST) - epsilon, 0.0)
            slope, variance = 1 / np.sqrt(divided + epsilon), divided
        if "beta" in names:
            context.set(normal, names["beta"], mean)
        else:
            given = given - np.where(slope > 0, mean / np.where(slope > 0, slope, 1.0), 0.0)
        context.set(normal, names["moving_mean"], given)
        context.set(normal, names["moving_variance"], variance)

    def _rescale(self, linear: Linear, place: int, given: Array, variance: Array, mean: Any, spread: Any) -> None:
        context, layer = self.context, self.layer
        names = context.weights(layer)
        alive = variance > _LEAST * max(float(variance.max()), _LEAST)
        factor = np.where(alive, spread / np.sqrt(np.where(alive, variance, 1.0)), 1.0)
        matrix = linear.matrix(context.values[layer, place])
        scaled = matrix * factor.reshape(matrix.shape[0], 1, -1)
        context.set(layer, place, linear.kernel(scaled, context.values[layer, place].shape))
        if "bias" in names:
            bias = context.values[layer, names["bias"]]
            new = mean + factor * (bias.reshape(-1) - given)
            context.set(layer, names["bias"], np.asarray(new).reshape(bias.shape))


def _moments(total: Array, squares: Array, count: int) -> tuple[Array, Array]:
    mean = total / count
    return mean, np.maximum(squares / count - mean**2, 0)


def repair_tasks(context: Context) -> list[RepairTask]:
    """One task per shared linear layer."""
    graph, found = context.merged.graph, {}
    for number, call in enumerate(graph.calls):
        if call.layer in context.chains.linear and context.origin(call.layer).role == "shared":
            found[call.layer] = RepairTask(context, call.layer, context.chains.chain(number), number)
    return list(found.values())
