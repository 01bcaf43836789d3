"""What an old file records of its training, in the words of current Keras: optimizer, losses, metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_LOSSES = {
    "BinaryCrossentropy": "from_logits label_smoothing axis",
    "CategoricalCrossentropy": "from_logits label_smoothing axis",
    "CategoricalHinge": "",
    "CosineSimilarity": "axis",
    "Hinge": "",
    "Huber": "delta",
    "KLDivergence": "",
    "LogCosh": "",
    "MeanAbsoluteError": "",
    "MeanAbsolutePercentageError": "",
    "MeanSquaredError": "",
    "MeanSquaredLogarithmicError": "",
    "Poisson": "",
    "SparseCategoricalCrossentropy": "from_logits",
    "SquaredHinge": "",
}
_FUNCTIONS = {
    "mse": "mean_squared_error",
    "MSE": "mean_squared_error",
    "mean_squared_error": "mean_squared_error",
    "mae": "mean_absolute_error",
    "MAE": "mean_absolute_error",
    "mean_absolute_error": "mean_absolute_error",
    "mape": "mean_absolute_percentage_error",
    "mean_absolute_percentage_error": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
    "mean_squared_logarithmic_error": "mean_squared_logarithmic_error",
    "squared_hinge": "squared_hinge",
    "hinge": "hinge",
    "categorical_hinge": "categorical_hinge",
    "logcosh": "log_cosh",
    "log_cosh": "log_cosh",
    "huber": "huber",
    "huber_loss": "huber",
    "categorical_crossentropy": "categorical_crossentropy",
    "sparse_categorical_crossentropy": "sparse_categorical_crossentropy",
    "binary_crossentropy": "binary_crossentropy",
    "kld": "kl_divergence",
    "kullback_leibler_divergence": "kl_divergence",
    "kl_divergence": "kl_divergence",
    "poisson": "poisson",
    "cosine_similarity": "cosine_similarity",
}
_METRICS = {
    **_FUNCTIONS,
    **{
        name: name
        for name in [
            "acc",
            "accuracy",
            "binary_accuracy",
            "categorical_accuracy",
            "sparse_categorical_accuracy",
            "top_k_categorical_accuracy",
            "sparse_top_k_categorical_accuracy",
        ]
    },
}
_OPTIMIZERS = {
    "SGD": "learning_rate momentum nesterov",
    "RMSprop": "learning_rate rho momentum epsilon centered",
    "Adagrad": "learning_rate initial_accumulator_value epsilon",
    "Adadelta": "learning_rate rho epsilon",
    "Adam": "learning_rate beta_1 beta_2 epsilon amsgrad",
    "AdamW": "learning_rate beta_1 beta_2 epsilon amsgrad",
    "Adamax": "learning_rate beta_1 beta_2 epsilon",
    "Nadam": "learning_rate beta_1 beta_2 epsilon",
    "Ftrl": "learning_rate learning_rate_power initial_accumulator_value l1_regularization_strength "
    "l2_regularization_strength l2_shrinkage_regularization_strength beta",
}
_LATER = frozenset({*_OPTIMIZERS, "Adafactor", "Lamb", "Lion", "LossScaleOptimizer", "Muon"})
"""Those of Keras 3, whose own settings need no change."""

_RATE = "initial_learning_rate decay_steps"
_SCHEDULES = {
    "CosineDecay": f"{_RATE} alpha warmup_target warmup_steps",
    "CosineDecayRestarts": "initial_learning_rate first_decay_steps t_mul m_mul alpha",
    "ExponentialDecay": f"{_RATE} decay_rate staircase",
    "InverseTimeDecay": f"{_RATE} decay_rate staircase",
    "PiecewiseConstantDecay": "boundaries values",
    "PolynomialDecay": f"{_RATE} end_learning_rate power cycle",
}
_COMMON = "weight_decay clipnorm clipvalue global_clipnorm use_ema ema_momentum ema_overwrite_frequency"
"""Settings that every optimizer takes."""
_ELSEWHERE = frozenset({"name", "lr", "decay", "schedule_decay", "jit_compile", "is_legacy_optimizer"})
"""Settings of old optimizers that go into others, or say nothing of what is computed."""


class _Unknown(Exception):
    """Something that has no counterpart."""


def upgrade_training(
    training: Any, names: Mapping[str, str], current: bool = False
) -> tuple[dict[str, Any] | None, list[str]]:
    """The `compile_config` of current Keras for an old file's `training_config`.

    Args:
        training: as recorded; None where the model was never compiled.
        names: the name that each output's layer has now, by the one it had.
        current: whether Keras 3 wrote it.

    Returns:
        The configuration, None where there is none or it cannot be carried; and what was dropped.
    """
    if not isinstance(training, Mapping):
        return None, []
    try:
        loss = _structure(training.get("loss"), names, _loss)
    except _Unknown as error:
        return None, [f"the training configuration was dropped: the loss {error} is none of current Keras's"]
    if loss is None:
        return None, []
    notes: list[str] = []
    try:
        optimizer = _optimizer(training.get("optimizer_config") or training.get("optimizer"), current, notes)
    except _Unknown as error:
        optimizer = "rmsprop"
        notes.append(f"the optimizer {error} is none of current Keras's: the default one (rmsprop) stands in for it")
    result: dict[str, Any] = {"optimizer": optimizer, "loss": loss, "loss_weights": None, "metrics": None}
    for key in ("metrics", "weighted_metrics"):
        try:
            result[key] = _structure(training.get(key), names, _metric) or None
        except _Unknown as error:
            notes.append(f"the {key.replace('_', ' ')} were dropped: {error} is none of current Keras's")
            result[key] = None
    weights = training.get("loss_weights")
    if isinstance(weights, Mapping):
        weights = {names.get(key, key): value for key, value in weights.items()}
    result["loss_weights"] = weights if isinstance(loss, (list, dict)) else None
    if training.get("sample_weight_mode"):
        notes.append("sample_weight_mode was dropped: current Keras goes by the shape of the sample weights")
    return {**result, "run_eagerly": False, "steps_per_execution": 1, "jit_compile": False}, notes


def _structure(value: Any, names: Mapping[str, str], one: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_structure(item, names, one) for item in value]
    if isinstance(value, Mapping) and not isinstance(value.get("class_name"), str):
        return {names.get(key, key): _structure(item, names, one) for key, item in value.items()}
    return None if value is None else one(value)


def _loss(value: Any) -> Any:
    if isinstance(value, str):
        if value in _FUNCTIONS:
            return _FUNCTIONS[value]
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", value).lower()
        if snake in _FUNCTIONS:
            return _FUNCTIONS[snake]
        raise _Unknown(f"'{value}'")
    name, config = str(value.get("class_name")).split(">")[-1], value.get("config")
    config = config if isinstance(config, Mapping) else {}
    if name == "LossFunctionWrapper" and isinstance(config.get("fn"), str):
        return _loss(config["fn"])
    if name not in _LOSSES:
        raise _Unknown(f"'{name}'")
    settings = {key: config[key] for key in _LOSSES[name].split() if key in config}
    reduction = {"none": None, "sum": "sum"}.get(str(config.get("reduction")), "sum_over_batch_size")
    return _entry("keras.losses", name, {**settings, "reduction": reduction})


def _metric(value: Any) -> Any:
    if isinstance(value, str):
        if value in _METRICS:
            return _METRICS[value]
        raise _Unknown(f"'{value}'")
    name, config = str(value.get("class_name")).split(">")[-1], value.get("config")
    config = config if isinstance(config, Mapping) else {}
    function = config.get("fn")
    if isinstance(function, Mapping):
        function = function.get("config")
    if name in ("MeanMetricWrapper", "SumOverBatchSizeMetricWrapper") and isinstance(function, str):
        return _metric(function)
    if name in _METRIC_CLASSES:
        settings = {key: config[key] for key in ("name", "threshold", "k", "num_classes") if key in config}
        return _entry(
            "keras.metrics", name, {k: v for k, v in settings.items() if k in ("name", *_METRIC_CLASSES[name])}
        )
    raise _Unknown(f"'{name}'")


_METRIC_CLASSES: dict[str, tuple[str, ...]] = {
    "Accuracy": (),
    "BinaryAccuracy": ("threshold",),
    "CategoricalAccuracy": (),
    "SparseCategoricalAccuracy": (),
    "TopKCategoricalAccuracy": ("k",),
    "MeanSquaredError": (),
    "MeanAbsoluteError": (),
    "RootMeanSquaredError": (),
    "Precision": (),
    "Recall": (),
    "AUC": (),
    "MeanIoU": ("num_classes",),
}


def _optimizer(value: Any, current: bool, notes: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return "rmsprop"
    name, config = str(value.get("class_name")).split(">")[-1], value.get("config")
    config = dict(config) if isinstance(config, Mapping) else {}
    if current and name in _LATER:
        return _entry("keras.optimizers", name, config)
    by_lower = {known.lower(): known for known in _OPTIMIZERS}
    known = by_lower.get(name.lower())
    if known is None:
        raise _Unknown(f"'{name}'")
    if "lr" in config:
        config["learning_rate"] = config.pop("lr")
    if not isinstance(config.get("learning_rate", 0.0), (int, float)):
        config["learning_rate"] = _schedule(name, config["learning_rate"])
    elif not _fits(config.get("learning_rate", 0.0)):
        raise _Unknown(f"'{name}' with a learning rate beyond all bounds")
    allowed = f"{_OPTIMIZERS[known]} {_COMMON}".split()
    notes += [
        f"the setting {key}={item!r} of the optimizer was left out: current Keras's {known} has none"
        for key, item in config.items()
        if item and key not in allowed and key not in _ELSEWHERE
    ]
    settings = {key: item for key, item in config.items() if key in allowed and item is not None}
    if known != "AdamW" and not settings.get("weight_decay"):
        settings.pop("weight_decay", None)
    if known == "Adagrad":  # before tf.keras it began at zero, without saying so
        settings.setdefault("initial_accumulator_value", 0.0)
    decay = config.get("decay") if known != "Nadam" else None  # of its momentum, not of its learning rate
    if decay:
        settings["learning_rate"] = _entry(
            "keras.optimizers.schedules",
            "InverseTimeDecay",
            {"initial_learning_rate": settings.get("learning_rate", 0.001), "decay_steps": 1, "decay_rate": decay},
        )
    return _entry("keras.optimizers", known, settings)


def _fits(rate: Any) -> bool:
    """Whether a number can be held as one; JSON's integers have any length."""
    try:
        return float(rate) is not None
    except OverflowError:
        return False


def _schedule(optimizer: str, value: Any) -> Any:
    name = str(value.get("class_name")).split(">")[-1] if isinstance(value, Mapping) else ""
    config = value.get("config") if isinstance(value, Mapping) else None
    if name not in _SCHEDULES or not isinstance(config, Mapping):
        raise _Unknown(f"'{optimizer}' with a learning-rate schedule of its own")
    settings = {key: config[key] for key in _SCHEDULES[name].split() if key in config}
    return _entry("keras.optimizers.schedules", name, settings)


def _entry(module: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"module": module, "class_name": class_name, "config": dict(config), "registered_name": None}
