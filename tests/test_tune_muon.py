"""The optimizer where sources teach: against Keras's own, and which kernels are worth it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kmerge.tune import muon
from kmerge.tune.muon import kernels_of, make_muon

Array = np.ndarray[Any, Any]


def steps(optimizer: Any, start: Array, gradients: list[Array]) -> Array:
    """Where a variable is after some steps."""
    import keras

    variable = keras.Variable(start, name="kernel")
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    return np.array(keras.ops.convert_to_numpy(variable))


def drawn(*shape: int) -> tuple[Array, list[Array]]:
    random = np.random.default_rng(0)
    return random.normal(size=shape).astype(np.float32), [random.normal(size=shape).astype(np.float32) for _ in "abc"]


def test_a_matrix_moves_as_by_kerass_own_muon() -> None:
    import keras

    start, gradients = drawn(20, 30)
    own = keras.optimizers.Muon(0.01, weight_decay=None, adam_weight_decay=None)
    got = steps(make_muon(0.01, {"kernel": 1}), start, gradients)
    np.testing.assert_allclose(got, steps(own, start, gradients), atol=1e-6)
    assert np.abs(got - start).max() > 0.001


@pytest.mark.parametrize(("shape", "split"), [((3, 3, 4, 30), 3), ((24, 4, 6), 1)], ids=["convolution", "attention"])
def test_a_kernel_moves_as_the_matrix_that_it_is(shape: tuple[int, ...], split: int) -> None:
    assert muon._split(shape) == split
    start, gradients = drawn(*shape)
    rows = int(np.prod(shape[:split]))
    got = steps(make_muon(0.01, {"kernel": split}), start, gradients)
    flat = steps(make_muon(0.01, {"kernel": 1}), start.reshape(rows, -1), [g.reshape(rows, -1) for g in gradients])
    np.testing.assert_allclose(got.reshape(rows, -1), flat, atol=1e-6)


def test_a_step_turns_every_direction_alike() -> None:
    left, right = (np.linalg.qr(np.random.default_rng(seed).normal(size=(16, 16)))[0] for seed in (1, 2))
    sizes = np.geomspace(1, 20, 16)
    gradient = ((left * sizes) @ right.T).astype(np.float32)
    change = steps(make_muon(1.0, {"kernel": 1}), np.zeros((16, 16), np.float32), [gradient])
    turned = np.diag(left.T @ -change @ right) / (0.2 * np.sqrt(16))
    assert 0.6 < turned.min() < turned.max() < 1.3  # as the iteration is made to, and not 1 to 20


def test_all_else_moves_as_by_adam() -> None:
    import keras

    start, gradients = drawn(5, 7)
    got = steps(make_muon(0.01, {}), start, gradients)
    np.testing.assert_allclose(got, steps(keras.optimizers.Adam(0.01), start, gradients), atol=1e-6)


def test_settings_are_kept_by_a_copy() -> None:
    start, gradients = drawn(3, 4, 20)
    optimizer = make_muon(0.01, {"kernel": 2})
    again = type(optimizer).from_config(optimizer.get_config())
    np.testing.assert_array_equal(steps(optimizer, start, gradients), steps(again, start, gradients))


def test_kernels_are_taken_while_they_cost_little_beside_the_step() -> None:
    import keras

    x = keras.Input((16, 16, 3))
    y = keras.layers.Conv2D(32, 3, name="narrow")(x)
    y = keras.layers.Conv2D(32, 3, name="conv")(y)
    y = keras.layers.TimeDistributed(keras.layers.Dense(32, name="each"), name="timed")(y)
    y = keras.layers.DepthwiseConv2D(3, name="depthwise")(y)
    y = keras.layers.Dense(256, name="wide")(keras.layers.Flatten()(y))
    model = keras.Model(x, keras.layers.Dense(20, name="head")(y))
    *trunk, head = [layer for layer in model.layers if layer.weights]
    taken = kernels_of(trunk, [head], 64)
    # A dense layer reads 64 rows in a step, a convolution 64 times 144: orthogonal matrices cost the former far more.
    assert taken["conv/kernel"] == 3
    assert not [path for path in taken if path.startswith(("wide", "depthwise", "head"))]
    assert "wide/kernel" in kernels_of(trunk, [head], 8192)
    assert "head/kernel" not in kernels_of(trunk, [head], 8192)
    model.get_layer("conv").trainable = False
    assert "conv/kernel" not in kernels_of(trunk, [head], 64)
    assert kernels_of([], trunk, 64) == {}
