"""What cannot be fitted: layers that stay as the first source has them, and what a reader is told of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kmerge.dialects.vocabulary import RANDOM
from kmerge.fuse.context import Context, Task

_KEPT = (
    "Normalization",
    "StringLookup",
    "IntegerLookup",
    "TextVectorization",
    "Discretization",
    "STFTSpectrogram",
    "MelSpectrogram",
    "PReLU",
)
"""Classes whose weights mean the same in every source, and PReLU with one slope for all."""


def left_layers(context: Context, tasks: Iterable[Task]) -> dict[int, str]:
    """Shared layers with weights that no task covers, and why."""
    covered = {layer for task in tasks for layer in task.layers}
    refused = context.refused or {}
    found = {}
    for layer, origin in enumerate(context.merged.layers):
        own = context.merged.graph.layers[layer]
        if origin.role != "shared" or not origin.members or layer in covered:
            continue
        if context.weights(layer) and own.class_name not in (*RANDOM, *_KEPT):
            found[layer] = refused.get(layer, "")
    return found


def held_spaces(context: Context, tasks: Iterable[Task]) -> set[int]:
    """Spaces whose units a layer makes that cannot be fitted: they stay those of the first source."""
    left = left_layers(context, tasks)
    members = {member for layer in left for member in context.origin(layer).members}
    return {
        number
        for number, space in enumerate(context.frame.spaces)
        if any(use.role == "output" and (use.source, use.layer) in members for use in space.axes)
    }


def unmatched(context: Context, spaces: Iterable[int]) -> list[str]:
    """Notes of units that each source makes in layers of its own, and that were not matched.

    Args:
        context: of the fusion.
        spaces: numbers of those whose units keep their places.
    """
    private = {
        member: own.name
        for own, origin in zip(context.merged.graph.layers, context.merged.layers, strict=True)
        if origin.role == "private"
        for member in origin.members
    }
    names = []
    for number in spaces:
        made = [use for use in context.frame.spaces[number].axes if use.role == "output"]
        if made and all((use.source, use.layer) in private for use in made):
            names.append(private[made[0].source, made[0].layer])
    return [
        f"the units of '{name}', which every source has of its own, were not matched between the sources: the shared "
        "layers behind it take them as they stand. Share it too, or keep these layers private as well"
        for name in dict.fromkeys(names)
    ]


def unfitted(context: Context, tasks: Collection[Task]) -> list[str]:
    """What was not fitted, a note for each layer.

    Args:
        context: of the fusion.
        tasks: all that were run.
    """
    notes = []
    first = context.frame.sources[0].label
    for layer, reason in left_layers(context, tasks).items():
        own = context.layer(layer)
        why = f"{reason}, so it" if reason else f"kmerge does not fit layers of the class {own.class_name}: it"
        notes.append(
            f"'{own.name}' ({own.class_name}): {why} is taken from '{first}' as it is, and the other sources have to "
            f"do with that. Keep it per source with --private {own.name}, or end the trunk before it"
        )
    for task in tasks:
        if getattr(task, "entangled", False):
            own = context.layer(task.layers[0])
            notes.append(
                f"'{own.name}' ({own.class_name}): its units stand on several axes, which kmerge does not match "
                f"between sources: they stay those of '{first}'. Keep it per source with --private {own.name} where "
                "that costs too much"
            )
    for layer, origin in enumerate(context.merged.layers):
        own = context.layer(layer)
        if origin.role == "shared" and origin.members and context.weights(layer):
            reasons = dict.fromkeys(_reasons(context, layer))
            for reason in reasons:
                notes.append(f"'{own.name}' ({own.class_name}): its units stay those of '{first}': {reason}")
    return notes


def _reasons(context: Context, layer: int) -> list[str]:
    """Why units that a layer makes must keep their places, unless that is because of what they mean."""
    source, own = context.origin(layer).members[0]
    return [
        space.reason
        for space in context.frame.spaces
        if space.fixed
        and not space.reason.startswith(("output of", "input ", "positions", "read by"))
        and any((use.source, use.layer, use.role) == (source, own, "output") for use in space.axes)
    ]
