"""Training on several data sets, on separate inputs, on rows made of pairs, and what is written about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge
from kmerge.data import Entry, open_dataset
from kmerge.tune.feed import Column, Feed, Part
from kmerge.tune.pairs import ENOUGH, POOL, enriched
from kmerge.tune.stored import Budget
from kmerge.tune.teachers import taught

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


def of_any_length(seed: int) -> Any:
    """A network for series of any length."""
    import keras

    keras.utils.set_random_seed(seed)
    x = y = keras.Input((None, 2), name="x")
    y = keras.layers.Conv1D(3, 2, activation="relu", name="conv")(y)
    y = keras.layers.GlobalAveragePooling1D(name="pool")(y)
    return keras.Model(x, keras.layers.Dense(2, "softmax", name="out")(y))


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    return {label: of_any_length(number) for number, label in enumerate("ab")}


def rows(count: int, length: int) -> tuple[Array, Array]:
    return RANDOM.random((count, length, 2), np.float32), RANDOM.integers(2, size=count)


def changed(model: Any, old: Any) -> list[str]:
    return [
        layer.name
        for layer, other in zip(model.layers, old.layers, strict=True)
        if any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), other.get_weights(), strict=True))
    ]


# ------------------------------------------------------------------------------------------------------ several sets


def test_sets_of_different_sizes_take_turns() -> None:
    entry = (Entry("x", frozenset({"x"}), (None, None, 2), "float32"),)
    parts = [
        Part(open_dataset(rows(n, k), entry, [label]), (label,), 4, n) for label, n, k in (("a", 8, 5), ("b", 12, 7))
    ]
    made = Feed(parts, [Column(label, "int32", ()) for label in "ab"], 1, 0)
    assert not made.together
    assert made.steps == 6
    stream = made.stream()
    batches = [next(stream) for _ in range(6)]
    for number, (x, labels, _) in enumerate(batches):
        own, other = ("a", "b") if number % 2 == 0 else ("b", "a")
        assert x.shape == (4, 5 if own == "a" else 7, 2)
        assert (labels[own] >= 0).all()
        assert (labels[other] == -1).all()
    for step in (1, 4):
        later = made.stream(step)
        assert all(np.array_equal(next(later)[0], x) for x, _, _ in batches[step:])


def test_in_each_turn_one_head_learns(sources: dict[str, Any]) -> None:
    import keras

    seen: list[list[str]] = []

    class Turns(keras.callbacks.Callback):  # type: ignore[misc]
        def heads(self) -> dict[str, Array]:
            return {layer.name: layer.get_weights()[0] for layer in self.model.layers if layer.name in "ab"}

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.before = self.heads()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append([name for name, array in self.heads().items() if not np.array_equal(array, self.before[name])])

    merged = kmerge.merge_models(sources, method="mean")
    tuning = kmerge.fine_tune(
        merged,
        {"a": rows(8, 5), "b": rows(8, 7)},
        epochs=1,
        batch_size=8,
        optimizer=keras.optimizers.SGD(0.1),
        validation_split=0.0,
        callbacks=[Turns()],
    )
    assert seen == [["a"], ["b"], ["a"], ["b"]]
    assert changed(tuning.model, merged) == ["conv", "a", "b"]


def test_heads_with_inputs_of_their_own_learn_from_their_own(sources: dict[str, Any]) -> None:
    merged = kmerge.merge_models(sources, method="mean", inputs="separate")
    assert len(merged.inputs) == 2
    one = kmerge.fine_tune(merged, {"b": rows(12, 5)}, train="heads", epochs=1)
    assert changed(one.model, merged) == ["b"]
    healed = kmerge.fine_tune(merged, rows(12, 5)[0], sources, epochs=1, learning_rate=1e-3)
    assert [item.label for item in healed.after] == ["a", "b"]
    assert healed.scores_after["val_loss"] <= healed.scores_before["val_loss"]


# ------------------------------------------------------------------------------------------------------ rows of pairs


class Echo:
    """A teacher that gives back what it is given."""

    names = (("a",),)

    def of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        return {"a": inputs[0]}


def whole(data: Any, seed: int | None) -> Array:
    return np.concatenate([batch.inputs[0] for batch in data.batches(7, seed)])


def test_rows_made_of_pairs_are_taught_as_they_are_and_each_pass_has_all_given_ones(tmp_path: Path) -> None:
    entry = (Entry("x", frozenset({"x"}), (None, 3), "float32"),)
    given = RANDOM.random((20, 3), np.float32)
    data = open_dataset(given, entry, ["a"])
    more = enriched(data, None, (), 5)
    assert more is not None
    kept: Any = taught(data, Echo(), tmp_path / "all", Budget(1 << 20), 0, more=more)  # type: ignore[arg-type]
    assert kept.rows == 80
    assert len(kept.inputs[0]) == 20 * (1 + POOL)
    assert np.array_equal(kept.inputs[0], kept.targets["a"])
    assert np.array_equal(whole(kept, None), given)
    one, two = whole(kept, 1), whole(kept, 2)
    known = {row.tobytes() for row in given}
    for passed in (one, two):
        assert len(passed) == 80
        assert known <= {row.tobytes() for row in passed}
        assert len({row.tobytes() for row in passed} - known) >= 55  # a row may meet itself
    assert np.array_equal(one, whole(kept, 1))
    assert not np.array_equal(np.sort(one, 0), np.sort(two, 0))
    # Each made row lies between two given ones.
    made = kept.inputs[0][20:]
    lines = given[:, None, None] + np.linspace(0, 0.5, 201)[:, None] * (given[None] - given[:, None])[:, :, None]
    gaps = np.abs(lines.reshape(-1, 3)[None] - made[:30, None]).max(-1).min(1)
    assert gaps.max() < 5e-3
    # What does not fit is left out, and the given rows stay.
    least: Any = taught(data, Echo(), tmp_path / "few", Budget(20 * 24 + 1), 0, more=more)  # type: ignore[arg-type]
    assert least.rows == 20
    # Where it gets late, of the made rows those stay that there are.
    turns = iter([False, True])
    echo: Any = Echo()
    hasty: Any = taught(data, echo, tmp_path / "late", Budget(1 << 20), 0, lambda share: next(turns), more)
    assert len(hasty.inputs[0]) == 20 + 20
    assert hasty.rows == 20 + 20
    assert "with 20 more" in hasty.description


def test_of_many_rows_none_are_made() -> None:
    entry = (Entry("x", frozenset({"x"}), (None, 1), "float32"),)
    few, many = (open_dataset(np.zeros((count, 1), np.float32), entry, ["a"]) for count in (10, ENOUGH))
    assert enriched(many, None, (), 0) is None
    assert enriched(few, 0, (), 0) is None
    more = enriched(few, 20, (), 0)
    assert more is not None
    assert more.taken == more.made == 200


# ------------------------------------------------------------------------------------------------------------- logs


def test_tensorboard_is_told_what_heads_do(sources: dict[str, Any], tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    import tensorflow as tf

    merged = kmerge.merge_models(sources, method="mean")
    tuning = kmerge.fine_tune(merged, rows(40, 5)[0], sources, epochs=2, tensorboard=tmp_path / "logs")

    def logged(part: str, name: str) -> list[float]:
        read = accumulators.EventAccumulator(str(tmp_path / "logs" / part), {"tensors": 0}).Reload()
        return [float(tf.make_ndarray(event.tensor_proto)) for event in read.Tensors(f"epoch_{name}")]

    for part, start in (("train", ""), ("validation", "val_")):
        for name in ("loss", "a_loss", "b_agreement"):
            assert logged(part, name) == pytest.approx(tuning.history[start + name], rel=1e-5)


def test_of_a_graph_error_what_happened_is_told() -> None:
    from kmerge.live import one_line

    stack = 'Detected at node x defined at (most recent call last):\n  File "a.py", line 1, in <module>\n'
    text = f"Graph execution error:\n\n{stack}\nCollective ops is aborted by: a worker is gone\n\t [[{{node x}}]]"
    assert one_line(RuntimeError(text)) == "Collective ops is aborted by: a worker is gone"
    assert one_line(ValueError("one\ntwo.")) == "one two"
