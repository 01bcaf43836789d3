"""What Keras is given to read: batches as they are, which no thread of TensorFlow tunes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kmerge.data.pipeline import for_keras
from kmerge.errors import DataError


def batches() -> Iterator[Any]:
    for rows, length in ((3, 5), (2, 7), (4, 6)):
        yield (np.full((rows, length, 2), rows, np.float32), np.array([["a"]] * rows)), {"y": np.arange(rows)}


def test_batches_keep_their_types_and_leave_lengths_open() -> None:
    made = for_keras(batches)
    (numbers, letters), labels = made.element_spec
    assert (numbers.shape.as_list(), letters.shape.as_list()) == ([None, None, 2], [None, 1])
    assert (numbers.dtype.name, letters.dtype.name, labels["y"].dtype.name) == ("float32", "string", "int64")
    assert made.options().autotune.enabled is False
    for _ in range(2):  # every pass begins anew
        found = list(made.as_numpy_iterator())
        assert [x.shape for (x, _), _ in found] == [(3, 5, 2), (2, 7, 2), (4, 6, 2)]
        assert [text.ravel().tolist() for (_, text), _ in found] == [[b"a"] * 3, [b"a"] * 2, [b"a"] * 4]
        assert [y["y"].tolist() for _, y in found] == [[0, 1, 2], [0, 1], [0, 1, 2, 3]]


def test_batches_of_other_ranks_are_told_of() -> None:
    with pytest.raises(DataError, match=r"have shapes \(2, 3\) and \(2, 3, 1\): give all as many axes"):
        for_keras(lambda: iter([(np.ones((2, 3)),), (np.ones((2, 3, 1)),)]))


def test_a_generator_is_left_alone_where_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    assert list(for_keras(lambda: iter(()))) == []
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    own = batches()
    assert for_keras(lambda: own) is own


def test_every_batch_counts_under_a_strategy() -> None:
    """Keras looks at a first batch there, and begins anew."""
    import keras
    import tensorflow as tf

    def numbers() -> Iterator[Any]:
        yield from ((np.full((4, 1), n, np.float32), np.zeros((4, 1), np.float32)) for n in range(10))

    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        inputs = keras.Input((1,))
        model = keras.Model(inputs, keras.layers.Identity()(inputs))
        model.compile(loss="mean_absolute_error")
        assert model.evaluate(for_keras(numbers), steps=10, verbose=0) == pytest.approx(4.5)
