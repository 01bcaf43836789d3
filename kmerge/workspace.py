"""Sources as users give them, opened in one format and dialect, and the temporary files that this takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.dialects.reading import Dialect
from kmerge.errors import FormatError, OutputError, PlanError
from kmerge.plan import is_there
from kmerge.report.conversion import explain_obstacles
from kmerge.rules import Rules, unique_labels
from kmerge.source import Source, open_source, stem
from kmerge.store import Kind, identify
from kmerge.upgrade import as_legacy, is_outdated, upgrade

SourceLike = Any
"""A path, or a live `keras.Model`."""
Sources = Sequence[SourceLike] | Mapping[str, SourceLike]


def listed(sources: Any) -> Sources:
    """The sources as a list or a dictionary, whatever they are iterated from.

    Raises:
        PlanError: if they are a single one, or nothing that holds any.
    """
    if isinstance(sources, (str, os.PathLike)) or live.is_model(sources):
        raise PlanError("One source is given where a list of them is expected: a merge needs at least two.")
    if isinstance(sources, Mapping):
        return dict(sources)
    if not isinstance(sources, Iterable):
        raise PlanError(f"The sources are {type(sources).__name__}: expected a list of paths or Keras models.")
    return list(sources)


class Workspace:
    """Temporary files of one run, and the sources that it opened."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._folder: Path | None = None
        self._inputs: list[Path] = []
        self._models: list[Any] = []
        self._all_live = True
        self.notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kmerge-")))
        return self._folder

    @property
    def trusted(self) -> bool:
        """Whether all sources are the caller's own live models."""
        return self._all_live

    def custom_objects(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Classes of custom layers: those of the live models, and what the caller gave."""
        return {**live.custom_objects_of(self._models), **(given or {})}

    def claim(self, source: Source) -> None:
        """Count the files of a source among the inputs, which are never changed."""
        self._inputs += source.files

    def subfolder(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def peek(self, sources: Sources) -> dict[str, SourceLike]:
        """The sources by provisional labels."""
        if isinstance(sources, Mapping):
            return dict(sources)
        values = list(sources)
        names = [str(value.name) if live.is_model(value) else stem(value) for value in values]
        return dict(zip(unique_labels(names), values, strict=True))

    def open(self, sources: Sources, rules: Rules, base: Any, target: Path | None) -> list[Source]:
        """Every source opened in one format and dialect; what is in another one is brought to current Keras."""
        values = self.peek(sources)
        labels = list(values) if rules.labels is None else list(rules.labels)
        if len(labels) != len(values):
            raise PlanError(f"There are {len(labels)} labels for {len(values)} sources: give one per source.")
        with ExitStack() as bases:
            ground = None
            if base is not None:
                ground = bases.enter_context(open_source(base, "base"))
                self._inputs.append(Path(base))
            opened = [self._open(value, label, ground) for label, value in zip(labels, values.values(), strict=True)]
        if base is not None and not any(source.bound for source in opened):
            self.notes += ("the base is not used: every source has a graph of its own",)
        return self._unify(opened, target)

    def open_one(self, value: SourceLike, label: str) -> Source:
        """One model, in its own format."""
        return self._open(value, label, None)

    def _open(self, value: SourceLike, label: str, base: Source | None) -> Source:
        self._all_live &= live.is_model(value)
        if live.is_model(value):
            self._models.append(value)
            path = live.save_model(value, self.subfolder(), "model")
            source = replace(open_source(path, label), name=str(value.name), path=None)
        elif isinstance(value, (str, os.PathLike)):
            source = open_source(value, label, base)
            self._inputs += source.files
        else:
            raise PlanError(f"The source '{label}' is a {type(value).__name__}: expected a path or a Keras model.")
        self._stack.callback(source.close)
        return source

    def protect(self, target: Path, plan: Any, data: Any = None) -> None:
        """No input is ever changed: not a source, a part of one, the base, the plan or the data.

        Raises:
            OutputError: if the output is one of them, or would stand inside one.
        """
        plans = [Path(plan)] if isinstance(plan, (str, os.PathLike)) else []
        try:
            place = target.resolve()
        except (OSError, ValueError):
            return  # no name that a file can have: writing will say so
        files = [Path(item) for item in (data.values() if isinstance(data, Mapping) else [data]) if _is_path(item)]
        for path in (*self._inputs, *(path for path in (*plans, *files) if is_there(path))):
            if place == path.resolve() or (path.is_dir() and path.resolve() in place.parents):
                what = (
                    "the plan"
                    if path in plans
                    else "the data"
                    if path in files
                    else "one of the sources, or a part of one"
                )
                raise OutputError(
                    f"'{target}' is {what} ('{path.name}'): inputs are never changed. Give another output with -o."
                )

    def _unify(self, opened: list[Source], target: Path | None) -> list[Source]:
        """Sources as they are if they are of one format and dialect and the target is too; else all as `.keras`."""
        if any(source.graph is None for source in opened):
            return opened
        dialects = {(source.dialect, _before_keras3(source)) for source in opened}
        wanted = family(target) if target is not None else None
        if len(dialects) == 1 and (wanted is None or wanted == (opened[0].dialect is Dialect.KERAS3)):
            return opened
        if target is not None and len(dialects) == 1 and opened[0].dialect is Dialect.KERAS3:
            return opened
        current = [source.dialect is Dialect.KERAS3 and not _before_keras3(source) for source in opened]
        return [source if is_new else upgraded(source) for source, is_new in zip(opened, current, strict=True)]

    def to_run(self, opened: Sequence[Source], target: Path | None = None) -> list[Source]:
        """The sources in words that current Keras opens, and computes as their writers did.

        They are left as they are where it does already, and where layers of the user's own are known to Keras alone.
        A target named .h5 keeps them in that format.
        """
        if not any(is_outdated(source) for source in opened):
            return list(opened)
        found = [upgrade(source) for source in opened]
        kinds = {item.kind for one in found for item in one.obstacles}
        if kinds == {"custom"}:
            names = dict.fromkeys(item.layer for one in found for item in one.obstacles)
            self.notes += (
                f"custom layers ({', '.join(list(names)[:3])}) keep the sources from being upgraded: they are run as "
                "current Keras reads them",
            )
            return list(opened)
        for source, one in zip(opened, found, strict=True):
            if one.obstacles:
                raise FormatError(explain_obstacles(source.name, one.obstacles))
        if target is not None and family(target) is False:
            return [as_legacy(one) for one in found]
        return [one.source for one in found]


def _before_keras3(source: Source) -> bool:
    """Whether tf.keras 2.12 to 2.15 wrote a `.keras` file, in words of its own."""
    return source.version.startswith("2.")


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def upgraded(source: Source) -> Source:
    """A source of another dialect as a `.keras` file of current Keras would hold it.

    Raises:
        FormatError: if it holds code, or layers that are not Keras's own.
    """
    live.check_runs_no_code(source.model, source.name)
    found = upgrade(source)
    if found.obstacles:
        raise FormatError(explain_obstacles(source.name, found.obstacles))
    note = f"upgraded from {source.kind.value}"
    return replace(found.source, warnings=(*source.warnings, note))


def is_h5(value: SourceLike) -> bool:
    return not live.is_model(value) and isinstance(value, (str, os.PathLike)) and identify(Path(value)) is Kind.H5


def family(target: Path) -> bool | None:
    """Whether a path asks for Keras 3's own format (True) or the old one (False); None where it asks for neither."""
    if target.name.endswith((".weights.h5", ".weights.json")):
        return None
    if target.suffix == ".keras":
        return True
    return False if target.suffix in (".h5", ".hdf5") else None


def target_of(output: str | os.PathLike[str] | None, values: Mapping[str, SourceLike]) -> Path:
    if output is not None and not isinstance(output, (str, os.PathLike)):
        raise OutputError(f"The output is {output!r}: expected a path.")
    if output is not None:
        return Path(output)
    first = next(iter(values.values()), None)
    if first is None:
        raise PlanError("A merge needs at least two sources: 0 given.")
    if live.is_model(first):
        return Path("merged.keras")
    kind = identify(Path(first))
    usual = {
        Kind.H5: (".h5", ".hdf5"),
        Kind.H5_WEIGHTS: (".h5", ".hdf5"),
        Kind.WEIGHTS: (".weights.h5",),
        Kind.SHARDS: (".weights.h5",),
        Kind.KERAS: (".keras",),
        Kind.FOLDER: ("",),
    }[kind]
    name = Path(first).name
    return Path("merged" + next((suffix for suffix in usual if name.endswith(suffix)), usual[0]))


def size_of(path: Path) -> int:
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size
