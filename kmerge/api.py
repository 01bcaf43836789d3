"""What scripts call: `combine`, `merge_models`, `fine_tune`, `add_head`, `inspect`, `compare`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.adding import add_head_to
from kmerge.agreement import warnings
from kmerge.conversion import convert_model, convert_path
from kmerge.custom import import_custom, import_lambdas
from kmerge.dialects.reading import Dialect
from kmerge.errors import PlanError
from kmerge.job import check_output, prepare, shared_places, write
from kmerge.layout import lay_out
from kmerge.plan import Plan, Role
from kmerge.progress import Progress, silent
from kmerge.report.comparison import Comparison, compare_sources
from kmerge.report.conversion import Conversion
from kmerge.report.facts import Report
from kmerge.report.inspection import Inspection, inspect_source
from kmerge.rules import Rules
from kmerge.running import run_models
from kmerge.source import open_source
from kmerge.tune import Settings, Tuning
from kmerge.tuning import fine_tune_model
from kmerge.workspace import Sources, Workspace, is_h5, listed, size_of, target_of


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
    data: Any = None,
    samples: int | None = None,
    width: float = 1.0,
    keep: float | None = None,
    freeze: bool = False,
    seed: int = 0,
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
        method: "auto" (the mean for sources with a common ancestor, else "fuse"), or a name from `kmerge methods`.
        option: of the method, by name.
        weights: importance per source, at least 0, normalised to sum 1; default equal.
        base: a model that gives the architecture to files with weights only.
        data: unlabelled calibration inputs, on which methods such as "fuse" run the sources, and on which the agreement
            of each head with its source is measured: a path (`.npz`, `.npy`), arrays by position or by name, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, an iterable of batches; or a dictionary of these by label.
            Without them, methods that need inputs make some up.
        samples: how many of them to use, at least 8; default 2,000, or all where there are fewer. For large
            models of inputs of fixed sizes, so many that one pass of all takes 2**39 multiply-adds, but at least 256.
        width: of the trunk, as a multiple of a source's, 0.25 to 8; other than 1 only with "fuse".
        keep: choose the largest trunk whose every head agrees with its source this well, above 0 and at most 1.
        freeze: save shared layers with `trainable` false.
        seed: of everything random: which inputs are drawn or made up, in which order units are visited.
        plan: a plan, or a file with one (also a merged model), instead of the rules above.
        roles: patterns with "shared" or "private" in one list, the later one wins; instead of `share` and `private`.
        dry_run: decide and report, but write nothing.
        force: replace an existing output.
        progress: called with what is done and what is to do in all: steps of the calibration where there is one, then
            bytes.

    Returns:
        The report; `to_dict()` is what `kmerge combine --json` prints.

    Raises:
        KmergeError: with what happened and how to go on. Nothing is written then.
    """
    started = time.perf_counter()
    sources = listed(sources)
    rules = Rules(
        labels=labels,
        trunk=trunk,
        roles=_roles(labels, share, private, roles),
        inputs=inputs,
        outputs=outputs,
        method=method,
        options={} if option is None else option,
        weights=weights,
        freeze=freeze,
        width=width,
        keep=keep,
        seed=seed,
        samples=samples,
        data=data,
    )
    _check_types(rules)
    with ExitStack() as stack:
        work = Workspace(stack)
        target = target_of(output, work.peek(sources))
        opened = work.open(sources, rules, base, target)
        work.protect(target, plan, data)
        job = prepare(opened, rules, plan, isinstance(sources, Mapping), work, dry_run, target)
        if not dry_run:
            check_output(job, target, force)
            job = run_models(job, work, progress or silent)
            job = write(job, target, work, force, progress or silent)
            size = size_of(target)
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
    data: Any = None,
    samples: int | None = None,
    width: float = 1.0,
    keep: float | None = None,
    freeze: bool = False,
    seed: int = 0,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    roles: Sequence[tuple[str, Role]] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Merge models and hand back one live `keras.Model`, not compiled.

    Args:
        sources: paths or live models, at least two; a dictionary gives their labels.
        custom_objects: classes of custom layers, as for `keras.saving.load_model`; those of live models are known.
        labels, trunk, share, private, inputs, outputs, method, option, weights, base, data, samples, width, keep,
            freeze, seed, plan, roles, progress: as for `combine`.

    Returns:
        The merged model. The sources are left as they are.

    Raises:
        KmergeError: with what happened and how to go on.
    """
    sources = listed(sources)
    rules = Rules(
        labels=labels,
        trunk=trunk,
        roles=_roles(labels, share, private, roles),
        inputs=inputs,
        outputs=outputs,
        method=method,
        options={} if option is None else option,
        weights=weights,
        freeze=freeze,
        width=width,
        keep=keep,
        seed=seed,
        samples=samples,
        data=data,
    )
    _check_types(rules)
    with ExitStack() as stack:
        work = Workspace(stack)
        values = work.peek(sources)
        models = [value for value in values.values() if live.is_model(value)]
        suffix = ".h5" if not models and all(is_h5(value) for value in values.values()) else ".keras"
        target = work.folder / f"merged{suffix}"
        opened = work.open(sources, rules, base, target)
        for source in opened:
            if source.graph is None:
                raise PlanError(
                    f"'{source.name}' holds no graph, so there is no model to hand back: use kmerge.combine, "
                    "or give the "
                    "architecture with base=."
                )
        if not work.trusted:
            for source in opened:
                live.check_runs_no_code(source.model, source.name)
            opened = work.to_run(opened)
            if opened[0].dialect is Dialect.KERAS3:
                target = target.with_suffix(".keras")
        job = prepare(opened, rules, plan, isinstance(sources, Mapping), work, target=target)
        job = run_models(job, work, progress or silent, custom_objects)
        job = write(job, target, work, True, progress or silent)
        fused = job.plan.calibration is not None
        notes = [*warnings(job.agreement, fused), *job.plan.notes, *job.notes]
        for note in notes:
            logging.getLogger("kmerge").warning(note)
        model = live.load_model(target, "the merged model", work.custom_objects(custom_objects), work.trusted)
        if job.plan.freeze and job.merged is not None:
            live.freeze(model, shared_places(job.merged))
        live.remember(model, job.stored())
        return model


def convert(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    lambda_: Mapping[str, Any] | None = None,
    custom: Sequence[str] | Mapping[str, Any] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a model file of any age to one that current Keras opens, and that computes the same.

    Keras is not imported and nothing in the file is run, unless `lambda_` or `custom` ask for modules of the caller's.

    Args:
        old: a whole model: `.h5` or `.keras`, written by any Keras from 1.0 on or by tf.keras.
        new: where to write; `.keras`, or `.h5` for the old format, decide by suffix; none for a folder.
        lambda_: what stands in for each Lambda layer, by its name: `"MODULE:FUNCTION"`, or the object itself: a
            `keras.layers.Layer` class, a layer, or a function registered with Keras.
        custom: modules that register custom layers with Keras; or the classes themselves, by name.
        force: replace an existing output.
        progress: called with the bytes done and to do.

    Returns:
        The report; `to_dict()` is what `kmerge convert --json` prints.

    Raises:
        KmergeError: with what happened and how to go on. Nothing is written then.
    """
    lambdas = import_lambdas(lambda_ or {})
    objects = import_custom(custom)
    paths = convert_path(old, "old file"), convert_path(new, "output")
    return convert_model(*paths, lambdas, objects, force, progress or silent)


def fine_tune(
    model: Any,
    data: Any = None,
    teachers: Sources | None = None,
    *,
    labels: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    train: str | None = None,
    loss: Any = None,
    metrics: Any = None,
    loss_weights: Any = None,
    epochs: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    optimizer: Any = None,
    temperature: float | None = None,
    features: float = 0.0,
    trunk_rate: float = 1.0,
    layer_decay: float = 1.0,
    adapters: int | None = None,
    batch_norm: str = "auto",
    mix: Mapping[str, float] | None = None,
    validation_split: float = 0.1,
    patience: int | None = None,
    pairs: int | None = None,
    samples: int | None = None,
    cache: float = 4096,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
    every: float = 60.0,
    tensorboard: str | os.PathLike[str] | None = None,
    mixed_precision: bool = False,
    jit: bool | None = None,
    callbacks: Sequence[Any] = (),
    columns: Sequence[str] | None = None,
    label_columns: Mapping[str, str] | None = None,
    pixels: tuple[float, float] | None = None,
    seed: int = 0,
    custom_objects: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Tuning:
    """Train a merged model: healed by its sources, without labels; or with labels, a loss for each head.

    A copy is trained by an ordinary `compile` and `fit`; the model that is given stays as it is. The best state on
    held-back rows is kept. Healing never hands back a model that agrees less with its sources than the one it was
    given; training with labels says so where its model does worse.

    Args:
        model: path of a model, or a live `keras.Model`, merged or not.
        data: rows with labels, or, where sources teach, inputs alone: anything that `kmerge.combine` takes as data,
            with labels as `(x, y)`, `(x, y, weights)` or under `y` and `y_<label>`; or a dictionary of these by label,
            of which each head learns from its own and batches are mixed. Labels that are NaN, −1 (for classes) or
            absent do not count. None makes inputs up, where sources teach.
        teachers: the sources, as paths or live models, by label or in the order of the heads.
        labels: of the heads, where the model does not say.
        output: where to write the result (`.keras` or `.h5`).
        train: "all", "heads", or "last:K", heads and the last K layers of the trunk; default: what the model's layers
            say. A BatchNormalization that does not move is in inference mode; dropout is not.
        loss, metrics: by head, or for all; default: what each source was trained with.
        loss_weights: numbers by head, "equal", "uncertainty", "gradnorm" or "pcgrad".
        epochs: passes over the data, of the longest where there are several; default 12, and more where these are few
            steps.
        minutes: time from the call on, and over all calls that resume it, after which it ends; without epochs, as many
            as fit. More of them, with `resume`, let it go on.
        batch_size: rows of a batch, of all heads together; default 64.
        learning_rate: the highest; it rises over the first steps and falls along half a cosine. Default 0.001, and in
            healing less where the start agrees well already, down to 0.0001.
        optimizer: name or Keras optimizer; default Adam, and where sources teach Muon (arXiv:2502.16982) for those
            kernels of the trunk for which its steps cost little. The object that is given is not changed.
        temperature: of the distillation; default 4; infinity matches logits.
        features: weight of matching the features of each source's trunk, through a linear map of its own.
        trunk_rate, layer_decay: factors on the rate in the trunk, and for each layer further from the heads.
        adapters: rank of low-rank adapters in place of the heads' kernels, merged into these in the end.
        batch_norm: "auto", "fixed" (statistics stay) or "moving".
        mix: rows of a batch by head, as a ratio; default equal.
        validation_split: share of the rows to hold back.
        patience: epochs without a better state after which it ends.
        pairs: where sources teach, rows made of pairs of the given ones for each of them and pass; default 3 where
            there are few rows, none from 32,000 on.
        samples: how many inputs to make up.
        cache: megabytes on disk for inputs and what the teachers give on them, at most.
        checkpoints: folder for the state of the training; with `resume` it goes on from there, and ends with the same
            weights as without the interruption (data that shuffle by themselves aside). The log of the epoch in which
            it was interrupted is of the rest of it.
        every: seconds between two checkpoints within an epoch; there is one at the end of each in any case.
        tensorboard: folder for TensorBoard's logs.
        mixed_precision: compute in bfloat16.
        jit: compile with XLA.
        callbacks: Keras callbacks; their own state is not resumed.
        columns: of a table: the features by name, in the order of the training; default all that are not labels.
        label_columns: of a table: the column with the labels of each head, beside `y` and `y_<label>`.
        pixels: of image files: values of black and white; default 0 and 255 where the model rescales its input
            itself, else 0 and 1.
        seed: of everything random.
        custom_objects: classes of custom layers, as for `keras.saving.load_model`.
        force: replace an existing output, and the checkpoint of another training.
        progress: called with steps done and to do in all.
        log: called with a line per epoch.

    Returns:
        The tuning: `model` is the trained one, not compiled; `history`, and agreement before and after.

    Raises:
        KmergeError: with what happened and how to go on. Nothing is written then but checkpoints.
    """
    settings = Settings(
        train=train,
        loss=loss,
        metrics=metrics,
        loss_weights=loss_weights,
        epochs=epochs,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        temperature=temperature,
        features=features,
        trunk_rate=trunk_rate,
        layer_decay=layer_decay,
        adapters=adapters,
        batch_norm=batch_norm,
        mix=mix,
        validation_split=validation_split,
        patience=patience,
        pairs=pairs,
        samples=samples,
        cache=cache,
        checkpoints=None if checkpoints is None else Path(checkpoints),
        resume=resume,
        force=force,
        every=every,
        tensorboard=None if tensorboard is None else Path(tensorboard),
        mixed_precision=mixed_precision,
        jit=jit,
        callbacks=tuple(callbacks),
        columns=columns,
        label_columns=label_columns or {},
        pixels=pixels,
        seed=seed,
        say=log or logging.getLogger("kmerge").info,
    )
    tuning = fine_tune_model(
        model,
        data,
        teachers,
        labels=labels,
        output=output,
        force=force,
        settings=settings,
        custom_objects=custom_objects,
        progress=progress or silent,
    )
    if log is None:
        for text in (*tuning.warnings, *tuning.notes):
            logging.getLogger("kmerge").warning(text)
    return tuning


def add_head(
    model: Any,
    head: Any,
    label: str,
    *,
    at: str | tuple[str, int] | None = None,
    output: str | os.PathLike[str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Any:
    """A model with one more head on its trunk; all that was there stays as it is, and the new head is still to learn.

    Args:
        model: path of a model, or a live `keras.Model`, merged or not; it is not changed.
        head: how many classes the new head tells apart (1 for yes or no), which makes a Dense layer with a softmax
            (sigmoid), behind a global average where the trunk ends in places; or a Keras layer, or a model with one
            input and one output, of which a copy is taken with its weights.
        label: of the new head; its output stands under this name in the dictionary of outputs.
        at: layer whose output the head reads, and where that is called several times, which call, counted from 0; by
            default where the heads that are there part.
        output: where to write the result (`.keras` or `.h5`), with the facts of the merge.
        custom_objects: classes of custom layers, as for `keras.saving.load_model`.
        force: replace an existing output.

    Returns:
        An ordinary `keras.Model`, not compiled, with a dictionary of outputs by label.

    Raises:
        PlanError: the label or a name is taken, or there is no single place where the heads part.
        KmergeError: with what happened and how to go on.
    """
    return add_head_to(model, head, label, at=at, output=output, force=force, custom_objects=custom_objects)


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
    sources = listed(sources)
    with ExitStack() as stack:
        work = Workspace(stack)
        opened = work.open(sources, Rules(labels=labels), None, None)
        if len(opened) < 2:
            raise PlanError(f"A comparison needs at least two sources: {len(opened)} given.")
        return compare_sources(lay_out(opened))


def _roles(
    labels: Sequence[str] | None, share: Sequence[str], private: Sequence[str], roles: Sequence[tuple[str, Role]] | None
) -> tuple[tuple[str, Role], ...]:
    """Patterns and the roles they give, in order."""
    for name, value in (("share", share), ("private", private), ("labels", labels)):
        if isinstance(value, str):
            raise PlanError(f"{name} is one text, '{value}': give a list.")
        if value is not None and not isinstance(value, Iterable):
            raise PlanError(f"{name} is {value!r}: give a list of texts.")
    if roles is None:
        return (*((pattern, "shared") for pattern in share or ()), *((pattern, "private") for pattern in private or ()))
    if share or private:
        raise PlanError("roles is given together with share or private: give one of them.")
    if not isinstance(roles, Iterable) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in roles):
        raise PlanError(f"roles is {roles!r}: expected a list of pairs of pattern and role.")
    return tuple((pattern, role) for pattern, role in roles)


def _check_types(rules: Rules) -> None:
    for name in ("trunk", "inputs", "outputs", "method"):
        if not isinstance(getattr(rules, name), str):
            raise PlanError(f"--{name} is {getattr(rules, name)!r}: expected a text.")
    if not isinstance(rules.options, Mapping):
        raise PlanError(f"option is {rules.options!r}: expected a dictionary of option and value.")
