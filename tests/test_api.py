"""The whole road through `combine` and `merge_models`, where its parts meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge


def array(value: Any) -> np.ndarray:
    """A tensor of any backend as NumPy array."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(value))


def dense(seed: int, dtype: str | None = None, keys: tuple[str, ...] = ()) -> Any:
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    if keys:
        inputs = {key: keras.Input((3,), name=key) for key in keys}
        x = layers.Concatenate()([layers.Dense(4)(inputs[key]) for key in keys])
        return keras.Model(inputs, layers.Dense(2)(x))
    inputs = keras.Input((6,), name="x")
    return keras.Model(inputs, layers.Dense(2, name="out", dtype=dtype)(layers.Dense(5, name="h", dtype=dtype)(inputs)))


def load(path: Path) -> Any:
    import keras

    return keras.models.load_model(path, compile=False)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m{seed}.keras" for seed in range(3)]
    for seed, path in enumerate(paths):
        dense(seed).save(path)
    return paths


def kernel(model: Any, name: str) -> np.ndarray:
    return array(model.get_layer(name).get_weights()[0])


def test_inputs_of_other_names_are_not_taken_for_one_another(tmp_path: Path) -> None:
    dense(0, keys=("img", "meta")).save(tmp_path / "a.keras")
    dense(1, keys=("zimage", "info")).save(tmp_path / "b.keras")
    with pytest.raises(kmerge.LayoutError, match=r"'img', 'meta'.*'info', 'zimage'.*--inputs separate"):
        kmerge.combine([tmp_path / "a.keras", tmp_path / "b.keras"], tmp_path / "m.keras", trunk="none")


def test_separate_inputs_by_labels_that_look_alike_without_their_letters(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        dense(seed, keys=("img", "meta")).save(tmp_path / f"{name}.keras")
    kmerge.combine(
        [tmp_path / "a.keras", tmp_path / "b.keras"],
        tmp_path / "m.keras",
        trunk="none",
        inputs="separate",
        labels=["猫", "狗"],
    )
    model = load(tmp_path / "m.keras")
    assert len(model.inputs) == 4
    assert {layer.name for layer in model.layers} >= set(model.input)


def test_a_dictionary_of_sources_keeps_its_labels_under_a_plan(files: list[Path], tmp_path: Path) -> None:
    plan = kmerge.combine(files[:2], method="mean", dry_run=True).plan
    swapped = {"m1": files[1], "m0": files[0]}
    kmerge.combine(swapped, tmp_path / "o.keras", plan=plan)
    np.testing.assert_array_equal(kernel(load(tmp_path / "o.keras"), "m0"), kernel(load(files[0]), "out"))


def test_files_in_another_order_than_in_the_plan_are_an_error(files: list[Path], tmp_path: Path) -> None:
    plan = kmerge.combine(files[:2], method="mean", dry_run=True).plan
    with pytest.raises(kmerge.PlanError, match=r"order m0, m1.*--labels"):
        kmerge.combine(files[1::-1], tmp_path / "o.keras", plan=plan)
    assert not (tmp_path / "o.keras").exists()


def test_other_files_under_a_plan_are_noted(files: list[Path], tmp_path: Path) -> None:
    plan = kmerge.combine(files[:2], method="mean", dry_run=True).plan
    report = kmerge.combine(files[1:], tmp_path / "o.keras", plan=plan)
    assert any("made from m0.keras" in note for note in report.notes)


def test_new_labels_reach_the_options_of_a_plan(files: list[Path], tmp_path: Path) -> None:
    plan = kmerge.combine(files[:2], method="pick", option={"label": "m1"}, dry_run=True).plan
    kmerge.combine(files[:2], tmp_path / "o.keras", plan=plan, labels=["u", "v"])
    np.testing.assert_array_equal(kernel(load(tmp_path / "o.keras"), "h"), kernel(load(files[1]), "h"))


def test_an_average_leaves_out_a_source_of_weight_0(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.keras"
    report = kmerge.combine(files, out, trunk="none", outputs="mean", weights=[1, 0, 1])
    model = load(out)
    assert report.merged.parameters == model.count_params()
    assert model.output_names == ["out"]
    assert all(source.digest for source in report.plan.sources)
    assert any("'m1' has weight 0" in note for note in report.notes)
    x = np.ones((2, 6), dtype="float32")
    wanted = (array(load(files[0])(x)) + array(load(files[2])(x))) / 2
    np.testing.assert_allclose(array(model(x)), wanted, atol=1e-6)
    kmerge.combine(files, out, trunk="none", outputs="mean", weights=[0, 1, 0], force=True)
    np.testing.assert_array_equal(array(load(out)(x)), array(load(files[1])(x)))


def test_an_average_keeps_its_sources_precision(tmp_path: Path) -> None:
    for seed in range(2):
        dense(seed, dtype="float64").save(tmp_path / f"{seed}.keras")
    kmerge.combine([tmp_path / "0.keras", tmp_path / "1.keras"], tmp_path / "o.keras", trunk="none", outputs="mean")
    assert load(tmp_path / "o.keras").outputs[0].dtype == "float64"


@pytest.mark.parametrize("name", ["x.weights.h5", "x.onnx", "x.H5", "x.weights.json"])
def test_a_whole_model_needs_a_suffix_that_keras_opens(name: str, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(kmerge.OutputError, match=r"\.keras, \.h5 and \.hdf5"):
        kmerge.combine(files, tmp_path / name, trunk="none")
    assert not (tmp_path / name).exists()


def test_a_label_does_not_rename_the_input(files: list[Path], tmp_path: Path) -> None:
    kmerge.combine(files[:2], tmp_path / "o.keras", labels=["x", "h"], trunk="none")
    model = load(tmp_path / "o.keras")
    assert [tensor.name for tensor in model.inputs] == ["x"]
    assert set(model.output) == {"x", "h"}


def test_an_activation_in_trunk_and_head_does_not_make_the_trunk_a_head(tmp_path: Path) -> None:
    import keras
    from keras import layers

    for seed in range(2):
        keras.utils.set_random_seed(seed)
        relu = layers.ReLU(name="relu")
        inputs = keras.Input((6,))
        x = relu(layers.Dense(5, name="d1")(inputs))
        one = layers.Dense(2, name="o1")(relu(layers.Dense(4, name="d2")(x)))
        two = layers.Dense(2, name="d4")(layers.Dense(5, name="d3")(x))
        keras.Model(inputs, [one, two]).save(tmp_path / f"{seed}.keras")
    plan = kmerge.combine([tmp_path / "0.keras", tmp_path / "1.keras"], method="mean", dry_run=True).plan
    roles = {layer.name: layer.role for layer in plan.layers}
    assert [roles[name] for name in ("d1", "d2", "d3", "o1", "d4")] == ["shared"] * 3 + ["private"] * 2


def test_freeze_reaches_custom_layers_that_save_no_trainable() -> None:
    import keras
    from keras import layers

    class Block(layers.Layer):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.inner = layers.Dense(6)

        def call(self, x: Any) -> Any:
            return self.inner(x)

        def get_config(self) -> dict[str, Any]:
            return {}

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(2)(Block()(inputs)))

    merged = kmerge.merge_models([build(0), build(1)], method="mean", freeze=True)
    assert [layer.trainable for layer in merged.layers if layer.weights] == [False, True, True]


def test_what_a_flag_does_not_do_is_noted(files: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(files, tmp_path / "a.keras", trunk="none", freeze=True)
    assert any("freeze has no effect" in note for note in report.notes)
    report = kmerge.combine(files[:2], tmp_path / "b.keras", trunk="none", base=files[2])
    assert any("base is not used" in note for note in report.notes)


def test_a_mean_that_nothing_speaks_for_is_noted(tmp_path: Path) -> None:
    import keras
    from keras import layers

    for seed in range(2):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        keras.Model(inputs, layers.Dense(2)(layers.BatchNormalization()(inputs))).save(tmp_path / f"{seed}.keras")
    report = kmerge.combine([tmp_path / "0.keras", tmp_path / "1.keras"], tmp_path / "o.keras")
    assert any("ancestor" in note for note in report.notes)
    assert report.to_dict()["ancestry"] == {"related": None, "cosine": None}


def test_sources_may_come_from_a_generator(files: list[Path], tmp_path: Path) -> None:
    kmerge.combine((path for path in files), tmp_path / "o.keras", trunk="none", progress=None)
    assert set(load(tmp_path / "o.keras").output) == {"m0", "m1", "m2"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 5},
        {"share": "h"},
        {"labels": 5},
        {"roles": 5},
        {"roles": [5]},
        {"option": 5},
        {"method": ["x"]},
        {"trunk": 3},
        {"output": 5},
        {"plan": 5},
        {"plan": "a\0b"},
        {"plan": "x" * 5000},
        {"plan": {"format": 1, "method": {}}},
    ],
    ids=str,
)
def test_arguments_of_a_wrong_type_are_named(wrong: dict[str, Any], fixtures_dir: Path, tmp_path: Path) -> None:
    paths = [fixtures_dir / "mlp_a.h5", fixtures_dir / "mlp_b.h5"]
    with pytest.raises(kmerge.KmergeError):
        kmerge.combine(paths, **{"output": tmp_path / "o.h5", **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_align_brings_unrelated_fixtures_together(family: str, suffix: str, fixtures_dir: Path, tmp_path: Path) -> None:
    """With itself a model stays itself; digests are those of the files, whatever the order of units."""
    paths = [fixtures_dir / f"{family}_{label}{suffix}" for label in "abc"]
    report = kmerge.combine(paths, tmp_path / f"aligned{suffix}", method="align")
    plain = kmerge.combine(paths, tmp_path / f"mean{suffix}", method="mean")
    assert [s.digest for s in report.plan.sources] == [s.digest for s in plain.plan.sources]
    kmerge.combine([paths[0]] * 2, tmp_path / f"self{suffix}", labels=["one", "two"], method="align")
    model, source = load(tmp_path / f"self{suffix}"), load(paths[0])
    shape = source.inputs[0].shape
    x = np.random.default_rng(0).random((4, *shape[1:]), dtype="float32")
    for value in model(x).values():
        np.testing.assert_allclose(array(value), array(source(x)), atol=1e-5)


def test_align_needs_a_graph(tmp_path: Path) -> None:
    dense(0).save_weights(tmp_path / "a.weights.h5")
    dense(1).save_weights(tmp_path / "b.weights.h5")
    paths = [tmp_path / "a.weights.h5", tmp_path / "b.weights.h5"]
    with pytest.raises(kmerge.PlanError, match="needs the graph"):
        kmerge.combine(paths, tmp_path / "o.weights.h5", trunk="all", method="align")
