"""Pipelines of TensorFlow without the thread that tunes them.

That thread sleeps for up to a minute at a time. A pipeline that is thrown away wakes it and waits for its end, but
wakes it before it tells it to end, so that it may lie down again: whoever threw the pipeline away stands still until
it wakes up by itself (TensorFlow 2.21). Pipelines without parallel steps have nothing to tune.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

_AHEAD = 2
"""Batches that are read before they are asked for."""


def untuned(dataset: Any) -> Any:
    """A `tf.data.Dataset` that no thread tunes."""
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def for_keras(batches: Iterator[Any]) -> Any:
    """What Keras's `fit` and `evaluate` take in place of a generator, of which they would make a tuned pipeline.

    Args:
        batches: tuples, dictionaries and tuples of these, of arrays with the rows first.

    Returns:
        The batches as they are, or on TensorFlow a `tf.data.Dataset` of them. As of a generator, the number of rows is
        left open, and so are lengths that differ between the first two batches.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    first = list(islice(batches, 2))
    if not first:
        return batches

    def spec(*arrays: Any) -> Any:
        lengths = zip(*(np.shape(array)[1:] for array in arrays), strict=True)
        shape = (None, *(own[0] if len(set(own)) == 1 else None for own in lengths))
        return tf.TensorSpec(shape, tf.as_dtype(np.asarray(arrays[0]).dtype))

    whole = chain(first, batches)
    made = tf.data.Dataset.from_generator(lambda: whole, output_signature=keras.tree.map_structure(spec, *first))
    return untuned(made.prefetch(_AHEAD))
