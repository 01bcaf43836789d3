"""Layers of Keras 1 that Keras 2 dropped, as layers of current Keras that compute the same together."""

from __future__ import annotations

from typing import Any

import numpy as np

from kmerge.store import Tensor
from kmerge.store.derived import derived
from kmerge.upgrade.part import Chain, Context, Part, operation, reshaped


def maxout_dense(part: Part, _: Context) -> Chain:
    """The largest of several linear layers: W (features, inputs, units), b (features, units)."""
    kernel, *bias = part.tensors
    features, _inputs, units = kernel.shape
    settings = {
        "equation": "...b,cbd->...cd",
        "output_shape": [features, units],
        "bias_axes": "cd" if bias else None,
        "dtype": part.config.get("dtype", "float32"),
    }
    return [
        Part("EinsumDense", settings, part.tensors, suffix="linear"),
        operation("Max", "numpy", axis=-2, keepdims=False),
    ]


def highway(part: Part, _: Context) -> Chain:
    """t h(x) + (1 - t) x, as x + t (h(x) - x), with a gate t of its own.

    Keras 1.2 lists W, W_carry, b, b_carry, earlier ones W, b, W_carry, b_carry: matrices and biases come in one order.
    """
    config = part.config
    matrices = [tensor for tensor in part.tensors if len(tensor.shape) == 2]
    biases = [tensor for tensor in part.tensors if len(tensor.shape) == 1]
    units = matrices[0].shape[-1] if matrices else 0
    bias = bool(biases)
    wanted = [(units, units)] * 2 + [(units,)] * (2 * bias)
    if [tensor.shape for tensor in (*matrices, *biases)] != wanted or len(part.tensors) != len(wanted):
        raise ValueError(f"the weights of Highway are {[tensor.shape for tensor in part.tensors]}, expected {wanted}")
    # The rest says how training began: `transform_bias` is what b_carry started from.
    own = {key: value for key, value in config.items() if key not in ("activity_regularizer", *_BEGINNING)}
    plain = {"dtype": config.get("dtype", "float32"), "trainable": config.get("trainable", True)}
    kernels = [(matrix, *biases[number : number + 1]) for number, matrix in enumerate(matrices)]
    return [
        Part("Dense", {**plain, "units": units, "activation": "sigmoid", "use_bias": bias}, kernels[1], suffix="gate"),
        Part("Dense", {**own, "units": units, "use_bias": bias}, kernels[0], suffix="transform", back=(2,)),
        Part("Subtract", {}, suffix="change", back=(1, 3)),
        Part("Multiply", {}, suffix="gated", back=(3, 1)),
        Part("Add", {"activity_regularizer": config.get("activity_regularizer")}, back=(5, 1)),
    ]


_BEGINNING = ("transform_bias", "input_dim")


def parametric_softplus(part: Part, context: Context) -> Chain:
    """alpha softplus(beta x)."""
    alphas, betas = part.tensors
    return [_scale(betas, None, part, context, "beta", activation="softplus"), _scale(alphas, None, part, context)]


def srelu(part: Part, context: Context) -> Chain:
    """Three slopes: x + (a_l - 1) min(x - t_l, 0) + (a_r - 1) max(x - t_r, 0), where t_r is t_l + |the third weight|.

    Theano cuts the left part off at t_r as well, which tells where a_l is negative.
    """
    left, slope_left, width, slope_right = part.tensors
    context.note(
        f"'{context.layer}' (SReLU) became layers that hold its four weights several times over: what is trained "
        "further is no longer bound to be an SReLU"
    )

    def made(make: Any, *tensors: Tensor) -> Tensor:
        return derived(tensors[0], tensors[0].shape, lambda: np.asarray(make(*(tensor.read() for tensor in tensors))))

    def filled(value: float) -> Tensor:
        return made(lambda array: np.full_like(array, value), left)

    right = made(lambda t, w: -(t + np.abs(w)), left, width)
    chain = [
        _scale(filled(-1.0), left, part, context, "below", activation="relu"),
        _scale(made(lambda a: 1 - a, slope_left), None, part, context, "left"),
        _scale(filled(1.0), right, part, context, "above", activation="relu", back=(3,)),
        _scale(made(lambda a: a - 1, slope_right), None, part, context, "right"),
        Part("Add", {}, suffix="sum" if context.theano else "", back=(5, 3, 1)),
    ]
    if context.theano:
        bound = made(lambda w: -np.abs(w), width)
        excess = _scale(made(lambda a: -a, slope_left), bound, part, context, "excess", activation="relu", back=(5,))
        chain += [excess, Part("Subtract", {}, back=(2, 1))]
    return chain


def normalised_rows(part: Part, context: Context) -> Chain:
    """BatchNormalization(mode=1): (x - mean) / (sqrt(variance + e) + e), of each row by itself; e is added twice."""
    epsilon = {"scale": 1.0, "offset": part.config.get("epsilon", 1e-5), "dtype": part.config.get("dtype", "float32")}
    gamma, beta = part.tensors[:2]
    return [
        operation("Mean", "numpy", axis=-1, keepdims=True),
        Part("Subtract", {}, suffix="centred", back=(2, 1)),
        operation("Var", "numpy", (3,), axis=-1, keepdims=True),
        Part("Rescaling", epsilon, suffix="variance"),
        operation("Sqrt", "numpy"),
        Part("Rescaling", epsilon, suffix="deviation"),
        operation("Divide", "numpy", (5, 1)),
        _scale(gamma, beta, part, context),
    ]


def _scale(
    factor: Tensor, offset: Tensor | None, part: Part, context: Context, suffix: str = "", **settings: Any
) -> Part:
    """Every entry times its own factor, plus an offset: an EinsumDense; axes of length 1 are shared."""
    back = settings.pop("back", (1,))
    rank = len(factor.shape)
    sizes = list(context.input_shape or ())[-rank:] if rank else []
    sizes = sizes if len(sizes) == rank else list(factor.shape)
    letters = "abcdefgh"[:rank]
    kept = [place for place, size in enumerate(factor.shape) if size != 1]
    if not kept:  # one factor for all: one for each entry of the last axis, all the same
        last = sizes[-1] if sizes else None
        if last is None:
            context.refuse(part.class_name, "unknown", "shares one weight, on an input of unknown size")
            last = 1
        kept, count = [rank - 1], int(last)
        spread = [_spread(tensor, count) for tensor in (factor, offset) if tensor is not None]
    else:
        spread = [reshaped(factor, [factor.shape[place] for place in kept])]
        if offset is not None:  # a bias has all axes from the first one on
            spread.append(reshaped(offset, factor.shape[kept[0] :]))
    used = "".join(letters[place] for place in kept)
    config = {
        "equation": f"...{letters},{used}->...{letters}",
        "output_shape": sizes,
        "bias_axes": used if offset is not None else None,
        "dtype": part.config.get("dtype", "float32"),
        "trainable": part.config.get("trainable", True),
        **settings,
    }
    return Part("EinsumDense", config, tuple(spread), suffix=suffix, back=back)


def _spread(tensor: Tensor, count: int) -> Tensor:
    """One number, as often as there are entries."""
    if count == 1:
        return reshaped(tensor, (1,))
    return derived(tensor, (count,), lambda: np.broadcast_to(tensor.read().reshape(-1), (count,)))
