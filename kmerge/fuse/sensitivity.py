"""Which errors in what units do matter for the outputs of their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kmerge.calibration.network import BEFORE
from kmerge.calibration.slopes import slopes
from kmerge.fuse.context import ACTIVATIONS, Context, Site, Task
from kmerge.graph import Ref
from kmerge.methods.registry import Array

INPUTS = 128
"""Inputs whose gradients are taken."""
_AT_ONCE = 16

Sensitivities = Mapping[tuple[int, int], Array]
"""Mean products of gradients by (number of a site, space), shape (sources * units,) squared."""


def sensitivities(context: Context, tasks: Sequence[Task], together: bool = False) -> Sensitivities:
    """How the sources' outputs, before a softmax, change with what their units give, behind the activation.

    Outputs are brought to one scale and summed up with random signs, so that mean products of gradients stand for all
    outputs alike (Hutchinson's estimate). Empty on a backend without gradients.

    Args:
        context: with pairs still to be found.
        tasks: whose sites are looked at.
        together: whether only the means of the sources' outputs matter, so that their errors may cancel: each source
            gives as many outputs, of the same shapes.
    """
    sites: list[Site] = [site for task in tasks for site in task.sites() if site.averaged]
    numbers = [number for number, site in enumerate(site for task in tasks for site in task.sites()) if site.averaged]
    rng = context.random("signs")
    views = context.random("signs/sites")
    behind = {ref: _behind(context, ref) for site in sites for ref in site.tensors}
    outputs = {final.ref: final.softmax for own in context.finals for final in own}
    places = {ref: number for number, ref in enumerate(outputs)}
    if together:  # those that one mean is made of have one place
        places = {final.ref: number for own in context.finals for number, final in enumerate(own)}
    spreads: dict[int, float] = {}
    drawn: dict[int, Array] = {}

    def weigh(ref: Ref, values: Array) -> Array:
        place = places[ref]
        if place not in spreads:
            spreads[place] = max(float(values.std(axis=0).max()), 1e-6 * float(np.abs(values).max()) + 1e-12)
        if place not in drawn:
            drawn[place] = rng.choice([-1.0, 1.0], values.shape)
        signs = drawn[place] / spreads[place]
        if outputs[ref]:  # a softmax does not see what all its inputs have in common
            signs -= signs.mean(axis=-1, keepdims=True)
        return np.asarray(signs)

    sums: dict[tuple[int, int], Array] = {}
    seen = 0
    for batch in context.source_tape.batches:
        for start in range(0, len(batch[0]), _AT_ONCE):
            if seen >= INPUTS:
                return sums
            part = tuple(array[start : start + _AT_ONCE] for array in batch)
            seen += len(part[0])
            drawn.clear()
            found = slopes(context.every, part, list(outputs), list(behind.values()), weigh)
            for number, site in zip(numbers, sites, strict=True):
                if all(behind[ref] in found for ref in site.tensors):
                    values = {ref: found[behind[ref]] for ref in site.tensors}
                    for space, rows in site.views(values, np.inf, views):
                        if context.frame.spaces[space].fixed:
                            continue
                        product = rows.T @ rows
                        sums[number, space] = sums.get((number, space), 0.0) + product.astype(np.float64)
    return sums


def _behind(context: Context, ref: Ref) -> Ref:
    """The tensor behind the activation that a unit's result goes through, in the sources' network."""
    if ref.output == BEFORE:
        return Ref(ref.call, 0)
    graph = context.every.merged.graph
    readers = context.every_chains.readers.get(ref, ())
    if len(readers) == 1 and readers[0] >= 0:
        layer = graph.layers[graph.calls[readers[0]].layer]
        if layer.class_name in ACTIVATIONS and layer.class_name != "Softmax":
            return Ref(readers[0], 0)
    return ref
