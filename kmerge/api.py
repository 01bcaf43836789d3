"""What scripts call: `combine`, `merge_models`, `inspect`, `compare`."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.assembly import Assembly, assemble, assemble_flat
from kmerge.dialects.reading import Dialect
from kmerge.engine import merge_tensors
from kmerge.errors import MergeError, OutputError, PlanError, UnrelatedError
from kmerge.graph import layer_order
from kmerge.layout import Layout, lay_out
from kmerge.output import create_output
from kmerge.plan import Plan, Role, SourceFacts, is_there, read_plan
from kmerge.planning import check_plan, make_plan, source_facts
from kmerge.progress import Progress, silent
from kmerge.report.comparison import Comparison, compare_sources
from kmerge.report.facts import Report, flat_sizes, layer_sizes, merge_sizes
from kmerge.report.inspection import Inspection, inspect_source, old_hard_sigmoid, stored_merge
from kmerge.rules import Rules, unique_labels
from kmerge.similarity import Ancestry, ancestry, flat_cosines, layer_cosines
from kmerge.source import Source, open_source, stem
from kmerge.store import Kind, identify
from kmerge.store.target import check_target, copy_file
from kmerge.surgery import Merged, merge_graphs
from kmerge.version import __version__

SourceLike = Any
"""A path, or a live `keras.Model`."""
Sources = Sequence[SourceLike] | Mapping[str, SourceLike]


def combine(
    sources: Sources,
    output: str | os.PathLike[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    trunk: str = "auto",
    share: Sequence[str] = (),
    private: Sequence[str] = (),
    inputs: str = "shared",
    outputs: str = "heads",
    method: str = "auto",
    option: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    freeze: bool = False,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    roles: Sequence[tuple[str, Role]] | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Merge model files into one file, streamed, without importing a framework.

    Args:
        sources: paths of models (or live models) of one architecture, at least two; a dictionary gives their labels.
        output: where to write; default `merged` with the suffix of the first source's format, in the current folder.
            Its suffix decides the format; where that is not the sources' own, Keras converts.
        labels: names of the heads, one per source; default the files' stems, made unique.
        trunk: "auto" (everything up to the last layer with weights before each output), "all", "none", or a layer of
            the first source: everything up to and including it is shared.
        share, private: patterns (`*`, `?`, `[...]`) of layer names of the first source to share, or to keep per source;
            `private` wins over `share`, both over `trunk`.
        inputs: "shared", one input for all heads, or "separate", one per source.
        outputs: "heads", a dictionary by label; "list", in source order; "mean", their average as one output.
        method: "auto" (the mean for sources with a common ancestor), or a name that `kmerge methods` lists.
        option: of the method, by name.
        weights: importance per source, at least 0, normalised to sum 1; default equal.
        base: a model that gives the architecture to files with weights only.
        freeze: save shared layers with `trainable` false.
        plan: a plan, or a file with one (also a merged model), instead of the rules above.
        roles: patterns with "shared" or "private" in one list, the later one wins; instead of `share` and `private`.
        dry_run: decide and report, but write nothing.
        force: replace an existing output.
        progress: called with the bytes done and in all.

    Returns:
        The report; `to_dict()` is what `kmerge combine --json` prints.

    Raises:
        KmergeError: with what happened and how to go on. Nothing is written then.
    """
    started = time.perf_counter()
    sources = _listed(sources)
    rules = _rules(labels, trunk, share, private, roles, inputs, outputs, method, option, weights, freeze)
    with ExitStack() as stack:
        work = _Workspace(stack)
        target = _target(output, work.peek(sources))
        opened = work.open(sources, rules, base, target)
        work.protect(target, plan)
        job = _prepare(opened, rules, plan, isinstance(sources, Mapping), work.notes)
        if not dry_run:
            job = _write(job, target, work, force, progress or silent)
            size = _size(target)
        report = job.report(None if dry_run else str(target), 0 if dry_run else size, time.perf_counter() - started)
    return report


def merge_models(
    sources: Sources,
    *,
    labels: Sequence[str] | None = None,
    trunk: str = "auto",
    share: Sequence[str] = (),
    private: Sequence[str] = (),
    inputs: str = "shared",
    outputs: str = "heads",
    method: str = "auto",
    option: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    freeze: bool = False,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    roles: Sequence[tuple[str, Role]] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Merge models and hand back one live `keras.Model`, not compiled.

    Args:
        sources: paths or live models, at least two; a dictionary gives their labels.
        custom_objects: classes of custom layers, as for `keras.saving.load_model`; those of live models are known.
        labels, trunk, share, private, inputs, outputs, method, option, weights, base, freeze, plan, roles, progress: as
            for `combine`.

    Returns:
        The merged model. The sources are left as they are.

    Raises:
        KmergeError: with what happened and how to go on.
    """
    sources = _listed(sources)
    rules = _rules(labels, trunk, share, private, roles, inputs, outputs, method, option, weights, freeze)
    with ExitStack() as stack:
        work = _Workspace(stack)
        values = work.peek(sources)
        models = [value for value in values.values() if live.is_model(value)]
        suffix = ".h5" if not models and all(_is_h5(value) for value in values.values()) else ".keras"
        target = work.folder / f"merged{suffix}"
        opened = work.open(sources, rules, base, target)
        for source in opened:
            if source.graph is None:
                raise PlanError(
                    f"'{source.name}' holds no graph, so there is no model to hand back: use kmerge.combine, "
                    "or give the "
                    "architecture with base=."
                )
        trusted = len(models) == len(opened)
        if not trusted:
            for source in opened:
                live.check_runs_no_code(source.model, source.name)
        job = _write(
            _prepare(opened, rules, plan, isinstance(sources, Mapping), work.notes),
            target,
            work,
            True,
            progress or silent,
        )
        changed = [(source.label, layers) for source in job.sources if (layers := old_hard_sigmoid(source))]
        notes = [*job.plan.notes, *job.notes, *(_changed_meaning(label, layers) for label, layers in changed)]
        for note in notes:
            logging.getLogger("kmerge").warning(note)
        known = {**live.custom_objects_of(models), **(custom_objects or {})}
        model = live.load_model(target, "the merged model", known, trusted)
        if job.plan.freeze and job.merged is not None:
            live.freeze(model, _shared_places(job.merged))
        return model


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """What is in a file: writer, layers, shapes, roles of an earlier merge, hazards. Reads no weights.

    Raises:
        KmergeError: if it is no model file, or not a safe one.
    """
    with open_source(path) as source:
        return inspect_source(source)


def compare(sources: Sources, *, labels: Sequence[str] | None = None) -> Comparison:
    """Whether models are one network, share an ancestor, how similar each layer is, and where a trunk can end.

    Args:
        sources: paths or live models, at least two.
        labels: names of the sources; default their files' stems.

    Raises:
        KmergeError: if one cannot be opened, or holds no graph.
    """
    sources = _listed(sources)
    with ExitStack() as stack:
        work = _Workspace(stack)
        opened = work.open(sources, Rules(labels=labels), None, None)
        if len(opened) < 2:
            raise PlanError(f"A comparison needs at least two sources: {len(opened)} given.")
        return compare_sources(lay_out(opened))


def _rules(
    labels: Sequence[str] | None,
    trunk: str,
    share: Sequence[str],
    private: Sequence[str],
    roles: Sequence[tuple[str, Role]] | None,
    inputs: str,
    outputs: str,
    method: str,
    option: Mapping[str, Any] | None,
    weights: Sequence[float] | None,
    freeze: bool,
) -> Rules:
    for name, value in (("share", share), ("private", private), ("labels", labels)):
        if isinstance(value, str):
            raise PlanError(f"{name} is one text, '{value}': give a list.")
        if value is not None and not isinstance(value, Iterable):
            raise PlanError(f"{name} is {value!r}: give a list of texts.")
    for name, value in (("trunk", trunk), ("inputs", inputs), ("outputs", outputs), ("method", method)):
        if not isinstance(value, str):
            raise PlanError(f"--{name} is {value!r}: expected a text.")
    if option is not None and not isinstance(option, Mapping):
        raise PlanError(f"option is {option!r}: expected a dictionary of option and value.")
    pairs: list[tuple[str, Any]]
    if roles is None:
        pairs = [
            *((pattern, "shared") for pattern in share or ()),
            *((pattern, "private") for pattern in private or ()),
        ]
    elif share or private:
        raise PlanError("roles is given together with share or private: give one of them.")
    elif isinstance(roles, Iterable) and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in roles):
        pairs = [(pattern, role) for pattern, role in roles]
    else:
        raise PlanError(f"roles is {roles!r}: expected a list of pairs of pattern and role.")
    return Rules(labels, trunk, tuple(pairs), inputs, outputs, method, dict(option or {}), weights, freeze)


# ------------------------------------------------------------------------------------------------------ opening


def _listed(sources: Any) -> Sources:
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


class _Workspace:
    """Temporary files of one run, and the sources that it opened."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._folder: Path | None = None
        self._inputs: list[Path] = []
        self.notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kmerge-")))
        return self._folder

    def peek(self, sources: Sources) -> dict[str, SourceLike]:
        """The sources by provisional labels."""
        if isinstance(sources, Mapping):
            return dict(sources)
        values = list(sources)
        names = [str(value.name) if live.is_model(value) else stem(value) for value in values]
        return dict(zip(unique_labels(names), values, strict=True))

    def open(self, sources: Sources, rules: Rules, base: Any, target: Path | None) -> list[Source]:
        """Every source opened in one format and dialect; what is in another one goes through Keras."""
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

    def _open(self, value: SourceLike, label: str, base: Source | None) -> Source:
        if live.is_model(value):
            path = live.save_model(value, self._subfolder(), "model")
            source = replace(open_source(path, label), name=str(value.name), path=None)
        elif isinstance(value, (str, os.PathLike)):
            source = open_source(value, label, base)
            self._inputs += source.files
        else:
            raise PlanError(f"The source '{label}' is a {type(value).__name__}: expected a path or a Keras model.")
        self._stack.callback(source.close)
        return source

    def protect(self, target: Path, plan: Any) -> None:
        """No input is ever changed: not a source, a part of one, the base or the plan.

        Raises:
            OutputError: if the output is one of them, or would stand inside one.
        """
        plans = [Path(plan)] if isinstance(plan, (str, os.PathLike)) else []
        try:
            place = target.resolve()
        except (OSError, ValueError):
            return  # no name that a file can have: writing will say so
        for path in (*self._inputs, *(path for path in plans if is_there(path))):
            if place == path.resolve() or (path.is_dir() and path.resolve() in place.parents):
                what = "the plan" if path in plans else "one of the sources, or a part of one"
                raise OutputError(
                    f"'{target}' is {what} ('{path.name}'): inputs are never changed. Give another output with -o."
                )

    def _subfolder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _unify(self, opened: list[Source], target: Path | None) -> list[Source]:
        """Sources as they are if they are of one format and dialect and the target is too; else all as `.keras`."""
        if any(source.graph is None for source in opened):
            return opened
        dialects = {source.dialect for source in opened}
        wanted = _family(target) if target is not None else None
        if len(dialects) == 1 and (wanted is None or wanted == (opened[0].dialect is Dialect.KERAS3)):
            return opened
        if target is not None and all(source.dialect is Dialect.KERAS3 for source in opened):
            return opened
        for source in opened:
            layers = old_hard_sigmoid(source)
            if layers:
                self.notes += (_changed_meaning(source.label, layers),)
        return [source if source.dialect is Dialect.KERAS3 else self._converted(source) for source in opened]

    def _converted(self, source: Source) -> Source:
        if source.path is None:
            raise MergeError(f"The live model '{source.label}' cannot be brought into one format with the others.")
        path = live.convert_file(source.path, source.model, self._subfolder(), "model")
        again = open_source(path, source.label)
        self._stack.callback(again.close)
        note = f"converted from {source.kind.value} by Keras"
        return replace(
            again, name=source.name, size=source.size, training=source.training, warnings=(*source.warnings, note)
        )


def _shared_places(merged: Merged) -> list[int]:
    """Places of the shared layers in `model.layers`: custom layers may not keep their names."""
    order = [number for number in layer_order(merged.graph) if not merged.graph.layers[number].is_operation]
    return [place for place, number in enumerate(order) if merged.layers[number].role == "shared"]


def _changed_meaning(label: str, layers: Sequence[str]) -> str:
    return (
        f"'{label}': {', '.join(layers[:3])} compute hard_sigmoid as Keras 2 did; in current Keras it is another "
        "function, so that predictions differ a little"
    )


def _is_h5(value: SourceLike) -> bool:
    return not live.is_model(value) and isinstance(value, (str, os.PathLike)) and identify(Path(value)) is Kind.H5


def _family(target: Path) -> bool | None:
    """Whether a path asks for Keras 3's own format (True) or the old one (False); None where it asks for neither."""
    if target.name.endswith((".weights.h5", ".weights.json")):
        return None
    if target.suffix == ".keras":
        return True
    return False if target.suffix in (".h5", ".hdf5") else None


def _target(output: str | os.PathLike[str] | None, values: Mapping[str, SourceLike]) -> Path:
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


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size


# ------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True)
class _Job:
    """A decided merge."""

    sources: tuple[Source, ...]
    plan: Plan
    merged: Merged | None
    assembly: Assembly
    ancestry: Ancestry | None
    notes: tuple[str, ...] = ()

    def stored(self) -> dict[str, Any]:
        """What the result holds about how it came to be."""
        layers: dict[str, dict[str, str]] = {}
        if self.merged:
            for layer, origin in zip(self.merged.graph.layers, self.merged.layers, strict=True):
                private = {"source": self.sources[origin.members[0][0]].label} if origin.role == "private" else {}
                layers[layer.name] = {"role": origin.role, **private}
        return {"kmerge": __version__, "plan": self.plan.to_dict(), "layers": layers}

    def report(self, output: str | None, size: int, seconds: float) -> Report:
        sizes = merge_sizes(self.merged, self.sources) if self.merged else flat_sizes(self.sources)
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
            **sizes,
        )


def _prepare(sources: list[Source], rules: Rules, given: Any, named: bool, notes: tuple[str, ...]) -> _Job:
    """Everything up to the first byte."""
    flat = any(source.graph is None for source in sources)
    found: Ancestry | None = None
    if given is not None:
        plan, sources = _given_plan(given, sources, rules, named)
    elif rules.method == "auto":
        plan = make_plan(sources, replace(rules, method="mean"), __version__)
        found = _look_for_ancestor(sources, plan, flat)
        if found is not None and found.related is None and any(layer.method for layer in plan.layers):
            notes += (
                "no common kernels tell whether the sources share an ancestor: their mean was taken unseen, so compare "
                "the merged model with its sources",
            )
    else:
        plan = make_plan(sources, rules, __version__)
    if flat:
        return _Job(tuple(sources), plan, None, assemble_flat(sources, plan), found, notes)
    if any(layer.method == "align" for layer in plan.layers):
        sources = _aligned(sources, plan)
    merged = merge_graphs(lay_out(sources), plan)
    return _Job(tuple(sources), plan, merged, assemble(merged, sources), found, notes)


def _aligned(sources: Sequence[Source], plan: Plan) -> list[Source]:
    """The sources with their units brought into one order."""
    from kmerge.align import align_by_weights, permuted
    from kmerge.spaces import layout_spaces

    layout = lay_out(sources)
    shared = [number for number, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
    seed = next(int(layer.options.get("seed", 0)) for layer in plan.layers if layer.method == "align")
    alignment = align_by_weights(layout, layout_spaces(layout, shared), shared, plan.weights, seed)
    return [permuted(source, alignment) for source in sources]


def _given_plan(given: Any, sources: list[Source], rules: Rules, named: bool) -> tuple[Plan, list[Source]]:
    """A plan from outside and the sources in its order, under their labels.

    Raises:
        PlanError: if it is for other sources, or the files stand in another order.
    """
    if rules != Rules(labels=rules.labels):
        raise PlanError("A plan is given together with other rules: the plan decides everything. Leave the rules out.")
    plan = _plan_of(given)
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


def _plan_of(given: Any) -> Plan:
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


def _look_for_ancestor(sources: Sequence[Source], plan: Plan, flat: bool) -> Ancestry:
    """Whether averaging makes sense here.

    Raises:
        UnrelatedError: if the sources share no ancestor: their mean would lose what they know.
    """
    if flat:
        found = ancestry(flat_cosines(sources))
    else:
        layout: Layout = lay_out(sources)
        shared = {layer.name for layer in plan.layers if layer.method}
        graph = sources[0].graph
        assert graph is not None
        found = ancestry(layer_cosines(layout, [n for n, layer in enumerate(graph.layers) if layer.name in shared]))
    if found.related is False:
        raise UnrelatedError(
            f"These models do not share an ancestor: the cosine of their trunks' weights is {found.cosine:.2f} "
            "(1 is equal, 0 is unrelated). A mean of unrelated trunks loses what each of them knows, though it looks "
            "like a model.\n"
            "If you want it all the same, say so with --method mean; --method align brings their units into one order "
            "first, which helps but does not make them one; --trunk none keeps every source whole in one file, and "
            "--method pick takes one source's trunk."
        )
    return found


def _write(job: _Job, target: Path, work: _Workspace, force: bool, progress: Progress) -> _Job:
    """Stream the job into its target; returns the job with the sources' digests in its plan."""
    _check_target(job, target)
    wanted = _family(target)
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


def _write_through_keras(job: _Job, target: Path, work: _Workspace, force: bool, progress: Progress) -> _Job:
    """`.keras` sources into an old `.h5`: merged as they are, then saved by Keras."""
    for source in job.sources:
        live.check_runs_no_code(source.model, source.name)
    check_target(target.absolute(), force, False, job.assembly.layout.nbytes)
    middle = work.folder / "merged.keras"
    finished = _write(job, middle, work, True, progress)
    final = work.folder / "merged.h5"
    text = json.dumps(finished.stored())
    live.write_as_h5(middle, final, text)
    copy_file(final, target.absolute(), force)
    return finished


def _check_target(job: _Job, target: Path) -> None:
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
    if job.merged is None and kind in (Kind.KERAS, Kind.FOLDER) and _family(target) is False:
        raise OutputError(
            f"A subclassed model can only be written in its own format: name the output .keras, not '{target.name}'."
        )
    if job.merged is None and kind in (Kind.H5, Kind.H5_WEIGHTS) and _family(target) is True:
        raise OutputError(
            f"Without a graph, .h5 files can only be merged into .h5: '{target.name}' is named otherwise."
        )
