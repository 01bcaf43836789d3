"""More inputs out of those that are given: parts of one put in the place of parts of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kmerge.calibration.inputs import Inputs
from kmerge.graph import Graph, flatten, refs
from kmerge.methods.registry import Array


def channels_first(graph: Graph) -> frozenset[int]:
    """Numbers of the inputs whose channels stand before their positions: by the first layer behind them that says."""
    found = set()
    for number, given in enumerate(flatten(graph.inputs)):
        reached = {given.call}
        for place, call in enumerate(graph.calls):
            if not any(ref.call in reached for ref in refs(call.arguments)):
                continue
            reached.add(place)
            order = _data_format(graph.layers[call.layer].config)
            if order is not None:
                found |= {number} if order == "channels_first" else set()
                break
    return frozenset(found)


def _data_format(config: Mapping[str, Any]) -> Any:
    """Of a layer, or of the one that it wraps."""
    inner = config.get("layer")
    inner = inner.get("config") if isinstance(inner, Mapping) else None
    own = config.get("data_format")
    return own if own is not None or not isinstance(inner, Mapping) else _data_format(inner)


def crossed(inputs: Inputs, rows: int, rng: np.random.Generator, first: Collection[int] = ()) -> Inputs:
    """Made of pairs of inputs: a box of one in the place of the same box of the other (arXiv:1905.04899).

    Networks can be asked for their results on anything; what is asked should look like what they know.

    Args:
        inputs: to be crossed.
        rows: how many to make.
        rng: source of random numbers.
        first: numbers of the arrays whose channels stand before their positions.
    """
    one, two = rng.integers(inputs.rows, size=(2, rows))
    arrays = tuple(cross(array[one], array[two], rng, n in first) for n, array in enumerate(inputs.arrays))
    return Inputs(arrays, inputs.owners[one], True, f"{rows:,} made of pairs of them")


def are_letters(inputs: Inputs) -> bool:
    """Whether all arrays are rows of one-hot letters, so that crossing two of them gives another such row."""
    return bool(inputs.arrays) and all(_one_hot(array) for array in inputs.arrays)


def _one_hot(array: Array) -> bool:
    rows = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
    if rows.ndim != 3 or rows.shape[-1] < 2 or rows.dtype.kind not in "fiub":
        return False
    return bool(np.isin(rows, (0, 1)).all() and (rows.sum(axis=-1) <= 1).all() and rows.any())


def cross(one: Array, two: Array, rng: np.random.Generator, channels_first: bool) -> Array:
    """Rows of one array crossed with those of another: a box of positions, or points between rows of features.

    Args:
        one, two: shapes (rows, ...), the same.
        rng: source of random numbers.
        channels_first: whether channels stand before positions.
    """
    if one.ndim == 2 and one.dtype.kind == "f":
        return _mixed(one, two, rng)
    if channels_first and one.ndim > 2:
        return np.ascontiguousarray(np.moveaxis(_boxed(np.moveaxis(one, 1, -1), np.moveaxis(two, 1, -1), rng), -1, 1))
    return _boxed(one, two, rng)


def _boxed(one: Array, two: Array, rng: np.random.Generator) -> Array:
    result = one.copy()
    sides = one.shape[1:-1] if one.ndim > 2 else one.shape[1:]
    share = rng.uniform(0.1, 0.6, len(one)) ** (1 / max(len(sides), 1))
    inside = np.ones((len(one), *sides), dtype=bool)
    for axis, side in enumerate(sides):
        length = np.maximum(1, np.round(share * side)).astype(int)
        start = rng.integers(0, side - length + 1)
        along = np.arange(side)
        own = (along >= start[:, None]) & (along < (start + length)[:, None])
        inside &= own.reshape(len(one), *(side if number == axis else 1 for number in range(len(sides))))
    result[inside] = two[inside]
    return result


def _mixed(first: Array, second: Array, rng: np.random.Generator) -> Array:
    """Points between two rows of features."""
    share = rng.uniform(0, 0.5, (len(first), 1)).astype(first.dtype)
    return np.asarray(first + share * (second - first))
