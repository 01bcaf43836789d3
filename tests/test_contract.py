"""What kmerge writes is what Keras itself would write, over every built-in layer and shape of graph in the zoo."""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zoo

import kmerge

CASES = [
    pytest.param(name, suffix, id=f"{name}{suffix}")
    for name, case in zoo.CASES.items()
    for suffix in case.formats
    if suffix in (".h5", ".keras") and case is not zoo.SUBCLASSED
]

SAVED_OTHERWISE = {
    "normalization_no_axis.h5": "Keras loads an empty list of axes as the last axis, and saves that",
    "bidirectional_rnn_cell.h5": "Keras gives two weights of the loaded layer one name, and cannot save it again",
    **dict.fromkeys(
        (
            f"{name}.h5"
            for name in (
                "aug_mix",
                "rand_augment",
                "random_color_jitter",
                "random_contrast",
                "random_elastic_transform",
                "random_erasing",
                "random_gaussian_blur",
                "random_hue",
                "random_invert",
            )
        ),
        "Keras cannot copy the configuration of a loaded layer, which holds a module",
    ),
}
"""Files that Keras itself does not save again as they were; their layout is proven by loading alone."""


def heads_of(model: Any, inputs: Any, report: kmerge.Report) -> dict[str, list[np.ndarray]]:
    """Outputs of the merged model per source label."""
    import keras

    got = model(zoo.tensors(inputs), training=False)
    labels = list(report.heads)
    if isinstance(got, dict) and all(name in got for names in report.heads.values() for name in names):
        return {label: [np.asarray(got[name]) for name in report.heads[label]] for label in labels}
    flat = [np.asarray(value) for value in keras.tree.flatten(got)]
    if len(flat) == sum(len(names) for names in report.heads.values()):
        count = len(flat) // len(labels)
        return {label: flat[number * count : (number + 1) * count] for number, label in enumerate(labels)}
    return dict.fromkeys(labels, flat)


def assert_equal(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Difference 0.0."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@lru_cache(maxsize=1)
def built(name: str) -> tuple[list[Any], list[list[np.ndarray]]]:
    """Sources of a case, the same for both formats, and what they predict: nothing here changes them."""
    models = zoo.sources(zoo.CASES[name], 2)
    return models, [zoo.predictions(model, zoo.CASES[name].inputs()) for model in models]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_merged_file_is_kerass_own(name: str, suffix: str, tmp_path: Path) -> None:
    case, (models, predicted) = zoo.CASES[name], built(name)
    paths = [tmp_path / f"{label}{suffix}" for label in "ab"]
    for model, path in zip(models, paths, strict=True):
        zoo.save(model, path)
    inputs = case.inputs()
    wanted = dict(zip("ab", predicted, strict=True))

    apart = tmp_path / f"apart{suffix}"
    report = kmerge.combine(paths, apart, trunk="none")
    merged = zoo.load(apart)
    for label, values in heads_of(merged, inputs, report).items():
        assert_equal(values, wanted[label])

    itself = tmp_path / f"itself{suffix}"
    report = kmerge.combine([paths[0]] * 2, itself, labels=["a", "again"], method="mean")
    trunk = zoo.load(itself)
    for values in heads_of(trunk, inputs, report).values():
        assert_equal(values, wanted["a"])

    if name + suffix in SAVED_OTHERWISE:
        return
    for model, path in ((merged, apart), (trunk, itself)):
        again = tmp_path / f"again{suffix}"
        zoo.save(model, again)
        (assert_same_archive if suffix == ".keras" else assert_same_h5)(path, again)


def plain(value: Any) -> Any:
    """A configuration without object numbers, defaults of calls, and what older Keras chokes on."""
    if isinstance(value, dict):
        left_out = ("shared_object_id", "compile_config", "quantization_config", "build_config", "optional", "ragged")
        return {
            key: plain(item)
            for key, item in value.items()
            if key not in left_out
            and not key.startswith("renorm")
            and item is not None
            and not (key == "training" and item is False)
        }
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def tree(file: h5py.File) -> dict[str, Any]:
    """Every group with its attributes, every data set with its bytes.

    Names of sub-layers that a layer makes itself are numbered anew in every process: those of `model.layers` count.
    """
    found: dict[str, Any] = {}

    def visit(path: str, item: Any) -> None:
        attributes = {key: str(value) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            found[path] = (item.shape, str(item.dtype), item[()].tobytes(), attributes)
        else:
            found[path] = attributes if path.count("/") <= 2 else dict.fromkeys(attributes, "")

    file.visititems(visit)
    return found


def assert_same_archive(mine: Path, kerass: Path) -> None:
    with zipfile.ZipFile(mine) as one, zipfile.ZipFile(kerass) as two:
        assert one.testzip() is None
        assert sorted(one.namelist()) == sorted(two.namelist())
        assert all(item.compress_type == zipfile.ZIP_STORED for item in one.infolist())
        first, second = (json.loads(archive.read("config.json")) for archive in (one, two))
        assert plain(first["config"]["layers"]) == plain(second["config"]["layers"])
        assert plain(first) == plain(second)
        for item in one.namelist():
            if item.startswith("assets/"):
                assert one.read(item) == two.read(item)
        weights = [h5py.File(io.BytesIO(archive.read("model.weights.h5"))) for archive in (one, two)]
        assert tree(weights[0]) == tree(weights[1])


def assert_same_h5(mine: Path, kerass: Path) -> None:
    with h5py.File(mine) as one, h5py.File(kerass) as two:
        first, second = (json.loads(file.attrs["model_config"]) for file in (one, two))
        assert plain_calls(first) == plain_calls(second)
        assert names(one["model_weights"], "layer_names") == names(two["model_weights"], "layer_names")
        assert sorted(one["model_weights"]) == sorted(two["model_weights"])
        for layer in one["model_weights"]:
            groups = [file["model_weights"][layer] for file in (one, two)]
            listed = [names(group, "weight_names") for group in groups]
            assert len(listed[0]) == len(listed[1])
            for own, theirs in zip(*listed, strict=True):
                assert own.split("/")[-1] == theirs.split("/")[-1]
                a, b = groups[0][own], groups[1][theirs]
                assert (a.shape, a.dtype, a[()].tobytes()) == (b.shape, b.dtype, b[()].tobytes())


def names(group: h5py.Group, attribute: str) -> list[str]:
    return [name if isinstance(name, str) else name.decode() for name in group.attrs[attribute]]


def plain_calls(config: dict[str, Any]) -> Any:
    """Old and new spelling of calls alike: layer, call and tensor numbers of what each layer reads."""

    def tensors(value: Any) -> list[Any]:
        if isinstance(value, dict):
            if value.get("class_name") == "__keras_tensor__":
                return [value["config"]["keras_history"]]
            return [found for key in sorted(value) for found in tensors(value[key])]
        if isinstance(value, list):
            if len(value) in (3, 4) and isinstance(value[0], str) and isinstance(value[1], int):
                return [value[:3]]
            return [found for item in value for found in tensors(item)]
        return []

    layers = [
        {**plain(layer), "inbound_nodes": [tensors(node) for node in layer["inbound_nodes"]]}
        for layer in config["config"]["layers"]
    ]
    outer = {key: value for key, value in config["config"].items() if key != "layers"}
    return [config["class_name"], outer, layers]
