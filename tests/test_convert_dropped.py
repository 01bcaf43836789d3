"""Layers that Keras dropped, computed by hand and by the layers of current Keras that stand in for them."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from old_files import converted, write_old

import kmerge
from kmerge.source import open_source
from kmerge.upgrade import local, upgrade


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_highway(bias: bool, suffix: str, wrapped: bool, tmp_path: Path) -> None:
    """t h + (1 - t) x; alone, and on each step of a sequence."""
    x = random(2, 3, 4) if wrapped else random(2, 4)
    arrays = {"W:0": random(4, 4, seed=1), "W_carry:0": random(4, 4, seed=2)}
    if bias:
        arrays |= {"b:0": random(4, seed=3), "b_carry:0": random(4, seed=4)}
    own = {"activation": "tanh", "bias": bias, "init": "glorot_uniform", "W_regularizer": None, "input_dim": 4}
    own["transform_bias"] = -2
    layer = ("Highway", {**own, "batch_input_shape": [None, 4]})
    if wrapped:
        inner = {"class_name": "Highway", "config": {"name": "inner", **own}}
        layer = ("TimeDistributed", {"layer": inner, "batch_input_shape": [None, 3, 4]})
    gate = sigmoid(x @ arrays["W_carry:0"] + arrays.get("b_carry:0", 0))
    wanted = gate * np.tanh(x @ arrays["W:0"] + arrays.get("b:0", 0)) + (1 - gate) * x
    path = write_old(tmp_path / "a.h5", [layer], arrays)
    np.testing.assert_allclose(converted(path, x, suffix), wanted, atol=1e-6)
    assert kmerge.convert(path, tmp_path / "again.keras").notes == ()


HIGHWAY = ("Highway", {"activation": "tanh", "bias": True, "init": "glorot_uniform", "batch_input_shape": [None, 4]})


@pytest.mark.parametrize("order", [("W", "W_carry", "b", "b_carry"), ("W", "b", "W_carry", "b_carry")])
def test_highway_in_either_order(order: tuple[str, ...], tmp_path: Path) -> None:
    """Keras 1.2 lists matrices before biases, earlier ones the weights of each layer together."""
    x = random(2, 4)
    arrays = {"W": random(4, 4), "W_carry": random(4, 4, seed=2), "b": random(4, seed=3), "b_carry": random(4, seed=4)}
    gate = sigmoid(x @ arrays["W_carry"] + arrays["b_carry"])
    wanted = gate * np.tanh(x @ arrays["W"] + arrays["b"]) + (1 - gate) * x
    path = write_old(tmp_path / "a.h5", [HIGHWAY], {f"{name}:0": arrays[name] for name in order}, "1.1.0")
    np.testing.assert_allclose(converted(path, x), wanted, atol=1e-6)


@pytest.mark.parametrize("shapes", [((4, 4), (4, 3), (4,), (4,)), ((4, 4), (4, 4), (4,)), ((4, 4), (4, 4), (4,), (3,))])
def test_highway_of_other_shapes(shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    arrays = {f"w{number}:0": np.ones(shape) for number, shape in enumerate(shapes)}
    path = write_old(tmp_path / "a.h5", [HIGHWAY], arrays)
    with pytest.raises(kmerge.GraphError, match="the weights of Highway are"):
        kmerge.convert(path, tmp_path / "new.keras")


@pytest.mark.parametrize("wrapped", [False, True])
def test_maxout(wrapped: bool, tmp_path: Path) -> None:
    x = random(2, 3, 4) if wrapped else random(2, 4)
    arrays = {"W:0": random(5, 4, 2, seed=1), "b:0": random(5, 2, seed=2)}
    own = {"output_dim": 2, "nb_feature": 5, "bias": True}
    layer = ("MaxoutDense", {**own, "batch_input_shape": [None, 4]})
    if wrapped:
        inner = {"class_name": "MaxoutDense", "config": {"name": "inner", **own}}
        layer = ("TimeDistributed", {"layer": inner, "batch_input_shape": [None, 3, 4]})
    wanted = (np.einsum("...i,kio->...ko", x, arrays["W:0"]) + arrays["b:0"]).max(axis=-2)
    np.testing.assert_allclose(converted(write_old(tmp_path / "a.h5", [layer], arrays), x), wanted, atol=1e-6)


SHAPES = [((4,), (4,)), ((3, 4), (3, 4)), ((3, 2, 4), (1, 1, 4)), ((3, 2, 4), (3, 1, 1)), ((3, 4), (1, 1))]
"""Of an input, and of weights that may be shared along some axes."""


@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_parametric_softplus(shape: tuple[int, ...], weights: tuple[int, ...], tmp_path: Path) -> None:
    x = random(2, *shape)
    alphas, betas = random(*weights, seed=1), random(*weights, seed=2)
    layer = ("ParametricSoftplus", {"alpha_init": 0.2, "beta_init": 5.0, "batch_input_shape": [None, *shape]})
    path = write_old(tmp_path / "a.h5", [layer], {"alphas:0": alphas, "betas:0": betas})
    np.testing.assert_allclose(converted(path, x), alphas * np.log1p(np.exp(betas * x)), atol=1e-5)


@pytest.mark.parametrize(("shape", "weights"), SHAPES)
@pytest.mark.parametrize("theano", [False, True], ids=["tensorflow", "theano"])
def test_srelu(shape: tuple[int, ...], weights: tuple[int, ...], theano: bool, tmp_path: Path) -> None:
    """Theano takes the minimum over the left part too, which shows where its slope is negative."""
    x = 2 * random(2, *shape)
    left, slope, width, right = (random(*weights, seed=seed) for seed in (1, 2, 3, 4))
    layer = ("SReLU", {"t_left_init": "zero", "a_left_init": "one", "batch_input_shape": [None, *shape]})
    names = ("t_left", "a_left", "t_right", "a_right")
    arrays = {
        f"{name}{'' if theano else ':0'}": array for name, array in zip(names, (left, slope, width, right), strict=True)
    }
    end = left + np.abs(width)
    if theano:
        middle = np.minimum(np.where(x > left, x - left, slope * (x - left)), end - left)
    else:
        middle = np.clip(x - left, 0, end - left) - slope * np.maximum(left - x, 0)
    wanted = left + middle + right * np.maximum(x - end, 0)
    path = write_old(tmp_path / "a.h5", [layer, ("Flatten", {})], arrays)
    np.testing.assert_allclose(converted(path, x), wanted.reshape(2, -1), atol=2e-5)


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_normalisation_of_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    """BatchNormalization(mode=1); a large epsilon shows that it is added twice."""
    x = random(2, *shape)
    gamma, beta = random(4, seed=1), random(4, seed=2)
    config = {"mode": 1, "axis": -1, "epsilon": 0.1, "beta_init": "zero", "batch_input_shape": [None, *shape]}
    arrays = {"gamma:0": gamma, "beta:0": beta, "running_mean:0": random(4), "running_std:0": np.ones(4)}
    path = write_old(tmp_path / "a.h5", [("BatchNormalization", config)], arrays)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 0.1)
    wanted = (x - x.mean(axis=-1, keepdims=True)) / (deviation + 0.1) * gamma + beta
    np.testing.assert_allclose(converted(path, x), wanted, atol=1e-6)


@pytest.mark.parametrize("implementation", [1, 2, 3])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize(("rank", "same"), [(1, False), (2, False), (2, True)])
def test_locally_connected(implementation: int, first: bool, rank: int, same: bool, tmp_path: Path) -> None:
    """Each output has weights of its own; the three implementations store them in three ways."""
    if implementation == 1 and same:
        same = False  # Keras had "same" in the others alone
    sizes, size, steps = ((5,), (3,), (2,)) if rank == 1 else ((4, 3), (3, 2), (2, 1))
    places = tuple(
        (n - (0 if same else k) + (s - 1 if same else s)) // s for n, k, s in zip(sizes, size, steps, strict=True)
    )
    x = random(2, *sizes, 2)
    dense = random(*sizes, 2, *places, 3, seed=1)  # a weight for each pair of input and output …
    connected = np.zeros((*sizes, *places), bool)
    for place in itertools.product(*map(range, places)):
        start = [p * s - (k // 2 if same else 0) for p, s, k in zip(place, steps, size, strict=True)]
        window = tuple(slice(max(0, a), min(a + k, n)) for a, k, n in zip(start, size, sizes, strict=True))
        connected[(*window, *place)] = True
    mask = np.expand_dims(connected, (rank, -1))
    bias = random(*places, 3, seed=2)
    used = bias.reshape(3, *places) if first else bias  # Keras reads it in the order of the output
    axes = tuple(range(1, rank + 2))
    wanted = np.tensordot(x, np.where(mask, dense, 0.0), (axes, tuple(range(rank + 1))))
    wanted = wanted + (np.moveaxis(used, 0, -1) if first else used)
    kernel = stored(dense, mask, implementation, first, rank)
    given = np.moveaxis(x, -1, 1) if first else x
    config = {
        "batch_input_shape": [None, *given.shape[1:]], "filters": 3, "kernel_size": size, "strides": steps,
        "padding": "same" if same else "valid", "data_format": "channels_first" if first else "channels_last",
        "implementation": implementation, "activation": "linear", "use_bias": True,
    }  # fmt: skip
    layer = (f"LocallyConnected{rank}D", config)
    path = write_old(tmp_path / "a.h5", [layer], {"kernel:0": kernel, "bias:0": bias}, "2.15.0")
    got = converted(path, given)
    np.testing.assert_allclose(np.moveaxis(got, 1, -1) if first else got, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", [1, 2, 3])
@pytest.mark.parametrize(
    ("length", "size", "padding"), [(2000, 1, "valid"), (10**9, 1, "valid"), (3000, 1999, "same"), (2, 10**9, "same")]
)
def test_sizes_that_a_file_merely_claims(
    implementation: int, length: int, size: int, padding: str, tmp_path: Path
) -> None:
    """The kernel is compared with them before memory is taken for them."""
    config = {
        "batch_input_shape": [None, length, length, 1], "filters": 1, "kernel_size": [size, size], "strides": [1, 1],
        "padding": padding, "data_format": "channels_last", "implementation": implementation, "use_bias": False,
    }  # fmt: skip
    path = write_old(tmp_path / "a.h5", [("LocallyConnected2D", config)], {"kernel:0": np.zeros((4, 1, 1))}, "2.15.0")
    tracemalloc.start()
    try:
        with pytest.raises(kmerge.GraphError, match=r"kernel is \(4, 1, 1\)"):
            kmerge.convert(path, tmp_path / "new.keras")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("implementation", [2, 3])
def test_a_kernel_is_laid_out_piece_by_piece(
    implementation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the stored kernel and the new one, in work is a block and no table of the whole."""
    monkeypatch.setattr(local, "_BLOCK", 1 << 12, raising=False)
    config = {
        "batch_input_shape": [None, 16, 16, 4], "filters": 8, "kernel_size": [5, 5], "strides": [1, 1],
        "padding": "same", "data_format": "channels_last", "implementation": implementation, "use_bias": False,
    }  # fmt: skip
    count = int(sum(min(p + 3, 16) - max(p - 2, 0) for p in range(16))) ** 2 * 32
    kernel = np.zeros((16, 16, 4, 16, 16, 8) if implementation == 2 else count)
    path = write_old(tmp_path / "a.h5", [("LocallyConnected2D", config)], {"kernel:0": kernel}, "2.15.0")
    with open_source(path) as source:
        tensor = next(weight.tensor for weights in upgrade(source).order for weight in weights)
        tracemalloc.start()
        try:
            tensor.read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < kernel.size * 4 + 2 * tensor.nbytes + (1 << 19)


def test_patches_wider_than_the_input(tmp_path: Path) -> None:
    """What lies outside at every place is left out; patch and step are those of Keras."""
    x, dense = random(2, 2, 1), random(2, 1, 2, 1, seed=1)
    config = {
        "batch_input_shape": [None, 2, 1], "filters": 1, "kernel_size": [9], "strides": [1], "padding": "same",
        "data_format": "channels_last", "implementation": 2, "activation": "linear", "use_bias": False,
    }  # fmt: skip
    path = write_old(tmp_path / "a.h5", [("LocallyConnected1D", config)], {"kernel:0": dense}, "2.15.0")
    np.testing.assert_allclose(converted(path, x), np.tensordot(x, dense, ([1, 2], [0, 1])), atol=1e-6)


def stored(dense: np.ndarray, mask: np.ndarray, implementation: int, first: bool, rank: int) -> np.ndarray:
    """Weights (*sizes, inputs, *places, filters) as an implementation of Keras stores them."""
    axes = [*range(rank), rank, *range(rank + 1, 2 * rank + 1), 2 * rank + 1]
    if first:
        axes = [rank, *range(rank), 2 * rank + 1, *range(rank + 1, 2 * rank + 1)]
    if implementation == 2:
        return np.transpose(dense, axes)
    mask = np.broadcast_to(mask, dense.shape)
    if implementation == 3:
        count = int(np.prod([dense.shape[axis] for axis in axes[: rank + 1]]))
        values, present = (np.transpose(item, axes).reshape(count, -1).T for item in (dense, mask))
        return values[present]
    filters = dense.shape[-1]
    rows = []
    for place in np.ndindex(*dense.shape[rank + 1 : -1]):
        at = (..., *place, slice(None))
        values, present = dense[at], mask[at]
        if first:
            values, present = np.moveaxis(values, rank, 0), np.moveaxis(present, rank, 0)
        rows.append(values[present].reshape(-1, filters))
    return np.stack(rows)
