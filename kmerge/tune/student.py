"""The model that is trained: a functional one over the layers of a copy, with a loss per head and a way to weigh them.

It is compiled and fitted as any Keras model. What it adds is one loss per head before they are summed, and for gradient
norms and projected gradients a training step that sees the gradient of each head, for each backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

WEIGHTINGS = ("uncertainty", "gradnorm", "pcgrad")
ALPHA, STEP = 1.5, 0.025
"""Of GradNorm: how much heads that learn slowly are favoured, and how fast weights follow."""


def make_student(
    inputs: Sequence[Any],
    outputs: Mapping[str, Any],
    *,
    plain: Any,
    losses: Mapping[str, Any],
    weights: Mapping[str, float],
    weighting: str = "",
    halves: Sequence[str] = (),
    fixed: bool = False,
    shared: Sequence[Any] = (),
) -> Any:
    """A model to compile and fit.

    Args:
        inputs: symbolic inputs.
        outputs: symbolic outputs by name.
        plain: the model as users know it, which is what callbacks save.
        losses: per output, called with labels, predictions and sample weights.
        weights: of the losses.
        weighting: "" (fixed weights), "uncertainty" (arXiv:1705.07115), "gradnorm" (arXiv:1711.02257) or "pcgrad"
            (arXiv:2001.06782).
        halves: outputs whose loss is a squared error, of which uncertainty takes half.
        fixed: run every layer in inference mode: no dropout, statistics stay.
        shared: variables of the last layer that all heads share, for GradNorm.
    """
    kind = _student_class()
    given = list(inputs)
    student = kind(inputs=given[0] if len(given) == 1 else given, outputs=dict(outputs), name="student")
    student.prepare(plain, dict(losses), dict(weights), weighting, tuple(halves), fixed, tuple(shared))
    return student


@cache
def _student_class() -> Any:
    import keras
    from keras import ops

    class Student(keras.Model):  # type: ignore[misc]
        def prepare(
            self,
            plain: Any,
            losses: dict[str, Any],
            weights: dict[str, float],
            weighting: str,
            halves: tuple[str, ...],
            fixed: bool,
            shared: tuple[Any, ...],
        ) -> None:
            object.__setattr__(self, "_plain", plain)  # tracked by nothing: its weights are not to be trained
            object.__setattr__(self, "_shared", shared)
            self.head_losses, self.head_weights = losses, weights
            self.weighting, self.halves, self.fixed = weighting, halves, fixed
            self.loss_trackers = {name: keras.metrics.Mean(name=f"{name}_loss") for name in losses}
            self.balance: Any = None
            self.first: Any = None
            if weighting in ("uncertainty", "gradnorm"):
                start = "zeros" if weighting == "uncertainty" else "ones"
                own = weighting == "uncertainty"
                self.balance = self.add_weight(shape=(len(losses),), initializer=start, trainable=own, name="balance")
            if weighting == "gradnorm":
                self.first = self.add_weight(shape=(len(losses),), initializer="zeros", trainable=False, name="first")

        def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
            return super().call(inputs, training=False if self.fixed else training, mask=mask)

        def save(self, filepath: Any, *args: Any, **settings: Any) -> None:
            """Callbacks that save get what users know."""
            self._plain.carry()
            self._plain.model.save(filepath, *args, **settings)

        def save_weights(self, filepath: Any, *args: Any, **settings: Any) -> None:
            self._plain.carry()
            self._plain.model.save_weights(filepath, *args, **settings)

        # ---------------------------------------------------------------------------------------------- losses

        def parts(self, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
            """The loss of each head."""
            found = []
            for name, loss in self.head_losses.items():
                weight = sample_weight.get(name) if sample_weight is not None else None
                value = loss(y[name], y_pred[name], weight)
                self.loss_trackers[name].update_state(value, sample_weight=loss.labels(y[name], y_pred[name], weight))
                found.append(value)
            return found

        def present(self, y: Any, y_pred: Any, sample_weight: Any) -> list[Any]:
            """For each head 1 where a batch holds labels for it, else 0."""
            found = []
            for name, loss in self.head_losses.items():
                weight = sample_weight.get(name) if sample_weight is not None else None
                found.append(ops.cast(loss.labels(y[name], y_pred[name], weight) > 0, "float32"))
            return found

        def together(self, parts: Sequence[Any], present: Sequence[Any] | None = None, share: float = 1.0) -> Any:
            """The losses of all heads as one.

            Args:
                parts: loss of each head.
                present: 1 for each head that there are labels for, else 0; None for all of them.
                share: this process's of what does not come from rows.
            """
            present = [1.0] * len(parts) if present is None else present
            if self.weighting == "uncertainty":
                total = 0.0
                for number, (name, value) in enumerate(zip(self.head_losses, parts, strict=True)):
                    half = 0.5 if name in self.halves else 1.0
                    total += half * ops.exp(-self.balance[number]) * value
                    total += 0.5 * share * present[number] * self.balance[number]
                return total
            total = 0.0
            for number, (name, value) in enumerate(zip(self.head_losses, parts, strict=True)):
                factor = self.balance[number] if self.weighting == "gradnorm" else self.head_weights[name]
                total += factor * value
            return total

        def compute_loss(
            self,
            x: Any = None,
            y: Any = None,
            y_pred: Any = None,
            sample_weight: Any = None,
            training: bool = True,
        ) -> Any:
            parts = self.parts(y, y_pred, sample_weight)
            present = self.present(y, y_pred, sample_weight) if self.weighting == "uncertainty" else None
            total = self.together(parts, present)
            for loss in self.losses:
                total += ops.cast(loss, "float32")
            return total

        # ------------------------------------------------------------------------------- gradients of each head

        def combined(
            self, parts: Sequence[Any], rows: Sequence[Sequence[Any]], present: Sequence[Any] | None = None
        ) -> list[Any]:
            """One gradient per variable from those of each head.

            Args:
                parts: loss of each head.
                rows: gradients of each head, per trainable variable.
                present: 1 for each head that there are labels for, else 0; None for all of them.
            """
            if self.weighting == "pcgrad":
                return self._projected(
                    [[self.head_weights[n] * g for g in r] for n, r in zip(self.head_losses, rows, strict=True)]
                )
            factors = [self.balance[number] for number in range(len(parts))]
            gradients = [
                _sum([f * g for f, g in zip(factors, column, strict=True)]) for column in zip(*rows, strict=True)
            ]
            self._rebalance(parts, rows, [1.0] * len(parts) if present is None else present)
            return gradients

        def _projected(self, rows: list[list[Any]]) -> list[Any]:
            """Each head's gradient without what goes against another head's; the others in turn after it.

            Departs from the paper: the order of the others is not drawn anew in each step.
            """
            moved = []
            for number, own in enumerate(rows):
                result = list(own)
                for step in range(1, len(rows)):
                    other = rows[(number + step) % len(rows)]
                    inner = _sum([ops.sum(a * b) for a, b in zip(result, other, strict=True)])
                    square = _sum([ops.sum(ops.square(b)) for b in other])
                    share = ops.minimum(inner, 0.0) / ops.maximum(square, 1e-12)
                    result = [a - share * b for a, b in zip(result, other, strict=True)]
                moved.append(result)
            return [_sum(column) for column in zip(*moved, strict=True)]

        def _rebalance(self, parts: Sequence[Any], rows: Sequence[Sequence[Any]], present: Sequence[Any]) -> None:
            """GradNorm: weights so that heads which learn slowly have the larger gradients at the last shared layer;
            among those that there are labels for, whose weights keep their sum.
            """
            ids = {id(variable) for variable in self._shared}
            places = [place for place, variable in enumerate(self.trainable_weights) if id(variable) in ids]
            places = places or list(range(len(self.trainable_weights)))
            norms = ops.stack([ops.sqrt(_sum([ops.sum(ops.square(row[p])) for p in places]) + 1e-12) for row in rows])
            losses = ops.stack([ops.cast(part, "float32") for part in parts])
            first, balance = ops.convert_to_tensor(self.first), ops.convert_to_tensor(self.balance)
            there = ops.stack([ops.cast(item, "float32") for item in present])
            count = ops.maximum(ops.sum(there), 1.0)
            first = ops.where((first > 0) | (there == 0), first, ops.maximum(losses, 1e-8))
            self.first.assign(first)
            rates = there * losses / ops.maximum(first, 1e-8)
            rates = rates / ops.maximum(ops.sum(rates) / count, 1e-8)
            now, norms = there * balance * norms, there * norms
            wanted = ops.sum(now) / count * rates**ALPHA
            step = STEP * ops.sign(now - wanted) * norms * count / ops.maximum(ops.sum(norms), 1e-12)
            moved = ops.maximum(balance - step, 1e-3)
            scale = ops.sum(there * balance) / ops.maximum(ops.sum(there * moved), 1e-12)
            self.balance.assign(ops.where(there > 0, moved * scale, balance))

        def train_step(self, *given: Any) -> Any:
            if self.weighting not in ("gradnorm", "pcgrad"):
                return super().train_step(*given)
            step: Any = _STEPS[keras.backend.backend()]
            return step(self, *given)

    return Student


def _sum(values: Sequence[Any]) -> Any:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _tensorflow_step(model: Any, data: Any) -> Any:
    import keras
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    variables = model.trainable_weights
    with tf.GradientTape(persistent=True) as tape:
        y_pred = model(x, training=True)
        parts = model.parts(y, y_pred, sample_weight)
        extra = [tf.cast(loss, tf.float32) for loss in model.losses]
        rest = tf.add_n(extra) if extra else None
    none = tf.UnconnectedGradients.ZERO
    values = [variable.value for variable in variables]
    rows = [
        [tf.convert_to_tensor(g) for g in tape.gradient(part, values, unconnected_gradients=none)] for part in parts
    ]
    present = model.present(y, y_pred, sample_weight)
    gradients = model.combined(parts, rows, present)
    if rest is not None:
        more = tape.gradient(rest, values, unconnected_gradients=none)
        gradients = [one + tf.convert_to_tensor(two) for one, two in zip(gradients, more, strict=True)]
    del tape
    model.optimizer.apply(gradients, variables)
    model._loss_tracker.update_state(model.together(parts) + (0.0 if rest is None else rest))
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _torch_step(model: Any, data: Any) -> Any:
    import keras
    import torch

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    variables = model.trainable_weights
    values = [variable.value for variable in variables]
    model.zero_grad()
    y_pred = model(x, training=True)
    parts = model.parts(y, y_pred, sample_weight)
    extra = list(model.losses)

    def gradients_of(loss: Any) -> list[Any]:
        found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]

    rows = [gradients_of(part) for part in parts]
    rest = _sum(extra) if extra else None
    more = gradients_of(rest) if rest is not None else None
    with torch.no_grad():
        gradients = model.combined(parts, rows, model.present(y, y_pred, sample_weight))
        if more is not None:
            gradients = [one + two for one, two in zip(gradients, more, strict=True)]
        model.optimizer.apply(gradients, variables)
        model._loss_tracker.update_state(model.together(parts) + (0.0 if rest is None else rest))
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _jax_step(model: Any, state: Any, data: Any) -> Any:
    import jax
    import keras

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    trainable, others, optimizer, metrics = state

    def losses_of(values: Any) -> Any:
        y_pred, after, extra = model.stateless_call(values, others, x, return_losses=True, training=True)
        mapping = [*zip(model.metrics_variables, metrics, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            parts = model.parts(y, y_pred, sample_weight)
        seen = [_current(scope, variable, value) for variable, value in mapping]
        rest = _sum(extra) if extra else 0.0
        return keras.ops.stack([*parts, keras.ops.cast(rest, "float32")]), (y_pred, after, seen)

    losses, (y_pred, others, metrics) = losses_of(trainable)
    jacobian = jax.jacrev(lambda values: losses_of(values)[0])(trainable)
    count = len(model.head_losses)
    rows = [[gradient[number] for gradient in jacobian] for number in range(count)]
    parts = [losses[number] for number in range(count)]
    mapping = [
        *zip(model.trainable_variables, trainable, strict=True),
        *zip(model.non_trainable_variables, others, strict=True),
    ]
    with keras.StatelessScope(mapping) as scope:
        total = model.together(parts) + losses[count]
        gradients = model.combined(parts, rows, model.present(y, y_pred, sample_weight))
    others = [_current(scope, v, value) for v, value in zip(model.non_trainable_variables, others, strict=True)]
    gradients = [one + gradient[count] for one, gradient in zip(gradients, jacobian, strict=True)]
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    mapping = [*zip(model.metrics_variables, metrics, strict=True)]
    with keras.StatelessScope(mapping) as scope:
        model._loss_tracker.update_state(total)
        logs = model.compute_metrics(x, y, y_pred, sample_weight)
    metrics = [_current(scope, variable, value) for variable, value in mapping]
    return logs, (trainable, others, optimizer, metrics)


def _current(scope: Any, variable: Any, value: Any) -> Any:
    found = scope.get_current_value(variable)
    return value if found is None else found


_STEPS = {"tensorflow": _tensorflow_step, "jax": _jax_step, "torch": _torch_step}
