"""What can be wrong with rules by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from kmerge.errors import KmergeError
from kmerge.rules import Rules, check_rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"width": 0.2}, r"--width is 0\.2: expected a number from 0\.25 to 8"),
        ({"width": 8.5}, "--width is 8.5"),
        ({"width": float("nan")}, "--width is nan"),
        ({"width": "wide"}, "--width is 'wide'"),
        ({"width": True}, "--width is True"),
        ({"width": 2, "method": "zip"}, r"--width 2: the method 'zip' keeps the width.*--method fuse"),
        ({"keep": 0}, r"--keep is 0: expected a share above 0 and at most 1"),
        ({"keep": 1.01}, "--keep is 1.01"),
        ({"keep": "0.9"}, "--keep is '0.9'"),
        ({"keep": 0.9, "method": "mean"}, "'mean' does not run the models.*--method fuse.*--trunk LAYER"),
        ({"keep": 0.9, "method": "align"}, "'align' does not run the models"),
        ({"keep": 0.9, "trunk": "none"}, "leave one of them out"),
        ({"samples": 7}, "--samples is 7: expected a whole number of at least 8"),
        ({"samples": 9.0}, "--samples is 9.0"),
        ({"seed": -1}, "--seed is -1: expected a whole number of at least 0"),
        ({"seed": None}, "--seed is None"),
        ({"options": {"repair": "no"}, "method": "zip"}, "zip: repair is 'no': expected true or false"),
        (
            {"options": {"by": "luck"}, "method": "align"},
            "align: by is 'luck': expected auto or weights or activations",
        ),
        ({"options": {"seed": 1.5}, "method": "align"}, "align: seed is 1.5"),
        ({"options": {"epsilon": -1}, "method": "transport"}, "transport: epsilon is -1: expected a number above 0"),
        ({"options": {"epsilon": True}, "method": "transport"}, "transport: epsilon is True"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(KmergeError, match=message):
        check_rules(Rules(**{"method": "fuse", **rules}), ["a", "b"])


@pytest.mark.parametrize(
    "rules",
    [
        {"width": 0.25},
        {"width": 8},
        {"keep": 1},
        {"keep": 0.9, "method": "align", "data": [1]},
        {"keep": 0.9, "method": "align", "options": {"by": "activations"}},
        {"samples": 8, "seed": 2**40},
        {"options": {"epsilon": 1, "repair": False}, "method": "transport"},
        {"options": {"seed": 3}, "method": "align"},
    ],
    ids=str,
)
def test_what_is_right_passes(rules: dict[str, Any]) -> None:
    check_rules(Rules(**{"method": "fuse", **rules}), ["a", "b"])


def test_data_are_no_part_of_what_a_plan_decides() -> None:
    assert Rules(data=[1]) == Rules(data=[2])
