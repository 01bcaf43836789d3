"""Pipelines of TensorFlow without the thread that tunes them.

That thread sleeps for up to a minute at a time. A pipeline that is thrown away wakes it and waits for its end, but
wakes it before it tells it to end, so that it may lie down again: whoever threw the pipeline away stands still until
it wakes up by itself (TensorFlow 2.21). Pipelines without parallel steps have nothing to tune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from kmerge.errors import DataError

_AHEAD = 2
"""Batches that are read before they are asked for."""


def untuned(dataset: Any) -> Any:
    """A `tf.data.Dataset` that no thread tunes."""
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def for_keras(stream: Callable[[], Iterator[Any]]) -> Any:
    """What Keras's `fit` and `evaluate` take in place of a generator, of which they would make a tuned pipeline.

    Args:
        stream: begins a pass over the batches. A batch is a tuple of inputs (an array or a tuple of them) and of
            dictionaries of arrays; all arrays have the rows first.

    Returns:
        A generator, or on TensorFlow a `tf.data.Dataset`, which may be passed over again. As Keras does with a
        generator, it leaves open the number of rows, and lengths that differ between the first two batches.

    Raises:
        DataError: arrays of the first two batches have other numbers of axes.
    """
    import keras

    batches = stream()
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    first = list(islice(batches, 2))
    if not first:
        return batches

    def spec(*arrays: Any) -> Any:
        shapes = [np.shape(array) for array in arrays]
        if len({len(shape) for shape in shapes}) > 1:
            said = " and ".join(map(str, shapes))
            raise DataError(f"Arrays of batches that follow each other have shapes {said}: give all as many axes.")
        lengths = (own[0] if len(set(own)) == 1 else None for own in zip(*(shape[1:] for shape in shapes), strict=True))
        return tf.TensorSpec((None, *lengths), tf.as_dtype(np.asarray(arrays[0]).dtype))

    begun = [chain(first, batches)]  # Keras looks at a first batch and begins anew under a `tf.distribute.Strategy`
    made = tf.data.Dataset.from_generator(
        lambda: begun.pop() if begun else stream(), output_signature=keras.tree.map_structure(spec, *first)
    )
    return untuned(made.prefetch(_AHEAD))
