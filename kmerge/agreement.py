"""How well a merged model still does what its sources do, as one number per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kmerge.graph import Graph, Ref
from kmerge.methods.registry import Array

Measure = Literal["decisions", "correlation"]
MEAN_LABEL = "mean"
"""What an agreement is labelled with where one output is the mean of all heads."""
FEW_ROWS = 8
"""Fewer inputs tell little of how well a head agrees."""
WARN_BELOW = 0.90
"""An agreement below which a merge is not to look like a success."""


@dataclass(frozen=True)
class Agreement:
    """How well one head agrees with its source.

    Attributes:
        label: of the source; `MEAN_LABEL` for the mean of all of them.
        output: name of the output in the merged model.
        measure: "decisions", the share of inputs on which both decide alike; "correlation", between their values.
        value: 1 is full agreement; a correlation can be negative.
        rows: number of inputs that it was measured on.
        synthetic: whether these were made up.
    """

    label: str
    output: str
    measure: Measure
    value: float
    rows: int
    synthetic: bool


def measure_agreement(
    label: str,
    output: str,
    source_values: Array,
    merged_values: Array,
    synthetic: bool,
    binary: bool = False,
) -> Agreement:
    """Hold what a head gives against what its source gives, on the same inputs.

    Args:
        label: of the source.
        output: name of the output.
        source_values: shape (rows, ...).
        merged_values: the same shape.
        synthetic: whether the inputs are made up.
        binary: whether the source's output ends in a sigmoid, so that 0.5 divides its decisions.

    Returns:
        Shares of equal decisions where the source gives distributions, or probabilities with `binary`; else Pearson's
        correlation over rows and entries, each entry of an output centred over the rows. Outputs that never change
        agree fully where they are equal, and else not at all.

    >>> measure_agreement("a", "y", np.eye(2), np.array([[.6, .4], [.7, .3]]), False).value
    0.5
    """
    source, merged = (np.asarray(values, np.float64) for values in (source_values, merged_values))
    rows = len(source)
    if _is_distribution(source):
        measure: Measure = "decisions"
        value = float(np.mean(source.argmax(axis=-1) == merged.argmax(axis=-1)))
    elif binary and source.size and bool(np.all((source >= 0) & (source <= 1))):
        measure = "decisions"
        value = float(np.mean((source >= 0.5) == (merged >= 0.5)))
    else:
        measure = "correlation"
        value = _correlation(source, merged)
    if not np.all(np.isfinite(merged)):
        value = 0.0
    return Agreement(label, output, measure, value, rows, synthetic)


def own_rows(owners: Array, number: int) -> Array:
    """Which inputs a head is judged by, shape (rows,), bool: those for its source, or all where these are too few.

    Args:
        owners: number of the source that each input was given for, shape (rows,); -1 where for all.
        number: of the head's source.

    >>> own_rows(np.array([0] * 9 + [1] * 2), 0).sum(), own_rows(np.array([0] * 9 + [1] * 2), 1).sum()
    (np.int64(9), np.int64(11))
    """
    own = np.asarray((owners == number) | (owners == -1))
    return own if np.sum(own) >= FEW_ROWS else np.ones(len(owners), dtype=bool)


def _is_distribution(values: Array) -> bool:
    if values.ndim < 2 or values.shape[-1] < 2 or not values.size:
        return False
    return bool(np.all(values >= 0) and np.all(np.abs(values.sum(axis=-1) - 1) <= 1e-3))


def _correlation(source: Array, merged: Array) -> float:
    if not source.size or not (np.all(np.isfinite(source)) and np.all(np.isfinite(merged))):
        return 0.0
    largest = np.abs(source).max()
    one, two = source - source.mean(axis=0), merged - merged.mean(axis=0)
    if np.abs(one).max() <= 1e-6 * largest:
        return float(np.allclose(source, merged, rtol=1e-6, atol=1e-6 * float(largest)))
    if np.abs(two).max() <= 1e-6 * np.abs(merged).max():
        return 0.0
    one, two = one / np.abs(one).max(), two / np.abs(two).max()
    return float(np.clip(np.sum(one * two) / np.sqrt(np.sum(one**2) * np.sum(two**2)), -1, 1))


def ends_in_sigmoid(graph: Graph, ref: Ref) -> bool:
    """Whether a tensor of a network comes out of a sigmoid."""
    config = graph.layer_of(ref).config
    activation = config.get("activation")
    if isinstance(activation, Mapping):
        inner = activation.get("config")
        activation = inner if isinstance(inner, str) else activation.get("class_name")
    return activation == "sigmoid" or graph.layer_of(ref).class_name == "Sigmoid"


def lowest(agreements: Sequence[Agreement]) -> float:
    """The agreement of the head that agrees least; 1 where there is none."""
    return min((item.value for item in agreements), default=1.0)


def warnings(agreements: Sequence[Agreement], fused: bool = True) -> list[str]:
    """What to say of heads that agree too little with their sources, and what would help.

    Args:
        agreements: of all heads.
        fused: whether the trunk was made from what the sources compute, and not from their weights alone.
    """
    low = sorted((item for item in agreements if not item.value >= WARN_BELOW), key=lambda item: item.value)
    fewest = min((item.rows for item in agreements), default=FEW_ROWS)
    few = []
    if fewest < FEW_ROWS:
        few.append(f"agreement was measured on {fewest} inputs, too few to tell: give more (--data, --samples)")
    if not low:
        return few
    made_up = any(item.synthetic for item in agreements)
    helps = ["a shorter trunk (--trunk LAYER)"]
    if fused:
        more = "real inputs in place of made-up ones (--data FILE; no labels are needed)"
        helps = [
            more if made_up else "more inputs (--data, --samples)",
            "a shorter trunk (--trunk LAYER, or --keep 0.95, which looks for one)",
            "a wider one (--width 1.5)",
        ]
    else:
        helps.append("--method fuse, which is made for models that were trained apart")
    found = [
        f"part of what the sources know is lost: {'; '.join(map(_lost, low))}. Do not take the merged model for its "
        f"sources unseen. What would help: {'; '.join(helps)}"
    ]
    if made_up:
        found.append("agreement was measured on made-up inputs, and on real ones it may be another: --data tells")
    return found + few


def _lost(item: Agreement) -> str:
    if item.measure == "decisions":
        return f"'{item.output}' decides as its source does on {percent(item.value)} of the inputs"
    return f"what '{item.output}' gives correlates to {percent(item.value)} with what its source gives"


def percent(value: float) -> str:
    """0.9731 -> 97.3 %; never rounded up to 100 %."""
    if 0.9995 <= value < 1:
        return "99.9 %"
    return f"{100 * value:.1f} %"
