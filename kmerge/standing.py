"""A live model that stands and is to become another: opened, told what it is, copied, and its successor written."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.errors import OutputError, PlanError
from kmerge.report.inspection import stored_merge
from kmerge.source import Source
from kmerge.store.target import check_target, copy_file
from kmerge.workspace import Workspace, family


@dataclass(frozen=True, eq=False)
class Standing:
    """A model that stands.

    Attributes:
        work: in which it was opened.
        source: what it is.
        facts: what its file says of its merge; None where no merge made it.
        known: custom classes by name.
        target: where its successor is written; None for nowhere.
        force: whether it replaces what stands there.
    """

    work: Workspace
    source: Source
    facts: Mapping[str, Any] | None
    known: Mapping[str, Any]
    target: Path | None
    force: bool

    def copy(self, of: Source | None = None) -> Any:
        """A new live copy of the model, or of another source.

        Raises:
            KmergeError: if it would run code from a file, or cannot be opened.
        """
        source = of or self.source
        own = source.path is None
        if not own:
            instead = "It would be run, so replace the layer, or give the live model in Python."
            live.check_runs_no_code(source.model, source.name, instead)
        path = live.with_suffix(source.path or source.files[0], source.model, self.work.subfolder())
        return live.load_model(path, f"'{source.name}'", self.known, own)

    def succeed(self, model: Any, facts: Mapping[str, Any] | None, place: bool = True) -> str | None:
        """Write the model that this one became, whole or not at all, and give the path.

        Args:
            model: live; it remembers its facts.
            facts: of its merge and of what was done since.
            place: whether this process is the one that writes.
        """
        if facts is not None:
            live.remember(model, facts)
        if self.target is None:
            return None
        folder = self.work.subfolder()
        path = live.save_model(model, folder, "successor")
        if family(self.target) is False:
            old = folder / "successor.h5"
            text = None if facts is None else json.dumps(facts)
            live.write_as_h5(path, old, text, live.custom_objects_of([model]))
            path = old
        elif facts is not None:
            path = _with_facts(path, facts)
        if place:
            copy_file(path, self.target.absolute(), self.force)
        return str(self.target)


def open_standing(
    work: Workspace,
    model: Any,
    output: str | os.PathLike[str] | None,
    force: bool,
    custom_objects: Mapping[str, Any] | None,
    *,
    without_graph: str,
    data: Any = None,
) -> Standing:
    """Open a model to make another of it.

    Args:
        work: where.
        model: path or live.
        output: where that is to be written; None for nowhere.
        force: whether it may replace what stands there.
        custom_objects: classes by name.
        without_graph: what a file that holds weights alone is not good for.
        data: what is read meanwhile, so that it is not replaced.

    Raises:
        PlanError: if there is no graph.
        OutputError: if the output could not be written.
    """
    source = work.open_one(model, "model")
    if source.graph is None:
        raise PlanError(f"'{source.name}' holds no graph, so it {without_graph}: give a whole model.")
    facts = live.facts_of(model) if live.is_model(model) else stored_merge(source)
    target = _checked(output, force, source)
    if target is not None:
        work.protect(target, None, data)
    return Standing(work, source, facts, work.custom_objects(custom_objects), target, force)


def _checked(output: str | os.PathLike[str] | None, force: bool, source: Source) -> Path | None:
    """Where a live model is to be written; None for nowhere.

    Raises:
        OutputError: if it could not.
    """
    if output is None:
        return None
    if not isinstance(output, (str, os.PathLike)):
        raise OutputError(f"The output is {output!r}: expected a path.")
    target = Path(output)
    if family(target) is None:
        raise OutputError(f"'{target}' ends in neither .keras nor .h5, and the suffix decides what is written.")
    check_target(target.absolute(), force, False, source.size)
    return target


def _with_facts(path: Path, facts: Mapping[str, Any]) -> Path:
    """A `.keras` file whose metadata hold the facts, beside the old one."""
    made = path.with_name(f"{path.stem}_with_facts.keras")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename == "metadata.json":
                data = json.dumps({**json.loads(data), "kmerge": facts}).encode()
            new.writestr(member, data)
    return made
