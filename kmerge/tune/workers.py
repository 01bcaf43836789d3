"""Training on several TensorFlow workers: a loop of its own, because Keras's `fit` fails there (keras#20585).

Under `tf.distribute.MultiWorkerMirroredStrategy` each worker computes the losses of its rows, weighted by how many
labels it has among those of all, and Keras's optimizer sums the gradients of all workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kmerge.tune.processes import Processes


class Workers:
    """The loop of one training.

    Args:
        student: made and compiled within the scope of the strategy.
        processes: the workers.
    """

    def __init__(self, student: Any, processes: Processes) -> None:
        self.student, self.processes = student, processes
        self._step = self._made()

    def fit(self, stream: Iterator[Any], first: int, last: int, steps: int, callbacks: Sequence[Any]) -> None:
        """As `fit` of Keras with `steps_per_epoch`."""
        import keras

        student = self.student
        told = keras.callbacks.CallbackList(list(callbacks), model=student, epochs=last, steps=steps, verbose=0)
        student.stop_training = False
        told.on_train_begin()
        for epoch in range(first, last):
            told.on_epoch_begin(epoch)
            losses = []
            for number in range(steps):
                told.on_train_batch_begin(number)
                losses.append(float(self._step(*next(stream))))
                told.on_train_batch_end(number, {"loss": losses[-1]})
                if student.stop_training:
                    break
            told.on_epoch_end(epoch, {"loss": float(np.mean(losses))})
            if student.stop_training:
                break
        told.on_train_end()

    def _made(self) -> Any:
        import tensorflow as tf

        student, strategy, count = self.student, tf.distribute.get_strategy(), self.processes.count

        def replica(x: Any, y: Any, weights: Any) -> Any:
            context = tf.distribute.get_replica_context()
            variables = student.trainable_variables
            with tf.GradientTape() as tape:
                predictions = student(x, training=True)
                own = {
                    name: tf.stop_gradient(loss.labels(y[name], predictions[name], weights[name]))
                    for name, loss in student.head_losses.items()
                }
                every = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
                parts = [
                    loss(y[name], predictions[name], weights[name]) * (own[name] / tf.maximum(every[name], 1e-12))
                    for name, loss in student.head_losses.items()
                ]
                present = [tf.cast(every[name] > 0, tf.float32) for name in student.head_losses]
                total = student.together(parts, present, 1 / count)
                for loss in student.losses:  # the same on every worker
                    total += tf.cast(loss, tf.float32) / count
            gradients = tape.gradient(total, [variable.value for variable in variables])
            student.optimizer.apply(gradients, variables)  # which sums them over the workers
            return context.all_reduce(tf.distribute.ReduceOp.SUM, total)

        @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
        def step(x: Any, y: Any, weights: Any) -> Any:
            return strategy.run(replica, args=(x, y, weights))

        return step


def measured(student: Any, batches: Iterator[Any]) -> dict[str, float]:
    """Losses of all heads on whole batches `(x, labels)`: every worker computes all of them."""
    sums: dict[str, list[tuple[float, float]]] = {}
    for x, y, *rest in batches:
        predictions = predicted(student, x)
        for name, loss in student.head_losses.items():
            weight = rest[0][name] if rest else np.ones(len(y[name]), np.float32)
            there = float(loss.labels(y[name], predictions[name], weight))
            sums.setdefault(name, []).append((float(loss(y[name], predictions[name], weight)) * there, there))
    found = {f"{name}_loss": _mean(pairs) for name, pairs in sums.items()}
    return {"loss": sum(student.head_weights[name] * found[f"{name}_loss"] for name in sums), **found}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    total = sum(count for _, count in pairs)
    return sum(value for value, _ in pairs) / total if total else 0.0


def predicted(model: Any, x: Any) -> Any:
    """What a model gives on inputs, without Keras's `predict`, which would share the rows among the workers."""
    import keras

    outputs = model(x, training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)
