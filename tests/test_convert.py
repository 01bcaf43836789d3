"""Old files in current Keras: what was recorded when they were written is predicted again."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import kmerge
from kmerge.cli import main
from kmerge.dialects.reading import Dialect, read_model
from kmerge.graph import Layer, Ref
from kmerge.source import open_source
from kmerge.upgrade import upgrade
from kmerge.upgrade.operations import operation_calls
from kmerge.upgrade.part import Context

LEGACY = Path(__file__).resolve().parent.parent / "fixtures" / "legacy"
LAMBDAS = ("k122_lambda", "k224_lambda", "tfk215_lambda", "tfk215_lambda2")
FILES = sorted(path.stem for path in LEGACY.glob("*.h5") if not path.stem.startswith("tfk221"))
LATER = sorted(path.name for path in LEGACY.glob("tfk221*") if path.suffix != ".npz")
"""Of the last tf.keras: operations, attention, nested models, mixed precision; in either format."""
REPRODUCED = 1e-5


def recorded(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    with np.load(LEGACY / f"{name}.npz") as data:
        return tuple([data[key] for key in sorted(data.files) if key.startswith(kind)] for kind in "xy")  # type: ignore[return-value]


def outputs(model: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    import keras

    given = inputs if len(inputs) > 1 else inputs[0]
    return [np.asarray(keras.ops.convert_to_numpy(value)) for value in keras.tree.flatten(model(given, training=False))]


def assert_reproduces(path: Path, name: str, **options: Any) -> None:
    import keras

    inputs, wanted = recorded(name)
    got = outputs(keras.models.load_model(path, compile=False, **options), inputs)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=REPRODUCED, err_msg=name)


@pytest.mark.parametrize("name", [name for name in FILES if name not in LAMBDAS])
def test_predictions_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    kmerge.convert(LEGACY / f"{name}.h5", tmp_path / "new.keras")
    assert_reproduces(tmp_path / "new.keras", name)


@pytest.mark.parametrize("file", LATER)
def test_predictions_of_the_last_tf_keras(file: str, tmp_path: Path) -> None:
    kmerge.convert(LEGACY / file, tmp_path / "new.keras")
    assert_reproduces(tmp_path / "new.keras", Path(file).stem)
    kmerge.combine([LEGACY / file] * 2, tmp_path / f"two{Path(file).suffix}", method="mean")


def test_operations_cannot_stand_in_the_old_format(tmp_path: Path) -> None:
    with pytest.raises(kmerge.FormatError, match=r"is an operation \(\w+\), which Keras cannot open again from an .h5"):
        kmerge.convert(LEGACY / "tfk221_ops.h5", tmp_path / "new.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["k122_lstm", "k122_cnn", "k224_bilstm", "tfk215_nested_bn", "tfk215_gru"])
def test_the_old_format_holds_them_as_well(name: str, tmp_path: Path) -> None:
    kmerge.convert(LEGACY / f"{name}.h5", tmp_path / "new.h5")
    assert_reproduces(tmp_path / "new.h5", name)


# What Keras 3.15.1 opens of the files as they are, and then computes as their writers did.
CURRENT = [
    "k224_cnn",
    "k224_ctonly",
    "k224_dw",
    "k224_dwonly",
    "k224_multi",
    "k224_seponly",
    "k224_shared",
    "tfk215_acts",
    "tfk215_bn",
    "tfk215_cnn",
    "tfk215_embedding",
    "tfk215_multi",
    "tfk215_normlayer",
    "tfk215_rescale_randflip",
    "tfk215_seq_inputlayer",
    "tfk215_seq_mlp",
    "tfk215_shared",
    "tfk215_timedist",
]


@pytest.mark.parametrize("name", FILES)
def test_what_current_keras_makes_of_a_file_is_told(name: str) -> None:
    found = kmerge.inspect(LEGACY / f"{name}.h5")
    assert bool(found.refused) is (name not in CURRENT)
    assert bool(found.obstacles) is (name in LAMBDAS)
    assert found.writer.startswith(
        {"k122": "Keras 1.2.2", "k224": "Keras 2.2.4", "tfk215": "Keras 2.15.0"}[name.split("_")[0]]
    )


def test_a_gate_of_the_old_hard_sigmoid_is_told_apart_from_a_refusal() -> None:
    silent = {
        item["reason"]: item["layers"] for item in kmerge.inspect(LEGACY / "k122_lstm.h5").refused if item["silent"]
    }
    assert list(silent.values()) == [["lstm_1"]]


# ------------------------------------------------------------------------------------------------------- weights


def write_h5(
    path: Path, config: Any, weights: Mapping[str, Mapping[str, np.ndarray]], version: str, backend: str
) -> Path:
    """An old file, as the Keras of that version laid it out."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = version
        if backend:
            file.attrs["backend"] = backend
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in weights]
        for name, arrays in weights.items():
            inner = group.create_group(name)
            inner.attrs["weight_names"] = [key.encode() for key in arrays]
            for key, array in arrays.items():
                inner[key] = array
    return path


def new_weights(path: Path) -> dict[str, list[np.ndarray]]:
    """Weights per layer of current Keras, without reading any before."""
    with open_source(path) as source:
        made = upgrade(source).source
        assert made.graph is not None
        return {
            layer.name: [weight.tensor.read() for weight in state.weights]
            for layer, state in zip(made.graph.layers, made.states, strict=True)
        }


def sequential(*layers: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": [{"class_name": name, "config": config} for name, config in layers]}


def convolution(ordering: str) -> dict[str, Any]:
    shape = [None, 2, 5, 4] if ordering == "th" else [None, 5, 4, 2]
    return {
        "name": "c", "batch_input_shape": shape, "input_dtype": "float32", "nb_filter": 3, "nb_row": 2, "nb_col": 3,
        "border_mode": "valid", "subsample": [1, 1], "dim_ordering": ordering, "bias": True, "activation": "linear",
    }  # fmt: skip


@pytest.mark.parametrize("colon", ["", ":0"], ids=["theano", "tensorflow"])
@pytest.mark.parametrize("ordering", ["th", "tf"])
def test_kernels_of_keras_1(ordering: str, colon: str, tmp_path: Path) -> None:
    """Theano ordering is (filters, inputs, rows, columns); Theano itself reads kernels backwards.

    Files of Keras 1 record no backend: TensorFlow's names end in ":0".
    """
    stored = np.arange(36, dtype="float32").reshape((3, 2, 2, 3) if ordering == "th" else (2, 3, 2, 3))
    arrays = {f"c_W{colon}": stored, f"c_b{colon}": np.arange(3, dtype="float32")}
    path = write_h5(tmp_path / "a.h5", sequential(("Convolution2D", convolution(ordering))), {"c": arrays}, "1.2.2", "")
    kernel = new_weights(path)["c"][0]
    assert kernel.shape == (2, 3, 2, 3)
    for row, column, channel, unit in np.ndindex(kernel.shape):
        place = (row, column) if colon else (1 - row, 2 - column)
        index = (unit, channel, *place) if ordering == "th" else (*place, channel, unit)
        assert kernel[row, column, channel, unit] == stored[index]


def test_theano_ordering_computes_as_theano_did(tmp_path: Path) -> None:
    """A convolution proper over (channels, rows, columns), flattened channels first into a Dense layer."""
    import keras

    rng = np.random.default_rng(0)
    kernel, dense = rng.normal(size=(3, 2, 2, 3)).astype("float32"), rng.normal(size=(24, 2)).astype("float32")
    config = sequential(
        ("Convolution2D", convolution("th")),
        ("Flatten", {"name": "f"}),
        ("Dense", {"name": "d", "output_dim": 2, "activation": "linear", "bias": False}),
    )
    weights = {"c": {"c_W": kernel, "c_b": np.zeros(3, "float32")}, "d": {"d_W": dense}}
    path = write_h5(tmp_path / "a.h5", config, weights, "1.1.0", "")
    x = rng.normal(size=(2, 2, 5, 4)).astype("float32")
    wanted = np.zeros((2, 3, 4, 2))
    for row, column in np.ndindex(4, 2):
        patch = x[:, :, row : row + 2, column : column + 3]
        wanted[:, :, row, column] = np.einsum("bcij,fcij->bf", patch, kernel[:, :, ::-1, ::-1])
    kmerge.convert(path, tmp_path / "new.keras")
    (got,) = outputs(keras.models.load_model(tmp_path / "new.keras"), [x])
    np.testing.assert_allclose(got, wanted.reshape(2, -1) @ dense, atol=1e-5)


def obstacles(path: Path) -> list[str]:
    with open_source(path) as source:
        return [one.reason for one in upgrade(source).obstacles]


def test_a_layer_that_takes_arguments_in_each_call_is_refused_inside_a_wrapper(tmp_path: Path) -> None:
    inner = {"class_name": "BatchNormalization", "config": {"name": "b", "mode": 2, "axis": -1, "epsilon": 1e-3}}
    config = sequential(("TimeDistributed", {"name": "t", "batch_input_shape": [None, 4, 3], "layer": inner}))
    arrays = {f"b_{name}": np.ones(3, "float32") for name in ("gamma", "beta", "running_mean", "running_std")}
    path = write_h5(tmp_path / "a.h5", config, {"t": arrays}, "1.2.2", "")
    assert obstacles(path) == ["takes arguments in each call, inside a wrapper"]


@pytest.mark.parametrize(
    ("changes", "kernel", "message"),
    [
        ({"strides": [0]}, (3, 4, 5), "ZeroDivisionError"),
        ({}, (7, 4, 5), r"kernel is \(7, 4, 5\), expected \(3, 4, 5\)"),
        ({}, (3, 4, 5), "bias is"),
    ],
)
def test_locally_connected_layers_that_make_no_sense(
    changes: dict[str, Any], kernel: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    config = {"name": "l", "batch_input_shape": [None, 4, 2], "filters": 5, "kernel_size": [2], "strides": [1]}
    weights = {"l": {"l/kernel:0": np.ones(kernel, "float32"), "l/bias:0": np.ones((2, 5), "float32")}}
    path = write_h5(
        tmp_path / "a.h5", sequential(("LocallyConnected1D", config | changes)), weights, "2.2.4", "tensorflow"
    )
    with pytest.raises(kmerge.KmergeError, match=message):
        kmerge.convert(path, tmp_path / "new.keras")
    assert not (tmp_path / "new.keras").exists()


OPERATIONS = [
    ("math.cumsum", [1], {"exclusive": False}, True),
    ("math.cumsum", [1], {"exclusive": True, "reverse": True}, False),
    ("math.cumsum", [1, True], {}, False),
    ("gather", [[0, 1]], {"batch_dims": 1}, False),
    ("gather", [[0, 1]], {"axis": 1, "batch_dims": 0}, True),
    ("one_hot", [4], {"on_value": 5.0, "off_value": -1.0}, False),
    ("one_hot", [4], {"on_value": 1.0, "off_value": 0.0, "dtype": "float32"}, True),
    ("nn.depth_to_space", [2], {"data_format": "NCHW"}, False),
    ("nn.depth_to_space", [2], {"data_format": "NHWC"}, True),
    ("image.resize", [[4, 4]], {"preserve_aspect_ratio": True}, False),
]


@pytest.mark.parametrize(("symbol", "args", "kwargs", "known"), OPERATIONS)
def test_no_argument_of_an_operation_is_lost(symbol: str, args: list[Any], kwargs: dict[str, Any], known: bool) -> None:
    context = Context((2, 15), Dialect.KERAS2)
    layer = Layer("op", "TFOpLambda", {"name": "op", "function": symbol}, {})
    given = {"args": [Ref(0), *args], "kwargs": kwargs}
    assert operation_calls(layer, given, lambda *_: Ref(1), context) == Ref(1)
    assert (not context.obstacles) is known


def test_adjoints_of_recorded_products_are_transposes() -> None:
    node = {"op": "BatchMatMulV2", "attr": {"adj_x": {"b": False}, "adj_y": {"b": True}, "T": {"type": "DT_FLOAT"}}}
    layer = Layer("op", "TensorFlowOpLayer", {"name": "op", "node_def": node, "constants": {}}, {})
    made: list[str] = []

    def add(part: Any, *_: Any) -> Ref:
        made.append(part.class_name)
        return Ref(len(made) + 1)

    context = Context((2, 3), Dialect.KERAS2)
    assert operation_calls(layer, [[Ref(0), {}], [Ref(1), {}]], add, context) is not None
    assert not context.obstacles
    assert len(made) == 2  # turned, then multiplied
    assert made[-1] == "Matmul"


def test_a_sequential_of_branches(tmp_path: Path) -> None:
    """Keras 1's Sequential([Merge([left, right]), Dense]): the weights of the branches stand at the top of the file."""
    import keras

    def branch(name: str) -> dict[str, Any]:
        dense = {"name": name, "output_dim": 3, "batch_input_shape": [None, 4], "activation": "relu", "bias": True}
        return {"class_name": "Sequential", "config": [{"class_name": "Dense", "config": dense}]}

    merge = {"name": "m", "mode": "concat", "concat_axis": -1, "layers": [branch("l"), branch("r")]}
    config = sequential(("Merge", merge), ("Dense", {"name": "d", "output_dim": 2, "bias": True}))
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(4 if name != "d" else 6, 3 if name != "d" else 2)).astype("float32") for name in "lrd"
    }
    weights = {
        name: {f"{name}_W:0": array, f"{name}_b:0": np.ones(array.shape[1], "float32")}
        for name, array in arrays.items()
    }
    path = write_h5(tmp_path / "a.h5", config, weights, "1.0.8", "")
    kmerge.convert(path, tmp_path / "new.keras")
    x, y = rng.normal(size=(2, 5, 4)).astype("float32")
    (got,) = outputs(keras.models.load_model(tmp_path / "new.keras"), [x, y])
    both = np.concatenate([np.maximum(x @ arrays["l"] + 1, 0), np.maximum(y @ arrays["r"] + 1, 0)], axis=1)
    np.testing.assert_allclose(got, both @ arrays["d"] + 1, atol=1e-5)
    kmerge.combine([path, path], tmp_path / "two.h5", method="mean")


def test_gates_are_put_in_order_and_scaled() -> None:
    """Keras 1 stores i, c, f, o apart; hard_sigmoid's gates i, f, o are multiplied by 1.2, the candidate c is not."""
    with h5py.File(LEGACY / "k122_lstm.h5") as file:
        stored = {
            key.split("_W_")[1][0]: array[()] for key, array in file["model_weights/lstm_1"].items() if "_W_" in key
        }
    kernel = new_weights(LEGACY / "k122_lstm.h5")["lstm_1"][0]
    wanted = np.concatenate([stored[gate] * (1 if gate == "c" else 1.2) for gate in "ifco"], axis=1)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)


def test_blocks_of_a_scaled_weight_are_those_of_the_whole() -> None:
    with open_source(LEGACY / "k224_lstm.h5") as source:
        tensors = [weight.tensor for state in upgrade(source).source.states for weight in state.weights]
        for tensor in tensors:
            whole = tensor.read().reshape(-1)
            for start in range(0, tensor.size, 7):
                part = np.empty(min(7, tensor.size - start), whole.dtype)
                tensor.read_into(start, part)
                np.testing.assert_array_equal(part, whole[start : start + part.size])


# ---------------------------------------------------------------------------------------------- code and modules


@pytest.mark.parametrize("name", LAMBDAS)
def test_a_lambda_is_named_and_never_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import marshal

    def never(*_: Any) -> None:
        raise AssertionError("bytecode of a file was loaded")

    monkeypatch.setattr(marshal, "loads", never)
    with pytest.raises(
        kmerge.FormatError, match=r"'lambda(_1)?' \(Lambda\) holds Python bytecode(.|\n)*--lambda lambda"
    ) as error:
        kmerge.convert(LEGACY / f"{name}.h5", tmp_path / "new.keras")
    assert "MODULE:FUNCTION" in str(error.value)
    assert not list(tmp_path.iterdir())
    kmerge.combine([LEGACY / f"{name}.h5"] * 2, tmp_path / "two.h5", method="mean")


@pytest.mark.parametrize("attribute", ["Twice", "twice"])
def test_a_lambda_is_replaced_by_the_users_own(attribute: str, module: str) -> None:
    """The four Lambdas of the old files double their input."""
    name = "k224_lambda"
    kmerge.convert(LEGACY / f"{name}.h5", "new.keras", lambda_={"lambda_1": f"{module}:{attribute}"})
    assert_reproduces(Path("new.keras"), name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lambda_1": "no_such_module:f"}, "cannot be imported"),
        ({"lambda_1": "json"}, "NAME=MODULE:FUNCTION"),
        ({"lambda_1": "json:nothing"}, "has no 'nothing'"),
        ({"other": "json:loads"}, "There is no Lambda layer 'other' in the file: it has 'lambda_1'"),
        ({"lambda_1": "json:loads"}, "is not registered with Keras"),
    ],
)
def test_a_wrong_replacement_is_explained(value: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(kmerge.PlanError, match=message):
        kmerge.convert(LEGACY / "k224_lambda.h5", tmp_path / "new.keras", lambda_=value)


def custom_file(path: Path) -> Path:
    config = {
        "class_name": "Sequential",
        "config": {
            "name": "s",
            "layers": [
                {"class_name": "Dense", "config": {"name": "d", "units": 3, "batch_input_shape": [None, 4]}},
                {"class_name": "Scale", "config": {"name": "scale", "trainable": True, "dtype": "float32"}},
            ],
        },
    }
    weights = {
        "d": {"d/kernel:0": np.ones((4, 3), "float32"), "d/bias:0": np.zeros(3, "float32")},
        "scale": {"scale/factor:0": np.array([1, 2, 3], "float32")},
    }
    return write_h5(path, config, weights, "2.4.0", "tensorflow")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_custom_layer_needs_its_module(suffix: str, module: str) -> None:
    import keras

    old, new = custom_file(Path("old.h5")), Path(f"new{suffix}")
    with pytest.raises(
        kmerge.FormatError, match=r"'scale' \(Scale\) is none of Keras's own layers(.|\n)*--custom MODULE"
    ):
        kmerge.convert(old, new)
    kmerge.convert(old, new, custom=[module])
    objects = {"Scale": sys.modules[module].Scale}
    (got,) = outputs(keras.models.load_model(new, compile=False, custom_objects=objects), [np.ones((2, 4), "float32")])
    np.testing.assert_allclose(got, [[4, 8, 12]] * 2)


def test_a_module_that_a_configuration_names_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_in_a_config.py").write_text("raise SystemExit('imported')")
    with h5py.File(LEGACY / "tfk215_seq_mlp.h5") as file:
        config = json.loads(file.attrs["model_config"])
    for entry in config["config"]["layers"]:
        entry["module"] = "evil_in_a_config"
        entry["config"]["activation"] = {"module": "os", "class_name": "function", "config": "system"}
    shutil.copy(LEGACY / "tfk215_seq_mlp.h5", tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(kmerge.KmergeError):
            kmerge.convert(tmp_path / "old.h5", tmp_path / "new.keras")
        kmerge.inspect(tmp_path / "old.h5")
        assert "evil_in_a_config" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


def test_models_and_wrappers_nested_too_deep_are_refused(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"class_name": "Dense", "config": {"name": "d", "output_dim": 2, "input_dim": 2}}
    for number in range(300):
        inner = {"class_name": "TimeDistributed", "config": {"name": f"t{number}", "layer": inner}}
    inner["config"]["batch_input_shape"] = [None, 2, 2]
    path = write_h5(tmp_path / "a.h5", {"class_name": "Sequential", "config": [inner]}, {}, "1.2.2", "")
    with pytest.raises(kmerge.KmergeError):
        kmerge.convert(path, tmp_path / "new.keras")
    merge: dict[str, Any] = {"class_name": "Sequential", "config": []}
    for _ in range(60):
        merge = {"class_name": "Sequential", "config": [{"class_name": "Merge", "config": {"layers": [merge]}}]}
    with pytest.raises(kmerge.UnsafeFileError, match="nested more than"):
        read_model(merge, Dialect.KERAS2)


# ------------------------------------------------------------------------------------------------------ merging


def test_old_models_are_merged_live_as_they_computed() -> None:
    """What current Keras refuses, or computes otherwise, goes through the upgrade first."""
    for name in ("k122_lstm", "k224_gru", "tfk215_nested_bn"):
        inputs, wanted = recorded(name)
        model = kmerge.merge_models({"a": LEGACY / f"{name}.h5", "b": LEGACY / f"{name}.h5"}, method="mean")
        for got in outputs(model, inputs):
            np.testing.assert_allclose(got, wanted[0], rtol=0, atol=REPRODUCED)


def test_files_of_different_age_are_merged(tmp_path: Path) -> None:
    import keras

    kmerge.convert(LEGACY / "k122_seq_mlp.h5", tmp_path / "new.keras")
    kmerge.combine([tmp_path / "new.keras", LEGACY / "k122_seq_mlp.h5"], tmp_path / "two.keras", trunk="none")
    inputs, wanted = recorded("k122_seq_mlp")
    for got in outputs(keras.models.load_model(tmp_path / "two.keras"), inputs):
        np.testing.assert_allclose(got, wanted[0], rtol=0, atol=REPRODUCED)


def test_old_models_are_fused(tmp_path: Path) -> None:
    import keras

    out = tmp_path / "fused.h5"
    report = kmerge.combine([LEGACY / "k122_lstm.h5"] * 2, out, method="fuse", samples=200)
    assert min(item.value for item in report.agreement) > 0.98
    inputs, wanted = recorded("k122_lstm")
    for got in outputs(keras.models.load_model(out, compile=False), inputs):
        np.testing.assert_allclose(got, wanted[0], atol=0.05)


# ------------------------------------------------------------------------------------------- what stands beside


def test_losses_metrics_and_the_optimizer_are_carried_along(tmp_path: Path) -> None:
    import keras

    report = kmerge.convert(LEGACY / "tfk215_seq_mlp.h5", tmp_path / "new.keras")
    assert report.training
    model = keras.models.load_model(tmp_path / "new.keras")
    assert (model.loss, type(model.optimizer).__name__) == ("categorical_crossentropy", "Adam")
    assert float(model.optimizer.learning_rate) == pytest.approx(0.001)
    old, new = tmp_path / "old.h5", tmp_path / "again.keras"
    shutil.copy(LEGACY / "tfk215_seq_mlp.h5", old)
    with h5py.File(old, "r+") as file:
        file.attrs["training_config"] = json.dumps({"loss": "my_loss", "optimizer_config": None})
    report = kmerge.convert(old, new)
    assert not report.training
    assert report.notes == ("the training configuration was dropped: the loss 'my_loss' is none of current Keras's",)


def test_a_conversion_leaves_its_source_and_what_stands_there(tmp_path: Path) -> None:
    old = tmp_path / "old.h5"
    shutil.copy(LEGACY / "k122_seq_mlp.h5", old)
    before = old.read_bytes()
    with pytest.raises(kmerge.OutputError):
        kmerge.convert(old, old, force=True)
    (tmp_path / "new.keras").write_text("mine")
    with pytest.raises(kmerge.OutputError):
        kmerge.convert(old, tmp_path / "new.keras")
    with pytest.raises(kmerge.OutputError, match=r"\.keras or \.h5"):
        kmerge.convert(old, tmp_path / "new.onnx")
    assert (tmp_path / "new.keras").read_text() == "mine"
    kmerge.convert(old, tmp_path / "new.keras", force=True)
    assert zipfile.is_zipfile(tmp_path / "new.keras")
    assert old.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.keras", "old.h5"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old = str(LEGACY / "k122_gru.h5")
    done = CliRunner().invoke(main, ["convert", old, "new.keras", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert (report["output"], report["writer"], report["training"]) == ("new.keras", "Keras 1.2.2", True)
    assert CliRunner().invoke(main, ["convert", old, "new.keras"]).exit_code == 1
    quiet = CliRunner().invoke(main, ["convert", old, "new.keras", "--force", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    wrong = CliRunner().invoke(main, ["convert", old, "b.keras", "--lambda", "x=y"])
    assert (wrong.exit_code, "NAME=MODULE:FUNCTION" in wrong.stderr) == (2, True)
    shown = CliRunner().invoke(main, ["inspect", old]).stdout
    assert "current Keras refuses this file:" in shown
    assert "kmerge convert writes it as a file that current Keras opens" in " ".join(shown.split())
