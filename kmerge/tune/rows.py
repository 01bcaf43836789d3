"""Rows in memory, until kmerge.data is there."""
from __future__ import annotations
from dataclasses import dataclass, field
from collections.abc import Iterator, Mapping
from typing import Any
import numpy as np


@dataclass(frozen=True, eq=False)
class Batch:
    inputs: tuple[Any, ...]
    targets: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rows:
    inputs: tuple[Any, ...]
    targets: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        order = np.arange(self.rows) if seed is None else np.random.default_rng(seed).permutation(self.rows)
        for first in range(start * size, self.rows, size):
            yield self.take(order[first : first + size])

    def take(self, rows: Any) -> Batch:
        return Batch(
            tuple(a[rows] for a in self.inputs),
            {k: v[rows] for k, v in self.targets.items()},
            {k: v[rows] for k, v in self.weights.items()},
        )

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        order = np.random.default_rng(seed).permutation(self.rows)
        held = min(max(round(share * self.rows), 1), self.rows - 1)
        parts = []
        for rows in (np.sort(order[held:]), np.sort(order[:held])):
            b = self.take(rows)
            parts.append(Rows(b.inputs, b.targets, b.weights, self.description))
        return parts[0], parts[1]


def open_dataset(data: Any, network: Any, labels: Any, **_: Any) -> Rows:
    if isinstance(data, Rows):
        return data
    if isinstance(data, tuple):
        x, y = data
        y = y if isinstance(y, dict) else {label: y for label in labels}
        return Rows((np.asarray(x),), {k: np.asarray(v) for k, v in y.items()}, description=f"{len(x)} rows")
    if isinstance(data, dict):
        arrays = [np.asarray(value) for value in data.values()]
        return Rows(tuple(arrays), description=f"{len(arrays[0])} rows")
    return Rows((np.asarray(data),), description=f"{len(data)} rows")
