"""Methods in numbers that can be checked by hand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest

import kmerge.methods
from kmerge.errors import MethodError
from kmerge.methods import get_method, mean, median, method, normalise_weights, pick, pooled_mean, pooled_variance
from kmerge.methods.registry import METHODS


def column(*values: float) -> np.ndarray:
    """A stack of a weight with one entry."""
    return np.array(values, dtype=np.float64)[:, None]


def equal(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


# ---- pick


def test_pick_takes_the_first_source_by_default() -> None:
    assert pick(column(4, 5, 6), weights=np.array([0, 0, 1.0])).tolist() == [4]


def test_pick_takes_the_source_of_a_label() -> None:
    stack = column(4, 5, 6)
    assert pick(stack, weights=equal(3), label="c", labels=["a", "b", "c"]).tolist() == [6]


def test_pick_of_an_unknown_label() -> None:
    with pytest.raises(MethodError, match=r"^pick: no source is called 'd': choose one of a, b\.$"):
        pick(column(4, 5), weights=equal(2), label="d", labels=["a", "b"])


# ---- mean


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ((1, 3), (0.5, 0.5), 2),
        ((1, 5), (0.75, 0.25), 2),
        ((1, 5, 9), (0.5, 0.25, 0.25), 4),
        ((1, 5, 9), (0, 0.5, 0.5), 7),
        ((8,), (1,), 8),
    ],
)
def test_mean(values: tuple[float, ...], weights: tuple[float, ...], expected: float) -> None:
    assert mean(column(*values), weights=np.array(weights)).tolist() == [expected]


def test_mean_in_single_precision_is_near_the_mean_in_double_precision() -> None:
    stack = np.random.default_rng(0).standard_normal((7, 1000))
    weights = normalise_weights(range(1, 8), 7)
    expected = np.tensordot(weights, stack, axes=1)
    np.testing.assert_allclose(mean(stack.astype("f4"), weights=weights), expected, atol=1e-6)


def test_mean_of_complex_numbers() -> None:
    assert mean(np.array([[1 + 2j], [3 - 2j]], "c8"), weights=equal(2)).tolist() == [2 + 0j]


# ---- median


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ((9, 1, 2), (1 / 3, 1 / 3, 1 / 3), 2),
        ((4, 1, 9, 2), (0.25, 0.25, 0.25, 0.25), 3),  # even: between 2 and 4
        ((1, 2, 9), (0.6, 0.2, 0.2), 1),  # the first alone holds more than half
        ((1, 2, 9), (0.2, 0.2, 0.6), 9),
        ((1, 2, 9), (0.3, 0.4, 0.3), 2),
        ((1, 2, 9), (0.5, 0.25, 0.25), 1.5),  # an even split between 1 and 2
        ((9, 2, 1), (0.25, 0.25, 0.5), 1.5),
        ((1, 2, 9), (0, 0.5, 0.5), 5.5),  # the first is left out
        ((5, 5, 1), (0.3, 0.3, 0.4), 5),
        ((8,), (1,), 8),
    ],
)
def test_median(values: tuple[float, ...], weights: tuple[float, ...], expected: float) -> None:
    assert median(column(*values), weights=np.array(weights)).tolist() == [expected]


def test_median_takes_each_entry_by_itself() -> None:
    stack = np.array([[1.0, 30.0], [2.0, 20.0], [3.0, 10.0]])
    assert median(stack, weights=equal(3)).tolist() == [2, 20]
    assert median(stack, weights=np.array([0.6, 0.2, 0.2])).tolist() == [1, 30]


def test_median_of_equal_weights_is_numpys() -> None:
    for count in (2, 3, 6, 7):
        stack = np.random.default_rng(count).standard_normal((count, 50))
        np.testing.assert_allclose(median(stack, weights=equal(count)), np.median(stack, axis=0), atol=1e-15)


def test_median_with_weights_is_that_of_repeated_sources() -> None:
    stack = np.random.default_rng(1).standard_normal((4, 50))
    for repeats in ((1, 2, 3, 1), (2, 1, 1, 4), (5, 1, 1, 1), (1, 1, 2, 2)):
        repeated = np.repeat(stack, repeats, axis=0)
        merged = median(stack, weights=np.array(repeats) / sum(repeats))
        np.testing.assert_allclose(merged, np.median(repeated, axis=0), atol=1e-15)


# ---- statistics


def test_pooled_statistics_are_those_of_the_pooled_population() -> None:
    rng = np.random.default_rng(0)
    sizes = (100, 250, 650)
    samples = [rng.normal(5 * index, 1 + index, (size, 4)) for index, size in enumerate(sizes)]
    means = np.stack([sample.mean(axis=0) for sample in samples])
    variances = np.stack([sample.var(axis=0) for sample in samples])
    weights = normalise_weights(sizes, 3)
    population = np.concatenate(samples)
    np.testing.assert_allclose(pooled_mean(means, weights=weights), population.mean(axis=0), rtol=1e-12)
    pooled = pooled_variance(means, variances, weights=weights)
    np.testing.assert_allclose(pooled, population.var(axis=0), rtol=1e-12)
    assert np.all(pooled > 1.5 * np.tensordot(weights, variances, axes=1)), "the spread of the means counts"


def test_pooled_statistics_by_hand() -> None:
    means, variances, weights = column(0, 4), column(1, 5), np.array([0.75, 0.25])
    assert pooled_mean(means, weights=weights).tolist() == [1]
    assert pooled_variance(means, variances, weights=weights).tolist() == [2 + 0.75 * 1 + 0.25 * 9]


def test_pooled_statistics_of_equal_sources_are_theirs() -> None:
    means = np.stack([np.float32([0.1, -3.3, 7e5])] * 3)
    variances = np.stack([np.float32([0.1, 0.7, 1e-8])] * 3)
    weights = np.array([0.1, 0.2, 0.7])
    assert pooled_mean(means, weights=weights).astype("f4").tobytes() == means[0].tobytes()
    assert pooled_variance(means, variances, weights=weights).astype("f4").tobytes() == variances[0].tobytes()


def test_pooled_variance_keeps_its_digits_far_from_zero() -> None:
    means = column(1e8, 1e8 + 1)
    assert pooled_variance(means, column(0, 0), weights=equal(2)).tolist() == [0.25]


# ---- registry


def test_equal_weights_by_default() -> None:
    assert normalise_weights(None, 4).tolist() == [0.25] * 4


def test_weights_sum_to_one() -> None:
    assert normalise_weights([2, 1, 1], 3).tolist() == [0.5, 0.25, 0.25]
    assert normalise_weights((0, 5), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([1], 2, "There are 1 weights for 2 sources: give one number per source."),
        ([1, 2, 3], 2, "There are 3 weights for 2 sources: give one number per source."),
        ([1, -1], 2, "The weights are 1, -1: give numbers of at least 0, not all 0."),
        ([0, 0], 2, "The weights are 0, 0: give numbers of at least 0, not all 0."),
        ([1, float("nan")], 2, "The weights are 1, nan: give numbers of at least 0, not all 0."),
        ([1, float("inf")], 2, "The weights are 1, inf: give numbers of at least 0, not all 0."),
    ],
)
def test_weights_that_make_no_sense(weights: Any, count: int, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        normalise_weights(weights, count)
    assert str(caught.value) == message


def test_weights_at_the_ends_of_the_number_range() -> None:
    for weights in ([1e308, 1e308], [5e-324, 5e-324]):
        assert normalise_weights(weights, 2).tolist() == [0.5, 0.5]


def test_unknown_method() -> None:
    with pytest.raises(MethodError, match=r"There is no method 'average': choose one of .*mean.*, or auto"):
        get_method("average")


def test_a_method_declares_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmerge.methods.registry.METHODS", {})

    @method("half", paper="none", needs=frozenset({"base"}))
    def half(stack: Any, *, weights: Any, base: Any, labels: Any = (), strength: float = 0.5) -> Any:
        """Go half of the way.

        More words.
        """
        return base + strength * (stack[0] - base)

    made = get_method("half")
    assert "half" not in METHODS
    assert made.function is half
    assert (made.summary, made.options) == ("Go half of the way.", {"strength": 0.5})


@pytest.mark.parametrize("name", ["", *(item.name for item in pkgutil.iter_modules(kmerge.methods.__path__))])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"kmerge.methods.{name}".rstrip("."))
    assert doctest.testmod(module).failed == 0


def test_every_method_shows_an_example() -> None:
    found = [test for item in METHODS.values() for test in doctest.DocTestFinder().find(item.function) if test.examples]
    assert len(found) == len(METHODS)
