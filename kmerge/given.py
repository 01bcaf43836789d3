"""A plan from outside, brought together with the sources that it is to be used on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmerge.errors import PlanError
from kmerge.plan import Plan, is_there, read_plan
from kmerge.planning import check_plan, source_facts
from kmerge.report.inspection import stored_merge
from kmerge.rules import Rules
from kmerge.source import Source, open_source
from kmerge.version import __version__


def given_plan(given: Any, sources: list[Source], rules: Rules, named: bool) -> tuple[Plan, list[Source]]:
    """A plan from outside and the sources in its order, under their labels.

    Raises:
        PlanError: if it is for other sources, or the files stand in another order.
    """
    if rules != Rules(labels=rules.labels, samples=rules.samples):
        raise PlanError("A plan is given together with other rules: the plan decides everything. Leave the rules out.")
    plan = plan_of(given)
    if len(plan.sources) != len(sources):
        raise PlanError(f"The plan is for {len(plan.sources)} sources: {len(sources)} given.")
    own = [source.label for source in sources]
    if named and set(own) == set(plan.labels):
        sources = [sources[own.index(label)] for label in plan.labels]
    elif named or rules.labels is not None:
        plan = _relabelled(plan, own)
    elif own != list(plan.labels) and set(own) == set(plan.labels):
        raise PlanError(
            f"The plan has the sources in the order {', '.join(plan.labels)}, and they are given as {', '.join(own)}: "
            "give them in the plan's order, or name them anew with --labels."
        )
    sources = [replace(source, label=label) for source, label in zip(sources, plan.labels, strict=True)]
    check_plan(plan, sources)
    notes = tuple(
        f"'{old.label}': the plan was made from {old.name} of {old.size:,} bytes, this is {source.name} of "
        f"{source.size:,}"
        for source, old in zip(sources, plan.sources, strict=True)
        if not old.digest and (old.name, old.size) != (source.name, source.size)
    )
    facts = tuple(
        replace(source_facts(source), digest=old.digest) for source, old in zip(sources, plan.sources, strict=True)
    )
    return replace(plan, sources=facts, kmerge=__version__, notes=plan.notes + notes), sources


def _relabelled(plan: Plan, labels: Sequence[str]) -> Plan:
    """The plan under other labels, also where an option of a method names a source."""
    new = dict(zip(plan.labels, labels, strict=True))

    def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: new.get(value, value) if key == "label" else value for key, value in options.items()}

    layers = tuple(replace(layer, options=renamed(layer.options)) for layer in plan.layers)
    sources = tuple(replace(source, label=new[source.label]) for source in plan.sources)
    return replace(plan, sources=sources, layers=layers, options=renamed(plan.options))


def plan_of(given: Any) -> Plan:
    """A plan from JSON, or from a model that kmerge merged."""
    if isinstance(given, (str, os.PathLike)) and is_there(Path(given)) and not _looks_like_json(Path(given)):
        with open_source(given) as source:
            stored = stored_merge(source)
        if stored is None:
            raise PlanError(f"'{Path(given).name}' holds no plan: it was not made by kmerge.")
        return Plan.from_dict(stored["plan"])
    return read_plan(given)


def _looks_like_json(path: Path) -> bool:
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"{", b"")
