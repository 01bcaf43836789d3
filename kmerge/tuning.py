"""From what a user gives to a training and its file: models opened as copies, labels found, the result written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from kmerge import live
from kmerge.calibration.enrich import channels_first
from kmerge.data import entries
from kmerge.errors import PlanError
from kmerge.graph import flatten
from kmerge.layout import source_graph
from kmerge.plan import Plan
from kmerge.progress import Progress, in_steps
from kmerge.rules import unique_labels
from kmerge.source import Source, stem
from kmerge.standing import open_standing
from kmerge.tune import Settings, Subject, Tuning, check_settings, tune
from kmerge.tune.processes import processes
from kmerge.workspace import Sources, Workspace, listed

ROWS = 4000
"""How many inputs are made up where none are given."""


def fine_tune_model(
    model: Any,
    data: Any,
    teachers: Sources | None,
    *,
    labels: Sequence[str] | None,
    output: str | os.PathLike[str] | None,
    force: bool,
    settings: Settings,
    custom_objects: Mapping[str, Any] | None,
    progress: Progress,
) -> Tuning:
    """Open, train, write; see `kmerge.api.fine_tune`."""
    check_settings(settings)
    if data is None and teachers is None:
        raise PlanError(
            "There is nothing to learn from: give data with labels (--data), or the sources, which need none."
        )
    with ExitStack() as stack:
        work = Workspace(stack)
        standing = open_standing(
            work, model, output, force, custom_objects, without_graph="cannot be trained", data=data
        )
        stored = standing.facts
        opened = _teachers(work, teachers, labels, stored)
        plan = Plan.from_dict(stored["plan"]) if stored is not None else None
        subject = _subject(standing.copy, standing.source, stored, plan, opened, labels)
        synthetic = data is None
        if synthetic:
            from kmerge.calibration.synthetic import synthesise

            made = synthesise(list(opened.values()), settings.samples or ROWS, settings.seed)
            names = [entry.name for entry in subject.entries]
            data = dict(zip(names, made.arrays, strict=True))
        several = processes()
        with several.alone():
            masters = {label: standing.copy(teacher) for label, teacher in opened.items()}
        tuned = tune(subject, data, masters, settings, work.subfolder(), in_steps(progress, "training"), synthetic)
        facts = None if stored is None else {**stored, "tuning": _facts(tuned)}
        written = standing.succeed(tuned.model, facts, several.is_first)
    return replace(tuned, output=written)


def _teachers(
    work: Workspace, teachers: Sources | None, labels: Sequence[str] | None, stored: Mapping[str, Any] | None
) -> dict[str, Source]:
    """The sources by the label of the head that they teach."""
    if teachers is None:
        return {}
    given = listed(teachers)
    values = list(given.values()) if isinstance(given, Mapping) else list(given)
    known = list(labels or (Plan.from_dict(stored["plan"]).labels if stored else ()))
    added = [] if labels else added_labels(stored)  # their sources may teach, too
    if isinstance(given, Mapping):
        names = [str(key) for key in given]
    else:
        names = unique_labels([str(value.name) if live.is_model(value) else stem(value) for value in values])
        for expected in (known, [*known, *added]):
            if not set(known) <= set(names) and len(values) == len(expected):
                names = expected
    known += [label for label in added if label in names]
    if known and set(names) != set(known):
        raise PlanError(
            f"The teachers are {', '.join(names)}, but the heads of the model are {', '.join(known)}: give one source "
            "for each head, in their order or by label."
        )
    if not values:
        raise PlanError("The list of teachers is empty: give one source for each head, or none at all (None).")
    found = dict(
        zip(names, (work.open_one(value, name) for name, value in zip(names, values, strict=True)), strict=True)
    )
    for source in found.values():
        if source.graph is None:
            raise PlanError(f"'{source.name}' holds no graph, so it cannot teach: give a whole model.")
    return {label: found[label] for label in known or names}


def _calibrated(plan: Plan | None) -> tuple[int, int] | None:
    """Rows and seed of a calibration on given inputs."""
    facts = plan.calibration if plan else None
    return None if plan is None or facts is None or facts.synthetic or not facts.rows else (facts.rows, plan.seed)


def _subject(
    copy: Any,
    source: Source,
    stored: Mapping[str, Any] | None,
    plan: Plan | None,
    teachers: Mapping[str, Source],
    labels: Sequence[str] | None,
) -> Subject:
    names = tuple(labels or ((*plan.labels, *added_labels(stored)) if plan else teachers))
    training: dict[str, Any] = {label: _own_training(source.training, label) for label in names}
    if plan:
        training |= {facts.label: facts.training for facts in plan.sources if facts.training is not None}
    training |= {label: teacher.training for label, teacher in teachers.items() if teacher.training is not None}
    wanted = entries(source)
    copies = 1
    if plan is not None and plan.inputs == "separate":
        first = next(iter(teachers.values()), None)
        each = len(flatten(source_graph(first).inputs)) if first else len(wanted) // max(len(plan.labels), 1)
        if each and len(wanted) == each * len(plan.labels):
            copies, own = len(plan.labels), entries(first) if first is not None else wanted[:each]
            wanted = tuple(
                replace(entry, names=entry.names | other.names | {f"x{n}"} | ({"x"} if each == 1 else set()))
                for n, (entry, other) in enumerate(zip(own, wanted[:each], strict=True))
            )
    roles = None
    if stored and isinstance(stored.get("layers"), Mapping):
        roles = {str(name): str(item.get("role")) for name, item in stored["layers"].items()}
    ends: dict[str, str] = {}
    end = ""
    if plan is not None:
        shared = [layer for layer in plan.of_first if layer.role == "shared" and all(layer.layers)]
        shared = [layer for layer in shared if layer.has_weights] or shared
        if shared:
            end = shared[-1].name
            ends = {label: str(name) for label, name in zip(plan.labels, shared[-1].layers, strict=True)}
    itself = source.training if isinstance(source.training, Mapping) and not names else None
    moved = frozenset(channels_first(source_graph(next(iter(teachers.values()), source))))
    return Subject(
        copy, wanted, copies, names, roles, training, ends, end, itself, _calibrated(plan), channels_first=moved
    )


def added_labels(stored: Mapping[str, Any] | None) -> list[str]:
    """Labels of the heads that were added to a merged model: sources of its layers that its plan does not know."""
    if stored is None or not isinstance(stored.get("layers"), Mapping):
        return []
    sources = [
        str(item["source"]) for item in stored["layers"].values() if isinstance(item, Mapping) and "source" in item
    ]
    return [label for label in dict.fromkeys(sources) if label not in Plan.from_dict(stored["plan"]).labels]


def _own_training(training: Any, label: str) -> Any:
    """What a model's own training configuration says of one head."""
    if not isinstance(training, Mapping):
        return None
    found = {}
    for key in ("loss", "metrics"):
        value = training.get(key)
        found[key] = value
        if isinstance(value, Mapping) and "class_name" not in value:
            found[key] = value.get(label)
    return found


def _facts(tuned: Tuning) -> dict[str, Any]:
    """What a file holds about its training."""
    facts = tuned.to_dict()
    kept = ("before", "after", "scores_before", "scores_after", "epoch", "steps", "description", "notes")
    return {key: facts[key] for key in kept}
