"""What the user asked for, before it is held against any source."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.errors import PlanError
from kmerge.methods import METHODS, Method, check_options, get_method, picked
from kmerge.plan import Role

INPUTS = ("shared", "separate")
OUTPUTS = ("heads", "list", "mean")
NARROWEST, WIDEST = 0.25, 8.0
FEWEST_SAMPLES = 8
"""Fewer inputs are too few to calibrate on and to hold some back."""


@dataclass(frozen=True)
class Rules:
    """What the user asked for. See `kmerge combine --help`."""

    labels: Sequence[str] | None = None
    trunk: str = "auto"
    roles: Sequence[tuple[str, Role]] = ()
    """Patterns of layer names and the role they give, in order: the later one wins."""
    inputs: str = "shared"
    outputs: str = "heads"
    method: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    freeze: bool = False
    width: float = 1.0
    keep: float | None = None
    seed: int = 0
    samples: int | None = None
    data: Any = field(default=None, compare=False)
    """Calibration inputs, in whatever form they were given."""


def check_rules(rules: Rules, labels: Sequence[str]) -> None:
    """What can be wrong with the rules alone.

    Raises:
        PlanError, MethodError.
    """
    if len(labels) < 2:
        raise PlanError(f"A merge needs at least two sources: {len(labels)} given.")
    for label in labels:
        check_label(label)
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise PlanError(f"Two sources are called '{twice[0]}': give every source a label of its own with --labels.")
    for name, value, allowed in (("inputs", rules.inputs, INPUTS), ("outputs", rules.outputs, OUTPUTS)):
        if value not in allowed:
            raise PlanError(f"{name} is '{value}': expected one of {', '.join(allowed)}.")
    for pattern, role in rules.roles:
        if not isinstance(pattern, str):
            raise PlanError(f"{pattern!r} is given a role: expected the name of a layer, or a pattern of names.")
        if role not in ("shared", "private"):
            raise PlanError(f"'{pattern}' is given the role '{role}': expected shared or private.")
    method = get_method(rules.method)
    unknown = sorted(set(rules.options) - set(method.options))
    if unknown:
        known = ", ".join(method.options) or "none"
        raise PlanError(f"The method '{method.name}' has no option '{unknown[0]}': it has {known}.")
    check_options(method, rules.options)
    if method.name == "pick":
        picked(rules.options.get("label"), list(labels))
    _check_numbers(rules)
    _check_calibration(rules, method)


def _check_numbers(rules: Rules) -> None:
    """Numbers that are what they should be.

    Raises:
        PlanError: naming the first that is not.
    """
    if not _is_number(rules.width) or not NARROWEST <= rules.width <= WIDEST:
        raise PlanError(
            f"--width is {rules.width!r}: expected a number from {NARROWEST:g} to {WIDEST:g}; 1 is the width of a "
            "source, 1.5 half as wide again."
        )
    if rules.keep is not None and (not _is_number(rules.keep) or not 0 < rules.keep <= 1):
        raise PlanError(f"--keep is {rules.keep!r}: expected a share above 0 and at most 1, such as 0.99.")
    if rules.samples is not None and (not _is_whole(rules.samples) or rules.samples < FEWEST_SAMPLES):
        raise PlanError(f"--samples is {rules.samples!r}: expected a whole number of at least {FEWEST_SAMPLES}.")
    if not _is_whole(rules.seed) or rules.seed < 0:
        raise PlanError(f"--seed is {rules.seed!r}: expected a whole number of at least 0.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_calibration(rules: Rules, method: Method) -> None:
    """Rules that only mean something where the sources are run.

    Raises:
        PlanError: if the method does not run them.
    """
    if rules.width != 1 and not method.widens:
        able = " or ".join(f"--method {item.name}" for item in METHODS.values() if item.widens)
        raise PlanError(
            f"--width {rules.width:g}: the method '{method.name}' keeps the width of the sources. Take {able}, which "
            "can make a trunk of another width, or leave --width out."
        )
    if rules.keep is not None and not method.runs_models(rules.options, rules.data is not None):
        raise PlanError(
            f"--keep {rules.keep:g}: the method '{method.name}' does not run the models, so it cannot tell how well a "
            "trunk agrees with its sources. Take --method fuse, or say where the trunk ends with --trunk LAYER."
        )
    if rules.keep is not None and rules.trunk == "none":
        raise PlanError("--keep looks for the largest trunk, and --trunk none asks for none: leave one of them out.")


def check_label(label: str) -> None:
    """Labels name layers and outputs; any letters do, control characters and nothing at all do not."""
    invisible = any(unicodedata.category(character).startswith("C") for character in str(label))
    if not isinstance(label, str) or not label.strip() or invisible:
        raise PlanError(f"{label!r} is no label: give one with visible letters, with --labels.")


def unique_labels(labels: Sequence[str]) -> list[str]:
    """Labels told apart by a number where two are equal: a, a -> a, a_2."""
    used: set[str] = set()
    result = []
    for label in labels:
        candidate, number = label, 1
        while candidate in used or (candidate != label and candidate in labels):
            number += 1
            candidate = f"{label}_{number}"
        used.add(candidate)
        result.append(candidate)
    return result
