"""A fusion from end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.calibration.network import Tape, open_network
from kmerge.fuse.context import Context, Passes, Task
from kmerge.fuse.linear import linear_tasks
from kmerge.fuse.pairs import Frame
from kmerge.fuse.scale import scale_tasks
from kmerge.fuse.units import clustered, is_ours, settled, unit_moments
from kmerge.layout import Layout
from kmerge.plan import Plan
from kmerge.spaces import layout_spaces
from kmerge.surgery import merge_graphs

MEMORY = 256 << 20
"""Bytes of activations that each of both networks may keep between two steps."""


def run_fusion(layout: Layout, plan: Plan, inputs: Any, folder: Path, width: float, seed: int, log: Any = None, opts: Any = {}) -> Context:
    sources, count = layout.sources, len(layout.sources)
    merged = merge_graphs(layout, plan)
    apart = replace(plan, outputs="heads", inputs="shared", layers=tuple(
        replace(layer, role="shared" if layer.class_name == "InputLayer" else "private", method="") for layer in plan.layers))
    every = open_network(merge_graphs(layout, apart), sources, None, folder, "sources")
    shared = [n for n, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
    of_source = {n: frozenset(found.layers[s] for s in shared) for n, found in enumerate(layout.matches)}
    spaces = layout_spaces(layout, shared)
    frame = Frame(tuple(sources), spaces, tuple(space.size for space in spaces))
    ours = [is_ours(frame, space, of_source) for space in spaces]
    frame = Frame(tuple(sources), spaces, tuple(
        max(1, round(space.size * width)) if mine and not space.fixed else space.size
        for space, mine in zip(spaces, ours, strict=True)))
    size = opts.get("batch", 100)
    rows = len(inputs[0])
    batches = [tuple(array[start : start + size] for array in inputs) for start in range(0, rows, size)]
    held = [(np.arange(start, min(start + size, rows)) % 5) == 4 for start in range(0, rows, size)]
    shares = plan.weights
    context = Context(every, merged, frame, shares, Tape(every, batches, MEMORY), held, np.random.default_rng(seed))
    linear, absorbed = linear_tasks(context)
    tasks: list[Task] = sorted([*linear, *scale_tasks(context, absorbed)], key=lambda task: task.at)
    moments = unit_moments(context, tasks)
    for number, (space, mine) in enumerate(zip(spaces, ours, strict=True)):
        if mine and number in moments and not space.fixed:
            pair = clustered(frame, number, moments[number], True, context.rng)
        else:
            pair = settled(frame, space, mine, shares)
        context.pairs.append(pair)
    for layer, origin in enumerate(merged.layers):
        if origin.members:
            source, own = origin.members[0]
            for place in range(len(sources[source].states[own].weights)):
                places = [(n, number, place) for n, number in origin.members]
                part = [shares[n] for n, _ in origin.members] if len(places) > 1 else [1.0]
                context.values[layer, place] = frame.merged_weight(context.pairs, places, part)
    context.own = open_network(merged, sources, context.values, folder, "merged")
    context.merged_tape = Tape(context.own, batches, MEMORY)
    for number, task in enumerate(tasks):
        rest = tasks[number + 1 :]
        line = task.run(Passes(context, task, frozenset(r for t in rest for r in t.sees), frozenset(r for t in rest for r in t.reads)))
        if log: log(line)
    return context
