"""What the user asked for, before it is held against any source."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.errors import PlanError
from kmerge.methods import get_method, picked
from kmerge.plan import Role

INPUTS = ("shared", "separate")
OUTPUTS = ("heads", "list", "mean")


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
    if method.name == "pick":
        picked(rules.options.get("label"), list(labels))


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
