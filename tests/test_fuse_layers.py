"""Fusion, layer by layer: a permuted twin gives the original function, unrelated sources a model that works."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from test_align import twin_of

from kmerge.align import PermutedTensor
from kmerge.assembly import assemble
from kmerge.calibration.enrich import crossed
from kmerge.calibration.inputs import Inputs
from kmerge.engine import merge_tensors
from kmerge.errors import MergeError, PlanError
from kmerge.fuse.attention import choose_groups
from kmerge.fuse.blend import blended
from kmerge.fuse.design import agrees, linear_rows
from kmerge.fuse.model import Fusion, _gives_one_row, fuse_models
from kmerge.fuse.ridge import Regression
from kmerge.fuse.sensitivity import sensitivities
from kmerge.fuse.units import samples_of
from kmerge.layout import lay_out
from kmerge.output import create_output
from kmerge.planning import make_plan
from kmerge.progress import silent
from kmerge.rules import Rules
from kmerge.source import Source, open_source
from kmerge.spaces import derive_spaces
from kmerge.surgery import merge_graphs

ROWS = 64


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without more inputs and without blends, which cost most of the time and have a test of their own."""
    monkeypatch.setattr("kmerge.fuse.model.ENOUGH", 0)
    monkeypatch.setattr("kmerge.fuse.model.ENOUGH_FOR_DENSE", 0)
    monkeypatch.setattr("kmerge.fuse.model.samples_of", lambda *_: None)
    monkeypatch.setattr("kmerge.fuse.model.sensitivities", lambda *_: {})


def F(*shape: int) -> zoo.Spec:
    return zoo.F(*shape)


def case_of(name: str, recipe: Callable[..., Any], *specs: zoo.Spec) -> zoo.Case:
    return zoo.TopologyCase(name, list(specs), lambda b, x: recipe(b, *x))


def opened(case: zoo.Case, stack: ExitStack, suffix: str = ".keras", seed: int = 1) -> tuple[Source, Path]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = zoo.save(case.build(seed), folder / f"a{suffix}")
    return stack.enter_context(open_source(path, "a")), path


def stranger(source: Source, label: str, seed: int) -> Source:
    """The same network with other weights: the numbers of each weight in another order."""
    rng = np.random.default_rng(seed)
    states = []
    for state in source.states:
        weights = list(state.weights)
        for place, weight in enumerate(weights):
            tensor = weight.tensor
            if tensor.dtype.startswith(("float", "bfloat")) and tensor.size > 1 and not state.assets:
                values = rng.permutation(tensor.read().ravel())
                facts = (tensor.shape, tensor.dtype, tensor.size, tensor.nbytes, tensor.where)
                made = PermutedTensor(*facts, partial(np.asarray, values), original=tensor)
                weights[place] = replace(weight, tensor=made)
        states.append(replace(state, weights=tuple(weights)))
    return replace(source, label=label, states=tuple(states))


def flat(inputs: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(zoo.tensors(array)) for array in zoo._flatten(inputs))


def fused(sources: Sequence[Source], inputs: Any, **rules: Any) -> tuple[Fusion, Any]:
    """A fusion, and the live model that Keras makes of its file."""
    arrays = flat(inputs)
    plan = make_plan(sources, Rules(method="fuse", **rules))
    with tempfile.TemporaryDirectory() as folder:
        given = Inputs(arrays, np.full(len(arrays[0]), -1))
        fusion = fuse_models(lay_out(sources), plan, given, Path(folder), silent)
        assembly = assemble(fusion.merged, sources, fusion.values)
        path = Path(folder) / ("out.h5" if sources[0].kind.value == "h5" else "out.keras")
        with create_output(assembly, path, True, dict) as output:
            merge_tensors(sources, assembly.targets, output, plan.weights)
        return fusion, zoo.load(path)


def error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference, in shares of the largest number."""
    return max(
        float(np.max(np.abs(a - b), initial=0)) / max(float(np.max(np.abs(b), initial=0)), 1e-6)
        for a, b in zip(found, expected, strict=True)
    )


def by_source(outputs: list[np.ndarray], sources: int) -> list[list[np.ndarray]]:
    each = len(outputs) // sources
    return [outputs[start : start + each] for start in range(0, len(outputs), each)]


# ---- twins


def _joined(names: str) -> zoo.Case:
    """Several cases of the zoo side by side in one model."""
    cases = [zoo.LAYERS[name] for name in names.split()]

    def recipe(b: Any, *given: Any) -> Any:
        return [case.recipe(b, x) for case, x in zip(cases, given, strict=True)]

    return case_of("joined", recipe, *(case.specs for case in cases))


TWINS: dict[str, zoo.Case] = {
    "zoo core": _joined("dense dense_without_bias dense_on_sequence einsum_dense einsum_dense_without_bias"),
    "zoo embeddings": _joined("embedding embedding_mask_zero reversible_embedding reversible_embedding_untied"),
    "zoo convolutions": _joined(
        "conv1d conv1d_causal conv2d conv2d_without_bias conv2d_groups conv3d separable_conv1d separable_conv2d"
    ),
    "zoo transposed": _joined("conv1d_transpose conv2d_transpose conv3d_transpose"),
    "zoo adapters": _joined("dense_lora embedding_lora einsum_dense_lora conv2d_lora"),
    "zoo wrapped": _joined(
        "time_distributed_dense time_distributed_conv spectral_normalization_dense spectral_normalization_conv"
    ),
    "zoo heads": _joined(
        "multi_head_attention multi_head_attention_dropout multi_head_attention_without_bias multi_head_attention_axes "
        "group_query_attention group_query_attention_gate"
    ),
    "zoo attention": _joined("attention_use_scale unit_normalization dropout"),
}


def twin(name: str, *specs: zoo.Spec) -> Callable[[Callable[..., Any]], Any]:
    def add(recipe: Callable[..., Any]) -> Callable[..., Any]:
        TWINS[name] = case_of(name, recipe, *specs)
        return recipe

    return add


@twin("norms of a sum", F(5))
def _norms(b: Any, x: Any) -> Any:
    y = b.Add()([b.Dense(6, activation="relu")(x), b.Dense(6, activation="tanh")(x)])
    made = [
        b.BatchNormalization()(y),
        b.BatchNormalization(scale=False)(y),
        b.BatchNormalization(center=False)(y),
        b.LayerNormalization()(y),
        b.LayerNormalization(center=False)(y),
        b.RMSNormalization()(y),
        b.PReLU()(y),
    ]
    return [b.head(b.ReLU()(one)) for one in made]


@twin("norms of images", F(5, 5, 2))
def _norms_of_images(b: Any, x: Any) -> Any:
    y = b.Concatenate()([b.Conv2D(4, 3, activation="relu")(x), b.Conv2D(2, 3, activation="tanh")(x)])
    turned = b.Permute((3, 1, 2))(y)
    made = [
        b.BatchNormalization()(y),
        b.BatchNormalization(axis=1)(turned),
        b.GroupNormalization(groups=-1)(y),
        b.GroupNormalization(groups=1)(y),
        b.LayerNormalization(axis=[1, 2, 3])(y),
        b.PReLU(shared_axes=[1, 2])(y),
    ]
    return [b.head(b.ReLU()(one)) for one in made]


@twin("groups", F(5, 5, 2))
def _groups(b: Any, x: Any) -> Any:
    y = b.Conv2D(6, 2, activation="relu")(x)
    y = b.GroupNormalization(groups=2)(b.Conv2D(4, 2, groups=2, dilation_rate=2)(y))
    return b.head(b.ReLU()(y))


@twin("depthwise", F(6, 6, 2))
def _depthwise(b: Any, x: Any) -> Any:
    y = b.BatchNormalization()(b.DepthwiseConv2D(3, depth_multiplier=2)(b.Conv2D(4, 1, activation="relu")(x)))
    y = b.SeparableConv2D(5, 2, depth_multiplier=2, strides=2, activation="relu")(b.ReLU()(y))
    return b.head(b.GlobalAveragePooling2D()(y))


@twin("transposed", F(4, 4, 2))
def _transposed(b: Any, x: Any) -> Any:
    y = b.Conv2D(4, 2, activation="relu")(x)
    y = b.BatchNormalization()(b.Conv2DTranspose(3, 3, strides=2, output_padding=1)(y))
    y = b.Conv2DTranspose(3, 3, strides=2, padding="same", output_padding=1)(b.ReLU()(y))
    return b.head(b.GlobalAveragePooling2D()(b.ReLU()(y)))


@twin("einsum with several axes", F(4, 6))
def _einsum(b: Any, x: Any) -> Any:
    y = b.EinsumDense("abc,cde->abde", output_shape=(4, 2, 3), bias_axes="de", activation="relu")(x)
    z = b.EinsumDense("...c,cd->...d", output_shape=5, bias_axes="d", activation="relu")(x)
    w = b.EinsumDense("abc,bcd->abd", output_shape=(4, 3), bias_axes="bd", activation="relu")(z)
    return [b.head(b.EinsumDense("abde,def->abf", output_shape=(4, 5), bias_axes="f")(y)), b.head(w)]


@twin("steps", F(4, 3))
def _steps(b: Any, x: Any) -> Any:
    y = b.TimeDistributed(b.Dense(5, activation="tanh"))(x)
    y = b.TimeDistributed(b.BatchNormalization())(b.TimeDistributed(b.Dense(4))(y))
    z = b.TimeDistributed(b.LayerNormalization())(b.Conv1D(4, 2, padding="causal", activation="relu")(y))
    return b.head(b.Add()([y, z]))


@twin("attention in a stream", F(4, 6))
def _stream(b: Any, x: Any) -> Any:
    y = b.Dense(6)(x)
    y = b.LayerNormalization()(b.Add()([y, b.MultiHeadAttention(3, 2)(y, y)]))
    y = b.LayerNormalization()(b.Add()([y, b.GroupQueryAttention(2, 4, 2)(y, y, use_causal_mask=True)]))
    y = b.Add()([y, b.Dense(6)(b.Dense(8, activation="gelu")(y))])
    return b.head(b.GlobalAveragePooling1D()(y))


@twin("scores", F(4, 6))
def _scores(b: Any, x: Any) -> Any:
    y, z = b.Dense(5)(x), b.Dense(5)(x)
    return [b.head(b.AdditiveAttention()([y, z])), b.head(b.Attention(score_mode="concat")([z, y]))]


@twin("branches and sums", F(6))
def _branches(b: Any, x: Any) -> Any:
    y = b.Dense(5, activation="relu")(x)
    y = b.Add()([b.Dense(4, use_bias=False)(y), b.BatchNormalization()(b.Dense(4)(b.Dense(7, activation="elu")(y)))])
    return b.head(b.Concatenate()([b.ReLU()(y), b.Dense(3, activation="sigmoid")(y), x]))


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_gives_the_original_function(name: str) -> None:
    case = TWINS[name]
    with ExitStack() as stack:
        source, path = opened(case, stack)
        assert any(not space.fixed and space.size > 1 for space in derive_spaces(source))
        inputs = case.inputs(ROWS)
        fusion, model = fused([source, twin_of(source, "b")], inputs, trunk="all")
        expected = zoo.predictions(zoo.load(path), inputs)
        for outputs in by_source(zoo.predictions(model, inputs), 2 if len(fusion.merged.heads["a"]) == 0 else 1):
            assert error(outputs, expected) < 1e-4
        assert all(found.value > 0.999 for found in fusion.agreements)


@pytest.mark.parametrize("name", ["attention in a stream", "steps"])
def test_a_twin_from_an_old_file_too(name: str) -> None:
    """There the weights of layers inside a layer are known by their order alone."""
    with ExitStack() as stack:
        source, path = opened(TWINS[name], stack, ".h5")
        inputs = TWINS[name].inputs(ROWS)
        _, model = fused([source, twin_of(source, "b")], inputs, trunk="all")
        assert error(zoo.predictions(model, inputs), zoo.predictions(zoo.load(path), inputs)) < 1e-4


# ---- unrelated sources

_NO_FREEDOM = {
    "channels_first": "TensorFlow does not run it on a processor",
    "subclassed": "no graph",
    "shared_inside_and_outside": "Keras loads its one layer as two",
}
_DISSOLVED = {  # what is fused is another network of the zoo
    "nested_dictionaries",
    "nested_functional",
    "nested_sequential",
    "nested_sequential_without_input",
    "nested_several_inputs",
    "nested_several_outputs",
    "nested_twice_deep_same_names",
    "sequential_built_late",
    "sequential_called_first",
    "sequential_of_models",
    "transfer_learning",
}
_ALIKE = {  # differs in what fusion does not look at: names, structures of inputs and outputs, length
    "automatic_names_cross_ten",
    "branch_names_out_of_order",
    "deep_chain",
    "frozen_layer",
    "inputs_dictionary",
    "masking_layer",
    "names_cross_ten",
    "odd_names",
    "outputs_dictionary",
    "outputs_list",
    "outputs_list_of_one",
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in zoo.TOPOLOGIES.items()
        if case.formats and name not in {*_NO_FREEDOM, *_DISSOLVED, *_ALIKE}
    ],
)
def test_strangers_make_a_model_that_works(name: str) -> None:
    strangers_work(zoo.TOPOLOGIES[name], 2)


@pytest.mark.parametrize("name", ["conv_net", "several_inputs", "masking"])
def test_three_strangers_with_all_that_fusion_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More inputs are made of those that are given, and units are blended where what follows them is known."""
    blends, made = [], []

    def blending(*given: Any) -> Any:
        blends.append(given)
        return blended(*given)

    def crossing(inputs: Inputs, rows: int, *given: Any) -> Inputs:
        made.append(crossed(inputs, rows, *given))
        return made[-1]

    monkeypatch.setattr("kmerge.fuse.model.ENOUGH", 2 * ROWS)
    monkeypatch.setattr("kmerge.fuse.model.samples_of", samples_of)
    monkeypatch.setattr("kmerge.fuse.model.sensitivities", sensitivities)
    monkeypatch.setattr("kmerge.fuse.model.blended", blending)
    monkeypatch.setattr("kmerge.fuse.batches.crossed", crossing)
    strangers_work(zoo.TOPOLOGIES[name], 3)
    assert ROWS < made[0].rows < 2 * ROWS  # a part of what was given measures the agreement
    assert blends


@pytest.mark.parametrize(("name", "one"), [("dense", True), ("positions", False), ("convolution", False)])
def test_more_inputs_are_made_where_each_is_one_row_for_every_layer(name: str, one: bool, tmp_path: Path) -> None:
    import keras
    from keras import layers

    middle = {
        "dense": [layers.Flatten(), layers.Dense(3), layers.BatchNormalization()],
        "positions": [layers.Dense(3), layers.Flatten()],
        "convolution": [layers.Conv1D(2, 2), layers.Flatten()],
    }[name]
    keras.Sequential([layers.Input((4, 2)), *middle, layers.Dense(2)]).save(tmp_path / "a.keras")
    with open_source(tmp_path / "a.keras", "a") as a, open_source(tmp_path / "a.keras", "b") as b:
        merged = merge_graphs(lay_out([a, b]), make_plan([a, b], Rules(method="mean"), "0"))
        assert _gives_one_row(merged, [a, b]) is one


def test_a_twin_gives_the_original_function_with_all_that_fusion_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmerge.fuse.model.ENOUGH", 2 * ROWS)
    monkeypatch.setattr("kmerge.fuse.model.samples_of", samples_of)
    monkeypatch.setattr("kmerge.fuse.model.sensitivities", sensitivities)
    test_a_twin_gives_the_original_function("groups")


def strangers_work(case: zoo.Case, count: int) -> None:
    with ExitStack() as stack:
        source, _ = opened(case, stack, case.formats[0])
        sources = [source, *(stranger(source, label, seed) for seed, label in enumerate("bc"[: count - 1], start=1))]
        fusion, model = fused(sources, case.inputs(ROWS))
        assert all(np.isfinite(value).all() for value in fusion.values.values() if value.dtype.kind == "f")
        assert all(np.isfinite(output).all() for output in zoo.predictions(model, case.inputs(4)))


# ---- calls that do not stand for all sources


def test_towers_of_their_own_before_a_shared_layer() -> None:
    """The shared layer is called once per source, on what each made itself: each call has the targets of one."""

    def recipe(b: Any, x: Any) -> Any:
        y = b.Dense(6, activation="relu", name="tower")(x)
        return b.Dense(3, name="top")(b.Dense(8, activation="relu", name="middle")(y))

    case = case_of("towers", recipe, F(5))
    with ExitStack() as stack:
        source, path = opened(case, stack)
        inputs = case.inputs(200)
        roles = [("tower", "private"), ("middle", "shared")]
        fusion, model = fused([source, twin_of(source, "b")], inputs, trunk="auto", roles=roles)
        assert len(fusion.merged.graph.calls_of(fusion.merged.graph.layer_named("middle"))) == 2
        expected = zoo.predictions(zoo.load(path), inputs)
        for outputs in by_source(zoo.predictions(model, inputs), 2):
            assert error(outputs, expected) < 1e-4
        strangers, _ = fused([source, stranger(source, "b", 1)], inputs, trunk="auto", roles=roles)
        assert all(found.value > 0.5 for found in strangers.agreements)


PRIVATE: dict[str, tuple[Callable[..., Any], zoo.Spec]] = {
    "embedding": (lambda b, x: b.Embedding(9, 6, name="tower")(x), zoo.tokens(4, high=9)),
    "recurrent": (lambda b, x: b.LSTM(6, return_sequences=True, name="tower")(x), F(4, 3)),
    "separable": (lambda b, x: b.SeparableConv1D(6, 2, name="tower")(x), F(4, 3)),
}


@pytest.mark.parametrize("weights", [None, [1, 0]], ids=str)
@pytest.mark.parametrize("kind", PRIVATE)
def test_a_private_layer_of_any_kind_before_a_shared_one(kind: str, weights: list[float] | None) -> None:
    """No source's own layer is lost, whatever is known of its units; that they were not matched is told."""
    tower, spec = PRIVATE[kind]

    def recipe(b: Any, x: Any) -> Any:
        y = b.Dense(8, activation="relu", name="middle")(b.GlobalAveragePooling1D()(tower(b, x)))
        return b.Dense(3, name="top")(y)

    case = case_of(kind, recipe, spec)
    with ExitStack() as stack:
        source, _ = opened(case, stack)
        roles = [("tower", "private"), ("middle", "shared")]
        rules = {} if weights is None else {"weights": weights}
        other = stranger(source, "b", 1)
        fusion, _ = fused([source, other], case.inputs(200), trunk="auto", roles=roles, **rules)
        for layer, origin in enumerate(fusion.merged.layers):
            if (layer, 0) in fusion.values and origin.role == "private":
                assert np.abs(fusion.values[layer, 0]).max() > 1e-3
        assert len([note for note in fusion.notes if "'a_tower'" in note and "not matched" in note]) == 1
        assert fusion.agreements[0].value > 0.5
        assert fusion.agreements[1].value > (0.5 if weights is None else 0)


def test_a_private_normalisation_between_shared_layers() -> None:
    def recipe(b: Any, x: Any) -> Any:
        y = b.BatchNormalization(name="own")(b.Add()([b.Dense(6)(x), b.Dense(6)(x)]))
        return b.Dense(3)(b.Dense(5, activation="relu", name="middle")(b.ReLU()(y)))

    case = case_of("private", recipe, F(5))
    with ExitStack() as stack:
        source, path = opened(case, stack)
        inputs = case.inputs(200)
        roles = [("own", "private"), ("middle", "shared")]
        _, model = fused([source, twin_of(source, "b")], inputs, roles=roles)
        expected = zoo.predictions(zoo.load(path), inputs)
        for outputs in by_source(zoo.predictions(model, inputs), 2):
            assert error(outputs, expected) < 1e-4


# ---- what cannot be run


def test_inputs_that_a_layer_does_not_take_are_told_of() -> None:
    case = case_of(
        "words", lambda b, x: b.head(b.GlobalAveragePooling1D()(b.Embedding(9, 4)(x))), zoo.tokens(5, high=9)
    )
    with ExitStack() as stack:
        source, _ = opened(case, stack)
        tokens = np.full((20, 5), 9, dtype="int32")
        with pytest.raises(MergeError, match=r"cannot run '.*' \(Embedding\).*--data.*--method mean"):
            fused([source, stranger(source, "b", 1)], tokens)


def test_sources_with_inputs_of_different_shapes_cannot_be_run_together() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(3, name="top")(b.Dense(6, name="middle")(b.Dense(4, activation="relu", name="stem")(x)))

    with ExitStack() as stack:
        sources = [
            replace(opened(case_of("stem", recipe, F(n)), stack)[0], label=label) for n, label in ((5, "a"), (7, "b"))
        ]
        inputs = case_of("stem", recipe, F(5)).inputs(20)
        rules = Rules(method="fuse", inputs="separate", roles=[("stem", "private"), ("middle", "shared")])
        plan, given = make_plan(sources, rules), Inputs(flat(inputs), np.full(20, -1))
        with pytest.raises(PlanError, match=r"'a' takes .*\(None, 5\) but 'b' \(None, 7\).*--method mean"):
            fuse_models(lay_out(sources), plan, given, Path(), silent)


# ---- what cannot be fitted


def test_what_cannot_be_fitted_is_that_of_the_first_source_and_told_of() -> None:
    def recipe(b: Any, x: Any) -> Any:
        y = b.SpectralNormalization(b.Dense(6), name="odd")(b.Dense(5, activation="relu")(x))
        return b.head(b.ReLU()(y))

    case = case_of("odd", recipe, F(5))
    with ExitStack() as stack:
        source, _ = opened(case, stack)
        fusion, _ = fused([source, stranger(source, "b", 1)], case.inputs(ROWS), trunk="all")
        notes = [note for note in fusion.notes if "'odd'" in note]
        assert len(notes) == 1
        assert "SpectralNormalization" in notes[0]
        assert "'a' as it is" in notes[0]
        assert "--private odd" in notes[0]


def test_a_layer_whose_axes_are_not_known_is_that_of_the_first_source_too() -> None:
    """A layer of somebody's own: what stands on the axes of its weight, nobody told."""
    import keras

    @keras.saving.register_keras_serializable("fuse_layers")
    class Gate(keras.layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.gate = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="gate")

        def call(self, x: Any) -> Any:
            return x * keras.ops.sigmoid(self.gate)

    def recipe(b: Any, x: Any) -> Any:
        return b.head(Gate(name="odd")(b.Dense(5, activation="relu")(x)))

    case = case_of("own", recipe, F(5))
    with ExitStack() as stack:
        source, _ = opened(case, stack)
        other = stranger(source, "b", 1)
        fusion, _ = fused([source, other], case.inputs(ROWS), trunk="all")
        assert len([note for note in fusion.notes if "'odd'" in note and "'a' as it is" in note]) == 1
        layer = fusion.merged.graph.layer_named("odd")
        own = dict(fusion.merged.layers[layer].members)
        one, two = (item.states[own[n]].weights[0].tensor.read() for n, item in enumerate((source, other)))
        assert np.abs(one - two).max() > 1e-3
        np.testing.assert_allclose(fusion.values[layer, 0], one, atol=1e-7)


def test_steps_that_wait_for_all_calls_of_a_layer() -> None:
    """The layer that is called twice is solved behind the private ones that stand before its second call."""

    def recipe(b: Any, x: Any) -> Any:
        y = b.Dense(6, activation="relu", name="tower")(x)
        return b.Dense(3, name="top")(b.Dense(8, activation="relu", name="middle")(y))

    case = case_of("order", recipe, F(5))
    with ExitStack() as stack:
        source, _ = opened(case, stack)
        roles = [("tower", "private"), ("middle", "shared")]
        fusion, _ = fused([source, stranger(source, "b", 1)], case.inputs(ROWS), roles=roles)
        names = [line.partition(":")[0] for line in fusion.log]
        assert names.index("middle") > names.index("b_tower")


# ---- designs, where TensorFlow does not run the layer


@pytest.mark.parametrize("class_name", ["Conv1D", "Conv2D", "Conv3D", "DepthwiseConv2D", "Conv2DTranspose"])
def test_channels_first_is_channels_last_turned(class_name: str) -> None:
    import keras

    rank = int(next(letter for letter in class_name if letter.isdigit()))
    options: dict[str, Any] = {"kernel_size": 2, "strides": 2, "padding": "same"}
    layer = getattr(keras.layers, class_name)(**options, **({} if "Depth" in class_name else {"filters": 3}))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *(5, 4, 6)[:rank], 2)).astype("float32")
    made = np.asarray(layer(x))
    kernel = np.asarray(layer.kernel)
    config = {**layer.get_config(), "data_format": "channels_first"}
    last, first = linear_rows(class_name, layer.get_config(), x.ndim), linear_rows(class_name, config, x.ndim)
    assert last is not None
    assert first is not None
    turned = [np.moveaxis(array, -1, 1) for array in (x, made)]
    assert agrees(last, x, made, kernel, np.asarray(layer.bias), 1e-5)
    assert agrees(first, *turned, kernel, np.asarray(layer.bias), 1e-5)
    assert not agrees(first, turned[0], 1.1 * turned[1], kernel, np.asarray(layer.bias), 1e-3)


@pytest.mark.parametrize("equation", ["abc,ac->ab", "aac,cd->aad", "abc,cd->ad", "abc,ade->abd"])
def test_equations_that_are_no_layer_in_rows(equation: str) -> None:
    assert linear_rows("EinsumDense", {"equation": equation}, 3) is None


def test_rows_that_are_not_finite_are_left_out() -> None:
    """A text of nothing but padding has no mean: what it gives is not a number, in the sources and in Keras alike."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((40, 3)), rng.standard_normal((3, 2))
    y = x @ kernel
    x[3], y[7] = np.nan, np.inf
    fit = Regression(3, 2)
    fit.add(x, y, np.arange(40) % 5 == 4)
    np.testing.assert_allclose(fit.solve(np.zeros((3, 2)), True).kernel, kernel, atol=1e-5)


# ---- heads


def test_heads_are_chosen_that_tell_something_new() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6))
    columns = np.concatenate([x[:, :4], x[:, :2], x[:, 4:]], axis=1)  # four groups of two, the third a copy
    targets = np.concatenate([columns[:, :2], columns[:, 2:4], 0.1 * columns[:, 6:]], axis=1)
    chosen = choose_groups(columns.T @ columns, columns.T @ targets, 2, [0, 0, 1, 1], 3)
    assert sorted(chosen) in ([0, 1, 3], [1, 2, 3])


def test_every_source_gets_a_head() -> None:
    chosen = choose_groups(np.eye(4), np.diag([5.0, 4, 3, 1]), 1, [0, 0, 0, 1], 2)
    assert chosen == [0, 3]
    assert choose_groups(np.eye(4), np.diag([5.0, 4, 3, 1]), 1, [0, 0, 0, 1], 1) == [0]
