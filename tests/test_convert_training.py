"""The state of an optimizer in a converted file: training goes on as it would have."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import kmerge
from kmerge.source import open_source
from kmerge.store import Tensor
from kmerge.store.derived import origins
from kmerge.upgrade import upgrade

LEGACY = Path(__file__).resolve().parent.parent / "fixtures" / "legacy"
with zipfile.ZipFile(LEGACY / "optimizers.zip") as _archive:
    STATES = [name for name in _archive.namelist() if not name.endswith(".npz")]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of models with the state of their optimizers."""
    folder = tmp_path_factory.mktemp("optimizers")
    with zipfile.ZipFile(LEGACY / "optimizers.zip") as archive:
        archive.extractall(folder)
    return folder


def load(path: Path) -> Any:
    """Opened by Keras, which warns where it cannot restore an optimizer."""
    import keras

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = keras.saving.load_model(path)
    model.run_eagerly = True
    return model


def variables_in(path: Path) -> list[np.ndarray]:
    """The optimizer's variables, without Keras."""
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        group = file.get("optimizer/vars", {})
        return [group[str(number)][()] for number in range(len(group))]


def recorded_in(path: Path) -> list[np.ndarray]:
    with h5py.File(path) as file:
        group = file["optimizer_weights"]
        return [group[name][()] for name in group.attrs["weight_names"]]


def edited(
    path: Path, training: Mapping[str, Any] | None = None, state: Mapping[str, np.ndarray] | None = None
) -> Path:
    """A file with another training configuration and another state of its optimizer."""
    with h5py.File(path, "r+") as file:
        if training is not None:
            file.attrs["training_config"] = json.dumps(training)
        if state is not None:
            file.pop("optimizer_weights", None)
            group = file.create_group("optimizer_weights")
            group.attrs["weight_names"] = [name.encode() for name in state]
            for name, array in state.items():
                group[name] = array
    return path


def trained_by(class_name: str, **settings: Any) -> dict[str, Any]:
    return {"optimizer_config": {"class_name": class_name, "config": settings}, "loss": "mse", "metrics": []}


@pytest.mark.parametrize("name", [name for name in STATES if "nadam" not in name])
def test_training_goes_on_as_it_did_in_tf_keras(name: str, states: Path, tmp_path: Path) -> None:
    """One more step gives the weights that tf.keras came to, with its own state, from the same rows."""
    report = kmerge.convert(states / name, tmp_path / "new.keras")
    assert report.notes == ()
    model = load(tmp_path / "new.keras")
    with np.load(states / f"{name.partition('.')[0]}.npz") as data:
        model.train_on_batch(data["x"], data["y"])
        assert int(model.optimizer.iterations) == 4
        for weight in model.weights:
            np.testing.assert_allclose(np.asarray(weight), data[weight.path], atol=1e-6, err_msg=weight.path)


def test_nadam_keeps_its_moments_and_takes_up_todays_schedule(states: Path, tmp_path: Path) -> None:
    report = kmerge.convert(states / "nadam_old.h5", tmp_path / "new.keras")
    assert report.notes == ("Nadam has another schedule of its momentum today, and goes on with that",)
    optimizer = load(tmp_path / "new.keras").optimizer
    assert type(optimizer).__name__ == "Nadam"
    assert isinstance(optimizer.get_config()["learning_rate"], float)  # its `decay` is none of the learning rate
    old = {name: value for name, value in named(states / "nadam_old.h5").items() if name.count("/") == 3}
    for slot, values in (("m", optimizer._momentums), ("v", optimizer._velocities)):
        for reference, value in zip(optimizer._trainable_variables, values, strict=True):
            np.testing.assert_array_equal(np.asarray(value), old[f"Nadam/{reference.path}/{slot}:0"])
    steps = np.prod([0.9 * (1 - 0.5 * 0.96**step) for step in (1, 2, 3)])
    np.testing.assert_allclose(float(optimizer._u_product), steps, rtol=1e-6)


def named(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        names = [str(item) for item in file["optimizer_weights"].attrs["weight_names"]]
    return dict(zip(names, recorded_in(path), strict=True))


@pytest.mark.parametrize("name", ["k122_seq_mlp", "k224_seq_mlp"])
def test_adam_of_keras_1_and_2(name: str, tmp_path: Path) -> None:
    """They store all first moments, then all second ones; Keras 2 a number for each weight besides."""
    old = recorded_in(LEGACY / f"{name}.h5")
    kmerge.convert(LEGACY / f"{name}.h5", tmp_path / "new.keras")
    steps, rate, *slots = variables_in(tmp_path / "new.keras")
    assert (steps, steps.dtype, rate) == (1, np.int64, np.float32(0.001))
    assert len(slots) == 8
    for number, array in enumerate(slots):  # today the moments of each weight stand together
        np.testing.assert_array_equal(array, old[1 + number // 2 + 4 * (number % 2)])


def test_adam_steps_as_by_hand(tmp_path: Path) -> None:
    """The second step: m = 0.9 m + 0.1 g, v = 0.999 v + 0.001 g², w -= rate √(1 - 0.999²) / (1 - 0.9²) m / √v."""
    import keras

    kmerge.convert(LEGACY / "k224_seq_mlp.h5", tmp_path / "new.keras")
    model = load(tmp_path / "new.keras")
    for layer in model.layers:
        if "dropout" in layer.name:
            layer.rate = 0.0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 8)).astype("float32"), np.eye(3, dtype="float32")[[0, 1, 2, 0]]
    _, _, *slots = variables_in(tmp_path / "new.keras")
    kernel = np.asarray(model.trainable_variables[-2])
    hidden = np.asarray(keras.Model(model.inputs[0], model.layers[-1].input)(x))
    given = np.asarray(model(x))
    gradient = hidden.T @ (given - y) / 4  # of categorical crossentropy behind a softmax
    model.train_on_batch(x, y)
    first, second = 0.9 * slots[4] + 0.1 * gradient, 0.999 * slots[5] + 0.001 * gradient**2
    rate = 0.001 * np.sqrt(1 - 0.999**2) / (1 - 0.9**2)
    wanted = kernel - rate * first / (np.sqrt(second) + 1e-7)
    np.testing.assert_allclose(np.asarray(model.trainable_variables[-2]), wanted, atol=1e-6)


def test_keras_1_lists_weights_by_name(tmp_path: Path) -> None:
    """beta before gamma, and normalisation before the layers that it stands between."""
    old = tmp_path / "old.h5"
    shutil.copy(LEGACY / "k122_nested_bn.h5", old)
    edited(old, trained_by("SGD", lr=0.01, momentum=0.9))
    kmerge.convert(old, tmp_path / "new.keras")
    model = load(tmp_path / "new.keras")
    layers = ("batchnormalization_2_beta", "batchnormalization_2_gamma")
    names = [*layers, *(f"dense_{number}_{weight}" for number in (17, 18, 19) for weight in "Wb")]
    stored = dict(zip(names, recorded_in(old)[1:], strict=True))
    for variable, momentum in zip(model.trainable_variables, model.optimizer.momentums, strict=True):
        name = variable.path.replace("/kernel", "_W").replace("/bias", "_b").replace("/", "_")
        np.testing.assert_array_equal(np.asarray(momentum), stored.pop(name))
    assert not stored


@pytest.mark.parametrize(
    ("class_name", "settings", "factor"),
    [("SGD", {"momentum": 0.9}, 1 / 1.2), ("RMSprop", {"rho": 0.9}, 1 / 1.44), ("Adagrad", {}, 1 / 1.44)],
)
def test_slots_of_scaled_gates(class_name: str, settings: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """Gates under the old hard_sigmoid are multiplied by 1.2, so their gradients are divided by it."""
    old = tmp_path / "old.h5"
    shutil.copy(LEGACY / "k224_lstm.h5", old)
    with h5py.File(old) as file:
        group = file["model_weights"]
        arrays = [
            group[layer][name][()]
            for layer in group.attrs["layer_names"]
            for name in group[layer].attrs["weight_names"]
        ]
    slots = [np.full(array.shape, 2.0, "float32") for array in arrays]
    state = {f"training/{class_name}/Variable_{number}:0": slot for number, slot in enumerate(slots)}
    edited(old, trained_by(class_name, lr=0.01, **settings), state)
    assert kmerge.convert(old, tmp_path / "new.keras").notes == ()
    found = variables_in(tmp_path / "new.keras")[2:]
    units = arrays[1].shape[0]
    gates = np.repeat([factor, factor, 1.0, factor], units)  # i, f, c, o
    for slot, array in zip(found, arrays, strict=True):
        wanted = 2 * gates if array.shape[-1] == 4 * units else 2.0
        np.testing.assert_allclose(slot, np.broadcast_to(wanted, array.shape), rtol=1e-6)


def test_what_cannot_be_proved_is_dropped_with_a_word(tmp_path: Path) -> None:
    def notes(name: str, training: Any, state: dict[str, np.ndarray] | None, suffix: str = ".keras") -> str:
        old, new = tmp_path / "old.h5", tmp_path / f"new{suffix}"
        shutil.copy(LEGACY / f"{name}.h5", old)
        report = kmerge.convert(edited(old, training, state), new, force=True)
        if suffix == ".keras":
            assert variables_in(new) == []
        else:
            with h5py.File(new) as file:
                assert "optimizer_weights" not in file
        return " ".join(report.notes)

    adam = trained_by("Adam", lr=0.001)
    few = {"Adam/iterations:0": np.int64(5), "a:0": np.zeros((8, 16), "float32")}
    assert notes("k224_seq_mlp", adam, {}).startswith("the file records no state of its optimizer")
    assert "1 variables for 4 trainable weights, expected 8" in notes("k224_seq_mlp", adam, few)
    assert "taken 5 steps" in notes("k224_seq_mlp", adam, {"Adam/iterations:0": np.int64(5)})
    other = {"Adam/iterations:0": np.int64(5)} | {f"{n}:0": np.zeros((2, 2), "float32") for n in range(8)}
    assert "is (8, 16), but what belongs to it is (2, 2)" in notes("k224_seq_mlp", adam, other)
    assert "the optimizer is another one now" in notes("k224_seq_mlp", trained_by("MyOwn"), few)
    assert "a .keras file keeps it" in notes("k224_seq_mlp", None, None, ".h5")
    wrong = {**few, "Adam/iterations:0": np.float32("nan")}
    assert "makes no sense (ValueError" in notes("k224_seq_mlp", adam, wrong)
    unnamed = {"iteration:0": np.int64(1)} | {f"v{n}:0": np.zeros(1, "float32") for n in range(8)}
    assert "other names than those that tf.keras gives" in notes("tfk215_seq_mlp", adam, unnamed)
    many = {"Adam/iterations:0": np.uint64(2**64 - 1)} | like("k224_seq_mlp", "Adam", 2)
    assert "makes no sense (OverflowError" in notes("k224_seq_mlp", adam, many)
    for dtype in ("complex64", "int64"):
        typed = {"Adam/iterations:0": np.int64(1)} | like("k224_seq_mlp", "Adam", 2, dtype)
        assert f"is {dtype}" in notes("k224_seq_mlp", adam, typed)
    for class_name, start, slot in (
        ("Ftrl", 0.0, "linear"),
        ("Ftrl", 0.1, "accumulator"),
        ("Adagrad", 0.1, "accumulator"),
    ):
        training = trained_by(class_name, lr=0.1, initial_accumulator_value=start)
        said = notes("k224_lstm", training, like("k224_lstm", class_name, 2 if class_name == "Ftrl" else 1))
        assert f"weights were multiplied, and how '{slot}' of {class_name} would be is not known" in said


def like(name: str, class_name: str, slots: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Variables of the shapes of a file's weights, all those of a slot together."""
    with h5py.File(LEGACY / f"{name}.h5") as file:
        group = file["model_weights"]
        shapes = [
            group[layer][weight].shape for layer in group.attrs["layer_names"]
            for weight in group[layer].attrs["weight_names"]
        ]  # fmt: skip
    names = [f"training/{class_name}/Variable_{number}:0" for number in range(slots * len(shapes))]
    return {name: np.zeros(shape, dtype) for name, shape in zip(names, slots * shapes, strict=True)}


def test_a_rate_of_any_length(tmp_path: Path) -> None:
    old = tmp_path / "old.h5"
    shutil.copy(LEGACY / "k224_seq_mlp.h5", old)
    report = kmerge.convert(edited(old, trained_by("Adam", lr=10**400)), tmp_path / "new.keras")
    assert any("'Adam' with a learning rate beyond all bounds" in note for note in report.notes)
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        assert json.loads(archive.read("config.json"))["compile_config"]["optimizer"] == "rmsprop"


def test_weight_decay_and_clipping_are_kept(tmp_path: Path) -> None:
    """One step of plain SGD: w -= rate decay w, then w -= rate g, where g is no longer than it may be."""
    old = tmp_path / "old.h5"
    shutil.copy(LEGACY / "tfk215_seq_mlp.h5", old)
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "clipnorm": 0.01, "momentum": 0.0, "foo": 3, "bar": None}
    training = {**trained_by("SGD", **settings), "loss": "mse"}
    report = kmerge.convert(edited(old, training, {"iteration:0": np.int64(0)}), tmp_path / "new.keras")
    assert report.notes == ("the setting foo=3 of the optimizer was left out: current Keras's SGD has none",)
    model = load(tmp_path / "new.keras")
    before = [np.asarray(variable) for variable in model.trainable_variables]
    x = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype("float32")
    model.train_on_batch(x, np.full((4, *model.output_shape[1:]), 9.0, "float32"))
    bias = np.asarray(model.trainable_variables[-1]) - before[-1] * (1 - 0.1 * 0.5)
    assert np.linalg.norm(bias) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_an_optimizer_without_a_step_is_fresh(tmp_path: Path) -> None:
    """tf.keras 2.15 saves the count alone of an optimizer that was never used."""
    kmerge.convert(LEGACY / "tfk215_normlayer.h5", tmp_path / "new.keras")
    model = load(tmp_path / "new.keras")
    fresh = type(model.optimizer).from_config(model.optimizer.get_config())
    fresh.build(model.trainable_variables)
    for mine, theirs in zip(model.optimizer.variables, fresh.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_a_schedule_goes_on_where_it_stopped(states: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.h5"
    shutil.copy(states / "sgd_old.h5", old)
    decay = {"initial_learning_rate": 0.1, "decay_steps": 2, "decay_rate": 0.5, "staircase": False, "name": None}
    rate = {"class_name": "ExponentialDecay", "config": decay}
    edited(old, trained_by("SGD", learning_rate=rate, momentum=0.9, nesterov=True, decay=0.0))
    assert kmerge.convert(old, tmp_path / "new.keras").notes == ()
    optimizer = load(tmp_path / "new.keras").optimizer
    assert float(optimizer.learning_rate) == pytest.approx(0.1 * 0.5 ** (3 / 2))
    assert len(optimizer.variables) == 11  # no variable for the rate


def test_an_optimizer_of_keras_3_is_taken_over_from_the_old_format(tmp_path: Path) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    settings = {"learning_rate": 0.1, "gradient_accumulation_steps": 2}
    model.compile(keras.optimizers.Lion(**settings), "mean_squared_error", run_eagerly=True)
    x, y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    for _ in range(3):
        model.train_on_batch(x, y)
    model.save(tmp_path / "old.h5")
    assert kmerge.convert(tmp_path / "old.h5", tmp_path / "new.keras").notes == ()
    again = load(tmp_path / "new.keras")
    for mine, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of Keras 3 in both formats, after a step of Adam."""
    import keras

    folder = tmp_path_factory.mktemp("adam")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile("adam", "mean_squared_error", run_eagerly=True)
    model.train_on_batch(np.ones((1, 3)), np.ones((1, 3)))
    model.save(folder / "old.keras")
    model.save(folder / "old.h5")
    return folder


@pytest.mark.parametrize("case", ["same", "repeated", "linked", "many", "shape", "type"])
def test_a_state_that_does_not_fit_its_weights_is_not_taken_over(case: str, adam: Path, tmp_path: Path) -> None:
    """A name costs a file few bytes, and what it names could be any size."""
    old = tmp_path / "old.h5"
    shutil.copy(adam / "old.h5", old)
    with h5py.File(old, "r+") as file:
        group = file["optimizer_weights"]
        names = [str(name) for name in group.attrs["weight_names"]]
        big = next(name for name in names if group[name].shape == (3, 3))
        if case == "repeated":
            names += [big] * 100
        elif case == "linked":
            for number in range(100):
                group[f"more_{number}"] = group[big]
                names.append(f"more_{number}")
        elif case == "many":
            group["more"] = np.zeros((3, 3), "float32")
            names.append("more")
        elif case != "same":
            del group[big]
            group[big] = np.zeros((9, 9), "float32") if case == "shape" else np.zeros((3, 3), "complex64")
        group.attrs["weight_names"] = [name.encode() for name in names]
    said = " ".join(kmerge.convert(old, tmp_path / "new.keras").notes)
    reasons = {
        "same": "", "repeated": "it lists a variable more than once", "linked": "variables, expected 6",
        "many": "it has 7 variables, expected 6", "shape": r"of the shape \(9, 9\)", "type": "of the type complex64",
    }  # fmt: skip
    assert re.search(reasons[case], said)
    assert len(variables_in(tmp_path / "new.keras")) == (6 if case == "same" else 0)


def test_an_optimizer_of_a_strange_name(adam: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.keras"
    with zipfile.ZipFile(adam / "old.keras") as source, zipfile.ZipFile(old, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if member == "config.json":
                config = json.loads(data)
                config["compile_config"]["optimizer"]["config"]["name"] = "a\0b"
                data = json.dumps(config).encode()
            target.writestr(member, data)
    assert kmerge.convert(old, tmp_path / "new.keras").notes == ()
    assert len(variables_in(tmp_path / "new.keras")) == 6


def test_files_of_keras_3_keep_their_state(tmp_path: Path) -> None:
    """A model inside a model is dissolved, and the weights change places; the step after is the same."""
    import keras

    inner_in, first = keras.Input((3,)), keras.Input((3,))
    inner = keras.Model(inner_in, keras.layers.Dense(3, name="b")(keras.layers.Dense(3, name="a")(inner_in)))
    joined = keras.layers.Add()([keras.layers.Dense(3, name="side")(first), inner(first)])
    model = keras.Model(first, keras.layers.Dense(1, name="head")(joined))
    model.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)).astype("float32"), rng.normal(size=(4, 1)).astype("float32")
    model.train_on_batch(x, y)
    model.save(tmp_path / "old.keras")
    assert kmerge.convert(tmp_path / "old.keras", tmp_path / "new.keras").notes == ()
    again = load(tmp_path / "new.keras")
    before = [variable.path for variable in model.trainable_variables]
    assert [variable.path for variable in again.trainable_variables] != before
    model.train_on_batch(x, y)
    again.train_on_batch(x, y)
    mine = {variable.path: np.asarray(variable) for variable in again.trainable_variables}
    for variable in model.trainable_variables:
        np.testing.assert_allclose(mine[variable.path], np.asarray(variable), atol=1e-6)


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Tensor):
    """A stored tensor of known numbers."""

    values: np.ndarray

    def _read(self, start: int, raw: np.ndarray) -> None:
        raw.view("float64")[:] = self.values[start : start + raw.size // 8]


def test_tensors_that_say_they_only_reorder_do_so() -> None:
    """Every weight of the old files, numbered: what holds them in another order holds each number once."""
    for path in sorted(LEGACY.glob("k*.h5")):
        if "lambda" in path.name:
            continue
        with open_source(path) as source:
            states = []
            count = 0
            for state in source.states:
                weights = []
                for weight in state.weights:
                    shape, size = weight.tensor.shape, weight.tensor.size
                    values = np.arange(count, count + size, dtype="float64")
                    tensor = Numbered(shape, "float64", size, 8 * size, weight.key, values)
                    weights.append(replace(weight, tensor=tensor))
                    count += size
                states.append(replace(state, weights=tuple(weights)))
            made = upgrade(replace(source, states=tuple(states)), power=0)
            for weights in made.order:
                for weight in weights:
                    parts = origins(weight.tensor)
                    assert parts is not None
                    wanted = np.concatenate([part.read().reshape(-1) for part in parts])
                    np.testing.assert_array_equal(np.sort(weight.tensor.read(), axis=None), np.sort(wanted))
