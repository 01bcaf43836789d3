"""New heads on models that stand: what they read, what they are called, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge
from kmerge.errors import OutputError, PlanError

X = np.random.default_rng(0).random((5, 64), np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, fixtures_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    for family in ("mlp", "cnn"):
        sources = {label: fixtures_dir / f"{family}_{label}.keras" for label in "abc"}
        kmerge.combine(sources, folder / f"{family}.keras", method="mean")
    kmerge.combine(sources, folder / "apart.keras", trunk="none")
    kmerge.combine(sources, folder / "separate.keras", method="mean", inputs="separate")
    return {path.stem: path for path in folder.iterdir()}


def loaded(path: Path) -> Any:
    import keras

    return keras.saving.load_model(path)


def outputs(model: Any, x: Any = X) -> dict[str, np.ndarray]:
    import keras

    return {name: keras.ops.convert_to_numpy(value) for name, value in model(x).items()}


def refused(model: Any, head: Any, label: str = "new", **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        kmerge.add_head(model, head, label, **options)
    return str(caught.value)


def test_a_head_reads_where_the_others_part_and_nothing_else_moves(files: dict[str, Path]) -> None:
    before = loaded(files["mlp"])
    after = kmerge.add_head(files["mlp"], 4, "new head")
    old, new = outputs(before), outputs(after)
    assert list(new) == ["a", "b", "c", "new head"]
    for label, values in old.items():
        np.testing.assert_array_equal(new[label], values)
    np.testing.assert_allclose(new["new head"].sum(1), 1, rtol=1e-5)
    names = [layer.name for layer in after.layers]
    assert len(set(names)) == len(names)
    made = after.get_layer("new_head")
    assert made.units == 4
    reads = made._inbound_nodes[0].input_tensors[0]
    assert reads is after.get_layer("a")._inbound_nodes[0].input_tensors[0]


def test_a_live_model_is_copied(files: dict[str, Path]) -> None:
    model = loaded(files["mlp"])
    count = len(model.layers)
    grown = kmerge.add_head(model, 1, "yes")
    assert len(model.layers) == count
    assert not {id(layer) for layer in model.layers} & {id(layer) for layer in grown.layers}
    assert grown.get_layer("yes").activation.__name__ == "sigmoid"


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_facts_of_the_merge_stay_readable(suffix: str, files: dict[str, Path], tmp_path: Path) -> None:
    first = kmerge.add_head(files["mlp"], 4, "d", output=tmp_path / "first.keras")
    target = tmp_path / f"second{suffix}"
    second = kmerge.add_head(tmp_path / "first.keras", 2, "e", output=target)
    assert list(outputs(first)) == [*"abcd"]
    inspection = kmerge.inspect(target)
    assert inspection.merge is not None
    assert [source["label"] for source in inspection.merge["plan"]["sources"]] == ["a", "b", "c"]
    roles = {layer.name: (layer.role, layer.source) for layer in inspection.layers}
    assert roles["d"] == ("private", "d")
    assert roles["e"] == ("private", "e")
    assert {role for name, (role, _) in roles.items() if name not in "abcde"} == {"shared"}
    for label, values in outputs(loaded(target)).items():
        np.testing.assert_allclose(values, outputs(second)[label], rtol=1e-6)
    # A live model keeps them in memory.
    kmerge.add_head(second, 2, "f", output=tmp_path / "third.keras")
    assert "f" in {layer.source for layer in kmerge.inspect(tmp_path / "third.keras").layers}
    with pytest.raises(OutputError, match="exists"):
        kmerge.add_head(second, 2, "f", output=tmp_path / "third.keras")


def test_a_head_is_a_layer_or_a_model_with_its_weights(files: dict[str, Path]) -> None:
    import keras

    images = X.reshape(5, 8, 8, 1)
    model = loaded(files["cnn"])
    sizes = kmerge.add_head(model, 3, "n").get_layer("n")._inbound_nodes[0].input_tensors[0].shape[1:]
    head = keras.Sequential([keras.Input(sizes), keras.layers.Dense(6, "relu", name="a"), keras.layers.Dense(2)])
    grown = kmerge.add_head(model, head, "new")
    assert [layer.name for layer in grown.layers if layer.name.startswith("new")] == ["new_a", "new"]
    trunk = keras.Model(grown.input, grown.get_layer("new_a")._inbound_nodes[-1].input_tensors[0])
    np.testing.assert_allclose(
        outputs(grown, images)["new"], keras.ops.convert_to_numpy(head(trunk(images))), rtol=1e-5
    )
    layer = keras.layers.Dense(2, name="whatever")
    layer(np.zeros((1, *sizes), np.float32))
    grown = kmerge.add_head(model, layer, "new")
    np.testing.assert_array_equal(grown.get_layer("new").get_weights()[0], layer.get_weights()[0])
    assert layer.name == "whatever"
    unbuilt = keras.Sequential([keras.layers.Dense(6), keras.layers.Softmax()])
    assert outputs(kmerge.add_head(model, unbuilt, "new"), images)["new"].shape == (5, 6)


def test_a_head_can_be_put_elsewhere(files: dict[str, Path], fixtures_dir: Path) -> None:
    model = loaded(files["cnn"])
    conv = next(layer.name for layer in model.layers if type(layer).__name__ == "Conv2D")
    grown = kmerge.add_head(model, 3, "new", at=conv)
    assert outputs(grown, X.reshape(5, 8, 8, 1))["new"].shape == (5, 3)
    assert "new_pool" in [layer.name for layer in grown.layers]
    alone = kmerge.add_head(fixtures_dir / "cnn_a.keras", 3, "new")
    assert len(outputs(alone, X.reshape(5, 8, 8, 1))) == 2
    separate = loaded(files["separate"])
    assert "is called 3 times: say which call" in refused(separate, 3, at=conv)
    grown = kmerge.add_head(separate, 3, "new", at=(conv, 1))
    given = [X.reshape(5, 8, 8, 1)] * 3
    assert outputs(grown, given)["new"].shape == (5, 3)


def test_what_cannot_be_added(files: dict[str, Path]) -> None:
    import keras

    path = files["mlp"]
    assert refused(path, 3, "a") == "The model has a head 'a' already: give another label."
    trunk = next(layer.name for layer in loaded(path).layers if layer.name not in "abc")
    assert refused(path, 3, trunk) == f"The model has a layer '{trunk}' already: give another label."
    assert refused(path, 0) == "The head is 0: expected a number of classes from 1 on."
    assert refused(path, "dense").startswith("The head is a str: expected a number of classes, ")
    assert refused(path, 3, " ").startswith("The label is ' ': expected a name")
    assert refused(path, 3, at="nowhere").startswith("The model has no layer 'nowhere' to put a head at: expected one")
    assert refused(files["apart"], 3).startswith("The heads of the model share no layer: ")
    assert "does not fit the output of" in refused(path, keras.Sequential([keras.Input((7, 7)), keras.layers.LSTM(3)]))
    inputs = keras.Input((3,))
    two = keras.Model([inputs, keras.Input((3,))], keras.layers.Dense(2)(inputs))
    assert "with one input and one output" in refused(path, two)


def test_a_new_head_learns_and_the_others_stay(files: dict[str, Path]) -> None:
    grown = kmerge.add_head(files["mlp"], 2, "new")
    before = outputs(grown)
    labels = {"new": (X[:, 0] > 0.5).astype(int)}
    tuned = kmerge.fine_tune(grown, (X, labels), train="heads", epochs=3, validation_split=0.0, log=lambda line: None)
    after = outputs(tuned.model)
    for label in "abc":
        np.testing.assert_array_equal(after[label], before[label])
    assert np.abs(after["new"] - before["new"]).max() > 1e-4
