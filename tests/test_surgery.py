"""The merged graphs: the three of the question that kmerge answers, trained; roles, names, inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge

LABELS = ("a", "b", "c")
CLASSES = (4, 3, 2)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    return (images / 16).astype("float32"), targets


def array(value: Any) -> np.ndarray:
    """A tensor of any backend as NumPy array."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(value))


def tower(classes: int, seed: int, width: int = 16, head: str | None = None) -> Any:
    """64 inputs, two hidden layers with dropout between them, a softmax head."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((64,), name="image")
    x = keras.layers.Dense(width, activation="relu", name="first")(inputs)
    x = keras.layers.Dropout(0.1, name="drop")(x)
    x = keras.layers.Dense(12, activation="relu", name="second")(x)
    x = keras.layers.Dense(classes, name="scores")(x)
    return keras.Model(inputs, keras.layers.Softmax(name=head or "probabilities")(x), name="tower")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {label: tower(classes, seed) for seed, (label, classes) in enumerate(zip(LABELS, CLASSES, strict=True))}


def targets_of(digits: tuple[np.ndarray, np.ndarray], classes: tuple[int, ...] = CLASSES) -> list[np.ndarray]:
    return [digits[1] % count for count in classes]


def weights_of(model: Any, layer: str) -> list[np.ndarray]:
    return [np.array(weight) for weight in model.get_layer(layer).get_weights()]


def trainable_label(label: str) -> bool:
    return all(character.isascii() and (character.isalnum() or character in "_.-/") for character in label)


def moved(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return any(not np.array_equal(one, two) for one, two in zip(before, after, strict=True))


def calls(model: Any, layer: str) -> int:
    return sum(1 for entry in model.get_config()["layers"] if entry["name"] == layer for _ in entry["inbound_nodes"])


def test_one_shared_trunk_with_three_heads_trains_with_a_loss_per_label(
    models: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    merged = kmerge.merge_models(models, method="mean")
    assert set(merged.output) == set(LABELS)
    assert [calls(merged, name) for name in ("first", "drop", "second")] == [1, 1, 1]
    names = [layer.name for layer in merged.layers]
    assert {"first", "drop", "second", *LABELS, "a_scores", "b_scores", "c_scores"} <= set(names)
    merged.compile(
        optimizer="adam",
        loss={
            "a": "sparse_categorical_crossentropy",
            "b": "sparse_categorical_crossentropy",
            "c": "mse",
        },
    )
    one, two, three = targets_of(digits)
    before = {name: weights_of(merged, name) for name in ("first", "a_scores", "c_scores")}
    history = merged.fit(
        digits[0], {"a": one, "b": two, "c": np.eye(2, dtype="float32")[three]}, epochs=1, batch_size=64, verbose=0
    )
    assert {"a_loss", "b_loss", "c_loss"} <= set(history.history)
    assert all(np.isfinite(history.history["loss"]))
    for name, values in before.items():
        assert moved(values, weights_of(merged, name))


def test_a_frozen_trunk_does_not_move(models: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]) -> None:
    merged = kmerge.merge_models(models, method="mean", freeze=True)
    assert [merged.get_layer(name).trainable for name in ("first", "second", "a_scores")] == [False, False, True]
    merged.compile(optimizer="adam", loss=dict.fromkeys(LABELS, "sparse_categorical_crossentropy"))
    trunk = {name: weights_of(merged, name) for name in ("first", "second")}
    heads = {name: weights_of(merged, name) for name in ("a_scores", "b_scores", "c_scores")}
    merged.fit(digits[0], dict(zip(LABELS, targets_of(digits), strict=True)), epochs=1, batch_size=64, verbose=0)
    for name, values in trunk.items():
        assert not moved(values, weights_of(merged, name))
    for name, values in heads.items():
        assert moved(values, weights_of(merged, name))


def test_three_private_towers_into_one_shared_output_layer(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """The towers differ in width, so that they can only be private; the output layer is called three times."""
    import keras

    def build(width: int, seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((64,))
        x = keras.layers.Dense(width, activation="relu")(inputs)
        x = keras.layers.Dense(8, activation="relu")(x)
        return keras.Model(inputs, keras.layers.Dense(10, activation="softmax", name="digit")(x))

    sources = {label: build(width, seed) for seed, (label, width) in enumerate(zip(LABELS, (16, 24, 20), strict=True))}
    merged = kmerge.merge_models(sources, trunk="none", share=["digit"], method="mean")
    assert calls(merged, "digit") == 3
    kernels = [model.get_layer("digit").get_weights()[0] for model in sources.values()]
    np.testing.assert_allclose(merged.get_layer("digit").get_weights()[0], np.mean(kernels, axis=0), atol=1e-6)
    merged.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    before = weights_of(merged, "digit")
    history = merged.fit(digits[0], dict.fromkeys(LABELS, digits[1]), epochs=1, batch_size=64, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert moved(before, weights_of(merged, "digit"))


def test_separate_inputs_through_shared_middle_layers(
    models: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    merged = kmerge.merge_models(models, inputs="separate", outputs="list", method="mean")
    assert [tensor.name for tensor in merged.inputs] == ["a_image", "b_image", "c_image"]
    assert len(merged.outputs) == 3
    assert calls(merged, "first") == calls(merged, "second") == 3
    merged.compile(optimizer="adam", loss=["sparse_categorical_crossentropy"] * 3)
    x = digits[0]
    history = merged.fit([x, x[::-1].copy(), x], targets_of(digits), epochs=1, batch_size=64, verbose=0)
    assert np.isfinite(history.history["loss"][0])


def test_separate_inputs_with_outputs_by_label(models: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]) -> None:
    merged = kmerge.merge_models(models, inputs="separate", method="pick")
    x = digits[0][:5]
    got = merged([x, x + 1, x], training=False)
    np.testing.assert_array_equal(array(got["a"]), array(models["a"](x, training=False)))


def test_fit_takes_lists_and_dictionaries_and_sample_weights(
    models: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    targets = targets_of(digits)
    merged = kmerge.merge_models(models, method="mean")
    merged.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    ones = np.ones(len(digits[0]), dtype="float32")
    named = dict(zip(LABELS, targets, strict=True))
    history = merged.fit(digits[0], named, sample_weight=dict.fromkeys(LABELS, ones), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    merged = kmerge.merge_models(models, outputs="list", method="mean")
    merged.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    history = merged.fit(digits[0], targets, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])


def test_sources_are_left_as_they_are(models: dict[str, Any]) -> None:
    before = {label: [np.array(w) for w in model.get_weights()] for label, model in models.items()}
    names = {label: [layer.name for layer in model.layers] for label, model in models.items()}
    kmerge.merge_models(models, method="mean", freeze=True)
    for label, model in models.items():
        assert not moved(before[label], [np.array(w) for w in model.get_weights()])
        assert names[label] == [layer.name for layer in model.layers]
        assert all(layer.trainable for layer in model.layers)


def test_outputs_mean_is_one_drop_in_model() -> None:
    import keras

    sources = {label: tower(3, seed) for seed, label in enumerate(LABELS)}
    x = np.random.default_rng(0).random((5, 64), dtype="float32")
    wanted = np.stack([array(model(x, training=False)) for model in sources.values()])
    merged = kmerge.merge_models(sources, trunk="none", outputs="mean")
    assert isinstance(merged.output, keras.KerasTensor)
    assert merged.output_names == ["probabilities"]
    np.testing.assert_allclose(array(merged(x, training=False)), wanted.mean(axis=0), atol=1e-6)
    weighted = kmerge.merge_models(sources, trunk="none", outputs="mean", weights=[1, 0, 3])
    np.testing.assert_allclose(
        array(weighted(x, training=False)), np.average(wanted, axis=0, weights=[1, 0, 3]), atol=1e-6
    )


def test_everything_shared_is_one_model_with_one_output() -> None:
    sources = [tower(3, 5) for _ in range(3)]
    merged = kmerge.merge_models(sources, trunk="all", method="mean")
    x = np.random.default_rng(0).random((5, 64), dtype="float32")
    assert len(merged.outputs) == 1
    assert merged.count_params() == sources[0].count_params()
    np.testing.assert_array_equal(array(merged(x)), array(sources[0](x)))


@pytest.mark.parametrize("share", [True, False])
def test_a_model_with_itself_gives_its_own_predictions(share: bool, tmp_path: Path) -> None:
    model = tower(4, 3)
    path = tmp_path / "one.keras"
    model.save(path)
    x = np.random.default_rng(0).random((5, 64), dtype="float32")
    merged = kmerge.merge_models([path] * 4, trunk="auto" if share else "none", weights=[1, 2, 3, 0], method="mean")
    for value in merged(x, training=False).values():
        np.testing.assert_array_equal(array(value), array(model(x, training=False)))


@pytest.mark.parametrize(
    "labels",
    [
        ["mein Modell", "größe", "模型"],
        ["first", "second", "scores"],
        ["a", "a_scores", "A"],
        ["x/y", "x y", "x_y"],
        ["-", "1", "…"],
        ["image", "a.b", "tower"],
    ],
    ids=["letters", "names of layers", "prefixes", "slashes", "signs", "inputs"],
)
def test_any_label_works(labels: list[str], models: dict[str, Any], tmp_path: Path) -> None:
    """Labels with spaces or other letters, and labels that meet names of layers: outputs go by the label as given."""
    x = np.random.default_rng(0).random((3, 64), dtype="float32")
    merged = kmerge.merge_models(list(models.values()), labels=labels, trunk="none")
    got = merged.predict(x, verbose=0)
    for label, model in zip(labels, models.values(), strict=True):
        np.testing.assert_allclose(got[label], model.predict(x, verbose=0), atol=1e-6)
    names = [layer.name for layer in merged.layers]
    assert len(set(names)) == len(names)
    merged.save(tmp_path / "again.keras")
    if all(trainable_label(label) for label in labels):
        merged.compile(optimizer="sgd", loss=dict.fromkeys(labels, "sparse_categorical_crossentropy"))
        merged.fit(x, {label: np.zeros(3) for label in labels}, epochs=1, verbose=0)


def test_a_label_that_tensorflow_cannot_train_under_is_noted(fixtures_dir: Path, tmp_path: Path) -> None:
    """TensorFlow names a scope after each loss, and allows no spaces or other letters there."""
    paths = [fixtures_dir / f"mlp_{label}.h5" for label in "ab"]
    report = kmerge.combine(paths, tmp_path / "m.h5", labels=["größe", "b"], trunk="none")
    assert any("'größe'" in note and "TensorFlow" in note for note in report.notes)
    report = kmerge.combine(paths, tmp_path / "n.h5", labels=["a", "b"], trunk="none")
    assert not any("TensorFlow" in note for note in report.notes)


def test_several_outputs_are_named_after_label_and_output() -> None:
    import keras

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        x = keras.layers.Dense(5)(inputs)
        return keras.Model(inputs, [keras.layers.Dense(2, name="age")(x), keras.layers.Dense(3, name="sex")(x)])

    one, two = build(0), build(1)
    merged = kmerge.merge_models({"left": one, "right": two}, method="pick")
    assert list(merged.output) == ["left_age", "left_sex", "right_age", "right_sex"]
    assert {"left_age", "left_sex", "right_age", "right_sex"} <= {layer.name for layer in merged.layers}
    x = np.ones((2, 6), dtype="float32")
    for name, value in zip(("left_age", "left_sex"), one(x), strict=True):
        np.testing.assert_array_equal(array(merged(x)[name]), array(value))


def test_several_inputs_as_a_dictionary_separately() -> None:
    import keras

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inputs = {"p": keras.Input((3,), name="p"), "q": keras.Input((4,), name="q")}
        x = keras.layers.Concatenate()([keras.layers.Dense(2)(inputs["p"]), keras.layers.Dense(2)(inputs["q"])])
        return keras.Model(inputs, keras.layers.Dense(2)(x))

    sources = {"a": build(0), "b": build(1)}
    merged = kmerge.merge_models(sources, inputs="separate", trunk="none")
    data = {
        f"{label}_{key}": np.random.default_rng(number).random((2, size), dtype="float32")
        for number, (label, key, size) in enumerate([("a", "p", 3), ("a", "q", 4), ("b", "p", 3), ("b", "q", 4)])
    }
    got = merged(data)
    for label, model in sources.items():
        wanted = model({"p": data[f"{label}_p"], "q": data[f"{label}_q"]})
        np.testing.assert_array_equal(array(got[label]), array(wanted))


def test_one_layer_without_weights_used_in_trunk_and_heads_keeps_the_trunk_single() -> None:
    import keras

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        relu = keras.layers.ReLU(name="relu")
        inputs = keras.Input((6,))
        x = relu(keras.layers.Dense(5, name="one")(inputs))
        x = relu(keras.layers.Dense(5, name="two")(x))
        return keras.Model(inputs, relu(keras.layers.Dense(2, name="out")(x)))

    merged = kmerge.merge_models({"a": build(0), "b": build(1)}, method="mean")
    assert calls(merged, "one") == calls(merged, "two") == 1
    assert calls(merged, "relu") == 2
    assert {"a", "b"} <= {layer.name for layer in merged.layers}


def test_a_trunk_that_ends_inside_a_nested_model(tmp_path: Path) -> None:
    import keras

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inner_in = keras.Input((6,))
        x = keras.layers.Dense(5, name="low")(inner_in)
        backbone = keras.Model(inner_in, keras.layers.Dense(4, name="high")(x), name="backbone")
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(2, name="out")(backbone(inputs)))

    for suffix in (".keras", ".h5"):
        paths = []
        for seed in range(2):
            paths.append(tmp_path / f"m{seed}{suffix}")
            build(seed).save(paths[-1])
        kmerge.combine(paths, tmp_path / f"merged{suffix}", trunk="low", method="mean", force=True)
        merged = keras.models.load_model(tmp_path / f"merged{suffix}", compile=False)
        assert calls(merged, "low") == 1
        assert {"m0_high", "m1_high", "m0", "m1"} <= {layer.name for layer in merged.layers}


def test_the_merged_file_loads_without_kmerge(tmp_path: Path, fixtures_dir: Path) -> None:
    import subprocess
    import sys

    for suffix in (".h5", ".keras"):
        paths = [fixtures_dir / f"cnn_{label}{suffix}" for label in LABELS]
        out = tmp_path / f"merged{suffix}"
        kmerge.combine(paths, out, trunk="none")
        program = (
            "import sys, keras\n"
            f"model = keras.models.load_model({str(out)!r}, compile=False)\n"
            "assert 'kmerge' not in sys.modules\n"
            "print(sorted(model.output))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, env=_bare()
        )
        assert done.stdout.strip().endswith("['cnn_a', 'cnn_b', 'cnn_c']")


def _bare() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
