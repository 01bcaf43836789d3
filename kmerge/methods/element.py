"""Methods that treat every entry of a weight by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmerge.errors import MethodError
from kmerge.methods.registry import Array, method


@method("pick", paper="no merge: one source's weights", related_only=False)
def pick(stack: Array, *, weights: Array, label: str | None = None, labels: Sequence[str] = ()) -> Array:
    """Take the weights of one source.

    Args:
        stack: values, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1; does not matter here.
        label: which source; default the first.
        labels: of all sources, in order.

    Returns:
        That source's values, shape (*shape), dtype of `stack`.

    Raises:
        MethodError: if no source has that label.

    >>> pick(np.array([[1., 2.], [3., 4.]]), weights=np.array([.5, .5]), label="b", labels=["a", "b"])
    array([3., 4.])
    """
    return stack[picked(label, labels), ...].copy()


def picked(label: str | None, labels: Sequence[str]) -> int:
    """Number of the source that `pick` takes."""
    if label is None:
        return 0
    if label not in labels:
        raise MethodError(f"pick: no source is called '{label}': choose one of {', '.join(labels)}.")
    return list(labels).index(label)


@method("mean", paper="arXiv:2203.05482")
def mean(stack: Array, *, weights: Array) -> Array:
    """Average the weights: the plain mean, or a model soup.

    Args:
        stack: values, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1. A source of weight 0 is left out, whatever it holds.

    Returns:
        Merged value, shape (*shape), dtype of `stack`. Computed as x_1 - Σ w_i (x_1 - x_i), so equal sources give
        exactly themselves, the sign of a zero included.

    >>> mean(np.array([[1., 2.], [3., 6.]]), weights=np.array([.75, .25]))
    array([1.5, 3. ])
    """
    return mean_in_place(stack.copy(), weights)


def mean_in_place(stack: Array, weights: Array) -> Array:
    """What `mean` does, in the memory of `stack`, whose values are lost; the result lies in it."""
    used = np.flatnonzero(weights)
    first, others = stack[used[0], ...], [stack[index, ...] for index in used[1:]]
    for row, weight in zip(others, weights[used[1:]], strict=True):
        np.subtract(first, row, out=row)
        row *= stack.dtype.type(weight)
    for row in others[1:]:
        others[0] += row
    return np.subtract(first, others[0], out=first) if others else first


@method("median", paper="robust statistics: coordinate-wise (weighted) median")
def median(stack: Array, *, weights: Array) -> Array:
    """Take the middle value of each entry, so that one odd source cannot pull it away.

    Args:
        stack: values, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1: the value at which half of the importance lies on either side,
            the mean of both neighbours where it splits evenly.

    Returns:
        Merged value, shape (*shape), dtype of `stack`.

    >>> median(np.array([[1.], [2.], [9.]]), weights=np.full(3, 1 / 3))
    array([2.])
    """
    used = np.flatnonzero(weights)
    stack, weights = stack[used], weights[used]
    if np.allclose(weights, weights[0], rtol=1e-12, atol=0):
        ordered = np.sort(stack, axis=0)
        low, high = ordered[(len(stack) - 1) // 2], ordered[len(stack) // 2]
    else:
        order = np.argsort(stack, axis=0, kind="stable")
        ordered = np.take_along_axis(stack, order, axis=0)
        below = np.cumsum(weights[order], axis=0)
        low = np.take_along_axis(ordered, np.argmax(below >= 0.5 - 1e-12, axis=0)[None], axis=0)[0]
        high = np.take_along_axis(ordered, np.argmax(below > 0.5 + 1e-12, axis=0)[None], axis=0)[0]
    return np.asarray(low - (low - high) / stack.dtype.type(2), dtype=stack.dtype)
