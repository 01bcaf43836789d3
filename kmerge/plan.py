"""Rules in, a concrete role and method per layer out.

Everything that can be known to be wrong with a merge is raised here, before a weight is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from kmerge.dialects.vocabulary import RANDOM, is_quantized
from kmerge.errors import FormatError, LayoutError, PlanError
from kmerge.graph import Graph, Layer, ancestors, flatten, parents, refs
from kmerge.matching import Difference, Match, identity, layer_difference, match
from kmerge.methods import get_method, normalise_weights, picked
from kmerge.shapes import Shape, infer_shapes
from kmerge.source import Source

Role = Literal["shared", "private"]
TRUNKS = ("auto", "all", "none")
INPUTS = ("shared", "separate")
OUTPUTS = ("heads", "list", "mean")
FORMAT = 1


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
class Plan:
    """A merge, decided. Round-trips as JSON and is stored in the result."""

    sources: tuple[SourceFacts, ...]
    layers: tuple[LayerPlan, ...]
    method: str
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    trunk: str = "auto"
    inputs: str = "shared"
    outputs: str = "heads"
    freeze: bool = False
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
            layers = tuple(LayerPlan(**{**layer, "layers": tuple(layer["layers"])}) for layer in values["layers"])
            sources = tuple(SourceFacts(**source) for source in values["sources"])
            rest = {key: values[key] for key in ("method", "options", "trunk", "inputs", "outputs", "freeze")}
            weights = tuple(float(weight) for weight in values["weights"])
            if not math.isclose(sum(weights), 1.0):
                weights = tuple(float(weight) for weight in normalise_weights(weights, len(sources)))
            plan = cls(
                sources=sources,
                layers=layers,
                weights=weights,
                notes=tuple(values.get("notes", ())),
                kmerge=str(values.get("kmerge", "")),
                **rest,
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


@dataclass(frozen=True)
class Layout:
    """The sources laid over the first: one match per source, the first with itself."""

    sources: tuple[Source, ...]
    matches: tuple[Match, ...]

    @property
    def first(self) -> Source:
        return self.sources[0]

    def difference(self, layer: int) -> tuple[Source, Difference] | None:
        """The first source in which something forbids the layer to be shared, and what."""
        for source, found in zip(self.sources[1:], self.matches[1:], strict=True):
            different = layer_difference(self.first, source, found, layer)
            if different:
                return source, different
        return None


def lay_out(sources: Sequence[Source]) -> Layout:
    """Match all sources to the first.

    Raises:
        FormatError: if one holds no graph.
    """
    for source in sources:
        if source.graph is None:
            raise FormatError(
                f"'{source.name}' holds no graph ({source.warnings[0] if source.warnings else 'weights only'}): "
                "only --trunk all can merge it, or give the architecture with --base FILE."
            )
    assert sources[0].graph is not None
    matches = [identity(sources[0].graph), *(match(sources[0], source) for source in sources[1:])]
    return Layout(tuple(sources), tuple(matches))


def head_layers(source: Source) -> set[int]:
    """The layers of the heads: the last ones with weights before each output, and whatever depends on them."""
    graph = source_graph(source)
    heads: set[int] = set()
    seen: set[int] = set()
    waiting = [ref.call for ref in refs(graph.outputs)]
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        layer = graph.calls[number].layer
        if source.states[layer].weights and graph.layers[layer].class_name not in RANDOM:
            heads.add(layer)
        else:
            waiting.extend(ref.call for ref in refs(graph.calls[number].arguments))
    for call in graph.calls:
        if any(graph.calls[ref.call].layer in heads for ref in refs(call.arguments)):
            heads.add(call.layer)
    return heads


def source_graph(source: Source) -> Graph:
    assert source.graph is not None
    return source.graph


def make_plan(sources: Sequence[Source], rules: Rules, version: str = "") -> Plan:
    """Decide a merge.

    Args:
        sources: opened, in order; labels as they are to appear.
        rules: what the user asked for. `method` must be decided: auto is resolved by the caller.
        version: of kmerge.

    Returns:
        A plan for every layer of every source.

    Raises:
        LayoutError: layers that should be shared differ.
        PlanError: the rules contradict each other or the sources.
        MethodError: the method is unknown, or an option of it.
        FormatError: a source holds no graph.
    """
    labels = [source.label for source in sources]
    check_rules(rules, labels)
    weights = tuple(float(weight) for weight in normalise_weights(rules.weights, len(sources)))
    facts = tuple(source_facts(source) for source in sources)
    notes: tuple[str, ...] = ()
    if any(source.graph is None for source in sources):
        layers = _plan_without_graph(sources, rules)
    else:
        layers, notes = _plan_layers(lay_out(sources), rules)
    warnings = tuple(f"'{source.label}': {warning}" for source in sources for warning in source.warnings)
    warnings += tuple(
        f"the label '{label}' works for predictions, but TensorFlow cannot train a head of that name: "
        "for training, choose --labels of plain letters, digits, '_', '-' and '.'"
        for label in labels
        if not re.fullmatch(r"[A-Za-z0-9_.\\/>-]*", label)
    )
    return Plan(
        sources=facts,
        layers=layers,
        method=rules.method,
        options=dict(rules.options),
        weights=weights,
        trunk=rules.trunk,
        inputs=rules.inputs,
        outputs=rules.outputs,
        freeze=rules.freeze,
        notes=warnings + notes,
        kmerge=version,
    )


def source_facts(source: Source) -> SourceFacts:
    return SourceFacts(source.label, source.name, source.size, source.version, "", source.training)


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


def _plan_without_graph(sources: Sequence[Source], rules: Rules) -> tuple[LayerPlan, ...]:
    """Files without a graph have no layers: everything is shared, weight by weight."""
    bare = next(source for source in sources if source.graph is None)
    if rules.trunk != "all":
        what = bare.warnings[0] if bare.warnings else "weights only"
        raise PlanError(
            f"'{bare.name}' holds no graph ({what}), so kmerge cannot tell trunk from heads. Merge everything with "
            "--trunk all, or give the architecture with --base FILE (a whole model of the same layout)."
        )
    if rules.roles or rules.inputs != "shared" or rules.outputs != "heads" or rules.freeze:
        raise PlanError(
            f"'{bare.name}' holds no graph: --share, --private, --inputs, --outputs and --freeze need one. "
            "Leave them out, or give the architecture with --base FILE."
        )
    first = sources[0]
    for source in sources[1:]:
        if (source.kind, source.graph is None) != (first.kind, first.graph is None):
            raise PlanError(
                f"'{first.name}' is {first.kind.value} and '{source.name}' is {source.kind.value}: without a graph, "
                "sources must be files of one kind."
            )
        mine = {weight.key: weight for weight in first.states[0].weights}
        theirs = {weight.key: weight for weight in source.states[0].weights}
        for key in [*mine, *theirs]:
            if key not in mine or key not in theirs:
                has, lacks = (first, source) if key in mine else (source, first)
                raise LayoutError(
                    f"weight '{key}' is in '{has.label}' but not in '{lacks.label}': without a graph, sources "
                    "must hold the "
                    "same weights. Leave one out."
                )
            if mine[key].tensor.shape != theirs[key].tensor.shape:
                raise LayoutError(
                    f"weight '{key}': {mine[key].tensor.shape} in '{first.label}' but {theirs[key].tensor.shape} in "
                    f"'{source.label}'. Shared weights need equal shapes: leave '{source.label}' out."
                )
    names = (first.model or {}).get("class_name") or "weights"
    return (
        LayerPlan(
            name=str(names),
            class_name=str(names),
            role="shared",
            method=rules.method,
            options=dict(rules.options),
            layers=tuple(str(names) for _ in sources),
        ),
    )


def _plan_layers(layout: Layout, rules: Rules) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    first = layout.first
    graph = source_graph(first)
    _check_inputs(layout, rules)
    wanted, forced, notes = _wanted_roles(layout, rules)
    roles: dict[int, Role] = {}
    shared_calls: set[int] = set()
    for index, call in enumerate(graph.calls):
        number, layer = call.layer, graph.layers[call.layer]
        follows = all(ref.call in shared_calls for ref in refs(call.arguments))
        if layer.is_input:
            roles[number] = "shared" if rules.inputs == "shared" else "private"
            if roles[number] == "shared":
                _check_shared(layout, number, forced.get(number), rules)
            shared_calls.add(index)
        elif is_plain(layout.first, number) and forced.get(number) != "private":
            if number in wanted and follows:
                _check_shared(layout, number, forced.get(number), rules)
                shared_calls.add(index)
            elif follows and layout.difference(number) is None:
                shared_calls.add(index)
            roles[number] = "shared" if index in shared_calls or roles.get(number) == "shared" else "private"
        else:
            if number not in roles:
                roles[number] = "private"
                if number in wanted:
                    roles[number] = _checked(layout, number, forced.get(number), rules, notes)
            if roles[number] == "shared":
                shared_calls.add(index)
    if rules.trunk == "all" and "private" not in forced.values():
        _check_everything_matched(layout)
    _check_outputs(layout, rules)
    matched = [found.layers for found in layout.matches]
    plans = []
    for number, layer in enumerate(graph.layers):
        has_weights = bool(first.states[number].weights)
        names = tuple(
            source_graph(source).layers[found[number]].name if number in found else None
            for source, found in zip(layout.sources, matched, strict=True)
        )
        merged = roles[number] == "shared" and has_weights
        plans.append(
            LayerPlan(
                name=layer.name,
                class_name=layer.class_name,
                role=roles[number],
                method=rules.method if merged else "",
                options=dict(rules.options) if merged else {},
                layers=names,
                has_weights=has_weights,
            )
        )
    for place, (source, found) in enumerate(zip(layout.sources, matched, strict=True)):
        for number, layer in enumerate(source_graph(source).layers):
            if number not in found.values():
                names = tuple(layer.name if other == place else None for other in range(len(layout.sources)))
                weights = bool(source.states[number].weights)
                plans.append(LayerPlan(layer.name, layer.class_name, "private", "", {}, names, weights))
    return tuple(plans), tuple(notes)


def _wanted_roles(layout: Layout, rules: Rules) -> tuple[set[int], dict[int, Role], list[str]]:
    """Layers of the first source that the rules want shared, and those whose role a pattern decides."""
    graph = source_graph(layout.first)
    everything = set(range(len(graph.layers)))
    if rules.trunk == "none":
        wanted: set[int] = set()
    elif rules.trunk == "all":
        wanted = set(everything)
    elif rules.trunk == "auto":
        wanted = everything - head_layers(layout.first)
    else:
        names = [layer.name for layer in graph.layers]
        if rules.trunk not in names:
            raise PlanError(
                f"--trunk: '{layout.first.label}' has no layer '{rules.trunk}'. Its layers are {_listed(names)}; "
                "or say auto, all or none."
            )
        calls = ancestors(graph, graph.calls_of(names.index(rules.trunk)))
        wanted = {graph.calls[call].layer for call in calls}
    forced: dict[int, Role] = {}
    for pattern, role in rules.roles:
        fitting = [number for number, layer in enumerate(graph.layers) if fnmatchcase(layer.name, pattern)]
        others = [
            layer.name
            for source in layout.sources[1:]
            for layer in source_graph(source).layers
            if fnmatchcase(layer.name, pattern)
        ]
        if not fitting:
            flag = "--share" if role == "shared" else "--private"
            elsewhere = f" Names are those of the first source; another has '{others[0]}'." if others else ""
            raise PlanError(
                f"{flag} {pattern}: no layer of '{layout.first.label}' has such a name.{elsewhere} "
                f"Its layers are {_listed([layer.name for layer in graph.layers])}."
            )
        for number in fitting:
            if graph.layers[number].is_input:
                if len(fitting) == 1:
                    raise PlanError(
                        f"'{graph.layers[number].name}' is an input: --inputs shared|separate decides over it."
                    )
                continue
            forced[number] = role
    wanted = (wanted | {n for n, role in forced.items() if role == "shared"}) - {
        n for n, role in forced.items() if role == "private"
    }
    if rules.trunk == "all":
        forced = {**{number: "shared" for number in everything if not graph.layers[number].is_input}, **forced}
    return wanted, forced, []


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"


def is_plain(source: Source, layer: int) -> bool:
    """Whether a layer has neither weights nor randomness: it is shared wherever its inputs are, call by call."""
    return not source.states[layer].weights and source_graph(source).layers[layer].class_name not in RANDOM


def _check_shared(layout: Layout, number: int, forced: Role | None, rules: Rules) -> None:
    if _checked(layout, number, forced, rules, []) == "private":
        raise LayoutError(_difference_message(layout, number, *_must(layout.difference(number))))


def _check_everything_matched(layout: Layout) -> None:
    for source, found in zip(layout.sources, layout.matches, strict=True):
        matched = set(found.layers.values())
        for number, layer in enumerate(source_graph(source).layers):
            if number not in matched and not layer.is_input:
                raise LayoutError(
                    f"layer {number + 1} '{layer.name}' ({layer.class_name}) of '{source.label}' has no counterpart in "
                    f"'{layout.first.label}', and --trunk all shares everything: say where the trunk ends with --trunk "
                    f"LAYER, or leave '{source.label}' out."
                )


def _must(found: tuple[Source, Difference] | None) -> tuple[Source, Difference]:
    assert found is not None
    return found


def _checked(layout: Layout, number: int, forced: Role | None, rules: Rules, notes: list[str]) -> Role:
    """The role of a layer that should be shared: shared, or private where its learned state differs; else raises."""
    layer = source_graph(layout.first).layers[number]
    found = layout.difference(number)
    if found is None:
        return "shared"
    if found[1].kind == "state" and is_quantized(layer.config):
        if rules.method == "pick":
            return "shared"
        raise LayoutError(
            f"layer {number + 1} '{layer.name}' ({layer.class_name}) is quantised, and differs between the "
            "sources: its "
            f"integers cannot be combined. Keep it per source with --private {layer.name}, or take one source's with "
            "--method pick."
        )
    source, different = found
    if layer.is_input:
        raise LayoutError(
            f"{different.sentence(layout.first.label, source.label)} (input '{layer.name}'). "
            f"One input for all needs equal shapes: give every source its own with --inputs separate, or leave "
            f"'{source.label}' out."
        )
    if different.kind == "state" and forced is None:
        notes.append(
            f"'{layer.name}' ({layer.class_name}) stays private, because "
            f"{different.sentence(layout.first.label, source.label)}: "
            "the shared layers behind it run once per source"
        )
        return "private"
    raise LayoutError(_difference_message(layout, number, source, different))


def _difference_message(layout: Layout, number: int, source: Source, different: Difference) -> str:
    layer = source_graph(layout.first).layers[number]
    where = f"layer {number + 1} '{layer.name}' ({layer.class_name})"
    if different.kind == "place":
        there = _layer_there(layout, number, source)
        instead = f"has '{there.name}' ({there.class_name}) there" if there else "ends there"
        return (
            f"{where} of '{layout.first.label}' has no counterpart in '{source.label}', which {instead}.\n"
            "Shared layers need the same network up to them: end the trunk earlier with --trunk LAYER, keep it per "
            f"source with --private {layer.name}, or leave '{source.label}' out."
        )
    needs = {
        "shape": "equal shapes",
        "configuration": "equal configuration",
        "call": "to be called alike",
        "state": "equal learned state",
    }[different.kind]
    return (
        f"{where}: {different.sentence(layout.first.label, source.label)}.\n"
        f"Shared layers need {needs}: keep it per source with --private {layer.name}, or leave '{source.label}' out."
    )


def _layer_there(layout: Layout, number: int, source: Source) -> Layer | None:
    """What a source has where the first has a layer: behind the same tensors, else the first without counterpart."""
    first, other = source_graph(layout.first), source_graph(source)
    found = layout.matches[layout.sources.index(source)]
    before = {found.calls.get(parent) for call in first.calls_of(number) for parent in parents(first, call)}
    behind = (call.layer for index, call in enumerate(other.calls) if before & set(parents(other, index)))
    free = (index for index in range(len(other.layers)) if index not in found.layers.values())
    there = next(behind, next(free, None))
    return None if there is None else other.layers[there]


def _check_inputs(layout: Layout, rules: Rules) -> None:
    first = source_graph(layout.first)
    for source in layout.sources[1:]:
        mine, theirs = len(refs(first.inputs)), len(refs(source_graph(source).inputs))
        if rules.inputs == "shared" and mine != theirs:
            raise LayoutError(
                f"'{layout.first.label}' has {mine} inputs but '{source.label}' has {theirs}: one input for "
                "all needs as many "
                f"in every source. Give every source its own with --inputs separate, or leave '{source.label}' out."
            )


def _check_outputs(layout: Layout, rules: Rules) -> None:
    """An average needs as many outputs in every source, with equally many units where that can be known here."""
    if rules.outputs != "mean":
        return
    counts = [len(flatten(source_graph(source).outputs)) for source in layout.sources]
    shapes = [_output_shapes(source) for source in layout.sources]
    label, go_on = layout.first.label, "Use --outputs heads, or leave one out."
    for source, count, theirs in zip(layout.sources, counts, shapes, strict=True):
        if count != counts[0]:
            raise PlanError(
                f"--outputs mean: '{label}' has {counts[0]} outputs but '{source.label}' has {count}. {go_on}"
            )
        names = [_names(item) for item in (layout.first, source)]
        if names[0] != names[1]:
            raise PlanError(
                f"--outputs mean: the outputs are {names[0]} in '{label}' but {names[1]} in '{source.label}'. {go_on}"
            )
        for one, two in zip(shapes[0], theirs, strict=True):
            if one is not None and two is not None and not _fit(one, two):
                raise PlanError(
                    f"--outputs mean: an output is {one} in '{label}' but {two} in '{source.label}': an average needs "
                    f"equal shapes. {go_on}"
                )


def _output_shapes(source: Source) -> list[Shape | None]:
    graph = source_graph(source)
    shapes = infer_shapes(graph)
    return [shapes.get(ref) for ref in flatten(graph.outputs)]


def _fit(first: Shape, second: Shape) -> bool:
    """Whether two shapes may be one, apart from the batch."""
    known = zip(first[1:], second[1:], strict=False)
    return len(first) == len(second) and all(one == two or one is None or two is None for one, two in known)


def _names(source: Source) -> str:
    """The names of a dictionary of outputs."""
    outputs = source_graph(source).outputs
    return _listed(sorted(outputs)) if isinstance(outputs, dict) else "not named"


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
    if not path.is_file():
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


def check_plan(plan: Plan, sources: Sequence[Source]) -> None:
    """Hold a plan that came from outside against the sources.

    Raises:
        PlanError: if it is for other networks, or contradicts itself.
        MethodError: if a method or the weights are none.
        LayoutError: if a layer that it shares differs in these sources.
    """
    check_rules(Rules(inputs=plan.inputs, outputs=plan.outputs, method=plan.method, options=plan.options), plan.labels)
    if len(plan.sources) != len(sources):
        raise PlanError(f"The plan is for {len(plan.sources)} sources: {len(sources)} given.")
    normalise_weights(plan.weights, len(sources))
    if any(source.graph is None for source in sources):
        _plan_without_graph(sources, Rules(trunk=plan.trunk, method=plan.method, options=plan.options))
        return
    layout = lay_out(sources)
    rules = Rules(inputs=plan.inputs, outputs=plan.outputs)
    _check_inputs(layout, rules)
    own, planned = source_graph(layout.first).layers, plan.of_first
    for number in range(max(len(own), len(planned))):
        here = own[number].class_name if number < len(own) else "nothing"
        there = planned[number].class_name if number < len(planned) else "nothing"
        if here != there:
            raise PlanError(
                f"The plan is for another network: layer {number + 1} is {there} in the plan but {here} in "
                f"'{sources[0].name}'."
            )
    for number, layer in enumerate(planned):
        if layer.method or (layer.role == "shared" and layout.first.states[number].weights):
            check_rules(Rules(method=layer.method, options=layer.options), plan.labels)
        if own[number].is_input and layer.role != ("shared" if plan.inputs == "shared" else "private"):
            raise PlanError(
                f"The plan has {plan.inputs} inputs, but gives the input '{layer.name}' the role {layer.role}."
            )
        if layer.role == "shared":
            _check_shared(layout, number, "shared", Rules(method=layer.method))
    _check_outputs(layout, rules)
