"""Losses and metrics of a head that count only the labels that are there, and the losses of distillation.

A label is missing where it is NaN, and for losses over classes also where it is −1.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from kmerge.errors import PlanError

ENTRYWISE = frozenset(
    {
        *("MeanSquaredError", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError"),
        *("BinaryCrossentropy", "BinaryFocalCrossentropy", "Hinge", "SquaredHinge", "Huber", "LogCosh", "Poisson"),
    }
)
"""Losses that are the mean over the entries of a row: each entry may be missing by itself."""
ENTRYWISE_METRICS = frozenset(
    {
        *("MeanSquaredError", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError"),
        *("RootMeanSquaredError", "LogCoshError", "Poisson", "Hinge", "SquaredHinge"),
        *("BinaryAccuracy", "BinaryCrossentropy", "Accuracy"),
    }
)
"""Metrics that are the mean over the entries of a row; all others see whole rows, or none of one with a gap."""
COUNTS = frozenset(
    {
        *("AUC", "Precision", "Recall", "TruePositives", "TrueNegatives", "FalsePositives", "FalseNegatives"),
        *("PrecisionAtRecall", "RecallAtPrecision", "SensitivityAtSpecificity", "SpecificityAtSensitivity"),
    }
)
"""Metrics that count entries, and take a weight for each."""
OVER_CLASSES = frozenset(
    {
        *("BinaryCrossentropy", "BinaryFocalCrossentropy"),
        *("CategoricalCrossentropy", "CategoricalFocalCrossentropy", "SparseCategoricalCrossentropy"),
    }
)
"""Losses for which −1 is no label."""


def masked_loss(inner: Any) -> Any:
    """A loss that leaves out what has no label, from the numerator and from the denominator."""
    return _classes().Masked(inner)


def masked_metric(inner: Any, loss: Any) -> Any:
    """A metric that sees only what has a label, for a head that learns by `loss`."""
    return _classes().MaskedMetric(inner, loss)


def distilled_loss(ending: str, temperature: float, scale: float = 1.0) -> Any:
    """What a head loses against its teacher.

    Args:
        ending: "softmax" or "sigmoid": both sides are logits, and the loss is T² times the Kullback-Leibler divergence
            of the distributions at temperature T; "": both are values, and the loss is their mean squared difference.
        temperature: T; infinity takes the limit, half the mean squared difference of centred logits (of logits, for
            sigmoids an eighth of it), each divided by `scale`.
        scale: variance of the teacher's values.
    """
    return _classes().Distilled(ending, temperature, scale)


def equal_decisions(ending: str) -> Any:
    """A metric: the share of rows on which a head decides as its teacher does."""
    return _classes().EqualDecisions(ending)


def is_sparse(loss: Any) -> bool:
    """Whether labels are class numbers."""
    return loss_name(loss) == "SparseCategoricalCrossentropy"


def is_keras_own(loss: Any) -> bool:
    """Whether a loss is one of Keras's own classes, and so takes labels of its output's shape."""
    import keras

    kind = type(getattr(loss, "inner", loss))
    return getattr(keras.losses, kind.__name__, None) is kind and kind.__name__ != "CTC"


def loss_name(loss: Any) -> str:
    """The class of a loss, of what is inside a masked one."""
    return type(getattr(loss, "inner", loss)).__name__


@cache
def _classes() -> SimpleNamespace:
    import keras
    from keras import ops

    def known(y_true: Any, y_pred: Any, name: str, entrywise: bool, apart: bool = True) -> tuple[Any, Any, Any]:
        """Labels with 0 where there is none, predictions, and 1 where there is one, shaped as the values of the loss
        `name` or of a metric: one per entry (`apart`: each a row of its own), or one per row.
        """
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.convert_to_tensor(y_true)
        whole = "int" in keras.backend.standardize_dtype(y_true.dtype)
        there = ops.ones_like(y_true, "bool") if whole else ops.logical_not(ops.isnan(y_true))
        if name in OVER_CLASSES:
            there = ops.logical_and(there, y_true >= 0)
        labels = ops.where(there, y_true, ops.zeros_like(y_true))
        if name == "SparseCategoricalCrossentropy":
            if len(labels.shape) == len(y_pred.shape):
                labels, there = ops.squeeze(labels, -1), ops.squeeze(there, -1)
        elif entrywise:
            if len(labels.shape) == len(y_pred.shape) - 1:
                labels, there = ops.expand_dims(labels, -1), ops.expand_dims(there, -1)
            if apart:
                labels, y_pred = ops.expand_dims(labels, -1), ops.expand_dims(y_pred, -1)
        else:
            if len(labels.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
                labels, there = ops.expand_dims(labels, -1), ops.expand_dims(there, -1)
            there = ops.all(there, axis=-1) if len(there.shape) > 1 else there
        return labels, y_pred, ops.cast(there, "float32")

    def weighted(there: Any, sample_weight: Any, mask: Any) -> Any:
        for factor in (sample_weight, mask):
            if factor is not None:
                factor = ops.cast(factor, "float32")
                if len(factor.shape) == len(there.shape) + 1:
                    factor = ops.squeeze(factor, -1)
                while len(factor.shape) < len(there.shape):
                    factor = ops.expand_dims(factor, -1)
                there = there * factor
        return there

    def mean(values: Any, weights: Any) -> Any:
        values = ops.cast(values, "float32")
        while len(weights.shape) < len(values.shape):
            weights = ops.expand_dims(weights, -1)
        weights = weights * ops.ones_like(values)
        total = ops.sum(weights)
        return ops.sum(ops.where(weights > 0, values, ops.zeros_like(values)) * weights) / ops.maximum(total, 1e-12)

    class Masked(keras.losses.Loss):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            super().__init__(name=inner.name, reduction="sum")
            self.inner = inner

        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            mask = getattr(y_pred, "_keras_mask", None)
            labels, predictions, there = self._known(y_true, y_pred)
            values = self.inner.call(labels, ops.cast(predictions, "float32"))
            if len(values.shape) == 0:
                raise PlanError(
                    f"The loss '{self.inner.name}' gives one number for a whole batch, so that missing labels would "
                    "count: let it give one for each row, such as a mean over axis -1."
                )
            return mean(values, weighted(there, sample_weight, mask))

        def call(self, y_true: Any, y_pred: Any) -> Any:
            return self(y_true, y_pred)

        def labels(self, y_true: Any, y_pred: Any, sample_weight: Any) -> Any:
            """By what the sum of the values is divided: the weights of the labels that are there."""
            mask = getattr(y_pred, "_keras_mask", None)
            return ops.sum(weighted(self._known(y_true, y_pred)[2], sample_weight, mask))

        def _known(self, y_true: Any, y_pred: Any) -> tuple[Any, Any, Any]:
            name = loss_name(self.inner)
            return known(y_true, y_pred, name, name in ENTRYWISE)

    class MaskedMetric(keras.metrics.Metric):  # type: ignore[misc]
        def __init__(self, inner: Any, loss: Any) -> None:
            super().__init__(name=inner.name)
            self.inner, self.loss = inner, loss_name(loss)
            kind = type(inner).__name__
            self.entrywise, self.apart = kind in ENTRYWISE_METRICS | COUNTS, kind not in COUNTS

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            mask = getattr(y_pred, "_keras_mask", None)
            labels, predictions, there = known(y_true, y_pred, self.loss, self.entrywise, self.apart)
            self.inner.update_state(labels, predictions, sample_weight=weighted(there, sample_weight, mask))

        def result(self) -> Any:
            return self.inner.result()

        def reset_state(self) -> None:
            self.inner.reset_state()

    class Distilled(keras.losses.Loss):  # type: ignore[misc]
        def __init__(self, ending: str, temperature: float, scale: float) -> None:
            super().__init__(name="distillation", reduction="sum")
            self.ending, self.temperature, self.scale = ending, temperature, scale

        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            wanted, given = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
            if self.temperature == float("inf") and self.ending:
                if self.ending == "softmax":
                    wanted -= ops.mean(wanted, -1, keepdims=True)
                    given -= ops.mean(given, -1, keepdims=True)
                return mean(ops.mean(ops.square(wanted - given), -1), self._weights(wanted, sample_weight)) / self.scale
            hot = self.temperature
            if self.ending == "softmax":
                logs = ops.log_softmax(wanted / hot), ops.log_softmax(given / hot)
                values = hot**2 * ops.sum(ops.exp(logs[0]) * (logs[0] - logs[1]), -1)
            elif self.ending == "sigmoid":
                share, one, two = ops.sigmoid(wanted / hot), wanted / hot, given / hot
                gap = share * (ops.log_sigmoid(one) - ops.log_sigmoid(two))
                gap += (1 - share) * (ops.log_sigmoid(-one) - ops.log_sigmoid(-two))
                values = hot**2 * ops.mean(gap, -1)
            else:
                values = ops.mean(ops.square(wanted - given), -1) / self.scale
            return mean(values, self._weights(wanted, sample_weight))

        def call(self, y_true: Any, y_pred: Any) -> Any:
            return self(y_true, y_pred)

        def labels(self, y_true: Any, y_pred: Any, sample_weight: Any) -> Any:
            return ops.sum(self._weights(ops.cast(y_true, "float32"), sample_weight))

        def _weights(self, values: Any, sample_weight: Any) -> Any:
            return weighted(ops.ones_like(values[..., 0]), sample_weight, None)

    class EqualDecisions(keras.metrics.Mean):  # type: ignore[misc]
        def __init__(self, ending: str) -> None:
            super().__init__(name="agreement")
            self.ending = ending

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if self.ending == "softmax":
                equal = ops.equal(ops.argmax(y_true, -1), ops.argmax(y_pred, -1))
            else:
                equal = ops.equal(ops.convert_to_tensor(y_true) >= 0, y_pred >= 0)
            return super().update_state(ops.cast(equal, "float32"), sample_weight=sample_weight)

    return SimpleNamespace(Masked=Masked, MaskedMetric=MaskedMetric, Distilled=Distilled, EqualDecisions=EqualDecisions)
