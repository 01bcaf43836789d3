"""Healing and fine-tuning: what is learnt, from what, what moves, and that a killed run ends as an unbroken one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import kmerge
from kmerge.data import Entry, open_dataset
from kmerge.data import generator as kmerge_generator
from kmerge.tune.checkpoint import NAME, State, load_state, save_state
from kmerge.tune.feed import Column, Feed, Part, shares
from kmerge.tune.losses import distilled_loss, masked_loss, masked_metric

Array = np.ndarray[Any, Any]
LABELS = "abc"
NAN = np.nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fixtures_dir: Path) -> Path:
    """Three dense networks that were trained apart, merged badly, with their inputs."""
    folder = tmp_path_factory.mktemp("tune")
    kmerge.combine(paths(fixtures_dir), folder / "merged.keras", method="mean")
    return folder


@pytest.fixture
def eagerly() -> Iterator[None]:
    """For trainings of a few steps: tracing their functions takes longer than the steps."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def paths(fixtures_dir: Path) -> dict[str, Path]:
    return {label: fixtures_dir / f"mlp_{label}.keras" for label in LABELS}


@pytest.fixture(scope="module")
def tasks(load_task: Callable[..., tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    return {label: load_task(f"mlp_{label}", held_back=False) for label in LABELS}


@pytest.fixture(scope="module")
def inputs(tasks: dict[str, tuple[Array, Array]]) -> Array:
    return np.concatenate([x[:150] for x, _ in tasks.values()])


def weights(model: Any) -> list[Array]:
    return [np.array(value) for value in model.get_weights()]


def values(tensor: Any) -> Any:
    import keras

    return keras.ops.convert_to_numpy(tensor)


def load(path: Path) -> Any:
    import keras

    return keras.saving.load_model(path, compile=False)


def mean(agreements: Any) -> float:
    return float(np.mean([item.value for item in agreements]))


# ------------------------------------------------------------------------------------------------------------ losses


def test_missing_labels_count_neither_above_nor_below_the_line() -> None:
    import keras

    loss = masked_loss(keras.losses.SparseCategoricalCrossentropy())
    given = np.array([[0.5, 0.5], [0.9, 0.1], [0.25, 0.75]], np.float32)
    assert float(loss(np.array([0, -1, 1]), given)) == pytest.approx(-np.log([0.5, 0.75]).mean(), rel=1e-5)
    assert float(loss(np.array([-1, -1, -1]), given)) == 0
    weighted = float(loss(np.array([0, -1, 1]), given, np.array([1.0, 5.0, 3.0])))
    assert weighted == pytest.approx(-(np.log(0.5) + 3 * np.log(0.75)) / 4, rel=1e-5)
    squared = masked_loss(keras.losses.MeanSquaredError())
    wanted = np.array([[1.0, NAN], [NAN, NAN], [3.0, 5.0]], np.float32)
    assert float(squared(wanted, np.zeros((3, 2), np.float32))) == pytest.approx((1 + 9 + 25) / 3)
    assert float(squared(np.array([[-1.0, 2.0]]), np.zeros((1, 2)))) == pytest.approx(2.5)  # −1 is a value here
    hot = masked_loss(keras.losses.CategoricalCrossentropy())
    rows = np.array([[1, 0], [NAN, NAN], [0, 1]], np.float32)
    assert float(hot(rows, given)) == pytest.approx(-np.log([0.5, 0.75]).mean(), rel=1e-5)


def test_gradients_of_missing_labels_are_zero_and_not_nan() -> None:
    import keras

    x = keras.Input((1,))
    model = keras.Model(x, keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(x))
    loss = masked_loss(keras.losses.BinaryCrossentropy())
    model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=False)
    model.train_on_batch(np.full((2, 1), 0.4, np.float32), np.array([[NAN], [1.0]], np.float32))
    # −log(0.4 w) falls by 1 / w at w = 1, and the row without a label adds nothing.
    assert model.get_weights()[0][0, 0] == pytest.approx(2, rel=1e-4)


def test_metrics_leave_out_what_has_no_label() -> None:
    import keras

    metric = masked_metric(keras.metrics.SparseCategoricalAccuracy(), keras.losses.SparseCategoricalCrossentropy())
    metric.update_state(np.array([0, -1, 1, 1]), np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]))
    assert float(metric.result()) == pytest.approx(2 / 3)


def test_distillation_by_hand() -> None:
    theirs, mine = np.array([[2.0, 0.0]]), np.array([[0.0, 0.0]])
    share = 1 / (1 + np.exp(-1))  # at temperature 2
    by_hand = 4 * (share * np.log(share / 0.5) + (1 - share) * np.log((1 - share) / 0.5))
    assert float(distilled_loss("softmax", 2.0)(theirs, mine)) == pytest.approx(by_hand, rel=1e-5)
    assert float(distilled_loss("softmax", float("inf"))(theirs, mine)) == pytest.approx(1.0)  # centred: ±1
    assert float(distilled_loss("sigmoid", 2.0)(theirs[:, :1], mine[:, :1])) == pytest.approx(by_hand, rel=1e-5)
    assert float(distilled_loss("", 2.0, 4.0)(theirs, mine)) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------------- feed


def feed(rows: dict[str, int], size: int) -> Feed:
    entry = (Entry("x", frozenset({"x"}), (None, 1), "float32"),)
    ratio = shares(size, [1] * len(rows))
    parts = []
    for (label, count), share in zip(rows.items(), ratio, strict=True):
        x = np.arange(count, dtype=np.float32)[:, None] + 1000 * LABELS.index(label)
        parts.append(Part(open_dataset((x, np.full(count, 1)), entry, [label]), (label,), share, count))
    return Feed(parts, [Column(label, "int32", ()) for label in rows], 1, 0)


def test_batches_are_mixed_and_each_head_sees_its_own_labels() -> None:
    made = feed({"a": 10, "b": 4}, 4)
    assert made.steps == 5
    x, labels, _ = next(made.stream())
    assert (x[:2] < 1000).all()
    assert (x[2:] >= 1000).all()
    assert labels["a"].tolist() == [1, 1, -1, -1]
    assert labels["b"].tolist() == [-1, -1, 1, 1]
    stream = made.stream()
    seen = np.concatenate([next(stream)[0][:2, 0] for _ in range(5)])
    assert sorted(seen) == list(range(10))


def test_a_stream_goes_on_where_it_was() -> None:
    made = feed({"a": 10, "b": 4}, 4)
    stream = made.stream()
    whole = [next(stream)[0].tolist() for _ in range(14)]
    for step in (1, 5, 7):
        later = made.stream(step)
        assert [next(later)[0].tolist() for _ in range(14 - step)] == whole[step:]


def test_what_a_merge_was_fitted_to_is_not_held_back() -> None:
    from kmerge.calibration.inputs import Inputs
    from kmerge.tune.training import _split_apart

    entry = (Entry("x", frozenset({"x"}), (None, 1), "float32"),)
    data = open_dataset(np.arange(100, dtype=np.float32)[:, None], entry, ["a"])
    arrays, _ = data.draw(60, kmerge_generator(7, "rows"))
    fitted, _ = Inputs(arrays, np.full(60, -1)).split(0.1, 7)
    train, held = (next(part.batches(200)).inputs[0].ravel() for part in _split_apart(data, 0.3, 0, 60, 7))
    assert len(held) == 30
    assert not set(held) & set(fitted.arrays[0].ravel())
    assert sorted([*train, *held]) == list(range(100))


# ------------------------------------------------------------------------------------------------------------ healing


def test_healing_wins_back_and_changes_nothing_that_is_given(
    folder: Path, fixtures_dir: Path, inputs: Array, tmp_path: Path
) -> None:
    before = (folder / "merged.keras").read_bytes()
    tuning = kmerge.fine_tune(
        folder / "merged.keras", inputs, paths(fixtures_dir), epochs=8, output=tmp_path / "healed.keras"
    )
    assert (folder / "merged.keras").read_bytes() == before
    assert mean(tuning.after) > mean(tuning.before) + 0.1
    healed, given = load(tmp_path / "healed.keras"), load(folder / "merged.keras")
    assert json.loads(healed.to_json())["config"]["layers"] == json.loads(given.to_json())["config"]["layers"]
    assert all(np.array_equal(a, b) for a, b in zip(weights(healed), weights(tuning.model), strict=True))
    found = kmerge.inspect(tmp_path / "healed.keras")
    assert found.merge is not None
    assert [item["label"] for item in found.merge["tuning"]["after"]] == list(LABELS)
    assert {"val_agreement", "a_agreement", "val_b_loss"} <= tuning.history.keys()


def test_healing_never_hands_back_less_than_it_was_given(
    folder: Path, fixtures_dir: Path, inputs: Array, tmp_path: Path
) -> None:
    import keras

    model = load(folder / "merged.keras")
    given = weights(model)
    sources = list(paths(fixtures_dir).values())
    tuning = kmerge.fine_tune(
        model,
        inputs,
        sources,
        epochs=1,
        learning_rate=100.0,
        labels=LABELS,
        callbacks=[keras.callbacks.ModelCheckpoint(str(tmp_path / "last.keras"))],  # which saves the worse model
    )
    assert not all(np.array_equal(a, b) for a, b in zip(given, weights(load(tmp_path / "last.keras")), strict=True))
    assert tuning.epoch == 0
    assert any("handed back" in text for text in tuning.warnings)
    assert all(np.array_equal(a, b) for a, b in zip(given, weights(tuning.model), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(given, weights(model), strict=True))
    assert tuning.model is not model


@pytest.mark.usefixtures("eagerly")
def test_healing_on_made_up_inputs_and_on_data_larger_than_the_cache(
    folder: Path, fixtures_dir: Path, inputs: Array
) -> None:
    made = kmerge.fine_tune(folder / "merged.keras", None, paths(fixtures_dir), epochs=2, samples=200)
    assert all(item.synthetic for item in made.after)
    random = np.random.default_rng(0)

    def shuffled() -> Iterator[Array]:
        """As a loader with shuffle=True: of each row what was taught has to be found, or it teaches nonsense."""
        return iter(np.array_split(random.permutation(inputs), 9))

    streamed = kmerge.fine_tune(folder / "merged.keras", shuffled, paths(fixtures_dir), epochs=6, cache=0.01)
    assert mean(streamed.after) > mean(streamed.before)
    assert len(streamed.history["loss"]) == 6
    weightless = (inputs[:80], {"a": np.zeros(80, int)}, {"a": np.zeros(80)})
    given = load(folder / "merged.keras")
    trained = kmerge.fine_tune(given, weightless, labels=LABELS, epochs=1, train="heads")
    assert all(np.array_equal(a, b) for a, b in zip(weights(given), weights(trained.model), strict=True))


@pytest.mark.usefixtures("eagerly")
def test_heads_that_no_source_teaches_take_no_part(folder: Path, fixtures_dir: Path, inputs: Array) -> None:
    grown = kmerge.add_head(folder / "merged.keras", 2, "even")
    healed = kmerge.fine_tune(grown, inputs, paths(fixtures_dir), epochs=1)
    assert any("no source teaches 'even'" in text for text in healed.notes)
    assert [item.output for item in healed.after] == list(LABELS)
    kept = healed.model.get_layer("even").get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(kept, grown.get_layer("even").get_weights(), strict=True))


def test_features_are_matched_through_maps_that_are_thrown_away(
    folder: Path, fixtures_dir: Path, inputs: Array
) -> None:
    tuning = kmerge.fine_tune(folder / "merged.keras", inputs, paths(fixtures_dir), epochs=3, features=0.5)
    losses = tuning.history["a/features_loss"]
    assert losses[-1] < losses[0]
    assert tuning.model.count_params() == load(folder / "merged.keras").count_params()


def test_sources_that_do_not_fit_are_refused(folder: Path, fixtures_dir: Path, inputs: Array) -> None:
    own = paths(fixtures_dir)
    with pytest.raises(kmerge.PlanError, match="one source for each head"):
        kmerge.fine_tune(folder / "merged.keras", inputs, {"a": own["a"], "b": own["b"]})
    with pytest.raises(kmerge.PlanError, match="nothing to learn from"):
        kmerge.fine_tune(folder / "merged.keras")
    with pytest.raises(kmerge.PlanError, match=r"gives .* per row"):
        kmerge.fine_tune(folder / "merged.keras", inputs, {"a": own["b"], "b": own["a"], "c": own["c"]})


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("weighting", [[1, 2, 1], "uncertainty", "gradnorm", "pcgrad"])
def test_each_head_learns_from_its_own_data(
    folder: Path, tasks: dict[str, tuple[Array, Array]], weighting: Any
) -> None:
    data = {label: (x[:90], y[:90]) for label, (x, y) in tasks.items()}
    tuning = kmerge.fine_tune(
        folder / "merged.keras", data, loss="sparse_categorical_crossentropy", loss_weights=weighting, epochs=4
    )
    assert not tuning.warnings
    for label in LABELS:
        assert tuning.scores_after[f"val_{label}_loss"] < tuning.scores_before[f"val_{label}_loss"]
        assert 0 <= tuning.history[f"{label}_accuracy"][-1] <= 1


def test_heads_without_labels_stay_as_they_are(folder: Path, tasks: dict[str, tuple[Array, Array]]) -> None:
    x, y = tasks["a"]
    tuning = kmerge.fine_tune(folder / "merged.keras", {"a": (x, y)}, train="heads", epochs=1)
    given = load(folder / "merged.keras")
    changed = {
        layer.name
        for layer, old in zip(tuning.model.layers, given.layers, strict=True)
        if any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), old.get_weights(), strict=True))
    }
    assert changed == {"a"}


def test_what_moves(folder: Path, tasks: dict[str, tuple[Array, Array]]) -> None:
    from kmerge.tune.moving import parts_of, set_moving

    x, y = (array[:60] for array in tasks["a"])
    given = load(folder / "merged.keras")
    trunk = [layer.name for layer in given.layers if layer.weights and layer.name not in LABELS]

    def moving(train: str) -> list[str]:
        model = load(folder / "merged.keras")
        set_moving(model, parts_of(model), train, None, False)
        return [layer.name for layer in model.layers if layer.trainable_variables]

    assert moving("all") == [*trunk, *LABELS]
    assert moving("last:1") == [trunk[-1], *LABELS]
    assert moving("heads") == list(LABELS)

    def changed(**settings: Any) -> list[str]:
        model = kmerge.fine_tune(given, {"a": (x, y)}, labels=LABELS, epochs=1, **settings).model
        assert [layer.trainable for layer in model.layers] == [layer.trainable for layer in given.layers]
        return [
            layer.name
            for layer, old in zip(model.layers, given.layers, strict=True)
            if any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), old.get_weights(), strict=True))
        ]

    assert changed(train="heads", adapters=1) == ["a"]
    given.get_layer(trunk[0]).trainable = False
    assert changed(trunk_rate=0.5, layer_decay=0.5) == [*trunk[1:], "a"]
    with pytest.raises(kmerge.PlanError, match="last:2"):
        kmerge.fine_tune(given, {"a": (x, y)}, train="some")
    for layer in given.layers:
        layer.trainable = False
    with pytest.raises(kmerge.PlanError, match="Nothing moves"):
        kmerge.fine_tune(given, {"a": (x, y)}, labels=LABELS)


def test_rates_fall_towards_the_input() -> None:
    """One step of plain gradient descent moves each layer in proportion to its rate."""
    import keras

    from kmerge.tune.moving import scaled_optimizer

    one, two = keras.Variable([1.0], name="one"), keras.Variable([1.0], name="two")
    given = keras.optimizers.SGD(0.5)
    kind = type(given)
    made = scaled_optimizer(given, [one, two], [0.1, 1.0])
    made.apply([keras.ops.ones(1)] * 2, [one, two])
    assert values(one) == pytest.approx([0.95])
    assert values(two) == pytest.approx([0.5])
    assert type(given) is kind


def test_conflicting_gradients_are_projected() -> None:
    import keras

    from kmerge.tune.student import make_student

    x = keras.Input((1,))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in "ab"}
    losses = {name: masked_loss(keras.losses.MeanSquaredError()) for name in "ab"}
    student = make_student([x], outputs, plain=None, losses=losses, weights={"a": 1.0, "b": 1.0}, weighting="pcgrad")
    rows = [[keras.ops.array([1.0, 0.0])], [keras.ops.array([-1.0, 1.0])]]
    # a − (a·b / b·b) b = (1, 0) + ½ (−1, 1); b − (a·b / a·a) a = (−1, 1) + (1, 0)
    assert values(student.combined([], rows)[0]) == pytest.approx([0.5, 1.5])
    rows[1] = [keras.ops.array([1.0, 1.0])]
    assert values(student.combined([], rows)[0]) == pytest.approx([2.0, 1.0])


def test_uncertainty_weighs_as_in_the_paper() -> None:
    import keras

    from kmerge.tune.student import make_student

    x = keras.Input((1,))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in "ab"}
    losses = {name: masked_loss(keras.losses.MeanSquaredError()) for name in "ab"}
    made: Any = {"plain": None, "losses": losses, "weights": {}, "weighting": "uncertainty", "halves": ["b"]}
    student = make_student([x], outputs, **made)
    student.balance.assign([np.log(2.0), np.log(4.0)])
    by_hand = 3 / 2 + np.log(2) / 2 + 8 / (2 * 4) + np.log(4) / 2
    assert float(student.together([3.0, 8.0])) == pytest.approx(by_hand, rel=1e-5)


def test_gradnorm_favours_the_head_whose_gradient_is_small() -> None:
    import keras

    from kmerge.tune.student import make_student

    x = keras.Input((1,))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in "ab"}
    losses = {name: masked_loss(keras.losses.MeanSquaredError()) for name in "ab"}
    made: Any = {"plain": None, "losses": losses, "weights": {}, "weighting": "gradnorm"}
    student = make_student([x], outputs, **made)
    shapes = [variable.shape for variable in student.trainable_weights]
    rows = [[keras.ops.full(shape, size) for shape in shapes] for size in (1.0, 4.0)]
    student.combined([keras.ops.array(1.0), keras.ops.array(1.0)], rows)
    small, large = values(student.balance)
    assert small > 1 > large
    assert small + large == pytest.approx(2)


def test_statistics_stay_in_healing_and_move_in_training(fixtures_dir: Path, tmp_path: Path) -> None:
    import keras

    def network(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        x = y = keras.Input((3,), name="x")
        y = keras.layers.Dense(4, name="hidden")(y)
        y = keras.layers.BatchNormalization(name="norm")(y)
        return keras.Model(x, keras.layers.Dense(2, "sigmoid", name="out")(keras.layers.ReLU()(y)))

    sources = {label: network(number) for number, label in enumerate("ab")}
    merged = kmerge.merge_models(sources, method="mean")
    x = np.random.default_rng(0).normal(2, 3, (80, 3)).astype(np.float32)
    given = merged.get_layer("norm").get_weights()
    healed = kmerge.fine_tune(merged, x, sources, epochs=6, learning_rate=0.02)
    assert healed.epoch > 0
    scale, _, *statistics = healed.model.get_layer("norm").get_weights()
    assert not np.array_equal(scale, given[0])
    assert all(np.array_equal(a, b) for a, b in zip(statistics, given[2:], strict=True))
    y = (x[:, :2] > 2).astype(np.float32)
    y[::3, 0] = NAN
    labels = {"a": y, "b": np.where(y == 1, 1, -1)}
    trained = kmerge.fine_tune(merged, (x, labels), epochs=1)
    assert not np.array_equal(trained.model.get_layer("norm").get_weights()[2], given[2])
    assert trained.model.get_layer("norm").trainable
    assert all(np.isfinite(value) for value in trained.scores_after.values())
    lower = kmerge.fine_tune(merged, x, sources, epochs=1, mixed_precision=True, train="heads")
    assert {str(v.dtype) for v in lower.model.weights} == {"float32"}


def test_losses_and_metrics_are_those_of_the_sources() -> None:
    from kmerge.tune.heads import Head
    from kmerge.tune.recorded import losses_of, metrics_of

    heads = [Head("a", "a", 0, 0, "softmax"), Head("b", "b", 1, 0, ""), Head("c", "c", 2, 0, "sigmoid")]
    old = {"loss": {"class_name": "Huber", "config": {"delta": 2.0, "reduction": "auto"}}, "metrics": [["mae"]]}
    training = {"a": {"loss": "categorical_crossentropy", "metrics": ["accuracy"]}, "b": old}
    notes: list[str] = []
    losses = losses_of(heads, None, training, notes)
    assert [type(loss).__name__ for loss in losses.values()] == [
        "CategoricalCrossentropy",
        "Huber",
        "BinaryCrossentropy",
    ]
    # Half the squared difference up to delta, as in the paper of the loss: 2 · (6 − 1).
    assert float(losses["b"](np.array([[6.0]]), np.array([[0.0]]))) == pytest.approx(10.0)
    assert len(notes) == 1
    metrics = metrics_of(heads, None, training, losses)
    assert [[type(m).__name__ for m in items] for items in metrics.values()] == [
        ["CategoricalAccuracy"],
        ["MeanAbsoluteError"],
        ["BinaryAccuracy"],
    ]
    with pytest.raises(kmerge.PlanError, match="none of Keras's"):
        losses_of(heads, {"a": "nonsense"}, training, notes)
    with pytest.raises(kmerge.PlanError, match="the heads are a, b, c"):
        losses_of(heads, {"d": "mse"}, training, notes)


# ---------------------------------------------------------------------------------------------------------- long runs


def test_a_killed_training_ends_as_an_unbroken_one(
    folder: Path, fixtures_dir: Path, inputs: Array, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", inputs[:120])
    sources = {label: str(path) for label, path in paths(fixtures_dir).items()}
    asked: dict[str, Any] = {"epochs": 3, "every": 0.05, "batch_size": 16}
    script = (
        "import json, sys, time, keras, kmerge; a, s, k = json.loads(sys.argv[1]); "
        "slow = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.1)); "
        "kmerge.fine_tune(a[0], a[1], s, checkpoints=a[2], callbacks=[slow], **k)"
    )
    model = str(folder / "merged.keras")
    given = json.dumps([[model, str(tmp_path / "x.npy"), str(tmp_path / "run")], sources, asked])
    process = subprocess.Popen([sys.executable, "-c", script, given], env={**os.environ})
    state = tmp_path / "run" / NAME
    while not state.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    time.sleep(random.random() / 2)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = json.loads(np.load(state)["facts"].tobytes())["course"]["step"]
    resumed = kmerge.fine_tune(model, tmp_path / "x.npy", sources, checkpoints=tmp_path / "run", resume=True, **asked)
    whole = kmerge.fine_tune(model, tmp_path / "x.npy", sources, **asked)
    assert 0 < half < whole.steps == resumed.steps
    assert [a.tobytes() for a in weights(resumed.model)] == [a.tobytes() for a in weights(whole.model)]
    assert resumed.history["val_loss"] == whole.history["val_loss"]
    # What is done stays done; what is another training is refused.
    again = kmerge.fine_tune(model, tmp_path / "x.npy", sources, checkpoints=tmp_path / "run", resume=True, **asked)
    assert again.steps == whole.steps
    assert [a.tobytes() for a in weights(again.model)] == [a.tobytes() for a in weights(whole.model)]
    with pytest.raises(kmerge.PlanError, match="of another training"):
        kmerge.fine_tune(model, tmp_path / "x.npy", sources, checkpoints=tmp_path / "run", resume=True, epochs=4)


class Interrupt:
    """Ends a training in the middle, as a kill does."""

    def __new__(cls, step: int) -> Any:
        import keras

        class Callback(keras.callbacks.Callback):  # type: ignore[misc]
            seen = 0

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                self.seen += 1
                if self.seen == step:
                    raise KeyboardInterrupt

        return Callback()


@pytest.mark.usefixtures("eagerly")
def test_adapters_and_mixed_data_are_resumed(
    folder: Path, tasks: dict[str, tuple[Array, Array]], tmp_path: Path
) -> None:
    data = {label: (tasks[label][0][:60], tasks[label][1][:60]) for label in "ab"}
    asked: dict[str, Any] = {"epochs": 3, "adapters": 2, "loss": "sparse_categorical_crossentropy", "batch_size": 20}
    run: dict[str, Any] = {"checkpoints": tmp_path, "every": 1e-9, **asked}
    with pytest.raises(KeyboardInterrupt):
        kmerge.fine_tune(folder / "merged.keras", data, callbacks=[Interrupt(8)], **run)
    resumed = kmerge.fine_tune(folder / "merged.keras", data, resume=True, **run)
    whole = kmerge.fine_tune(folder / "merged.keras", data, **asked)
    assert [a.tobytes() for a in weights(resumed.model)] == [a.tobytes() for a in weights(whole.model)]
    others = {"a": (data["a"][0][::-1], data["a"][1][::-1]), "b": data["b"]}
    with pytest.raises(kmerge.PlanError, match="of another training"):
        kmerge.fine_tune(folder / "merged.keras", others, resume=True, **run)
    with pytest.raises(kmerge.OutputError, match="--resume"):
        kmerge.fine_tune(folder / "merged.keras", data, **run)


@pytest.mark.usefixtures("eagerly")
def test_what_a_callback_ended_stays_ended_and_more_time_goes_on(
    folder: Path, tasks: dict[str, tuple[Array, Array]], tmp_path: Path
) -> None:
    import keras

    x, y = tasks["a"]
    data = (x[:80], {"a": y[:80]})
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=1.0)
    run: dict[str, Any] = {"epochs": 30, "learning_rate": 1e-9, "checkpoints": tmp_path / "ended"}
    ended = kmerge.fine_tune(folder / "merged.keras", data, callbacks=[stop], **run)
    assert ended.steps < 10
    assert any("a callback ended it" in text for text in ended.notes)
    assert kmerge.fine_tune(folder / "merged.keras", data, resume=True, **run).steps == ended.steps
    run = {"epochs": 5, "checkpoints": tmp_path / "hasty"}
    hasty = kmerge.fine_tune(folder / "merged.keras", data, minutes=1e-6, **run)
    assert hasty.steps == 1
    assert any("the time allows 1 of 10 steps" in text for text in hasty.notes)
    again = kmerge.fine_tune(folder / "merged.keras", data, minutes=1e-6, resume=True, **run)
    assert again.steps == 1
    longer = kmerge.fine_tune(folder / "merged.keras", data, minutes=10.0, resume=True, **run)
    assert longer.steps == 10


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    assert load_state(tmp_path, "mark") is None
    values = [np.arange(3, dtype=np.float32), np.array(5)]
    save_state(tmp_path, State({"course": {"step": 3}}, {"model": values}), "mark")
    found = load_state(tmp_path, "mark")
    assert found is not None
    assert found.facts["course"] == {"step": 3}
    assert [array.tolist() for array in found.groups["model"]] == [[0, 1, 2], 5]
    assert os.listdir(tmp_path) == [NAME]
    with np.load(tmp_path / NAME) as file:
        values = dict(file)
    facts = {**json.loads(values["facts"].tobytes()), "format": 1}
    np.savez(tmp_path / NAME, **{**values, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)})
    with pytest.raises(kmerge.FormatError, match=r"of an earlier kmerge \(format 1, expected 2\): .*--force"):
        load_state(tmp_path, "mark")
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:200])
    with pytest.raises(kmerge.FormatError, match="no checkpoint"):
        load_state(tmp_path, "mark")


def test_no_pipeline_of_a_training_is_tuned(folder: Path, inputs: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that tunes one may sleep for a minute when it is thrown away."""
    import keras

    seen: list[tuple[str, bool | None]] = []
    for name in ("fit", "evaluate"):
        plain = getattr(keras.Model, name)

        def noted(model: Any, x: Any, *args: Any, name: str = name, plain: Any = plain, **settings: Any) -> Any:
            seen.append((name, x.options().autotune.enabled))
            return plain(model, x, *args, **settings)

        monkeypatch.setattr(keras.Model, name, noted)
    kmerge.fine_tune(folder / "merged.keras", (inputs[:80], {"a": np.arange(80) % 3}), epochs=1)
    assert set(seen) == {("fit", False), ("evaluate", False)}


def test_a_strategy_for_one_device_changes_nothing(folder: Path, tasks: dict[str, tuple[Array, Array]]) -> None:
    """Keras looks at a first batch under a strategy, and begins anew."""
    import tensorflow as tf

    x, y = tasks["a"]
    run: dict[str, Any] = {"epochs": 2, "batch_size": 64, "seed": 3}
    plain = kmerge.fine_tune(folder / "merged.keras", (x, {"a": y}), **run)
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        found = kmerge.fine_tune(folder / "merged.keras", (x, {"a": y}), **run)
    assert found.steps == plain.steps
    for before, after in ((plain.scores_before, found.scores_before), (plain.scores_after, found.scores_after)):
        assert after == pytest.approx(before, rel=1e-4)


def test_models_that_take_text_are_trained(tmp_path: Path) -> None:
    """Of a generator Keras takes no text on TensorFlow."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    for label, classes in (("a", 3), ("b", 2)):
        words = layers.TextVectorization(20, output_sequence_length=4, vocabulary=["left", "right", "up"])
        stack = [words, layers.Embedding(20, 4), layers.GlobalAveragePooling1D(), layers.Dense(classes, "softmax")]
        keras.Sequential([keras.Input((1,), dtype="string"), *stack]).save(tmp_path / f"{label}.keras")
    sources = {label: tmp_path / f"{label}.keras" for label in "ab"}
    kmerge.combine(sources, tmp_path / "merged.keras", method="mean")
    x, y = np.array([["left"], ["right"], ["up"]] * 20), np.arange(60) % 3
    found = kmerge.fine_tune(tmp_path / "merged.keras", (x, {"a": y}), epochs=20, learning_rate=0.1)
    assert found.scores_before["val_a_accuracy"] < found.scores_after["val_a_accuracy"] == 1


def test_what_a_source_raises_while_keras_reads_is_told_as_it_was(
    folder: Path, tasks: dict[str, tuple[Array, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    x, y = tasks["a"]
    fitting, plain = False, keras.Model.fit

    def fit(*args: Any, **settings: Any) -> Any:
        nonlocal fitting
        fitting = True
        return plain(*args, **settings)

    def source() -> Iterator[tuple[Array, Array]]:
        for start in range(0, 160, 16):
            yield x[start : start + 16], np.full(16, 7) if fitting and start > 100 else y[start : start + 16]

    monkeypatch.setattr(keras.Model, "fit", fit)
    with pytest.raises(kmerge.DataError, match="The labels of 'a' hold class 7"):
        kmerge.fine_tune(folder / "merged.keras", {"a": source}, epochs=3, batch_size=16)
    assert fitting


def test_time_patience_and_callbacks(folder: Path, fixtures_dir: Path, inputs: Array) -> None:
    import keras

    class Seen(keras.callbacks.Callback):  # type: ignore[misc]
        epochs: list[float] = []  # noqa: RUF012

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.epochs.append(logs["val_agreement"])

    stopped = kmerge.fine_tune(
        folder / "merged.keras",
        inputs,
        paths(fixtures_dir),
        epochs=50,
        patience=2,
        optimizer=keras.optimizers.SGD(1e-15),
        pairs=0,
        callbacks=[Seen(), keras.callbacks.EarlyStopping("val_loss", patience=40)],
    )
    assert len(Seen.epochs) < 50
    assert any("nothing got better" in text for text in stopped.notes)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.usefixtures("eagerly")
def test_the_command_reads_named_columns(folder: Path, tasks: dict[str, tuple[Array, Array]], tmp_path: Path) -> None:
    from kmerge.cli import main

    x, y = tasks["a"]
    names = [f"p{number}" for number in range(64)]
    lines = [f"id,{','.join(names)},kind", *(f"{n},{','.join(map(str, x[n]))},{y[n]}" for n in range(40))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    call = ["finetune", str(folder / "merged.keras"), "--data", str(tmp_path / "x.csv"), "--epochs", "1"]
    call += ["-o", str(tmp_path / "a.keras"), "--loss", "a=sparse_categorical_crossentropy"]
    refused = CliRunner().invoke(main, call)
    assert refused.exit_code == 1
    assert "--columns" in refused.stderr
    named = ["--columns", ",".join(names), "--label-columns", "a=kind", "--pixels", "0", "1"]
    result = CliRunner().invoke(main, [*call, *named])
    assert result.exit_code == 0, result.stderr
    assert "a_accuracy" in result.stderr


def test_the_command(folder: Path, fixtures_dir: Path, inputs: Array, tmp_path: Path) -> None:
    from kmerge.cli import main

    np.savez(tmp_path / "x.npz", x=inputs)
    sources = [str(path) for path in paths(fixtures_dir).values()]
    model, output = str(folder / "merged.keras"), tmp_path / "healed.h5"
    call = ["finetune", model, *sources, "-o", str(output), "--data", str(tmp_path / "x.npz"), "--epochs", "2"]
    result = CliRunner().invoke(main, [*call, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["output"] == str(output)
    assert "epoch 2 of 2" in result.stderr
    assert kmerge.inspect(output).merge is not None
    assert CliRunner().invoke(main, call).exit_code == 1  # it exists
    for wrong in (["--train", "most"], ["--loss-weights", "x"], ["--resume"], ["--validation-split", "1"]):
        assert CliRunner().invoke(main, [*call, *wrong]).exit_code == 2
    assert CliRunner().invoke(main, ["finetune", model, "-o", str(output)]).exit_code == 2
