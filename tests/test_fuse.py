"""The parts of a fusion by hand-worked numbers, and whole fusions of small networks."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zoo
from test_align import merge, twin_of

from kmerge import merge_models
from kmerge.agreement import Agreement, measure_agreement
from kmerge.assembly import assemble
from kmerge.calibration.enrich import are_letters, channels_first, crossed
from kmerge.calibration.inputs import Inputs
from kmerge.engine import merge_tensors
from kmerge.fuse import model as fuse_model
from kmerge.fuse import ridge
from kmerge.fuse.batches import UNSEEN, activation_bytes, batch_size, in_batches, longest_free, share_unseen
from kmerge.fuse.blend import BY_OUTPUTS, FUNCTIONS, Sample, _metric, _Problem, blended, function_of
from kmerge.fuse.clusters import cluster_units, distances
from kmerge.fuse.common import Common
from kmerge.fuse.context import Context
from kmerge.fuse.mixing import Block, Line, Mixing, unmoved
from kmerge.fuse.model import Fusion, fuse_models, memory_for
from kmerge.fuse.pairing import assigned, correlations, transported, zipped
from kmerge.fuse.pairs import Frame, Pair, arranged
from kmerge.fuse.ridge import STRENGTHS, Regression, Solution, farthest
from kmerge.layout import lay_out, source_graph
from kmerge.output import create_output
from kmerge.planning import make_plan
from kmerge.progress import silent
from kmerge.rules import Rules
from kmerge.source import Source, open_source
from kmerge.spaces import AxisUse, Space

# ---- ridge


def solved(x: np.ndarray, y: np.ndarray, guess: np.ndarray, intercept: bool = True, parts: int = 3) -> Solution:
    """By a regression that is given the rows in several parts, every fifth held back."""
    held = np.arange(len(x)) % 5 == 4
    fit = Regression(x.shape[1], y.shape[1])
    for rows in np.array_split(np.arange(len(x)), parts):
        fit.add(x[rows], y[rows], held[rows])
    return fit.solve(guess, intercept)


def closed_form(
    x: np.ndarray, y: np.ndarray, guess: np.ndarray, intercept: bool, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and offset with the least mean squared error plus strength times mean variance times squared change."""
    middle, aim = (x.mean(axis=0), y.mean(axis=0)) if intercept else (np.zeros(x.shape[1]), np.zeros(y.shape[1]))
    a, b = x - middle, y - aim
    gram = a.T @ a / len(x)
    shift = strength * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram + shift, a.T @ b / len(x) + shift @ guess)
    return kernel, aim - middle @ kernel


def problem(rows: int, width: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) * rng.uniform(0.5, 2, width) + rng.uniform(-3, 3, width)
    kernel = rng.standard_normal((width, 2))
    y = x @ kernel + 5 + noise * rng.standard_normal((rows, 2))
    return x, y, kernel


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(60, 4), (13, 12), (8, 20), (5, 5)])
@pytest.mark.parametrize("wide", [False, True])
def test_ridge_is_the_closed_form(
    rows: int, width: int, intercept: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For more rows than columns and for fewer, by eigenvalues and by factorisations."""
    if wide:
        monkeypatch.setattr(ridge, "_WIDE", 0)
    x, y, kernel = problem(rows, width, 0.5)
    guess = kernel + 0.1 * np.random.default_rng(1).standard_normal(kernel.shape)
    found = solved(x, y, guess, intercept)
    expected = closed_form(x, y, guess, intercept, found.strength)
    np.testing.assert_allclose(found.kernel, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.offset, expected[1], atol=1e-5)
    assert intercept or not found.offset.any()


@pytest.mark.parametrize(("rows", "width"), [(200, 6), (12, 30)])
def test_the_strength_is_the_best_on_rows_that_are_held_back(rows: int, width: int) -> None:
    x, y, kernel = problem(rows, width, 3.0)
    guess = np.zeros_like(kernel)
    found = solved(x, y, guess)
    held = np.arange(rows) % 5 == 4

    def loss(strength: float) -> float:
        own, offset = closed_form(x[~held], y[~held], guess, True, strength)
        return float(np.sum((y[held] - x[held] @ own - offset) ** 2))

    losses = [loss(strength) for strength in STRENGTHS]
    assert found.strength == STRENGTHS[int(np.argmin(losses))]
    assert len({round(value, 6) for value in losses}) > 3
    spread = float(np.sum((y[held] - y[held].mean(axis=0)) ** 2))
    assert found.explained == pytest.approx(1 - min(losses) / spread, abs=1e-6)


def test_one_column_by_hand() -> None:
    """Mean of x squared is 1, of x times y 2: 2 / (1 + strength) without a guess, a third of the way to it more."""
    fit = Regression(1, 1)
    x = np.tile([[1.0], [-1.0]], (5, 1))
    fit.add(x, 2 * x, np.arange(10) >= 8)
    found = fit.solve(np.zeros((1, 1)), False)
    assert found.strength == STRENGTHS[0]
    assert found.kernel[0, 0] == pytest.approx(2 / (1 + STRENGTHS[0]), abs=1e-12)
    assert found.explained == pytest.approx(1, abs=1e-9)
    mean, variance = fit.moments(np.array([[3.0]]), slice(0, 1))
    assert mean[0] == pytest.approx(0)
    assert variance[0] == pytest.approx(9)


def test_the_guess_is_what_no_rows_give() -> None:
    guess = np.arange(6.0).reshape(3, 2)
    for fit in (Regression(3, 2), Regression(3, 2)):
        found = fit.solve(guess, True)
        np.testing.assert_array_equal(found.kernel, guess)
        np.testing.assert_array_equal(found.offset, [0, 0])
        fit.add(np.full((4, 3), np.nan), np.zeros((4, 2)), np.zeros(4, dtype=bool))
        np.testing.assert_array_equal(fit.solve(guess, True).kernel, guess)


@pytest.mark.parametrize(("rows", "width"), [(40, 3), (6, 9)])
def test_the_guess_is_what_an_endless_strength_gives(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "STRENGTHS", np.array([1e12]))
    x, y, _ = problem(rows, width, 0.1)
    guess = np.ones((width, 2))
    found = solved(x, y, guess)
    np.testing.assert_allclose(found.kernel, guess, atol=1e-6)
    np.testing.assert_allclose(found.offset, (y - x @ guess).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(40, 3), (6, 9)])
def test_a_guess_that_is_right_stays(rows: int, width: int) -> None:
    x, y, kernel = problem(rows, width, 0.0)
    found = solved(x, y, kernel)
    np.testing.assert_allclose(found.kernel, kernel, atol=1e-9)
    np.testing.assert_allclose(found.offset, [5, 5], atol=1e-8)
    assert found.explained == pytest.approx(1)


@pytest.mark.parametrize(("rows", "width"), [(50, 4), (6, 9)])
def test_moments_are_those_of_the_rows(rows: int, width: int) -> None:
    x, y, _ = problem(rows, width, 0.0)
    fit = Regression(width, 2)
    fit.add(x, y, np.arange(rows) % 5 == 4)
    kernel = np.random.default_rng(1).standard_normal((2, 3))
    mean, variance = fit.moments(kernel, slice(1, 3))
    np.testing.assert_allclose(mean, (x[:, 1:3] @ kernel).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(variance, (x[:, 1:3] @ kernel).var(axis=0), rtol=1e-7)


@pytest.mark.parametrize("held", [False, True])
def test_no_strength_is_chosen_by_the_rows_that_are_fitted(held: bool) -> None:
    """Where all rows are held back, or none, the least strength would win, however much of them is chance."""
    x, y, kernel = problem(40, 20, 3.0)
    fit = Regression(20, 2)
    fit.add(x, y, np.full(40, held))
    found = fit.solve(np.zeros_like(kernel), True)
    assert found.strength == ridge.UNTOLD
    expected = closed_form(x, y, np.zeros_like(kernel), True, ridge.UNTOLD)
    np.testing.assert_allclose(found.kernel, expected[0], atol=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(60, 4), (12, 30)])
def test_rows_that_wait_to_be_summed_up_count_like_the_others(
    rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, kernel = problem(rows, width, 0.5)
    expected = solved(x, y, kernel * 0, parts=1)
    monkeypatch.setattr(ridge, "_AT_ONCE", 7)
    found = solved(x, y, kernel * 0, parts=9)
    assert found.strength == expected.strength
    np.testing.assert_allclose(found.kernel, expected.kernel, atol=1e-9)


def farthest_of(loss: Callable[[float], float], rows: int) -> float:
    return farthest(loss(0.0), loss(0.5), loss(1.0), rows)


def test_the_farthest_share_by_hand() -> None:
    """1 + t², of 8 rows: half as much again as the least, 1, is reached at the root of a half."""
    assert farthest_of(lambda t: 1 + t**2, 8) == pytest.approx(np.sqrt(0.5))
    assert farthest_of(lambda t: 1 + t**2, 2) == 1  # twice as much, at the very end
    assert farthest_of(lambda t: 1 + (t - 0.5) ** 2, 2 * 10**8) == pytest.approx(0.5, abs=0.02)  # the least
    assert farthest(1.0, 1.25, 2.0, 2, 0.25) == pytest.approx(0.5)  # a quarter at most
    assert farthest_of(lambda t: 2 - t, 100) == 1  # the farther, the better
    assert farthest_of(lambda t: 1.0, 100) == 1  # no difference at all
    assert farthest_of(lambda t: 3 * t**2, 100) == 0  # exact where it is, and only there
    assert farthest_of(lambda t: 1 - t**2 / 2 + t, 10**8) == 0  # a hill between: not beyond it
    assert 0 <= farthest_of(lambda t: (t - 0.5) ** 2 * 1e-9 - 1e-12, 100) <= 1  # rounded below nothing


@pytest.mark.parametrize(("rows", "width"), [(200, 5), (16, 30)])
@pytest.mark.parametrize("num_held", [(0, 0), (3, 40), (40, 0)])
@pytest.mark.parametrize("pooled", [False, True])
def test_targets_move_as_far_as_the_rule_lets_them(
    rows: int, width: int, num_held: tuple[int, int], pooled: bool
) -> None:
    x, y, kernel = problem(rows, width, 1.0)
    gap = x @ np.random.default_rng(3).standard_normal(kernel.shape) / 3
    held = np.arange(rows) % 5 == 4
    fit = Regression(width, 2, True)
    for part in np.array_split(np.arange(rows), 3):
        fit.add(x[part], np.hstack([y, gap])[part], held[part])
    guess = kernel + 0.3
    found, plain = fit.solve(guess, True, np.array(num_held), pooled), solved(x, y, guess)
    assert found.strength == plain.strength
    pull = np.asarray(found.pull)
    expected = closed_form(x, y + pull * gap, guess, True, found.strength)
    np.testing.assert_allclose(found.kernel, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.offset, expected[1], atol=1e-5)

    def losses(share: float) -> np.ndarray:
        own, offset = closed_form(x[~held], (y + share * gap)[~held], guess, True, found.strength)
        errors = np.sum((y[held] - x[held] @ own - offset) ** 2, axis=0)
        return np.full(2, errors.sum()) if pooled else np.asarray(errors)

    shares = np.linspace(0, 1, 201)
    table = np.array([losses(share) for share in shares])
    for column, count in enumerate([min(num_held)] * 2 if pooled else num_held):
        if not count:
            assert pull[column] == 0
            continue
        spread = np.sum((y[held] - y[held].mean(axis=0)) ** 2, axis=0)
        most = ridge.COST * (spread.sum() if pooled else spread[column])
        least = table[:, column].min()
        allowed = shares[table[:, column] <= least + min(least * np.sqrt(2 / count), most)]
        assert pull[column] == pytest.approx(allowed.max(), abs=0.006)
        assert pull[column] > 0


@pytest.mark.parametrize("rows", [0, 40])
def test_nothing_moves_where_no_rows_are_held_back(rows: int) -> None:
    x, y, kernel = problem(40, 3, 0.0)
    fit = Regression(3, 2, True)
    fit.add(x[:rows], np.hstack([y, y])[:rows], np.zeros(rows, dtype=bool))
    fit.add(np.full((2, 3), np.nan), np.zeros((2, 4)), np.ones(2, dtype=bool))
    found = fit.solve(kernel, True, np.array([30, 30]))
    np.testing.assert_array_equal(found.pull, [0, 0])
    np.testing.assert_allclose(found.kernel, kernel, atol=1e-9)


# ---- what all sources give


def test_sources_of_one_task_by_hand() -> None:
    """Of 0, 2, 4 and 1, 3, 5 the shared mean lies 0.25 above the first; 3 squares of 1 stand against a spread of 8."""
    one, two = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [3.0], [5.0]])
    common, of = Common([0.75, 0.25], 0), np.arange(3)
    gap = common.add([one, two], of, np.array([False, True, True]))
    np.testing.assert_allclose(gap, 0.25)
    assert common.num_held(1).tolist() == [2]
    np.testing.assert_allclose(common.add([one, two + 9], of, np.array([True, True, True])), 2.5)
    assert common.num_held(1).tolist() == [0]


def test_columns_are_alike_one_by_one_or_all_together() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 50, 2))
    one[:, 0] = 100 * one[:, 0]
    two[:, 0] = one[:, 0] + 1
    held = np.arange(25) % 5 == 4
    for pooled, expected in ((False, [5, 0]), (True, [5, 5])):
        common = Common([0.5, 0.5], 0, pooled)
        common.add([one, two], np.arange(50) // 2, held)
        assert common.num_held(2).tolist() == expected


def test_sources_of_other_tasks_have_nothing_in_common() -> None:
    one, two = np.random.default_rng(0).standard_normal((2, 50, 4))
    strangers, others = Common([0.5, 0.5], 0), Common([0.5, 0.5], 1)
    strangers.add([one, two], np.arange(50), np.arange(50) % 5 == 4)
    assert not strangers.num_held(4).any()
    assert others.add([], np.arange(50), np.arange(50) % 5 == 4) is None
    assert not others.num_held(4).any()


def test_inputs_that_are_not_finite_judge_nothing() -> None:
    one = np.arange(10.0)[:, None]
    two = one + 0.1
    two[8] = np.nan
    common = Common([0.5, 0.5], 0)
    gap = common.add([one, two], np.arange(10), np.arange(10) >= 7)
    np.testing.assert_allclose(gap[:, 0], [0.05] * 8 + [0, 0.05])  # the head's own row stays one
    assert common.num_held(1).tolist() == [2]


# ---- clusters


def moments_of(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)


def test_equal_units_come_together() -> None:
    rng = np.random.default_rng(0)
    rows = np.tile(rng.standard_normal((100, 5)), (1, 3))  # three sources of the same five units
    for seed in range(5):
        labels = cluster_units(moments_of(rows), np.ones(15), 5, np.random.default_rng(seed)).reshape(3, 5)
        assert sorted(labels[0]) == list(range(5))
        np.testing.assert_array_equal(labels, np.tile(labels[0], (3, 1)))


@pytest.mark.parametrize("count", [1, 4, 7, 12])
@pytest.mark.parametrize("kind", ["noise", "equal", "dead", "unread"])
def test_every_cluster_has_a_unit(count: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 12))
    if kind == "equal":
        rows[:] = rows[:, :1]
    if kind == "dead":
        rows[:, 2:] = 0
    importance = np.zeros(12) if kind == "unread" else np.ones(12)
    labels = cluster_units(moments_of(rows), importance, count, rng)
    assert set(labels.tolist()) == set(range(count))


def test_units_that_matter_are_kept_apart() -> None:
    """Four units on a line at 0, 1, 10 and 12: those that matter get a centre of their own."""
    places = np.array([0.0, 1.0, 10.0, 12.0])
    moments = np.outer(places, places)

    def groups(importance: Sequence[float]) -> list[list[int]]:
        labels = cluster_units(moments, np.array(importance), 3, np.random.default_rng(0))
        return sorted(np.flatnonzero(labels == label).tolist() for label in range(3))

    assert groups([1, 1, 1, 1]) == [[0, 1], [2], [3]]  # 1/2 is lost, else 4/2
    assert groups([9, 9, 1e-3, 1e-3]) == [[0], [1], [2, 3]]  # 2e-3, else 9/2


def test_distances_by_hand() -> None:
    """Units at 0, 2 and 8 with weights 1, 3 and 1: centres of {0, 1} and {2} at 1.5 and 8."""
    places = np.array([0.0, 2.0, 8.0])
    found = distances(np.outer(places, places), np.array([1.0, 3.0, 1.0]), np.array([0, 0, 1]), 2)
    np.testing.assert_allclose(found, [[2.25, 64], [0.25, 36], [42.25, 0]], atol=1e-12)


def test_clusters_are_the_best_of_all_where_all_can_be_tried() -> None:
    rng = np.random.default_rng(3)
    moments = moments_of(rng.standard_normal((40, 6)))
    weights = rng.uniform(0.5, 2, 6)

    def loss(labels: np.ndarray) -> float:
        return float(weights @ distances(moments, weights, labels, 3)[np.arange(6), labels])

    every = (np.array(labels) for labels in np.ndindex(*(3,) * 6) if len(set(labels)) == 3)
    least = min(loss(labels) for labels in every)
    assert loss(cluster_units(moments, weights, 3, rng)) == pytest.approx(least, rel=1e-6)


def test_clusters_follow_from_the_seed() -> None:
    moments = moments_of(np.random.default_rng(0).standard_normal((30, 40)))
    one, two = (cluster_units(moments, np.ones(40), 13, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


# ---- blends


def framed(readers: Sequence[np.ndarray]) -> Frame:
    """A space of units that one kernel reads in each source, given with shape (units, outputs)."""
    size = len(readers[0])
    uses = [AxisUse(source, 0, 0, 0, np.arange(size), "input") for source in range(len(readers))]
    sources: Any = tuple(
        SimpleNamespace(states=[SimpleNamespace(weights=[SimpleNamespace(tensor=SimpleNamespace(read=lambda k=k: k))])])
        for k in readers
    )
    return Frame(sources, (Space(size, tuple(uses)),), (size,))


def unrelated(seed: int = 0, rows: int = 300, units: int = 5) -> tuple[Frame, np.ndarray]:
    """Two sources of units that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, 6))
    values = np.concatenate([hidden @ rng.standard_normal((6, units)) for _ in range(2)], axis=1)
    return framed([rng.standard_normal((units, 3)) for _ in range(2)]), values + 0.1 * rng.standard_normal(values.shape)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_slope_of_what_is_lost(name: str) -> None:
    frame, values = unrelated()
    task = _Problem(frame, 0, [Sample(values, FUNCTIONS[name]), Sample(values[:90] ** 2, FUNCTIONS[name])], [0.6, 0.4])
    rng = np.random.default_rng(1)
    blends = rng.standard_normal((10, 5)) / 3
    slope = task.cost(blends)[1]
    for _ in range(3):
        along = slope / np.linalg.norm(slope) + rng.standard_normal(blends.shape) / 8
        step = 1e-3 * along
        difference = (task.cost(blends + step)[0] - task.cost(blends - step)[0]) / 2e-3
        assert difference == pytest.approx(float(np.sum(slope * along)), rel=0.03)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_slopes_are_those_of_keras(name: str) -> None:
    import keras

    x = np.linspace(-4, 4, 80, dtype="float32")  # without 0, where some have a corner
    function, slope = FUNCTIONS[name]
    exact = np.asarray(keras.activations.get(name)(x))
    tolerance = 1e-3 if name == "gelu" else 1e-5
    np.testing.assert_allclose(function(x), exact, atol=tolerance)
    wide = x.astype("float64")
    difference = (function(wide + 1e-5) - function(wide - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope(x, function(x)), difference, atol=1e-4)


def test_functions_by_the_settings_of_their_layer() -> None:
    def of(name: Any, **config: Any) -> float | None:
        found = function_of(name, config)
        return None if found is None else float(found[0](np.array([-1.0], dtype="float32"))[0])

    assert of("LeakyReLU", negative_slope=0.25) == -0.25
    assert of("LeakyReLU") == pytest.approx(-0.3)
    assert of("leaky_relu") == pytest.approx(-0.2)
    assert of("ReLU", negative_slope=0.5) == -0.5
    assert of("ReLU") == 0
    assert of("ReLU", max_value=6.0) is None
    assert of(None) == -1
    assert of("softmax") is None


@pytest.mark.parametrize("name", ["linear", "relu", "tanh"])
def test_a_blend_is_better_than_its_start(name: str) -> None:
    for seed in range(3):
        frame, values = unrelated(seed)
        samples = [Sample(values, FUNCTIONS[name])]
        start = Pair(np.stack([np.eye(5) / 2] * 2), np.stack([np.eye(5)] * 2))
        found = blended(frame, 0, samples, start, [0.5, 0.5])
        task = _Problem(frame, 0, samples, [0.5, 0.5])
        before, after = (task.cost(pair.merge.reshape(10, 5))[0] for pair in (start, found))
        assert after < 0.8 * before
        assert found.merge.shape == start.merge.shape
        assert found.unmerge.shape == start.unmerge.shape


def test_a_blend_of_linear_units_is_their_first_components() -> None:
    """What 3 linear units can hold of all that is read is what the 3 largest singular values hold."""
    frame, values = unrelated(2)
    start = Pair(*(np.random.default_rng(0).standard_normal(shape) for shape in ((2, 5, 3), (2, 3, 5))))
    found = blended(frame, 0, [Sample(values, FUNCTIONS["linear"])], start, [0.5, 0.5])
    task = _Problem(frame, 0, [Sample(values, FUNCTIONS["linear"])], [0.5, 0.5])
    singular = np.linalg.svd(task.sites[0][2], compute_uv=False)
    least = float(np.sum(singular[3:] ** 2) / np.sum(singular**2))
    assert task.cost(found.merge.reshape(10, 3))[0] == pytest.approx(least, abs=0.02)


def test_a_source_without_a_share_has_no_say() -> None:
    frame, values = unrelated()
    task = _Problem(frame, 0, [Sample(values, FUNCTIONS["relu"])], [1.0, 0.0])
    own = np.concatenate([np.eye(5), np.zeros((5, 5))])
    other = own[::-1]
    assert task.cost(own)[0] < 1e-6
    assert task.cost(other)[0] > 0.05


def test_errors_count_by_what_becomes_of_them_at_the_outputs() -> None:
    """Units that the outputs do not depend on may be lost: the one blend goes to the unit that they do depend on."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 4)) * [1, 3, 1, 3]
    frame = framed([np.eye(2)] * 2)
    start = Pair(np.full((2, 2, 2), 0.25) + 0.01 * rng.standard_normal((2, 2, 2)), np.ones((2, 2, 2)))
    matters = np.diag([1.0, 0.0, 1.0, 0.0])
    found = blended(frame, 0, [Sample(values, FUNCTIONS["linear"], matters)], start, [0.5, 0.5])
    blends = found.merge.reshape(4, 2) * np.array([1, 3, 1, 3])[:, None]
    share = np.sum(blends[[0, 2]] ** 2) / np.sum(blends**2)
    assert share > 0.9
    plain = blended(frame, 0, [Sample(values, FUNCTIONS["linear"])], start, [0.5, 0.5])
    blends = plain.merge.reshape(4, 2) * np.array([1, 3, 1, 3])[:, None]
    assert np.sum(blends[[1, 3]] ** 2) / np.sum(blends**2) > 0.9  # the larger ones, where nothing else is known


def test_every_source_counts_by_its_share_whatever_the_size_of_its_gradients() -> None:
    rng = np.random.default_rng(1)
    covariance = np.diag([1.0, 2.0, 3.0, 4.0])
    slopes = np.zeros((4, 4))
    for source, size in enumerate((1.0, 1e6)):
        own = slice(2 * source, 2 * source + 2)
        roots = rng.standard_normal((2, 2)) * size
        slopes[own, own] = roots @ roots.T
    readers = [(0, np.eye(4)[:, :2]), (1, 5 * np.eye(4)[:, 2:]), (1, np.eye(4)[:, 2:])]
    for given in (slopes, np.zeros((4, 4))):
        found = _metric(covariance, readers, given, [0.75, 0.25])
        assert [float(np.sum((found * covariance)[s : s + 2, s : s + 2])) for s in (0, 2)] == pytest.approx(
            [0.75, 0.25]
        )


def test_errors_may_make_up_for_each_other_where_only_the_mean_of_the_outputs_matters() -> None:
    """Both outputs are the difference of two units each: what their mean sees is one direction of four."""
    covariance = np.eye(4)
    direction = np.array([1.0, -1.0, 1.0, -1.0])
    found = _metric(covariance, [], np.outer(direction, direction), [0.5, 0.5], True)
    assert found == pytest.approx(BY_OUTPUTS / 4 * np.outer(direction, direction))
    assert np.array([1, 0, -1, 0]) @ found @ np.array([1, 0, -1, 0]) == pytest.approx(0)
    apart = _metric(covariance, [], np.outer(direction, direction), [0.5, 0.5])
    assert np.array([1, 0, -1, 0]) @ apart @ np.array([1, 0, -1, 0]) > 0.1


def permuted_units(units: int = 6, rows: int = 4000) -> tuple[Frame, np.ndarray, Pair]:
    """A source and a twin with its units in another order, and the pair that undoes that."""
    rng = np.random.default_rng(4)
    order = rng.permutation(units)
    values = rng.standard_normal((rows, units))
    steps = np.stack([np.eye(units), np.eye(units)[np.argsort(order)]])
    pair = Pair(steps.transpose(0, 2, 1) / 2, steps)
    kernel = rng.standard_normal((units, 4))
    return framed([kernel, kernel[order]]), np.concatenate([values, values[:, order]], axis=1), pair


def test_an_exact_start_is_left_as_it_is() -> None:
    frame, values, pair = permuted_units()
    np.testing.assert_allclose(values @ pair.merge.reshape(12, 6), values[:, :6], atol=1e-12)
    assert blended(frame, 0, [Sample(values, FUNCTIONS["relu"])], pair, [0.5, 0.5]) is pair


def test_blends_are_those_that_held_back_rows_speak_for() -> None:
    """With as few rows as units, the search finds what chance has put there; other rows tell."""
    rng = np.random.default_rng(6)
    rows, judges = rng.standard_normal((24, 24)), rng.standard_normal((400, 24))
    frame = framed([np.eye(12)] * 2)
    start = Pair(np.stack([np.eye(12) / 2] * 2), np.stack([np.eye(12)] * 2))
    told = [Sample(rows, FUNCTIONS["relu"], judges=judges)]
    task = _Problem(frame, 0, told, [0.5, 0.5])
    first = start.merge.reshape(24, 12)
    alone, judged = (
        blended(frame, 0, samples, start, [0.5, 0.5]).merge.reshape(24, 12)
        for samples in ([Sample(rows, FUNCTIONS["relu"])], told)
    )
    assert task.cost(alone)[0] < task.cost(judged)[0]
    assert task.judged(judged) <= task.judged(first) < task.judged(alone)


def test_what_stands_for_a_unit_of_a_permutation_is_its_inverse() -> None:
    frame, values, pair = permuted_units()
    task = _Problem(frame, 0, [Sample(values, FUNCTIONS["relu"])], [0.5, 0.5])
    back = task.unmerge(pair.merge.reshape(12, 6)).reshape(6, 2, 6).transpose(1, 0, 2)
    np.testing.assert_allclose(back, pair.unmerge, atol=3e-3)


# ---- pairing


def correlation_of(rows: np.ndarray) -> np.ndarray:
    return correlations(rows.sum(axis=0), rows.T @ rows, len(rows))


@functools.cache
def planted(sources: int, noise: float, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Correlations of units of several sources that are the same but for noise, each source in an order of its own."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((300, 8)) @ (np.eye(8) + 0.3)
    orders = [np.arange(8), *(rng.permutation(8) for _ in range(sources - 1))]
    rows = [(base + noise * rng.standard_normal(base.shape))[:, order] for order in orders]
    return correlation_of(np.concatenate(rows, axis=1)), orders


def test_correlations_are_those_of_numpy_but_for_units_that_never_change() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4)) * [1, 10, 0.1, 1] + [5, 0, 1, 0]
    expected = np.corrcoef(rows.T)
    np.testing.assert_allclose(correlation_of(rows), expected, atol=1e-9)
    rows[:, 1] = 7
    found = correlation_of(rows)
    alive = [0, 2, 3]
    np.testing.assert_allclose(found[np.ix_(alive, alive)], expected[np.ix_(alive, alive)], atol=1e-9)
    np.testing.assert_array_equal(found[1], np.eye(4)[1])
    np.testing.assert_array_equal(found[:, 1], np.eye(4)[1])
    np.testing.assert_array_equal(correlation_of(np.zeros((5, 2))), np.eye(2))


@pytest.mark.parametrize("sources", [2, 4])
def test_an_order_that_was_planted_is_found(sources: int) -> None:
    correlation, orders = planted(sources, 0.2)
    shares = np.arange(1, sources + 1) / (sources * (sources + 1) / 2)
    pair = assigned(correlation, shares.tolist(), np.random.default_rng(0))
    for share, order, merge_, unmerge in zip(shares, orders, pair.merge, pair.unmerge, strict=True):
        wanted = np.eye(8)[order]  # its unit number k is unit order[k] of the first
        np.testing.assert_allclose(merge_, share * wanted)
        np.testing.assert_array_equal(unmerge, wanted.T)


def test_more_sources_are_matched_to_all_of_the_others() -> None:
    """So much noise that the first alone misleads."""
    correlation, _ = planted(4, 3.0, 1)
    pair = assigned(correlation, [0.25] * 4, np.random.default_rng(0))
    orders = [step.argmax(axis=1) for step in pair.unmerge]

    def agreement(chosen: Sequence[np.ndarray]) -> float:
        blocks = correlation.reshape(4, 8, 4, 8)
        return sum(blocks[i, chosen[i], j, chosen[j]].sum() for i in range(4) for j in range(i))

    from scipy.optimize import linear_sum_assignment

    blocks = correlation.reshape(4, 8, 4, 8)
    by_first = [linear_sum_assignment(blocks[0, :, n], maximize=True)[1] for n in range(4)]
    assert agreement(orders) > agreement(by_first) + 1e-6
    for one, two in permutations(range(8), 2):  # no exchange of two units of the last source is better
        other = orders[3].copy()
        other[[one, two]] = other[[two, one]]
        assert agreement([*orders[:3], other]) <= agreement(orders) + 1e-9


def test_zip_by_hand() -> None:
    """0 and 1 are joined; 2 is close to 1 but far from 0, so it takes 3, which a mean over the group would not."""
    correlation = np.eye(4)
    for one, two, value in ((0, 1, 0.9), (1, 2, 0.8), (0, 2, -0.5), (2, 3, 0.1)):
        correlation[one, two] = correlation[two, one] = value
    pair = zipped(correlation, [0.25, 0.75], 2)
    np.testing.assert_allclose(pair.merge, [[[0.5, 0], [0.5, 0]], [[0, 0.5], [0, 0.5]]])
    np.testing.assert_array_equal(pair.unmerge, [[[1, 1], [0, 0]], [[0, 0], [1, 1]]])
    across = correlation[np.ix_([0, 2, 1, 3], [0, 2, 1, 3])]  # now one of each source in each group
    pair = zipped(across, [0.25, 0.75], 2)
    np.testing.assert_allclose(pair.merge, [[[0.25, 0], [0, 0.25]], [[0.75, 0], [0, 0.75]]])


def test_zip_leaves_units_of_no_share_out() -> None:
    """0 and 1 stay apart, however much they are like the others: two merged units are for two that count."""
    correlation = np.full((4, 4), 0.9) + 0.1 * np.eye(4)
    correlation[2, 0] = correlation[0, 2] = 0.95
    correlation[3, 0] = correlation[0, 3] = 0.99
    pair = zipped(correlation, [1.0, 0.0], 2)
    np.testing.assert_array_equal(pair.merge, [np.eye(2), np.zeros((2, 2))])
    np.testing.assert_array_equal(pair.unmerge, [np.eye(2), [[1, 1], [0, 0]]])


def test_zip_finds_an_order_that_was_planted() -> None:
    correlation, orders = planted(4, 0.2)
    pair = zipped(correlation, [0.25] * 4, 8)
    made = np.concatenate([np.eye(8)[order] for order in orders]) / 4  # merged units in the order of the first
    found = pair.merge.reshape(32, 8)
    np.testing.assert_allclose(found[:, found[:8].argmax(axis=1)], made)


def test_transport_tends_to_a_permutation() -> None:
    correlation, orders = planted(3, 0.2)
    wanted = [np.eye(8)[order] for order in orders]
    far = []
    for epsilon in (1.0, 0.1, 0.01):
        pair = transported(correlation, [0.2, 0.3, 0.5], epsilon)
        for share, step, back in zip([0.2, 0.3, 0.5], pair.merge, pair.unmerge, strict=True):
            np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-6)
            np.testing.assert_allclose(back.sum(axis=1), 1, atol=1e-6)
            np.testing.assert_allclose(step, share * back.T, atol=1e-12)
            assert (back >= 0).all()
        far.append(max(float(np.abs(back.T - one).max()) for back, one in zip(pair.unmerge, wanted, strict=True)))
    assert far[0] > far[1] > far[2]
    assert far[2] < 1e-6


# ---- where units stand


def places(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def test_wider_by_hand_in_blocks_and_in_a_row() -> None:
    tiles = places([0, 2], [1, 3])  # units 0 1 0 1
    found = arranged([tiles], [3], 4)
    assert found is not None
    assert found[0] == 6
    np.testing.assert_array_equal(found[1][0], [[0, 3], [1, 4], [2, 5]])
    repeats = places([0, 1], [2, 3])  # units 0 0 1 1
    found = arranged([repeats], [3], 4)
    assert found is not None
    assert found[0] == 6
    np.testing.assert_array_equal(found[1][0], [[0, 1], [2, 3], [4, 5]])


def test_wider_by_hand_beside_others() -> None:
    """Units a a x b b b: x has none; a of two grows to three, b of three shrinks to one."""
    found = arranged([places([0], [1]), places([3], [4], [5])], [3, 1], 6)
    assert found is not None
    length, new, old_kept, new_kept = found
    assert length == 5
    np.testing.assert_array_equal(new[0], [[0], [1], [2]])
    np.testing.assert_array_equal(new[1], [[4]])
    np.testing.assert_array_equal(old_kept, [2])
    np.testing.assert_array_equal(new_kept, [3])


def test_units_in_no_simple_order_keep_their_number() -> None:
    mixed = places([0, 3], [1, 2])  # units 0 1 1 0
    assert arranged([mixed], [3], 4) is None
    found = arranged([mixed, places([4], [5])], [2, 4], 6)  # what stands beside them may grow
    assert found is not None
    assert found[0] == 8
    np.testing.assert_array_equal(found[1][0], mixed)
    np.testing.assert_array_equal(found[1][1], [[4], [5], [6], [7]])


def dense_line(line: Line) -> np.ndarray:
    """The map as a matrix, block by block."""
    result = np.zeros((line.old, line.new))
    for block in line.blocks:
        by = np.eye(len(block.old)) * block.by if np.ndim(block.by) == 0 else block.by
        for copy in range(block.old.shape[1]):
            result[np.ix_(block.old[:, copy], block.new[:, copy])] = by
    return result


def test_maps_of_axes_are_their_matrices() -> None:
    """Three units of two copies each become two, one place stays; beside an axis of 4 that stays, and 2 copies each."""
    rng = np.random.default_rng(0)
    units = Block(places([0, 3], [1, 4], [2, 5]), places([0, 1], [2, 3]), rng.standard_normal((3, 2)))
    line = Line(7, 5, (units, Block(places([6]), places([4]), 0.5)))
    values = rng.standard_normal((3, 7, 2))
    np.testing.assert_allclose(line.apply(values, 1), np.einsum("rob,on->rnb", values, dense_line(line)))
    single = Block(places([1], [2], [3]), places([0], [1]), rng.standard_normal((3, 2)))
    plain = Line(5, 4, (single, Block(places([4], [0]), places([3], [2]), rng.standard_normal((2, 2)))))
    np.testing.assert_allclose(values[:, :5, 0] @ Mixing((plain,), np.ones(4)), values[:, :5, 0] @ dense_line(plain))
    for copies in (1, 2):
        scale = rng.standard_normal(20)
        mixing = Mixing((unmoved(4, 2.0), line), scale, copies)
        wanted = np.kron(np.kron(2 * np.eye(4), dense_line(line)) * scale, np.eye(copies))
        rows = rng.standard_normal((6, len(wanted)))
        np.testing.assert_allclose(rows @ mixing, rows @ wanted)
        np.testing.assert_allclose(rows[0] @ abs(mixing), rows[0] @ np.abs(wanted))
        np.testing.assert_allclose(mixing.matrix(), wanted)
        np.testing.assert_array_equal(mixing.reached(), np.ones(20 * copies, dtype=bool))
    scale[7] = 0
    nothing = Line(7, 5, (replace(units, by=units.by * [0, 1]), *line.blocks[1:]))
    mixing = Mixing((unmoved(4, 2.0), nothing), scale)
    np.testing.assert_array_equal(mixing.reached(), np.any(mixing.matrix() != 0, axis=0))
    assert not mixing.reached()[[0, 1, 5, 6, 7]].any()
    assert mixing.reached()[[2, 3, 4, 8, 9]].all()


def test_units_that_keep_their_places_take_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 64 × 64 pixels flattened: a matrix of its places would have 134 MB, rows of 16 inputs little."""
    import keras
    from keras import layers

    monkeypatch.setattr(fuse_model, "ENOUGH", 16)
    models = []
    for _ in range(3):
        keras.utils.set_random_seed(0)
        stack = [layers.Input((64, 64, 1)), layers.Conv2D(1, 3, padding="same", activation="relu"), layers.Flatten()]
        models.append(keras.Sequential([*stack, layers.Dense(2)]))
    inputs = np.random.default_rng(0).random((10, 64, 64, 1)).astype(np.float32)
    tracemalloc.start()
    try:
        merged = merge_models(models, method="fuse", data=inputs)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    for found in merged.predict_on_batch(inputs).values():
        np.testing.assert_allclose(found, models[0].predict_on_batch(inputs), atol=1e-5)


# ---- more inputs


def inputs_of(*arrays: np.ndarray) -> Inputs:
    return Inputs(arrays, np.full(len(arrays[0]), -1))


@pytest.mark.parametrize("shape", [(6, 5, 2), (9, 3), (4, 4, 4, 1)])
def test_crossed_parts_of_two_inputs(shape: tuple[int, ...]) -> None:
    """Each value of input number k is k, so that where it comes from can be read."""
    given = np.ones((10, *shape), dtype="float32") * np.arange(10.0, dtype="float32").reshape(10, *[1] * len(shape))
    made = crossed(inputs_of(given), 40, np.random.default_rng(0))
    (array,) = made.arrays
    assert array.shape == (40, *shape)
    assert array.dtype == given.dtype
    assert made.rows == 40
    assert made.synthetic
    kinds = [np.unique(row) for row in array]
    assert max(len(kind) for kind in kinds) == 2
    assert sum(len(kind) == 2 for kind in kinds) > 30
    np.testing.assert_array_equal(array[..., :1].repeat(shape[-1], -1), array)  # channels stay together
    for row in array:  # what comes from one of them is a box
        other = row[..., 0] != row[..., 0].ravel()[0]
        least = [
            np.flatnonzero(other.any(axis=tuple(a for a in range(other.ndim) if a != axis)))
            for axis in range(other.ndim)
        ]
        if not other.any():
            continue
        box = np.ix_(*(np.arange(own.min(), own.max() + 1) for own in least))
        assert other[box].all() or not other.all()


def test_crossed_tokens_stay_tokens() -> None:
    rng = np.random.default_rng(0)
    given = np.stack([np.arange(12) + 100 * row for row in range(8)]).astype("int32")
    text = given.astype(str).astype(object)
    for array in (given, text):
        (made,) = crossed(inputs_of(array), 30, rng).arrays
        assert made.dtype == array.dtype
        assert made.shape == (30, 12)
        whole = made.astype("int64")
        np.testing.assert_array_equal(whole % 100, np.tile(np.arange(12), (30, 1)))  # each in its place
        assert {len(np.unique(row // 100)) for row in whole} <= {1, 2}
        assert sum(len(np.unique(row // 100)) == 2 for row in whole) > 15


def test_crossed_rows_of_features_lie_between_two() -> None:
    rng = np.random.default_rng(0)
    given = np.eye(6, dtype="float32")
    (made,) = crossed(inputs_of(given), 50, rng).arrays
    assert made.dtype == given.dtype
    np.testing.assert_allclose(made.sum(axis=1), 1, atol=1e-6)
    assert (made >= 0).all()
    assert (np.count_nonzero(made, axis=1) <= 2).all()
    assert np.sort(made, axis=1)[:, -1].min() >= 0.5


def test_letters_are_told_by_their_values() -> None:
    letters = np.eye(4, dtype="float32")[np.random.default_rng(0).integers(4, size=(6, 9))]
    assert are_letters(inputs_of(letters))
    assert are_letters(inputs_of(letters[..., None].astype("uint8")))
    unknown = letters.copy()
    unknown[:, 3] = 0
    assert are_letters(inputs_of(unknown))
    assert not are_letters(inputs_of(letters * 0.5))
    assert not are_letters(inputs_of(1 - letters))
    assert not are_letters(inputs_of(np.zeros((6, 9, 4))))
    assert not are_letters(inputs_of(letters[..., :1]))
    assert not are_letters(inputs_of(letters[:, 0]))
    assert not are_letters(Inputs((letters, letters[:, 0]), np.full(6, -1)))


def test_crossed_letters_are_letters() -> None:
    letters = np.eye(4, dtype="float32")[np.random.default_rng(0).integers(4, size=(6, 9))]
    assert are_letters(crossed(inputs_of(letters), 50, np.random.default_rng(0)))


def test_crossed_inputs_of_one_network_come_from_the_same_two() -> None:
    one = np.ones((9, 5, 1), dtype="float32") * np.arange(9.0, dtype="float32")[:, None, None]
    two = np.broadcast_to(np.arange(9)[:, None], (9, 7)).astype("int64")
    owners = np.arange(9) % 3
    made = crossed(Inputs((one, two), owners), 60, np.random.default_rng(0))
    for first, second, owner in zip(*made.arrays, made.owners, strict=True):
        assert len({*first.ravel().astype(int).tolist(), *second.tolist()}) <= 2
        assert owner in {value % 3 for value in {*first.ravel().astype(int).tolist()}}


@pytest.mark.parametrize("size", [7, 400_000, 1_000_000])
def test_every_fifth_input_is_held_back_whatever_the_size_of_a_batch(size: int) -> None:
    """Of inputs of a megabyte, fewer than five are run at a time."""
    given = inputs_of(np.broadcast_to(np.arange(23, dtype="uint8")[:, None], (23, size)))
    batches, held = in_batches(given, 0, 0)
    assert all(len(batch[0]) == len(marks) for batch, marks in zip(batches, held, strict=True))
    assert size == 7 or max(map(len, held)) <= 5
    rows = np.concatenate([batch[0][marks, 0] for batch, marks in zip(batches, held, strict=True)])
    assert rows.tolist() == [4, 9, 14, 19]


def test_fewer_inputs_are_run_at_a_time_where_much_is_computed_of_each(tmp_path: Path) -> None:
    """A picture of 16 numbers, 2 * 16 after the convolution, 32 in a row, 5 in the end; seven letters of 3 and of 2."""
    import keras

    given = inputs_of(np.zeros((100, 4)))
    sizes = {0: 48, 1 << 10: 512, 100 << 10: 245, 10 << 20: 48, 100 << 20: 5, 1 << 40: 1}
    assert [batch_size(given, size) for size in sizes] == list(sizes.values())
    layers = [keras.layers.Conv2D(2, 3, padding="same"), keras.layers.Flatten(), keras.layers.Dense(5)]
    keras.Sequential([keras.Input((4, 4, 1)), *layers]).save(tmp_path / "a.keras")
    keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(2)]).save(tmp_path / "b.keras")
    for name, numbers in (("a", 16 + 32 + 32 + 5), ("b", 7 * 3 + 7 * 2)):
        with open_source(tmp_path / f"{name}.keras", name) as source:
            assert activation_bytes(source_graph(source), 7) == 4 * numbers
    assert longest_free([(None, 4), (None, None, 3)], inputs_of(np.zeros((5, 4)), np.zeros((5, 7, 3)))) == 7
    assert longest_free([None], inputs_of(np.zeros((5, 8, 2)))) == 8
    assert longest_free([(None, 4)], given) == 1


def test_no_input_is_made_of_one_that_is_held_back() -> None:
    """Each value of input number k is k."""
    given = inputs_of(np.ones((20, 6, 2), dtype="float32") * np.arange(20.0, dtype="float32")[:, None, None])
    batches, held = in_batches(given, 80, 0)
    arrays, marks = np.concatenate([batch[0] for batch in batches]), np.concatenate(held)
    assert len(arrays) == 80
    assert not marks[20:].any()
    assert set(arrays[marks].ravel()) == {4, 9, 14, 19}
    assert set(arrays[20:].ravel()) == set(range(20)) - {4, 9, 14, 19}


def test_channels_that_stand_first_stay_together() -> None:
    """Twelve channels of 5 by 4 positions: each input has the same at a position in all of them."""
    given = np.ones((10, 12, 5, 4), dtype="float32") * np.arange(10.0, dtype="float32").reshape(10, 1, 1, 1)
    (array,) = crossed(inputs_of(given), 30, np.random.default_rng(0), {0}).arrays
    assert array.shape == (30, 12, 5, 4)
    np.testing.assert_array_equal(array, array[:, :1].repeat(12, axis=1))
    assert sum(len(np.unique(row)) == 2 for row in array) > 20


def test_which_channels_stand_first_is_told_by_what_reads_them(tmp_path: Path) -> None:
    import keras
    from keras import layers

    one, two = keras.Input((2, 6)), keras.Input((6, 2))
    y = layers.MaxPooling1D(2, data_format="channels_first")(layers.Rescaling(0.5)(one))
    z = layers.TimeDistributed(layers.Dense(3))(layers.Conv1D(3, 2, data_format="channels_last")(two))
    model = keras.Model([one, two], [y, z])
    with open_source(zoo.save(model, tmp_path / "a.keras"), "a") as source:
        assert channels_first(source_graph(source)) == {0}


# ---- whole fusions


def _dense(b: Any, x: Any, width: float = 1.0) -> Any:
    y = b.Dense(round(10 * width), activation="relu", name="one")(x)
    return b.Dense(3, name="top")(b.Dense(round(9 * width), activation="tanh", name="two")(y))


def _residual(b: Any, x: Any, width: float = 1.0) -> Any:
    outer, inner = round(6 * width), round(4 * width)
    y = b.Conv2D(outer, 3, padding="same", use_bias=False, name="one")(x)
    y = b.ReLU()(b.BatchNormalization(name="norm_one")(y))
    z = b.Conv2D(inner, 3, padding="same", name="two")(y)
    z = b.ReLU()(b.BatchNormalization(name="norm_two")(z))
    z = b.BatchNormalization(name="norm_three")(b.Conv2D(outer, 3, padding="same", name="three")(z))
    return b.Dense(3, name="top")(b.GlobalAveragePooling2D()(b.ReLU()(b.Add()([y, z]))))


def network(kind: str, width: float = 1.0) -> zoo.Case:
    if kind == "dense":
        return zoo.TopologyCase(kind, zoo.F(6), lambda b, x: _dense(b, x, width))
    return zoo.TopologyCase(kind, zoo.F(4, 4, 2), lambda b, x: _residual(b, x, width))


KINDS = ("dense", "residual")
Networks = dict[str, list[Source]]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    """Three networks of each kind with random weights; `near`: one and two that are not far from it."""
    folder = tmp_path_factory.mktemp("networks")
    with ExitStack() as stack:

        def opened(model: Any, kind: str, label: str) -> Source:
            return stack.enter_context(open_source(zoo.save(model, folder / f"{kind}_{label}.keras"), label))

        found = {kind: [opened(network(kind).build(n), kind, label) for n, label in enumerate("abc")] for kind in KINDS}
        for kind in KINDS:
            for label, amount in (("little", 0.03), ("more", 0.3)):
                model = network(kind).build(0)
                rng = np.random.default_rng(7)
                model.set_weights(
                    [value * np.exp(amount * rng.standard_normal(value.shape)) for value in model.get_weights()]
                )
                found[f"{kind} {label}"] = [found[kind][0], opened(model, kind, label)]
        yield found


@pytest.fixture(autouse=True)
def fewer_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are made of pairs of them than is right for large networks."""
    monkeypatch.setattr(fuse_model, "ENOUGH", 300)


def examples(kind: str, rows: int = 240) -> Inputs:
    return inputs_of(network(kind).inputs(rows))


def fuse(sources: Sequence[Source], given: Inputs, folder: Path, **rules: Any) -> tuple[Fusion, Any]:
    """A fusion, and the live model that Keras makes of its file."""
    plan = make_plan(sources, Rules(**{"method": "fuse", **rules}))
    fusion = fuse_models(lay_out(sources), plan, given, folder, silent)
    assembly = assemble(fusion.merged, sources, fusion.values)
    path = folder / "out.keras"
    with create_output(assembly, path, True, dict) as output:
        merge_tensors(sources, assembly.targets, output, plan.weights)
    return fusion, zoo.load(path)


@pytest.fixture(scope="module")
def strangers(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fusion, Any]]:
    """Two networks of each kind that have nothing to do with each other, fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse_model, "ENOUGH", 300)
        return {kind: fuse(networks[kind][:2], examples(kind), tmp_path_factory.mktemp("out")) for kind in KINDS}


@functools.cache
def loaded(path: Path) -> Any:
    return zoo.load(path)


def outputs_of(source: Source, x: np.ndarray) -> np.ndarray:
    return zoo.predictions(loaded(source.path), x)[0]


def agreement_of(model: Any, sources: Sequence[Source], given: Inputs) -> float:
    """Mean agreement of the heads with the sources, on the inputs that nothing was fitted to."""
    x = given.split(UNSEEN, 0)[1].arrays[0]
    pairs = zip(sources, zoo.predictions(model, x), strict=True)
    return float(np.mean([measure_agreement("", "", outputs_of(one, x), made, False).value for one, made in pairs]))


def reported(fusion: Fusion) -> float:
    return float(np.mean([item.value for item in fusion.agreements]))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dense", "fuse"), ("residual", "fuse"), ("dense", "align"), ("residual", "zip"), ("dense", "zip")],
)
def test_a_permuted_twin_gives_the_original_function(
    kind: str, method: str, networks: Networks, tmp_path: Path
) -> None:
    source, given = networks[kind][0], examples(kind)
    fusion, model = fuse([source, twin_of(source, "twin")], given, tmp_path, method=method)
    x = network(kind).inputs(50, seed=5)
    for made in zoo.predictions(model, x):
        np.testing.assert_allclose(made, outputs_of(source, x), atol=1e-5)
    assert reported(fusion) > 1 - 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", ["little", "more"])
def test_related_sources_lose_nothing_against_the_plain_mean(
    kind: str, distance: str, networks: Networks, tmp_path: Path
) -> None:
    sources, given = networks[f"{kind} {distance}"], examples(kind)
    fusion, model = fuse(sources, given, tmp_path)
    plain = zoo.load(merge(sources, tmp_path / "mean.keras"))
    assert agreement_of(model, sources, given) == pytest.approx(reported(fusion), abs=1e-4)  # what is written
    fresh = network(kind).inputs(200, seed=9)
    for source, made, other in zip(sources, *(zoo.predictions(one, fresh) for one in (model, plain)), strict=True):
        ours, theirs = (measure_agreement("", "", outputs_of(source, fresh), y, False).value for y in (made, other))
        assert ours >= theirs - 1e-3


@pytest.mark.parametrize(("method", "better"), [("fuse", True), ("fuse", False), ("zip", True)])
def test_the_plain_mean_is_taken_where_no_head_loses_by_it(
    method: str, better: bool, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is judged by rows that the reported agreement is not measured on, and never stands for another method."""
    measured: list[Inputs] = []

    def agreements(
        context: Any, found: Any, layout: Any, plan: Any, names: Any, inputs: Inputs
    ) -> tuple[Agreement, ...]:
        measured.append(inputs)
        second = 0.9 if len(measured) == 1 or better else 0.85
        return tuple(
            Agreement(label, label, "decisions", value, 1, False)
            for label, value in zip("ab", (0.9, second), strict=True)
        )

    monkeypatch.setattr(fuse_model, "_agreements", agreements)
    given = examples("dense", 60)
    fusion, _ = fuse(networks["dense little"], given, tmp_path, method=method)
    taken = method == "fuse" and better
    assert (not fusion.values) == taken
    assert any("plain mean" in note for note in fusion.notes) == taken
    assert len(measured) == (3 if method == "fuse" else 1)
    (told,) = measured[-1].arrays
    for inputs in measured[:-1]:
        assert not (inputs.arrays[0][:, None] == told).all(axis=-1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_lose_less_than_by_the_plain_mean(
    kind: str, networks: Networks, strangers: dict[str, tuple[Fusion, Any]], tmp_path: Path
) -> None:
    fusion, model = strangers[kind]
    sources, given = networks[kind][:2], examples(kind)
    mean = agreement_of(zoo.load(merge(sources, tmp_path / "mean.keras")), sources, given)
    assert reported(fusion) > 0.9 > mean + 0.1
    assert agreement_of(model, sources, given) == pytest.approx(reported(fusion), abs=1e-4)
    assert [item.rows for item in fusion.agreements] == [24, 24]


def test_the_average_as_output_is_no_farther_from_that_of_the_sources_than_that_of_heads(
    networks: Networks, strangers: dict[str, tuple[Fusion, Any]], tmp_path: Path
) -> None:
    fusion, model = fuse(networks["dense"][:2], examples("dense"), tmp_path, outputs="mean")
    x = network("dense").inputs(400, seed=5)
    heads = np.mean(zoo.predictions(strangers["dense"][1], x), axis=0)
    sources = np.mean([outputs_of(source, x) for source in networks["dense"][:2]], axis=0)
    (made,) = zoo.predictions(model, x)
    assert np.mean((made - sources) ** 2) < 1.1 * np.mean((heads - sources) ** 2)
    (agreement,) = fusion.agreements
    assert (agreement.label, agreement.output) == ("mean", fusion.merged.heads["a"][0])
    assert agreement.output in {layer.name for layer in model.layers}
    unseen = examples("dense").split(UNSEEN, 0)[1].arrays[0]
    wanted = np.mean([outputs_of(source, unseen) for source in networks["dense"][:2]], axis=0)
    own = measure_agreement("", "", wanted, zoo.predictions(model, unseen)[0], False)
    assert agreement.value == pytest.approx(own.value, abs=1e-5)


def test_inputs_of_their_own_change_no_weight(
    networks: Networks, strangers: dict[str, tuple[Fusion, Any]], tmp_path: Path
) -> None:
    _, model = fuse(networks["dense"][:2], examples("dense"), tmp_path, inputs="separate")
    assert len(model.inputs) == 2
    one, two = network("dense").inputs(30, seed=5), network("dense").inputs(30, seed=6)
    expected = [zoo.predictions(strangers["dense"][1], x)[n] for n, x in enumerate((one, two))]
    given = {"a": one, "b": two} if isinstance(model.input, dict) else [one, two]
    for made, wanted in zip(zoo.predictions(model, given), expected, strict=True):
        np.testing.assert_allclose(made, wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["fuse", "align", "zip"])
def test_a_source_of_no_weight_is_left_out(method: str, networks: Networks, tmp_path: Path) -> None:
    """The trunk is that of the other one; its own head is fitted to it all the same."""
    sources = networks["dense"][:2]
    fusion, model = fuse(sources, examples("dense"), tmp_path, weights=[1, 0], method=method)
    x = network("dense").inputs(50, seed=5)
    np.testing.assert_allclose(zoo.predictions(model, x)[0], outputs_of(sources[0], x), atol=1e-4)
    assert fusion.agreements[1].value > 0.3


def test_the_seed_is_all_that_chance_follows(
    networks: Networks, strangers: dict[str, tuple[Fusion, Any]], tmp_path: Path
) -> None:
    again, _ = fuse(networks["dense"][:2], examples("dense"), tmp_path)
    for place, value in strangers["dense"][0].values.items():
        np.testing.assert_array_equal(again.values[place], value)


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_drawn_by_address(
    kind: str, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two uses share an address."""
    addresses: list[str] = []
    drawn = Context.random

    def recording(context: Context, address: str) -> np.random.Generator:
        addresses.append(address)
        return drawn(context, address)

    monkeypatch.setattr(Context, "random", recording)
    fuse(networks[kind][:2], examples(kind, 60), tmp_path, width=1.5)
    assert len(set(addresses)) == len(addresses)
    assert {address.partition("/")[0] for address in addresses} >= {"site", "units", "width", "signs"}


def test_each_head_is_judged_by_its_own_rows(networks: Networks, tmp_path: Path) -> None:
    """Of the other source's rows, all the same, nothing is told but that it is there."""
    (x,) = examples("dense", 100).arrays
    x[:60] = 0
    given = Inputs((x,), np.repeat([0, 1], [60, 40]))
    fusion, model = fuse(networks["dense"][:2], given, tmp_path)
    assert [item.rows for item in fusion.agreements] == [12, 8]
    unseen = given.split(share_unseen(given.owners), 0)[1]
    own = unseen.arrays[0][unseen.owners == 1]
    wanted = measure_agreement("", "", outputs_of(networks["dense"][1], own), zoo.predictions(model, own)[1], False)
    assert fusion.agreements[1].value == pytest.approx(wanted.value, abs=1e-4)


@pytest.mark.parametrize(("rows", "unseen"), [(8, 3), (14, 5), (24, 8), (60, 8), (240, 24)])
def test_the_agreement_is_never_that_of_one_row(rows: int, unseen: int) -> None:
    given = inputs_of(np.zeros((rows, 2)))
    assert given.split(share_unseen(given.owners), 0)[1].rows == unseen


@pytest.mark.parametrize(
    ("parameters", "memory"), [(0, 32 << 20), (240_000, 32 << 20), (4_000_000, 512_000_000), (25_000_000, 1 << 30)]
)
def test_more_activations_are_kept_of_large_networks(parameters: int, memory: int) -> None:
    assert memory_for(SimpleNamespace(num_parameters=parameters)) == memory  # type: ignore[arg-type]


def test_the_seed_of_a_method_wins(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stop(_: Inputs, __: int, seed: int, *___: Any) -> Any:
        seen.append(seed)
        raise InterruptedError

    monkeypatch.setattr(fuse_model, "in_batches", stop)
    for options in ({"by": "activations"}, {"by": "activations", "seed": 5}):
        with pytest.raises(InterruptedError):
            fuse(networks["dense"][:2], examples("dense", 20), tmp_path, method="align", options=options, seed=3)
    assert seen == [3, 5]


# ---- repair


def repaired(
    source: Source, near: Source, given: Inputs, layers: Sequence[str], folder: Path
) -> Iterator[tuple[np.ndarray, ...]]:
    """Per layer, mean and spread of what it gives before its activation: of two networks, and of what is made of them
    where the second has its units in another order."""
    import keras

    options = {"by": "activations", "repair": True, "refit": False}
    _, model = fuse([source, twin_of(near, "b")], given, folder, method="align", options=options)
    (fitted,) = given.split(UNSEEN, 0)[0].arrays

    def moments(network: Any, name: str) -> np.ndarray:
        layer = network.get_layer(name)
        values = np.asarray(keras.Model(network.inputs, layer.output if "norm" in name else layer.input)([fitted]))
        if "norm" not in name:
            kernel, bias = layer.get_weights()
            values = values @ kernel + bias
        rows = values.reshape(-1, values.shape[-1])
        return np.stack([rows.mean(axis=0), rows.std(axis=0)])

    for name in layers:
        yield tuple(moments(network, name) for network in (loaded(source.path), loaded(near.path), model))


@pytest.mark.parametrize(
    ("kind", "layers"), [("dense", ["one", "two"]), ("residual", ["norm_one", "norm_two", "norm_three"])]
)
def test_repaired_units_have_the_mean_and_the_spread_of_the_sources(
    kind: str, layers: list[str], networks: Networks, tmp_path: Path
) -> None:
    for one, two, made in repaired(*networks[f"{kind} more"], examples(kind), layers, tmp_path):
        assert np.abs(one - two).max() > 0.05
        np.testing.assert_allclose(made, (one + two) / 2, atol=2e-4)


def test_repaired_normalisations_without_scale_or_offset(tmp_path: Path) -> None:
    """What has no weight of its own is borne by the statistics."""

    def recipe(b: Any, x: Any) -> Any:
        options: list[dict[str, bool]] = [{"scale": False}, {"center": False}, {"scale": False, "center": False}]
        for number, given in enumerate(options):
            x = b.Dense(6, name=f"dense{number}")(x)
            x = b.Activation("tanh")(b.BatchNormalization(name=f"norm{number}", **given)(x))
        return b.Dense(3)(x)

    case = zoo.TopologyCase("normalised", zoo.F(6), recipe)
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        sources = []
        for label in "ab":
            model = case.build(0)
            model.set_weights([value * np.exp(0.3 * rng.standard_normal(value.shape)) for value in model.get_weights()])
            path = zoo.save(model, tmp_path / f"{label}.keras")
            sources.append(stack.enter_context(open_source(path, label)))
        one, two = sources
        layers = ["norm0", "norm1", "norm2"]
        for first, second, made in repaired(one, two, inputs_of(case.inputs(200)), layers, tmp_path):
            assert np.abs(first - second).max() > 0.02
            np.testing.assert_allclose(made, (first + second) / 2, atol=2e-4)


# ---- wider


def trunk_of(model: Any) -> int:
    """Parameters of all layers but heads."""
    return sum(layer.count_params() for layer in model.layers if layer.weights and layer.output.shape[-1] != 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_trunk_has_as_much_as_an_even_one_and_agrees_better(
    kind: str, networks: Networks, strangers: dict[str, tuple[Fusion, Any]], tmp_path: Path
) -> None:
    sources, given = networks[kind][:2], examples(kind)
    fusion, model = fuse(sources, given, tmp_path, width=1.5)
    even = trunk_of(network(kind, 1.5).build(0))
    assert 0.75 * even < trunk_of(model) <= even
    assert trunk_of(model) > trunk_of(strangers[kind][1])
    assert reported(fusion) > reported(strangers[kind][0])
    assert agreement_of(model, sources, given) == pytest.approx(reported(fusion), abs=1e-4)
    assert not fusion.notes


def test_a_narrower_trunk_is_so_throughout(networks: Networks, tmp_path: Path) -> None:
    _, model = fuse(networks["dense"][:2], examples("dense"), tmp_path, width=0.5)
    assert [model.get_layer(name).units for name in ("one", "two")] == [5, 4]


def test_units_that_are_counted_on_keep_their_number(tmp_path: Path) -> None:
    def recipe(b: Any, x: Any) -> Any:
        y = b.GroupNormalization(groups=3)(b.Dense(12, activation="relu", name="counted")(x))
        return b.Dense(3, name="top")(b.Dense(6, activation="relu", name="free")(y))

    case = zoo.TopologyCase("counted", zoo.F(6), recipe)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(open_source(zoo.save(case.build(n), tmp_path / f"{label}.keras"), label))
            for n, label in enumerate("ab")
        ]
        fusion, model = fuse(sources, inputs_of(case.inputs(100)), tmp_path, width=1.5)
        assert model.get_layer("counted").units == 12
        assert model.get_layer("free").units == 9
        assert len([note for note in fusion.notes if "keep their number" in note]) == 1
        assert agreement_of(model, sources, inputs_of(case.inputs(100))) == pytest.approx(reported(fusion), abs=1e-4)


@pytest.mark.parametrize("first", [1, 9, 99])
def test_means_of_several_outputs_of_other_shapes(first: int, tmp_path: Path) -> None:
    """Each output of a source goes into the mean of its own place, whatever it is called and is sorted by."""
    import keras

    import kmerge

    paths = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        x = keras.Input((6,))
        hidden = keras.layers.Dense(12, activation="relu", name="hidden")(x)
        names = [f"dense_{first + number + seed}" for number in range(2)]
        outputs = [
            keras.layers.Dense(3, activation="softmax", name=names[0])(hidden),
            keras.layers.Dense(2, name=names[1])(hidden),
        ]
        paths.append(tmp_path / f"{seed}.keras")
        keras.Model(x, outputs).save(paths[-1])
    rows = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    kmerge.combine(paths, tmp_path / "o.keras", method="fuse", data=rows, outputs="mean")
    made = zoo.predictions(keras.saving.load_model(tmp_path / "o.keras", compile=False), rows)
    sources = [zoo.predictions(keras.saving.load_model(path, compile=False), rows) for path in paths]
    for number, width in enumerate((3, 2)):
        wanted = np.mean([source[number] for source in sources], axis=0)
        assert made[number].shape == wanted.shape == (300, width)
        assert np.corrcoef(made[number].ravel(), wanted.ravel())[0, 1] > 0.9


# ---- sources of one task


def noisy_sources(case: zoo.Case, folder: Path, stack: ExitStack) -> list[Source]:
    """Three copies of one network, each with errors of its own."""
    found = []
    for seed, label in enumerate("abc"):
        model, rng = case.build(0), np.random.default_rng(seed)
        model.set_weights([value * np.exp(0.25 * rng.standard_normal(value.shape)) for value in model.get_weights()])
        found.append(stack.enter_context(open_source(zoo.save(model, folder / f"{label}.keras"), label)))
    return found


@pytest.mark.parametrize("outputs", [1, 2])
def test_heads_of_one_task_lean_on_each_other(outputs: int, tmp_path: Path) -> None:
    """Three copies of a network, each with errors of its own: what they were before lies nearer to the heads fused
    than to the copies, and the heads still agree with these."""

    def recipe(b: Any, x: Any) -> Any:
        y = b.Dense(12, activation="relu", name="one")(x)
        heads = [b.Dense(2, name=f"top{number}")(y) for number in range(outputs)]
        return heads if outputs > 1 else heads[0]

    case = zoo.TopologyCase("heads", zoo.F(6), recipe)
    right = case.build(0)
    with ExitStack() as stack:
        sources = noisy_sources(case, tmp_path, stack)
        fusion, model = fuse(sources, inputs_of(case.inputs(300)), tmp_path)
        assert any("one task" in note for note in fusion.notes)
        x = np.random.default_rng(99).standard_normal((500, 6)).astype("float32")
        truth = np.hstack(zoo.predictions(right, x))
        made = np.split(np.hstack(zoo.predictions(model, x)), 3, axis=1)
        given = [np.hstack(zoo.predictions(loaded(source.path), x)) for source in sources]
        errors = [float(np.mean((values - truth) ** 2)) for values in given]
        assert np.mean([float(np.mean((values - truth) ** 2)) for values in made]) < 0.95 * np.mean(errors)
        assert min(item.value for item in fusion.agreements) > 0.95
        alone, _ = fuse(sources, inputs_of(case.inputs(300)), tmp_path, options={"lean": False})
        assert not any("one task" in note for note in alone.notes)
        assert reported(alone) > reported(fusion)


def test_heads_of_other_tasks_do_not_lean_on_each_other(strangers: dict[str, tuple[Fusion, Any]]) -> None:
    for fusion, _ in strangers.values():
        assert not any("one task" in note for note in fusion.notes)


HEADS: dict[str, Callable[[Any, Any], Any]] = {
    "softmax": lambda b, y: b.Dense(3, activation="softmax")(b.Flatten()(y)),
    "softmax of its own": lambda b, y: b.Softmax()(b.Dense(3)(b.Flatten()(y))),
    "sigmoid": lambda b, y: b.Dense(2, activation="sigmoid")(b.Dense(4, activation="relu")(b.Flatten()(y))),
    "softmax of each": lambda b, y: b.TimeDistributed(b.Dense(3, activation="softmax"))(y),
    "rows": lambda b, y: b.Conv1D(2, 2)(y),
    "groups": lambda b, y: b.Conv1D(4, 2, groups=2)(y),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("lean", [True, False])
def test_heads_of_many_kinds_lean(name: str, lean: bool, tmp_path: Path) -> None:
    case = zoo.TopologyCase(
        name, zoo.F(5, 3), lambda b, x: HEADS[name](b, b.Dense(6, activation="relu", name="one")(x))
    )
    with ExitStack() as stack:
        sources = noisy_sources(case, tmp_path, stack)
        rules: dict[str, Any] = {"trunk": "one"} if name == "sigmoid" else {}
        fusion, _ = fuse(sources, inputs_of(case.inputs(200)), tmp_path, options={"lean": lean}, **rules)
    assert any("one task" in note for note in fusion.notes) is lean
    assert min(item.value for item in fusion.agreements) > 0.8


def test_heads_of_other_shapes_or_numbers_do_not_lean(tmp_path: Path) -> None:
    def model(kind: str, seed: int) -> Any:
        def recipe(b: Any, x: Any) -> Any:
            y = b.Dense(6, activation="relu", name="one")(x)
            heads = {
                "stride 1": lambda: b.Conv1D(2, 2)(y),
                "stride 2": lambda: b.Conv1D(2, 2, strides=2)(y),
                "flat": lambda: b.Dense(2)(b.Flatten()(y)),
                "three": lambda: [b.Dense(2)(b.Flatten()(y)) for _ in range(3)],
            }
            return heads[kind]()

        return zoo.TopologyCase(kind, zoo.F(6, 3), recipe).build(seed)

    x = np.random.default_rng(0).standard_normal((200, 6, 3)).astype("float32")
    for kinds in (("stride 1", "stride 2"), ("stride 2", "stride 1"), ("stride 1", "flat"), ("flat", "three")):
        with ExitStack() as stack:
            sources = [
                stack.enter_context(open_source(zoo.save(model(kind, 0), tmp_path / f"{label}.keras"), label))
                for kind, label in zip(kinds, "ab", strict=True)
            ]
            fusion, _ = fuse(sources, inputs_of(x), tmp_path, trunk="one")
        assert not any("one task" in note for note in fusion.notes), kinds
        assert min(item.value for item in fusion.agreements) > 0.99, kinds


@pytest.mark.parametrize(("outputs", "rows"), [("mean", 200), ("heads", 60)])
def test_heads_do_not_lean_for_their_mean_or_on_few_inputs(outputs: str, rows: int, tmp_path: Path) -> None:
    case = network("dense")
    with ExitStack() as stack:
        sources = noisy_sources(case, tmp_path, stack)
        fusion, _ = fuse(sources, inputs_of(case.inputs(rows)), tmp_path, outputs=outputs)
    assert not any("one task" in note for note in fusion.notes)


def test_blends_are_judged_whatever_the_size_of_a_batch(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[int, list[int]] = {}
    samples_of = fuse_model.samples_of

    def spied(context: Any, tasks: Any, number: int, moments: Any, *given: Any) -> Any:
        rows = found.setdefault(len(context.source_tape.batches[0][0]), [])
        rows.append(sum(len(part) for parts in moments.judges.values() for part in parts))
        return samples_of(context, tasks, number, moments, *given)

    monkeypatch.setattr(fuse_model, "samples_of", spied)
    monkeypatch.setattr(fuse_model, "ENOUGH_FOR_DENSE", 0)
    for size in (1, 5, 48):
        monkeypatch.setattr("kmerge.fuse.batches.batch_size", lambda *_, size=size: size)
        fuse(networks["dense"][:2], examples("dense", 120), tmp_path)
    assert found == {size: [21, 21] for size in (1, 5, 48)}  # every fifth of 108


def test_rows_that_are_made_of_inputs_are_held_back_with_them(tmp_path: Path) -> None:
    """Behind a reshape that folds positions into rows, each input has three of these."""
    import keras
    from keras import layers

    def folded(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        x = keras.Input((3, 4))
        y = layers.Dense(5, activation="relu", name="one")(keras.ops.reshape(x, (-1, 4)))
        return keras.Model(x, layers.Dense(2, name="top")(layers.Flatten()(keras.ops.reshape(y, (-1, 3, 5)))))

    with ExitStack() as stack:
        sources = [
            stack.enter_context(open_source(zoo.save(folded(seed), tmp_path / f"{seed}.keras"), label))
            for seed, label in enumerate("ab")
        ]
        x = np.random.default_rng(0).standard_normal((150, 3, 4)).astype("float32")
        fusion, _ = fuse(sources, inputs_of(x), tmp_path)
    assert min(item.value for item in fusion.agreements) > 0.5


def test_units_under_a_maximum_are_no_mixtures(tmp_path: Path) -> None:
    """A mixture of linear units is as good as they are where linear layers read them, not under a maximum."""

    def blended_behind(name: str, layer: Callable[[Any], Any]) -> list[bool]:
        case = zoo.TopologyCase(
            name, zoo.F(8, 3), lambda b, x: b.Dense(2)(b.Flatten()(layer(b)(b.Conv1D(5, 3, name="one")(x))))
        )
        found: list[bool] = []
        samples_of = fuse_model.samples_of

        def spied(context: Any, tasks: Any, number: int, *given: Any) -> Any:
            samples = samples_of(context, tasks, number, *given)
            uses = context.frame.spaces[number].axes
            if any(use.role == "output" and use.layer == 1 for use in uses):
                found.append(samples is not None)
            return samples

        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuse_model, "samples_of", spied)
            sources = [
                stack.enter_context(open_source(zoo.save(case.build(seed), tmp_path / f"{name}{label}.keras"), label))
                for seed, label in enumerate("ab")
            ]
            fuse(sources, inputs_of(case.inputs(120)), tmp_path)
        return found

    assert blended_behind("average", lambda b: b.AveragePooling1D(2)) == [True]
    assert blended_behind("normal", lambda b: b.LayerNormalization()) == [True]
    assert blended_behind("reader", lambda b: b.Bidirectional(b.LSTM(2))) == [True]
    assert blended_behind("max", lambda b: b.MaxPooling1D(2)) == [False]
    assert blended_behind("later", lambda b: lambda y: b.GlobalMaxPooling1D()(b.Dropout(0.1)(y))) == [False]
