"""Each way in which a file, a flag or a set of sources can be wrong: its message, and that nothing was written."""

from __future__ import annotations

import json
import math
import pickle
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import h5py
import hostile
import numpy as np
import pytest
from test_matching import Net, Tensor

import kmerge
from kmerge.errors import (
    FormatError,
    GraphError,
    KmergeError,
    LayoutError,
    MergeError,
    MethodError,
    OutputError,
    PlanError,
    UnrelatedError,
    UnsafeFileError,
)

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FILES = Path(__file__).resolve().parent / "files"
OLD = b"something that was here before"
Make = Callable[[Path], tuple[Any, dict[str, Any]]]
"""Writes what a merge is asked for into a folder; returns the sources and the other arguments of `combine`."""


# ---- sources, good and bad


def chain(net: Net, units: int = 3, classes: int = 2, **hidden: Any) -> Tensor:
    """The usual network: a hidden layer 'dense' and a head 'dense_1'."""
    return net.dense(net.dense(net.input(4), units, **hidden), classes)


def good(folder: Path, name: str = "a.h5", seed: int = 1, recipe: Callable[[Net], Any] = chain) -> Path:
    net = Net(seed)
    return net.save(folder / name, recipe(net))


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def after_a_good_one(make: Callable[[Path], Any]) -> Make:
    """A good source 'a', then what `make` gives."""
    return lambda folder: ([good(folder), make(folder)], {})


def data(content: bytes, name: str = "b.h5") -> Make:
    return after_a_good_one(lambda folder: put(folder / name, content))


def flags(**arguments: Any) -> Make:
    """Two good sources 'a' and 'b', and arguments."""
    return lambda folder: ([good(folder), good(folder, "b.h5", 2)], arguments)


def made(arguments: Callable[[Path], dict[str, Any]]) -> Make:
    """Two good sources, and arguments that name files."""
    return lambda folder: ([good(folder), good(folder, "b.h5", 2)], arguments(folder))


def nets(first: Callable[[Net], Any], second: Callable[[Net], Any], **arguments: Any) -> Make:
    return lambda folder: (
        [good(folder, "a.h5", 1, first), good(folder, "b.h5", 2, second)],
        {"method": "mean", **arguments},
    )


def hidden(first: Mapping[str, Any], second: Mapping[str, Any], **arguments: Any) -> Make:
    """Two networks whose hidden layer differs."""
    return nets(lambda net: chain(net, **first), lambda net: chain(net, **second), **arguments)


def config(change: Callable[[dict[str, Any]], Any], suffix: str = ".h5") -> Make:
    """A second source with a changed configuration: `change` edits it, or returns what stands in its place."""

    def make(folder: Path) -> Path:
        path = good(folder, f"b{suffix}", 2)
        reconfigure(path, lambda model: changed if (changed := change(model)) is not None else model)
        return path

    if suffix == ".keras":
        return lambda folder: ([good(folder, "a.keras"), make(folder)], {})
    return after_a_good_one(make)


def reconfigure(path: Path, change: Callable[[Any], Any]) -> None:
    """Put another configuration into a model file: a value, or the bytes of the JSON."""

    def spell(value: Any) -> bytes:
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["config.json"] = spell(change(json.loads(members["config.json"])))
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = np.bytes_(spell(change(json.loads(file.attrs["model_config"]))))


def layer(model: dict[str, Any], number: int) -> dict[str, Any]:
    return model["config"]["layers"][number]


def nameless(model: dict[str, Any]) -> None:
    del layer(model, 1)["name"], layer(model, 1)["config"]["name"]


def history(model: dict[str, Any], number: int) -> list[Any]:
    """Of the first tensor that a layer is called on."""
    return layer(model, number)["inbound_nodes"][0]["args"][0]["config"]["keras_history"]


def edited(change: Callable[[Any], Any]) -> Make:
    """A second source with a changed HDF5 file."""

    def make(folder: Path) -> Path:
        path = good(folder, "b.h5", 2)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return after_a_good_one(make)


def weights_only(path: Path, seed: int = 1, units: int = 3) -> Path:
    """Weights of the usual network: Keras 3's layout under `.weights.h5`, else the old one."""
    net = Net(seed)
    chain(net, units)
    if path.name.endswith(".weights.h5"):
        return put(path, net.numbered())
    with h5py.File(path, "w") as file:
        net.write_weights(file)
    return path


def random_weights(path: Path, seed: int) -> Path:
    """The same with numbers that have nothing to do with those of another seed."""
    rng = np.random.default_rng(seed)
    with h5py.File(weights_only(path, units=99), "r+") as file:

        def fill(_: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                item[...] = rng.standard_normal(item.shape)

        file.visititems(fill)
    return path


def bare(names: tuple[str, str], **arguments: Any) -> Make:
    """Two files with weights only."""
    return lambda folder: ([weights_only(folder / name, seed) for seed, name in enumerate(names)], arguments)


def subclassed(path: Path, seed: int = 1) -> Path:
    """A model whose configuration holds no graph."""
    good(path.parent, path.name, seed)
    reconfigure(path, lambda model: {**model, "class_name": "Siren", "config": {"width": 3}})
    return path


def stored_plan(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Two good sources with a plan for them that was changed."""

    def arguments(folder: Path) -> dict[str, Any]:
        plan = kmerge.combine([folder / "a.h5", folder / "b.h5"], method="mean", dry_run=True).plan.to_dict()
        changed = change(plan)
        (folder / "plan.json").write_text(json.dumps(plan if changed is None else changed))
        return {"plan": folder / "plan.json"}

    return made(arguments)


def hostile_file(make: Callable[[Path], Path]) -> Make:
    return after_a_good_one(make)


# ---- networks that differ


def shaped(*shape: int | None, dtype: str = "float32") -> Callable[[Net], Any]:
    return lambda net: net.dense(net.dense(net.input(*shape, dtype=dtype), 3), 2)


def image(class_name: str = "MaxPooling2D", filters: int = 2, **settings: Any) -> Callable[[Net], Any]:
    """Convolution, a layer of some class, a head: `conv_` settings are those of the convolution."""
    conv = {key.removeprefix("conv_"): value for key, value in settings.items() if key.startswith("conv_")}
    own = {key: value for key, value in settings.items() if not key.startswith("conv_")}

    def recipe(net: Net) -> Any:
        x = net.add(class_name, net.conv(net.input(8, 8, 1), filters, **conv), **own)
        return net.dense(net.add("GlobalAveragePooling2D", x, shape=(None, filters)), 2)

    return recipe


def inputs(count: int) -> Callable[[Net], Any]:
    def recipe(net: Net) -> Any:
        tensors = [net.input(4) for _ in range(count)]
        x = net.add("Concatenate", *tensors, shape=(None, 4 * count)) if count > 1 else tensors[0]
        return net.dense(net.dense(x, 3), 2)

    return recipe


def deep(layers: int) -> Callable[[Net], Any]:
    def recipe(net: Net) -> Any:
        x = net.input(4)
        for _ in range(layers):
            x = net.dense(x, 4)
        return net.dense(x, 2, activation="softmax")

    return recipe


def told(**kwargs: Any) -> Callable[[Net], Any]:
    """A recurrent layer whose call is given keywords."""

    def recipe(net: Net) -> Any:
        weights = {"kernel": (4, 3), "recurrent_kernel": (3, 3), "bias": (3,)}
        x = net.add("SimpleRNN", net.input(5, 4), weights=weights, shape=(None, 3), kwargs=kwargs, units=3)
        return net.dense(x, 2)

    return recipe


def normalised(mean: float) -> Callable[[Net], Any]:
    return lambda net: net.dense(net.dense(net.normalization(net.input(4), mean), 3), 2)


def quantised(value: int) -> Callable[[Net], Any]:
    def recipe(net: Net) -> Any:
        kernel = np.full((4, 3), value, "int8")
        weights = {"kernel": kernel, "kernel_scale": np.ones(3, "float32"), "bias": np.zeros(3, "float32")}
        dtype = {"module": "keras", "class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}
        return net.dense(net.dense(net.input(4), 3, weights=weights, dtype=dtype), 2)

    return recipe


def filled(value: float) -> Callable[[Net], Any]:
    weights = {"kernel": np.full((4, 3), value, "float32"), "bias": np.zeros(3, "float32")}
    return lambda net: chain(net, weights=weights)


def heads(*classes: int, named: str = "") -> Callable[[Net], Any]:
    """Several outputs: a list, or a dictionary under the letters of `named`."""

    def recipe(net: Net) -> Any:
        x = net.dense(net.input(4), 3)
        made = [net.dense(x, count) for count in classes]
        return dict(zip(named, made, strict=True)) if named else made

    return recipe


def called(times: int) -> Callable[[Net], Any]:
    def recipe(net: Net) -> Any:
        x = net.dense(net.input(4), 4, name="again")
        for _ in range(times - 1):
            x = net.call("again", x)
        return net.dense(x, 2)

    return recipe


# ---- the table

Row = tuple[Make, type[KmergeError], tuple[str, ...]]
ROWS: dict[str, Row] = {}

# A file is not what it should be.
ROWS |= {
    f"file {name.replace(' ', '_')}": (data(content), FormatError, ("b.h5", words))
    for name, (content, words) in hostile.STRANGERS.items()
}
ROWS |= {
    "file missing": (lambda f: ([good(f), f / "b.h5"], {}), FormatError, ("b.h5", "does not exist")),
    "file missing first": (lambda f: ([f / "b.h5", good(f)], {}), FormatError, ("b.h5", "does not exist")),
    "file name": (lambda f: ([good(f), "b\0.h5"], {}), FormatError, ("no valid file name",)),
    "file empty name": (lambda f: ([good(f), ""], {}), FormatError, ("folder",)),
    "folder empty": (after_a_good_one(lambda f: folder(f / "b")), FormatError, ("b is a folder without a model",)),
    "folder of models": (
        after_a_good_one(lambda f: folder(f / "b", {"m.keras": b""})),
        FormatError,
        ("give the model in it, for example b/m.keras",),
    ),
    "folder saved model": (
        after_a_good_one(lambda f: folder(f / "b", {"saved_model.pb": b"\x08"})),
        FormatError,
        ("b is a TensorFlow SavedModel", "model.save("),
    ),
    "folder half": (
        after_a_good_one(lambda f: folder(f / "b", {"config.json": b"{}"})),
        FormatError,
        ("without 'model.weights.h5'",),
    ),
    "file truncated": (
        after_a_good_one(lambda f: put(f / "b.h5", good(f, "c.h5").read_bytes()[:-200])),
        FormatError,
        ("b.h5", "truncated"),
    ),
    "zip truncated": (
        after_a_good_one(lambda f: put(f / "b.keras", good(f, "c.keras").read_bytes()[:-200])),
        FormatError,
        ("b.keras", "truncated"),
    ),
    "zip torn weights": (
        after_a_good_one(lambda f: zipped(f, {"model.weights.h5": hostile.weights_bytes()[:600]})),
        FormatError,
        ("b.keras/model.weights.h5", "truncated HDF5"),
    ),
    "zip pickled weights": (
        after_a_good_one(lambda f: zipped(f, {"model.weights.h5": pickle.dumps([1])})),
        FormatError,
        ("b.keras/model.weights.h5", "pickle"),
    ),
    "zip text weights": (
        after_a_good_one(lambda f: zipped(f, {"model.weights.h5": b"hello"})),
        FormatError,
        ("b.keras/model.weights.h5", "text file"),
    ),
    "zip torn config": (
        after_a_good_one(lambda f: zipped(f, {"config.json": b'{"class_name": "Seq'})),
        FormatError,
        ("b.keras: 'config.json'", "not valid JSON"),
    ),
    "zip list config": (
        after_a_good_one(lambda f: zipped(f, {"config.json": b"[1, 2]"})),
        FormatError,
        ("b.keras: 'config.json'", "holds a list"),
    ),
    "shard missing": (
        after_a_good_one(lambda f: hostile.shard_map(f / "b.weights.json", "b_0.weights.h5")),
        FormatError,
        ("'b_0.weights.h5' is missing",),
    ),
    "hdf5 config no text": (
        edited(lambda f: f.attrs.__setitem__("model_config", 5)),
        FormatError,
        ("model_config", "b.h5"),
    ),
    "hdf5 config torn": (
        edited(lambda f: f.attrs.__setitem__("model_config", '{"class_name": "Seq')),
        FormatError,
        ("model_config of 'b.h5'", "not valid JSON"),
    ),
    "hdf5 no weights": (
        edited(lambda f: f.__delitem__("model_weights")),
        FormatError,
        ("b.h5", "no group 'model_weights'", "save the trained model again"),
    ),
    "hdf5 no layer names": (
        edited(lambda f: f["model_weights"].attrs.__delitem__("layer_names")),
        FormatError,
        ("b.h5", "layer 'dense' (Dense)", "Save the trained model again"),
    ),
    "hdf5 other layer names": (
        edited(lambda f: f["model_weights"].attrs.__setitem__("layer_names", ["x", "dense"])),
        FormatError,
        ("b.h5", "'model_weights/x'"),
    ),
    "hdf5 weight lost": (
        edited(lambda f: f["model_weights/dense_1/dense_1"].__delitem__("kernel")),
        FormatError,
        ("b.h5", "'dense_1/kernel'", "does not hold"),
    ),
    "hdf5 weight not listed": (
        edited(lambda f: f["model_weights/dense_1"].attrs.__setitem__("weight_names", ["dense_1/kernel"])),
        FormatError,
        ("b.h5", "1 weights", "'dense_1' (Dense)", "expected 2"),
    ),
    "hdf5 layer without weights": (
        edited(lambda f: f["model_weights/dense_1"].attrs.__setitem__("weight_names", np.zeros(0))),
        FormatError,
        ("b.h5", "no weights for layer 'dense_1' (Dense)", "expected 2"),
    ),
    "hdf5 weight names no text": (
        edited(lambda f: f["model_weights/dense_1"].attrs.__setitem__("weight_names", [1, 2])),
        FormatError,
        ("b.h5", "'weight_names' holds 1"),
    ),
    "keras layer without weights": (
        after_a_good_one(lambda f: unweighted(f, "layers/dense_1/vars")),
        FormatError,
        ("no weights for layer 'dense_1' (Dense)", "layers/dense_1"),
    ),
    "keras weight lost": (
        after_a_good_one(lambda f: unweighted(f, "layers/dense_1/vars/1")),
        FormatError,
        ("1 weights for layer 'dense_1' (Dense)", "expected 2"),
    ),
    "weights none": (
        after_a_good_one(lambda f: empty_weights(f / "b.weights.h5")),
        FormatError,
        ("b.weights.h5", "holds no weights"),
    ),
}


def folder(path: Path, files: Mapping[str, bytes] | None = None) -> Path:
    path.mkdir()
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    return path


def zipped(place: Path, members: Mapping[str, bytes]) -> Path:
    """A good .keras with some members replaced."""
    path = good(place, "b.keras", 2)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()} | dict(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, item in content.items():
            archive.writestr(name, item)
    return path


def unweighted(place: Path, gone: str) -> Path:
    """A .keras whose weights lack something."""
    path = good(place, "b.keras", 2)
    with zipfile.ZipFile(path) as archive:
        inside = put(place / "inside.h5", archive.read("model.weights.h5"))
    with h5py.File(inside, "r+") as file:
        del file[gone]
    return zipped(place, {"model.weights.h5": inside.read_bytes()})


def empty_weights(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_group("layers/dense/vars")
    return path


# A configuration describes no network.
ROWS |= {
    "config list": (config(lambda m: [1]), FormatError, ("b.h5", "expected class_name and config")),
    "config number": (config(lambda m: 5), FormatError, ("b.h5", "expected class_name and config")),
    "config without class": (config(lambda m: {"config": {}}), FormatError, ("b.h5", "expected class_name and config")),
    "config class number": (config(lambda m: m.update(class_name=5)), FormatError, ("b.h5", "expected class_name")),
    "config null": (config(lambda m: m.update(config=None)), PlanError, ("b.h5", "holds no graph", "--trunk all")),
    "keras config without class": (
        config(lambda m: m.pop("class_name") and None, ".keras"),
        FormatError,
        ("b.keras", "expected class_name and config"),
    ),
    "no layers": (config(lambda m: m["config"].update(layers=[])), GraphError, ("'functional'", "does not have")),
    "sequential empty": (
        config(lambda m: {"class_name": "Sequential", "config": {"layers": []}}),
        PlanError,
        ("b.h5", "holds no graph"),
    ),
    "layer number": (config(lambda m: m["config"]["layers"].append(5)), GraphError, ("without a class name",)),
    "layer without config": (config(lambda m: layer(m, 1).pop("config") and None), GraphError, ("without a config",)),
    "layer config text": (config(lambda m: layer(m, 1).update(config="x")), GraphError, ("without a configuration",)),
    "layer without name": (
        config(lambda m: nameless(m)),
        GraphError,
        ("without a name",),
    ),
    "two layers of a name": (
        config(lambda m: layer(m, 2).update(name="dense")),
        GraphError,
        ("two layers named 'dense'", "unique"),
    ),
    "layer not there": (
        config(lambda m: history(m, 2).__setitem__(0, "x")),
        GraphError,
        ("a layer 'x' that it does not",),
    ),
    "call not there": (config(lambda m: history(m, 2).__setitem__(1, 7)), GraphError, ("call 7 of layer 'dense'",)),
    "call negative": (config(lambda m: history(m, 2).__setitem__(1, -1)), GraphError, ("call -1 of layer 'dense'",)),
    "call text": (config(lambda m: history(m, 2).__setitem__(1, "x")), GraphError, ("history",)),
    "call null": (config(lambda m: history(m, 2).__setitem__(1, None)), GraphError, ("history",)),
    "tensor without history": (
        config(lambda m: layer(m, 2)["inbound_nodes"][0]["args"][0].pop("config") and None),
        GraphError,
        ("without a history",),
    ),
    "calls no list": (config(lambda m: layer(m, 2).update(inbound_nodes=5)), GraphError, ("'dense_1'", "not a list")),
    "call no object": (
        config(lambda m: layer(m, 2).update(inbound_nodes=[5])),
        GraphError,
        ("'dense_1'", "on no tensor"),
    ),
    "call without tensors": (
        config(lambda m: layer(m, 2).update(inbound_nodes=[{"args": [], "kwargs": {}}])),
        GraphError,
        ("'dense_1'", "called on no tensor"),
    ),
    "never called": (
        config(lambda m: layer(m, 2).update(inbound_nodes=[])),
        GraphError,
        ("'dense_1'", "called on no tensor"),
    ),
    "loop": (config(lambda m: history(m, 1).__setitem__(0, "dense_1")), GraphError, ("a loop through layer 'dense",)),
    "loop of one": (
        config(lambda m: history(m, 1).__setitem__(0, "dense")),
        GraphError,
        ("a loop through layer 'dense",),
    ),
    "no outputs": (config(lambda m: m["config"].update(output_layers=[])), GraphError, ("has no outputs",)),
    "outputs null": (
        config(lambda m: m["config"].update(output_layers=None)),
        GraphError,
        ("output is given as None",),
    ),
    "output not there": (
        config(lambda m: m["config"].update(output_layers=["x", 0, 0])),
        GraphError,
        ("a layer 'x' that it does not have",),
    ),
    "input no input": (
        config(lambda m: m["config"].update(input_layers=["dense", 0, 0])),
        GraphError,
        ("'dense' as input, which is no input layer",),
    ),
    "input not listed": (config(lambda m: m["config"].update(input_layers=[])), GraphError, ("'input'",)),
    "input without shape": (
        after_a_good_one(lambda f: shapeless(f)),
        GraphError,
        ("input 'input' has no recorded shape", "save it again"),
    ),
    "nested without end": (config(lambda m: nested(m, 45)), UnsafeFileError, ("nested more than 40 deep",)),
    "config deep": (
        config(lambda m: b'{"class_name": "Model", "config": ' + b"[" * 300),
        UnsafeFileError,
        ("levels deep",),
    ),
    "subclassed": (
        lambda f: ([good(f), subclassed(f / "b.h5")], {}),
        PlanError,
        ("'b.h5' holds no graph", "'Siren' is a subclassed model", "--trunk all", "--base FILE"),
    ),
    "subclassed keras": (
        lambda f: ([subclassed(f / "a.keras"), subclassed(f / "b.keras")], {}),
        PlanError,
        ("'a.keras' holds no graph", "'Siren' is a subclassed model", "--trunk all"),
    ),
    "subclassed with flags": (
        lambda f: ([subclassed(f / "a.keras"), subclassed(f / "b.keras")], {"trunk": "all", "freeze": True}),
        PlanError,
        ("'a.keras' holds no graph", "--freeze", "Leave them out"),
    ),
}


def shapeless(folder: Path) -> Path:
    """An input whose shape neither its own configuration tells nor the layer behind it."""

    def recipe(net: Net) -> Any:
        return net.dense(net.add("Flatten", net.input(4)), 3)

    path = good(folder, "b.h5", 2, recipe)
    reconfigure(path, lambda model: layer(model, 0)["config"].update(batch_shape=None) or model)
    return path


def nested(model: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        model = {"class_name": "Sequential", "config": {"name": "s", "layers": [model]}}
    return model


# A file asks for something that no model needs.
ROWS |= {
    f"hostile {make.__name__}": (hostile_file(make), FormatError, ())
    for make in (
        *(hostile.soft_link, hostile.external_link, hostile.virtual_dataset, hostile.external_storage),
        *(hostile.shape_bomb, hostile.unstored_tensor, hostile.forged_shape, hostile.doubling_groups),
        *(hostile.climbing_member, hostile.zip_bomb, hostile.headers_disagree, hostile.member_twice),
        *(hostile.encrypted_member, hostile.linked_weights, hostile.linked_config),
    )
}

# Files with weights only.
ROWS |= {
    "weights only": (
        bare(("a.weights.h5", "b.weights.h5")),
        PlanError,
        ("'a.weights.h5' holds no graph", "weights only", "--trunk all", "--base FILE"),
    ),
    "weights only, old": (bare(("a.h5", "b.h5")), PlanError, ("'a.h5' holds no graph", "--trunk all", "--base FILE")),
    "weights only, layer": (bare(("a.h5", "b.h5"), trunk="dense"), PlanError, ("'a.h5' holds no graph", "--trunk all")),
    **{
        f"weights only, {key}": (
            bare(("a.weights.h5", "b.weights.h5"), trunk="all", **{key: value}),
            PlanError,
            ("'a.weights.h5' holds no graph", f"--{key}", "Leave them out", "--base FILE"),
        )
        for key, value in {"share": ["*"], "private": ["*"], "inputs": "separate", "outputs": "mean"}.items()
    },
    "weights only, two kinds": (
        bare(("a.weights.h5", "b.h5"), trunk="all"),
        PlanError,
        ("'a.weights.h5' is weights", "'b.h5' is h5_weights", "one kind"),
    ),
    "weights only, with a model": (
        lambda f: ([good(f), weights_only(f / "b.h5")], {"trunk": "all"}),
        PlanError,
        ("'a.h5' is h5", "'b.h5' is h5_weights", "one kind"),
    ),
    "weights only, shapes": (
        lambda f: ([weights_only(f / "a.weights.h5"), weights_only(f / "b.weights.h5", units=5)], {"trunk": "all"}),
        LayoutError,
        ("layers/dense/vars/0", "(4, 3) in 'a'", "(4, 5) in 'b'", "leave 'b' out"),
    ),
    "weights only, keys": (
        lambda f: (
            [weights_only(f / "a.weights.h5"), unlike(f / "b.weights.h5", "layers/dense_1/vars/1")],
            {"trunk": "all"},
        ),
        LayoutError,
        ("'layers/dense_1/vars/1' is in 'a' but not in 'b'", "Leave one out"),
    ),
    "weights only, suffix": (
        bare(("a.weights.h5", "b.weights.h5"), trunk="all"),
        OutputError,
        ("only as .weights.h5", "'out.h5'", "--base FILE"),
    ),
    "weights only, as keras": (
        lambda f: bare(("a.h5", "b.h5"), trunk="all", method="mean", output=f / "out.keras")(f),
        OutputError,
        ("only be merged into .h5", "'out.keras'"),
    ),
    "subclassed as h5": (
        lambda f: ([subclassed(f / "a.keras"), subclassed(f / "b.keras", 2)], {"trunk": "all", "output": f / "out.h5"}),
        OutputError,
        (".keras", "out.h5"),
    ),
    "base missing": (flags(base="base.h5"), FormatError, ("base.h5", "does not exist")),
    "base number": (flags(base=5), PlanError, ("int", "path")),
    "base without graph": (
        lambda f: (bare(("a.h5", "b.h5"))(f)[0], {"base": weights_only(f / "base.h5")}),
        FormatError,
        ("'base.h5' holds no graph either", "whole model"),
    ),
    "base of another layout": (
        lambda f: (bare(("a.weights.h5", "b.weights.h5"))(f)[0], {"base": good(f, "base.h5")}),
        FormatError,
        ("'a.weights.h5'", ".keras", "'base.h5'"),
    ),
    "base of another layout, old": (
        lambda f: (bare(("a.h5", "b.h5"))(f)[0], {"base": good(f, "base.keras")}),
        FormatError,
        ("'a.h5'", ".h5 format", "'base.keras'"),
    ),
    "base of another shape": (
        lambda f: (
            bare(("a.h5", "b.h5"))(f)[0],
            {"base": good(f, "base.h5", 3, lambda net: chain(net, 5))},
        ),
        FormatError,
        ("'a.h5' does not fit 'base.h5'", "'dense'", "kernel", "(4, 3)", "expected (4, 5)"),
    ),
    "base of another depth": (
        lambda f: (bare(("a.h5", "b.h5"))(f)[0], {"base": good(f, "base.h5", 3, deep(4))}),
        FormatError,
        ("'a.h5'", "'dense_2'"),
    ),
    "base too short": (
        lambda f: (
            bare(("a.h5", "b.h5"))(f)[0],
            {"base": good(f, "base.h5", 3, lambda net: net.dense(net.input(4), 3))},
        ),
        FormatError,
        ("'a.h5' stores weights for 2 layers, but the network has 1", "another network's"),
    ),
    "base too short, keras": (
        lambda f: (
            bare(("a.weights.h5", "b.weights.h5"))(f)[0],
            {"base": good(f, "base.keras", 3, lambda net: net.dense(net.input(4), 3))},
        ),
        FormatError,
        ("'a.weights.h5' does not fit 'base.keras'", "2 weights more"),
    ),
    "base without bias": (
        lambda f: (
            bare(("a.h5", "b.h5"))(f)[0],
            {
                "base": good(
                    f,
                    "base.h5",
                    3,
                    lambda net: net.dense(net.dense(net.input(4), 3, use_bias=False, weights={"kernel": (4, 3)}), 2),
                )
            },
        ),
        FormatError,
        ("'a.h5' does not fit 'base.h5'", "'dense'", "2 weights", "expected 1"),
    ),
}

# Flags.
ROWS |= {
    "labels too few": (flags(labels=["x"]), PlanError, ("1 labels for 2 sources",)),
    "labels too many": (flags(labels=["x", "y", "z"]), PlanError, ("3 labels for 2 sources",)),
    "labels none": (flags(labels=[]), PlanError, ("0 labels for 2 sources",)),
    "labels twice": (flags(labels=["x", "x"]), PlanError, ("Two sources are called 'x'", "--labels")),
    "labels empty": (flags(labels=["x", ""]), PlanError, ("'' is no label", "--labels")),
    "labels blank": (flags(labels=["x", "  "]), PlanError, ("'  ' is no label",)),
    "labels control": (flags(labels=["x", "y\n"]), PlanError, (r"'y\n' is no label",)),
    "labels invisible": (flags(labels=["x", "y\u200b"]), PlanError, (r"'y\u200b' is no label",)),
    "labels text": (flags(labels="xy"), PlanError, ("labels is one text, 'xy'", "give a list")),
    "labels numbers": (flags(labels=[1, 2]), PlanError, ("1 is no label",)),
    "labels of outputs": (
        nets(heads(2, 2, named="ab"), chain, labels=["x", "x_a"], trunk="none"),
        PlanError,
        ("Two outputs would be called 'x_a'", "--labels"),
    ),
    "trunk unknown": (
        flags(trunk="nonsense"),
        PlanError,
        ("--trunk", "'a' has no layer 'nonsense'", "'dense_1'", "auto"),
    ),
    "trunk of another source": (
        nets(chain, lambda net: net.dense(net.dense(net.input(4), 3, name="other"), 2), trunk="other"),
        PlanError,
        ("'a' has no layer 'other'",),
    ),
    "trunk none": (flags(trunk=None), PlanError, ("--trunk",)),
    "trunk empty": (flags(trunk=""), PlanError, ("--trunk",)),
    "share nothing": (flags(share=["x*"]), PlanError, ("--share x*", "no layer of 'a'", "'dense'")),
    "private nothing": (flags(private=["x*"]), PlanError, ("--private x*", "no layer of 'a'", "'dense'")),
    "share of another source": (
        nets(chain, lambda net: net.dense(net.dense(net.input(4), 3, name="other"), 2), share=["other"]),
        PlanError,
        ("--share other", "Names are those of the first source; another has 'other'"),
    ),
    "share text": (flags(share="dense"), PlanError, ("share is one text, 'dense'", "give a list")),
    "private text": (flags(private="dense"), PlanError, ("private is one text, 'dense'", "give a list")),
    "share number": (flags(share=[5]), PlanError, ("5",)),
    "share input": (flags(share=["input"]), PlanError, ("'input' is an input", "--inputs shared|separate")),
    "private input": (flags(private=["input"]), PlanError, ("'input' is an input", "--inputs shared|separate")),
    "roles and share": (flags(share=["dense"], roles=[("dense", "shared")]), PlanError, ("together with share",)),
    "roles unknown": (
        flags(roles=[("dense", "common")]),
        PlanError,
        ("'dense'", "'common'", "expected shared or private"),
    ),
    "inputs unknown": (flags(inputs="joint"), PlanError, ("inputs is 'joint'", "shared, separate")),
    "outputs unknown": (flags(outputs="dict"), PlanError, ("outputs is 'dict'", "heads, list, mean")),
    "method unknown": (flags(method="magic"), MethodError, ("no method 'magic'", "mean", "auto")),
    "option unknown": (
        flags(method="mean", option={"density": 1}),
        PlanError,
        ("method 'mean' has no option 'density'",),
    ),
    "pick unknown": (flags(method="pick", option={"label": "z"}), MethodError, ("no source is called 'z'", "a, b")),
    "pick number": (flags(method="pick", option={"label": 1}), MethodError, ("no source is called '1'", "a, b")),
    "weights too few": (flags(weights=[1]), MethodError, ("1 weights for 2 sources",)),
    "weights too many": (flags(weights=[1, 1, 1]), MethodError, ("3 weights for 2 sources",)),
    "weights negative": (flags(weights=[1, -1]), MethodError, ("1, -1", "at least 0")),
    "weights nan": (flags(weights=[1, math.nan]), MethodError, ("1, nan", "at least 0")),
    "weights infinite": (flags(weights=[1, math.inf]), MethodError, ("1, inf", "at least 0")),
    "weights zero": (flags(weights=[0, 0]), MethodError, ("0, 0", "not all 0")),
    "weights text": (flags(weights="ab"), MethodError, ("weights",)),
    "weights number": (flags(weights=1), MethodError, ("weights",)),
    "weights none": (flags(weights=[1, None]), MethodError, ("weights",)),
}

# Plans.
ROWS |= {
    "plan missing": (flags(plan="plan.json"), PlanError, ("no plan 'plan.json'", "--dry-run --json")),
    "plan text": (made(lambda f: {"plan": put(f / "p.json", b"hello")}), FormatError, ("p.json",)),
    "plan torn": (made(lambda f: {"plan": put(f / "p.json", b'{"format": ')}), PlanError, ("'p.json' is no plan",)),
    "plan list": (made(lambda f: {"plan": put(f / "p.json", b"[]")}), FormatError, ("p.json",)),
    "plan binary": (made(lambda f: {"plan": put(f / "p.json", b'{"a": "\xff"}')}), PlanError, ("'p.json' is no plan",)),
    "plan empty": (made(lambda f: {"plan": put(f / "p.json", b"")}), PlanError, ("'p.json' is no plan",)),
    "plan deep": (
        made(lambda f: {"plan": put(f / "p.json", b'{"a":' * 100_000)}),
        PlanError,
        ("'p.json' is no plan",),
    ),
    "plan number": (flags(plan=5), PlanError, ("plan",)),
    "plan object": (flags(plan={}), PlanError, ("no plan of kmerge", "--dry-run --json")),
    "plan of a model": (made(lambda f: {"plan": good(f, "c.h5")}), PlanError, ("'c.h5' holds no plan",)),
    "plan inside no object": (
        made(lambda f: {"plan": put(f / "p.json", b'{"plan": 5}')}),
        PlanError,
        ("'p.json' is no plan",),
    ),
    "plan and rules": (
        made(lambda f: {"plan": kmerge.combine([f / "a.h5", f / "b.h5"], dry_run=True).plan, "trunk": "all"}),
        PlanError,
        ("A plan is given together with other rules", "Leave the rules out"),
    ),
    "plan newer": (
        stored_plan(lambda p: p.update(format=99, kmerge="9.9")),
        PlanError,
        ("kmerge 9.9", "update kmerge"),
    ),
    "plan without format": (
        stored_plan(lambda p: p.pop("format") and None),
        PlanError,
        ("no plan of kmerge", "format"),
    ),
    "plan without layers": (stored_plan(lambda p: p.update(layers=5)), PlanError, ("no plan of kmerge",)),
    "plan layer number": (stored_plan(lambda p: p.update(layers=[5])), PlanError, ("no plan of kmerge",)),
    "plan unknown key": (stored_plan(lambda p: p["layers"][1].update(colour=1)), PlanError, ("no plan", "colour")),
    "plan unknown role": (
        stored_plan(lambda p: p["layers"][1].update(role="common")),
        PlanError,
        ("'dense'", "'common'", "expected shared or private"),
    ),
    "plan of three": (
        lambda f: (
            [good(f), good(f, "b.h5", 2)],
            {"plan": kmerge.combine([good(f, f"{label}.h5") for label in "cde"], method="mean", dry_run=True).plan},
        ),
        PlanError,
        ("The plan is for 3 sources: 2 given",),
    ),
    "plan labels twice": (
        stored_plan(lambda p: p["sources"][1].update(label="a")),
        PlanError,
        ("Two sources are called 'a'",),
    ),
    "plan label number": (stored_plan(lambda p: p["sources"][1].update(label=5)), PlanError, ("label is 5",)),
    "plan layer unknown": (
        stored_plan(lambda p: p["layers"][1].update(class_name="Conv1D")),
        PlanError,
        ("another network", "layer 2 is Conv1D in the plan but Dense in 'a.h5'"),
    ),
    "plan layer too many": (
        stored_plan(lambda p: p["layers"].append({**p["layers"][1], "name": "x"})),
        PlanError,
        ("another network", "layer 4 is Dense in the plan but nothing in 'a.h5'"),
    ),
    "plan layer of one source": (
        stored_plan(lambda p: p["layers"][1].update(layers=["dense"])),
        PlanError,
        ("'dense' in 1 sources, but has 2",),
    ),
    "plan layer of none": (
        stored_plan(lambda p: p["layers"][1].update(layers=[])),
        PlanError,
        ("'dense' in 0 sources, but has 2",),
    ),
    "plan input": (
        stored_plan(lambda p: p["layers"][0].update(role="private")),
        PlanError,
        ("shared inputs", "'input' the role private"),
    ),
    "plan method unknown": (stored_plan(lambda p: p.update(method="magic")), MethodError, ("no method 'magic'",)),
    "plan layer method": (
        stored_plan(lambda p: p["layers"][1].update(method="magic")),
        MethodError,
        ("no method 'magic'",),
    ),
    "plan layer without method": (
        stored_plan(lambda p: p["layers"][1].update(method="")),
        MethodError,
        ("no method ''", "mean"),
    ),
    "plan layer option": (
        stored_plan(lambda p: p["layers"][1].update(options={"density": 1})),
        PlanError,
        ("no option 'density'",),
    ),
    "plan outputs": (stored_plan(lambda p: p.update(outputs="dict")), PlanError, ("outputs is 'dict'",)),
    "plan weights too few": (stored_plan(lambda p: p.update(weights=[1.0])), MethodError, ("1 weights for 2 sources",)),
    "plan weights negative": (stored_plan(lambda p: p.update(weights=[-1.0, 2.0])), MethodError, ("-1, 2",)),
    "plan weights text": (stored_plan(lambda p: p.update(weights=["x", "y"])), PlanError, ("no plan of kmerge",)),
    "plan other network": (
        lambda f: (
            [good(f), good(f, "b.h5", 2, lambda net: chain(net, 7))],
            {"plan": kmerge.combine([good(f, "c.h5"), good(f, "d.h5", 2)], method="mean", dry_run=True).plan},
        ),
        LayoutError,
        ("'dense' (Dense)", "(4, 3) in 'c'", "(4, 7) in 'd'"),
    ),
    "plan shares inputs that differ": (
        lambda f: (
            [good(f), good(f, "b.h5", 2, shaped(7))],
            {"plan": kmerge.combine([good(f, "c.h5"), good(f, "d.h5", 2)], method="mean", dry_run=True).plan},
        ),
        LayoutError,
        ("(None, 4) in 'c'", "(None, 7) in 'd'"),
    ),
    "plan number of inputs": (
        lambda f: (
            [good(f), good(f, "b.h5", 2, inputs(2))],
            {
                "plan": kmerge.combine(
                    [good(f, "c.h5"), good(f, "d.h5", 2)], trunk="none", method="mean", dry_run=True
                ).plan
            },
        ),
        LayoutError,
        ("1 inputs", "2"),
    ),
    "plan mean of other heads": (
        lambda f: (
            [good(f), good(f, "b.h5", 2, lambda net: chain(net, classes=5))],
            {
                "plan": kmerge.combine(
                    [good(f, "c.h5"), good(f, "d.h5", 2)], outputs="mean", method="mean", dry_run=True
                ).plan
            },
        ),
        PlanError,
        ("(None, 2)", "(None, 5)"),
    ),
}

# Outputs.
ROWS |= {
    "output exists": (
        made(lambda f: {"output": put(f / "old.h5", OLD)}),
        OutputError,
        ("old.h5 exists already", "--force"),
    ),
    "output exists, keras": (
        lambda f: ([good(f, "a.keras"), good(f, "b.keras", 2)], {"output": put(f / "old.keras", OLD)}),
        OutputError,
        ("old.keras exists already", "--force"),
    ),
    "output folder": (
        made(lambda f: {"output": folder(f / "old.h5", {"x": b"x"}), "force": True}),
        OutputError,
        ("old.h5 is a folder",),
    ),
    "output folder not there": (made(lambda f: {"output": f / "no" / "x.h5"}), OutputError, ("no does not exist",)),
    "output in a file": (made(lambda f: {"output": f / "a.h5" / "x.h5"}), OutputError, ("is no folder",)),
    "output name": (flags(output="x\0.h5"), OutputError, ("no valid file name",)),
    "output long name": (made(lambda f: {"output": f / ("x" * 300 + ".h5")}), OutputError, ("name is too long",)),
    "output is a source": (
        made(lambda f: {"output": f / "a.h5", "force": True}),
        OutputError,
        ("a.h5' is one of the sources", "inputs are never changed", "-o"),
    ),
    "output is a source elsewhere": (
        made(lambda f: {"output": folder(f / "x") / ".." / "b.h5", "force": True}),
        OutputError,
        ("is one of the sources",),
    ),
    "output is a link to a source": (
        made(lambda f: {"output": link(f / "old.h5", f / "b.h5"), "force": True}),
        OutputError,
        ("is one of the sources",),
    ),
    "output is a source folder": (
        lambda f: ([unzipped(f / "a"), unzipped(f / "b", 2)], {"output": f / "b", "force": True}),
        OutputError,
        ("is one of the sources",),
    ),
    "output in a source folder": (
        lambda f: (
            [unzipped(f / "a"), unzipped(f / "b", 2)],
            {"output": f / "b" / "model.weights.h5", "force": True, "method": "mean"},
        ),
        OutputError,
        ("sources",),
    ),
    "output is a shard": (
        lambda f: (
            [shards(f / "a.weights.json"), shards(f / "b.weights.json", 2)],
            {"output": f / "b_0.weights.h5", "force": True, "trunk": "all", "method": "mean"},
        ),
        OutputError,
        ("sources",),
    ),
    "output is the base": (
        lambda f: (
            bare(("a.h5", "b.h5"))(f)[0],
            {"base": good(f, "base.h5"), "output": f / "base.h5", "force": True, "method": "mean"},
        ),
        OutputError,
        ("base.h5",),
    ),
    "output is the plan": (
        lambda f: (
            [good(f), good(f, "b.h5", 2)],
            {
                "plan": put(
                    f / "plan.json",
                    json.dumps(
                        kmerge.combine([f / "a.h5", f / "b.h5"], method="mean", dry_run=True).plan.to_dict()
                    ).encode(),
                ),
                "output": f / "plan.json",
                "force": True,
            },
        ),
        OutputError,
        ("plan.json",),
    ),
}


def unzipped(path: Path, seed: int = 1) -> Path:
    """A .keras as a folder."""
    with zipfile.ZipFile(good(path.parent, f"{path.name}.keras", seed)) as archive:
        archive.extractall(path)
    return path


def shards(path: Path, seed: int = 1) -> Path:
    """All weights in one shard."""
    shard = path.name.replace(".weights.json", "_0.weights.h5")
    weights_only(path.with_name(shard), seed)
    places = {f"/layers/{name}/vars": shard for name in ("dense", "dense_1")}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


# Sources that are no sources, or do not go together.
ROWS |= {
    "sources none": (lambda f: ([], {}), PlanError, ("at least two sources: 0 given",)),
    "sources one": (lambda f: ([good(f)], {}), PlanError, ("at least two sources: 1 given",)),
    "sources text": (lambda f: (str(good(f)), {}), PlanError, ("One source is given", "at least two")),
    "sources path": (lambda f: (good(f), {}), PlanError, ("One source is given", "at least two")),
    "sources number": (lambda f: (5, {}), PlanError, ("int",)),
    "sources nothing": (lambda f: (None, {}), PlanError, ("NoneType",)),
    "source number": (lambda f: ([good(f), 5], {}), PlanError, ("int", "expected a path or a Keras model")),
    "source number, named": (
        lambda f: ({"a": good(f), "b": 5}, {}),
        PlanError,
        ("'b' is a int", "expected a path or a Keras model"),
    ),
    "sources by number": (lambda f: ({1: good(f), 2: good(f, "b.h5")}, {}), PlanError, ("1 is no label",)),
    "class": (
        nets(
            chain,
            lambda net: net.dense(net.add("EinsumDense", net.input(4), weights={"kernel": (4, 3)}, shape=(None, 3)), 2),
        ),
        LayoutError,
        (
            "layer 2 'dense' (Dense) of 'a' has no counterpart in 'b'",
            "'einsum_dense' (EinsumDense) there",
            "--trunk LAYER",
        ),
    ),
    "shape": (
        hidden({"units": 3}, {"units": 5}),
        LayoutError,
        ("layer 2 'dense' (Dense)", "kernel is (4, 3) in 'a' but (4, 5) in 'b'", "--private dense", "leave 'b' out"),
    ),
    "activation": (
        hidden({"activation": "relu"}, {"activation": "tanh"}),
        LayoutError,
        ("layer 2 'dense' (Dense)", "activation is 'relu' in 'a' but 'tanh' in 'b'", "equal configuration"),
    ),
    "bias": (
        hidden({}, {"use_bias": False, "weights": {"kernel": (4, 3)}}),
        LayoutError,
        ("layer 2 'dense' (Dense)", "the number of its weights is 2 in 'a' but 1 in 'b'"),
    ),
    "dtype": (
        hidden({}, {"dtype": "mixed_float16"}),
        LayoutError,
        ("layer 2 'dense' (Dense)", "dtype is 'float32' in 'a' but 'mixed_float16' in 'b'"),
    ),
    "pooling": (
        nets(image(pool_size=[2, 2]), image(pool_size=[3, 3])),
        LayoutError,
        ("layer 3 'max_pooling2d' (MaxPooling2D)", "pool_size is (2, 2) in 'a' but (3, 3) in 'b'"),
    ),
    "strides": (
        nets(image(), image(conv_strides=[2, 2])),
        LayoutError,
        ("layer 2 'conv2d' (Conv2D)", "strides is (1, 1) in 'a' but (2, 2) in 'b'"),
    ),
    "padding": (
        nets(image(), image(conv_padding="valid")),
        LayoutError,
        ("layer 2 'conv2d' (Conv2D)", "padding is 'same' in 'a' but 'valid' in 'b'"),
    ),
    "dilation": (
        nets(image(conv_dilation_rate=[1, 1]), image(conv_dilation_rate=[2, 2])),
        LayoutError,
        ("dilation_rate is (1, 1) in 'a' but (2, 2) in 'b'",),
    ),
    "data format": (
        nets(image(conv_data_format="channels_last"), image(conv_data_format="channels_first")),
        LayoutError,
        ("data_format is 'channels_last' in 'a' but 'channels_first' in 'b'",),
    ),
    "pooling class": (
        nets(image(), image("AveragePooling2D")),
        LayoutError,
        (
            "'max_pooling2d' (MaxPooling2D) of 'a' has no counterpart in 'b'",
            "'average_pooling2d' (AveragePooling2D) there",
        ),
    ),
    "dropout": (
        nets(image("Dropout", rate=0.1), image("Dropout", rate=0.5), trunk="dropout"),
        LayoutError,
        ("layer 3 'dropout' (Dropout)", "rate is 0.1 in 'a' but 0.5 in 'b'"),
    ),
    "third source": (
        lambda f: ([good(f), good(f, "b.h5", 2), good(f, "c.h5", 3, lambda net: chain(net, 9))], {}),
        LayoutError,
        ("kernel is (4, 3) in 'a' but (4, 9) in 'c'", "leave 'c' out"),
    ),
    "longer trunk": (
        nets(deep(2), deep(3), trunk="all"),
        LayoutError,
        ("'dense_2' (Dense) of 'b' has no counterpart in 'a'", "--trunk LAYER", "leave 'b' out"),
    ),
    "more than everything": (
        nets(chain, lambda net: net.add("Softmax", chain(net)), trunk="all"),
        LayoutError,
        ("layer 4 'softmax' (Softmax) of 'b' has no counterpart in 'a'", "--trunk LAYER", "leave 'b' out"),
    ),
    "less than everything": (
        nets(lambda net: net.add("Softmax", chain(net)), chain, trunk="all"),
        LayoutError,
        ("layer 4 'softmax' (Softmax) of 'a' has no counterpart in 'b', which ends there", "leave 'b' out"),
    ),
    "shorter trunk": (
        nets(deep(3), deep(2)),
        LayoutError,
        ("'dense_2' (Dense) of 'a' has no counterpart in 'b', which has 'dense_2' (Dense) there", "leave 'b' out"),
    ),
    "input shape": (
        nets(shaped(4), shaped(7)),
        LayoutError,
        ("the input's shape is (None, 4) in 'a' but (None, 7) in 'b'", "--inputs separate", "leave 'b' out"),
    ),
    "input rank": (nets(shaped(4), shaped(5, 4)), LayoutError, ("(None, 4) in 'a' but (None, 5, 4) in 'b'",)),
    "input dtype": (
        nets(shaped(4), shaped(4, dtype="int32")),
        LayoutError,
        ("the input's dtype is 'float32' in 'a' but 'int32' in 'b'", "--inputs separate"),
    ),
    "number of inputs": (
        nets(inputs(1), inputs(2)),
        LayoutError,
        ("'a' has 1 inputs but 'b' has 2", "--inputs separate"),
    ),
    "keyword": (
        nets(told(), told(training=False)),
        LayoutError,
        ("layer 2 'simple_rnn' (SimpleRNN)", "training is not set in 'a' but False in 'b'", "called alike"),
    ),
    "number of calls": (
        nets(called(2), called(3)),
        LayoutError,
        ("layer 2 'again' (Dense)", "the number of its calls is 2 in 'a' but 3 in 'b'"),
    ),
    "learned state": (
        nets(normalised(0.0), normalised(1.0), trunk="all"),
        LayoutError,
        ("layer 2 'normalization' (Normalization)", "mean is 0.0 in 'a' but 1.0 in 'b'", "equal learned state"),
    ),
    "learned state shared": (
        nets(normalised(0.0), normalised(1.0), share=["normalization"]),
        LayoutError,
        ("layer 2 'normalization' (Normalization)", "mean is 0.0 in 'a' but 1.0 in 'b'", "--private normalization"),
    ),
    "quantised": (
        nets(quantised(1), quantised(2)),
        LayoutError,
        ("layer 2 'dense' (Dense)", "quantised", "--private dense", "--method pick"),
    ),
    "not a number": (
        nets(chain, filled(math.nan)),
        MergeError,
        ("layer 'dense'", "kernel of 'b'", "NaN or infinity", "Leave 'b' out", "--private dense"),
    ),
    "infinite": (nets(filled(math.inf), chain), MergeError, ("kernel of 'a'", "NaN or infinity", "Leave 'a' out")),
    "overflow": (
        nets(filled(3e38), filled(-3e38)),
        MergeError,
        ("layer 'dense'", "overflows float32", "--private dense"),
    ),
    "not a number, bare": (
        lambda f: (
            [weights_only(f / "a.weights.h5"), nan_weights(f / "b.weights.h5")],
            {"trunk": "all", "method": "mean", "output": f / "new.weights.h5"},
        ),
        MergeError,
        ("'b' holds values that are not finite",),
    ),
    "unrelated, bare": (
        lambda f: (
            [random_weights(f / f"{label}.weights.h5", seed) for seed, label in enumerate("ab")],
            {"trunk": "all", "output": f / "new.weights.h5"},
        ),
        UnrelatedError,
        ("do not share an ancestor", "cosine", "--base FILE", "--method mean", "--method pick"),
    ),
    "mean of one and two outputs": (
        nets(chain, heads(2, 2), outputs="mean"),
        PlanError,
        ("--outputs mean", "'a' has 1 outputs but 'b' has 2", "--outputs heads"),
    ),
    "mean of other classes": (
        nets(chain, lambda net: chain(net, classes=5), outputs="mean"),
        PlanError,
        ("--outputs mean", "(None, 2) in 'a'", "(None, 5) in 'b'", "--outputs heads"),
    ),
    "mean of a broadcast": (
        nets(chain, lambda net: chain(net, classes=1), outputs="mean"),
        PlanError,
        ("(None, 2) in 'a'", "(None, 1) in 'b'"),
    ),
    "mean of the second output": (
        nets(heads(2, 3), heads(2, 4), outputs="mean"),
        PlanError,
        ("(None, 3) in 'a'", "(None, 4) in 'b'"),
    ),
    "mean of other ranks": (
        nets(
            chain,
            lambda net: net.dense(
                net.add("Reshape", net.dense(net.input(4), 3), shape=(None, 3, 1), target_shape=[3, 1]), 2
            ),
            outputs="mean",
            trunk="none",
        ),
        PlanError,
        ("(None, 2) in 'a'", "(None, 3, 2) in 'b'"),
    ),
    "mean of other names": (
        nets(heads(2, 2, named="xy"), heads(2, 2, named="yz"), outputs="mean"),
        PlanError,
        ("--outputs mean", "'x', 'y'", "'y', 'z'"),
    ),
}


def unlike(path: Path, gone: str) -> Path:
    """Weights that lack one."""
    weights_only(path, 2)
    with h5py.File(path, "r+") as file:
        del file[gone]
    return path


def nan_weights(path: Path) -> Path:
    weights_only(path, 2)
    with h5py.File(path, "r+") as file:
        file["layers/dense/vars/0"][1] = np.nan
    return path


# ---- what every row is held against


def contents(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Everything under a folder: bytes and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, error, words = ROWS[name]
    work, scratch = folder(tmp_path / "work"), folder(tmp_path / "scratch")
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    sources, arguments = make(work)
    output = work / ("out.keras" if list(work.glob("*.keras")) else "out.h5")

    def check() -> None:
        before = contents(work)
        with pytest.raises(error) as caught:
            kmerge.combine(sources, **{"output": output, **arguments})
        assert type(caught.value) is error or error is FormatError  # some of those are of the unsafe kind
        message = str(caught.value)
        for fragment in words:
            assert fragment in message
        assert message == message.strip()
        assert all(line.isprintable() for line in message.split("\n"))
        assert len(message) < 900
        assert contents(work) == before
        assert not list(scratch.iterdir())

    check()
    if "output" not in arguments:  # an older result stays, too
        put(output, OLD)
        arguments = {**arguments, "force": True}
        check()


def test_rows_are_all_there() -> None:
    """Every exception of the tree has a row; the base is never raised itself."""
    assert {error for _, error, _ in ROWS.values()} == {
        *(FormatError, UnsafeFileError, GraphError, LayoutError, PlanError),
        *(MethodError, UnrelatedError, MergeError, OutputError),
    }


# ---- damage by chance

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1.5,
    math.nan,
    "",
    "dense",
    "x/../y",
    [],
    [[]],
    [1, "a"],
    {},
    {"a": 1},
)


def outcome(path: Path) -> str:
    """What a merge of a file with itself comes to; anything but success or a KmergeError escapes."""
    started = time.process_time()
    target = path.with_name(f"out{path.suffix}")
    try:
        kmerge.combine({"a": path, "b": path}, target, trunk="none", force=True)
    except KmergeError as error:
        return type(error).__name__ if str(error) else "an error without a message"
    finally:
        assert time.process_time() - started < 20  # a loop would never end, a bomb takes minutes
        assert {item.name for item in path.parent.iterdir()} <= {path.name, target.name}
    return "merged"


@pytest.mark.parametrize("name", ["cnn_a.h5", "cnn_a.keras"])
def test_damaged_bytes(name: str, tmp_path: Path) -> None:
    """Bytes changed or cut off anywhere; more often in the first and last tenth, where files keep their structure."""
    content = (FIXTURES / name).read_bytes()
    path, random = tmp_path / name, Random(0)
    outcomes = set()
    for round_number in range(150):
        damaged = bytearray(content)
        if round_number % 5 == 0:
            del damaged[random.randrange(len(damaged)) :]
        else:
            for _ in range(random.choice((1, 1, 4, 16))):
                place = random.choice((random.random(), random.random() / 10, 1 - random.random() / 10))
                damaged[int(place * (len(damaged) - 1))] = random.choice((0, 255, random.randrange(256)))
        outcomes.add(outcome(put(path, bytes(damaged))))
    assert {"merged", "FormatError"} <= outcomes


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every entry inside a JSON value: what holds it, and where."""
    if isinstance(value, dict):
        entries: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        return []
    return [place for key, item in entries for place in ((value, key), *places(item))]


def nest(net: Net) -> Any:
    inner = Net()
    made = inner.batch_normalization(inner.dense(inner.input(3), 3))
    return net.dense(net.model(inner, made, net.dense(net.input(4), 3)), 2)


@pytest.mark.parametrize(
    "name",
    ["cnn_a.keras", "mlp_a.h5", "nest.keras", "nest.h5", "k122_nested_bn.h5", "k224_shared.h5", "tfk215_nested_bn.h5"],
)
def test_damaged_configurations(name: str, tmp_path: Path) -> None:
    """Values of a configuration changed, taken out or repeated anywhere."""
    path, random = tmp_path / name, Random(name)
    if name.startswith("nest"):
        good(tmp_path, name, 1, nest)
    else:
        put(path, next(place / name for place in (FIXTURES, FILES) if (place / name).exists()).read_bytes())
    content, outcomes = path.read_bytes(), set()
    for _ in range(50):
        path.write_bytes(content)
        reconfigure(path, lambda model: mutated(model, random))
        outcomes.add(outcome(path))
    assert outcomes > {"merged", "GraphError"}
    assert outcomes <= {"merged", "GraphError", "FormatError", "PlanError", "LayoutError"}


def mutated(model: Any, random: Random) -> Any:
    for _ in range(random.choice((1, 1, 2))):
        holder, key = random.choice(places(model) or [({}, None)])
        kind = random.randrange(4)
        if kind == 0 and (isinstance(holder, list) or key in holder):
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(random.choice([*VALUES, *holder]))
        else:
            holder[key] = random.choice(VALUES)
    return model
