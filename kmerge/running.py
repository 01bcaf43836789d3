"""What runs the models of a job: fusing them, looking for the largest trunk, measuring how well heads agree.

Keras is imported here, through `live` and `fuse`, and only where a job has inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kmerge import live
from kmerge.agreement import MEAN_LABEL, Agreement, ends_in_sigmoid, lowest, measure_agreement, own_rows, percent
from kmerge.assembly import assemble
from kmerge.errors import MergeError
from kmerge.graph import Ref, flatten
from kmerge.job import Job, write
from kmerge.layout import lay_out, source_graph
from kmerge.methods.registry import Array
from kmerge.plan import Plan
from kmerge.planning import make_plan
from kmerge.progress import Progress, in_steps, silent
from kmerge.rules import Rules
from kmerge.store import Kind
from kmerge.surgery import Merged, merge_graphs
from kmerge.version import __version__
from kmerge.workspace import Workspace

if TYPE_CHECKING:
    from kmerge.fuse import Fusion

BATCH = 64


def run_models(job: Job, work: Workspace, progress: Progress, custom_objects: Mapping[str, Any] | None = None) -> Job:
    """Do what has to be done with running models before a job is written.

    Args:
        job: decided.
        work: of this run.
        progress: told the steps.
        custom_objects: classes of custom layers, beside those of live sources.

    Returns:
        The job with what was found: the weights of a fused trunk, and the agreement of each head. One without inputs
        is returned as it is.
    """
    if job.inputs is None or job.merged is None:
        return job
    known = work.custom_objects(custom_objects)
    if job.plan.calibration is None:
        return replace(job, agreement=_measured(job, work, known))
    told = in_steps(progress, "calibrating")
    if job.plan.keep is not None and job.rules is not None:
        return _largest_trunk(job, job.rules, job.plan.keep, work, told, known)
    fusion = _fused(job, job.plan, work, told, known)
    return _with_fusion(job, job.plan, fusion)


def _fused(job: Job, plan: Plan, work: Workspace, progress: Progress, known: Mapping[str, Any]) -> Fusion:
    from kmerge.fuse import fuse_models

    assert job.inputs is not None
    layout = lay_out(job.sources)
    return fuse_models(layout, plan, job.inputs, work.subfolder(), progress, known, work.trusted)


def _with_fusion(job: Job, plan: Plan, fusion: Fusion, notes: Sequence[str] = ()) -> Job:
    return replace(
        job,
        plan=plan,
        merged=fusion.merged,
        assembly=assemble(fusion.merged, job.sources, fusion.values),
        values=fusion.values,
        agreement=fusion.agreements,
        notes=(*job.notes, *notes, *fusion.notes),
    )


# ------------------------------------------------------------------------------------------------- largest trunk


def _largest_trunk(
    job: Job, rules: Rules, keep: float, work: Workspace, progress: Progress, known: Mapping[str, Any]
) -> Job:
    """The job with the largest trunk whose heads all agree as well as asked for; agreement falls with length."""
    whole = _fused(job, job.plan, work, progress, known)
    found = lowest(whole.agreements)
    if found >= keep:
        note = f"the whole trunk keeps an agreement of {percent(keep)}: the lowest head has {percent(found)}"
        return _with_fusion(job, job.plan, whole, [note])
    fell = f"the whole one has {percent(found)}"
    plans = [plan for plan in _shorter_plans(job, rules) if not _same_trunk(plan, job.plan)]
    best: tuple[Plan, Fusion] | None = None
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        fusion = _fused(job, plans[middle], work, progress, known)
        if lowest(fusion.agreements) >= keep:
            best, low = (plans[middle], fusion), middle + 1
        else:
            high = middle
    if best is not None:
        plan, fusion = best
        note = (
            f"the largest trunk that keeps an agreement of {percent(keep)} ends with '{plan.trunk}': its lowest head "
            f"has {percent(lowest(fusion.agreements))}, and {fell}"
        )
        return _with_fusion(job, plan, fusion, [note])
    note = f"no trunk keeps an agreement of {percent(keep)} ({fell}), so every source was kept whole"
    plan = _replanned(job, rules, "none")
    if any(layer.method for layer in plan.layers):  # what --share asked for
        return _with_fusion(job, plan, _fused(job, plan, work, progress, known), [note])
    merged = merge_graphs(lay_out(job.sources), plan)
    return replace(job, plan=plan, merged=merged, assembly=assemble(merged, job.sources), notes=(*job.notes, note))


def _shorter_plans(job: Job, rules: Rules) -> list[Plan]:
    """Plans whose trunk ends with one of the layers of the whole one, from the shortest on."""
    names = [layer.name for layer in job.plan.of_first if layer.method]
    return [_replanned(job, rules, name) for name in names]


def _replanned(job: Job, rules: Rules, trunk: str) -> Plan:
    plan = make_plan(job.sources, replace(rules, trunk=trunk, keep=None), __version__)
    return replace(plan, keep=job.plan.keep, calibration=job.plan.calibration)


def _same_trunk(one: Plan, other: Plan) -> bool:
    return all(
        (first.role == second.role and first.method == second.method)
        for first, second in zip(one.of_first, other.of_first, strict=True)
    )


# ----------------------------------------------------------------------------------------------------- agreement


def _measured(job: Job, work: Workspace, known: Mapping[str, Any]) -> tuple[Agreement, ...]:
    """How well the heads of a merge in weight space agree with the sources.

    The sources are run as one model with nothing shared, which is each of them exactly.
    """
    assert job.merged is not None
    assert job.inputs is not None
    rules = Rules(
        labels=job.plan.labels,
        trunk="none",
        inputs=job.plan.inputs,
        outputs="mean" if job.plan.outputs == "mean" else "list",
        method="mean",
        weights=job.plan.weights,
    )
    plan = make_plan(job.sources, rules, __version__)
    merged = merge_graphs(lay_out(job.sources), plan)
    whole = Job(job.sources, plan, merged, assemble(merged, job.sources), inputs=job.inputs)
    wanted, got = (_outputs_of(item, work, known) for item in (whole, job))
    one = job.plan.outputs == "mean" and len(set(merged.heads.values())) == 1
    found = []
    for number, label in enumerate(job.plan.labels):
        if one and number:
            break
        graph = source_graph(job.sources[number])
        pairs = zip(merged.heads[label], job.merged.heads[label], flatten(graph.outputs), strict=True)
        for theirs, mine, ref in pairs:
            values, others = wanted[theirs], got[mine]
            if values.shape != others.shape:
                raise MergeError(
                    f"The output '{mine}' is {others.shape} in the merged model but {values.shape} before."
                )
            binary = ends_in_sigmoid(graph, ref)
            own = slice(None) if one else own_rows(job.inputs.owners, number)
            shown = MEAN_LABEL if one else label
            found.append(measure_agreement(shown, mine, values[own], others[own], job.inputs.synthetic, binary))
    return tuple(found)


def _outputs_of(job: Job, work: Workspace, known: Mapping[str, Any]) -> dict[str, Array]:
    """What a job's model gives on the job's inputs, by the name of the output."""
    from kmerge.calibration.network import to_numpy

    assert job.merged is not None
    suffix = ".keras" if job.assembly.kind in (Kind.KERAS, Kind.FOLDER) else ".h5"
    path = work.subfolder() / f"model{suffix}"
    write(job, path, work, True, silent)
    model = live.load_model(path, "the models to compare them", known, work.trusted)
    try:
        with live.quiet():
            rows = [[to_numpy(value) for value in batch] for batch in _batches(model, job)]
    except Exception as error:
        raise MergeError(f"Keras cannot run the models on the inputs: {live.one_line(error)}.") from error
    values = [np.concatenate(columns) for columns in zip(*rows, strict=True)]
    return dict(zip(_output_names(job.merged), values, strict=True))


def _batches(model: Any, job: Job) -> Iterator[list[Any]]:
    import keras

    assert job.merged is not None
    assert job.inputs is not None
    places = [_place_of(job, job.merged, ref) for ref in flatten(job.merged.graph.inputs)]
    for batch in job.inputs.batches(BATCH):
        given = [keras.ops.convert_to_tensor(batch[place]) for place in places]
        yield keras.tree.flatten(model(keras.tree.pack_sequence_as(model.input, given), training=False))


def _place_of(job: Job, merged: Merged, ref: Ref) -> int:
    """Which of its source's inputs an input of the merged model is."""
    source, layer = merged.layers[merged.graph.calls[ref.call].layer].members[0]
    graph = source_graph(job.sources[source])
    return [graph.calls[item.call].layer for item in flatten(graph.inputs)].index(layer)


def _output_names(merged: Merged) -> list[str]:
    """Names in the order in which Keras gives the outputs."""
    if isinstance(merged.graph.outputs, Mapping):
        return [str(key) for key in sorted(merged.graph.outputs) for _ in flatten(merged.graph.outputs[key])]
    heads = list(merged.heads.values())
    if len(flatten(merged.graph.outputs)) == len(heads[0]):
        return list(heads[0])
    return [name for names in heads for name in names]
