"""In which order the steps of a fusion are taken."""

from __future__ import annotations

from collections.abc import Sequence

from kmerge.fuse.context import Context, Task
from kmerge.graph import refs


def in_order(context: Context, tasks: Sequence[Task]) -> list[Task]:
    """Tasks so that each comes after those that make what it reads.

    A layer that is called several times waits for what comes before all of its calls. Where two wait for each other,
    because a layer reads what follows from itself, the one that is called first goes first.
    """
    graph = context.merged.graph
    behind: list[int] = []  # per call, the layers that it follows from, itself included, as bits
    for call in graph.calls:
        own = 1 << call.layer
        for ref in refs(call.arguments):
            own |= behind[ref.call]
        behind.append(own)
    made = [sum(1 << layer for layer in dict.fromkeys(task.layers)) for task in tasks]
    needs = [0] * len(tasks)
    for number, task in enumerate(tasks):
        for ref in task.reads:
            needs[number] |= behind[ref.call]
        needs[number] &= ~made[number]
    waiting = sorted(range(len(tasks)), key=lambda number: tasks[number].at)
    result = []
    while waiting:
        open_layers = 0
        for number in waiting:
            open_layers |= made[number]
        ready = next((number for number in waiting if not needs[number] & open_layers), waiting[0])
        waiting.remove(ready)
        result.append(tasks[ready])
    return result
