"""What came of a training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kmerge.agreement import Agreement


@dataclass(frozen=True, eq=False)
class Tuning:
    """What came of a training.

    Attributes:
        model: the model with the best weights, not compiled; the one that was given is as it was.
        history: values per epoch by name, as in Keras's own history; "val_" marks held-back rows.
        before, after: agreement of each head with its source, on held-back inputs, where sources taught.
        scores_before, scores_after: losses and metrics on held-back rows.
        epoch: whose weights were kept; 0 for those at the start.
        steps: that were made.
        seconds: that it took.
        description: of the data.
        warnings, notes: what a reader should know.
        output: where the model was written.
    """

    model: Any
    history: Mapping[str, list[float]]
    before: tuple[Agreement, ...] = ()
    after: tuple[Agreement, ...] = ()
    scores_before: Mapping[str, float] = field(default_factory=dict)
    scores_after: Mapping[str, float] = field(default_factory=dict)
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    description: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON, as `kmerge finetune --json` prints it; without the model, and None for what is no number."""
        values = {key: value for key, value in vars(self).items() if key != "model"}
        values |= {name: [vars(item) for item in values[name]] for name in ("before", "after")}
        found: dict[str, Any] = _finite(json.loads(json.dumps(values)))
        return found


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
