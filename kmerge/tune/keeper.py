"""A Keras callback that holds the state back on unseen rows, keeps the best, saves checkpoints and ends in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.methods.registry import Array
from kmerge.progress import Progress, silent, tell
from kmerge.tune.checkpoint import State, save_state

Scores = dict[str, float]
TIME_IS_UP = "the time was up"


@dataclass(eq=False)
class Watch:
    """What a training needs to be watched.

    Attributes:
        score: measures the model on held-back rows: values for the log, of which "val_score" is to be small; None
            where nothing is held back.
        least: what "val_agreement" must reach for a state to be kept; None for no such bound.
        steps, epochs: of the training.
        total: steps after which it ends.
        deadline: seconds after which it ends; None for none.
        patience: epochs without a better state after which it ends.
        folder, every, mark: where and how often to save, and for what training.
        progress, say: told the steps, and a line per epoch.
    """

    score: Callable[[], Scores] | None
    least: float | None
    steps: int
    epochs: int
    total: int
    deadline: float | None = None
    patience: int | None = None
    folder: Path | None = None
    every: float = 60.0
    mark: str = ""
    progress: Progress = silent
    say: Callable[[str], None] = field(default=lambda line: None)


@dataclass(eq=False)
class Course:
    """How far a training has come.

    Attributes:
        step, seconds: done.
        history: values per epoch, by name.
        best: weights of the best state; None: the state at the start.
        best_score, best_epoch: of it; epoch 0 is the start.
        done: whether it ended.
        stopped: why it ended early; "" where it did not.
    """

    step: int = 0
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)
    best: list[Array] | None = None
    best_score: float = float("inf")
    best_epoch: int = 0
    done: bool = False
    stopped: str = ""

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "best"}


def make_keeper(watch: Watch, course: Course) -> Any:
    """The callback; the first of all, so that the others see what it measures."""
    return _keeper_class()(watch, course)


def values_of(variables: Any) -> list[Array]:
    """Copies of the values of variables."""
    from keras import ops

    values = [variable.value for variable in variables]
    # Variables of several TensorFlow workers are no arrays, and are read first.
    values = [value.read_value() if hasattr(value, "read_value") else value for value in values]
    return [np.array(ops.convert_to_numpy(value)) for value in values]


def put_values(variables: Any, values: Any) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


@cache
def _keeper_class() -> Any:
    import keras

    class Keeper(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self, watch: Watch, course: Course) -> None:
            super().__init__()
            self.watch, self.course = watch, course
            self.before = course.seconds
            self.started = self.saved = self.told = time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            watch, course = self.watch, self.course
            course.step += 1
            now = time.monotonic()
            course.seconds = self.before + now - self.started
            if now - self.told >= 0.5:
                self.told = now
                tell(watch.progress, _short(logs or {}))
            watch.progress(course.step, watch.total)
            late = watch.deadline is not None and course.seconds >= watch.deadline
            if late or course.step >= watch.total:
                course.stopped = course.stopped or (TIME_IS_UP if late and course.step < watch.total else "")
                self.model.stop_training = True
            elif watch.folder is not None and now - self.saved >= watch.every and course.step % watch.steps:
                self._save()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            watch, course = self.watch, self.course
            logs = {} if logs is None else logs
            self._synchronise()
            if watch.score is not None:
                logs.update(watch.score())
            for name, value in logs.items():
                course.history.setdefault(name, []).append(float(value))
            self._judge(epoch, logs)
            watch.say(_line(epoch + 1, watch.epochs, logs))
            course.done = course.done or course.step >= watch.total or bool(course.stopped)
            if watch.folder is not None:
                self._save()

        def end(self) -> None:
            """Keep that a callback ended the training, for a call that would go on."""
            watch, course = self.watch, self.course
            if course.done and course.step < watch.total and not course.stopped:
                course.stopped = "a callback ended it"
                if watch.folder is not None:
                    self._save()

        def _judge(self, epoch: int, logs: Mapping[str, Any]) -> None:
            watch, course = self.watch, self.course
            score = float(logs.get("val_score", -epoch))
            enough = watch.least is None or float(logs.get("val_agreement", 1)) >= watch.least
            if enough and score < course.best_score:
                course.best, course.best_score = values_of(self.model.variables), score
                course.best_epoch = epoch + 1
            elif watch.patience is not None and epoch + 1 - course.best_epoch >= watch.patience:
                course.stopped = f"nothing got better in {watch.patience} epochs"
                self.model.stop_training = True

        def _synchronise(self) -> None:
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()

        def _save(self) -> None:
            self._synchronise()
            self.saved = time.monotonic()
            course = self.course
            groups = {
                "model": values_of(self.model.variables),
                "optimizer": values_of(self.model.optimizer.variables),
                "best": course.best or [],
            }
            assert self.watch.folder is not None
            deadline = self.watch.deadline
            facts = {
                "course": course.facts(),
                "total": self.watch.total,
                "minutes": None if deadline is None else deadline / 60,
            }
            save_state(self.watch.folder, State(facts, groups), self.watch.mark)

    return Keeper


def _line(epoch: int, epochs: int, logs: Mapping[str, Any]) -> str:
    shown = [f"{name} {float(value):.4f}" for name, value in logs.items() if name != "val_score"]
    return f"epoch {epoch} of {epochs}: {', '.join(shown)}"


def _short(logs: Mapping[str, Any]) -> str:
    """What heads do, for the bar: their metrics, or their losses where they have none."""
    measured = {name: value for name, value in logs.items() if not name.endswith("loss")}
    return " ".join(f"{name} {float(value):.3f}" for name, value in (measured or logs).items())
