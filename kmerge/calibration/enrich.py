"""More inputs out of those that are given: parts of one put in the place of parts of another."""

from __future__ import annotations

import numpy as np

from kmerge.calibration.inputs import Inputs
from kmerge.methods.registry import Array


def crossed(inputs: Inputs, rows: int, rng: np.random.Generator) -> Inputs:
    """Made of pairs of inputs: a box of one in the place of the same box of the other (arXiv:1905.04899).

    Networks can be asked for their results on anything; what is asked should look like what they know.

    Args:
        inputs: to be crossed.
        rows: how many to make.
        rng: source of random numbers.
    """
    one, two = rng.integers(inputs.rows, size=(2, rows))
    arrays = tuple(_crossed(array[one], array[two], rng) for array in inputs.arrays)
    return Inputs(arrays, inputs.owners[one], True, f"{rows:,} made of pairs of them")


def _crossed(first: Array, second: Array, rng: np.random.Generator) -> Array:
    if first.ndim == 2 and first.dtype.kind == "f":
        return _mixed(first, second, rng)
    result = first.copy()
    sides = first.shape[1:-1] if first.ndim > 2 else first.shape[1:]
    share = rng.uniform(0.1, 0.6, len(first)) ** (1 / max(len(sides), 1))
    inside = np.ones((len(first), *sides), dtype=bool)
    for axis, side in enumerate(sides):
        length = np.maximum(1, np.round(share * side)).astype(int)
        start = rng.integers(0, side - length + 1)
        along = np.arange(side)
        own = (along >= start[:, None]) & (along < (start + length)[:, None])
        inside &= own.reshape(len(first), *(side if number == axis else 1 for number in range(len(sides))))
    result[inside] = second[inside]
    return result


def _mixed(first: Array, second: Array, rng: np.random.Generator) -> Array:
    """Points between two rows of features."""
    share = rng.uniform(0, 0.5, (len(first), 1)).astype(first.dtype)
    return np.asarray(first + share * (second - first))
