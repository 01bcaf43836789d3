"""A merge, decided: a concrete role and method per layer. Round-trips as JSON and is stored in the result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from kmerge.errors import PlanError
from kmerge.methods import normalise_weights

Role = Literal["shared", "private"]
FORMAT = 2
"""Of a plan as JSON. Format 1 knew no width, seed, keep and calibration; it is read with their defaults."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
        name: the layer's name in the first source (in its own source where only that one has it).
        class_name: Keras class.
        role: shared, one instance with merged weights; private, one copy per source.
        method: how the weights of a shared layer are merged; "" for private ones and layers without weights.
        options: of the method.
        layers: the layer's name in each source, None where a source has no counterpart.
        has_weights: whether it holds any.
    """

    name: str
    class_name: str
    role: Role
    method: str
    options: Mapping[str, Any]
    layers: tuple[str | None, ...]
    has_weights: bool = True


@dataclass(frozen=True)
class SourceFacts:
    """Which file a source was: enough to know it again."""

    label: str
    name: str
    size: int
    version: str = ""
    digest: str = ""
    training: Any = None


@dataclass(frozen=True)
class Calibration:
    """On which inputs the sources are run: enough to do it again.

    Attributes:
        inputs: what they are, for people.
        rows: how many; 0 where that is not known yet.
        synthetic: whether they are made up, so that the seed makes them again.
    """

    inputs: str
    rows: int
    synthetic: bool


@dataclass(frozen=True)
class Plan:
    """A merge, decided. Round-trips as JSON and is stored in the result.

    Attributes:
        sources: which files, in order.
        layers: role and method of each layer.
        method, options: what shared layers are merged by unless `layers` says otherwise.
        weights: importance per source, sums to 1.
        trunk, inputs, outputs, freeze: as asked for.
        width: of the trunk, as a multiple of a source's.
        keep: agreement for which the trunk was chosen; None where the trunk was asked for.
        seed: of everything random.
        calibration: inputs on which the sources are run, where the methods need that.
        notes: what a reader should know.
        kmerge: version that made it.
        format: of the plan as JSON.
    """

    sources: tuple[SourceFacts, ...]
    layers: tuple[LayerPlan, ...]
    method: str
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    trunk: str = "auto"
    inputs: str = "shared"
    outputs: str = "heads"
    freeze: bool = False
    width: float = 1.0
    keep: float | None = None
    seed: int = 0
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    kmerge: str = ""
    format: int = FORMAT

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)

    @property
    def of_first(self) -> tuple[LayerPlan, ...]:
        """The layers that the first source has, in the order of its graph."""
        return tuple(layer for layer in self.layers if layer.layers[0] is not None)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """A plan from what `to_dict` gave.

        Raises:
            PlanError: if it is no plan, or one of a newer kmerge.
            MethodError: if its weights are none.
        """
        try:
            if int(values["format"]) > FORMAT:
                raise PlanError(
                    f"The plan was written by kmerge {values.get('kmerge')}, which is newer: update kmerge to use it."
                )
            layers = tuple(
                LayerPlan(**{**_typed(layer, _LAYER), "layers": tuple(layer["layers"])}) for layer in values["layers"]
            )
            sources = tuple(SourceFacts(**_typed(source, _SOURCE)) for source in values["sources"])
            rest = {key: _typed(values, _PLAN)[key] for key in _PLAN}
            newer = {key: values[key] for key in _typed(values, _NEWER) if key in _NEWER}
            calibration = values.get("calibration")
            weights = tuple(float(weight) for weight in values["weights"])
            if not math.isclose(sum(weights), 1.0):
                weights = tuple(float(weight) for weight in normalise_weights(weights, len(sources)))
            plan = cls(
                sources=sources,
                layers=layers,
                weights=weights,
                notes=tuple(values.get("notes", ())),
                kmerge=str(values.get("kmerge", "")),
                calibration=None if calibration is None else Calibration(**_typed(calibration, _CALIBRATION)),
                **rest,
                **newer,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"This is no plan of kmerge ({error}): make one with kmerge combine --dry-run --json."
            ) from None
        for layer in plan.layers:
            if layer.role not in ("shared", "private"):
                raise PlanError(f"The plan gives '{layer.name}' the role '{layer.role}': expected shared or private.")
            if len(layer.layers) != len(sources):
                raise PlanError(
                    f"The plan names '{layer.name}' in {len(layer.layers)} sources, but has {len(sources)}."
                )
        return plan


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; no for what cannot be a name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


_PLAN = {"method": str, "options": Mapping, "trunk": str, "inputs": str, "outputs": str, "freeze": bool}
_NEWER = {"width": (int, float), "keep": (int, float, NoneType), "seed": int}
_CALIBRATION = {"inputs": str, "rows": int, "synthetic": bool}
_SOURCE = {"label": str, "name": str, "size": int, "version": str, "digest": str}
_LAYER = {
    "name": str,
    "class_name": str,
    "role": str,
    "method": str,
    "options": Mapping,
    "layers": list,
    "has_weights": bool,
}


def _typed(values: Any, types: Mapping[str, Any]) -> Any:
    """The values, after a look at their types: plans come out of files.

    Raises:
        TypeError: naming the first that is of another type.
    """
    for key, kind in types.items():
        if key in values and (
            not isinstance(values[key], kind) or (isinstance(values[key], bool) and kind is not bool)
        ):
            expected = kind.__name__ if isinstance(kind, type) else "a number"
            raise TypeError(f"{key} is {values[key]!r}, expected {expected}")
    names = values.get("layers") if types is _LAYER else []
    if not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"layers is {names!r}, expected names")
    return values


def read_plan(value: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
    """A plan from itself, from what `to_dict` gave, from a JSON file, or from a merged model that holds one.

    Raises:
        PlanError: if it is none of these.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping):
        return Plan.from_dict(value)
    if not isinstance(value, (str, os.PathLike)):
        raise PlanError(f"The plan is a {type(value).__name__}: expected a plan, its JSON, or a file.")
    path = Path(value)
    if not is_there(path) or path.is_dir():
        raise PlanError(f"There is no plan '{path}': make one with kmerge combine --dry-run --json > plan.json.")
    with path.open("rb") as file:
        text = file.read(64 * 2**20 + 1)
    if not text.lstrip()[:1] == b"{":
        raise PlanError(f"'{path.name}' is no plan: expected JSON as kmerge combine --dry-run --json prints it.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"'{path.name}' is no plan: {error}.") from None
    found = found.get("plan", found)
    if not isinstance(found, Mapping):
        raise PlanError(f"'{path.name}' is no plan: expected an object.")
    return Plan.from_dict(found)
