"""Several processes that train one model, by Keras's own distribution or TensorFlow's: who has which rows of a batch.

Every process makes the same call with the same data and draws the same global batches, of which each computes its own
rows. A batch that does not divide is filled up with rows of weight 0, so that the result is that of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.errors import PlanError
from kmerge.methods.registry import Array


@dataclass(frozen=True)
class Processes:
    """The processes of a training.

    Attributes:
        count: how many.
        rank: which one this is, from 0.
        engine: "jax" (`keras.distribution.DataParallel`), "tensorflow" (`tf.distribute.MultiWorkerMirroredStrategy`),
            or "" for one process.
    """

    count: int = 1
    rank: int = 0
    engine: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def rows(self, count: int) -> Array:
        """Numbers of this process's rows in a batch; -1 is a row to fill up with."""
        each = -(-count // self.count)
        numbers = np.arange(self.rank * each, (self.rank + 1) * each)
        return np.where(numbers < count, numbers, -1)

    def own(self, batch: Any) -> Any:
        """This process's rows of a batch `(x, labels)` or `(x, labels, weights)`; with weights where there are several.

        Rows that fill up repeat the last one, with weight 0.
        """
        if self.count == 1:
            return batch
        x, labels, *rest = batch
        count = len(next(iter(labels.values())))
        rows = self.rows(count)
        weights = rest[0] if rest else {name: np.ones(count, np.float32) for name in labels}
        weights = {name: np.where(rows < 0, 0, array[rows]).astype(np.float32) for name, array in weights.items()}
        return self.inputs(x), {name: array[rows] for name, array in labels.items()}, weights

    def inputs(self, x: Any) -> Any:
        """This process's rows of inputs."""
        if self.count == 1:
            return x
        if isinstance(x, (tuple, list)):
            return tuple(self.inputs(part) for part in x)
        return x[self.rows(len(x))]

    def gathered(self, outputs: Any, count: int) -> dict[str, Array]:
        """All rows of outputs, as every process gets them."""
        if self.engine == "jax":
            from jax.experimental import multihost_utils

            outputs = {name: multihost_utils.process_allgather(value, tiled=True) for name, value in outputs.items()}
        return {name: np.asarray(value, np.float32)[:count] for name, value in outputs.items()}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Where each process works by itself: models that are made and run in here know nothing of the others."""
        if self.engine != "jax":
            yield
            return
        import keras

        distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(distribution)


def processes() -> Processes:
    """The processes of which this is one, from what the script has set up.

    Raises:
        PlanError: if they are set up in a way that would not give the result of one process.
    """
    import keras

    if keras.backend.backend() == "jax":
        import jax

        if jax.process_count() == 1:
            return Processes()
        distribution = keras.distribution.distribution()
        if not isinstance(distribution, keras.distribution.DataParallel):
            raise PlanError(
                "There are several processes, and no data parallelism is set: call "
                "keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False)) first."
            )
        return Processes(jax.process_count(), jax.process_index(), "jax")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        strategy = tf.distribute.get_strategy()
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            count = sum(len(tasks) for tasks in resolver.cluster_spec().as_dict().values())
            if strategy.num_replicas_in_sync != count:
                raise PlanError("Every worker has several devices: run one worker for each device.")
            return Processes(count, int(resolver.task_id), "tensorflow")
    return Processes()
