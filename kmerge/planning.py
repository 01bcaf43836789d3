"""Rules in, a plan out.

Everything that can be known to be wrong with a merge is raised here, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kmerge.dialects.vocabulary import weight_specs
from kmerge.errors import LayoutError, PlanError
from kmerge.layout import Layout, lay_out, source_graph
from kmerge.methods import get_method, normalise_weights
from kmerge.plan import LayerPlan, Plan, SourceFacts
from kmerge.roles import check_inputs, check_numbers, check_outputs, check_shared, decide_layers
from kmerge.rules import Rules, check_rules
from kmerge.source import Source


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
        layout = lay_out(sources)
        layers, notes = decide_layers(layout, rules)
        notes += _more_notes(layout, layers, rules, weights)
    warnings = tuple(f"'{source.label}': {warning}" for source in sources for warning in source.warnings)
    warnings += tuple(
        f"the label '{label}' works for predictions, but TensorFlow cannot train a head of that name: "
        "for training, choose --labels of plain letters, digits, '_', '-' and '.'"
        for label in labels
        if not re.fullmatch(r"[A-Za-z0-9_./>-]*", label)
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
        width=float(rules.width),
        keep=None if rules.keep is None else float(rules.keep),
        seed=rules.seed,
        notes=warnings + notes,
        kmerge=version,
    )


def _more_notes(layout: Layout, layers: Sequence[LayerPlan], rules: Rules, weights: Sequence[float]) -> tuple[str, ...]:
    """What a merge does that its user may not expect."""
    notes = []
    merged = [number for number, layer in enumerate(layers) if layer.method and layer.layers[0] is not None]
    if rules.freeze and not any(layer.role == "shared" and layer.has_weights for layer in layers):
        notes.append("freeze has no effect: no shared layer has weights")
    for number in merged:
        layer, state = source_graph(layout.first).layers[number], layout.first.states[number]
        if rules.freeze and "trainable" not in layer.config:
            notes.append(
                f"'{layer.name}' ({layer.class_name}) does not save whether it is trainable: a loaded file must set "
                "layer.trainable = False"
            )
        vectors = [weight for weight in state.weights if len(weight.tensor.shape) == 1 and weight.name == weight.key]
        if rules.method != "pick" and len(vectors) > 1 and weight_specs(layer.class_name, layer.config) is None:
            notes.append(
                f"'{layer.name}' ({layer.class_name}) is a layer that kmerge does not know: all its numbers are merged "
                f"as weights, statistics too. Keep it per source with --private {layer.name} if it holds some"
            )
    if (
        merged
        and rules.method == "align"
        and not get_method("align").runs_models(rules.options, rules.data is not None)
    ):
        notes.append(
            "sources without a common ancestor lose accuracy even when aligned: unlabelled inputs, given with --data, "
            "win back much of it, and tell how well each head agrees with its source"
        )
    for source, weight in zip(layout.sources, weights, strict=True):
        if weight == 0:
            notes.append(f"'{source.label}' has weight 0: it counts nowhere in what is merged")
    return tuple(notes)


def source_facts(source: Source) -> SourceFacts:
    return SourceFacts(source.label, source.name, source.size, source.version, "", source.training)


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
    if get_method(rules.method).scope == "model":
        raise PlanError(
            f"The method '{rules.method}' needs the graph, and '{bare.name}' holds none: take another method, or give "
            "the architecture with --base FILE."
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
    for source in sources:
        check_numbers(source, source.states[0], rules, "--method pick")
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


def check_plan(plan: Plan, sources: Sequence[Source]) -> None:
    """Hold a plan that came from outside against the sources.

    Raises:
        PlanError: if it is for other networks, or contradicts itself.
        MethodError: if a method or the weights are none.
        LayoutError: if a layer that it shares differs in these sources.
    """
    check_rules(
        Rules(
            inputs=plan.inputs,
            outputs=plan.outputs,
            method=plan.method,
            options=plan.options,
            width=plan.width,
            seed=plan.seed,
        ),
        plan.labels,
    )
    if len(plan.sources) != len(sources):
        raise PlanError(f"The plan is for {len(plan.sources)} sources: {len(sources)} given.")
    normalise_weights(plan.weights, len(sources))
    if any(source.graph is None for source in sources):
        _plan_without_graph(sources, Rules(trunk=plan.trunk, method=plan.method, options=plan.options))
        return
    layout = lay_out(sources)
    rules = Rules(inputs=plan.inputs, outputs=plan.outputs)
    check_inputs(layout, rules)
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
            check_shared(layout, number, "shared", Rules(method=layer.method))
    check_outputs(layout, rules)
