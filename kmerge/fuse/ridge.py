"""Ridge regression drawn towards a first guess, its strength chosen on held-back rows.

Rows are summed up as they come: least squares need no more than products of columns with columns. Only where there are
fewer rows than columns are the rows kept instead, and the same solution is found among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kmerge.methods.registry import Array

STRENGTHS = 10.0 ** np.arange(-7, 3)
"""Ridge strengths that are tried, in shares of the mean variance of the inputs."""
UNTOLD = 1e-2
"""The strength where no rows are held back to tell a better one: by the rows that are fitted, the least always wins."""
_FEW = STRENGTHS[1::2]
"""Those that are tried where every one takes a factorisation."""
_WIDE = 1024
"""Columns from which eigenvalues take longer than a few factorisations."""
_AT_ONCE = 512
"""Rows that are waited for before they are summed up: sums of many columns take as long to write as to compute."""


def whole_rows(*arrays: Array) -> Array:
    """Which rows are finite in all arrays, shape (rows,): a mean over nothing, as of a text of padding, is not."""
    found = np.ones(len(arrays[0]), dtype=bool)
    for array in arrays:
        if not np.isfinite(array.sum()):
            found &= np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return found


@dataclass(eq=False)
class Sums:
    """Sums over rows: all that least squares need.

    Attributes:
        count: number of rows.
        x, y: sums of inputs (p,) and targets (q,).
        xx, xy, yy: sums of their products, (p, p), (p, q) and of squared targets (q,).
    """

    x: Array
    y: Array
    xx: Array
    xy: Array
    yy: Array
    count: int = 0

    @classmethod
    def empty(cls, width: int, outputs: int) -> Sums:
        zeros = np.zeros((width, outputs))
        return cls(np.zeros(width), np.zeros(outputs), np.zeros((width, width)), zeros, np.zeros(outputs))

    def part(self, targets: slice) -> Sums:
        """The same of some of the targets."""
        return Sums(self.x, self.y[targets], self.xx, self.xy[:, targets], self.yy[targets], self.count)

    def add(self, inputs: Array, targets: Array) -> None:
        self.count += len(inputs)
        self.x += inputs.sum(axis=0)
        self.y += targets.sum(axis=0)
        self.xx += inputs.T @ inputs
        self.xy += inputs.T @ targets
        self.yy += np.einsum("ij,ij->j", targets, targets)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
            self.count + other.count,
        )

    def losses(self, kernel: Array, offset: Array) -> Array:
        """Sums of squared errors of `inputs @ kernel + offset`, shape (q,)."""
        errors = self.yy + np.einsum("ij,ij->j", kernel, self.xx @ kernel - 2 * self.xy)
        return np.asarray(errors + offset * (self.count * offset - 2 * self.y + 2 * (self.x @ kernel)))


COST = 0.01
"""Share of a target's variance on the held-back rows that moving it may cost at most."""


class Judged(NamedTuple):
    """What held-back rows say of movable targets, shapes (q,).

    Attributes:
        losses: sums of squared errors by how far the targets are moved.
        spread: sums of squares of the targets about their means.
    """

    losses: Callable[[float], Array]
    spread: Array


@dataclass(frozen=True, eq=False)
class Solution:
    """What least squares found.

    Attributes:
        kernel, offset: shapes (p, q) and (q,).
        strength: of the ridge, in shares of the mean variance of the inputs.
        explained: share of the targets' variance on the held-back rows.
        pull: how far each target was moved towards others, from 0 to 1.
    """

    kernel: Array
    offset: Array
    strength: float
    explained: float
    pull: Array | float = 0.0

    def moved(self, pull: Array | float) -> Solution:
        """The first half of the outputs, each moved by so much of its partner in the second half."""
        half = len(self.offset) // 2
        kernel = self.kernel[:, :half] + pull * self.kernel[:, half:]
        return Solution(kernel, self.offset[:half] + pull * self.offset[half:], self.strength, self.explained, pull)


def farthest(start: float, middle: float, end: float, rows: int, most: float = np.inf) -> float:
    """The largest share from 0 to 1 whose loss is within one standard error of the least.

    The one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, chapter 3. It is a
    convention, not a test: differences between two shares are known better than either loss.

    Args:
        start, middle, end: sums of squared errors at 0, 0.5 and 1, three points of a parabola.
        rows: that are independent of each other: of normal errors a loss has a standard error of sqrt(2 / rows).
        most: that the loss may rise, where a standard error is more than that.
    """
    start, middle, end = (max(loss, 0.0) for loss in (start, middle, end))  # differences of sums may fall below it
    curve = 2 * (start - 2 * middle + end)
    slope = end - start - curve
    least = min(max(-slope / (2 * curve), 0.0), 1.0) if curve > 0 else float(end < start)
    lowest = start + slope * least + curve * least**2
    limit = lowest + min(lowest * np.sqrt(2 / rows), most)
    if end <= limit or curve <= 0:
        return float(end <= limit)
    return float(np.clip((-slope + np.sqrt(max(slope**2 - 4 * curve * (start - limit), 0.0))) / (2 * curve), 0, 1))


@dataclass(eq=False)
class Regression:
    """Rows to fit and rows that are held back.

    Attributes:
        width: columns of the inputs, p.
        outputs: columns of the targets, q.
        movable: whether each row of targets has as many more: what the first may be moved by.
    """

    width: int
    outputs: int
    movable: bool = False
    _kept: list[tuple[Array, Array, Array]] = field(default_factory=list)
    _rows: int = 0
    _waiting: int = 0
    _sums: tuple[Sums, Sums] | None = None

    def add(self, inputs: Array, targets: Array, held: Array) -> None:
        """Add rows.

        Args:
            inputs: shape (rows, p).
            targets: shape (rows, q), or (rows, 2 q) of movable ones.
            held: which rows are held back, shape (rows,), bool.
        """
        told = whole_rows(inputs, targets)
        if not told.all():
            inputs, targets, held = inputs[told], targets[told], held[told]
        self._rows += len(inputs)
        self._waiting += len(inputs)
        self._kept.append((inputs, targets, held))
        if self._rows > self.width and self._waiting >= _AT_ONCE:
            self._summed()

    def _summed(self) -> tuple[Sums, Sums]:
        """Sums of all rows, once there are more of them than columns."""
        if self._sums is None:
            columns = self.outputs * (2 if self.movable else 1)
            self._sums = (Sums.empty(self.width, columns), Sums.empty(self.width, columns))
        if self._kept:
            inputs, targets, held = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
            inputs, targets = inputs.astype(np.float64), targets.astype(np.float64)
            self._sums[0].add(inputs[~held], targets[~held])
            self._sums[1].add(inputs[held], targets[held])
            self._kept, self._waiting = [], 0
        return self._sums

    def solve(self, guess: Array, intercept: bool, num_held: Array | None = None, pooled: bool = False) -> Solution:
        """The kernel with the least error on held-back rows, fitted again to all rows.

        Args:
            guess: kernel towards which the solution is drawn, shape (p, q).
            intercept: whether there is an offset.
            num_held: for movable targets, how many independent rows of each are held back, shape (q,): it is moved as
                far as the one-standard-error rule lets it (`farthest`), and stays where there are none.
            pooled: whether all targets move alike, as far as the rule lets all of them together.
        """
        if self.movable:
            guess = np.hstack([guess, np.zeros_like(guess)])
        found, judged = (self._among_rows if self._rows <= self.width else self._from_sums)(guess, intercept)
        return found.moved(self._pulls(judged, num_held, pooled)) if self.movable else found

    def _pulls(self, judged: Judged | None, num_held: Array | None, pooled: bool) -> Array:
        """How far each of the targets moves, shape (q,)."""
        pulls = np.zeros(self.outputs)
        if judged is None or num_held is None:
            return pulls
        points, rows = np.stack([judged.losses(share) for share in (0.0, 0.5, 1.0)], axis=1), num_held
        most = COST * judged.spread
        if pooled:
            points, rows, most = points.sum(axis=0, keepdims=True), rows.min(keepdims=True), most.sum(keepdims=True)
        far = [
            farthest(float(start), float(middle), float(end), int(count), float(limit)) if count else 0.0
            for (start, middle, end), count, limit in zip(points, rows, most, strict=True)
        ]
        return np.asarray(pulls + np.array(far))

    # ---- more rows than columns

    def _from_sums(self, guess: Array, intercept: bool) -> tuple[Solution, Judged | None]:
        sums = train, held = self._summed()
        told = bool(held.count and train.count)
        if not told:
            train = held = train + held
        own = slice(self.outputs)
        judge = held.part(own)
        wide = self.width > _WIDE
        path = _Factorised(train, guess, intercept) if wide else _Decomposed(train, guess, intercept)
        best, least, fitted = float(STRENGTHS[-1]), np.inf, Solution(guess, np.zeros(guess.shape[1]), 0.0, 0.0)
        for strength in (_FEW if wide else STRENGTHS) if told else (UNTOLD,):
            kernel = path.kernel(strength)
            offset = _offset(train, kernel, intercept)
            loss = float(judge.losses(kernel[:, own], offset[own]).sum())
            if loss < least:
                best, least, fitted = float(strength), loss, Solution(kernel, offset, 0.0, 0.0)
        whole = sums[0] + sums[1]
        path = _Factorised(whole, guess, intercept) if wide else _Decomposed(whole, guess, intercept)
        kernel = path.kernel(best)
        spread = judge.yy - judge.y**2 / judge.count
        found = Solution(kernel, _offset(whole, kernel, intercept), best, _explained(least, float(spread.sum())))

        def losses(pull: float) -> Array:
            moved = fitted.moved(pull)
            return judge.losses(moved.kernel, moved.offset)

        return found, Judged(losses, spread) if told else None

    # ---- fewer rows than columns

    def _among_rows(self, guess: Array, intercept: bool) -> tuple[Solution, Judged | None]:
        if not self._rows:
            return Solution(guess, np.zeros(guess.shape[1]), float(STRENGTHS[-1]), 0.0), None
        inputs = np.concatenate([x for x, _, _ in self._kept]).astype(np.float64)
        targets = np.concatenate([y for _, y, _ in self._kept]).astype(np.float64)
        away = np.concatenate([held for _, _, held in self._kept])
        if away.all() or not away.any():
            away = np.arange(len(away)) % 5 == 4
        own = slice(self.outputs)
        rest = targets - inputs @ guess
        train, held = ~away, away
        best, least, fitted = float(STRENGTHS[-1]), np.inf, np.zeros((int(held.sum()), guess.shape[1]))
        if held.any() and train.any():
            products, pair, middle, scale = _dual(inputs[train], rest[train], intercept)
            across = (inputs[held] - middle[0]) @ (inputs[train] - middle[0]).T
            for strength in STRENGTHS:
                made = across @ pair[1] @ (products / (pair[0] + strength * scale)[:, None]) + middle[1]
                loss = float(np.sum((rest[held] - made)[:, own] ** 2))
                if loss < least:
                    best, least, fitted = float(strength), loss, made
        products, pair, middle, scale = _dual(inputs, rest, intercept)
        change = (inputs - middle[0]).T @ (pair[1] @ (products / (pair[0] + best * scale)[:, None]))
        kernel = guess + change
        made = inputs @ kernel
        offset = np.asarray((targets - made).mean(axis=0)) if intercept else np.zeros(guess.shape[1])
        wanted = targets[held][:, own]
        spread = np.sum((wanted - wanted.mean(axis=0)) ** 2, axis=0) if held.any() else np.zeros(self.outputs)
        found = Solution(kernel, offset, best, _explained(least, float(spread.sum())))
        left, step = (rest[held] - fitted)[:, own], fitted[:, self.outputs :]
        told = bool(held.any() and train.any())
        return found, Judged(lambda pull: np.sum((left - pull * step) ** 2, axis=0), spread) if told else None

    def moments(self, kernel: Array, columns: slice) -> tuple[Array, Array]:
        """Mean and variance of `inputs[:, columns] @ kernel` over all rows, shape (q,) each."""
        if not self._rows:
            return np.zeros(kernel.shape[1]), np.ones(kernel.shape[1])
        if self._rows <= self.width:
            made = np.concatenate([x for x, _, _ in self._kept])[:, columns] @ kernel
            return made.mean(axis=0), made.var(axis=0)
        one, two = self._summed()
        whole = one + two
        mean = whole.x[columns] @ kernel / whole.count
        square = np.einsum("pq,pq->q", kernel, whole.xx[columns, columns] @ kernel) / whole.count
        return mean, np.maximum(square - mean**2, 0)


class _Decomposed:
    """Kernels of all strengths from one eigenvalue decomposition."""

    def __init__(self, sums: Sums, guess: Array, intercept: bool) -> None:
        xx, xy = _centred(sums, intercept)
        values, self.vectors = np.linalg.eigh(xx)
        self.values = np.maximum(values, 0)
        self.scale = max(float(self.values.mean()), 1e-12)
        self.guess, self.rest = guess, self.vectors.T @ (xy - xx @ guess)

    def kernel(self, strength: float) -> Array:
        return np.asarray(self.guess + self.vectors @ (self.rest / (self.values + strength * self.scale)[:, None]))


class _Factorised:
    """Kernels by one Cholesky factorisation per strength."""

    def __init__(self, sums: Sums, guess: Array, intercept: bool) -> None:
        self.xx, xy = _centred(sums, intercept)
        self.scale = max(float(np.trace(self.xx)) / len(self.xx), 1e-12)
        self.guess, self.rest = guess, xy - self.xx @ guess

    def kernel(self, strength: float) -> Array:
        from scipy.linalg import cho_factor, cho_solve

        shifted = self.xx + max(strength, 1e-9) * self.scale * np.eye(len(self.xx))
        return np.asarray(self.guess + cho_solve(cho_factor(shifted, overwrite_a=True, check_finite=False), self.rest))


def _centred(sums: Sums, intercept: bool) -> tuple[Array, Array]:
    count = max(sums.count, 1)
    xx, xy = sums.xx / count, sums.xy / count
    if intercept:
        mean = sums.x / count
        xx = xx - np.outer(mean, mean)
        xy = xy - np.outer(mean, sums.y / count)
    return xx, xy


def _offset(sums: Sums, kernel: Array, intercept: bool) -> Array:
    if not intercept or not sums.count:
        return np.zeros(len(sums.y))
    return np.asarray((sums.y - sums.x @ kernel) / sums.count)


def _dual(
    inputs: Array, targets: Array, intercept: bool
) -> tuple[Array, tuple[Array, Array], tuple[Array, Array], float]:
    """Products of rows with rows, decomposed: targets in it, (eigenvalues, vectors), both means, scale."""
    middle = (
        (inputs.mean(axis=0), targets.mean(axis=0))
        if intercept
        else (np.zeros(inputs.shape[1]), np.zeros(targets.shape[1]))
    )
    centred = inputs - middle[0]
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values, 0)
    scale = max(float(values.sum()) / inputs.shape[1], 1e-12)
    return vectors.T @ (targets - middle[1]), (values, vectors), middle, scale


def _explained(loss: float, spread: float) -> float:
    return 1 - loss / spread if spread > 0 and np.isfinite(loss) else 1.0
