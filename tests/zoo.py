"""A zoo of small Keras models: what kmerge must read, merge and write as Keras itself does.

`LAYERS` holds one or more cases for every built-in layer class with variables or assets, `TOPOLOGIES` the shapes of
whole graphs, `SUBCLASSED` a model with a hand-written `call`; `CASES` is all of them. `build(seed, classes)` returns a
model whose variables are all random and depend on the seed only; `inputs(n, seed)` returns arrays for it. `h5` and
`keras` say whether Keras 3.15.1 itself saves *and* loads the model in that format with equal predictions, and `REFUSED`
says why not; `tests/test_zoo.py` holds both.

Keras is imported inside functions only, so that collecting tests stays cheap.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# What Keras 3.15.1 does not save, or does not load with equal predictions.
_OPERATIONS = "the legacy loader looks for an operation among the layers: unknown, or taken for the layer of that name"
_MASK = "the mask is an operation of the graph (NotEqual), which the legacy loader looks for among the layers"
_PICKLE = "get_config holds a module (the backend), which the legacy saver cannot copy"
_VOCABULARY = "an adapted vocabulary is an asset, and the legacy format has none"
_AXES = "the legacy loader drops a list of several axes: another shape, or silently other numbers"
_TOP_LEVEL = "the legacy loader looks for a registered class of the whole model by its bare name and does not find it"
REFUSED: dict[str, dict[str, str]] = {
    ".keras": {
        "random_shear_symmetric": "writes the factors [-0.2, 0.2] and refuses negative ones when reading",
        "shared_inside_and_outside": "stored once, but loaded as two layers, and the second finds no weights",
    },
    ".h5": {
        "random_shear_symmetric": "writes the factors [-0.2, 0.2] and refuses negative ones when reading",
        "embedding_mask_zero": _MASK,
        "masking": _MASK,
        "masking_layer": _MASK,
        "dense_float8": "quantized after it was built, a layer has its weights in another order than one built so",
        "layer_normalization_axes": _AXES,
        "unit_normalization_axes": _AXES,
        "softmax_axes": _AXES,
        "attention_use_scale": "score_mode 'dot' is read as the function of that name",
        "string_lookup_adapted": _VOCABULARY,
        "string_lookup_tf_idf": _VOCABULARY,
        "integer_lookup_adapted": _VOCABULARY,
        "text_vectorization_adapted": _VOCABULARY,
        "random_brightness": _PICKLE,
        "random_color_degeneration": _PICKLE,
        "random_posterization": _PICKLE,
        "random_saturation": _PICKLE,
        "random_sharpness": _PICKLE,
        "stateless_images": _PICKLE,
        "residual_operator": _OPERATIONS,
        "operations": _OPERATIONS,
        "operation_with_an_array": _OPERATIONS,
        "operation_with_several_outputs": _OPERATIONS,
        "operation_where": _OPERATIONS,
        "operation_einsum": _OPERATIONS,
        "operations_only": _OPERATIONS,
        "attention_with_keywords": _OPERATIONS,
        "transformer": _OPERATIONS,
        "nested_twice_deep_same_names": "two weights get the same name in one group, so that saving fails",
        "bfloat16": "h5py does not write bfloat16",
        "custom_functional_model": _TOP_LEVEL,
        "subclassed": _TOP_LEVEL,
    },
}

WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "gold")


# ---- inputs


@dataclass(frozen=True)
class Spec:
    """One input: its shape without the batch, and what values it takes."""

    shape: tuple[int | None, ...]
    kind: str = "float"  # float, token (ints in 0..high-1), word, text, mask, image (0..255)
    high: int = 8
    dtype: str | None = None
    batch: int | None = None
    length: int = 5  # for axes of unknown size

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Random values, shape (n, *shape)."""
        shape = (self.batch or n, *(self.length if size is None else size for size in self.shape))
        if self.kind == "token":
            return rng.integers(0, self.high, shape).astype("int32")
        if self.kind == "word":
            return rng.choice(WORDS, shape)
        if self.kind == "text":
            return np.array([" ".join(rng.choice(WORDS, 4)) for _ in range(shape[0])])
        if self.kind == "mask":
            mask = rng.random(shape) < 0.7
            mask[..., 0] = True
            return mask
        if self.kind == "image":
            return np.round(rng.uniform(0, 255, shape)).astype("float32")
        return rng.standard_normal(shape).astype(self.dtype or "float32")

    def tensor(self, keras: Any, name: str | None = None) -> Any:
        """The symbolic input."""
        dtype = self.dtype or {"token": "int32", "word": "string", "text": "string", "mask": "bool"}.get(self.kind)
        if self.kind == "text":
            return keras.Input((), dtype=dtype, name=name)
        return keras.Input(self.shape, batch_size=self.batch, dtype=dtype, name=name)


def F(*shape: int | None, **options: Any) -> Spec:
    return Spec(shape, **options)


def tokens(*shape: int | None, high: int = 8) -> Spec:
    return Spec(shape, "token", high)


def words(*shape: int) -> Spec:
    return Spec(shape, "word")


def image(*shape: int) -> Spec:
    return Spec(shape, "image")


Specs = Spec | Sequence[Spec] | dict[str, Spec]


# ---- cases


class Bench:
    """What a recipe builds with: `b.Dense(4)` is `keras.layers.Dense(4)`; `b.rng` is seeded."""

    def __init__(self, seed: int, classes: int) -> None:
        import keras

        self.keras = keras
        self.ops = keras.ops
        self.seed = seed
        self.classes = classes
        self.rng = np.random.default_rng([seed, 1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.keras.layers, name)

    def head(self, x: Any, **options: Any) -> Any:
        """Flatten if needed, then an automatically named Dense."""
        if len(x.shape) > 2:
            x = self.keras.layers.Flatten()(x)
        return self.keras.layers.Dense(self.classes, **options)(x)

    def model(self, inputs: Any, outputs: Any, **options: Any) -> Any:
        return self.keras.Model(inputs, outputs, **options)

    @contextlib.contextmanager
    def policy(self, name: str) -> Iterator[None]:
        """Keras's global dtype policy, put back afterwards."""
        before = self.keras.config.dtype_policy()
        self.keras.config.set_dtype_policy(name)
        try:
            yield
        finally:
            self.keras.config.set_dtype_policy(before)


@dataclass(frozen=True)
class Case:
    """One kind of model."""

    name: str
    specs: Specs
    recipe: Callable[[Bench, Any], Any]
    tolerance: float = 1e-6
    # The first call makes the variables of a model without symbolic inputs.
    deferred: bool = False
    # Values of assets and configurations that come from the seed: such layers differ between sources.
    seeded_config: bool = False

    def build(self, seed: int, classes: int = 3) -> Any:
        """The model with random weights."""
        register()
        bench = Bench(seed, classes)
        if self.deferred:
            model = self.recipe(bench, None)
            if not model.built:
                model(self.inputs(1))
        else:
            inputs = self.symbolic(bench)
            made = self.recipe(bench, inputs)
            model = made if isinstance(made, bench.keras.Model) else bench.keras.Model(inputs, made)
        randomise(model, seed)
        return model

    def symbolic(self, bench: Bench) -> Any:
        if isinstance(self.specs, Spec):
            return self.specs.tensor(bench.keras)
        if isinstance(self.specs, dict):
            return {name: spec.tensor(bench.keras, name) for name, spec in self.specs.items()}
        return [spec.tensor(bench.keras) for spec in self.specs]

    def inputs(self, n: int = 4, seed: int = 0) -> Any:
        """Arrays in the structure of the model's inputs."""
        rng = np.random.default_rng([seed, 2])
        if isinstance(self.specs, Spec):
            return self.specs.draw(n, rng)
        if isinstance(self.specs, dict):
            return {name: spec.draw(n, rng) for name, spec in self.specs.items()}
        return [spec.draw(n, rng) for spec in self.specs]

    @property
    def keras(self) -> bool:
        return self.name not in REFUSED[".keras"]

    @property
    def h5(self) -> bool:
        return self.name not in REFUSED[".h5"]

    def reason(self, suffix: str) -> str:
        """Why Keras does not manage a format; empty where it does."""
        return REFUSED[suffix].get(self.name, "")

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(suffix for suffix, good in ((".keras", self.keras), (".h5", self.h5)) if good)


class LayerCase(Case):
    """A chain around one kind of layer: input, the layer, an automatically named Dense head."""


class TopologyCase(Case):
    """A shape of a whole graph."""


LAYERS: dict[str, LayerCase] = {}
TOPOLOGIES: dict[str, TopologyCase] = {}


def layer(name: str, specs: Specs, recipe: Callable[[Bench, Any], Any], **options: Any) -> None:
    """Adds a case; the head follows by itself."""
    assert name not in LAYERS
    LAYERS[name] = LayerCase(name, specs, lambda b, x: b.head(recipe(b, x)), **options)


def topology(name: str, specs: Specs, **options: Any) -> Callable[[Callable[[Bench, Any], Any]], Any]:
    """Adds a case; the recipe returns outputs or a model."""
    assert name not in TOPOLOGIES

    def add(recipe: Callable[[Bench, Any], Any]) -> Callable[[Bench, Any], Any]:
        TOPOLOGIES[name] = TopologyCase(name, specs, recipe, **options)
        return recipe

    return add


# ---- helpers


def randomise(model: Any, seed: int) -> None:
    """Gives every variable a value that follows from the seed.

    Variances stay positive; vocabularies and adapted statistics stay as they are.
    """
    rng = np.random.default_rng([seed, 3])
    adapted = {id(v) for layer in all_layers(model) if _is_adapted(layer) for v in layer.variables}
    for variable in model.variables:
        shape, dtype, name = tuple(variable.shape), str(variable.dtype), variable.path.rsplit("/", 1)[-1]
        if id(variable) in adapted:
            continue
        if dtype.startswith("uint") and "seed" in name:
            variable.assign(np.array([rng.integers(2**31), rng.integers(1000)], dtype))
        elif "int" in dtype:
            if name not in ("kernel", "embeddings", "reverse_embeddings"):
                continue
            variable.assign(rng.integers(-100, 100, shape).astype(dtype))
        else:
            variable.assign(_values(rng, shape, name))


def _values(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    if "variance" in name:
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("_scale"):
        values = rng.uniform(50, 100, shape)  # of quantized kernels
    elif name in ("gamma", "scale"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        fan_in = int(np.prod(shape[:-1])) if len(shape) > 2 else shape[0]
        values = rng.standard_normal(shape) / np.sqrt(max(fan_in, 1))
    else:
        values = 0.3 * rng.standard_normal(shape)
    return values.astype("float32")


def _is_adapted(layer: Any) -> bool:
    return type(layer).__name__ in (
        "Normalization",
        "IntegerLookup",
        "StringLookup",
        "TextVectorization",
        "Discretization",
        "STFTSpectrogram",
    )


def all_layers(model: Any) -> Iterator[Any]:
    """Every layer in a model, at any depth, wrapped ones and cells too, each once."""
    seen: set[int] = set()
    todo = [model]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if current is not model:
            yield current
        todo.extend(reversed(current._layers))


def sources(
    case: Case, n: int = 3, related: bool = False, classes: int | Sequence[int] = 3, fresh: bool = False, seed: int = 0
) -> list[Any]:
    """Models of one architecture with different weights.

    Args:
        case: what to build.
        n: how many models.
        related: whether the weights are small changes of the first model's, so that they correlate.
        classes: width of the heads, one number or one per source (repeated where too few).
        fresh: whether automatic names start anew for every model, as in files from separate processes; this clears
            Keras's global state.
        seed: of the first model; the others follow.
    """
    import keras

    widths = itertools.cycle([classes] if isinstance(classes, int) else classes)
    models: list[Any] = []
    for index, width in zip(range(n), widths, strict=False):
        if fresh:
            keras.utils.clear_session()
        model = case.build(seed + index, width)
        if related and models:
            _bring_near(model, models[0], seed + index)
        models.append(model)
    return models


def _bring_near(model: Any, base: Any, seed: int) -> None:
    rng = np.random.default_rng([seed, 4])
    for mine, theirs in zip(model.variables, base.variables, strict=True):
        if mine.shape != theirs.shape or "int" in str(mine.dtype) or "float" not in str(mine.dtype):
            continue
        values = np.asarray(theirs.numpy()).astype("float64")
        values *= 1 + 0.05 * rng.uniform(-1, 1, values.shape)  # keeps the sign, so variances stay positive
        mine.assign(values.astype("float32"))


def save(model: Any, path: str | Path, max_shard_size: float | None = None) -> Path:
    """Saves by suffix: `.h5` (legacy), `.keras`, `.weights.h5`, `.weights.json` (shards), none (a folder, unzipped)."""
    path = Path(path)
    if path.name.endswith((".weights.h5", ".weights.json")):
        model.save_weights(path, max_shard_size=max_shard_size)
    elif path.suffix:
        model.save(path)
    else:
        model.save(path, zipped=False)
    return path


def load(path: str | Path) -> Any:
    """What Keras makes of a whole-model file."""
    import keras

    register()
    return keras.models.load_model(path, compile=False)


def predictions(model: Any, inputs: Any) -> list[np.ndarray]:
    """Outputs in inference mode, flattened: lists in order, dictionaries by key. Leaves no trace in the model."""
    variables = [*model.non_trainable_variables, *_states(model)]
    state = [(variable, variable.numpy()) for variable in variables]
    outputs = model(tensors(inputs), training=False)
    for variable, value in state:
        variable.assign(value)
    return [_array(output) for output in _flatten(outputs)]


def _states(model: Any) -> list[Any]:
    """What stateful recurrent layers carry from batch to batch: no variables of the model, and not saved."""
    return [
        v
        for layer in all_layers(model)
        if getattr(layer, "stateful", False)
        for v in _flatten(getattr(layer, "states", None) or [])
    ]


def tensors(inputs: Any) -> Any:
    """Arrays as Keras takes them; only strings need a change."""
    if isinstance(inputs, dict):
        return {name: tensors(value) for name, value in inputs.items()}
    if isinstance(inputs, list):
        return [tensors(value) for value in inputs]
    if inputs.dtype.kind == "U":
        import tensorflow as tf

        return tf.constant(inputs.tolist())
    return inputs


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in _flatten(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    return [value]


def _array(tensor: Any) -> np.ndarray:
    import keras

    array = keras.ops.convert_to_numpy(tensor)
    return array.astype("float32") if str(array.dtype) in ("bfloat16", "float16") else array


# ---- LAYERS: core

layer("dense", F(6), lambda b, x: b.Dense(5, activation="relu")(x))
layer("dense_without_bias", F(6), lambda b, x: b.Dense(5, use_bias=False)(x))
layer("dense_on_sequence", F(4, 3), lambda b, x: b.Dense(5)(x))
layer("dense_regularised", F(6), lambda b, x: b.Dense(5, kernel_regularizer="l2", kernel_constraint="max_norm")(x))
layer("einsum_dense", F(4, 6), lambda b, x: b.EinsumDense("abc,cd->abd", output_shape=(4, 5), bias_axes="d")(x))
layer("einsum_dense_without_bias", F(6), lambda b, x: b.EinsumDense("ab,bc->ac", output_shape=5)(x))
layer("embedding", tokens(5), lambda b, x: b.Embedding(8, 4)(x))
layer("embedding_mask_zero", tokens(5), lambda b, x: b.GlobalAveragePooling1D()(b.Embedding(8, 4, mask_zero=True)(x)))
layer("reversible_embedding", tokens(5), lambda b, x: b.ReversibleEmbedding(8, 4)(x))
layer("reversible_embedding_untied", tokens(5), lambda b, x: b.ReversibleEmbedding(8, 4, tie_weights=False)(x))
layer("prelu", F(6), lambda b, x: b.PReLU(alpha_initializer="ones")(x))
layer("prelu_shared_axes", F(4, 4, 2), lambda b, x: b.PReLU(shared_axes=[1, 2])(x))


def _reversible_both_ways(b: Bench, x: Any) -> Any:
    embedding = b.ReversibleEmbedding(8, 4, tie_weights=False)
    return embedding(b.Dense(4)(embedding(x)), reverse=True)


layer("reversible_embedding_both_ways", tokens(5), _reversible_both_ways)


def _adapters(kind: str) -> Callable[[Bench, Any], Any]:
    def recipe(b: Bench, x: Any) -> Any:
        if kind == "embedding":
            made = b.Embedding(8, 4)
            y = made(x)
        elif kind == "einsum_dense":
            made = b.EinsumDense("ab,bc->ac", output_shape=5, bias_axes="c")
            y = made(x)
        else:
            made = b.Dense(5)
            y = made(x)
        made.enable_lora(2)
        return y

    return recipe


def _quantized(kind: str, mode: str) -> Callable[[Bench, Any], Any]:
    def recipe(b: Bench, x: Any) -> Any:
        makers = {
            "dense": lambda: b.Dense(5),
            "embedding": lambda: b.Embedding(8, 4),
            "einsum_dense": lambda: b.EinsumDense("ab,bc->ac", output_shape=5, bias_axes="c"),
        }
        made = makers[kind]()
        y = made(x)
        made.quantize(mode)
        return y

    return recipe


layer("dense_lora", F(6), _adapters("dense"))
layer("embedding_lora", tokens(5), _adapters("embedding"))
layer("einsum_dense_lora", F(6), _adapters("einsum_dense"))
layer("dense_int8", F(6), _quantized("dense", "int8"))
layer("dense_float8", F(6), _quantized("dense", "float8"))
layer("embedding_int8", tokens(5), _quantized("embedding", "int8"))
layer("einsum_dense_int8", F(6), _quantized("einsum_dense", "int8"))

# ---- LAYERS: convolutions

layer("conv1d", F(6, 3), lambda b, x: b.Conv1D(4, 3, padding="same")(x))
layer("conv1d_causal", F(6, 3), lambda b, x: b.Conv1D(4, 3, padding="causal", dilation_rate=2)(x))
layer("conv2d", F(5, 5, 2), lambda b, x: b.Conv2D(3, 3, strides=2, activation="relu")(x))
layer("conv2d_without_bias", F(5, 5, 2), lambda b, x: b.Conv2D(3, (2, 3), use_bias=False)(x))
layer("conv2d_groups", F(5, 5, 4), lambda b, x: b.Conv2D(4, 2, groups=2)(x))
layer("conv2d_lora", F(5, 5, 2), lambda b, x: _with_lora(b.Conv2D(3, 3), x))
layer("conv3d", F(3, 3, 3, 2), lambda b, x: b.Conv3D(3, 2)(x))
layer("conv1d_transpose", F(4, 3), lambda b, x: b.Conv1DTranspose(2, 3, strides=2)(x))
layer("conv2d_transpose", F(3, 3, 2), lambda b, x: b.Conv2DTranspose(3, 2, strides=2)(x))
layer("conv3d_transpose", F(2, 2, 2, 2), lambda b, x: b.Conv3DTranspose(3, 2)(x))
layer("depthwise_conv1d", F(6, 3), lambda b, x: b.DepthwiseConv1D(3, depth_multiplier=2)(x))
layer("depthwise_conv2d", F(5, 5, 2), lambda b, x: b.DepthwiseConv2D(3)(x))
layer("separable_conv1d", F(6, 3), lambda b, x: b.SeparableConv1D(4, 3)(x))
layer("separable_conv2d", F(5, 5, 2), lambda b, x: b.SeparableConv2D(4, 3, depth_multiplier=2, use_bias=False)(x))


def _with_lora(made: Any, x: Any) -> Any:
    y = made(x)
    made.enable_lora(2)
    return y


# ---- LAYERS: normalization

layer("batch_normalization", F(6), lambda b, x: b.BatchNormalization()(x))
layer("batch_normalization_without_scale", F(4, 4, 2), lambda b, x: b.BatchNormalization(scale=False)(x))
layer("batch_normalization_without_center", F(6), lambda b, x: b.BatchNormalization(center=False)(x))
layer("batch_normalization_bare", F(6), lambda b, x: b.BatchNormalization(center=False, scale=False)(x))
layer("batch_normalization_axis", F(2, 4, 4), lambda b, x: b.BatchNormalization(axis=1)(x))
layer("batch_normalization_renorm", F(6), lambda b, x: b.BatchNormalization(renorm=True)(x))
layer("layer_normalization", F(4, 6), lambda b, x: b.LayerNormalization()(x))
layer("layer_normalization_axes", F(4, 6), lambda b, x: b.LayerNormalization(axis=[1, 2])(x))
layer("layer_normalization_rms_scaling", F(6), lambda b, x: b.LayerNormalization(rms_scaling=True)(x))
layer("layer_normalization_without_center", F(6), lambda b, x: b.LayerNormalization(center=False)(x))
layer("layer_normalization_without_scale", F(6), lambda b, x: b.LayerNormalization(scale=False)(x))
layer("group_normalization", F(4, 4, 4), lambda b, x: b.GroupNormalization(groups=2)(x))
layer("group_normalization_without_scale", F(4, 4), lambda b, x: b.GroupNormalization(groups=-1, scale=False)(x))
layer("rms_normalization", F(6), lambda b, x: b.RMSNormalization()(x))
layer("unit_normalization", F(6), lambda b, x: b.UnitNormalization()(b.Dense(4)(x)))
layer("unit_normalization_axes", F(4, 6), lambda b, x: b.UnitNormalization(axis=[1, 2])(x))
layer("softmax_axes", F(4, 6), lambda b, x: b.Softmax(axis=[1, 2])(x))
layer("spectral_normalization_dense", F(6), lambda b, x: b.SpectralNormalization(b.Dense(5))(x))
layer(
    "spectral_normalization_conv",
    F(5, 5, 2),
    lambda b, x: b.SpectralNormalization(b.Conv2D(3, 3), power_iterations=2)(x),
)
layer("spectral_normalization_embedding", tokens(5), lambda b, x: b.SpectralNormalization(b.Embedding(8, 4))(x))

# ---- LAYERS: recurrent

layer("simple_rnn", F(4, 3), lambda b, x: b.SimpleRNN(4)(x))
layer("lstm", F(4, 3), lambda b, x: b.LSTM(4)(x))
layer("lstm_sequences", F(4, 3), lambda b, x: b.LSTM(4, return_sequences=True, go_backwards=True)(x))
layer("lstm_without_bias", F(4, 3), lambda b, x: b.LSTM(4, use_bias=False, unit_forget_bias=False)(x))
layer("lstm_dropout", F(4, 3), lambda b, x: b.LSTM(4, dropout=0.2, recurrent_dropout=0.2)(x))
layer("lstm_unrolled", F(3, 3), lambda b, x: b.LSTM(4, unroll=True)(x))
layer("lstm_stateful", F(4, 3, batch=2), lambda b, x: b.LSTM(4, stateful=True)(x))
layer("gru", F(4, 3), lambda b, x: b.GRU(4)(x))
layer("gru_reset_before", F(4, 3), lambda b, x: b.GRU(4, reset_after=False)(x))
layer("gru_dropout", F(4, 3), lambda b, x: b.GRU(4, dropout=0.2, return_sequences=True)(x))
layer("rnn_simple_cell", F(4, 3), lambda b, x: b.RNN(b.SimpleRNNCell(4))(x))
layer("rnn_lstm_cell", F(4, 3), lambda b, x: b.RNN(b.LSTMCell(4), return_sequences=True)(x))
layer("rnn_gru_cell", F(4, 3), lambda b, x: b.RNN(b.GRUCell(4))(x))
layer("rnn_list_of_cells", F(4, 3), lambda b, x: b.RNN([b.LSTMCell(4), b.GRUCell(3)])(x))
layer(
    "rnn_stacked_cells",
    F(4, 3),
    lambda b, x: b.RNN(b.StackedRNNCells([b.LSTMCell(4), b.SimpleRNNCell(3, dropout=0.1)]))(x),
)
layer("conv_lstm1d", F(3, 4, 2), lambda b, x: b.ConvLSTM1D(2, 2)(x))
layer("conv_lstm2d", F(3, 4, 4, 1), lambda b, x: b.ConvLSTM2D(2, 2, return_sequences=True)(x))
layer("conv_lstm2d_dropout", F(3, 4, 4, 1), lambda b, x: b.ConvLSTM2D(2, 2, dropout=0.2)(x))
layer("conv_lstm3d", F(2, 3, 3, 3, 1), lambda b, x: b.ConvLSTM3D(2, 2)(x))
layer("bidirectional", F(4, 3), lambda b, x: b.Bidirectional(b.LSTM(4))(x))
layer("bidirectional_sum", F(4, 3), lambda b, x: b.Bidirectional(b.GRU(4, return_sequences=True), merge_mode="sum")(x))
layer("bidirectional_none", F(4, 3), lambda b, x: b.Concatenate()(b.Bidirectional(b.SimpleRNN(4), merge_mode=None)(x)))
layer(
    "bidirectional_backward_layer",
    F(4, 3),
    lambda b, x: b.Bidirectional(b.LSTM(4), backward_layer=b.GRU(4, go_backwards=True))(x),
)
layer("bidirectional_rnn_cell", F(4, 3), lambda b, x: b.Bidirectional(b.RNN(b.LSTMCell(4)))(x))
layer("bidirectional_dropout", F(4, 3), lambda b, x: b.Bidirectional(b.LSTM(4, dropout=0.3))(x))
layer("time_distributed_dense", F(4, 3), lambda b, x: b.TimeDistributed(b.Dense(5))(x))
layer("time_distributed_conv", F(3, 4, 4, 1), lambda b, x: b.TimeDistributed(b.Conv2D(2, 3))(x))
layer("time_distributed_batch_normalization", F(4, 3), lambda b, x: b.TimeDistributed(b.BatchNormalization())(x))
layer("time_distributed_dropout", F(4, 3), lambda b, x: b.TimeDistributed(b.Dropout(0.3))(b.Dense(3)(x)))
layer("time_distributed_bidirectional", F(2, 4, 3), lambda b, x: b.TimeDistributed(b.Bidirectional(b.LSTM(3)))(x))


def _time_distributed_sequential(b: Bench, x: Any) -> Any:
    inner = b.keras.Sequential(
        [b.keras.Input((4, 4, 1)), b.Conv2D(2, 3), b.BatchNormalization(), b.Flatten(), b.Dense(3)]
    )
    return b.TimeDistributed(inner)(x)


def _time_distributed_functional(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((3,))
    inner = b.model(inside, b.Concatenate()([inside, b.Dense(4)(inside)]))
    return b.TimeDistributed(inner)(x)


layer("time_distributed_sequential", F(3, 4, 4, 1), _time_distributed_sequential)
layer("time_distributed_functional", F(4, 3), _time_distributed_functional)

# ---- LAYERS: attention

layer("multi_head_attention", F(4, 6), lambda b, x: b.MultiHeadAttention(2, 3)(x, x))
layer(
    "multi_head_attention_dropout",
    F(4, 6),
    lambda b, x: b.MultiHeadAttention(2, 3, value_dim=2, dropout=0.1, output_shape=5)(x, x),
)
layer(
    "multi_head_attention_without_bias",
    F(4, 6),
    lambda b, x: b.MultiHeadAttention(2, 3, use_bias=False)(x, x, use_causal_mask=True),
)
layer("multi_head_attention_axes", F(3, 2, 4), lambda b, x: b.MultiHeadAttention(2, 3, attention_axes=(1,))(x, x))
layer("group_query_attention", F(4, 6), lambda b, x: b.GroupQueryAttention(3, 4, 2)(x, x))
layer(
    "group_query_attention_gate", F(4, 6), lambda b, x: b.GroupQueryAttention(3, 4, 1, use_gate=True, dropout=0.1)(x, x)
)
layer("attention_use_scale", F(4, 6), lambda b, x: b.Attention(use_scale=True)([b.Dense(4)(x), b.Dense(4)(x)]))
layer("attention_concat", F(4, 6), lambda b, x: b.Attention(score_mode="concat", dropout=0.2)([x, x]))
layer("additive_attention", F(4, 6), lambda b, x: b.AdditiveAttention()([x, x]))

# ---- LAYERS: regularization

layer("dropout", F(6), lambda b, x: b.Dropout(0.4)(b.Dense(4)(x)))
layer("dropout_seeded", F(6), lambda b, x: b.Dropout(0.4, seed=7, noise_shape=(None, 1))(b.Dense(4)(x)))
layer("dropout_zero", F(6), lambda b, x: b.Dropout(0.0)(b.Dense(4)(x)))
layer("spatial_dropout1d", F(4, 3), lambda b, x: b.SpatialDropout1D(0.3)(x))
layer("spatial_dropout2d", F(3, 3, 2), lambda b, x: b.SpatialDropout2D(0.3)(x))
layer("spatial_dropout3d", F(2, 2, 2, 2), lambda b, x: b.SpatialDropout3D(0.3)(x))
layer("gaussian_noise", F(6), lambda b, x: b.GaussianNoise(0.3)(x))
layer("gaussian_dropout", F(6), lambda b, x: b.GaussianDropout(0.3)(x))
layer("alpha_dropout", F(6), lambda b, x: b.AlphaDropout(0.3)(x))

# ---- LAYERS: preprocessing


def _adapted_normalization(b: Bench, x: Any) -> Any:
    made = b.Normalization()
    made.adapt(b.rng.normal(2, 3, (20, 6)).astype("float32"))
    return made(x)


def _adapted_discretization(b: Bench, x: Any) -> Any:
    made = b.Discretization(num_bins=4, output_mode="one_hot")
    made.adapt(b.rng.standard_normal((50, 1)).astype("float32"))
    return made(x)


def _adapted_string_lookup(b: Bench, x: Any) -> Any:
    made = b.StringLookup(output_mode="multi_hot", max_tokens=6)
    made.adapt(tensors(b.rng.choice(WORDS, 20)))
    return made(x)


def _adapted_string_tf_idf(b: Bench, x: Any) -> Any:
    made = b.StringLookup(output_mode="tf_idf", max_tokens=6)
    made.adapt(tensors(b.rng.choice(WORDS, (10, 3))))
    return made(x)


def _adapted_text(b: Bench, x: Any) -> Any:
    made = b.TextVectorization(output_sequence_length=4)
    made.adapt(tensors(np.array([" ".join(b.rng.choice(WORDS, 5)) for _ in range(3)])))
    return b.Embedding(10, 3)(made(x))


def _adapted_integer_lookup(b: Bench, x: Any) -> Any:
    made = b.IntegerLookup(output_mode="count", max_tokens=5)
    made.adapt(b.rng.integers(0, 8, 20))
    return made(x)


layer("normalization_adapted", F(6), _adapted_normalization)
layer("normalization_given", F(6), lambda b, x: b.Normalization(mean=2.0, variance=3.0)(x))
layer("normalization_no_axis", F(6), lambda b, x: b.Normalization(axis=None, mean=1.0, variance=2.0, invert=True)(x))
layer("discretization_given", F(1), lambda b, x: b.Discretization([-0.5, 0.0, 0.7], output_mode="one_hot")(x))
layer("discretization_adapted", F(1), _adapted_discretization, seeded_config=True)
layer("string_lookup", words(3), lambda b, x: b.Embedding(9, 3)(b.StringLookup(vocabulary=list(WORDS))(x)))
layer("string_lookup_adapted", words(3), _adapted_string_lookup, seeded_config=True)
layer("string_lookup_tf_idf", words(3), _adapted_string_tf_idf, seeded_config=True)
layer("integer_lookup", tokens(3), lambda b, x: b.IntegerLookup(vocabulary=[1, 3, 5], output_mode="multi_hot")(x))
layer("integer_lookup_adapted", tokens(3), _adapted_integer_lookup, seeded_config=True)
layer(
    "text_vectorization",
    Spec((), "text"),
    lambda b, x: b.Embedding(10, 3)(b.TextVectorization(vocabulary=list(WORDS), output_sequence_length=4)(x)),
)
layer("text_vectorization_adapted", Spec((), "text"), _adapted_text, seeded_config=True)
layer("hashing", words(3), lambda b, x: b.Embedding(5, 3)(b.Hashing(5, salt=3)(x)))
layer("hashed_crossing", [words(1), words(1)], lambda b, x: b.HashedCrossing(5, output_mode="one_hot")(tuple(x)))
layer("category_encoding", tokens(3, high=4), lambda b, x: b.CategoryEncoding(4, output_mode="multi_hot")(x))
layer("rescaling", image(4, 4, 1), lambda b, x: b.Rescaling(1 / 255, offset=-0.5)(x))
layer("stft_spectrogram", F(64, 1), lambda b, x: b.STFTSpectrogram(frame_length=16, frame_step=8)(x))
layer(
    "mel_spectrogram",
    F(64),
    lambda b, x: b.MelSpectrogram(fft_length=32, sequence_stride=16, num_mel_bins=4, sampling_rate=1000, max_freq=400)(
        x
    ),
)

_AUGMENTATION: dict[str, Callable[[Bench], Any]] = {
    "aug_mix": lambda b: b.AugMix(),
    "cut_mix": lambda b: b.CutMix(),
    "mix_up": lambda b: b.MixUp(),
    "rand_augment": lambda b: b.RandAugment(),
    "random_brightness": lambda b: b.RandomBrightness(0.2),
    "random_color_degeneration": lambda b: b.RandomColorDegeneration(0.2),
    "random_color_jitter": lambda b: b.RandomColorJitter(
        brightness_factor=0.2, contrast_factor=0.2, saturation_factor=0.2, hue_factor=0.2
    ),
    "random_contrast": lambda b: b.RandomContrast(0.2),
    "random_crop": lambda b: b.RandomCrop(4, 4),
    "random_elastic_transform": lambda b: b.RandomElasticTransform(),
    "random_erasing": lambda b: b.RandomErasing(),
    "random_flip": lambda b: b.RandomFlip("horizontal"),
    "random_gaussian_blur": lambda b: b.RandomGaussianBlur(),
    "random_grayscale": lambda b: b.RandomGrayscale(),
    "random_hue": lambda b: b.RandomHue(0.2),
    "random_invert": lambda b: b.RandomInvert(),
    "random_perspective": lambda b: b.RandomPerspective(),
    "random_posterization": lambda b: b.RandomPosterization(4),
    "random_rotation": lambda b: b.RandomRotation(0.2, seed=3),
    "random_saturation": lambda b: b.RandomSaturation(0.2),
    "random_sharpness": lambda b: b.RandomSharpness(0.2),
    "random_shear": lambda b: b.RandomShear((0.1, 0.2), (0.0, 0.1)),
    "random_shear_symmetric": lambda b: b.RandomShear(0.2, 0.1),
    "random_translation": lambda b: b.RandomTranslation(0.1, 0.1),
    "random_zoom": lambda b: b.RandomZoom(0.2),
}


def _augmented(make: Callable[[Bench], Any]) -> Callable[[Bench, Any], Any]:
    return lambda b, x: b.Rescaling(1 / 255)(make(b)(x))


for _name, _make in _AUGMENTATION.items():
    layer(_name, image(4, 4, 3), _augmented(_make))

layer(
    "pipeline",
    image(4, 4, 3),
    lambda b, x: b.Rescaling(1 / 255)(b.Pipeline([b.RandomFlip(), b.RandomContrast(0.2)])(x)),
)

# What the zoo leaves out, and why.
LEFT_OUT = {
    "Layer": "base class",
    "Wrapper": "base class",
    "InputLayer": "in every case",
    "FlaxLayer": "runs code of another framework",
    "JaxLayer": "runs code of another framework",
    "TFSMLayer": "runs code of another framework",
    "TorchModuleWrapper": "runs code of another framework",
    "Lambda": "runs code from the file",
    "MaxNumBoundingBoxes": "takes bounding boxes, not tensors",
    "Equalization": "its output is its input to Keras, so that every functional model with it is a cycle",
}

# ---- TOPOLOGIES


@topology("sequential", F(6))
def _sequential(b: Bench, x: Any) -> Any:
    return b.keras.Sequential([b.keras.Input((6,)), b.Dense(5, activation="relu"), b.Dense(4), b.Dense(b.classes)])


@topology("sequential_built_late", F(6), deferred=True)
def _sequential_built_late(b: Bench, x: Any) -> Any:
    model = b.keras.Sequential([b.Dense(5, activation="relu"), b.Dense(b.classes)])
    model.build((None, 6))
    return model


@topology("sequential_called_first", F(6), deferred=True)
def _sequential_called_first(b: Bench, x: Any) -> Any:
    return b.keras.Sequential([b.Dense(5, activation="relu"), b.Dense(b.classes)])


@topology("functional_chain", F(6))
def _functional_chain(b: Bench, x: Any) -> Any:
    return b.head(b.Dense(4, activation="tanh")(b.Dense(5, activation="relu")(x)), activation="softmax")


@topology("linear_model", F(6))
def _linear_model(b: Bench, x: Any) -> Any:
    return b.head(x)


@topology("two_branches", F(6))
def _two_branches(b: Bench, x: Any) -> Any:
    return b.head(b.Concatenate()([b.Dense(3)(x), b.Dense(4)(b.Dense(5)(x))]))


@topology("residual_add_layer", F(6))
def _residual_add_layer(b: Bench, x: Any) -> Any:
    y = b.Dense(5)(x)
    return b.head(b.Add()([y, b.Dense(5, activation="relu")(y)]))


@topology("residual_operator", F(6))
def _residual_operator(b: Bench, x: Any) -> Any:
    y = b.Dense(5)(x)
    y = y + b.Dense(5, activation="relu")(y)
    return b.head(y * 0.5 - 1.0)


@topology("operations", F(4, 3))
def _operations(b: Bench, x: Any) -> Any:
    y = b.Dense(5)(x)
    first, mean = y[:, 0], b.ops.mean(y, axis=1)
    both = b.ops.concatenate([first, mean], axis=-1)
    scaled = b.ops.multiply(both, np.linspace(0.5, 1.5, 10).astype("float32"))
    return b.head(b.ops.relu(2.0 - scaled) + b.ops.reshape(b.ops.max(y, axis=1, keepdims=True), (-1, 5))[:, -1:])


@topology("operation_with_an_array", F(6))
def _operation_with_an_array(b: Bench, x: Any) -> Any:
    return b.head(b.Dense(4)(x) + np.array([0.1, 0.2, 0.3, 0.4], "float32"))


@topology("operation_with_several_outputs", F(6))
def _operation_with_several_outputs(b: Bench, x: Any) -> Any:
    left, middle, right = b.ops.split(b.Dense(6)(x), 3, axis=-1)
    return b.head(b.ops.stack([left, right], axis=1) + b.ops.expand_dims(middle, 1))


@topology("operation_where", F(6))
def _operation_where(b: Bench, x: Any) -> Any:
    y = b.Dense(4)(x)
    return b.head(b.ops.where(y > 0, y, 0.1 * y))


@topology("operation_einsum", F(4, 3))
def _operation_einsum(b: Bench, x: Any) -> Any:
    return b.head(b.ops.softmax(b.ops.einsum("abc,adc->abd", b.Dense(4)(x), b.Dense(4)(x))))


@topology("operations_only", F(6))
def _operations_only(b: Bench, x: Any) -> Any:
    return b.ops.tanh(x) + x


@topology("siamese", [F(6), F(6)])
def _siamese(b: Bench, x: Any) -> Any:
    shared = b.Dense(5, activation="relu")
    return b.head(b.Subtract()([shared(x[0]), shared(x[1])]))


@topology("shared_at_different_depths", F(5))
def _shared_at_different_depths(b: Bench, x: Any) -> Any:
    outer, inner = b.Dense(5), b.Dense(5, activation="relu")
    return b.head(outer(inner(outer(x))))


@topology("shared_activation", F(6))
def _shared_activation(b: Bench, x: Any) -> Any:
    relu = b.ReLU()
    return b.head(relu(b.Dense(4)(relu(b.Dense(5)(x)))))


@topology("nested_sequential", F(6))
def _nested_sequential(b: Bench, x: Any) -> Any:
    return b.head(b.keras.Sequential([b.keras.Input((6,)), b.Dense(5), b.BatchNormalization()])(x))


@topology("nested_sequential_without_input", F(6))
def _nested_sequential_without_input(b: Bench, x: Any) -> Any:
    return b.head(b.keras.Sequential([b.Dense(5), b.Dropout(0.3), b.Dense(4)])(x))


@topology("sequential_of_models", F(6))
def _sequential_of_models(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((6,))
    first = b.model(inside, b.Dense(5)(inside))
    second = b.keras.Sequential([b.Dense(4), b.ReLU()])
    return b.keras.Sequential([b.keras.Input((6,)), first, second, b.Dense(b.classes)])


@topology("nested_functional", F(6))
def _nested_functional(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((5,))
    y = b.Dense(5, activation="relu")(inside)
    inner = b.model(inside, b.Add()([inside, y]))
    return b.head(inner(b.Dense(5)(x)))


@topology("nested_several_outputs", F(6))
def _nested_several_outputs(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((6,))
    inner = b.model(inside, [b.Dense(4)(inside), b.Dense(3)(inside)])
    left, right = inner(x)
    return b.head(b.Concatenate()([right, left]))


@topology("nested_several_inputs", [F(6), F(4)])
def _nested_several_inputs(b: Bench, x: Any) -> Any:
    left, right = b.keras.Input((6,)), b.keras.Input((4,))
    inner = b.model([left, right], b.Concatenate()([b.Dense(3)(left), b.Dense(2)(right)]))
    return b.head(inner([b.Dense(6)(x[0]), x[1]]))


@topology("nested_dictionaries", F(6))
def _nested_dictionaries(b: Bench, x: Any) -> Any:
    left, right = b.keras.Input((6,), name="left"), b.keras.Input((4,), name="right")
    inner = b.model({"left": left, "right": right}, {"sum": b.Dense(3)(left), "other": b.Dense(2)(right)})
    y = inner({"left": x, "right": b.Dense(4)(x)})
    return b.head(b.Concatenate()([y["sum"], y["other"]]))


@topology("nested_twice_deep_same_names", F(5))
def _nested_twice_deep_same_names(b: Bench, x: Any) -> Any:
    def chain(*middle: Any) -> Any:
        return b.keras.Sequential(
            [b.keras.Input((5,)), b.Dense(5, name="dense"), *middle, b.Dense(5, name="dense_1")], name="sequential"
        )

    return b.head(chain(chain())(b.Dense(5, name="dense")(x)), name="dense_1")


@topology("nested_shared", [F(6), F(6)])
def _nested_shared(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((6,))
    tower = b.model(inside, b.Dense(4)(b.LayerNormalization()(inside)))
    return b.head(b.Multiply()([tower(x[0]), tower(x[1])]))


@topology("nested_called_in_a_row", F(5))
def _nested_called_in_a_row(b: Bench, x: Any) -> Any:
    inner = b.keras.Sequential([b.keras.Input((5,)), b.Dense(5, activation="tanh"), b.Dense(5)])
    return b.head(inner(inner(x)))


@topology("transfer_learning", F(6))
def _transfer_learning(b: Bench, x: Any) -> Any:
    base = b.keras.Sequential([b.keras.Input((6,)), b.Dense(5), b.BatchNormalization(), b.Dropout(0.2), b.Dense(4)])
    base.trainable = False
    return b.head(base(x, training=False))


@topology(
    "shared_inside_and_outside",
    F(5),
)
def _shared_inside_and_outside(b: Bench, x: Any) -> Any:
    shared = b.Dense(5, activation="relu")
    inner = b.keras.Sequential([b.keras.Input((5,)), shared, b.Dense(5)])
    return b.head(shared(inner(x)))


@topology("model_on_intermediate_tensors", F(6))
def _model_on_intermediate_tensors(b: Bench, x: Any) -> Any:
    y = b.Dense(4)(b.Dense(5)(x))
    whole = b.model(x, b.Dense(7)(y))
    return b.model(whole.inputs, b.head(whole.layers[-2].output))


@topology("several_inputs", [F(6), F(4, 2)])
def _several_inputs(b: Bench, x: Any) -> Any:
    return b.head(b.Concatenate()([b.Dense(4)(x[0]), b.Flatten()(b.Conv1D(2, 2)(x[1]))]))


@topology("inputs_dictionary", {"signal": F(6), "colour": tokens(2)})
def _inputs_dictionary(b: Bench, x: Any) -> Any:
    return b.head(b.Concatenate()([b.Dense(4)(x["signal"]), b.Flatten()(b.Embedding(8, 2)(x["colour"]))]))


@topology("outputs_list", F(6))
def _outputs_list(b: Bench, x: Any) -> Any:
    y = b.Dense(5, activation="relu")(x)
    return [b.head(y), b.Dense(2)(y)]


@topology("outputs_list_of_one", F(6))
def _outputs_list_of_one(b: Bench, x: Any) -> Any:
    return [b.head(b.Dense(5)(x))]


@topology("outputs_dictionary", F(6))
def _outputs_dictionary(b: Bench, x: Any) -> Any:
    y = b.Dense(5, activation="relu")(x)
    return {"zebra": b.head(y), "ant": b.Dense(2)(y)}


@topology("outputs_nested_structure", F(6))
def _outputs_nested_structure(b: Bench, x: Any) -> Any:
    y = b.Dense(5, activation="relu")(x)
    return {"classes": b.head(y), "more": [b.Dense(2)(y), b.Dense(1)(y)]}


@topology("output_of_an_intermediate_tensor", F(6))
def _output_of_an_intermediate_tensor(b: Bench, x: Any) -> Any:
    y = b.Dense(5, activation="relu")(x)
    return [y, b.head(y)]


@topology("output_twice", F(6))
def _output_twice(b: Bench, x: Any) -> Any:
    y = b.head(x)
    return [y, y]


@topology("input_is_an_output", F(6))
def _input_is_an_output(b: Bench, x: Any) -> Any:
    return [x, b.head(x)]


@topology("unused_input", [F(6), F(4)])
def _unused_input(b: Bench, x: Any) -> Any:
    return b.head(b.Dense(5)(x[0]))


@topology("states_used_partly", F(4, 3))
def _states_used_partly(b: Bench, x: Any) -> Any:
    _, _, memory = b.LSTM(4, return_state=True, return_sequences=True)(x)
    return b.head(memory)


@topology("initial_state", [F(4, 3), F(4), F(4)])
def _initial_state(b: Bench, x: Any) -> Any:
    return b.head(b.LSTM(4)(x[0], initial_state=[x[1], b.Dense(4)(x[2])]))


@topology("encoder_decoder", [F(4, 3), F(3, 2)])
def _encoder_decoder(b: Bench, x: Any) -> Any:
    _, *states = b.Bidirectional(b.GRU(3, return_state=True))(x[0])
    return b.TimeDistributed(b.Dense(b.classes))(
        b.GRU(6, return_sequences=True)(x[1], initial_state=b.Concatenate()(states))
    )


@topology("attention_with_keywords", [F(4, 6), F(3, 5)])
def _attention_with_keywords(b: Bench, x: Any) -> Any:
    y = b.MultiHeadAttention(2, 3)(x[0], x[1], key=b.Dense(5)(x[1]))
    return b.head(b.LayerNormalization()(y + x[0]))


@topology("attention_mask", [F(4, 6), Spec((4, 4), "mask")])
def _attention_mask(b: Bench, x: Any) -> Any:
    return b.head(b.MultiHeadAttention(2, 3)(query=x[0], value=x[0], attention_mask=x[1]))


@topology("attention_scores", F(4, 6))
def _attention_scores(b: Bench, x: Any) -> Any:
    y, scores = b.MultiHeadAttention(2, 3)(x, x, return_attention_scores=True)
    return [b.head(y), scores]


@topology("masking", tokens(6, high=4))
def _masking(b: Bench, x: Any) -> Any:
    return b.head(b.LSTM(4)(b.Embedding(4, 3, mask_zero=True)(x)))


@topology("masking_layer", F(4, 2))
def _masking_layer(b: Bench, x: Any) -> Any:
    return b.head(b.GRU(4)(b.Masking(0.0)(b.ReLU()(x))))


@topology("explicit_mask", [F(4, 3), Spec((4,), "mask")])
def _explicit_mask(b: Bench, x: Any) -> Any:
    return b.head(b.LSTM(4)(x[0], mask=x[1]))


@topology("transformer", tokens(6))
def _transformer(b: Bench, x: Any) -> Any:
    y = b.Embedding(8, 4)(x)
    y = b.LayerNormalization()(y + b.MultiHeadAttention(2, 2, dropout=0.1)(y, y))
    y = b.LayerNormalization()(y + b.Dense(4)(b.Dense(8, activation="gelu")(y)))
    return b.head(b.GlobalAveragePooling1D()(y))


@topology("autoencoder", F(6))
def _autoencoder(b: Bench, x: Any) -> Any:
    encoder = b.keras.Sequential([b.keras.Input((6,)), b.Dense(3, activation="relu"), b.Dense(2)], name="encoder")
    decoder = b.keras.Sequential([b.keras.Input((2,)), b.Dense(3, activation="relu"), b.Dense(6)], name="decoder")
    return decoder(encoder(x))


@topology("branch_names_out_of_order", F(6))
def _branch_names_out_of_order(b: Bench, x: Any) -> Any:
    names = ("zeta", "alpha", "mu", "Beta", "delta", "a10", "a9")
    return b.head(b.Concatenate()([b.Dense(2, name=name)(x) for name in names]), name="aa_head")


@topology("names_cross_ten", F(5))
def _names_cross_ten(b: Bench, x: Any) -> Any:
    for index in range(7, 13):
        x = b.Dense(5, activation="tanh", name=f"dense_{index}")(x)
    return b.head(x, name="dense_13")


@topology("automatic_names_cross_ten", F(5))
def _automatic_names_cross_ten(b: Bench, x: Any) -> Any:
    for _ in range(12):
        x = b.Dense(5, activation="tanh")(x)
    return b.head(x)


@topology("odd_names", F(6))
def _odd_names(b: Bench, x: Any) -> Any:
    y = b.Dense(5, name="my first layer")(x)
    y = b.Dense(5, name="größe_層")(y)
    y = b.Dense(5, name="a.b:0\\c%20<d>'\"")(y)
    return b.head(y, name="Head-1")


@topology("mixed_precision", F(6), tolerance=1e-3)
def _mixed_precision(b: Bench, x: Any) -> Any:
    with b.policy("mixed_float16"):
        y = b.BatchNormalization()(b.Dense(5, activation="relu")(x))
        return b.head(y, dtype="float32")


@topology("mixed_bfloat16", F(6), tolerance=1e-2)
def _mixed_bfloat16(b: Bench, x: Any) -> Any:
    with b.policy("mixed_bfloat16"):
        return b.head(b.Dense(5, activation="relu")(x))


@topology("bfloat16", F(6), tolerance=1e-2)
def _bfloat16(b: Bench, x: Any) -> Any:
    return b.head(b.BatchNormalization(dtype="bfloat16")(b.Dense(5, dtype="bfloat16")(x)), dtype="bfloat16")


@topology("float16", F(6), tolerance=1e-3)
def _float16(b: Bench, x: Any) -> Any:
    return b.head(b.LayerNormalization(dtype="float16")(b.Dense(5, dtype="float16")(x)), dtype="float16")


@topology("float64", F(6, dtype="float64"))
def _float64(b: Bench, x: Any) -> Any:
    return b.head(b.BatchNormalization(dtype="float64")(b.Dense(5, dtype="float64")(x)), dtype="float64")


@topology("dropout_within", F(6))
def _dropout_within(b: Bench, x: Any) -> Any:
    y = b.Dropout(0.2)(b.Dense(5, activation="relu")(x))
    return b.head(b.Dropout(0.5)(b.Dense(4, activation="relu")(y)), activation="softmax")


@topology("frozen_layer", F(6))
def _frozen_layer(b: Bench, x: Any) -> Any:
    y = b.Dense(5, trainable=False)(b.Dense(6)(x))
    return b.head(b.BatchNormalization(trainable=False)(y))


@topology("deep_chain", F(4))
def _deep_chain(b: Bench, x: Any) -> Any:
    for _ in range(24):
        x = b.Dense(4)(x)
    return b.head(x)


@topology("deep_residual", F(4))
def _deep_residual(b: Bench, x: Any) -> Any:
    for _ in range(12):
        x = b.Add()([x, b.Dense(4, activation="relu")(x)])
    return b.head(x)


@topology("densely_connected", F(4))
def _densely_connected(b: Bench, x: Any) -> Any:
    for _ in range(4):
        x = b.Concatenate()([x, b.Dense(3, activation="relu")(x)])
    return b.head(x)


@topology("conv_net", F(8, 8, 1))
def _conv_net(b: Bench, x: Any) -> Any:
    y = b.MaxPooling2D()(b.Conv2D(2, 3, activation="relu")(x))
    y = b.Conv2D(3, 2, activation="relu")(y)
    return b.head(b.Dropout(0.3)(b.Dense(4)(b.Flatten()(y))), activation="softmax")


@topology("conv_net_any_size", F(None, None, 2, length=6))
def _conv_net_any_size(b: Bench, x: Any) -> Any:
    y = b.BatchNormalization()(b.Conv2D(3, 3, use_bias=False)(x))
    return b.head(b.GlobalAveragePooling2D()(b.ReLU()(y)))


@topology("channels_first", F(2, 5, 5))
def _channels_first(b: Bench, x: Any) -> Any:
    y = b.BatchNormalization(axis=1)(b.Conv2D(3, 3, data_format="channels_first")(x))
    return b.head(b.GlobalAveragePooling2D(data_format="channels_first")(y))


@topology("u_net", F(8, 8, 1))
def _u_net(b: Bench, x: Any) -> Any:
    down = b.Conv2D(2, 3, padding="same", activation="relu")(x)
    deep = b.Conv2D(3, 3, padding="same", activation="relu")(b.MaxPooling2D()(down))
    up = b.Conv2DTranspose(2, 2, strides=2)(deep)
    return b.Conv2D(b.classes, 1)(b.Concatenate()([down, up]))


@topology("global_average_pooling_head", F(6, 3))
def _global_average_pooling_head(b: Bench, x: Any) -> Any:
    return b.GlobalAveragePooling1D()(b.Conv1D(b.classes, 3)(x))


@topology("custom_layer", F(6))
def _custom_layer(b: Bench, x: Any) -> Any:
    return b.head(register().Scaled(5)(x))


@topology("custom_block", F(6))
def _custom_block(b: Bench, x: Any) -> Any:
    return b.head(register().Block(5, 2)(x))


@topology("custom_layer_in_nested", F(6))
def _custom_layer_in_nested(b: Bench, x: Any) -> Any:
    return b.head(b.keras.Sequential([b.keras.Input((6,)), register().Block(5, 1), b.Dense(4)])(x))


@topology("custom_functional_model", F(6))
def _custom_functional_model(b: Bench, x: Any) -> Any:
    return register().Trained(inputs=x, outputs=b.head(b.Dense(5, activation="relu")(x)))


@topology("nested_custom_functional_model", F(6))
def _nested_custom_functional_model(b: Bench, x: Any) -> Any:
    inside = b.keras.Input((6,))
    return b.head(register().Trained(inputs=inside, outputs=b.Dense(5)(inside))(x))


@topology("nested_subclassed", F(6))
def _nested_subclassed(b: Bench, x: Any) -> Any:
    return b.head(register().Handwritten(4)(x))


@topology("stateless_1d", F(12, 3))
def _stateless_1d(b: Bench, x: Any) -> Any:
    # AdaptiveMaxPooling to a single cell ends the process with a floating point exception on TensorFlow.
    y = b.Cropping1D(1)(b.ZeroPadding1D(2)(b.UpSampling1D(2)(x)))
    y = b.AveragePooling1D(2)(b.MaxPooling1D(2)(b.Permute((1, 2))(y)))
    pooled = [b.GlobalMaxPooling1D()(y), b.GlobalAveragePooling1D()(y), b.Flatten()(b.AdaptiveAveragePooling1D(1)(y))]
    pooled.append(b.Flatten()(b.GlobalMaxPooling1D()(b.Reshape((-1, 3))(b.AdaptiveMaxPooling1D(2)(y)))))
    y = b.Dot(axes=1)([b.Average()(pooled), b.Maximum()(pooled)])
    return b.head(b.Concatenate()([b.Flatten()(b.RepeatVector(2)(y)), b.Minimum()(pooled)]))


@topology("stateless_2d", F(6, 6, 2))
def _stateless_2d(b: Bench, x: Any) -> Any:
    y = b.Cropping2D(1)(b.ZeroPadding2D(1)(b.UpSampling2D(2)(x)))
    y = b.AveragePooling2D(2)(b.MaxPooling2D(2)(b.Resizing(8, 8)(b.CenterCrop(6, 6)(y))))
    pooled = [b.GlobalMaxPooling2D()(y), b.GlobalAveragePooling2D()(y), b.Flatten()(b.AdaptiveAveragePooling2D(1)(y))]
    return b.head(
        b.Add()([*pooled, b.Flatten()(b.GlobalMaxPooling1D()(b.Reshape((-1, 2))(b.AdaptiveMaxPooling2D(2)(y))))])
    )


@topology("stateless_3d", F(4, 4, 4, 2))
def _stateless_3d(b: Bench, x: Any) -> Any:
    y = b.Cropping3D(1)(b.ZeroPadding3D(1)(b.UpSampling3D(2)(x)))
    y = b.AveragePooling3D(2)(b.MaxPooling3D(2)(y))
    pooled = [b.GlobalMaxPooling3D()(y), b.GlobalAveragePooling3D()(y), b.Flatten()(b.AdaptiveAveragePooling3D(1)(y))]
    return b.head(
        b.Add()([*pooled, b.Flatten()(b.GlobalMaxPooling1D()(b.Reshape((-1, 2))(b.AdaptiveMaxPooling3D(2)(y))))])
    )


@topology("stateless_activations", F(6))
def _stateless_activations(b: Bench, x: Any) -> Any:
    y = b.ActivityRegularization(l2=0.1)(b.Dense(4)(x))
    y = b.Concatenate()(
        [b.ELU()(y), b.LeakyReLU()(y), b.ReLU(6.0)(y), b.Softmax()(y), b.Activation("swish")(y), b.Identity()(y)]
    )
    return b.head(b.Reshape((4, 6))(y))


@topology("stateless_images", image(4, 4, 3))
def _stateless_images(b: Bench, x: Any) -> Any:
    y = b.Solarization()(b.AutoContrast()(x))
    return b.head(b.Rescaling(1 / 255)(b.ContrastLimitedAdaptiveHistogramEqualization(tile_grid_size=(2, 2))(y)))


# ---- SUBCLASSED

SUBCLASSED = TopologyCase(
    "subclassed",
    F(6),
    lambda b, x: register().Handwritten(b.classes),
    deferred=True,
)


@functools.cache
def register() -> SimpleNamespace:
    """The custom classes of the zoo, registered with Keras once."""
    import keras

    serializable = keras.saving.register_keras_serializable("zoo")

    @serializable
    class Scaled(keras.layers.Layer):
        """A kernel, a bias and a counter that no gradient moves."""

        def __init__(self, units: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.units = units

        def build(self, input_shape: Any) -> None:
            self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
            self.offset = self.add_weight(shape=(self.units,), name="offset")
            self.counter = self.add_weight(
                shape=(), name="counter", dtype="int32", initializer="zeros", trainable=False
            )

        def call(self, inputs: Any) -> Any:
            return keras.ops.matmul(inputs, self.kernel) + self.offset

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "units": self.units}

    @serializable
    class Block(keras.layers.Layer):
        """Sub-layers as attributes and in a list, beside a weight of its own."""

        def __init__(self, units: int, depth: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.units, self.depth = units, depth
            self.first = keras.layers.Dense(units)
            self.chain = [keras.layers.Dense(units, activation="relu") for _ in range(depth)]
            self.norm = keras.layers.BatchNormalization()
            self.drop = keras.layers.Dropout(0.2)

        def build(self, input_shape: Any) -> None:
            inner = (*input_shape[:-1], self.units)
            self.first.build(input_shape)
            for part in (*self.chain, self.norm):
                part.build(inner)
            self.gain = self.add_weight(shape=(self.units,), name="gain")

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            y = self.first(inputs)
            for part in self.chain:
                y = y + part(y)
            return self.drop(self.norm(y, training=training), training=training) * self.gain

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "units": self.units, "depth": self.depth}

    @serializable
    class Trained(keras.Model):
        """A functional model that only has its own way of training."""

        def train_step(self, data: Any) -> Any:
            return super().train_step(data)

    @serializable
    class Handwritten(keras.Model):
        """A model with a graph that only its code knows."""

        def __init__(self, classes: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.classes = classes
            self.stem = keras.layers.Dense(5, activation="relu")
            self.blocks = [keras.layers.Dense(5), keras.layers.BatchNormalization()]
            self.out = keras.layers.Dense(classes)

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            y = self.stem(inputs)
            y = y + self.blocks[1](self.blocks[0](y), training=training)
            return self.out(y)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "classes": self.classes}

    return SimpleNamespace(Scaled=Scaled, Block=Block, Trained=Trained, Handwritten=Handwritten)


CASES: dict[str, Case] = {**LAYERS, **TOPOLOGIES, "subclassed": SUBCLASSED}
