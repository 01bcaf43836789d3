"""What a conversion did, and what stands in the way of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.upgrade import Obstacle


@dataclass(frozen=True)
class Conversion:
    """What `kmerge convert` did.

    Attributes:
        source, output: file names.
        writer: Keras that wrote the old file.
        layers: how many the new file has.
        parameters: entries of its weights.
        training: whether losses and optimizer were carried along.
        bytes: size of the new file.
        seconds: how long it took.
        notes: what a user should know.
    """

    source: str
    output: str
    writer: str
    layers: int
    parameters: int
    training: bool
    bytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON, as `kmerge convert --json` prints it."""
        return json.loads(json.dumps(vars(self)))  # type: ignore[no-any-return]


def explain_obstacles(name: str, obstacles: Sequence[Obstacle]) -> str:
    """What stands in the way, one line each, and what to do about it."""
    lines = [f"'{name}' cannot be converted as it is:"]
    lines += [f"  '{item.layer}' ({item.class_name}) {item.reason}" for item in obstacles]
    lambdas = [item.layer.rpartition("/")[2] for item in obstacles if item.kind == "lambda"]
    if lambdas:
        lines.append(
            f"Give a layer of your own for each Lambda: --lambda {lambdas[0]}=MODULE:FUNCTION, a keras.layers.Layer "
            "class or a function, registered with keras.saving.register_keras_serializable."
        )
    if any(item.kind == "custom" for item in obstacles):
        lines.append("Give the module that registers the custom ones with --custom MODULE: only that is imported.")
    lines.append("Files of this model can be merged as they are (kmerge combine, output with the same suffix).")
    return "\n".join(lines)
