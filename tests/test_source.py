"""Anything is opened by its content: a graph, and tensors that are not read until they are wanted."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zoo
from test_matching import Net, Tensor

import kmerge
from kmerge.dialects.reading import Dialect, input_shape
from kmerge.dialects.vocabulary import WeightKind, weight_specs
from kmerge.errors import FormatError
from kmerge.source import Source, open_source, stem
from kmerge.store import Kind

FILES = Path(__file__).resolve().parent / "files"
FIXTURES = FILES.parent.parent / "fixtures"


@pytest.fixture
def opened() -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(open_source(*args, **kwargs))


def arrays(source: Source, layer: str) -> list[np.ndarray]:
    assert source.graph
    return [weight.tensor.read() for weight in source.states[source.graph.layer_named(layer)].weights]


def facts(source: Source) -> dict[str, list[tuple[str, tuple[int, ...], str]]]:
    """Name, shape and kind of each weight, by layer."""
    assert source.graph
    return {
        layer.name: [(weight.name, weight.tensor.shape, weight.kind.value) for weight in state.weights]
        for layer, state in zip(source.graph.layers, source.states, strict=True)
    }


def unzipped(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def mlp_weights(path: Path, units: int = 32) -> Path:
    """Weights for the network of `mlp_a`: Keras 3's layout under `.weights.h5`, else the old one."""
    net = Net(5)
    net.dense(net.dense(net.dense(net.input(64), units), 32), 5)
    del net.layers["input"]
    if path.name.endswith(".weights.h5"):
        path.write_bytes(net.numbered())
        return path
    with h5py.File(path, "w") as file:
        net.write_weights(file)
    return path


def mlp_shards(path: Path) -> Path:
    """The same, a shard per layer."""
    whole = mlp_weights(path.with_name("whole.weights.h5"))
    places = {}
    with h5py.File(whole) as file:
        for number, name in enumerate(file["layers"]):
            shard = path.with_name(f"shard_{number}.weights.h5")
            with h5py.File(shard, "w") as part:
                file.copy(f"layers/{name}", part.create_group("layers"))
            places[f"/layers/{name}/vars"] = shard.name
    whole.unlink()
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


# ---- kinds


def test_kinds(opened: Any, tmp_path: Path) -> None:
    folder = unzipped(FIXTURES / "mlp_a.keras", tmp_path / "folder")
    found = {
        Kind.H5: FIXTURES / "mlp_a.h5",
        Kind.KERAS: FIXTURES / "mlp_a.keras",
        Kind.FOLDER: folder,
        Kind.WEIGHTS: mlp_weights(tmp_path / "a.weights.h5"),
        Kind.H5_WEIGHTS: mlp_weights(tmp_path / "a.h5"),
        Kind.SHARDS: mlp_shards(tmp_path / "a.weights.json"),
    }
    for kind, path in found.items():
        source = opened(path)
        assert source.kind is kind
        assert source.path == path
        assert source.name == path.name
        assert source.num_parameters == 3301
        assert (source.graph is None) == (kind in (Kind.WEIGHTS, Kind.H5_WEIGHTS, Kind.SHARDS))
        assert source.size >= 3301 * 4
    assert set(found) == set(Kind)


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5", ".weights.h5", ".weights.json", ".bin", ""])
def test_content_not_suffix(suffix: str, opened: Any, tmp_path: Path) -> None:
    for name, kind in (("mlp_a.h5", Kind.H5), ("mlp_a.keras", Kind.KERAS)):
        path = tmp_path / f"model{suffix}"
        shutil.copy(FIXTURES / name, path)
        source = opened(path)
        assert source.kind is kind
        assert source.label == ("model.bin" if suffix == ".bin" else "model")
        assert facts(source) == facts(opened(FIXTURES / name))


def test_a_merge_of_files_with_each_others_suffix(tmp_path: Path) -> None:
    """Neither engine nor plan goes by the name."""
    for letter in "ab":
        shutil.copy(FIXTURES / f"finetuned_{letter}.h5", tmp_path / f"{letter}.keras")
    kmerge.combine([tmp_path / "a.keras", tmp_path / "b.keras"], tmp_path / "out.h5")
    with open_source(tmp_path / "out.h5") as merged:
        assert merged.kind is Kind.H5


def test_labels() -> None:
    for name in ("m.h5", "m.hdf5", "m.keras", "m.weights.h5", "m.weights.json", "m", "folder/m.keras"):
        assert stem(name) == "m"
    assert stem("m.v2.h5") == "m.v2"
    assert stem(".keras") == ".keras"


def test_what_the_file_says_of_itself(opened: Any) -> None:
    new, old, first = (
        opened(path) for path in (FIXTURES / "mlp_a.keras", FIXTURES / "mlp_a.h5", FILES / "k122_lstm.h5")
    )
    assert [source.version for source in (new, old, first)] == ["3.15.1", "3.15.1", "1.2.2"]
    assert (old.backend, new.backend) == ("tensorflow", "")
    assert [source.dialect for source in (new, old, first)] == [Dialect.KERAS3, Dialect.KERAS3_H5, Dialect.KERAS2]
    assert new.model["class_name"] == old.model["class_name"] == "Sequential"
    assert new.warnings == old.warnings == first.warnings == ()


def test_training_is_kept(opened: Any, tmp_path: Path) -> None:
    old = opened(FILES / "k224_shared.h5")
    assert old.training["loss"]
    assert old.training["optimizer_config"]
    assert opened(FIXTURES / "mlp_a.h5").training is None
    with zipfile.ZipFile(FIXTURES / "mlp_a.keras") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    compiled = {**json.loads(content["config.json"]), "compile_config": {"loss": "mse"}}
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name, data in {**content, "config.json": json.dumps(compiled)}.items():
            archive.writestr(name, data)
    assert opened(tmp_path / "m.keras").training == {"loss": "mse"}


def test_closing(tmp_path: Path) -> None:
    with open_source(FIXTURES / "mlp_a.h5") as source:
        tensor = source.states[1].weights[0].tensor
        tensor.read()
    with pytest.raises((FormatError, OSError, ValueError)):
        tensor.read()


# ---- laziness


@pytest.mark.parametrize("name", ["cnn_a.h5", "cnn_a.keras"])
def test_nothing_is_read_before_it_is_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, planning and looking read no tensor."""
    with open_source(FIXTURES / name) as source:
        kinds = {type(weight.tensor) for state in source.states for weight in state.weights}

    def refuse(*args: Any) -> None:
        raise AssertionError("a weight was read")

    for kind in kinds:
        monkeypatch.setattr(kind, "read_into", refuse)
    with open_source(FIXTURES / name) as source:
        assert source.num_parameters > 1000
        with pytest.raises(AssertionError, match="a weight was read"):
            source.states[1].weights[0].tensor.read()
    paths = [FIXTURES / name, FIXTURES / name.replace("_a", "_b")]
    kmerge.inspect(paths[0]).to_dict()
    assert kmerge.combine(paths, dry_run=True, method="mean").plan.layers


# ---- layers and their weights


def test_weights_by_layer(opened: Any) -> None:
    expected = {
        "input_layer": [],
        "conv2d": [("kernel", (3, 3, 1, 8), "weight"), ("bias", (8,), "weight")],
        "batch_normalization": [
            ("gamma", (8,), "weight"),
            ("beta", (8,), "weight"),
            ("moving_mean", (8,), "mean"),
            ("moving_variance", (8,), "variance"),
        ],
        "max_pooling2d": [],
        "dense": [("kernel", (12, 5), "weight"), ("bias", (5,), "weight")],
    }
    for suffix in (".h5", ".keras"):
        found = facts(opened(FIXTURES / f"cnn_a{suffix}"))
        assert {name: found[name] for name in expected} == expected


def test_both_formats_hold_the_same(opened: Any) -> None:
    for name in ("mlp_b", "cnn_b", "lstm_b"):
        old, new = (opened(FIXTURES / f"{name}{suffix}") for suffix in (".h5", ".keras"))
        assert [layer.name for layer in old.graph.layers if not layer.is_input] == [
            layer.name for layer in new.graph.layers if not layer.is_input
        ]
        for one, two in zip(old.states, new.states, strict=True):
            for first, second in zip(one.weights, two.weights, strict=True):
                assert np.array_equal(first.tensor.read(), second.tensor.read())
                assert (first.name, first.kind) == (second.name, second.kind)


def test_values_are_those_of_the_file(opened: Any) -> None:
    with h5py.File(FIXTURES / "mlp_c.h5") as file:
        group = file["model_weights/dense_10/sequential_3/dense_10"]
        kernel, bias = group["kernel"][()], group["bias"][()]
    found = arrays(opened(FIXTURES / "mlp_c.h5"), "dense_10")
    assert np.array_equal(found[0], kernel)
    assert np.array_equal(found[1], bias)


def test_keras_1_arrays_are_passed_on(opened: Any) -> None:
    """An LSTM of twelve arrays."""
    source = opened(FILES / "k122_lstm.h5")
    counts = {
        layer.class_name: len(state.weights) for layer, state in zip(source.graph.layers, source.states, strict=True)
    }
    assert counts["LSTM"] == 12


@pytest.mark.parametrize("name", ["k122_nested_bn.h5", "tfk215_nested_bn.h5"])
def test_weights_of_a_nested_model_are_split(name: str, opened: Any) -> None:
    """Old files list them together, statistics of BatchNormalization at the end."""
    source = opened(FILES / name)
    inner = [
        (layer.class_name, [weight.name for weight in state.weights])
        for layer, state in zip(source.graph.layers, source.states, strict=True)
        if layer.origin
    ]
    assert inner == [
        ("Dense", ["kernel", "bias"]),
        ("BatchNormalization", ["gamma", "beta", "moving_mean", "moving_variance"]),
        ("Dense", ["kernel", "bias"]),
    ]
    kinds = [
        weight.kind for layer, state in zip(source.graph.layers, source.states, strict=True) for weight in state.weights
    ]
    assert kinds.count(WeightKind.MEAN) == kinds.count(WeightKind.VARIANCE) == 1


def nested(trainable: bool = True) -> tuple[Net, Tensor]:
    """A model inside with two normalisations, of which the first may be frozen."""
    inner, net = Net(1), Net(2)
    x = inner.batch_normalization(inner.dense(inner.input(4), 4), trainable=trainable)
    x = inner.batch_normalization(inner.dense(x, 4))
    return net, net.dense(net.model(inner, x, net.input(4), name="inside"), 2)


@pytest.mark.parametrize("trainable", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "by order"])
def test_a_frozen_layer_inside(trainable: bool, named: bool, opened: Any, tmp_path: Path) -> None:
    """All weights of a frozen layer stand among those that are not trained; without names their order tells."""
    net, outputs = nested(trainable)
    path = net.save(tmp_path / "m.h5", outputs)
    if not named:
        with h5py.File(path, "r+") as file:
            group = file["model_weights/inside"]
            old = list(group.attrs["weight_names"])
            for number, name in enumerate(old):
                group.move(name, f"w/{number}")
            group.attrs["weight_names"] = [f"w/{number}" for number in range(len(old))]
    source, inner = opened(path), net.models["inside"]
    for layer in ("dense", "batch_normalization", "dense_1", "batch_normalization_1"):
        name = next(item.name for item in source.graph.layers if item.origin and item.name.endswith(layer))
        for found, (_, expected) in zip(arrays(source, name), inner.weights[layer], strict=True):
            assert np.array_equal(found, expected)
        kinds = [weight.kind for weight in source.states[source.graph.layer_named(name)].weights]
        assert (WeightKind.VARIANCE in kinds) == layer.startswith("batch")


def test_a_nested_model_that_cannot_be_split_says_so(tmp_path: Path) -> None:
    net, outputs = nested()
    path = net.save(tmp_path / "m.h5", outputs)
    with h5py.File(path, "r+") as file:
        group = file["model_weights/inside"]
        group["w/0"] = np.zeros(3)
        group.attrs["weight_names"] = ["w/0"]
    with pytest.raises(FormatError, match=r"nested model 'inside' in one list.*save it as .keras"):
        open_source(path)


def test_nested_models_in_both_formats(opened: Any, tmp_path: Path) -> None:
    sources = [opened(nested()[0].save(tmp_path / f"m{suffix}", nested()[1])) for suffix in (".h5", ".keras")]
    assert facts(sources[0]) == facts(sources[1])
    assert {layer.origin for layer in sources[0].graph.layers} == {(), ("inside",)}


# ---- shapes of inputs


def test_a_recorded_shape(opened: Any) -> None:
    for path, shape in ((FIXTURES / "cnn_a.keras", (None, 8, 8, 1)), (FILES / "k122_lstm.h5", (None, 5, 4))):
        (layer,) = [layer for layer in opened(path).graph.layers if layer.is_input]
        assert input_shape(layer) == shape


def test_a_shape_that_only_the_kernel_tells(opened: Any) -> None:
    (layer,) = [layer for layer in opened(FILES / "k224_seq_inputlayer.h5").graph.layers if layer.is_input]
    assert input_shape(layer) == (None, 8)


KERNELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], tuple[int | None, ...]]] = {
    "dense": ("Dense", (4, 2), {}, (None, 4)),
    "convolution": ("Conv2D", (3, 3, 5, 2), {}, (None, None, None, 5)),
    "channels first": ("Conv2D", (3, 3, 5, 2), {"data_format": "channels_first"}, (None, 5, None, None)),
    "groups": ("Conv1D", (3, 5, 2), {"groups": 2}, (None, None, 10)),
    "depthwise": ("DepthwiseConv2D", (3, 3, 5, 2), {}, (None, None, None, 5)),
    "recurrent": ("LSTM", (4, 12), {}, (None, None, 4)),
    "embedding": ("Embedding", (9, 3), {}, (None, None)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_shape_follows_from_the_first_kernel(name: str, opened: Any, tmp_path: Path) -> None:
    class_name, kernel, config, expected = KERNELS[name]
    net = Net()
    names = {"LSTM": ("kernel", "recurrent_kernel")}.get(class_name, ("kernel",))
    weights = dict.fromkeys(names, kernel)
    outputs = net.add(class_name, net.input(1), weights=weights, use_bias=False, **config)
    net.layers["input"]["config"]["batch_shape"] = None
    (layer,) = [layer for layer in opened(net.save(tmp_path / "m.h5", outputs)).graph.layers if layer.is_input]
    assert input_shape(layer) == expected


# ---- weights only, and a base that gives the graph


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (lambda folder: mlp_weights(folder / "a.weights.h5"), "mlp_a.keras"),
        (lambda folder: mlp_shards(folder / "a.weights.json"), "mlp_a.keras"),
        (lambda folder: mlp_weights(folder / "a.h5"), "mlp_a.h5"),
    ],
    ids=["weights", "shards", "old"],
)
def test_a_base_gives_the_graph(make: Any, base: str, opened: Any, tmp_path: Path) -> None:
    ground = opened(FIXTURES / base)
    bare = opened(make(tmp_path))
    assert bare.graph is None
    assert bare.warnings == ("weights only: the file holds no graph",)
    source = opened(make(folder(tmp_path / "again")), base=ground)
    assert source.graph == ground.graph
    assert facts(source) == facts(ground)
    assert source.kind is ground.kind
    assert source.warnings == (f"weights only: the graph is that of '{base}'",)
    net = Net(5)
    net.dense(net.dense(net.dense(net.input(64), 32), 32), 5)
    for layer in ("dense", "dense_1", "dense_2"):
        for found, (_, expected) in zip(arrays(source, layer), net.weights[layer], strict=True):
            assert np.array_equal(found, expected)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_an_old_base_of_other_names(opened: Any, tmp_path: Path) -> None:
    """Layers with weights are taken in order, as Keras takes them."""
    source = opened(mlp_weights(tmp_path / "a.h5"), base=opened(FIXTURES / "mlp_c.h5".replace("_c", "_a")))
    renamed = tmp_path / "renamed.h5"
    with h5py.File(mlp_weights(tmp_path / "b.h5")) as old, h5py.File(renamed, "w") as new:
        for number, name in enumerate(old.attrs["layer_names"]):
            old.copy(old[name], new, f"other_{number}")
        new.attrs["layer_names"] = [f"other_{number}" for number in range(len(old.attrs["layer_names"]))]
    again = opened(renamed, base=opened(FIXTURES / "mlp_a.h5"))
    assert facts(again) == facts(source)
    assert np.array_equal(arrays(again, "dense_1")[0], arrays(source, "dense_1")[0])


def test_a_base_that_does_not_fit(opened: Any, tmp_path: Path) -> None:
    wide = mlp_weights(tmp_path / "a.weights.h5", units=31)
    with pytest.raises(FormatError, match=r"'dense' has kernel of shape \(64, 31\), expected \(64, 32\)"):
        open_source(wide, base=opened(FIXTURES / "mlp_a.keras"))
    with pytest.raises(FormatError, match=r"like a .keras file and the base 'mlp_a.h5' is not"):
        open_source(wide, base=opened(FIXTURES / "mlp_a.h5"))
    with pytest.raises(FormatError, match=r"no weights for layer 'conv2d'"):
        open_source(wide, base=opened(FIXTURES / "cnn_a.keras"))
    with pytest.raises(FormatError, match=r"'b.h5' holds no graph either"):
        open_source(wide, base=opened(mlp_weights(tmp_path / "b.h5")))


def test_a_base_is_not_asked_where_there_is_a_graph(opened: Any) -> None:
    base = opened(FIXTURES / "cnn_a.h5")
    assert opened(FIXTURES / "mlp_a.h5", base=base).graph == opened(FIXTURES / "mlp_a.h5").graph


def test_files_with_weights_only_merge_through_a_base(tmp_path: Path) -> None:
    paths = [mlp_weights(folder(tmp_path / name) / f"{name}.weights.h5") for name in "ab"]
    report = kmerge.combine(paths, tmp_path / "out.keras", base=FIXTURES / "mlp_a.keras", method="mean")
    assert [layer.role for layer in report.plan.layers] == ["shared", "shared", "shared", "private"]
    with open_source(tmp_path / "out.keras") as merged:
        assert merged.graph


# ---- against Keras itself

# Keras folds LoRA into the kernel when it saves, writes the kernel under SpectralNormalization twice, and keeps the
# weights of TF-IDF beside the variables.
CASES = [
    name for name, case in zoo.CASES.items() if case.keras and not re.search("lora|spectral|tf_idf|^subclassed", name)
]


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_keras_lists(name: str, opened: Any, tmp_path: Path) -> None:
    """Layer by layer: how many, their shapes, their values in Keras's order."""
    case = zoo.CASES[name]
    model = case.build(1)
    source = opened(zoo.save(model, tmp_path / "m.keras"))
    found = {
        layer.name: [weight for weight in state.weights if "seed_generator" not in weight.key]
        for layer, state in zip(source.graph.layers, source.states, strict=True)
        if not layer.origin
    }
    for layer in model.layers:
        weights = [weight for weight in layer.variables if "seed_generator" not in weight.path]
        if layer.name not in found:
            assert hasattr(layer, "layers")
            continue
        mine = found[layer.name]
        assert sorted(weight.tensor.shape for weight in mine) == sorted(tuple(weight.shape) for weight in weights)
        total = sum(float(np.abs(np.asarray(weight, dtype="float64")).sum()) for weight in weights)
        stored = sum(float(np.abs(weight.tensor.read().astype("float64")).sum()) for weight in mine)
        assert np.isclose(total, stored, equal_nan=True)
        known = weight_specs(type(layer).__name__, layer.get_config())
        if known and len(known) == len(weights):
            assert [weight.name for weight in mine] == [weight.name for weight in weights]
            for stored_one, weight in zip(mine, weights, strict=True):
                assert np.array_equal(stored_one.tensor.read(), np.asarray(weight))
        moving = [weight.name for weight in weights if weight.name in ("moving_mean", "moving_variance")]
        kinds = [weight.kind for weight in mine if weight.kind in (WeightKind.MEAN, WeightKind.VARIANCE)]
        assert len(moving) == len(kinds)
    assert source.num_parameters == sum(
        int(np.prod(weight.shape)) for weight in model.variables if "seed_generator" not in weight.path
    )


def test_keras_reads_what_the_tests_write(tmp_path: Path) -> None:
    """`Net` writes models as Keras does, so what these tests say of them holds for real ones."""
    net, outputs = nested(False)
    predictions = []
    for suffix in (".h5", ".keras"):
        model = zoo.load(net.save(tmp_path / f"m{suffix}", outputs))
        predictions.append(np.asarray(model(np.linspace(0, 1, 12, dtype="float32").reshape(3, 4))))
    assert predictions[0].shape == (3, 2)
    assert np.allclose(predictions[0], predictions[1], atol=1e-6)
