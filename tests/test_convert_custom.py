"""Custom layers in files of Keras 3, modules that files name, and CuDNN's own layouts."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import kmerge
from kmerge import live
from kmerge.custom import import_custom
from kmerge.source import open_source
from kmerge.upgrade import upgrade


@pytest.fixture
def custom(module: str) -> tuple[Path, np.ndarray, np.ndarray, Any]:
    """A file of Keras 3 with a custom layer, inputs, what it predicts, and the class."""
    import keras

    scale = import_custom([module])["own>Scale"]
    first = keras.Input((3,))
    model = keras.Model(first, scale(name="own")(keras.layers.Dense(2, name="d")(first)))
    model.set_weights([np.ones((3, 2)), np.zeros(2), np.array([2.0, 3.0])])
    model.compile("sgd", "mse")
    model.save("old.keras")
    x = np.ones((1, 3), "float32")
    return Path("old.keras"), x, np.asarray(model(x)), scale


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("Keras was asked to open the file")


def test_a_custom_layer_of_keras_3_is_taken_over_without_keras(
    custom: tuple[Path, np.ndarray, np.ndarray, Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    old, x, wanted, scale = custom
    monkeypatch.setattr(live, "rewrite", never)
    for options in ({}, {"custom": [module]}):
        report = kmerge.convert(old, "new.keras", force=True, **options)
        assert (report.notes, report.training) == ((), True)
        with zipfile.ZipFile(old) as first, zipfile.ZipFile("new.keras") as second:
            before, after = (json.loads(file.read("config.json")) for file in (first, second))
        entries = [
            [layer for layer in config["config"]["layers"] if layer["name"] == "own"] for config in (before, after)
        ]
        assert entries[0][0]["registered_name"] == entries[1][0]["registered_name"] == "own>Scale"
        model = keras.saving.load_model("new.keras", custom_objects={"own>Scale": scale})
        np.testing.assert_array_equal(np.asarray(model(x)), wanted)


def test_only_its_class_knows_the_order_of_its_weights_in_the_old_format(
    custom: tuple[Path, np.ndarray, np.ndarray, Any], module: str
) -> None:
    import keras

    old, x, wanted, scale = custom
    with pytest.raises(
        kmerge.FormatError, match=r"'own' \(Scale\) is none of Keras's own(.|\n)*\.keras file, which takes"
    ):
        kmerge.convert(old, "new.h5")
    assert not Path("new.h5").exists()
    report = kmerge.convert(old, "new.h5", custom=[module])
    assert not report.training
    assert any("the training configuration was dropped, since Keras rebuilt" in note for note in report.notes)
    model = keras.saving.load_model("new.h5", custom_objects={"Scale": scale}, compile=False)
    np.testing.assert_array_equal(np.asarray(model(x)), wanted)


def as_of(old: Path, new: Path, version: str) -> Path:
    """A `.keras` file that says it is of another version."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if member == "metadata.json":
                data = json.dumps({**json.loads(data), "keras_version": version}).encode()
            target.writestr(member, data)
    return new


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_inside_a_custom_layer_stay_in_their_places(wrapped: bool, module: str) -> None:
    """A `.keras` file has them in the order of the alphabet, an `.h5` file in that in which the class made them."""
    import keras

    objects = import_custom([module])
    own = objects["own>Two"]
    first = keras.Input((4, 3) if wrapped else (3,))
    layer = keras.layers.TimeDistributed(own(), name="td") if wrapped else own(name="td")
    model = keras.Model(first, layer(first))
    x = np.random.default_rng(0).normal(size=(2, *first.shape[1:])).astype("float32")
    wanted = np.asarray(model(x))
    model.save("old.keras")
    model.save("old.h5")
    as_of(Path("old.keras"), Path("older.keras"), "2.15.0")
    plain = {**objects, "Two": own}
    for old in ("old.keras", "older.keras", "old.h5"):
        for new in ("new.keras", "new.h5"):
            if not old.startswith("older") and old[-3:] != new[-3:]:
                with pytest.raises(kmerge.FormatError, match="none of Keras's own layers"):
                    kmerge.convert(old, new, force=True)
            kmerge.convert(old, new, custom=[module], force=True)
            again = keras.saving.load_model(new, custom_objects=plain, compile=False)
            np.testing.assert_allclose(np.asarray(again(x)), wanted, atol=1e-6, err_msg=f"{old} {new}")


def with_module(
    old: Path, new: Path, name: str, module: str, class_name: str = "Other", registered: str = "Other"
) -> Path:
    """A `.keras` file in which a layer claims to come from a module."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if member == "config.json":
                config = json.loads(data)
                for layer in config["config"]["layers"]:
                    if layer["name"] == name:
                        layer.update(module=module, registered_name=registered, class_name=class_name)
                data = json.dumps(config).encode()
            target.writestr(member, data)
    return new


def test_a_module_that_a_file_of_keras_3_names_is_not_imported(
    custom: tuple[Path, np.ndarray, np.ndarray, Any], module: str
) -> None:
    Path("evil_module.py").write_text("raise SystemExit('imported')")
    Path("keras_evil.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, ".")
    try:
        for evil in ("evil_module", "keras_evil"):
            old = with_module(custom[0], Path("evil.keras"), "d", evil)
            kmerge.convert(old, "passed.keras", force=True)  # taken over, unread
            with pytest.raises(kmerge.FormatError, match="none of Keras's own"):
                kmerge.convert(old, "new.h5")
            with pytest.raises(kmerge.FormatError, match=f"'Other' of the module '{evil}', which is never imported"):
                kmerge.convert(old, "new.h5", custom=[module])
            assert evil not in sys.modules
    finally:
        sys.path.remove(".")
    assert not Path("new.h5").exists()


@pytest.mark.parametrize(
    ("class_name", "registered", "imported"),
    [("Scale", "x", "keras_hub.layers"), ("Scale", "x", "evil"), ("Other", "Other", "keras.src.trainers.trainer")],
)
def test_a_class_is_known_by_the_name_that_keras_looks_for(
    class_name: str, registered: str, imported: str, custom: tuple[Path, np.ndarray, np.ndarray, Any], module: str
) -> None:
    old = with_module(custom[0], Path("evil.keras"), "d", imported, class_name, registered)
    with pytest.raises(kmerge.FormatError, match=f"'{class_name}' of the module '{imported}', which is never imported"):
        kmerge.convert(old, "new.h5", custom=[module])


def test_a_lambda_of_keras_3_is_replaced(module: str) -> None:
    import keras

    first = keras.Input((2,))
    model = keras.Model(first, keras.layers.Lambda(lambda x: x * 2.0, name="twice")(keras.layers.Dense(2)(first)))
    model.save("old.keras")
    x = np.ones((1, 2), "float32")
    kmerge.convert("old.keras", "new.keras", lambda_={"twice": f"{module}:Twice"})
    again = keras.saving.load_model("new.keras")  # in safe mode
    np.testing.assert_array_equal(np.asarray(again(x)), np.asarray(model(x)))
    assert type(again.get_layer("twice")).__name__ == "Twice"


# ------------------------------------------------------------------------------------------------------- CuDNN


def write_cudnn(path: Path, class_name: str, arrays: Mapping[str, np.ndarray], units: int) -> Path:
    config = {"name": "l", "batch_input_shape": [None, 4, 3], "units": units, "return_sequences": False}
    layers = [{"class_name": class_name, "config": config}]
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": layers}})
        file.attrs["keras_version"] = "2.2.4"
        file.attrs["backend"] = "tensorflow"
        inner = file.create_group("model_weights/l")
        file["model_weights"].attrs["layer_names"] = [b"l"]
        inner.attrs["weight_names"] = [f"l/{name}:0".encode() for name in arrays]
        for name, array in arrays.items():
            inner[f"l/{name}:0"] = array.astype("float32")
    return path


@pytest.mark.parametrize(("class_name", "gates"), [("CuDNNLSTM", 4), ("CuDNNGRU", 3)])
def test_gates_of_cudnn(class_name: str, gates: int, tmp_path: Path) -> None:
    """Each matrix is stored row by row as CuDNN reads it, (units, inputs); two biases are added."""
    rng = np.random.default_rng(0)
    arrays = {
        "kernel": rng.normal(size=(3, 2 * gates)),
        "recurrent_kernel": rng.normal(size=(2, 2 * gates)),
        "bias": rng.normal(size=4 * gates),
    }
    path = write_cudnn(tmp_path / "a.h5", class_name, arrays, 2)
    with open_source(path) as source:
        kernel, recurrent, bias = (weight.tensor.read() for weight in upgrade(source).order[1])
    for gate in range(gates):
        place = slice(2 * gate, 2 * gate + 2)
        stored = arrays["kernel"][:, place].reshape(-1)
        np.testing.assert_allclose(kernel[:, place], stored.reshape(2, 3).T, rtol=1e-6)
        np.testing.assert_allclose(recurrent[:, place], arrays["recurrent_kernel"][:, place].T, rtol=1e-6)
    both = arrays["bias"].reshape(2, -1)
    np.testing.assert_allclose(bias, both.sum(axis=0) if gates == 4 else both, rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "recurrent", "bias"),
    [((3, 9), (2, 8), 16), ((3, 8), (2, 7), 16), ((3, 8), (3, 8), 16), ((3, 8), (2, 8), 8), ((3, 12), (2, 12), 24)],
)
def test_sizes_of_cudnn_that_make_no_sense(
    kernel: tuple[int, int], recurrent: tuple[int, int], bias: int, tmp_path: Path
) -> None:
    arrays = {"kernel": np.ones(kernel), "recurrent_kernel": np.ones(recurrent), "bias": np.ones(bias)}
    path = write_cudnn(tmp_path / "a.h5", "CuDNNLSTM", arrays, 2)
    with pytest.raises(kmerge.KmergeError, match=r"expected .* for 2 units of 4 gates"):
        kmerge.convert(path, tmp_path / "new.keras")
    assert not (tmp_path / "new.keras").exists()
