"""Agreement of a merged model with its sources, in numbers that can be checked by hand."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import kmerge.agreement
from kmerge.agreement import Agreement, ends_in_sigmoid, lowest, measure_agreement, percent, warnings
from kmerge.graph import Call, Graph, Layer, Ref


def measured(source: object, merged: object, binary: bool = False) -> tuple[str, float]:
    found = measure_agreement("a", "y", np.array(source), np.array(merged), False, binary)
    return found.measure, found.value


def test_examples() -> None:
    assert doctest.testmod(kmerge.agreement).failed == 0


def test_distributions_are_held_against_each_other_by_their_decisions() -> None:
    source = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]
    merged = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.9, 0.0, 0.1]]
    assert measured(source, merged) == ("decisions", 0.75)


def test_every_position_of_a_sequence_is_a_decision() -> None:
    source = np.eye(2)[[[0, 1], [1, 1]]]
    merged = np.eye(2)[[[0, 0], [1, 1]]]
    assert measured(source, merged) == ("decisions", 0.75)


def test_probabilities_decide_at_one_half_where_they_come_out_of_a_sigmoid() -> None:
    source, merged = [[0.1], [0.5], [0.9], [0.4]], [[0.4], [0.6], [0.2], [-3.0]]
    assert measured(source, merged, binary=True) == ("decisions", 0.75)
    assert measured(source, merged)[0] == "correlation"
    assert measured([[0.1], [1.5]], [[0.1], [1.5]], binary=True)[0] == "correlation"


def test_anything_else_is_correlated_entry_by_entry() -> None:
    source = np.array([[1.0, 100.0], [2.0, 101.0], [3.0, 99.0]])
    assert measured(source, 3 * source - 7) == ("correlation", pytest.approx(1))
    assert measured(source, -source) == ("correlation", pytest.approx(-1))
    # (-1, 0, 1) and (0, 1, -1) over the rows: cosine of all deviations with (-1, 0, 1) and (0, -1, 1)
    assert measured([[1.0], [2.0], [3.0]], [[0.0], [1.0], [-1.0]])[1] == pytest.approx(-0.5)


@pytest.mark.parametrize("merged", [[[2.0]] * 3, [[2.0000001]] * 3])
def test_a_source_that_never_changes_agrees_where_the_values_are_equal(merged: list[list[float]]) -> None:
    assert measured([[2.0]] * 3, merged) == ("correlation", 1.0)


@pytest.mark.parametrize(
    ("source", "merged"),
    [
        ([[2.0]] * 3, [[2.1]] * 3),
        ([[2.0]] * 3, [[1.0], [2.0], [3.0]]),
        ([[1.0], [2.0], [3.0]], [[2.0]] * 3),
        ([[1.0], [2.0]], [[np.nan], [2.0]]),
        ([[1.0], [2.0]], [[np.inf], [2.0]]),
        ([[0.3, 0.7]], [[np.nan, 0.7]]),
    ],
    ids=str,
)
def test_what_agrees_in_nothing(source: object, merged: object) -> None:
    assert measured(source, merged)[1] == 0.0


def test_sizes_do_not_overflow() -> None:
    source = np.array([[1e200], [2e200], [3e200]])
    assert measured(source, source) == ("correlation", pytest.approx(1))


def graph_of(class_name: str, **config: object) -> Graph:
    layers = (Layer("x", "InputLayer", {}), Layer("y", class_name, config))
    return Graph("net", layers, (Call(0, None), Call(1, [Ref(0)])), Ref(0), Ref(1))


@pytest.mark.parametrize(
    ("class_name", "config", "expected"),
    [
        ("Dense", {"activation": "sigmoid"}, True),
        ("Activation", {"activation": {"class_name": "function", "config": "sigmoid"}}, True),
        ("Dense", {"activation": "softmax"}, False),
        ("Dense", {}, False),
    ],
)
def test_what_ends_in_a_sigmoid(class_name: str, config: dict[str, object], expected: bool) -> None:
    assert ends_in_sigmoid(graph_of(class_name, **config), Ref(1)) is expected


def agreement(value: float, synthetic: bool = False, label: str = "a", measure: str = "decisions") -> Agreement:
    return Agreement(label, label, measure, value, 100, synthetic)  # type: ignore[arg-type]


def test_the_lowest_head_counts() -> None:
    assert lowest([agreement(0.9), agreement(0.7), agreement(1.0)]) == 0.7
    assert lowest([]) == 1.0


def test_no_warning_where_all_is_well() -> None:
    assert warnings([agreement(0.95), agreement(0.90)]) == []
    assert warnings([]) == []


def test_a_warning_says_what_is_lost_and_what_helps() -> None:
    (said,) = warnings([agreement(0.95), agreement(0.801, label="b"), agreement(0.5, label="c", measure="correlation")])
    assert "'b' decides as its source does on 80.1 % of the inputs" in said
    assert "'c' gives correlates to 50.0 %" in said
    assert "'a'" not in said
    for flag in ("--data", "--samples", "--trunk LAYER", "--keep 0.95", "--width 1.5"):
        assert flag in said


def test_a_warning_on_made_up_inputs_says_so() -> None:
    said, doubt = warnings([agreement(0.5, synthetic=True)])
    assert "real inputs in place of made-up ones (--data FILE" in said
    assert "--samples" not in said
    assert "made-up inputs" in doubt


def test_a_warning_after_a_merge_of_weights_names_the_method_that_helps() -> None:
    (said,) = warnings([agreement(0.5)], fused=False)
    assert "--method fuse" in said
    assert "--width" not in said


def test_not_a_number_is_warned_of() -> None:
    assert warnings([agreement(float("nan"))])


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100.0 %"), (0.99999, "99.9 %"), (0.9731, "97.3 %"), (0, "0.0 %"), (-0.25, "-25.0 %")]
)
def test_percent_never_rounds_up_to_all(value: float, text: str) -> None:
    assert percent(value) == text


def test_few_inputs_are_told_of() -> None:
    def item(value: float, rows: int) -> Agreement:
        return Agreement("a", "a", "decisions", value, rows, False)

    assert warnings([item(1.0, 8)]) == []
    assert warnings([item(1.0, 9), item(1.0, 3)]) == [
        "agreement was measured on 3 inputs, too few to tell: give more (--data, --samples)"
    ]
    assert len(warnings([item(0.2, 3)])) == 2
