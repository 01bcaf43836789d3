"""Shapes and multiply-adds: against Keras's own shapes in both dialects, and against numbers worked by hand."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from kmerge.graph import Call, Graph, Layer, Ref, flatten, refs
from kmerge.shapes import infer_shapes, multiply_adds

FEATURES, SEQUENCE, IMAGE, VIDEO = (7,), (10, 6), (12, 9, 4), (5, 8, 7, 3)

# Class, its arguments, shapes of the inputs without batch (several: the layer is called on a list).
SINGLE: list[tuple[str, dict[str, Any], Any]] = [
    ("Dense", {"units": 3}, FEATURES),
    ("Dense", {"units": 3}, (None, 6)),
    ("EinsumDense", {"equation": "ab,bc->ac", "output_shape": 5}, FEATURES),
    ("EinsumDense", {"equation": "abc,cd->abd", "output_shape": [10, 5]}, SEQUENCE),
    # On an image, see test_einsum_knows_more_than_keras_declares.
    ("EinsumDense", {"equation": "...x,xy->...y", "output_shape": 5}, FEATURES),
    ("EinsumDense", {"equation": "abc...,bd->adc...", "output_shape": [2, 9]}, IMAGE),
    ("Conv1D", {"filters": 8, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}, SEQUENCE),
    ("Conv1D", {"filters": 8, "kernel_size": 4, "strides": 3}, SEQUENCE),
    ("Conv1D", {"filters": 8, "kernel_size": 4, "strides": 3}, (None, 6)),
    ("Conv2D", {"filters": 8, "kernel_size": 3, "padding": "same"}, IMAGE),
    ("Conv2D", {"filters": 8, "kernel_size": [3, 2], "strides": 2, "groups": 2}, IMAGE),
    ("Conv2D", {"filters": 8, "kernel_size": 3, "strides": [2, 3], "padding": "same"}, (None, 9, 4)),
    ("Conv2D", {"filters": 8, "kernel_size": 3, "dilation_rate": [2, 3]}, IMAGE),
    ("Conv2D", {"filters": 8, "kernel_size": 3, "data_format": "channels_first"}, IMAGE),
    ("Conv3D", {"filters": 2, "kernel_size": [1, 2, 3], "strides": [2, 1, 1]}, VIDEO),
    ("Conv1DTranspose", {"filters": 2, "kernel_size": 5, "strides": 3}, SEQUENCE),
    ("Conv1DTranspose", {"filters": 2, "kernel_size": 2, "strides": 3, "padding": "same"}, SEQUENCE),
    ("Conv2DTranspose", {"filters": 2, "kernel_size": 2, "strides": 3}, IMAGE),
    ("Conv2DTranspose", {"filters": 2, "kernel_size": [3, 4], "strides": 3, "output_padding": [1, 2]}, IMAGE),
    ("Conv2DTranspose", {"filters": 2, "kernel_size": 3, "dilation_rate": 2}, (None, 9, 4)),
    (
        "Conv2DTranspose",
        {"filters": 2, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1, "data_format": None},
        IMAGE,
    ),
    ("Conv3DTranspose", {"filters": 2, "kernel_size": 3, "strides": 2, "padding": "same"}, VIDEO),
    ("DepthwiseConv1D", {"kernel_size": 3, "depth_multiplier": 2}, SEQUENCE),
    ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, "strides": 2, "padding": "same"}, IMAGE),
    ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, "data_format": "channels_first"}, IMAGE),
    ("SeparableConv1D", {"filters": 5, "kernel_size": 3, "strides": 2}, SEQUENCE),
    ("SeparableConv2D", {"filters": 5, "kernel_size": 3, "padding": "same"}, IMAGE),
    ("MaxPooling1D", {"pool_size": 3}, SEQUENCE),
    ("MaxPooling2D", {"pool_size": [3, 2], "strides": 2, "padding": "same"}, IMAGE),
    ("MaxPooling2D", {"pool_size": 2, "data_format": "channels_first"}, IMAGE),
    ("MaxPooling3D", {"pool_size": 2}, VIDEO),
    ("AveragePooling1D", {"pool_size": 3, "strides": 1}, SEQUENCE),
    ("AveragePooling2D", {"pool_size": 2}, (None, None, 4)),
    ("AveragePooling3D", {"pool_size": [1, 2, 3], "padding": "same"}, VIDEO),
    ("GlobalMaxPooling1D", {}, SEQUENCE),
    ("GlobalMaxPooling2D", {"keepdims": True}, IMAGE),
    ("GlobalMaxPooling3D", {}, VIDEO),
    ("GlobalAveragePooling1D", {"keepdims": True, "data_format": "channels_first"}, SEQUENCE),
    ("GlobalAveragePooling2D", {"data_format": "channels_first"}, IMAGE),
    ("GlobalAveragePooling3D", {"keepdims": True}, VIDEO),
    ("AdaptiveMaxPooling1D", {"output_size": 4}, SEQUENCE),
    ("AdaptiveAveragePooling2D", {"output_size": [4, 3]}, IMAGE),
    ("AdaptiveAveragePooling2D", {"output_size": 2, "data_format": "channels_first"}, IMAGE),
    ("AdaptiveMaxPooling3D", {"output_size": 2}, VIDEO),
    ("UpSampling1D", {"size": 3}, SEQUENCE),
    ("UpSampling2D", {"size": [2, 3], "data_format": "channels_first"}, IMAGE),
    ("UpSampling2D", {"size": 2}, (None, 9, 4)),
    ("UpSampling3D", {"size": 2}, VIDEO),
    ("ZeroPadding1D", {"padding": [1, 2]}, SEQUENCE),
    ("ZeroPadding2D", {"padding": [1, 2]}, IMAGE),
    ("ZeroPadding2D", {"padding": [[1, 2], [0, 3]], "data_format": "channels_first"}, IMAGE),
    ("ZeroPadding3D", {"padding": 2}, VIDEO),
    ("Cropping1D", {"cropping": 2}, SEQUENCE),
    ("Cropping2D", {"cropping": [[1, 2], [0, 3]]}, IMAGE),
    ("Cropping3D", {"cropping": [1, 2, 1], "data_format": "channels_last"}, VIDEO),
    ("Flatten", {}, IMAGE),
    ("Flatten", {}, (None, 3)),
    ("Flatten", {"data_format": "channels_first"}, ()),
    ("Reshape", {"target_shape": [-1, 3]}, SEQUENCE),
    ("Reshape", {"target_shape": [5, 12]}, SEQUENCE),
    ("Reshape", {"target_shape": [-1, 3]}, (None, 6)),
    ("Permute", {"dims": [3, 1, 2]}, IMAGE),
    ("RepeatVector", {"n": 4}, FEATURES),
    ("Embedding", {"input_dim": 9, "output_dim": 5}, SEQUENCE),
    ("ReversibleEmbedding", {"input_dim": 9, "output_dim": 5}, FEATURES),
    ("SimpleRNN", {"units": 3}, SEQUENCE),
    ("SimpleRNN", {"units": 3, "return_state": True, "return_sequences": True}, SEQUENCE),
    ("LSTM", {"units": 3, "return_sequences": True}, (None, 6)),
    ("LSTM", {"units": 3, "return_state": True}, SEQUENCE),
    ("GRU", {"units": 3, "return_state": True}, SEQUENCE),
    ("ConvLSTM1D", {"filters": 2, "kernel_size": 3}, (5, 9, 4)),
    ("ConvLSTM2D", {"filters": 2, "kernel_size": 3, "strides": 2, "return_sequences": True}, VIDEO),
    ("ConvLSTM2D", {"filters": 2, "kernel_size": 3, "padding": "same", "return_state": True}, VIDEO),
    ("ConvLSTM3D", {"filters": 2, "kernel_size": 2}, (3, 4, 5, 6, 2)),
    ("Activation", {"activation": "relu"}, IMAGE),
    ("PReLU", {"shared_axes": [1, 2]}, IMAGE),
    ("Softmax", {}, FEATURES),
    ("BatchNormalization", {}, IMAGE),
    ("LayerNormalization", {}, SEQUENCE),
    ("GroupNormalization", {"groups": 2}, IMAGE),
    ("RMSNormalization", {}, SEQUENCE),
    ("UnitNormalization", {}, FEATURES),
    ("Normalization", {"mean": 0.0, "variance": 1.0}, FEATURES),
    ("Dropout", {"rate": 0.5}, IMAGE),
    ("SpatialDropout2D", {"rate": 0.5}, IMAGE),
    ("GaussianNoise", {"stddev": 0.5}, IMAGE),
    ("Masking", {}, SEQUENCE),
    ("Identity", {}, SEQUENCE),
    ("Rescaling", {"scale": 2.0}, IMAGE),
    ("Resizing", {"height": 5, "width": 6}, IMAGE),
    ("Resizing", {"height": 5, "width": 6, "data_format": "channels_first"}, IMAGE),
    ("CenterCrop", {"height": 5, "width": 6}, IMAGE),
    ("RandomCrop", {"height": 5, "width": 6}, IMAGE),
    ("RandomFlip", {}, IMAGE),
    ("Discretization", {"bin_boundaries": [0.0, 1.0]}, FEATURES),
    ("Discretization", {"bin_boundaries": [0.0, 1.0], "output_mode": "one_hot"}, FEATURES),
    ("Discretization", {"bin_boundaries": [0.0, 1.0], "output_mode": "multi_hot"}, FEATURES),
    ("CategoryEncoding", {"num_tokens": 4}, FEATURES),
    ("CategoryEncoding", {"num_tokens": 4, "output_mode": "one_hot"}, FEATURES),
    ("CategoryEncoding", {"num_tokens": 4, "output_mode": "one_hot"}, (1,)),
    ("Hashing", {"num_bins": 4}, FEATURES),
    ("Hashing", {"num_bins": 4, "output_mode": "one_hot"}, FEATURES),
    ("IntegerLookup", {"vocabulary": [3, 4, 5]}, FEATURES),
    ("IntegerLookup", {"vocabulary": [3, 4, 5], "output_mode": "multi_hot"}, FEATURES),
    ("StringLookup", {"vocabulary": ["a", "b"], "output_mode": "one_hot"}, FEATURES),
    (
        "StringLookup",
        {"vocabulary": ["a", "b"], "output_mode": "count", "max_tokens": 9, "pad_to_max_tokens": True},
        FEATURES,
    ),
    ("TextVectorization", {"vocabulary": ["a", "b"], "output_sequence_length": 7}, (1,)),
    ("TextVectorization", {"vocabulary": ["a", "b"]}, ()),
    ("TextVectorization", {"vocabulary": ["a", "b"], "output_mode": "multi_hot"}, ()),
    ("Add", {}, [SEQUENCE, SEQUENCE]),
    ("Add", {}, [SEQUENCE, (6,)]),
    ("Multiply", {}, [IMAGE, (1, 1, 4), (4,)]),
    ("Average", {}, [FEATURES, FEATURES]),
    ("Maximum", {}, [FEATURES, FEATURES]),
    ("Minimum", {}, [(None, 6), (None, 6)]),
    ("Subtract", {}, [FEATURES, (1,)]),
    ("Concatenate", {}, [(5, 2), (5, 3), (5, 4)]),
    ("Concatenate", {"axis": 1}, [SEQUENCE, (2, 6)]),
    ("Concatenate", {"axis": 1}, [SEQUENCE, (None, 6)]),
    ("Dot", {"axes": -1}, [SEQUENCE, (4, 6)]),
    ("Dot", {"axes": [2, 1]}, [SEQUENCE, (6, 3)]),
    ("Dot", {"axes": 1}, [FEATURES, FEATURES]),
    ("Attention", {}, [SEQUENCE, (4, 6), (4, 6)]),
    ("AdditiveAttention", {}, [SEQUENCE, (4, 6)]),
    ("HashedCrossing", {"num_bins": 4, "output_mode": "one_hot"}, [(1,), (1,)]),
]


def _identity(case: Any) -> str:
    return case[0] + "-" + ",".join(f"{key}={value}" for key, value in case[1].items())


@pytest.fixture(scope="module")
def keras() -> Any:
    import keras

    return keras


def convert(model: Any, dialect: int) -> Graph:
    """A live functional model as a graph that records no shapes, in the node form and words of Keras 2 or 3."""
    entries = model.get_config()["layers"]
    numbers = {entry["name"]: index for index, entry in enumerate(entries)}
    first: dict[str, int] = {}
    for entry in entries:
        first[entry["name"]] = sum(max(1, len(entries[i]["inbound_nodes"])) for i in range(numbers[entry["name"]]))

    def revive(value: Any) -> Any:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
            name, node, tensor = value["config"]["keras_history"]
            return Ref(first[name] + node, tensor)
        if isinstance(value, dict):
            return {key: revive(item) for key, item in value.items()}
        return [revive(item) for item in value] if isinstance(value, (list, tuple)) else value

    layers, calls = [], []
    for index, entry in enumerate(entries):
        config = json.loads(json.dumps(entry["config"], default=lambda value: value.get_config()))
        extra = {key: entry[key] for key in ("module", "registered_name")}
        if dialect == 2:
            extra = {}
            if "batch_shape" in config:
                config["batch_input_shape"] = config.pop("batch_shape")
        operation = index and entry["module"].startswith("keras.src.ops")
        layers.append(Layer(entry["name"], entry["class_name"], config, extra, is_operation=bool(operation)))
        for node in entry["inbound_nodes"] or [None]:
            arguments = revive(node)
            if dialect == 2 and node is not None:
                names = list(inspect.signature(model.get_layer(entry["name"]).call).parameters)
                head, *rest = arguments["args"]
                keywords = arguments["kwargs"] | dict(zip(names[1:], rest, strict=False))
                arguments = [[ref, keywords if place == 0 else {}] for place, ref in enumerate(flatten(head))]
            calls.append(Call(index, arguments))
    named = {name: Ref(first[name]) for name in numbers}
    return Graph("test", tuple(layers), tuple(calls), [], [named[entry["name"]] for entry in entries[-1:]])


def inferred(model: Any, dialect: int) -> list[list[Any]]:
    """Shapes of the outputs of every layer of a model whose layers are called once."""
    shapes = infer_shapes(convert(model, dialect))
    found: list[list[Any]] = [[] for _ in model.layers]
    for ref in sorted(shapes, key=lambda ref: (ref.call, ref.output)):
        found[ref.call].append(shapes[ref])
    return found


def actual(keras: Any, model: Any) -> list[list[Any]]:
    return [[tuple(tensor.shape) for tensor in keras.tree.flatten(layer.output)] for layer in model.layers]


def weights_of(model: Any) -> dict[int, list[tuple[int, ...]]]:
    return {index: [tuple(weight.shape) for weight in layer.weights] for index, layer in enumerate(model.layers)}


def costs(model: Any, dialect: int = 3) -> list[int | None]:
    """Multiply-adds of every layer of a model, inputs left out."""
    graph = convert(model, dialect)
    found = multiply_adds(graph, infer_shapes(graph), weights_of(model))
    return [cost for index, cost in found.items() if not graph.layers[graph.calls[index].layer].is_input]


def single(keras: Any, case: tuple[str, dict[str, Any], Any]) -> Any:
    name, config, given = case
    text = name in ("StringLookup", "TextVectorization")
    integers = name in ("IntegerLookup", "Hashing", "HashedCrossing")
    dtype = "string" if text else "int64" if integers else "float32"
    given = given if isinstance(given, list) else [given]
    tensors = [keras.Input(shape, dtype=dtype) for shape in given]
    return keras.Model(tensors, getattr(keras.layers, name)(**config)(tensors if len(tensors) > 1 else tensors[0]))


@pytest.mark.parametrize("dialect", [2, 3])
@pytest.mark.parametrize("case", SINGLE, ids=_identity)
def test_layer_has_keras_shape(keras: Any, case: tuple[str, dict[str, Any], Any], dialect: int) -> None:
    model = single(keras, case)
    assert inferred(model, dialect) == actual(keras, model)


def test_every_class_of_keras_is_known_or_left_unknown_on_purpose(keras: Any) -> None:
    from kmerge.shapes.layers import _RULES

    bases = {"Layer", "Wrapper", "Input", "InputSpec"}
    cells = {"GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"}
    unknown = {
        *("FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"),
        *("MaxNumBoundingBoxes", "MelSpectrogram", "STFTSpectrogram"),
    }
    classes = {
        value.__name__
        for value in vars(keras.layers).values()
        if inspect.isclass(value) and value.__name__[0].isupper()
    }
    public = {"GroupedQueryAttention": "GroupQueryAttention"}  # as configurations call it
    classes = {public.get(name, name) for name in classes}
    assert classes - set(_RULES) == (bases | cells | unknown) & classes


@pytest.mark.parametrize("dialect", [2, 3])
def test_wrappers_have_keras_shapes(keras: Any, dialect: int) -> None:
    layers = keras.layers
    x = keras.Input((6, 5))
    frames = keras.Input((3, 8, 8, 2))
    inner = keras.Sequential([keras.Input((8, 8, 2)), layers.Conv2D(4, 3), layers.MaxPool2D(), layers.Flatten()])
    bidirectional = [
        layers.Bidirectional(layers.LSTM(3), merge_mode=mode)(x) for mode in ("concat", "sum", "mul", "ave", None)
    ]
    states = layers.Bidirectional(layers.LSTM(3, return_sequences=True, return_state=True))(x)
    both = layers.Bidirectional(layers.GRU(3, return_state=True), merge_mode=None)(x)
    stacked = layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)], return_state=True)(x)
    cell = layers.RNN(layers.SimpleRNNCell(3), return_sequences=True)(x)
    rest = [
        layers.TimeDistributed(layers.Dense(4))(x),
        layers.TimeDistributed(layers.Conv2D(4, 3))(frames),
        layers.TimeDistributed(inner)(frames),
        layers.SpectralNormalization(layers.Conv1D(4, 3))(x),
        layers.Bidirectional(layers.ConvLSTM2D(4, 3))(frames),
    ]
    model = keras.Model([x, frames], [bidirectional, states, both, stacked, cell, rest])
    assert inferred(model, dialect) == actual(keras, model)


@pytest.mark.parametrize("dialect", [2, 3])
def test_attention_has_keras_shapes(keras: Any, dialect: int) -> None:
    layers = keras.layers
    query, value, image = keras.Input((6, 8)), keras.Input((4, 8)), keras.Input((5, 4, 8))
    outputs = [
        layers.MultiHeadAttention(2, 4)(query, value),
        layers.MultiHeadAttention(2, 4, output_shape=7)(query, value=value, key=value),
        layers.MultiHeadAttention(2, 4, output_shape=[2, 7], value_dim=3)(query, value, value),
        layers.MultiHeadAttention(2, 4, attention_axes=[1, 2])(image, image),
        layers.MultiHeadAttention(2, 4)(query, query, return_attention_scores=True),
        layers.GroupQueryAttention(4, 4, 2)(query, value, return_attention_scores=True),
        layers.Attention()([query, value], return_attention_scores=True),
    ]
    model = keras.Model([query, value, image], outputs)
    assert inferred(model, dialect) == actual(keras, model)


@pytest.mark.parametrize("dialect", [2, 3])
def test_einsum_knows_more_than_keras_declares(keras: Any, dialect: int) -> None:
    """Keras leaves open what `output_shape` leaves open, and turns the axes of "..." around: the result decides."""
    image = keras.Input((12, 9, 4))
    left = keras.layers.EinsumDense("...x,xy->...y", output_shape=5)(image)
    right = keras.layers.EinsumDense("abcd,de->abce", output_shape=(None, 9, 5))(image)
    model = keras.Model(image, [left, right])
    assert actual(keras, model)[1:] == [[(None, 9, 12, 5)], [(None, None, 9, 5)]]
    assert [tuple(output.shape) for output in model(keras.ops.zeros((1, 12, 9, 4)))] == [(1, 12, 9, 5)] * 2
    assert inferred(model, dialect)[1:] == [[(None, 12, 9, 5)]] * 2


@pytest.mark.parametrize("dialect", [2, 3])
def test_whole_network(keras: Any, dialect: int) -> None:
    layers = keras.layers
    image, words = keras.Input((32, 32, 3), batch_size=2), keras.Input((None,), batch_size=2)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    y = layers.Conv2D(8, 3, strides=2)(layers.ZeroPadding2D(1)(x))
    x = layers.Add()([layers.MaxPool2D()(x), layers.BatchNormalization()(y)])
    x = layers.GlobalAveragePooling2D()(x)
    z = layers.Bidirectional(layers.LSTM(4))(layers.Embedding(100, 6)(words))
    model = keras.Model([image, words], layers.Dense(5)(layers.Concatenate()([x, z])))
    assert inferred(model, dialect) == actual(keras, model)


def test_shared_layer_has_a_shape_per_call() -> None:
    dense = Layer("dense", "Dense", {"units": 3})
    inputs = [Layer(f"input_{size}", "InputLayer", {"batch_shape": [None, size, 8]}) for size in (4, 5)]
    calls = (Call(0), Call(1), Call(2, [[Ref(0), {}]]), Call(2, [[Ref(1), {}]]))
    graph = Graph("shared", (*inputs, dense), calls, [Ref(0), Ref(1)], [Ref(2), Ref(3)])
    shapes = infer_shapes(graph)
    assert (shapes[Ref(2)], shapes[Ref(3)]) == ((None, 4, 3), (None, 5, 3))
    assert multiply_adds(graph, shapes, {2: [(8, 3), (3,)]}) == {0: 0, 1: 0, 2: 96, 3: 120}


def chain(*layers: Layer, shape: Any = (None, 8), **outputs: Any) -> Graph:
    """Layers one after the other, in the form of Keras 3."""
    start = Layer("input", "InputLayer", {"batch_shape": shape})
    calls = [Call(0), *(Call(index, {"args": [Ref(index - 1)], "kwargs": {}}) for index in range(1, len(layers) + 1))]
    return Graph("chain", (start, *layers), tuple(calls), Ref(0), outputs.get("output", Ref(len(layers))))


def last(graph: Graph) -> Any:
    return infer_shapes(graph)[Ref(len(graph.calls) - 1)]


def test_recorded_shape_is_authoritative() -> None:
    custom, dense = Layer("custom", "Mystery", {}), Layer("dense", "Dense", {"units": 3})
    graph = chain(custom, dense)
    recorded = Ref(1, 0, (None, 4, 9), "float32")
    calls = (graph.calls[0], graph.calls[1], Call(2, {"args": [recorded], "kwargs": {}}))
    shapes = infer_shapes(Graph("recorded", graph.layers, calls, Ref(0), Ref(2)))
    assert (shapes[Ref(1)], shapes[Ref(2)]) == ((None, 4, 9), (None, 4, 3))


def test_build_config_tells_of_the_tensor_before_where_nothing_else_does() -> None:
    custom = Layer("custom", "Mystery", {})
    dense = Layer("dense", "Dense", {"units": 3}, {"build_config": {"input_shape": [32, 4, 9]}})
    shapes = infer_shapes(chain(custom, dense))
    assert (shapes[Ref(1)], shapes[Ref(2)]) == ((None, 4, 9), (None, 4, 3))
    relu = Layer("relu", "ReLU", {})
    assert infer_shapes(chain(relu, dense))[Ref(1)] == (None, 8)


def test_outputs_that_only_the_graph_tells_of_are_listed() -> None:
    shapes = infer_shapes(chain(Layer("custom", "Mystery", {}), output=[Ref(1, 0), Ref(1, 10**9)]))
    assert shapes == {Ref(0): (None, 8), Ref(1): None, Ref(1, 10**9): None}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Layer("a", "Reshape", {"target_shape": [2, -1]}), (None, 2, None)),
        (Layer("a", "Reshape", {"target_shape": [2, 3]}), (None, 2, 3)),
        (Layer("a", "LSTM", {"units": 3}), (None, 3)),
        (Layer("a", "GRU", {"units": 3, "return_sequences": True}), (None, None, 3)),
        (Layer("a", "Lambda", {"output_shape": {"class_name": "__tuple__", "items": [4]}}), (None, 4)),
        (Layer("a", "Lambda", {"output_shape": None}), None),
        (Layer("a", "Dense", {"units": 3}), None),
        (Layer("a", "Flatten", {}), None),
    ],
)
def test_after_an_unknown_tensor(layer: Layer, shape: Any) -> None:
    assert last(chain(Layer("custom", "Mystery", {}), layer)) == shape


@pytest.mark.parametrize(
    ("class_name", "config", "shape"),
    [
        ("Dense", {}, (None, 8)),
        ("Dense", {"units": "3"}, (None, 8)),
        ("Dense", {"units": True}, (None, 8)),
        ("Dense", {"units": 3}, ()),
        ("Dense", {"units": 3}, "what"),
        ("Dense", {"units": 3}, [None, -4]),
        ("EinsumDense", {"equation": "abc,cd->abd", "output_shape": [2, 3]}, (None, 8)),
        ("EinsumDense", {"equation": "nonsense", "output_shape": 3}, (None, 8)),
        ("Conv2D", {"filters": 3, "kernel_size": 3}, (None, 8)),
        ("Conv2D", {"filters": 3, "kernel_size": [3]}, (None, 8, 8, 3)),
        ("Conv2D", {"filters": 3, "kernel_size": 9}, (None, 8, 8, 3)),
        ("Conv2D", {"filters": 3, "kernel_size": 3, "padding": ["same"]}, (None, 8, 8, 3)),
        ("Conv2D", {"filters": 3, "kernel_size": 3, "strides": 0}, (None, 8, 8, 3)),
        ("Conv2D", {"filters": 3, "kernel_size": 3, "data_format": {}}, (None, 8, 8, 3)),
        ("Cropping1D", {"cropping": [4, 4]}, (None, 8, 2)),
        ("Reshape", {"target_shape": [3]}, (None, 8)),
        ("Reshape", {"target_shape": [-1, 3]}, (None, 8)),
        ("Reshape", {"target_shape": [-1, -1]}, (None, 8)),
        ("Permute", {"dims": [1, 1]}, (None, 8, 8)),
        ("Permute", {"dims": [1, 10**30]}, (None, 8, 8)),
        ("RepeatVector", {"n": 3}, (None, 8, 8)),
        ("Concatenate", {"axis": 5}, (None, 8)),
        ("Concatenate", {"axis": "last"}, (None, 8)),
        ("Dot", {"axes": 1}, (None, 8)),
        ("Attention", {}, (None, 8, 8)),
        ("MultiHeadAttention", {"output_shape": "?"}, (None, 8, 8)),
        ("LSTM", {"units": 3, "time_major": True}, (None, 8, 8)),
        ("RNN", {"cell": {"class_name": "MyCell", "config": {"units": 3}}}, (None, 8, 8)),
        ("RNN", {"cell": []}, (None, 8, 8)),
        ("Bidirectional", {"layer": None}, (None, 8, 8)),
        ("Bidirectional", {"layer": {"class_name": "LSTM", "config": {"units": 3}}, "merge_mode": []}, (None, 8, 8)),
        ("TimeDistributed", {"layer": {"class_name": "Mystery", "config": {}}}, (None, 8, 8)),
        ("TimeDistributed", {"layer": {"class_name": "Sequential", "config": {"layers": [3]}}}, (None, 8, 8)),
        ("TFOpLambda", {"function": "math.reduce_mean"}, (None, 8)),
        ("Custom>Dense", {"units": 3}, (None, 8)),
    ],
)
def test_odd_configuration_is_unknown(class_name: str, config: dict[str, Any], shape: Any) -> None:
    graph = chain(Layer("odd", class_name, config), shape=shape)
    shapes = infer_shapes(graph)
    assert shapes[Ref(1)] is None
    assert multiply_adds(graph, shapes, {1: [(8, 8, 8, 8, 8, 8)]})[1] in (None, 0)


@pytest.mark.parametrize(
    "arguments", [None, [], {}, 3, {"args": None}, {"args": [], "kwargs": None}, [[3]], [[[]]], {"args": [[Ref(9)]]}]
)
def test_odd_arguments_are_unknown(arguments: Any) -> None:
    names = ("Dense", "Conv2D", "LSTM", "Add", "Concatenate", "Dot", "Attention", "MultiHeadAttention", "Identity")
    config = {"units": 3, "filters": 3, "kernel_size": 3, "return_sequences": True}
    layers = [Layer(name, name, config) for name in names if name != "LSTM" or arguments is not None]
    calls = tuple(Call(index, arguments) for index in range(len(layers)))
    graph = Graph("odd", tuple(layers), calls, [], [])
    shapes = infer_shapes(graph)
    assert all(shapes[Ref(index)] is None for index, layer in enumerate(layers) if layer.name != "LSTM")
    multiply_adds(graph, shapes, {})


@pytest.mark.parametrize(
    "entry", [{"registered_name": "my_package>Dense"}, {"module": "my_package.layers"}, {"module": "keras_hub.layers"}]
)
def test_custom_class_of_a_known_name_is_unknown(entry: dict[str, Any]) -> None:
    graph = chain(Layer("dense", "Dense", {"units": 3}, entry))
    assert last(graph) is None
    assert multiply_adds(graph, infer_shapes(graph), {1: [(8, 3), (3,)]})[1] is None
    assert multiply_adds(graph, infer_shapes(graph), {1: [(3,)]})[1] == 0


def test_element_wise_operations() -> None:
    add = Layer("add", "Add", {}, is_operation=True)
    plus = Layer("plus", "TFOpLambda", {"function": "__operators__.add"}, is_operation=True)
    inputs = [Layer(f"input_{size}", "InputLayer", {"batch_shape": [None, size]}) for size in (8, 1)]
    calls = (
        Call(0),
        Call(1),
        Call(2, {"args": [Ref(0), Ref(1)], "kwargs": {}}),
        Call(2, {"args": [Ref(0), 1.0], "kwargs": {}}),
        Call(2, {"args": [Ref(1), [1.0, 2.0]], "kwargs": {}}),
        Call(3, [[Ref(1), {"y": Ref(0), "name": None}]]),
        Call(3, [Ref(1), {"y": 2, "name": None}]),
        Call(3, [["_CONSTANT_VALUE", -1, 2.0, {"y": [Ref(0), {}], "name": None}]]),
    )
    graph = Graph("operations", (*inputs, add, plus), calls, [Ref(0), Ref(1)], [Ref(7)])
    shapes = infer_shapes(graph)
    assert [shapes[Ref(index)] for index in range(2, 8)] == [
        (None, 8),
        (None, 8),
        None,
        (None, 8),
        (None, 1),
        (None, 8),
    ]
    assert set(multiply_adds(graph, shapes, {}).values()) == {0}


def test_names_of_keras_2() -> None:
    layers = (
        Layer("a", "Convolution2D", {"filters": 4, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid"}),
        Layer("b", "MaxPool2D", {"pool_size": [2, 2], "strides": None}),
        Layer("c", "LocallyConnected2D", {"filters": 2, "kernel_size": [2, 2], "padding": "valid"}),
        Layer("d", "RandomWidth", {}),
        Layer("e", "GlobalAvgPool2D", {}),
    )
    graph = chain(*layers, shape=(None, 10, 8, 3))
    shapes = infer_shapes(graph)
    expected = [(None, 8, 6, 4), (None, 4, 3, 4), (None, 3, 2, 2), (None, 3, None, 2), (None, 2)]
    assert [shapes[Ref(index)] for index in range(1, 6)] == expected
    weights = {1: [(3, 3, 3, 4), (4,)], 3: [(6, 16, 2), (3, 2, 2)]}
    # 8 × 6 places × 3 × 3 × 3 × 4; 6 places × 16 × 2
    assert list(multiply_adds(graph, shapes, weights).values()) == [0, 5184, 0, 192, 0, 0]


# Worked by hand: class, arguments, inputs without batch, multiply-adds.
WORKED: list[tuple[str, dict[str, Any], Any, int | None]] = [
    ("Conv2D", {"filters": 8, "kernel_size": 3, "padding": "same"}, (32, 32, 3), 3 * 3 * 3 * 8 * 32 * 32),  # 221,184
    ("Conv2D", {"filters": 8, "kernel_size": 3, "strides": 2}, (32, 32, 3), 216 * 15 * 15),
    ("Conv2D", {"filters": 8, "kernel_size": 1, "groups": 2}, (5, 5, 4), 2 * 8 * 25),
    ("Conv2D", {"filters": 8, "kernel_size": 1, "data_format": "channels_first"}, (4, 5, 6), 4 * 8 * 30),
    ("Conv2D", {"filters": 8, "kernel_size": 3}, (None, 32, 3), None),
    ("Conv1D", {"filters": 6, "kernel_size": 5}, (20, 4), 5 * 4 * 6 * 16),
    ("Conv3D", {"filters": 2, "kernel_size": 2}, (3, 3, 3, 1), 8 * 2 * 8),
    ("Dense", {"units": 10}, (784,), 7840),
    ("Dense", {"units": 10}, (5, 8), 400),
    ("Dense", {"units": 10}, (None, 8), None),
    ("EinsumDense", {"equation": "abc,cde->abde", "output_shape": [5, 2, 3]}, (5, 8), 8 * 2 * 3 * 5),
    ("EinsumDense", {"equation": "...x,xy->...y", "output_shape": 4}, (5, 6, 8), 8 * 4 * 30),
    ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"}, (8, 8, 4), 9 * 4 * 2 * 64),
    ("SeparableConv2D", {"filters": 5, "kernel_size": 3}, (8, 8, 4), (9 * 4 + 4 * 5) * 36),
    ("Conv2DTranspose", {"filters": 5, "kernel_size": 3, "strides": 2}, (8, 8, 4), 9 * 4 * 5 * 64),
    ("SimpleRNN", {"units": 3}, (10, 6), (6 + 3) * 3 * 10),
    ("LSTM", {"units": 3}, (10, 6), (6 + 3) * 12 * 10),  # 1,080
    ("LSTM", {"units": 3}, (None, 6), None),
    ("GRU", {"units": 3, "dropout": 0.5}, (10, 6), (6 + 3) * 9 * 10),
    ("ConvLSTM2D", {"filters": 2, "kernel_size": 3}, (5, 8, 7, 3), 9 * (3 + 2) * 8 * 30 * 5),
    ("Embedding", {"input_dim": 100, "output_dim": 8}, (10,), 0),
    ("BatchNormalization", {}, (8, 8, 4), 0),
    ("PReLU", {}, (8, 4), 0),
    ("MaxPooling2D", {}, (8, 8, 4), 0),
    ("Add", {}, [(8,), (8,)], 0),
    ("Attention", {}, [(6, 8), (4, 8)], 2 * 6 * 4 * 8),
    ("AdditiveAttention", {}, [(6, 8), (4, 8)], 2 * 6 * 4 * 8),
]


@pytest.mark.parametrize("dialect", [2, 3])
@pytest.mark.parametrize("case", WORKED, ids=_identity)
def test_multiply_adds(keras: Any, case: tuple[str, dict[str, Any], Any, int | None], dialect: int) -> None:
    assert costs(single(keras, case[:3]), dialect) == [case[3]]


@pytest.mark.parametrize("dialect", [2, 3])
def test_multiply_adds_of_multi_head_attention(keras: Any, dialect: int) -> None:
    layers = keras.layers
    query, value, image = keras.Input((6, 8)), keras.Input((4, 8)), keras.Input((5, 4, 8))

    def cost(tensor: Any, *others: Any) -> Any:
        return costs(keras.Model([tensor, *others], tensor_output), dialect)

    # query and output 8×2×3 at 6 places, key and value at 4; scores and weighted sum 6×4×2×3.
    tensor_output = layers.MultiHeadAttention(2, 3)(query, value)
    assert cost(query, value) == [2 * 48 * 6 + 2 * 48 * 4 + 2 * 6 * 4 * 6]
    # The value is 5 wide, so are the rows of the output's kernel; no biases; a gate at 6 places.
    tensor_output = layers.MultiHeadAttention(2, 3, value_dim=3, use_bias=False, use_gate=True)(query, value)
    assert cost(query, value) == [3 * 48 * 6 + 2 * 48 * 4 + 2 * 6 * 4 * 6]
    tensor_output = layers.MultiHeadAttention(2, 3, value_dim=5)(query, value)
    assert cost(query, value) == [48 * 6 + 48 * 4 + 80 * 4 + 80 * 6 + 6 * 4 * 2 * (3 + 5)]
    # Attention along the second axis alone: five times as much as for one row.
    tensor_output = layers.MultiHeadAttention(2, 3, attention_axes=[2], dropout=0.5)(image, image)
    assert cost(image) == [5 * (4 * 48 * 4 + 2 * 4 * 4 * 6)]
    # Two heads of keys and values serve four of queries.
    tensor_output = layers.GroupQueryAttention(3, 4, 2)(query, value)
    assert cost(query, value) == [2 * 96 * 6 + 2 * 48 * 4 + 2 * 6 * 4 * 4 * 3]


@pytest.mark.parametrize("dialect", [2, 3])
def test_multiply_adds_of_wrappers(keras: Any, dialect: int) -> None:
    layers = keras.layers
    x, frames = keras.Input((10, 6)), keras.Input((3, 8, 8, 2))

    def cost(tensor: Any, layer: Any) -> int | None:
        return costs(keras.Model(tensor, layer(tensor)), dialect)[0]

    assert cost(x, layers.Bidirectional(layers.LSTM(3))) == 2 * 1080
    assert cost(x, layers.Bidirectional(layers.GRU(6, dropout=0.5))) == 2 * (6 + 6) * 18 * 10
    cells = [layers.GRUCell(4), layers.LSTMCell(3), layers.SimpleRNNCell(2)]
    assert cost(x, layers.RNN(cells)) == ((6 + 4) * 12 + (4 + 3) * 12 + (3 + 2) * 2) * 10
    assert cost(x, layers.TimeDistributed(layers.Dense(4))) == 6 * 4 * 10
    assert cost(x, layers.TimeDistributed(layers.Dropout(0.5))) == 0
    assert cost(frames, layers.TimeDistributed(layers.Conv2D(4, 3))) == 3 * 9 * 2 * 4 * 36
    inner = keras.Sequential(
        [
            *(keras.Input((8, 8, 2)), layers.SeparableConv2D(4, 3), layers.BatchNormalization()),
            *(layers.MaxPool2D(), layers.Flatten(), layers.Dense(5)),
        ]
    )
    assert cost(frames, layers.TimeDistributed(inner)) == 3 * ((18 + 8) * 36 + 36 * 5)
    frozen = keras.Sequential([keras.Input((6,)), layers.Dense(6, trainable=False), layers.Dense(6)])
    assert cost(x, layers.TimeDistributed(frozen)) is None
    assert cost(x, layers.SpectralNormalization(layers.Dense(4))) == 240


def test_reversible_embedding_multiplies_on_its_way_back(keras: Any) -> None:
    words, vectors = keras.Input((4,)), keras.Input((4, 5))
    layer = keras.layers.ReversibleEmbedding(9, 5)
    model = keras.Model([words, vectors], [layer(words), layer(vectors, reverse=True)])
    graph = convert(model, 3)
    shapes = infer_shapes(graph)
    found = multiply_adds(graph, shapes, weights_of(model))
    back = [index for index, call in enumerate(graph.calls) if call.arguments and call.arguments["kwargs"]]
    assert [(shapes[Ref(index)], found[index]) for index in back] == [((None, 4, 9), 4 * 5 * 9)]
    assert sum(cost or 0 for cost in found.values()) == 180


def test_what_is_not_known_has_no_number() -> None:
    layers = (Layer("a", "Mystery", {}), Layer("b", "Dense", {"units": 3}), Layer("c", "Mystery", {}))
    graph = chain(*layers)
    weights = {1: [(8,), (8,)], 2: [(8, 3), (3,)], 3: [(3, 3)]}
    assert multiply_adds(graph, infer_shapes(graph), weights) == {0: 0, 1: 0, 2: None, 3: None}


def test_refs_as_keys_ignore_what_is_recorded() -> None:
    graph = chain(Layer("dense", "Dense", {"units": 3}))
    recorded = Ref(1, 0, (None, 99))
    assert infer_shapes(graph)[recorded] == (None, 3)
    assert refs(graph.outputs) == [recorded]
