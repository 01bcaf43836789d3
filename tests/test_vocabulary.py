"""What kmerge knows of Keras's layer classes, against Keras itself."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo

from kmerge.dialects.vocabulary import (
    LEARNED_STATE,
    RANDOM,
    WeightKind,
    comparable,
    compute_dtype,
    difference,
    is_quantized,
    policy_name,
    stored_class,
    to_snake_case,
    weight_kind,
    weight_name,
    weight_specs,
)

# Weights beside those that a class always has: specs give the ones at the start.
MORE_THAN_THE_SPECS = {
    "dense_lora": "adapters, which are saved within the kernel",
    "embedding_lora": "adapters",
    "einsum_dense_lora": "adapters",
    "conv2d_lora": "adapters",
    "dense_int8": "a scale beside the kernel",
    "dense_float8": "scales and histories of the inputs",
    "embedding_int8": "a scale beside the embeddings",
    "einsum_dense_int8": "a scale beside the kernel",
}


def config_of(layer: Any) -> dict[str, Any]:
    """A layer's configuration as a file holds it."""
    import keras

    config: dict[str, Any] = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))["config"]
    return config


def owner_of(layer: Any) -> Any:
    """The object that holds a layer's own weights: recurrent layers keep them in their cell."""
    return layer.cell if type(layer).__name__ in ("SimpleRNN", "LSTM", "GRU") else layer


def own_variables(layer: Any) -> list[Any]:
    """In the order in which `Layer.save_own_variables` numbers them."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


@pytest.fixture(scope="module")
def built() -> Iterator[Any]:
    """`built(name)`: a model of the zoo; its values do not matter here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(zoo, "randomise", lambda model, seed: None)
    models: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in models:
            models[name] = zoo.CASES[name].build(0)
        return models[name]

    yield build
    patch.undo()


# ---- weight_specs


@pytest.mark.parametrize("name", zoo.LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_specs_are_what_keras_has(name: str, built: Any) -> None:
    for layer in zoo.all_layers(built(name)):
        specs = weight_specs(type(layer).__name__, config_of(layer))
        if specs is None:
            continue
        variables = own_variables(owner_of(layer))
        if name in MORE_THAN_THE_SPECS and len(variables) > len(specs):
            names = {variable.name for variable in variables}
            assert {spec.name for spec in specs} <= names
            continue
        assert [(spec.name, spec.trainable) for spec in specs] == [
            (variable.name, variable.trainable) for variable in variables
        ]


@pytest.mark.parametrize("name", zoo.LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_specs_are_in_the_order_in_which_keras_saves(name: str, built: Any) -> None:
    for layer in zoo.all_layers(built(name)):
        class_name = type(layer).__name__
        specs = weight_specs(class_name, config_of(layer))
        if not specs or class_name in LEARNED_STATE:
            continue
        stored: dict[str, Any] = {}
        owner = owner_of(layer)
        owner.save_own_variables(stored)
        if name not in MORE_THAN_THE_SPECS:
            assert list(stored) == [str(number) for number in range(len(specs))]
        by_name = {variable.name: variable for variable in own_variables(owner)}
        for number, spec in enumerate(specs):
            array = stored[str(number)]
            assert tuple(array.shape) == tuple(by_name[spec.name].shape), spec.name


def test_a_frozen_batch_normalization_keeps_its_order(built: Any) -> None:
    model = built("batch_normalization")
    layer = model.layers[1]
    config = config_of(layer)
    layer.trainable = False
    try:
        names = [variable.name for variable in own_variables(layer)]
        assert [spec.name for spec in weight_specs("BatchNormalization", config) or ()] == names
    finally:
        layer.trainable = True


@pytest.mark.filterwarnings("ignore")
def test_classes_known_to_have_no_weights_have_none(built: Any) -> None:
    seen: set[str] = set()
    for name in zoo.CASES:
        for layer in zoo.all_layers(built(name)):
            if weight_specs(type(layer).__name__, config_of(layer)) == ():
                seen.add(type(layer).__name__)
                assert own_variables(owner_of(layer)) == []
    assert {"Add", "Flatten", "Dropout", "MaxPooling2D", "ReLU"} <= seen


def test_classes_with_weights_are_known_or_have_sub_layers(built: Any) -> None:
    """What kmerge treats as opaque, so that a new class of Keras is looked at once."""
    unknown = {
        type(layer).__name__
        for name in zoo.LAYERS
        for layer in zoo.all_layers(built(name))
        if own_variables(layer) and weight_specs(type(layer).__name__, config_of(layer)) is None
    }
    assert unknown == {
        "AdditiveAttention",
        "Attention",
        "ConvLSTMCell",
        "ReversibleEmbedding",
        "STFTSpectrogram",
        "SpectralNormalization",
    }


def test_layers_with_a_seed_and_without_weights_are_random() -> None:
    import keras

    drawing = {
        name
        for name, value in vars(keras.layers).items()
        if inspect.isclass(value)
        and issubclass(value, keras.layers.Layer)
        and "seed" in inspect.signature(value.__init__).parameters
        and not any(word in name for word in ("Attention", "RNN", "LSTM", "GRU", "JaxLayer"))
    }
    assert drawing - RANDOM == set()


def test_an_unknown_class() -> None:
    assert weight_specs("Invented", {}) is None
    assert weight_specs("Dense", {"use_bias": False}) is not None
    assert weight_specs("Dense", {}) == weight_specs("Dense", {"use_bias": True})


# ---- weight_kind and weight_name


OPAQUE = {"custom_block": "nothing tells the classes of the layers inside a custom one"}
NETWORKS = ("Sequential", "Functional", "Trained", "Handwritten")  # dissolved, or without a configuration


@pytest.mark.parametrize("name", [name for name in (*zoo.LAYERS, *zoo.TOPOLOGIES) if name not in OPAQUE])
@pytest.mark.filterwarnings("ignore")
def test_kinds_are_found_wherever_keras_keeps_a_weight(name: str, built: Any, tmp_path: Path) -> None:
    """Statistics, seeds and counters in Keras's own file, below whatever wraps them."""
    for layer, stored in stored_layers(built(name), tmp_path / "m.weights.h5"):
        class_name, config = type(layer).__name__, config_of(layer)
        if class_name in NETWORKS:
            continue
        kinds = {key: weight_kind(class_name, config, key, dtype) for key, dtype in stored.items()}
        if class_name in LEARNED_STATE:
            assert set(kinds.values()) <= {WeightKind.LEARNED}
            continue
        names = [weight_name(class_name, config, key) for key in stored]
        wanted = [variable.name for variable in layer.variables]
        for ending, kind in (("moving_mean", WeightKind.MEAN), ("moving_variance", WeightKind.VARIANCE)):
            assert list(kinds.values()).count(kind) == wanted.count(ending)
            assert {own for own, found in zip(names, kinds.values(), strict=True) if found is kind} <= {ending}
        for key, dtype in stored.items():
            if "seed_generator" in key or "float" not in dtype:
                assert kinds[key] is WeightKind.STATE, key


def stored_layers(model: Any, path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Each layer of a model, with keys and dtypes of what Keras stores for it."""
    import h5py

    model.save_weights(path)
    counts: dict[str, int] = {}
    with h5py.File(path) as file:
        for layer in model.layers:
            snake = to_snake_case(type(layer).__name__)
            number = counts.get(snake, 0)
            counts[snake] = number + 1
            found: dict[str, str] = {}

            def visit(key: str, item: Any, found: dict[str, str] = found) -> None:
                if isinstance(item, h5py.Dataset):
                    found[key] = str(item.attrs.get("dtype", item.dtype))

            place = f"layers/{snake}_{number}" if number else f"layers/{snake}"
            if place in file:
                file[place].visititems(visit)
            yield layer, found


MEAN_AND_VARIANCE = {"2": WeightKind.MEAN, "3": WeightKind.VARIANCE}


@pytest.mark.parametrize("number", "0123")
def test_batch_normalization_below_other_layers(number: str) -> None:
    normal = {"class_name": "BatchNormalization", "config": {}}
    inner = {"class_name": "TimeDistributed", "config": {"layer": normal}}
    network = {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": "InputLayer", "config": {}}, normal, normal]},
    }
    wanted = MEAN_AND_VARIANCE.get(number, WeightKind.WEIGHT)
    for class_name, config, prefix in (
        ("BatchNormalization", {}, ""),
        ("TimeDistributed", {"layer": normal}, "layer/"),
        ("TimeDistributed", {"layer": inner}, "layer/layer/"),
        ("TimeDistributed", {"layer": network}, "layer/layers/batch_normalization/"),
        ("TimeDistributed", {"layer": network}, "layer/layers/batch_normalization_1/"),
        ("Sequential", network["config"], "layers/batch_normalization_1/"),
    ):
        assert weight_kind(class_name, config, f"{prefix}vars/{number}", "float32") is wanted, prefix
        named = {"2": "moving_mean", "3": "moving_variance", "0": "gamma", "1": "beta"}[number]
        assert weight_name(class_name, config, f"{prefix}vars/{number}") == named
    assert (
        weight_kind("TimeDistributed", {"layer": network}, f"layer/layers/dense/vars/{number}", "float32")
        is WeightKind.WEIGHT
    )


def test_batch_normalization_without_scale_or_center() -> None:
    for options, first in (({"scale": False}, 1), ({"center": False}, 1), ({"scale": False, "center": False}, 0)):
        kinds = [weight_kind("BatchNormalization", options, f"vars/{first + number}", "float32") for number in (0, 1)]
        assert kinds == [WeightKind.MEAN, WeightKind.VARIANCE]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("batch_normalization_1/moving_mean:0", WeightKind.MEAN),
        ("batch_normalization_1/moving_variance:0", WeightKind.VARIANCE),
        ("batchnormalization_1_running_mean", WeightKind.MEAN),
        ("batchnormalization_1_running_std", WeightKind.VARIANCE),
        ("batch_normalization_1/gamma:0", WeightKind.WEIGHT),
        ("time_distributed/bn/moving_mean", WeightKind.MEAN),
        ("sn/vector_u", WeightKind.STATE),
        ("dropout/seed_generator_state", WeightKind.STATE),
        ("batch_normalization/moving_stddev:0", WeightKind.STATE),
        ("batch_normalization/renorm_mean:0", WeightKind.STATE),
    ],
)
def test_kinds_by_the_names_in_old_files(key: str, kind: WeightKind) -> None:
    assert weight_kind("Anything", {}, key, "float32") is kind


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((dtype, WeightKind.WEIGHT) for dtype in ("float16", "float32", "float64", "bfloat16", "complex64")),
        *((dtype, WeightKind.STATE) for dtype in ("int8", "int32", "int64", "uint32", "bool", "void3")),
    ],
)
def test_kinds_of_unknown_classes_follow_the_type(dtype: str, kind: WeightKind) -> None:
    assert weight_kind("Invented", {}, "vars/0", dtype) is kind


def test_names_that_are_not_known_are_the_keys() -> None:
    assert weight_name("Invented", {}, "inside/vars/3") == "inside/vars/3"
    assert weight_name("Dense", {}, "vars/7") == "vars/7"
    assert weight_name("Dense", {}, "dense_1/kernel:0") == "kernel"
    assert weight_name("LSTM", {}, "cell/vars/1") == "recurrent_kernel"


# ---- spelling


def test_snake_case_is_that_of_keras() -> None:
    import keras
    from keras.src.utils import naming

    names = {name for name, value in vars(keras.layers).items() if inspect.isclass(value)}
    names |= {
        "MyLayer",
        "HTTPLayer",
        "X",
        "aB",
        "Conv2DBN",
        "my_Layer",
        "A1B2",
        "GroupedQueryAttention",
        "Layer>Odd",
        "Ünder",
    }
    assert {name: to_snake_case(name) for name in names} == {name: naming.to_snake_case(name) for name in names}


def test_stored_class_is_what_keras_writes() -> None:
    import keras
    from keras.src.api_export import get_name_from_symbol

    for value in vars(keras.layers).values():
        if inspect.isclass(value) and issubclass(value, keras.layers.Layer):
            in_configuration = get_name_from_symbol(value).rpartition(".")[2]
            assert stored_class(in_configuration) == to_snake_case(value.__name__)


@pytest.mark.parametrize(
    ("dtype", "name", "compute"),
    [
        ("float32", "float32", "float32"),
        ("mixed_float16", "mixed_float16", "float16"),
        ({"class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}}, "mixed_bfloat16", "bfloat16"),
        ({"class_name": "Policy", "config": {"name": "float64"}}, "float64", "float64"),
        ({"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}, None, "float32"),
        (None, None, "float32"),
    ],
)
def test_policies(dtype: Any, name: str | None, compute: str) -> None:
    assert policy_name(dtype) == name
    assert compute_dtype({"dtype": dtype}) == compute


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_told(built: Any) -> None:
    for name in zoo.LAYERS:
        for layer in zoo.all_layers(built(name)):
            assert is_quantized(config_of(layer)) is bool(getattr(layer, "quantization_mode", None)), name


# ---- comparable


@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if not case.seeded_config])
@pytest.mark.filterwarnings("ignore")
def test_two_models_built_alike_are_equal(name: str, built: Any) -> None:
    first, second = built(name), zoo.CASES[name].build(7)
    for mine, other in zip(first.layers, second.layers, strict=True):
        assert difference(comparable(config_of(mine)), comparable(config_of(other))) is None


def test_what_training_began_with_does_not_matter() -> None:
    import keras

    layers = keras.layers
    one = layers.Dense(3, name="a", kernel_initializer="zeros", trainable=False)
    two = layers.Dense(3, name="b", kernel_initializer=keras.initializers.HeNormal(seed=4), bias_initializer="ones")
    assert comparable(config_of(one)) == comparable(config_of(two))
    assert comparable(config_of(layers.Dropout(0.5, seed=1))) == comparable(config_of(layers.Dropout(0.5, name="x")))
    wrapped = [layers.TimeDistributed(layers.Dense(3, name=name)) for name in ("a", "b")]
    assert comparable(config_of(wrapped[0])) == comparable(config_of(wrapped[1]))


def test_comparable_changes_nothing_it_was_given() -> None:
    config = {"layers": [{"name": "a", "class_name": "Dense", "config": {"name": "a"}}], "output_layers": [["a", 0, 0]]}
    before = copy.deepcopy(config)
    comparable(config)
    assert config == before


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Dense", {"units": 3}, {"units": 4}),
    ("Dense", {"units": 3}, {"units": 3, "activation": "relu"}),
    ("Dense", {"units": 3}, {"units": 3, "use_bias": False}),
    ("Dense", {"units": 3}, {"units": 3, "dtype": "mixed_float16"}),
    ("Conv2D", {"filters": 3, "kernel_size": 2}, {"filters": 3, "kernel_size": 3}),
    ("Conv2D", {"filters": 4, "kernel_size": 2}, {"filters": 4, "kernel_size": 2, "strides": 2}),
    ("Conv2D", {"filters": 4, "kernel_size": 2}, {"filters": 4, "kernel_size": 2, "padding": "same"}),
    ("Conv2D", {"filters": 4, "kernel_size": 2}, {"filters": 4, "kernel_size": 2, "dilation_rate": 2}),
    ("Conv2D", {"filters": 4, "kernel_size": 2}, {"filters": 4, "kernel_size": 2, "groups": 2}),
    ("Conv2D", {"filters": 4, "kernel_size": 2}, {"filters": 4, "kernel_size": 2, "data_format": "channels_first"}),
    ("MaxPooling2D", {"pool_size": 2}, {"pool_size": 3}),
    ("MaxPooling2D", {"pool_size": 2}, {"pool_size": 2, "strides": 1}),
    ("LSTM", {"units": 3}, {"units": 3, "return_sequences": True}),
    ("LSTM", {"units": 3}, {"units": 3, "go_backwards": True}),
    ("LSTM", {"units": 3}, {"units": 3, "stateful": True}),
    ("LSTM", {"units": 3}, {"units": 3, "recurrent_activation": "hard_sigmoid"}),
    (
        "LSTM",
        {"units": 3, "return_sequences": True},
        {"units": 3, "return_sequences": True, "zero_output_for_mask": True},
    ),
    ("GRU", {"units": 3}, {"units": 3, "reset_after": False}),
    ("BatchNormalization", {}, {"epsilon": 1e-5}),
    ("BatchNormalization", {}, {"momentum": 0.9}),
    ("BatchNormalization", {}, {"axis": 1}),
    ("BatchNormalization", {}, {"scale": False}),
    ("BatchNormalization", {}, {"renorm": True}),
    ("LayerNormalization", {}, {"rms_scaling": True}),
    ("Dropout", {"rate": 0.5}, {"rate": 0.4}),
    ("Embedding", {"input_dim": 4, "output_dim": 3}, {"input_dim": 4, "output_dim": 3, "mask_zero": True}),
    ("Rescaling", {"scale": 0.1}, {"scale": 0.2}),
    ("Reshape", {"target_shape": (2, 3)}, {"target_shape": (3, 2)}),
    ("Softmax", {}, {"axis": 1}),
    ("LeakyReLU", {}, {"negative_slope": 0.1}),
    ("MultiHeadAttention", {"num_heads": 2, "key_dim": 3}, {"num_heads": 3, "key_dim": 3}),
    ("UpSampling2D", {}, {"interpolation": "bilinear"}),
    ("GlobalAveragePooling2D", {}, {"keepdims": True}),
]


@pytest.mark.parametrize(("class_name", "one", "two"), CHANGES, ids=[f"{name}-{[*b][-1]}" for name, _, b in CHANGES])
@pytest.mark.filterwarnings("ignore")
def test_every_meaningful_key_tells_layers_apart(class_name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    import keras

    make = getattr(keras.layers, class_name)
    first, second = (comparable(config_of(make(**options))) for options in (one, two))
    found = difference(first, second)
    assert found is not None
    assert found[1] != found[2]
    wrapped = [{"layer": {"class_name": class_name, "config": config}} for config in (first, second)]
    deeper = difference(comparable(wrapped[0]), comparable(wrapped[1]))
    assert deeper is not None
    assert deeper[0].startswith("layer.config.")


def test_the_class_and_wiring_inside_a_wrapped_network_count() -> None:
    import keras

    layers = keras.layers

    def network(cross: bool, **options: Any) -> Any:
        x = keras.Input((3,))
        a = layers.Dense(3)(x)
        b = layers.Dense(3, **options)(a)
        joined = layers.Add()([b, x] if cross else [b, a])
        return layers.TimeDistributed(keras.Model(x, joined))

    same = [comparable(config_of(network(False))) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != comparable(config_of(network(True)))
    assert same[0] != comparable(config_of(network(False, activation="relu")))
    one, two = (comparable(config_of(layers.TimeDistributed(inner))) for inner in (layers.ReLU(), layers.ELU()))
    assert difference(one, two) is not None


def test_difference_names_the_first_key() -> None:
    assert difference({"a": 1}, {"a": 1}) is None
    assert difference({"b": 1, "a": {"x": [1, 2]}}, {"b": 2, "a": {"x": [1, 3]}}) == ("a.x", [1, 2], [1, 3])
    assert difference({"a": 1}, {}) == ("a", 1, None)
    assert difference(1, 2) == ("", 1, 2)
