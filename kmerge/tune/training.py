"""A training from end to end: an ordinary `compile` and `fit` of a copy, whose best state is handed back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.agreement import Agreement, percent
from kmerge.data import Dataset, Entry, Reading, generator, open_dataset, open_parts
from kmerge.data.dataset import Indexed
from kmerge.data.pipeline import for_keras
from kmerge.errors import KmergeError, MergeError, PlanError
from kmerge.live import one_line, quiet
from kmerge.progress import Progress
from kmerge.tune.agreeing import Agreeing, Loss
from kmerge.tune.checkpoint import NAME, State, forget, load_state, locked
from kmerge.tune.feed import Column, Feed, Part, column_of, count_rows, shares
from kmerge.tune.heads import heads_of, logits_of
from kmerge.tune.keeper import TIME_IS_UP, Course, Watch, make_keeper, put_values, values_of
from kmerge.tune.losses import distilled_loss, equal_decisions, masked_loss, masked_metric
from kmerge.tune.marking import mark_of
from kmerge.tune.moving import Plain, parts_of, rates, scaled_optimizer, set_moving
from kmerge.tune.muon import kernels_of, make_muon
from kmerge.tune.pairs import enriched
from kmerge.tune.processes import processes
from kmerge.tune.recorded import losses_of, metrics_of, training_of
from kmerge.tune.result import Tuning
from kmerge.tune.settings import Settings, check_heads
from kmerge.tune.stored import Budget
from kmerge.tune.student import make_student
from kmerge.tune.teachers import Passes, Taught, make_teachers, spread, taught
from kmerge.tune.workers import Workers, measured, predicted

EPOCHS, BATCH = 12, 64
STEPS, MOST_EPOCHS = 1000, 100
"""Fewer steps than these are made up for by more epochs."""
RATE, GENTLE, PER_GAP = 1e-3, 1e-4, 1e-2
"""The learning rate, what it is at least in healing, and how it grows with what agreement lacks: a good start is soon
undone by large steps, and a bad one needs them."""
TEMPERATURE = 4.0
WARM = 0.05
"""Share of the steps in which the learning rate rises."""
UNSEEN = 0.1
"""Share of calibration inputs that a merge is not fitted to, as `kmerge.fuse` draws them."""
CHECKED = 2000
"""Training rows on which agreement is measured where none are held back."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is to be trained.

    Attributes:
        copy: gives a new live copy at each call.
        entries: inputs that data are given for; of one source where inputs are separate.
        copies: how often the model takes them.
        labels: of the sources; none where they are not known.
        roles: "shared" or "private" per layer, where a merge recorded them.
        training: training configuration of each source, by label.
        trunk_ends: name of the layer in each source where its trunk ends, by label.
    """

    copy: Callable[[], Any]
    entries: tuple[Entry, ...]
    copies: int = 1
    labels: tuple[str, ...] = ()
    roles: Mapping[str, str] | None = None
    training: Mapping[str, Any] | None = None
    trunk_ends: Mapping[str, str] | None = None
    trunk_end: str = ""
    own_training: Mapping[str, Any] | None = None
    """Training configuration of the model itself, for heads whose source has none."""
    calibrated: tuple[int, int] | None = None
    """Rows and seed of the calibration of a merge, where its inputs were given."""
    channels_first: frozenset[int] = frozenset()
    """Numbers of the inputs whose channels stand before their positions."""


def tune(
    subject: Subject,
    data: Any,
    teachers: Mapping[str, Any],
    settings: Settings,
    folder: Path,
    progress: Progress,
    synthetic: bool = False,
) -> Tuning:
    """Train a copy of a model.

    Args:
        subject: the model.
        data: rows with labels, or without where there are teachers: anything that kmerge.data opens, or that by label.
        teachers: live copies of the sources by label; none: labels teach.
        settings: how.
        folder: for temporary files.
        progress: told the steps.
        synthetic: whether the inputs are made up.

    Raises:
        KmergeError: with what happened and how to go on.
    """
    with locked(settings.checkpoints if processes().is_first else None):
        return _Run(subject, data, teachers, settings, folder, progress, synthetic).tuned()


class _Run:
    """One training."""

    def __init__(
        self,
        subject: Subject,
        data: Any,
        teachers: Mapping[str, Any],
        settings: Settings,
        folder: Path,
        progress: Progress,
        synthetic: bool,
    ) -> None:
        self.subject, self.settings, self.folder, self.progress = subject, settings, folder, progress
        self.synthetic, self.healing = synthetic, bool(teachers)
        self.notes: list[str] = []
        self.processes = processes()
        self._check_processes()
        self.net = subject.copy()
        self.heads = heads_of(self.net, subject.labels)
        self.plain = Plain(subject.copy(), self.net)
        self.shapes = [tuple(tensor.shape) for tensor in self.net.outputs]
        labels = list(dict.fromkeys(head.label for head in self.heads))
        check_heads(settings, labels, [head.name for head in self.heads], self.healing)
        self.parts = parts_of(self.net, subject.roles)
        self.sets = self._opened(data)
        self.mark, self.state = self._checkpoint(teachers)
        self._freeze()
        if not self.healing:
            self.losses, self.plain_metrics = self._wanted()
        self.teachers: Any = self._teachers(teachers) if self.healing else None
        self.student = self._student()
        self.start = values_of(self.student.variables)

    def _check_processes(self) -> None:
        """Raises:
        PlanError: if the settings need what several processes cannot agree on.
        """
        settings, several = self.settings, self.processes
        if several.count == 1:
            return
        if settings.minutes is not None:
            raise PlanError("minutes are measured by each process for itself, and these would part: give epochs.")
        if several.engine == "tensorflow" and settings.weighting not in ("", "uncertainty"):
            raise PlanError(f"{settings.weighting} needs the gradients of all workers: give loss weights as numbers.")

    # ------------------------------------------------------------------------------------------------------- data

    def _opened(self, data: Any) -> dict[str, tuple[Passes, Passes | None]]:
        """Rows to learn from and rows that are held back, by label; "" for those of all heads."""
        labels = list(dict.fromkeys(head.label for head in self.heads))
        names = [head.name for head in self.heads]
        entries, settings = self.subject.entries, self.settings
        reading = Reading(not self.healing, True, settings.columns, settings.label_columns, settings.pixels)
        inputs = {name for entry in entries for name in entry.names}
        opened: dict[str, Dataset]
        if isinstance(data, Mapping) and bool(data) and set(map(str, data)) <= set(labels) - inputs:
            opened = {
                str(label): open_dataset(value, entries, names, reading, f" of '{label}'")
                for label, value in data.items()
            }
        else:
            opened = {label or "": part for label, part in open_parts(data, entries, names, reading).items()}
        if settings.mix and "" in opened:
            raise PlanError("mix is for data of each head by itself: give them by label, or leave mix out.")
        share, seed, drawn = self.settings.validation_split, self.settings.seed, self.subject.calibrated
        if share and drawn and list(opened) == [""] and isinstance(whole := opened[""], Indexed):
            return {"": _split_apart(whole, share, seed, *drawn)}
        return {label: part.split(share, seed) if share else (part, None) for label, part in opened.items()}

    def _is_late(self, share: float) -> bool:
        """Whether a share of the time that there is has passed."""
        minutes = self.settings.minutes
        return minutes is not None and time.perf_counter() - self.settings.started > 60 * minutes * share

    def _teachers(self, models: Mapping[str, Any]) -> Any:
        settings, ends = self.settings, self.subject.trunk_ends or {}
        if settings.features and not ends:
            raise PlanError(
                "features needs to know where each source's trunk ends: give a model file that kmerge merged and that "
                "shares a trunk, or leave features out."
            )
        features = {label: ends[label] for label in models if label in ends} if settings.features else {}
        teachers = make_teachers(models, self.heads, self.shapes, features, self.processes)
        budget, late = Budget(int(min(settings.cache * 2**20, 2**62))), self._is_late
        self.taught: dict[str, Taught] = {}
        for number, (label, (train, held)) in enumerate(self.sets.items()):
            places = [self.folder / f"{name}_{number}" for name in ("train", "held")]
            # What is held back comes first, for it is read in every epoch: however late it gets.
            kept = None if held is None else taught(held, teachers, places[1], budget, settings.seed)
            more = enriched(train, settings.pairs, self.subject.channels_first, settings.seed)
            self.taught[label] = taught(train, teachers, places[0], budget, settings.seed, late, more)
            self.sets[label] = self.taught[label], kept
        return teachers

    # ---------------------------------------------------------------------------------------------------- the model

    def _checkpoint(self, teachers: Mapping[str, Any]) -> tuple[str, State | None]:
        """By what this training is known, and its last state if it is to go on."""
        settings = self.settings
        if settings.checkpoints is None:
            return "", None
        with self.processes.alone():
            mark = mark_of(settings, self.heads, self.net, teachers, self.sets)
        state = load_state(settings.checkpoints, mark) if settings.resume else None
        if settings.resume and state is None:
            self.notes.append("there is no checkpoint to resume from, so training began at the start")
        return mark, state

    @property
    def _fixed(self) -> bool:
        """Whether every BatchNormalization keeps its statistics."""
        return self.settings.batch_norm == "fixed" or (self.healing and self.settings.batch_norm == "auto")

    def _freeze(self) -> None:
        """Raises:
        PlanError: if nothing moves.
        """
        settings = self.settings
        self.notes += set_moving(self.net, self.parts, settings.train, settings.adapters, self._fixed, settings.seed)
        if not self.net.trainable_variables:
            raise PlanError("Nothing moves: every layer is frozen. Say what is to move with --train all or last:K.")

    def _wanted(self) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Losses and metrics of the heads, where labels teach."""
        settings, subject = self.settings, self.subject
        training = training_of(self.heads, subject.training or {}, subject.own_training)
        losses = losses_of(self.heads, settings.loss, training, self.notes)
        return losses, metrics_of(self.heads, settings.metrics, training, losses)

    def _student(self) -> Any:
        settings, fixed = self.settings, self._fixed
        tensors = {head.name: self.net.outputs[head.place] for head in self.heads}
        if settings.mixed_precision:
            _lower(self.net)
        metrics: dict[str, list[Any]]
        halves: list[str] = []
        if self.healing:
            outputs, losses, columns, metrics, halves = self._distillation(tensors)
        else:
            plain, found = self.losses, self.plain_metrics
            outputs, losses = tensors, {name: masked_loss(loss) for name, loss in plain.items()}
            metrics = {name: [masked_metric(m, plain[name]) for m in items] for name, items in found.items()}
            halves = [name for name, loss in plain.items() if type(loss).__name__ == "MeanSquaredError"]
            columns = [column_of(head.name, self.shapes[head.place], plain[head.name]) for head in self.heads]
        self.columns = columns
        last = [v for layer in self.parts.trunk[-1:] for v in layer.trainable_variables]
        student = make_student(
            self.net.inputs,
            outputs,
            plain=self.plain,
            losses=losses,
            weights=self._weights(losses),
            weighting=settings.weighting,
            halves=halves,
            fixed=fixed and self.healing,
            shared=last,
        )
        self.metrics = metrics
        _seed(student, settings.seed)
        return student

    def _distillation(self, tensors: Mapping[str, Any]) -> Any:
        """Logits and features as outputs, with a loss for each."""
        settings = self.settings
        temperature = TEMPERATURE if settings.temperature is None else settings.temperature
        spreads = [spread(train, settings.seed) for train in self.taught.values()]
        scale = {name: float(np.mean([found[name] for found in spreads])) for name in spreads[0]}
        heads = [head for head in self.heads if head.name in scale]
        if left := [head.name for head in self.heads if head.name not in scale]:
            self.notes.append(
                f"no source teaches {', '.join(map(repr, left))}: what the trunk learns may change what it gives"
            )
        outputs = {head.name: logits_of(tensors[head.name]) for head in heads}
        losses = {h.name: distilled_loss(h.ending, temperature, scale[h.name]) for h in heads}
        columns = [Column(head.name, "float32", self.shapes[head.place][1:]) for head in heads]
        metrics = {head.name: [equal_decisions(head.ending)] for head in heads if head.ending}
        names = [name for name in scale if name not in losses]
        halves = [head.name for head in heads if not head.ending] + names
        for number, name in enumerate(names):
            outputs[name], shape = self._mapped(name, number)
            losses[name] = distilled_loss("", 1.0, scale[name])
            columns.append(Column(name, "float32", shape))
        return outputs, losses, columns, metrics, halves

    def _mapped(self, name: str, number: int) -> tuple[Any, tuple[int | None, ...]]:
        """The features of the trunk through a linear map to those of one source, which is thrown away in the end."""
        import keras

        tensor = self.net.get_layer(self.subject.trunk_end).output
        place = [n for names in self.teachers.names for n in names].index(name)
        outputs = [output for model in self.teachers.models for output in model.outputs]
        wanted = outputs[place].shape
        start = keras.initializers.GlorotUniform(seed=self.settings.seed + number)
        last = -1
        layer = keras.layers.Dense(wanted[last], kernel_initializer=start, name=f"features_{number}")
        return layer(tensor), tuple(wanted[1:])

    def _weights(self, losses: Mapping[str, Any]) -> dict[str, float]:
        given = self.settings.loss_weights
        found = {name: self.settings.features if name not in {h.name for h in self.heads} else 1.0 for name in losses}
        if given is None or isinstance(given, str):
            return found
        if not isinstance(given, Mapping):
            given = dict(zip(dict.fromkeys(head.label for head in self.heads), given, strict=True))
        for key, value in given.items():
            own = [head.name for head in self.heads if key in (head.name, head.label) and head.name in found]
            found |= dict.fromkeys(own, float(value))
        return found

    # ------------------------------------------------------------------------------------------------------ training

    def tuned(self) -> Tuning:
        settings, student = self.settings, self.student
        train, held = self._feeds()
        epochs = settings.epochs or max(EPOCHS, min(MOST_EPOCHS, math.ceil(STEPS / train.steps)))
        variables = list(student.trainable_variables)
        self.splits = self._splits(variables) if self.healing else {}
        state = self.state
        total = self._total(train, epochs)
        epochs = math.ceil(total / train.steps)
        measure = self._measure(held)
        self._compile(self._optimizer(total, RATE))
        with self._working(held):
            before, scores = measure()
        rate = RATE
        if self.healing:
            rate = min(max(PER_GAP * (1 - scores["val_agreement"]), GENTLE), RATE)
        optimizer = self._optimizer(total, rate)
        factors = rates(self.parts, variables, settings.trunk_rate, settings.layer_decay)
        optimizer = scaled_optimizer(optimizer, variables, factors)
        self._compile(optimizer)
        assert [id(v) for v in student.trainable_variables] == [id(v) for v in variables]
        optimizer.build(variables)
        base = scores
        least = scores["val_agreement"] if self.healing else None

        def score() -> dict[str, float]:
            return self._scored(measure()[1], base)

        watch = Watch(
            score,
            least,
            train.steps,
            epochs,
            total,
            settings.minutes * 60 if settings.minutes else None,
            settings.patience,
            settings.checkpoints if self.processes.is_first else None,
            settings.every,
            self.mark,
            self.progress,
            settings.say,
        )
        course = Course(best_score=self._scored(scores, base)["val_score"] if self.healing else math.inf)
        if state is not None:
            course = replace(course, **state.facts["course"], best=list(state.groups["best"]) or None)
            late = watch.deadline is not None and course.seconds >= watch.deadline
            if course.step < total and course.stopped in ("", TIME_IS_UP) and not late:
                course.done, course.stopped = False, ""  # it has been given more time
            put_values(student.variables, state.groups["model"])
            put_values(optimizer.variables, state.groups["optimizer"])
        elif settings.checkpoints is not None and self.processes.is_first:
            forget(settings.checkpoints)
        course.seconds += time.perf_counter() - settings.started
        self._fit(train, held, watch, course)
        return self._result(course, before, scores, measure)

    def _feeds(self) -> tuple[Feed, Feed]:
        settings = self.settings
        size = settings.batch_size or BATCH
        labels = list(self.sets)
        ratio = [float((settings.mix or {}).get(label, 1.0)) for label in labels]
        feeds = []
        every = tuple(column.name for column in self.columns)
        for place in (0, 1):
            parts = []
            for label, share in zip(labels, shares(size, ratio), strict=True):
                data = self.sets[label][place] or self.sets[label][0]
                own = every if self.healing or not label else tuple(h.name for h in self.heads if h.label == label)
                rows = count_rows(data)
                if not rows:
                    raise PlanError(
                        "No row is held back of so few: give more rows, or a larger --validation-split, or 0 for none."
                        if place and self.sets[label][1]
                        else "There are no rows to learn from: give more, or a smaller --validation-split."
                    )
                parts.append(Part(data, own, share, rows))
            feeds.append(Feed(parts, self.columns, self.subject.copies, settings.seed, self.processes))
        return feeds[0], feeds[1]

    def _splits(self, variables: Sequence[Any]) -> dict[int, int]:
        """Places of the kernels that move by Muon, and how they are split into matrices."""
        places = {id(variable): place for place, variable in enumerate(variables)}
        found = kernels_of(self.parts.trunk, self.parts.heads, self.settings.batch_size or BATCH)
        return {places[id(kernel)]: split for kernel, split in found if id(kernel) in places}

    def _optimizer(self, total: int, usual: float) -> Any:
        import keras

        given, rate = self.settings.optimizer, self.settings.learning_rate
        if isinstance(given, keras.optimizers.Optimizer):
            config = given.get_config()
            if rate is not None:
                config["learning_rate"] = rate
            return type(given).from_config(config)
        warm = min(max(1, round(WARM * total)), total - 1) if total > 1 else 0
        high = usual if rate is None else rate
        schedule = keras.optimizers.schedules.CosineDecay(
            high / 20 if warm else high,
            max(1, total - warm),
            warmup_target=high if warm else None,
            warmup_steps=warm,
        )
        if given is None and self.splits:
            return make_muon(schedule, self.splits)
        try:
            kind = type(keras.optimizers.get(given or "adam"))
        except ValueError as error:
            raise PlanError(f"The optimizer is {given!r}: expected a name or a Keras optimizer.") from error
        return kind(learning_rate=schedule)

    def _compile(self, optimizer: Any) -> None:
        import keras

        jit: Any = self.settings.jit
        if jit is None:
            jit = False if keras.backend.backend() == "tensorflow" else "auto"
        metrics = {name: items for name, items in self.metrics.items() if items}
        self.student.compile(optimizer=optimizer, weighted_metrics=metrics or None, jit_compile=jit)

    def _total(self, train: Feed, epochs: int) -> int:
        """After how many steps the training ends: as many as were asked for, or as the time allows."""
        settings, state, planned = self.settings, self.state, epochs * train.steps
        known, done, spent = 0, 0, 0.0
        if state is not None:
            known, course = int(state.facts["total"]), state.facts["course"]
            ended = course["done"] and course["stopped"] not in ("", TIME_IS_UP)
            before = state.facts.get("minutes")
            if ended or before is None or (settings.minutes or math.inf) <= before:
                return known
            done, spent = int(course["step"]), float(course["seconds"])
        if settings.minutes is None:
            return max(known, planned)
        with self._working(train):
            fits = done + self._steps_that_fit(train, spent)
        if settings.epochs and fits < planned:
            self.notes.append(f"the time allows {fits:,} of {planned:,} steps")
        return max(known, min(planned, fits) if settings.epochs else fits)

    def _steps_that_fit(self, train: Feed, spent: float) -> int:
        """How many steps the time allows, from a few that are made and undone; `spent` in earlier calls."""
        variables = self.student.variables
        kept = values_of(variables)
        self._compile(self._optimizer(100, RATE))
        stream = train.stream()
        for _ in range(3):
            self.student.train_on_batch(*next(stream))
        started, steps = time.perf_counter(), 0
        while steps < 5 or (time.perf_counter() - started < 1.0 and steps < 100):
            self.student.train_on_batch(*next(stream))
            steps += 1
        seconds = (time.perf_counter() - started) / steps
        put_values(variables, kept)
        assert self.settings.minutes is not None
        left = self.settings.minutes * 60 - spent - (time.perf_counter() - self.settings.started)
        return max(1, int(0.9 * left / seconds))

    def _fit(self, train: Feed, held: Feed, watch: Watch, course: Course) -> None:
        if course.done:
            return
        keeper = make_keeper(watch, course)
        callbacks = [keeper, *self._tensorboard(), *self.settings.callbacks]
        with self._working(train, held):
            epoch, within = divmod(course.step, watch.steps)
            if within:  # the rest of the epoch in which a training was interrupted
                self._fit_epochs(train, course, epoch, epoch + 1, watch.steps - within, callbacks)
                epoch += 1
            if epoch < watch.epochs and not course.done:
                self._fit_epochs(train, course, epoch, watch.epochs, watch.steps, callbacks)
        keeper.end()

    @contextmanager
    def _working(self, *feeds: Feed) -> Iterator[None]:
        """What Keras raises in here is told in words; what a feed raised, as the feed raised it."""
        try:
            yield
        except KmergeError:
            raise
        except Exception as error:
            for feed in feeds:
                if feed.failure is not None:
                    raise feed.failure from None
            if self.processes.count > 1:
                raise MergeError(self._lost(error)) from error
            raise MergeError(
                f"Keras cannot train the model: {one_line(error)}. Check that the labels are what the losses expect "
                "(--loss), or give fewer rows per step (--batch-size) where memory is short."
            ) from error

    def _lost(self, error: Exception) -> str:
        """What to say where one process of several cannot go on."""
        several, folder = self.processes, self.settings.checkpoints
        what = f"Process {several.rank} of {several.count} cannot go on, as when another is lost ({one_line(error)})"
        if folder is None:
            return f"{what}: start all of them again; with --checkpoints FOLDER, a training can be resumed."
        return f"{what}: start all of them again with resume, and they go on from '{folder / NAME}'."

    def _fit_epochs(self, train: Feed, course: Course, first: int, last: int, steps: int, callbacks: list[Any]) -> None:
        # Keras reads ahead, so that each fit begins a stream of its own.
        stream = partial(train.stream, course.step)
        if self.processes.engine == "tensorflow":
            Workers(self.student, self.processes).fit(stream(), first, last, steps, callbacks)
            course.done |= self.student.stop_training
            return
        settings = {"initial_epoch": first, "epochs": last, "steps_per_epoch": steps, "callbacks": callbacks}
        self.student.fit(for_keras(stream), shuffle=False, verbose=0, **settings)
        course.done |= self.student.stop_training  # by the user's callbacks too

    def _tensorboard(self) -> list[Any]:
        if self.settings.tensorboard is None:
            return []
        import keras

        return [keras.callbacks.TensorBoard(str(self.settings.tensorboard), write_graph=False)]

    # --------------------------------------------------------------------------------------------------- measuring

    def _measure(self, held: Feed) -> Callable[[], tuple[tuple[Agreement, ...], dict[str, float]]]:
        """What measures the model on the rows that were held back."""
        if not self.healing:
            return lambda: ((), self._evaluated(held))
        return lambda: self._agreeing(held)

    def _evaluated(self, held: Feed) -> dict[str, float]:
        if self.processes.engine == "tensorflow":
            return {f"val_{name}": value for name, value in measured(self.student, held.once()).items()}
        count = sum(math.ceil(part.rows / 256) for part in held.parts)
        with quiet():
            found = self.student.evaluate(for_keras(held.own), steps=count, verbose=0, return_dict=True)
        return {f"val_{name}": float(value) for name, value in found.items()}

    def _agreeing(self, held: Feed) -> tuple[tuple[Agreement, ...], dict[str, float]]:
        lost = {name: Loss() for name in self.student.head_losses}
        alike = {head.name: Agreeing(head, self.synthetic) for head in self.heads if head.name in lost}
        rows = 0
        for x, y, *_ in held.once():
            count = len(next(iter(y.values())))
            if self.processes.engine == "tensorflow":
                outputs = predicted(self.student, x)
            else:
                mine = self.student.predict_on_batch(self.processes.inputs(x))
                outputs = self.processes.gathered(mine, count)
            for name, loss in self.student.head_losses.items():
                lost[name].add(loss, y[name], outputs[name])
                if name in alike:
                    alike[name].add(y[name], outputs[name])
            rows += count
            if self.settings.validation_split == 0 and rows >= CHECKED:
                break
        scores = {f"val_{name}_loss": found.mean for name, found in lost.items()}
        agreements = [found.found() for found in alike.values()]
        weights = self.student.head_weights
        scores["val_loss"] = sum(weights[name] * scores[f"val_{name}_loss"] for name in weights)
        for item in agreements:
            scores[f"val_{item.output}_agreement"] = item.value
        scores["val_agreement"] = float(np.mean([item.value for item in agreements]))
        return tuple(agreements), scores

    def _scored(self, scores: dict[str, float], base: Mapping[str, float]) -> dict[str, float]:
        """The scores with the one that is to be small: the losses of the heads against those at the start."""
        heads = [f"val_{head.name}_loss" for head in self.heads]
        counted = [name for name in heads if base.get(name, 0) > 0]  # a head without labels loses nothing
        ratios = [scores[name] / base[name] for name in counted]
        return {**scores, "val_score": float(np.mean(ratios)) if ratios else scores["val_loss"]}

    # ------------------------------------------------------------------------------------------------------ the end

    def _result(self, course: Course, before: Any, scores: Any, measure: Any) -> Tuning:
        settings, warnings = self.settings, []
        # Callbacks that save may have carried another state, so that the start is carried as well.
        put_values(self.student.variables, self.start if course.best is None else course.best)
        self.plain.carry()
        if course.best is not None:
            after, last = measure()
        else:
            after, last = before, scores
            if not self.healing and course.step:
                warnings.append(
                    "no state of the training could be measured, as where losses are no numbers, so that the model "
                    "that was given is handed back: give a lower --learning-rate, and check the data"
                )
            elif self.healing:
                warnings.append(
                    "no state of the training agrees better with the sources than the model that was given, so that "
                    "one is handed back: give more inputs, or inputs that are closer to those of the sources"
                )
        if not self.healing and course.best is not None and course.best_score > 1:
            warnings.append(
                "the model does worse on the held-back rows than before the training: give more rows, a lower "
                "--learning-rate, or move less with --train heads"
            )
        if course.stopped:
            self.notes.append(f"training ended after {course.step} steps: {course.stopped}")
        if self.healing and self.synthetic:
            self.notes.append("agreement was measured on made-up inputs, and on real ones it may be another")
        low = [item for item in after if item.value < 0.9]
        if low:
            shown = ", ".join(f"'{item.output}' {percent(item.value)}" for item in low)
            warnings.append(f"heads still agree too little with their sources: {shown}")
        return Tuning(
            model=self.plain.model,
            history={k: v for k, v in course.history.items() if k != "val_score"},
            before=before,
            after=after,
            scores_before=scores,
            scores_after=last,
            epoch=course.best_epoch,
            steps=course.step,
            seconds=time.perf_counter() - settings.started,
            description=" and ".join(dict.fromkeys(train.description for train, _ in self.sets.values())),
            warnings=tuple(warnings),
            notes=tuple(self.notes),
        )


def _split_apart(
    data: Indexed, share: float, seed: int, calibrated: int, seed_of_merge: int
) -> tuple[Indexed, Indexed]:
    """Held back are rows that the merge was not fitted to, if it was made with the same data: on rows that it was, it
    would look better than it is, and so better than what comes of the training.
    """
    rows = data.rows
    free = np.ones(rows, bool)
    if calibrated <= rows:
        drawn = np.arange(rows)
        if calibrated < rows:
            drawn = np.sort(generator(seed_of_merge, "rows").choice(rows, calibrated, replace=False))
        unseen = min(max(round(UNSEEN * calibrated), 1), calibrated - 1)
        fitted = generator(seed_of_merge, "split").permutation(calibrated)[unseen:]
        free[drawn[fitted]] = False
    count = min(max(round(share * rows), 1), rows - 1, int(free.sum()))
    held = np.zeros(rows, bool)
    held[generator(seed, "held back").permutation(np.flatnonzero(free))[:count]] = True
    return replace(data, chosen=np.flatnonzero(~held)), replace(data, chosen=np.flatnonzero(held))


def _seed(model: Any, seed: int) -> None:
    """Let dropout draw by the seed: Keras draws a new start for it at each opening of a file that records none."""
    states = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    for number, variable in enumerate(states):
        start = generator(seed, f"layer/{number}").integers(0, 2**31, variable.shape)
        variable.assign(start.astype(str(variable.dtype)))


def _lower(model: Any) -> None:
    """Compute in bfloat16; weights stay as they are."""
    for layer in model._flatten_layers():
        if layer is not model and getattr(layer, "compute_dtype", "") == "float32":
            layer.dtype_policy = "mixed_bfloat16"
