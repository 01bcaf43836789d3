"""Merged units as blends of all sources' units: chosen so that what others read of these follows from them.

A cluster's mean is one blend of a few units. Better ones are found from there by variable projection: for given blends,
what follows from their activations by least squares is known in closed form, and so is how it changes with them (Golub
and Pereyra, 1973). Only sampled rows of the sources' own activations are looked at; no weight of a network is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kmerge.fuse.pairs import Frame, Pair
from kmerge.methods.registry import Array

STEPS, MORE_STEPS = 20, 60
ROWS = 2_000
"""Rows of each site that are looked at."""
MUCH = 0.01
"""Share that is lost at the start from which all rows are looked at, in more steps."""
WORK = 10**12
"""Multiplications that the search in one space may take."""
BY_OUTPUTS = 0.8
"""How much counts what an error does to the sources' outputs, against what it does to the layers behind."""
LOOK = 5
"""Steps between two looks at the rows that are held back."""
_RIDGE = 1e-4
_EXACT = 1e-6
"""Share that is lost from which nothing has to be looked for."""

Function = tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]
"""An activation, and its slope from its argument and its value."""


def _gelu(x: Array) -> Array:
    from scipy.special import ndtr

    return np.asarray(x * ndtr(x))


def _gelu_slope(x: Array, _: Array) -> Array:
    from scipy.special import ndtr

    return np.asarray(ndtr(x) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi))


def _sigmoid(x: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(x))


def _leaky(slope: float) -> Function:
    return (
        lambda x: np.where(x > 0, x, x * x.dtype.type(slope)),
        lambda x, _: np.where(x > 0, x.dtype.type(1), x.dtype.type(slope)),
    )


FUNCTIONS: Mapping[str, Function] = {
    "linear": (lambda x: x, lambda x, _: np.ones_like(x)),
    "relu": _leaky(0.0),
    "leaky_relu": _leaky(0.2),
    "tanh": (np.tanh, lambda _, y: 1 - y * y),
    "sigmoid": (_sigmoid, lambda _, y: y * (1 - y)),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), lambda x, y: np.where(x > 0, 1, y + 1)),
    "silu": (lambda x: x * _sigmoid(x), lambda x, y: y + _sigmoid(x) * (1 - y)),
    "swish": (lambda x: x * _sigmoid(x), lambda x, y: y + _sigmoid(x) * (1 - y)),
    "softplus": (lambda x: np.logaddexp(x, 0), lambda x, _: _sigmoid(x)),
    "gelu": (_gelu, _gelu_slope),
}
"""Activations by Keras's name."""


def function_of(name: Any, config: Mapping[str, Any]) -> Function | None:
    """An activation by its name, or by the class of its layer; None for one that is not known."""
    if name in ("LeakyReLU", "leaky_relu"):
        return _leaky(float(config.get("negative_slope", config.get("alpha", 0.3 if name == "LeakyReLU" else 0.2))))
    if name == "ReLU":
        plain = not config.get("max_value") and not config.get("threshold")
        return _leaky(float(config.get("negative_slope") or 0.0)) if plain else None
    return FUNCTIONS.get("linear" if name is None else str(name).lower())


@dataclass(frozen=True, eq=False)
class Sample:
    """What all units of a space did at one site, before the activation that follows.

    Attributes:
        rows: shape (rows, sources * units).
        function: the activation.
        slopes: mean products of the gradients of the sources' outputs with the units' activations, shape
            (sources * units,) squared; None where they are not known.
        together: whether only the mean of the sources' outputs matters.
        judges: rows like the first, of inputs that are held back.
    """

    rows: Array
    function: Function
    slopes: Array | None = None
    together: bool = False
    judges: Array | None = None

    def thinned(self, rows: int) -> Sample:
        """About that many of the rows, from all over them."""
        step = max(1, round(len(self.rows) / rows))
        return replace(self, rows=self.rows[::step], judges=None if self.judges is None else self.judges[::step])


def blended(frame: Frame, number: int, samples: Sequence[Sample], pair: Pair, shares: Sequence[float]) -> Pair:
    """A better pair of a space than the one given.

    Args:
        frame: of the merge.
        number: of the space.
        samples: of each of its sites.
        pair: to start from.
        shares: importance of the sources.
    """
    units = len(frame.sources) * frame.spaces[number].size
    size = pair.merge.shape[2]
    problem = _Problem(frame, number, [sample.thinned(ROWS) for sample in samples], shares)
    start = pair.merge.reshape(units, size)
    lost = problem.cost(start)[0] if problem.sites else 0.0
    if lost < _EXACT:
        return pair
    if lost > MUCH:
        problem = _Problem(frame, number, samples, shares)
    found = problem.search(start, MORE_STEPS if lost > MUCH else STEPS)
    back = problem.unmerge(found)
    return Pair(
        found.reshape(len(frame.sources), -1, size),
        np.ascontiguousarray(back.reshape(size, len(frame.sources), -1).transpose(1, 0, 2)),
    )


class _Problem:
    """How much of what is read of all units is lost with some blends."""

    def __init__(self, frame: Frame, number: int, samples: Sequence[Sample], shares: Sequence[float]) -> None:
        readers = _readers(frame, number)
        self.samples = samples
        self.sites: list[tuple[Array, Function, Array]] = []
        self.judges: list[tuple[Array, Array]] = []
        for sample in samples:
            values = sample.rows.astype(np.float32)
            active = sample.function[0](values)
            covariance = np.cov(active.T.astype(np.float64), bias=True)
            metric = _metric(covariance, readers, sample.slopes, shares, sample.together)
            eigenvalues, vectors = np.linalg.eigh(metric)
            kept = eigenvalues > 1e-6 * max(float(eigenvalues[-1]), 1e-300)
            root = vectors[:, kept] * np.sqrt(eigenvalues[kept])
            narrow = root.astype(np.float32)
            wanted = active @ narrow
            middle = wanted.mean(axis=0)
            wanted -= middle
            scale = float(np.sum(wanted.astype(np.float64) ** 2))
            if scale > 0:
                self.sites.append((values, sample.function, wanted / np.float32(np.sqrt(scale))))
                judges = (values[:0] if sample.judges is None else sample.judges).astype(np.float32)
                told = sample.function[0](judges) @ narrow - middle
                self.judges.append((judges, told / np.float32(np.sqrt(scale))))

    def cost(self, blends: Array) -> tuple[float, Array]:
        """Share that is lost, mean over sites, and its slope."""
        total, gradient = 0.0, np.zeros_like(blends)
        narrow = blends.astype(np.float32)
        for values, (function, slope), wanted in self.sites:
            made = values @ narrow
            given = function(made)
            open_ = slope(made, given)
            centred = given - given.mean(axis=0)
            back = _followed(centred, wanted)
            rest = centred @ back - wanted
            total += float(np.sum(rest.astype(np.float64) ** 2))
            toward = 2 * (rest @ back.T)
            toward -= toward.mean(axis=0)
            gradient += values.T @ (toward * open_)
        return total / len(self.sites), gradient / len(self.sites)

    def judged(self, blends: Array) -> float:
        """Share that is lost of the rows that are held back, sum over sites; 0 where there are none."""
        total, narrow = 0.0, blends.astype(np.float32)
        for (values, (function, _), wanted), (judges, told) in zip(self.sites, self.judges, strict=True):
            if len(judges):
                given = function(values @ narrow)
                middle = given.mean(axis=0)
                back = _followed(given - middle, wanted)
                rest = (function(judges @ narrow) - middle) @ back - told
                total += float(np.sum(rest.astype(np.float64) ** 2))
        return total

    def search(self, start: Array, most: int) -> Array:
        """Better blends than those given, as far as the rows that are held back agree."""
        from scipy.optimize import minimize
        from threadpoolctl import threadpool_limits

        length = np.sqrt(
            np.mean([np.mean(values.astype(np.float64) ** 2, axis=0) for values, *_ in self.sites], axis=0)
        )
        length = np.maximum(length, 1e-6 * max(float(length.max()), 1e-300))[:, None]  # units of one size

        def cost(flat: Array) -> tuple[float, Array]:
            value, slope = self.cost(flat.reshape(start.shape) / length)
            return value, (slope / length).ravel()

        work = sum(4 * values.size * start.shape[1] for values, *_ in self.sites)
        steps = int(np.clip(WORK // max(work, 1), 5, most))
        best, least, turn = start, np.inf, 0

        def look(flat: Array) -> None:
            nonlocal best, least, turn
            if turn % LOOK == 0 or turn == steps:
                blends = flat.reshape(start.shape) / length
                loss = self.judged(blends)
                if loss < least or not judged:
                    best, least = blends, loss
            turn += 1

        judged = any(len(judges) for judges, _ in self.judges)
        first = (start * length).ravel()
        with threadpool_limits(1, "blas"):  # NumPy's threads and SciPy's wait for each other at every step otherwise
            look(first)
            found = minimize(cost, first, jac=True, method="L-BFGS-B", callback=look, options={"maxiter": steps})
            turn = steps
            look(found.x)
        return np.asarray(best)

    def unmerge(self, blends: Array) -> Array:
        """What stands for every unit among the blends, by least squares on their activations."""
        size, units = blends.shape[1], blends.shape[0]
        gram, products = np.zeros((size, size)), np.zeros((size, units))
        for values, (function, _), _ in self.sites:
            given = function(values @ blends.astype(np.float32)).astype(np.float64)
            active = function(values).astype(np.float64)
            given, active = given - given.mean(axis=0), active - active.mean(axis=0)
            scale = max(float(np.sum(active**2)), 1e-300)
            gram += given.T @ given / scale
            products += given.T @ active / scale
        gram += (1e-3 * np.trace(gram) / size + 1e-12) * np.eye(size)
        return np.asarray(np.linalg.solve(gram, products))


def _followed(given: Array, wanted: Array) -> Array:
    """What gives the second from the first by least squares; rows are centred."""
    gram = (given.T @ given).astype(np.float64)
    gram += (_RIDGE * np.trace(gram) / len(gram) + 1e-12) * np.eye(len(gram))
    return np.asarray(np.linalg.solve(gram, (given.T @ wanted).astype(np.float64)).astype(np.float32))


def _metric(
    covariance: Array,
    readers: Sequence[tuple[int, Array]],
    slopes: Array | None,
    shares: Sequence[float],
    together: bool = False,
) -> Array:
    """How errors count: by what the layers behind read, and by what becomes of that at the sources' outputs.

    Every source counts by its share, whatever the size of its weights and gradients. Where only the mean of their
    outputs matters, errors in one may make up for those in another.
    """
    size = len(covariance) // len(shares)
    metric, told = np.zeros((len(covariance),) * 2), np.zeros(len(shares))
    for source, weights in readers:
        energy = float(np.einsum("ik,ij,jk->", weights, covariance, weights, optimize=True))
        if energy > 0:
            metric += shares[source] / energy * (weights @ weights.T)
            told[source] += 1
    if slopes is None:
        return metric
    if together:
        factor = np.repeat(shares, size)
        slopes = slopes * np.outer(factor, factor)
        energy = float(np.sum(slopes * covariance))
        metric *= np.repeat((1 - BY_OUTPUTS) / np.maximum(told, 1), size)
        return metric + (BY_OUTPUTS / energy * slopes if energy > 0 else 0.0)
    for source, share in enumerate(shares):
        own = slice(source * size, (source + 1) * size)
        energy = float(np.sum(slopes[own, own] * covariance[own, own]))
        if energy > 0:
            metric[own, own] *= (1 - BY_OUTPUTS) / max(told[source], 1)
            metric[own, own] += BY_OUTPUTS * share / energy * slopes[own, own]
        else:
            metric[own, own] /= max(told[source], 1)
    return metric


def _readers(frame: Frame, number: int) -> list[tuple[int, Array]]:
    """Weights that read the units of a space: source, and values of shape (sources * units, k)."""
    space, count = frame.spaces[number], len(frame.sources)
    found = []
    for use in space.axes:
        if use.role == "input" and not use.part:
            values = frame.sources[use.source].states[use.layer].weights[use.weight].tensor.read().astype(np.float64)
            rows = np.moveaxis(values, use.axis, 0)[use.places].reshape(space.size, -1)
            if rows.shape[1] > space.size:  # only their products count
                eigenvalues, vectors = np.linalg.eigh(rows @ rows.T)
                rows = vectors * np.sqrt(np.maximum(eigenvalues, 0))
            whole = np.zeros((count * space.size, rows.shape[1]))
            whole[use.source * space.size : (use.source + 1) * space.size] = rows
            found.append((use.source, whole))
    return found
