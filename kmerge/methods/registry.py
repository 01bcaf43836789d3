"""The registry of merge methods: pure functions of a stack of arrays, with what they declare about themselves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmerge.errors import MethodError

Array = NDArray[Any]


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Attributes:
        name: what users call it.
        function: takes `stack` (n, *shape), keyword `weights` (n,) summing to 1, and its options.
        summary: one sentence.
        scope: "element": every entry by itself, so tensors are merged block by block; "model": the units of the whole
            model are brought together before there is a stack.
        needs: what it needs beside the stack; "inputs" are calibration inputs, on which the sources are run.
        options: name of each option to its default.
        paper: where it comes from.
        related_only: whether it is worthless on sources without a common ancestor.
        choices: allowed values of options that are words.
        widens: whether it can make a trunk of another width than the sources'.
    """

    name: str
    function: Callable[..., Array]
    summary: str
    scope: str = "element"
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    related_only: bool = True
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    widens: bool = False

    def runs_models(self, options: Mapping[str, Any], given: bool = False) -> bool:
        """Whether a merge by it runs the sources on calibration inputs.

        Args:
            options: of the method.
            given: whether there are inputs to run them on.
        """
        return "inputs" in self.needs or ("by" in self.options and (given or options.get("by") == "activations"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "scope": self.scope,
            "needs": sorted(self.needs),
            "options": dict(self.options),
            "source": self.paper,
            "for_related_sources_only": self.related_only,
            "choices": {name: list(words) for name, words in self.choices.items()},
            "width": self.widens,
            "description": inspect.getdoc(self.function) or "",
        }


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    scope: str = "element",
    needs: frozenset[str] = frozenset(),
    related_only: bool = True,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    widens: bool = False,
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function as a merge method; its keyword arguments beyond `weights` and `labels` are its options."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        options = {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key not in ("weights", "labels", *needs)
        }
        summary = (inspect.getdoc(function) or "").split("\n", 1)[0]
        METHODS[name] = Method(
            name, function, summary, scope, needs, options, paper, related_only, choices or {}, widens
        )
        return function

    return register


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Hold options against what the method takes.

    Raises:
        MethodError: if the value of one is of another kind, or out of range.
    """
    for name, value in options.items():
        default = method.options.get(name)
        if name in method.choices:
            if value not in method.choices[name]:
                raise MethodError(f"{method.name}: {name} is {value!r}: expected {' or '.join(method.choices[name])}.")
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise MethodError(f"{method.name}: {name} is {value!r}: expected true or false.")
        elif isinstance(default, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise MethodError(f"{method.name}: {name} is {value!r}: expected a number above 0.")
        elif name == "seed" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise MethodError(f"{method.name}: seed is {value!r}: expected a whole number of at least 0.")


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: if there is none.
    """
    if name not in METHODS:
        raise MethodError(f"There is no method '{name}': choose one of {', '.join(sorted(METHODS))}, or auto.")
    return METHODS[name]


def normalise_weights(weights: Any, count: int) -> NDArray[np.float64]:
    """Importance per source as shares that sum to 1.

    Args:
        weights: one non-negative number per source, or None for equal ones.
        count: number of sources.

    Raises:
        MethodError: if there are too many or too few, or one is negative or not a number, or all are zero.
    """
    if weights is None:
        return np.full(count, 1.0 / count)
    try:
        values = np.asarray(list(weights), dtype=np.float64)
    except (TypeError, ValueError):
        raise MethodError(f"The weights are {weights!r}: give one number per source.") from None
    if values.shape != (count,):
        raise MethodError(f"There are {values.size} weights for {count} sources: give one number per source.")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not values.any():
        raise MethodError(
            f"The weights are {', '.join(f'{value:g}' for value in values)}: give numbers of at least 0, not all 0."
        )
    values /= values.max()  # their sum could be beyond the largest number
    return np.asarray(values / values.sum())
