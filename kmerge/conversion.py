"""An old file to one that current Keras opens: decided, then written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.assembly import assemble
from kmerge.custom import registered_of, replacements_of
from kmerge.dialects.reading import Dialect
from kmerge.engine import merge_tensors
from kmerge.errors import FormatError, OutputError
from kmerge.graph import flatten
from kmerge.output import create_output
from kmerge.progress import Progress, silent
from kmerge.report.conversion import Conversion, explain_obstacles
from kmerge.source import Source, open_source
from kmerge.store import Kind
from kmerge.store.target import check_target
from kmerge.upgrade import Upgraded, alone, as_legacy, upgrade
from kmerge.upgrade.training import upgrade_training
from kmerge.version import __version__
from kmerge.workspace import Workspace, family, size_of


def convert_model(
    old: Path,
    new: Path,
    lambdas: Mapping[str, Any],
    objects: Mapping[str, Any],
    force: bool,
    progress: Progress = silent,
) -> Conversion:
    """Convert one file.

    Args:
        old, new: paths; the suffix of `new` decides the format, `.keras` or `.h5`.
        lambdas: live layers, or functions, that stand in for Lambdas, by the Lambda's name.
        objects: classes and functions of the user's, by the name under which Keras registered them.
        force: replace an existing output.
        progress: told the bytes.

    Raises:
        KmergeError: with what happened and how to go on.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(old))
        work = Workspace(stack)
        work.claim(source)
        work.protect(new, None)
        legacy = family(new) is False
        if not legacy and family(new) is not True and new.suffix:
            raise OutputError(f"'{new.name}' tells no format: give a name that ends in .keras or .h5.")
        check_target(new.absolute(), force, not new.suffix, source.size)
        replacements, own = replacements_of(lambdas, _lambdas_of(source))
        upgraded = upgrade(source, replacements, registered_of(objects))
        objects = {**objects, **own}
        if upgraded.obstacles:
            raise FormatError(explain_obstacles(source.name, upgraded.obstacles))
        upgraded, notes, carried = _with_training(source, upgraded)
        notes = [*upgraded.notes, *notes]
        through_keras = not legacy and _has_custom(upgraded)
        target = work.folder / "middle.h5" if through_keras else new
        facts = {"file": source.name, "version": source.version, "backend": source.backend}
        written = as_legacy(upgraded) if legacy or through_keras else upgraded.source
        if not new.suffix and not through_keras:
            written = replace(written, kind=Kind.FOLDER)
        assembly = assemble(alone(written), [written])
        if carried is not None and not through_keras:
            assembly = _compiled(assembly, carried)
        stored = {"kmerge": __version__, "converted": {**facts, "notes": notes}}
        with create_output(assembly, target, force, lambda: stored) as output:
            merge_tensors([written], assembly.targets, output, [1.0], progress)
        if through_keras:
            plain = {name.rpartition(">")[2]: value for name, value in objects.items()}  # as .h5 files name them
            live.rewrite(target, new, {**plain, **objects}, force)
        writer = f"Keras {source.version}" if source.version else "unknown"
        if source.backend:
            writer += f" ({source.backend})"
        assert written.graph is not None
        return Conversion(
            source=str(old),
            output=str(new),
            writer=writer,
            layers=len(written.graph.layers),
            parameters=written.num_parameters,
            training=carried is not None,
            bytes=size_of(new),
            seconds=time.perf_counter() - started,
            notes=tuple(dict.fromkeys(notes)),
        )


def _lambdas_of(source: Source) -> Mapping[str, Mapping[str, Any]]:
    """Settings of the Lambdas of a source, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    for layer in source.graph.layers if source.graph else ():
        if layer.class_name == "Lambda":
            found[layer.name] = layer.config
    return found


def _has_custom(upgraded: Upgraded) -> bool:
    graph = upgraded.source.graph
    return graph is not None and any(
        not str(layer.entry.get("module") or "").startswith("keras") for layer in graph.layers if not layer.is_input
    )


def _with_training(source: Source, upgraded: Upgraded) -> tuple[Upgraded, list[str], dict[str, Any] | None]:
    old, new = source.graph, upgraded.source.graph
    assert old is not None
    assert new is not None
    if source.dialect is Dialect.KERAS3 and not source.version.startswith("2"):
        training = source.training if isinstance(source.training, Mapping) else None
        return upgraded, [], dict(training) if training else None
    names = {
        old.layer_of(first).name: new.layer_of(second).name
        for first, second in zip(flatten(old.outputs), flatten(new.outputs), strict=True)
    }
    carried, notes = upgrade_training(source.training, names)
    if carried is not None:
        notes.append("the state of the optimizer was dropped: training goes on, with a fresh one")
    return upgraded, notes, carried


def _compiled(assembly: Any, carried: Mapping[str, Any]) -> Any:
    """The file with a training configuration."""
    if assembly.kind in (Kind.KERAS, Kind.FOLDER):
        return replace(assembly, config={**(assembly.config or {}), "compile_config": dict(carried)})
    groups = dict(assembly.layout.groups)
    plain = {("optimizer_config" if key == "optimizer" else key): value for key, value in carried.items()}
    if isinstance(plain["optimizer_config"], str):
        plain["optimizer_config"] = {"class_name": plain["optimizer_config"], "config": {}}
    groups[""] = {**groups[""], "training_config": json.dumps(plain)}
    return replace(assembly, layout=replace(assembly.layout, groups=groups))


def convert_path(value: Any, what: str) -> Path:
    """A path that a caller gave."""
    if not isinstance(value, (str, os.PathLike)):
        raise OutputError(f"The {what} is {value!r}: expected a path.")
    return Path(value)
