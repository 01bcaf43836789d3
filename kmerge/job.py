"""A merge from its rules to its file: decided, then written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge import live
from kmerge.agreement import Agreement
from kmerge.assembly import Assembly, Values, assemble, assemble_flat
from kmerge.engine import merge_tensors
from kmerge.errors import OutputError, PlanError, UnrelatedError
from kmerge.given import given_plan, plan_of
from kmerge.graph import layer_order
from kmerge.layout import Layout, lay_out
from kmerge.methods import get_method
from kmerge.output import create_output
from kmerge.plan import Calibration, Plan, SourceFacts
from kmerge.planning import make_plan
from kmerge.progress import Progress
from kmerge.report.facts import Report, flat_sizes, layer_sizes, merge_sizes
from kmerge.rules import Rules
from kmerge.similarity import Ancestry, ancestry, flat_cosines, layer_cosines
from kmerge.source import Source
from kmerge.store import Kind
from kmerge.store.target import check_target, copy_file
from kmerge.surgery import Merged, merge_graphs
from kmerge.version import __version__
from kmerge.workspace import Workspace, family

if TYPE_CHECKING:
    from kmerge.calibration.inputs import Inputs


@dataclass(frozen=True)
class Job:
    """A decided merge.

    Attributes:
        sources: opened, in the plan's order.
        plan: every decision.
        merged: the merged graph; None for files without one.
        assembly: the file, complete but for the values of its weights.
        ancestry: what the weights say of a common ancestor, where that was looked at.
        notes: beside those of the plan.
        rules: that the plan was made by; None for one from outside.
        inputs: to calibrate on, or to measure agreement on.
        values: weights that were found on them.
        agreement: of each head with its source, where measured.
    """

    sources: tuple[Source, ...]
    plan: Plan
    merged: Merged | None
    assembly: Assembly
    ancestry: Ancestry | None = None
    notes: tuple[str, ...] = ()
    rules: Rules | None = None
    inputs: Inputs | None = None
    values: Values | None = None
    agreement: tuple[Agreement, ...] = ()

    def stored(self) -> dict[str, Any]:
        """What the result holds about how it came to be."""
        layers: dict[str, dict[str, str]] = {}
        if self.merged:
            for layer, origin in zip(self.merged.graph.layers, self.merged.layers, strict=True):
                private = {"source": self.sources[origin.members[0][0]].label} if origin.role == "private" else {}
                layers[layer.name] = {"role": origin.role, **private}
        measured = {"agreement": [vars(item) for item in self.agreement]} if self.agreement else {}
        return {"kmerge": __version__, "plan": self.plan.to_dict(), "layers": layers, **measured}

    def report(self, output: str | None, size: int, seconds: float) -> Report:
        sizes = merge_sizes(self.merged, self.sources, self.values) if self.merged else flat_sizes(self.sources)
        heads = self.merged.heads if self.merged else {}
        return Report(
            plan=self.plan,
            output=output,
            bytes=size,
            heads=heads,
            ancestry=self.ancestry,
            seconds=seconds,
            notes=self.plan.notes + self.notes,
            layers=layer_sizes(self.plan, self.sources),
            agreement=self.agreement,
            **sizes,
        )


# ------------------------------------------------------------------------------------------------------ deciding


def prepare(
    sources: list[Source],
    rules: Rules,
    given: Any,
    named: bool,
    work: Workspace,
    dry_run: bool = False,
    target: Path | None = None,
) -> Job:
    """Everything up to the first step of work.

    Args:
        sources: opened, in one format and dialect.
        rules: what the user asked for.
        given: a plan from outside, or None.
        named: whether the user gave the sources by label.
        work: of this run.
        dry_run: whether this is all: no inputs are made up then.
        target: the output, whose suffix tells the format of sources that have to be upgraded to be run.
    """
    flat = any(source.graph is None for source in sources)
    found: Ancestry | None = None
    if given is not None:
        if not flat and not work.trusted and (rules.data is not None or plan_of(given).calibration is not None):
            sources = work.to_run(sources, target)  # such a plan was made of upgraded ones
        plan, sources = given_plan(given, sources, rules, named)
    elif rules.method == "auto":
        rules, plan, found = _decide(sources, rules, flat)
    else:
        plan = make_plan(sources, rules, __version__)
    if flat:
        _check_no_data(sources, rules)
        return Job(tuple(sources), plan, None, assemble_flat(sources, plan), found, work.notes)
    runs = _runs_models(plan, plan.calibration is not None if given is not None else rules.data is not None)
    merges = any(layer.method for layer in plan.layers)
    if (runs or (merges and rules.data is not None)) and not work.trusted:
        for source in sources:
            live.check_runs_no_code(source.model, source.name, _WITHOUT_RUNNING)
        current = work.to_run(sources, target)
        if any(new is not old for new, old in zip(current, sources, strict=True)):
            return prepare(current, rules, given, named, work, dry_run, target)
    inputs = _inputs(plan, sources, rules, runs, dry_run) if merges else None
    if runs:
        plan = replace(plan, calibration=_facts(plan, rules, inputs))
    elif any(layer.method == "align" for layer in plan.layers):
        sources = _aligned(sources, plan)
    notes = work.notes + _notes(plan, rules, found, dry_run)
    merged = merge_graphs(lay_out(sources), plan)
    rules_used = None if given is not None else rules
    return Job(tuple(sources), plan, merged, assemble(merged, sources), found, notes, rules_used, inputs)


_WITHOUT_RUNNING = (
    "Where models are merged or compared by what they compute, they have to be run. Take a method that looks at the "
    "weights alone (--method mean, without --data), or keep every source whole (--trunk none)."
)


def _decide(sources: Sequence[Source], rules: Rules, flat: bool) -> tuple[Rules, Plan, Ancestry]:
    """What `auto` is here: the mean for sources with a common ancestor, else `fuse`.

    Raises:
        UnrelatedError: if the sources share no ancestor and hold no graph, so that they cannot be fused.
    """
    plain = replace(rules, method="mean", options={}, width=1.0, keep=None)
    plan = make_plan(sources, plain, __version__)
    found = _look_for_ancestor(sources, plan, flat)
    if found.related is False and flat:
        raise UnrelatedError(
            f"These weights do not share an ancestor: their cosine is {found.cosine:.2f} (1 is equal, 0 is unrelated). "
            "Their mean would lose what each of them knows, though it looks like a model, and without a graph they "
            "cannot be run to be fused.\n"
            "Give the architecture with --base FILE (a whole model of the same layout); or take the mean all the same "
            "with --method mean, or one source's weights with --method pick."
        )
    chosen = replace(rules, method="fuse" if found.related is False else "mean")
    if chosen != plain or rules.data is not None:
        try:
            plan = make_plan(sources, chosen, __version__)
        except PlanError as error:
            error.add_note(f"The method auto is '{chosen.method}' here: {_why(found)}.")
            raise
    return chosen, plan, found


def _why(found: Ancestry) -> str:
    if found.related is None:
        return "nothing tells whether the models share an ancestor"
    says = "share an ancestor" if found.related else "do not share an ancestor"
    return f"the models {says} (cosine {found.cosine:.2f})"


def _notes(plan: Plan, rules: Rules, found: Ancestry | None, dry_run: bool) -> tuple[str, ...]:
    """What was decided for the user, and what they asked for in vain."""
    notes = []
    merges = any(layer.method for layer in plan.layers)
    if found is not None and merges and found.related is None:
        notes.append(
            "no common kernels tell whether the sources share an ancestor: their mean was taken unseen, so compare "
            "the merged model with its sources"
        )
    if found is not None and merges and found.related is False and plan.calibration is not None:
        done = "are to be" if dry_run else "were"
        notes.append(f"{_why(found)}, so their trunks {done} fused on {plan.calibration.inputs}")
    for name, value in (("data", rules.data), ("keep", plan.keep)):
        if value is not None and not merges:
            notes.append(f"{name} has no effect: no weights are merged, so every head computes what its source does")
    if rules.samples is not None and (not merges or (rules.data is None and plan.calibration is None)):
        notes.append("samples has no effect: no inputs are needed")
    if dry_run and plan.width != 1:
        notes.append(
            "sizes are given for a trunk of the sources' width: how wide each layer gets is decided by the merge"
        )
    if dry_run and plan.keep is not None and merges:
        notes.append("where the trunk ends is decided by the merge: this is the largest one that it tries")
    return tuple(notes)


def _check_no_data(sources: Sequence[Source], rules: Rules) -> None:
    bare = next(source for source in sources if source.graph is None)
    if rules.data is not None:
        raise PlanError(
            f"'{bare.name}' holds no graph, so it cannot be run on --data. Leave that out, or give the architecture "
            "with --base FILE."
        )


def _runs_models(plan: Plan, given: bool) -> bool:
    """Whether a method of the plan runs the sources.

    Args:
        plan: decided.
        given: whether there are inputs that methods may use which can do without.
    """
    return any(get_method(layer.method).runs_models(layer.options, given) for layer in plan.layers if layer.method)


def _inputs(plan: Plan, sources: Sequence[Source], rules: Rules, runs: bool, dry_run: bool) -> Inputs | None:
    """The inputs that were given, or some that are made up where the merge needs any.

    Raises:
        PlanError: if the plan was made with inputs that are not given now.
        DataError: if what is given does not fit the networks.
    """
    if rules.data is not None:
        from kmerge.calibration.inputs import read_inputs

        return read_inputs(rules.data, sources, rules.samples, plan.seed)
    facts = plan.calibration
    if runs and facts is not None and not facts.synthetic:
        raise PlanError(f"The plan runs the models on {facts.inputs}: give these inputs, or others, with --data.")
    if not runs or dry_run:
        return None
    from kmerge.calibration.synthetic import synthesise

    rows = rules.samples or (facts.rows if facts else 0)
    return synthesise(sources, rows or None, plan.seed)


def _facts(plan: Plan, rules: Rules, inputs: Inputs | None) -> Calibration:
    if inputs is not None:
        return Calibration(inputs.description, inputs.rows, inputs.synthetic)
    return plan.calibration or Calibration("made-up inputs", rules.samples or 0, True)


def _aligned(sources: Sequence[Source], plan: Plan) -> list[Source]:
    """The sources with their units brought into one order."""
    from kmerge.align import align_by_weights, permuted
    from kmerge.spaces import layout_spaces

    layout = lay_out(sources)
    shared = [number for number, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
    options = next(layer.options for layer in plan.layers if layer.method == "align")
    seed = plan.seed if options.get("seed") is None else int(options["seed"])
    alignment = align_by_weights(layout, layout_spaces(layout, shared), shared, plan.weights, seed)
    return [permuted(source, alignment) for source in sources]


def _look_for_ancestor(sources: Sequence[Source], plan: Plan, flat: bool) -> Ancestry:
    """What the weights that are to be merged say of a common ancestor."""
    if flat:
        return ancestry(flat_cosines(sources))
    layout: Layout = lay_out(sources)
    shared = {layer.name for layer in plan.layers if layer.method}
    graph = sources[0].graph
    assert graph is not None
    return ancestry(layer_cosines(layout, [n for n, layer in enumerate(graph.layers) if layer.name in shared]))


def shared_places(merged: Merged) -> list[int]:
    """Places of the shared layers in `model.layers`: custom layers may not keep their names."""
    order = [number for number in layer_order(merged.graph) if not merged.graph.layers[number].is_operation]
    return [place for place, number in enumerate(order) if merged.layers[number].role == "shared"]


# ------------------------------------------------------------------------------------------------------- writing


def check_output(job: Job, target: Path, force: bool) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises:
        OutputError: if it could not.
    """
    _check_target(job, target)
    folder = job.assembly.kind is Kind.FOLDER and target.suffix not in (".keras", ".h5", ".hdf5")
    check_target(target.absolute(), force, folder, job.assembly.layout.nbytes)


def write(job: Job, target: Path, work: Workspace, force: bool, progress: Progress) -> Job:
    """Stream the job into its target; returns the job with the sources' digests in its plan."""
    _check_target(job, target)
    wanted = family(target)
    own = job.assembly.kind in (Kind.KERAS, Kind.FOLDER)
    if job.merged is not None and wanted is False and own:
        return _write_through_keras(job, target, work, force, progress)
    finished = job
    known = [source.digest for source in job.plan.sources]

    def stored() -> dict[str, Any]:
        return finished.stored()

    with create_output(job.assembly, target, force, stored) as output:
        digests = merge_tensors(job.sources, job.assembly.targets, output, job.plan.weights, progress)
        facts = tuple(replace(facts, digest=digest) for facts, digest in zip(job.plan.sources, digests, strict=True))
        finished = replace(job, plan=replace(job.plan, sources=facts), notes=job.notes + _changed(facts, known))
    return finished


def _changed(facts: Sequence[SourceFacts], known: Sequence[str]) -> tuple[str, ...]:
    """Which sources are not those that a plan was made from."""
    return tuple(
        f"'{source.label}': {source.name} is not the model that the plan was made from"
        for source, digest in zip(facts, known, strict=True)
        if digest and digest != source.digest
    )


def _write_through_keras(job: Job, target: Path, work: Workspace, force: bool, progress: Progress) -> Job:
    """`.keras` sources into an old `.h5`: merged as they are, then saved by Keras."""
    for source in job.sources:
        live.check_runs_no_code(source.model, source.name)
    check_target(target.absolute(), force, False, job.assembly.layout.nbytes)
    middle = work.folder / "merged.keras"
    finished = write(job, middle, work, True, progress)
    final = work.folder / "merged.h5"
    text = json.dumps(finished.stored())
    live.write_as_h5(middle, final, text)
    copy_file(final, target.absolute(), force)
    return finished


def _check_target(job: Job, target: Path) -> None:
    """The suffix must be one that Keras opens the file by."""
    known = ("", ".h5", ".hdf5", ".keras")
    weights_only = target.name.lower().endswith((".weights.h5", ".weights.json"))
    if job.merged is not None and (
        weights_only or (target.suffix not in known and job.assembly.kind is not Kind.FOLDER)
    ):
        raise OutputError(
            f"'{target.name}' is no name for a whole model: Keras opens .keras, .h5 and .hdf5. "
            "Give one of these suffixes with -o."
        )
    kind = job.assembly.kind
    if kind in (Kind.WEIGHTS, Kind.SHARDS) and not target.name.endswith(".weights.h5"):
        raise OutputError(
            "The sources hold Keras 3 weights only, and Keras opens such a file only as .weights.h5: "
            f"'{target.name}' is named otherwise. Give -o with that suffix, or the architecture with --base FILE."
        )
    if job.merged is None and kind in (Kind.KERAS, Kind.FOLDER) and family(target) is False:
        raise OutputError(
            f"A subclassed model can only be written in its own format: name the output .keras, not '{target.name}'."
        )
    if job.merged is None and kind in (Kind.H5, Kind.H5_WEIGHTS) and family(target) is True:
        raise OutputError(
            f"Without a graph, .h5 files can only be merged into .h5: '{target.name}' is named otherwise."
        )
