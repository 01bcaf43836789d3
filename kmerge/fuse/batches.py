"""Inputs, a batch at a time, and which of them are held back from what is fitted."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from kmerge.agreement import FEW_ROWS
from kmerge.calibration.enrich import crossed
from kmerge.calibration.inputs import Inputs
from kmerge.data import generator
from kmerge.graph import Graph
from kmerge.methods.registry import Array
from kmerge.shapes import Shape, infer_shapes

BATCH_BYTES, ACTIVATION_BYTES = 2 << 20, 512 << 20
"""Bytes of inputs that are run at a time, and of what the sources' layers give for them, as far as sizes are known."""
FEW, MANY, SMALL_BYTES = 48, 512, 24 << 20
"""Inputs that are run at a time within these bounds: the first number, or more, up to the second, as long as the layers
give no more bytes for them than the third says."""
HELD_BACK = 5
"""One input of so many chooses the strength of the regressions."""
FEWEST_HELD = 20
"""Inputs that must be held back, so that more than the strength of regressions is left to them."""
UNSEEN = 0.1
"""Share of many inputs that measure the agreement and nothing else."""


def share_unseen(owners: Array) -> float:
    """Share of the inputs that measure the agreement and nothing else.

    A tenth, or as much as gives each head rows enough of its own; never more than a third.

    Args:
        owners: number of the source that each input was given for, shape (rows,); -1 where for all.
    """
    counts = np.unique(owners, return_counts=True)[1]
    enough = counts[counts >= FEW_ROWS]
    smallest = int(enough.min()) if len(enough) else len(owners)
    return max(UNSEEN, min(FEW_ROWS / max(smallest, 1), 1 / 3))


def held_back(rows: int) -> Array:
    """Which of so many inputs are held back, shape (rows,), bool."""
    return np.asarray(np.arange(rows) % HELD_BACK == HELD_BACK - 1)


def activation_bytes(graph: Graph, free: int = 1) -> int:
    """Bytes of what the layers of a network give for one input.

    Args:
        graph: the network.
        free: what sizes count as that are free.
    """
    shapes = infer_shapes(graph).values()
    return 4 * sum(math.prod(size or free for size in shape[1:]) for shape in shapes if shape is not None)


def longest_free(shapes: Sequence[Shape | None], inputs: Inputs) -> int:
    """The largest size that inputs have where their shape leaves it free, 1 where it leaves none.

    Args:
        shapes: of the network's inputs, rows first; None for one that is not known.
        inputs: that are to be run.
    """
    found = [1]
    for shape, array in zip(shapes, inputs.arrays, strict=True):
        free = range(1, array.ndim) if shape is None else [axis for axis, size in enumerate(shape) if axis and not size]
        found += [array.shape[axis] for axis in free]
    return max(found)


def batch_size(inputs: Inputs, activations: int) -> int:
    """How many inputs are run at a time.

    Args:
        inputs: that are to be run.
        activations: bytes of what the layers give for one of them; 0 where that is not known.
    """
    each = sum(array[:1].nbytes for array in inputs.arrays)
    small = min(MANY, SMALL_BYTES // activations) if activations else FEW
    return max(1, min(max(FEW, small), BATCH_BYTES // max(1, each), ACTIVATION_BYTES // max(1, activations)))


def in_batches(
    inputs: Inputs, enough: int, seed: int, first: Collection[int] = (), activations: int = 0
) -> tuple[list[tuple[Array, ...]], list[Array]]:
    """All inputs, and more that are made of pairs of them where they are few.

    Args:
        inputs: to be fitted to.
        enough: below so many, more are made until there are as many.
        seed: of the pairs.
        first: numbers of the inputs whose channels stand before their positions.
        activations: bytes of what the layers give for one input; 0 for no bound by them.

    Returns:
        Batches, and for each which of its inputs are held back: every fifth of all that were given, whatever the size
        of a batch. None is made of these, so that they tell of what was not fitted to.
    """
    size, held = batch_size(inputs, activations), held_back(inputs.rows)
    batches = list(inputs.batches(size))
    marks = [held[start : start + size] for start in range(0, inputs.rows, size)]
    if inputs.rows < enough:
        fitted = inputs.take(np.flatnonzero(~held))
        for batch in crossed(fitted, enough - inputs.rows, generator(seed, "fuse/pairs"), first).batches(size):
            batches.append(batch)
            marks.append(np.zeros(len(batch[0]), dtype=bool))
    return batches, marks
