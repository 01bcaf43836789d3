"""Losses and metrics of the heads: as given, as their sources were trained with, or as their outputs suggest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kmerge.errors import PlanError
from kmerge.live import one_line
from kmerge.tune.heads import Head
from kmerge.tune.losses import is_sparse, loss_name

_ACCURACY = {
    "SparseCategoricalCrossentropy": "SparseCategoricalAccuracy",
    "CategoricalCrossentropy": "CategoricalAccuracy",
    "CategoricalFocalCrossentropy": "CategoricalAccuracy",
    "BinaryCrossentropy": "BinaryAccuracy",
    "BinaryFocalCrossentropy": "BinaryAccuracy",
}


def losses_of(heads: Sequence[Head], given: Any, training: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A Keras loss per head.

    Args:
        heads: of the model.
        given: one for all, or by head or label; the others take their source's.
        training: training configuration of each source, by label.
        notes: takes what was guessed.

    Raises:
        PlanError: if one is unknown.
    """
    asked = _by_head(heads, given, "loss")
    found = {}
    for head in heads:
        if head.name in asked:
            found[head.name] = _loss(asked[head.name], head.name)
            continue
        recorded = _recorded(training.get(head.label), "loss", head, heads)
        loss = None if recorded is None else _known("losses", recorded)
        if loss is None:
            why = "has no loss that its source was trained with"
            if recorded is not None:
                why = f"was trained with {_named(recorded)}, which is not a loss of Keras's that can be made anew"
            name = {"softmax": "sparse_categorical_crossentropy", "sigmoid": "binary_crossentropy"}.get(head.ending)
            loss = _loss(name or "mean_squared_error", head.name)
            notes.append(f"'{head.name}' {why}, and takes {loss.name}: --loss says others")
        found[head.name] = loss
    return found


def metrics_of(
    heads: Sequence[Head], given: Any, training: Mapping[str, Any], losses: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Keras metrics per head; those of a source that Keras does not know are left out.

    Raises:
        PlanError: if one that is given is unknown.
    """
    asked = _by_head(heads, given, "metrics")
    found: dict[str, list[Any]] = {}
    for head in heads:
        loss = losses[head.name]
        if head.name in asked:
            wanted = asked[head.name] if isinstance(asked[head.name], (list, tuple)) else [asked[head.name]]
            found[head.name] = [_metric(item, loss, head.name) for item in wanted]
            continue
        recorded = _flat(_recorded(training.get(head.label), "metrics", head, heads))
        made = [metric for item in recorded if (metric := _known_metric(item, loss)) is not None]
        if not made and loss_name(loss) in _ACCURACY:
            made = [_known_metric("accuracy", loss)]
        names = [metric.name for metric in made]
        found[head.name] = [metric for place, metric in enumerate(made) if metric.name not in names[:place]]
    return found


def _by_head(heads: Sequence[Head], given: Any, what: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {head.name: given for head in heads}
    found: dict[str, Any] = {}
    for key, value in given.items():
        own = [head.name for head in heads if key in (head.name, head.label)]
        if not own:
            names = ", ".join(dict.fromkeys(head.label for head in heads))
            raise PlanError(f"A {what} is given for '{key}', but the heads are {names}.")
        found |= dict.fromkeys(own, value)
    return found


def training_of(
    heads: Sequence[Head], training: Mapping[str, Any], own: Mapping[str, Any] | None
) -> dict[str, Mapping[str, Any] | None]:
    """A training configuration per head: its source's, or what the model's own says of that output.

    Args:
        heads: of the model.
        training: of each source, by label.
        own: of the model itself.
    """
    found: dict[str, Mapping[str, Any] | None] = {head.label: training.get(head.label) for head in heads}
    for head in heads:
        if found[head.label] is None and isinstance(own, Mapping):
            found[head.label] = {
                key: _of_output(own.get(key), (head.name,), head.place, len(heads)) for key in ("loss", "metrics")
            }
    return found


def _recorded(training: Any, key: str, head: Head, heads: Sequence[Head]) -> Any:
    """What a source's training configuration says of one of its outputs."""
    if not isinstance(training, Mapping):
        return None
    count = sum(other.label == head.label for other in heads)
    return _of_output(training.get(key), (head.name.removeprefix(f"{head.label}_"), head.name), head.number, count)


def _of_output(value: Any, names: Sequence[str], place: int, count: int) -> Any:
    """What is said of one output: by its name in a dictionary, by its place in a list, or of all of them.

    Args:
        value: what is said.
        names: of the output.
        place: of the output.
        count: of all outputs.
    """
    if isinstance(value, Mapping) and "class_name" not in value:
        for name in names:
            if name in value:
                return value[name]
        return next(iter(value.values())) if count == len(value) == 1 else None
    if isinstance(value, (list, tuple)) and count > 1 and len(value) == count:
        return value[place]
    return value


def _named(recorded: Any) -> str:
    """For people: what a stored loss is called."""
    if isinstance(recorded, Mapping):
        own = recorded.get("config")
        name = own if isinstance(own, str) else recorded.get("registered_name") or recorded.get("class_name")
        return f"'{name}'"
    return f"'{recorded}'" if isinstance(recorded, str) else f"a {type(recorded).__name__}"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _flat(part)]
    if isinstance(value, Mapping) and "class_name" not in value:
        return [item for part in value.values() for item in _flat(part)]
    return [] if value is None else [value]


def _loss(value: Any, head: str) -> Any:
    """A Keras loss object from a name, a function or an object."""
    import keras

    if isinstance(value, str):
        found = _known("losses", value)
        if found is None:
            raise PlanError(f"The loss '{value}' of '{head}' is none of Keras's: see keras.losses for their names.")
        return found
    if isinstance(value, keras.losses.Loss):
        return value
    if isinstance(value, type) and issubclass(value, keras.losses.Loss):
        return value()
    if callable(value):
        name = getattr(value, "__name__", "")
        keras_own = getattr(keras.losses, name or "_", None) is value
        return (_known("losses", name) if keras_own else None) or _function(value)
    raise PlanError(f"The loss of '{head}' is a {type(value).__name__}: expected a name, a function or a Keras loss.")


def _function(function: Any) -> Any:
    import keras

    class Function(keras.losses.Loss):  # type: ignore[misc]
        def call(self, y_true: Any, y_pred: Any) -> Any:
            return function(y_true, y_pred)

    return Function(name=getattr(function, "__name__", "loss"))


def _known(kind: str, value: Any) -> Any:
    """A loss or metric of Keras's own from a name or a stored configuration; None for any other."""
    import keras

    module = getattr(keras, kind)
    config: dict[str, Any] = {}
    if isinstance(value, Mapping):
        own = value.get("config")
        if isinstance(own, str):  # a function
            value = own
        else:
            config = dict(own) if isinstance(own, Mapping) else {}
            value = value.get("class_name")
            if value in ("function", "LossFunctionWrapper", "MeanMetricWrapper"):
                inner = config.get("fn", config.get("name"))
                value = inner.get("config") if isinstance(inner, Mapping) else inner
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        return None
    base = keras.losses.Loss if kind == "losses" else keras.metrics.Metric
    wanted = value.rpartition(".")[2]
    wanted = _SHORT.get(wanted, wanted).replace("_", "").lower()
    classes = {name.lower(): found for name, found in vars(module).items() if isinstance(found, type)}
    found = classes.get(wanted)
    if found is None or not issubclass(found, base) or found is base:
        return None
    settings = {key: item for key, item in config.items() if key not in _NAMING and item is not None}
    if not settings.keys() <= inspect.signature(found).parameters.keys():
        return None  # a setting that would be lost
    try:
        return found(**settings)
    except (TypeError, ValueError):
        return None


_NAMING = frozenset({"name", "reduction", "dtype", "fn"})
_SHORT = {
    "mse": "mean_squared_error",
    "mae": "mean_absolute_error",
    "mape": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
    "bce": "binary_crossentropy",
    "kld": "kl_divergence",
    "kullback_leibler_divergence": "kl_divergence",
    "logcosh": "log_cosh",
    "acc": "accuracy",
    "auc": "AUC",
}


def _known_metric(value: Any, loss: Any) -> Any:
    name = value
    if isinstance(value, Mapping):
        own = value.get("config")
        name = own.get("name") if isinstance(own, Mapping) else own
    if name in ("accuracy", "acc"):
        import keras

        kind = _ACCURACY.get(loss_name(loss))
        return None if kind is None else getattr(keras.metrics, kind)(name="accuracy")
    found = _known("metrics", value)
    # What expects another shape of labels than the loss would count wrongly.
    sparse = found is not None and "Sparse" in type(found).__name__
    return None if found is None or (sparse != is_sparse(loss) and "Categorical" in type(found).__name__) else found


def _metric(value: Any, loss: Any, head: str) -> Any:
    import keras

    if isinstance(value, keras.metrics.Metric):
        return _anew(value, head)
    found = _known_metric(value, loss) if isinstance(value, str) else None
    if found is None and callable(value):
        return keras.metrics.MeanMetricWrapper(value, name=getattr(value, "__name__", "metric"))
    if found is None:
        raise PlanError(f"The metric {value!r} of '{head}' is none of Keras's that fits its loss.")
    return found


def _anew(metric: Any, head: str) -> Any:
    """A metric of the same settings that has counted nothing: each head has its own, and the user's stays as it is."""
    import keras

    try:
        if type(metric) is keras.metrics.MeanMetricWrapper:  # its function need not be one that Keras can store
            return keras.metrics.MeanMetricWrapper(metric._fn, metric.name, metric.dtype, **metric._fn_kwargs)
        return type(metric).from_config(metric.get_config())
    except Exception as error:
        raise PlanError(
            f"The metric '{metric.name}' cannot be made anew for '{head}' ({one_line(error)}): give it a get_config "
            "with all that its constructor takes."
        ) from error
