"""The optimizer where sources teach: against Keras's own, which kernels are worth it, and a training by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge
from kmerge.tune import muon
from kmerge.tune.muon import kernels_of, make_muon

Array = np.ndarray[Any, Any]


def steps(optimizer: Any, start: Array, gradients: list[Array]) -> Array:
    """Where a variable is after some steps."""
    import keras

    variable = keras.Variable(start, name="kernel", dtype=str(start.dtype))
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    return np.asarray(keras.ops.convert_to_numpy(variable))


def drawn(*shape: int) -> tuple[Array, list[Array]]:
    random = np.random.default_rng(0)
    return random.normal(size=shape).astype(np.float32), [random.normal(size=shape).astype(np.float32) for _ in "abc"]


# --------------------------------------------------------------------------------------------------------- steps


def test_a_matrix_moves_as_by_kerass_own_muon() -> None:
    import keras

    start, gradients = drawn(20, 30)
    own = keras.optimizers.Muon(0.01, weight_decay=None, adam_weight_decay=None)
    got = steps(make_muon(0.01, {0: 1}), start, gradients)
    np.testing.assert_allclose(got, steps(own, start, gradients), atol=1e-6)
    assert np.abs(got - start).max() > 0.001


@pytest.mark.parametrize(("shape", "split"), [((3, 3, 4, 30), 3), ((24, 4, 6), 1)], ids=["convolution", "attention"])
def test_a_kernel_moves_as_the_matrix_that_it_is(shape: tuple[int, ...], split: int) -> None:
    start, gradients = drawn(*shape)
    rows = int(np.prod(shape[:split]))
    got = steps(make_muon(0.01, {0: split}), start, gradients)
    flat = steps(make_muon(0.01, {0: 1}), start.reshape(rows, -1), [g.reshape(rows, -1) for g in gradients])
    np.testing.assert_allclose(got.reshape(rows, -1), flat, atol=1e-6)


def test_a_step_turns_every_direction_alike() -> None:
    left, right = (np.linalg.qr(np.random.default_rng(seed).normal(size=(16, 16)))[0] for seed in (1, 2))
    sizes = np.geomspace(1, 20, 16)
    gradient = ((left * sizes) @ right.T).astype(np.float32)
    change = steps(make_muon(1.0, {0: 1}), np.zeros((16, 16), np.float32), [gradient])
    turned = np.diag(left.T @ -change @ right) / (0.2 * np.sqrt(16))
    assert 0.6 < turned.min() < turned.max() < 1.3  # as the iteration is made to, and not 1 to 20


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_kernels_of_other_types_move_too(dtype: str) -> None:
    start, gradients = drawn(20, 30)
    wanted = steps(make_muon(0.1, {0: 1}), start, gradients)
    got = steps(make_muon(0.1, {0: 1}), start.astype(dtype), [gradient.astype(dtype) for gradient in gradients])
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, atol=1e-2 if dtype == "float16" else 1e-5)


def test_all_else_moves_as_by_adam() -> None:
    import keras

    start, gradients = drawn(5, 7)
    got = steps(make_muon(0.01, {}), start, gradients)
    np.testing.assert_allclose(got, steps(keras.optimizers.Adam(0.01), start, gradients), atol=1e-6)


def test_settings_are_kept_by_a_copy() -> None:
    start, gradients = drawn(3, 4, 20)
    optimizer = make_muon(0.01, {0: 2})
    again = type(optimizer).from_config(optimizer.get_config())
    np.testing.assert_array_equal(steps(optimizer, start, gradients), steps(again, start, gradients))


# ------------------------------------------------------------------------------------------------- which kernels


def paths(found: list[tuple[Any, int]]) -> dict[str, int]:
    return {kernel.path: split for kernel, split in found}


def test_kernels_are_taken_while_they_cost_little_beside_the_step() -> None:
    import keras

    x = keras.Input((16, 16, 3))
    y = keras.layers.Conv2D(8, 3, name="narrow")(x)
    y = keras.layers.Conv2D(32, 3, name="conv")(y)
    y = keras.layers.DepthwiseConv2D(3, name="depthwise")(y)
    y = keras.layers.Conv2D(32, 5, groups=32, padding="same", name="grouped")(y)
    y = keras.layers.Conv2D(8, 5, padding="same", name="few")(y)
    y = keras.layers.Dense(256, name="wide")(keras.layers.Flatten()(y))
    model = keras.Model(x, keras.layers.Dense(20, name="head")(y))
    *trunk, head = [layer for layer in model.layers if layer.weights]
    # A dense layer reads 64 rows in a step, a convolution 64 times 144: orthogonal matrices cost the former far more.
    assert paths(kernels_of(trunk, [head], 64)) == {"conv/kernel": 3}
    assert paths(kernels_of(trunk, [head], 8192)) == {"conv/kernel": 3, "wide/kernel": 1}
    assert kernels_of([], trunk, 64) == []
    model.get_layer("conv").trainable = False
    assert kernels_of(trunk, [head], 64) == []


def test_together_they_cost_no_more_than_their_share() -> None:
    import keras

    x = keras.Input((64,))
    y = x
    for number in range(6):
        y = keras.layers.Dense(64, name=f"hidden_{number}")(y)
    layers = keras.Model(x, y).layers[1:]
    # Each step takes 6 · 64 · 64 operations per row and layer, and each iteration of a matrix 6 · 64³: of 1,000 rows
    # the matrix of one layer comes to 32 % of its step, and of six layers five come to 27 %.
    assert len(kernels_of(layers, [], 1000)) == 5
    assert len(kernels_of(layers[:3], layers[3:], 1000)) == 3


def test_layers_count_as_often_as_they_are_used() -> None:
    import keras

    x = keras.Input((100, 32))
    shared = keras.layers.Dense(32, name="shared")
    y = keras.layers.TimeDistributed(keras.layers.Dense(32), name="timed")(shared(shared(x)))
    y = keras.layers.MultiHeadAttention(4, 8, name="attention")(y, y)
    z = keras.layers.Reshape((10, 10, 32))(y)
    z = keras.layers.Conv2DTranspose(32, 2, strides=2, name="up")(z)
    layers = {layer.name: layer for layer in keras.Model(x, z).layers}
    assert muon._uses(layers["shared"]) == 200
    assert muon._uses(layers["timed"]) == 100
    assert muon._uses(layers["up"]) == 100
    # Four projections of 100 places each, and the two products of attention.
    weights = 4 * 32 * 32 + 3 * 4 * 8  # biases of three of them are no vectors
    assert muon._uses(layers["attention"]) == pytest.approx((100 * 4 * 32 * 32 + 2 * 100 * 100 * 32) / weights)
    found = paths(kernels_of(layers.values(), [], 64))
    assert found["attention/query/kernel"] == 1
    assert found["attention/attention_output/kernel"] == 2
    assert found["up/kernel"] == 3
    assert len(found) == 7


def test_layers_of_one_name_in_nested_models_are_told_apart() -> None:
    import keras

    def nested(name: str) -> Any:
        x = keras.Input((16, 16, 16))
        return keras.Model(x, keras.layers.Conv2D(16, 3, name="conv")(x), name=name)

    trunk, head = nested("trunk"), nested("head")
    ((kernel, split),) = kernels_of([trunk], [head], 64)
    assert kernel is trunk.get_layer("conv").kernel
    assert split == 3


# ----------------------------------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    import keras

    def network(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        x = keras.Input((12, 12, 1), name="x")
        y = keras.layers.Conv2D(16, 3, activation="relu", name="one")(x)
        y = keras.layers.Conv2D(16, 3, activation="relu", name="two")(y)
        y = keras.layers.GlobalAveragePooling2D()(y)
        return keras.Model(x, keras.layers.Dense(3, "softmax", name="out")(y))

    return {label: network(number) for number, label in enumerate("ab")}


def test_sources_teach_by_it_and_what_is_interrupted_goes_on_with_equal_weights(
    sources: dict[str, Any], tmp_path: Path
) -> None:
    import keras

    merged = kmerge.merge_models(sources, method="mean")
    x = np.random.default_rng(0).normal(size=(60, 12, 12, 1)).astype(np.float32)
    seen: list[list[int] | None] = []

    class Told(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self, end: int) -> None:
            super().__init__()
            self.end, self.count = end, 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if not self.count:
                splits = getattr(self.model.optimizer, "splits", None)
                seen.append(None if splits is None else list(splits))
            self.count += 1
            if self.count == self.end:
                raise KeyboardInterrupt

    asked = {"epochs": 2, "batch_size": 16, "pairs": 0, "trunk_rate": 0.5, "layer_decay": 0.5, "seed": 3}
    whole = kmerge.fine_tune(merged, x, sources, callbacks=[Told(0)], **asked)
    assert seen == [[[variable.path for variable in merged.trainable_variables].index("two/kernel")]]
    with pytest.raises(KeyboardInterrupt):
        kmerge.fine_tune(merged, x, sources, callbacks=[Told(5)], checkpoints=tmp_path, every=1e-9, **asked)
    again = kmerge.fine_tune(merged, x, sources, checkpoints=tmp_path, every=1e-9, resume=True, **asked)
    for one, other in zip(whole.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)

    seen.clear()
    kmerge.fine_tune(merged, x, sources, optimizer="adam", callbacks=[Told(0)], **asked)
    y = np.zeros(60, np.int32)
    asked |= {"pairs": None, "loss": "sparse_categorical_crossentropy"}
    kmerge.fine_tune(merged, (x, {"a": y, "b": y}), callbacks=[Told(0)], **asked)
    assert seen == [None, None]  # Adam
