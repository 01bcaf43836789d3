"""What a training was asked to be, checked by itself."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.errors import PlanError
from kmerge.tune.checkpoint import check_folder
from kmerge.tune.moving import check_train
from kmerge.tune.student import WEIGHTINGS


@dataclass(frozen=True)
class Settings:
    """How to train. None means: as suits the kind of training.

    Attributes:
        train: "all", "heads", "last:K" (heads and the last K layers of the trunk with weights); None: what the layers'
            own `trainable` says.
        loss, metrics: by head, or one for all; default: what its source was trained with.
        loss_weights: by head or in their order, "uncertainty", "gradnorm" or "pcgrad"; default equal.
        epochs: passes over the data, of the longest where there are several; default 12, and more where these are few
            steps.
        minutes: after which training ends; with it and without epochs, as many as fit.
        batch_size: rows per step, of all heads together; default 64.
        learning_rate: the highest; it rises over the first steps and falls to 0 along half a cosine. Default 0.001; in
            healing less where the start agrees well, down to 0.0001.
        optimizer: name or Keras optimizer; default Adam, and where sources teach Muon for kernels of the trunk. One
            that is given as an object keeps its own rate, unless learning_rate is given too.
        temperature: of the distillation, default 4; infinity matches logits.
        features: weight of the loss between trunk features; 0 for none.
        trunk_rate, layer_decay: factor on the learning rate in the trunk, and once more for each layer towards the
            input.
        adapters: rank of low-rank adapters in place of the heads' kernels.
        batch_norm: "auto" (inference mode when healing or frozen), "fixed" or "moving".
        mix: rows of each batch by head, as a ratio; default equal.
        validation_split: share of the rows that is held back.
        patience: epochs without a better state after which training ends.
        pairs: where sources teach, rows made of pairs of the given ones for each of them and pass; 0 for none. Default
            3 where there are few rows, and none from 32,000 on.
        samples: how many inputs to make up where none are given.
        cache: megabytes on disk for inputs and what the teachers gave on them.
        checkpoints: folder to save the state of the training in, so that it can be resumed.
        resume: go on from there.
        force: replace the checkpoint of another training.
        every: seconds between two checkpoints within an epoch.
        tensorboard: folder for TensorBoard's logs.
        mixed_precision: compute in bfloat16.
        jit: compile with XLA; None: where the backend does so by itself, but not on TensorFlow.
        callbacks: Keras callbacks.
        seed: of everything random.
        columns, label_columns: of tables: the features by name, and the column with the labels of each head.
        pixels: values of black and white of image files.
        say: takes a line per epoch.
        started: when the call began, by `time.perf_counter`; from then on the minutes count.
    """

    train: str | None = None
    loss: Any = None
    metrics: Any = None
    loss_weights: Any = None
    epochs: int | None = None
    minutes: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    optimizer: Any = None
    temperature: float | None = None
    features: float = 0.0
    trunk_rate: float = 1.0
    layer_decay: float = 1.0
    adapters: int | None = None
    batch_norm: str = "auto"
    mix: Mapping[str, float] | None = None
    validation_split: float = 0.1
    patience: int | None = None
    pairs: int | None = None
    samples: int | None = None
    cache: float = 4096
    checkpoints: Path | None = None
    resume: bool = False
    force: bool = False
    every: float = 60.0
    tensorboard: Path | None = None
    mixed_precision: bool = False
    jit: bool | None = None
    callbacks: Sequence[Any] = ()
    seed: int = 0
    columns: Sequence[str] | None = None
    label_columns: Mapping[str, str] = field(default_factory=dict)
    pixels: tuple[float, float] | None = None
    say: Callable[[str], None] = field(default=lambda _: None, compare=False)
    started: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def weighting(self) -> str:
        return self.loss_weights if isinstance(self.loss_weights, str) and self.loss_weights != "equal" else ""


_WHOLE = {"epochs": 1, "batch_size": 1, "adapters": 1, "patience": 1, "samples": 8, "seed": 0, "pairs": 0}
_ABOVE = ("minutes", "learning_rate", "temperature", "trunk_rate", "layer_decay", "every")


def check_settings(settings: Settings) -> None:
    """Refuse what is wrong whatever the model and the data are.

    Raises:
        PlanError: naming the setting, what it is and what was expected.
    """
    check_train(settings.train)
    for name, least in _WHOLE.items():
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise PlanError(f"{name} is {value!r}: expected a whole number of at least {least}.")
    for name in _ABOVE:
        value = getattr(settings, name)
        if value is not None and (not _is_number(value) or not value > 0):
            raise PlanError(f"{name} is {value!r}: expected a number above 0.")
    if not _is_number(settings.cache) or settings.cache < 0:
        raise PlanError(f"cache is {settings.cache!r}: expected megabytes, at least 0.")
    for name in ("minutes", "learning_rate", "trunk_rate", "layer_decay"):
        if getattr(settings, name) == math.inf:
            raise PlanError(f"{name} is infinite: expected a number.")
    if not _is_number(settings.features) or not 0 <= settings.features < math.inf:
        raise PlanError(f"features is {settings.features!r}: expected a weight of at least 0.")
    if not _is_number(settings.validation_split) or not 0 <= settings.validation_split < 1:
        raise PlanError(f"validation_split is {settings.validation_split!r}: expected a share from 0 to below 1.")
    if settings.batch_norm not in ("auto", "fixed", "moving"):
        raise PlanError(f"batch_norm is {settings.batch_norm!r}: expected auto, fixed or moving.")
    if settings.weighting and settings.weighting not in WEIGHTINGS:
        raise PlanError(
            f"loss_weights is '{settings.loss_weights}': expected equal, {', '.join(WEIGHTINGS)}, or numbers."
        )
    if settings.resume and settings.checkpoints is None:
        raise PlanError("resume needs the folder of the checkpoints: give --checkpoints FOLDER.")
    if settings.checkpoints is not None:
        check_folder(settings.checkpoints, settings.resume, settings.force)
    if settings.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise PlanError("TensorBoard's logs need the package tensorboard: pip install tensorboard.")
    _check_weights(settings.loss_weights)
    if settings.mix is not None:
        if not isinstance(settings.mix, Mapping):
            raise PlanError(f"mix is {settings.mix!r}: expected a share per head, such as {{'a': 2, 'b': 1}}.")
        for label, share in settings.mix.items():
            if not _is_number(share) or not 0 < share < math.inf:
                raise PlanError(f"The share of '{label}' in mix is {share!r}: expected a number above 0.")
    _check_reading(settings)


def _check_weights(given: Any) -> None:
    if given is None or isinstance(given, str):
        return
    expected = f"expected equal, {', '.join(WEIGHTINGS)}, or a number for each head."
    if not isinstance(given, (Mapping, Sequence, np.ndarray)):
        raise PlanError(f"loss_weights is {given!r}: {expected}")
    for value in given.values() if isinstance(given, Mapping) else given:
        if not _is_number(value) or not 0 <= value < math.inf:
            raise PlanError(f"A loss weight is {value!r}: expected a number of at least 0.")


def _check_reading(settings: Settings) -> None:
    columns, pixels = settings.columns, settings.pixels
    if columns is not None and (isinstance(columns, str) or not all(isinstance(name, str) for name in columns)):
        raise PlanError(f"columns is {columns!r}: expected a list of names.")
    if not isinstance(settings.label_columns, Mapping):
        raise PlanError(f"label_columns is {settings.label_columns!r}: expected the name of a column for each head.")
    if pixels is not None and (len(pixels) != 2 or not all(map(_is_number, pixels)) or not pixels[0] < pixels[1]):
        raise PlanError(f"pixels is {pixels!r}: expected the values of black and of white, such as (0, 1).")


def check_heads(settings: Settings, labels: Sequence[str], names: Sequence[str], healing: bool) -> None:
    """Refuse settings that name heads which the model has not, or that do nothing.

    Args:
        settings: of the training.
        labels: of the model's heads.
        names: of its outputs.
        healing: whether sources teach.

    Raises:
        PlanError: naming the setting.
    """
    given: dict[str, Any] = {"loss": settings.loss, "metrics": settings.metrics, "loss_weights": settings.loss_weights}
    given |= {"mix": settings.mix, "label_columns": settings.label_columns}
    for what, value in given.items():
        for key in value if isinstance(value, Mapping) else ():
            if key not in labels and (key not in names or what in ("mix", "label_columns")):
                raise PlanError(f"{what} names '{key}', but the heads are {', '.join(labels)}.")
    weights = settings.loss_weights
    numbers = weights is not None and not isinstance(weights, (str, Mapping))
    if numbers and len(weights) != len(labels):
        raise PlanError(f"There are {len(weights)} loss weights for {len(labels)} heads: give one per head.")
    idle = ("loss", "metrics") if healing else ("temperature", "features", "pairs")
    for what in idle:
        if getattr(settings, what):
            other = "labels, and here the sources teach: leave it out, or leave the sources out"
            raise PlanError(f"{what} is for {other if healing else 'sources that teach: give them, or leave it out'}.")


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and not math.isnan(value)
