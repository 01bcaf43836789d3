"""What tells one training from another: settings, heads, weights of the model and of the sources, rows of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kmerge.data import Batch
from kmerge.data.dataset import Indexed
from kmerge.tune.checkpoint import fingerprint
from kmerge.tune.heads import Head
from kmerge.tune.keeper import values_of
from kmerge.tune.settings import Settings
from kmerge.tune.teachers import Passes

ROWS = 256
"""Rows that are looked at, from the front, and from the end where that need not be read up to."""
_NO_MATTER = frozenset(
    {
        *("checkpoints", "resume", "force", "every", "tensorboard", "callbacks", "say", "minutes", "cache", "started"),
        *("columns", "label_columns", "pixels"),  # the rows that are read tell
    }
)


def mark_of(
    settings: Settings,
    heads: Sequence[Head],
    model: Any,
    teachers: Mapping[str, Any],
    sets: Mapping[str, tuple[Passes, Passes | None]],
) -> str:
    """A digest of all that decides what comes of a training.

    Args:
        settings: of the training.
        heads: of the model.
        model: live, as it was given.
        teachers: live sources by label.
        sets: rows to learn from and rows that are held back, by label.
    """
    facts = {
        "settings": {key: described(value) for key, value in vars(settings).items() if key not in _NO_MATTER},
        "heads": [vars(head) for head in heads],
        "teachers": list(teachers),
        "rows": {label: [sample_of(part) for part in parts if part is not None] for label, parts in sets.items()},
    }
    # Not all variables: where random layers stand is drawn anew whenever a model is opened.
    values = values_of(model.weights)
    for teacher in teachers.values():
        values += values_of(teacher.weights)
    return fingerprint(facts, values)


def described(value: Any) -> Any:
    """What a setting is, as JSON: of Keras objects their configuration, of functions what they do."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if code := getattr(value, "__code__", None):
        plain = [item for item in code.co_consts if isinstance(item, (int, float, str))]
        return [value.__module__, value.__qualname__, code.co_code.hex(), plain, list(code.co_names)]
    try:
        # Some of Keras's own losses leave what they were given out of their configuration.
        return [name, described(value.get_config()), described(getattr(value, "_fn_kwargs", {}))]
    except (AttributeError, NotImplementedError, TypeError):
        return name


def sample_of(data: Passes) -> list[Any]:
    """How many rows there are, where that is known, and what some of them hold, with labels and weights; nothing of
    the latter where a source has another order in each pass.
    """
    first, again = (_digest(next(data.batches(ROWS), None)) for _ in range(2))
    found: list[Any] = [data.rows, first if first == again else None]
    if isinstance(data, Indexed) and data.rows > ROWS:
        found.append(_digest(next(data.batches(ROWS, start=(data.rows - 1) // ROWS), None)))
    return found


def _digest(batch: Batch | None) -> str:
    digest = hashlib.sha256()
    if batch is None:
        return ""
    arrays = {f"x{number}": array for number, array in enumerate(batch.inputs)}
    arrays |= {f"y_{label}": array for label, array in batch.targets.items()}
    arrays |= {f"weights_{label}": array for label, array in batch.weights.items()}
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())
    return digest.hexdigest()
