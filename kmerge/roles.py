"""Which layers are shared and which are private, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from kmerge.dialects.vocabulary import is_quantized
from kmerge.errors import LayoutError, PlanError
from kmerge.graph import Layer, ancestors, flatten, parents, refs
from kmerge.layout import Layout, head_layers, is_plain, source_graph
from kmerge.matching import Difference
from kmerge.plan import LayerPlan, Role
from kmerge.rules import Rules
from kmerge.shapes import Shape, infer_shapes
from kmerge.source import Source, State
from kmerge.store import is_number


def decide_layers(layout: Layout, rules: Rules) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    first = layout.first
    graph = source_graph(first)
    check_inputs(layout, rules)
    wanted, forced = _wanted_roles(layout, rules)
    notes: list[str] = []
    roles: dict[int, Role] = {}
    shared_calls: set[int] = set()
    for index, call in enumerate(graph.calls):
        number, layer = call.layer, graph.layers[call.layer]
        follows = all(ref.call in shared_calls for ref in refs(call.arguments))
        if layer.is_input:
            roles[number] = "shared" if rules.inputs == "shared" else "private"
            if roles[number] == "shared":
                check_shared(layout, number, forced.get(number), rules)
            shared_calls.add(index)
        elif is_plain(layout.first, number) and forced.get(number) != "private":
            if number in wanted and follows:
                check_shared(layout, number, forced.get(number), rules)
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
    check_outputs(layout, rules)
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
        taken = set(found.values())
        for number, layer in enumerate(source_graph(source).layers):
            if number not in taken:
                names = tuple(layer.name if other == place else None for other in range(len(layout.sources)))
                weights = bool(source.states[number].weights)
                plans.append(LayerPlan(layer.name, layer.class_name, "private", "", {}, names, weights))
    return tuple(plans), tuple(notes)


def _wanted_roles(layout: Layout, rules: Rules) -> tuple[set[int], dict[int, Role]]:
    """Layers of the first source that the rules want shared, and those whose role a pattern decides."""
    graph = source_graph(layout.first)
    everything = set(range(len(graph.layers)))
    forced: dict[int, Role] = {}
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
        forced[names.index(rules.trunk)] = "shared"
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
    return wanted, forced


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"


def check_shared(layout: Layout, number: int, forced: Role | None, rules: Rules) -> None:
    if _checked(layout, number, forced, rules, []) == "private":
        raise LayoutError(difference_message(layout, number, *_must(layout.difference(number))))


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
        for source, match in zip(layout.sources, layout.matches, strict=True):
            check_numbers(source, source.states[match.layers[number]], rules, f"--private {layer.name}")
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
    raise LayoutError(difference_message(layout, number, source, different))


def check_numbers(source: Source, state: State, rules: Rules, way_out: str) -> None:
    """Weights that are to be combined must be numbers.

    Raises:
        LayoutError: if one is not.
    """
    for weight in state.weights:
        if rules.method != "pick" and not is_number(weight.tensor.dtype):
            raise LayoutError(
                f"'{source.label}': {weight.name} is stored as {weight.tensor.dtype}, which does not say what numbers "
                "it holds (old HDF5 files lose the type of bfloat16), so it cannot be combined. Save the model as "
                f".keras, or leave it alone with {way_out}."
            )


def difference_message(layout: Layout, number: int, source: Source, different: Difference) -> str:
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


def check_inputs(layout: Layout, rules: Rules) -> None:
    first = source_graph(layout.first)
    for source in layout.sources[1:]:
        mine, theirs = len(refs(first.inputs)), len(refs(source_graph(source).inputs))
        if rules.inputs == "shared" and mine != theirs:
            raise LayoutError(
                f"'{layout.first.label}' has {mine} inputs but '{source.label}' has {theirs}: one input for "
                "all needs as many in every source. Give every source its own with --inputs separate, or leave "
                f"'{source.label}' out."
            )
        keys, others = first.inputs, source_graph(source).inputs
        if (
            rules.inputs == "shared"
            and isinstance(keys, dict)
            and isinstance(others, dict)
            and set(keys) != set(others)
        ):
            raise LayoutError(
                f"'{layout.first.label}' names its inputs {_listed(sorted(keys))} but '{source.label}' names them "
                f"{_listed(sorted(others))}: one input for all needs equal names, because they tell which is which. "
                f"Give every source its own with --inputs separate, or leave '{source.label}' out."
            )


def check_outputs(layout: Layout, rules: Rules) -> None:
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
