"""Statistics of a pooled population: what takes the place of a method on BatchNormalization's running statistics."""

from __future__ import annotations

import numpy as np

from kmerge.methods.registry import Array


def pooled_mean(means: Array, *, weights: Array) -> Array:
    """Mean of the population in which source i stands with share w_i: Σ w_i μ_i.

    Args:
        means: shape (n, *shape), floating point.
        weights: shares, shape (n,), sum to 1.

    Returns:
        Shape (*shape), float64.
    """
    means = means.astype(np.float64)
    return np.asarray(means[0] + np.tensordot(weights, means - means[0], axes=1))


def pooled_variance(means: Array, variances: Array, *, weights: Array) -> Array:
    """Variance of that population, with the spread of the means: Σ w_i (σ_i² + (μ_i - μ)²).

    Args:
        means: shape (n, *shape).
        variances: shape (n, *shape), not standard deviations.
        weights: shares, shape (n,), sum to 1.

    Returns:
        Shape (*shape), float64.

    >>> pooled_variance(np.array([[0.], [2.]]), np.array([[1.], [3.]]), weights=np.array([.5, .5]))
    array([3.])
    """
    means = means.astype(np.float64)
    spread = np.tensordot(weights, (means - pooled_mean(means, weights=weights)) ** 2, axes=1)
    return np.asarray(pooled_mean(variances, weights=weights) + spread)
