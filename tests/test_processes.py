"""Which rows each of several processes takes; that they end where one does, benchmarks/distributed.py shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmerge.tune.processes import Processes, processes


@given(count=st.integers(1, 6), rows=st.integers(1, 40), weighted=st.booleans())
def test_processes_have_all_rows_once_and_equally_many(count: int, rows: int, weighted: bool) -> None:
    x, labels = np.arange(rows), {"a": np.arange(rows) * 2, "b": -np.arange(rows)}
    given_weights = {name: np.linspace(1, 2, rows).astype(np.float32) for name in labels}
    batch = (x, labels, given_weights) if weighted else (x, labels)
    seen: list[int] = []
    sizes = set()
    for rank in range(count):
        part = Processes(count, rank, "jax").own(batch)
        if count == 1:
            assert part is batch
            return
        mine, own, weights = part
        sizes.add(len(mine))
        for name in labels:
            there = weights[name] > 0
            np.testing.assert_array_equal(own[name][there], labels[name][mine[there]])
            np.testing.assert_array_equal(
                weights[name][there], (given_weights[name] if weighted else x * 0 + 1)[mine[there]]
            )
        seen += mine[weights["a"] > 0].tolist()
    assert seen == list(range(rows))
    assert len(sizes) == 1


def test_several_inputs_are_shared_out_alike() -> None:
    one, two = Processes(2, 1, "jax").inputs((np.arange(5), np.arange(5) * 2))
    assert one.tolist() == [3, 4, 4]
    assert two.tolist() == [6, 8, 8]


def test_one_process_is_one_process() -> None:
    assert processes() == Processes(1, 0, "")
    with processes().alone():
        assert Processes().is_first


def test_losses_of_parts_weighted_by_their_labels_are_the_loss_of_the_whole() -> None:
    """What `Workers` does with the losses of each worker."""
    import keras

    from kmerge.tune.losses import distilled_loss, masked_loss

    random = np.random.default_rng(0)
    scores = keras.ops.softmax(random.normal(size=(7, 3)).astype(np.float32))
    classes, logits = np.array([0, -1, 2, 1, -1, 0, 2]), random.normal(size=(7, 3)).astype(np.float32)
    for loss, y in (
        (masked_loss(keras.losses.SparseCategoricalCrossentropy()), classes),
        (distilled_loss("softmax", 2.0, 1.0), logits),
    ):
        whole = float(loss(y, scores, np.ones(7, np.float32)))
        found, every = 0.0, 0.0
        for rank in range(2):
            several = Processes(2, rank, "tensorflow")
            _, own, weights = several.own((np.arange(7), {"a": y}))
            mine = keras.ops.take(scores, several.rows(7) % 7, 0)
            labels = float(loss.labels(own["a"], mine, weights["a"]))
            found, every = found + float(loss(own["a"], mine, weights["a"])) * labels, every + labels
        assert found / every == pytest.approx(whole, rel=1e-5)
