"""What Theano padded otherwise, computed by hand and by the converted file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from old_files import converted, write_old

from kmerge.source import open_source
from kmerge.upgrade import upgrade


def write_theano(
    path: Path, class_name: str, config: dict[str, Any], arrays: Mapping[str, np.ndarray], version: str = "2.1.3"
) -> Path:
    """A Sequential model of one layer, as Keras on Theano wrote it."""
    return write_old(path, [(class_name, config)], arrays, version, None if version.startswith("1") else "theano")


def obstacles(path: Path) -> list[str]:
    with open_source(path) as source:
        return [one.reason for one in upgrade(source).obstacles]


# --------------------------------------------------------------------------------------------------- by hand


def half(size: int, dilation: int) -> int:
    return ((size - 1) * dilation + 1) // 2


def convolve(
    x: np.ndarray, kernel: np.ndarray, steps: Sequence[int], dilation: Sequence[int], same: bool, cut: bool = True
) -> np.ndarray:
    """Theano's convolution proper of (batch, *sizes, inputs) with (*sizes, inputs, filters), cut as Keras does."""
    sizes = kernel.shape[:-2]
    rank = len(sizes)
    kernel = np.flip(kernel, range(rank))
    pad = [half(size, by) if same else 0 for size, by in zip(sizes, dilation, strict=True)]
    padded = np.pad(x, [(0, 0), *((n, n) for n in pad), (0, 0)])
    reach = [(size - 1) * by + 1 for size, by in zip(sizes, dilation, strict=True)]
    places = [(n - r) // s + 1 for n, r, s in zip(padded.shape[1:-1], reach, steps, strict=True)]
    out = np.zeros((len(x), *places, kernel.shape[-1]))
    for place in np.ndindex(*places):
        for tap in np.ndindex(*sizes):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, steps, tap, dilation, strict=True))
            out[:, *place] += padded[:, *at] @ kernel[tap]
    if same and cut:
        out = out[:, *(slice(-(-n // s)) for n, s in zip(x.shape[1:-1], steps, strict=True))]
    return out


def pool(x: np.ndarray, sizes: Sequence[int], steps: Sequence[int], largest: bool) -> np.ndarray:
    """Theano's pooling, which leaves padding out of account."""
    pads = [size - 2 if size > 2 and size % 2 else size - 1 for size in sizes]
    places = [-(-n // s) for n, s in zip(x.shape[1:-1], steps, strict=True)]
    out = np.zeros((len(x), *places, x.shape[-1]))
    for place in np.ndindex(*places):
        window = []
        for p, s, pad, size, n in zip(place, steps, pads, sizes, x.shape[1:-1], strict=True):
            start = p * s - pad
            window.append(slice(max(start, 0), min(start + size, n)))
        inside = x[:, *window]
        axes = tuple(range(1, x.ndim - 1))
        out[:, *place] = inside.max(axis=axes) if largest else inside.mean(axis=axes)
    return out


def spread(
    x: np.ndarray, kernel: np.ndarray, steps: Sequence[int], pads: Sequence[int], places: Sequence[int]
) -> np.ndarray:
    """The gradient of a convolution by its input: (batch, *sizes, inputs) with (*sizes, filters, inputs)."""
    sizes = kernel.shape[:-2]
    out = np.zeros((len(x), *places, kernel.shape[-2]))
    for place in np.ndindex(*x.shape[1:-1]):
        for tap in np.ndindex(*sizes):
            at = tuple(p * s + t - pad for p, s, t, pad in zip(place, steps, tap, pads, strict=True))
            if all(0 <= a < n for a, n in zip(at, places, strict=True)):
                out[:, *at] += x[:, *place] @ kernel[tap].T
    return out


# ----------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("sizes", "steps", "dilation"),
    [((2, 3), (1, 1), (1, 1)), ((4, 5), (2, 3), (1, 1)), ((2, 3), (1, 1), (2, 1)), ((3, 2, 4), (2, 1, 2), (1, 1, 1))],
)
def test_convolutions(
    sizes: tuple[int, ...], steps: tuple[int, ...], dilation: tuple[int, ...], tmp_path: Path
) -> None:
    rank = len(sizes)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *((7, 6, 5)[:rank]), 2))
    kernel, bias = rng.normal(size=(*sizes, 2, 3)), rng.normal(size=3)
    config = {
        "batch_input_shape": [None, *x.shape[1:]], "filters": 3, "kernel_size": sizes, "strides": steps,
        "dilation_rate": dilation, "padding": "same", "data_format": "channels_last", "activation": "linear",
    }  # fmt: skip
    path = write_theano(tmp_path / "a.h5", f"Conv{rank}D", config, {"kernel": kernel, "bias": bias})
    wanted = convolve(x, kernel, steps, dilation, True) + bias
    np.testing.assert_allclose(converted(path, x), wanted, atol=1e-4)


def test_a_convolution_with_channels_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 7, 6, 5, 2)), rng.normal(size=(2, 3, 2, 2, 3))
    config = {
        "batch_input_shape": [None, 2, 7, 6, 5], "filters": 3, "kernel_size": [2, 3, 2], "strides": [2, 1, 1],
        "padding": "same", "data_format": "channels_first", "use_bias": False,
    }  # fmt: skip
    path = write_theano(tmp_path / "a.h5", "Conv3D", config, {"kernel": kernel})
    wanted = convolve(x, kernel, (2, 1, 1), (1, 1, 1), True)
    np.testing.assert_allclose(converted(path, np.moveaxis(x, -1, 1)), np.moveaxis(wanted, -1, 1), atol=1e-4)


def test_separable_convolutions_keep_the_place_that_an_even_kernel_makes(tmp_path: Path) -> None:
    """Keras turned the depthwise kernel round itself, and cut the result by the size of the pointwise one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 2))
    depthwise, pointwise = rng.normal(size=(2, 3, 2, 1)), rng.normal(size=(1, 1, 2, 3))
    config = {
        "batch_input_shape": [None, 5, 6, 2], "filters": 3, "kernel_size": [2, 3], "strides": [1, 1],
        "padding": "same", "data_format": "channels_last", "depth_multiplier": 1, "use_bias": False,
    }  # fmt: skip
    arrays = {"depthwise_kernel": depthwise, "pointwise_kernel": pointwise}
    path = write_theano(tmp_path / "a.h5", "SeparableConv2D", config, arrays)
    kernel = np.flip(depthwise[..., 0][..., None] * pointwise[0, 0], (0, 1))
    np.testing.assert_allclose(converted(path, x), convolve(x, kernel, (1, 1), (1, 1), True, cut=False), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "steps", "first"),
    [
        ((2,), (2,), False),
        ((3, 3), (2, 2), False),
        ((3, 3), (2, 2), True),
        ((2, 3), (2, 1), False),
        ((5, 4), (2, 3), True),
        ((3, 1, 2), (2, 1, 1), False),
        ((3, 1, 2), (2, 1, 1), True),
    ],
)
@pytest.mark.parametrize("largest", [True, False], ids=["max", "average"])
def test_pools(sizes: tuple[int, ...], steps: tuple[int, ...], first: bool, largest: bool, tmp_path: Path) -> None:
    rank = len(sizes)
    x = np.random.default_rng(0).normal(size=(2, *((7, 6, 5)[:rank]), 2)) - 3  # nothing is above zero
    given = np.moveaxis(x, -1, 1) if first else x
    config: dict[str, Any] = {
        "batch_input_shape": [None, *given.shape[1:]], "pool_size": list(sizes), "strides": list(steps),
        "padding": "same",
    }  # fmt: skip
    if rank > 1:
        config["data_format"] = "channels_first" if first else "channels_last"
    kind = "Max" if largest else "Average"
    path = write_theano(tmp_path / "a.h5", f"{kind}Pooling{rank}D", config, {})
    got = converted(path, given)
    np.testing.assert_allclose(np.moveaxis(got, 1, -1) if first else got, pool(x, sizes, steps, largest), atol=1e-5)


def test_pools_of_three_go_into_the_old_format(tmp_path: Path) -> None:
    """Their windows need no operation, only further layers."""
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 2))
    config = {"batch_input_shape": [None, 7, 6, 2], "pool_size": [3, 3], "strides": [2, 2], "padding": "same"}
    path = write_theano(tmp_path / "a.h5", "AveragePooling2D", {**config, "data_format": "channels_last"}, {})
    np.testing.assert_allclose(converted(path, x, ".h5"), pool(x, (3, 3), (2, 2), False), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "steps"), [((3, 3), (1, 1)), ((3, 5), (2, 2)), ((3, 1), (3, 2)), ((3, 3, 5), (2, 1, 3))]
)
def test_transposed_convolutions(sizes: tuple[int, ...], steps: tuple[int, ...], tmp_path: Path) -> None:
    """Half a kernel is cut off in front, and as many places are kept as steps lead to."""
    rank = len(sizes)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *((4, 3, 2)[:rank]), 2))
    kernel, bias = rng.normal(size=(*sizes, 3, 2)), rng.normal(size=3)
    config = {
        "batch_input_shape": [None, *x.shape[1:]], "filters": 3, "kernel_size": sizes, "strides": steps,
        "padding": "same", "data_format": "channels_last", "activation": "linear",
    }  # fmt: skip
    path = write_theano(tmp_path / "a.h5", f"Conv{rank}DTranspose", config, {"kernel": kernel, "bias": bias})
    places = [n * s for n, s in zip(x.shape[1:-1], steps, strict=True)]
    turned = np.flip(kernel, range(rank))
    wanted = spread(x, turned, steps, [size // 2 for size in sizes], places) + bias
    np.testing.assert_allclose(converted(path, x), wanted, atol=1e-4)


@pytest.mark.parametrize(("places", "same"), [((7, 6), True), ((8, 6), True), ((10, 9), False), ((9, 8), False)])
@pytest.mark.parametrize("theano", [True, False], ids=["theano", "tensorflow"])
def test_keras_1_gave_transposed_convolutions_their_output_shape(
    places: tuple[int, int], same: bool, theano: bool, tmp_path: Path
) -> None:
    """Deconvolution2D(output_shape=…): of the sizes from which the steps lead back to the input's."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(3, 3, 2, 3))  # (rows, columns, inputs, filters)
    if not same:
        places = (places[0], places[1] - 1)
    config = {
        "batch_input_shape": [None, 4, 3, 2], "output_shape": [None, *places, 3], "nb_filter": 3, "nb_row": 3,
        "nb_col": 3, "subsample": [2, 2], "border_mode": "same" if same else "valid", "dim_ordering": "tf",
        "bias": False, "activation": "linear",
    }  # fmt: skip
    name = "l_W" if theano else "l_W:0"
    path = write_theano(tmp_path / "a.h5", "Deconvolution2D", config, {name: kernel}, "1.2.2")
    full = (2 * 3 + 3, 2 * 2 + 3)
    front = [0, 0]
    if same:
        front = [1, 1] if theano else [max(f - p, 0) // 2 for f, p in zip(full, places, strict=True)]
    turned = np.flip(kernel, (0, 1)) if theano else kernel
    wanted = spread(x, np.swapaxes(turned, 2, 3), (2, 2), front, places)
    np.testing.assert_allclose(converted(path, x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "steps", "same", "dilation"),
    [
        ((3, 3), (2, 2), True, (1, 1)),
        ((2, 3), (1, 1), True, (1, 1)),
        ((2, 4), (1, 1), False, (1, 1)),
        ((4, 3), (2, 1), True, (1, 1)),
        ((2, 2), (1, 1), True, (2, 1)),
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_convolutional_lstms(
    sizes: tuple[int, int],
    steps: tuple[int, int],
    same: bool,
    dilation: tuple[int, int],
    first: bool,
    tmp_path: Path,
) -> None:
    """The hidden state is padded as well, whatever the padding of the input."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6, 5, 2))
    kernel, recurrent = rng.normal(size=(*sizes, 2, 8)) / 4, rng.normal(size=(*sizes, 2, 8)) / 4
    bias = rng.normal(size=8)
    given = np.moveaxis(x, -1, 2) if first else x
    config = {
        "batch_input_shape": [None, *given.shape[1:]], "filters": 2, "kernel_size": sizes, "strides": steps,
        "padding": "same" if same else "valid", "data_format": "channels_first" if first else "channels_last",
        "dilation_rate": dilation, "activation": "tanh", "recurrent_activation": "sigmoid", "return_sequences": True,
    }  # fmt: skip
    arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
    path = write_theano(tmp_path / "a.h5", "ConvLSTM2D", config, arrays)

    def gate(value: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-value))

    hidden = cell = 0.0
    wanted = []
    for step in range(3):
        total = convolve(x[:, step], kernel, steps, dilation, same) + bias
        if step:
            total = total + convolve(np.asarray(hidden), recurrent, (1, 1), (1, 1), True)
        i, f, c, o = np.split(total, 4, axis=-1)
        cell = gate(f) * cell + gate(i) * np.tanh(c)
        hidden = gate(o) * np.tanh(cell)
        wanted.append(hidden)
    got = converted(path, given)
    np.testing.assert_allclose(np.moveaxis(got, 2, -1) if first else got, np.stack(wanted, axis=1), atol=1e-5)


def test_what_theano_never_computed_is_refused(tmp_path: Path) -> None:
    config = {
        "batch_input_shape": [None, 4, 4, 2], "filters": 3, "kernel_size": [2, 3], "strides": [2, 2],
        "padding": "same", "data_format": "channels_last", "use_bias": False,
    }  # fmt: skip
    path = write_theano(tmp_path / "a.h5", "Conv2DTranspose", config, {"kernel": np.ones((2, 3, 3, 2))})
    assert obstacles(path) == ["has an even kernel and padding 'same', which Theano never computed"]


def test_pools_inside_a_wrapper(tmp_path: Path) -> None:
    """Those of three are layers, and go; others need operations, which no wrapper holds."""
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 6, 2))
    for size, fine in ((3, True), (2, False)):
        inner = {"name": "p", "pool_size": [size, size], "strides": [2, 2], "padding": "same"}
        layer = {"class_name": "MaxPooling2D", "config": {**inner, "data_format": "channels_last"}}
        config = {"batch_input_shape": [None, *x.shape[1:]], "layer": layer}
        path = write_theano(tmp_path / f"{size}.h5", "TimeDistributed", config, {})
        if fine:
            wanted = np.stack([pool(x[:, step], (3, 3), (2, 2), True) for step in range(3)], axis=1)
            np.testing.assert_allclose(converted(path, x), wanted, atol=1e-6)
        else:
            assert obstacles(path) == ["becomes operations, which cannot stand inside a wrapper"]
