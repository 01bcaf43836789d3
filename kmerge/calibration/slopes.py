"""How strongly what a network gives depends on what its layers gave on the way: gradients, on backends that have them.

Nothing is trained by them: they tell which errors in the middle of a network matter at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kmerge.calibration.network import BEFORE, Network, to_numpy
from kmerge.graph import Ref
from kmerge.methods.registry import Array

Weighting = Callable[[Ref, Array], Array]
"""Factors for the entries of an output, from its place in the network and its values."""


def slopes(
    network: Network, batch: Sequence[Array], outputs: Sequence[Ref], at: Sequence[Ref], weigh: Weighting
) -> dict[Ref, Array]:
    """Gradients of a weighted sum of outputs.

    Args:
        network: that is run, as it predicts.
        batch: inputs, rows first.
        outputs: tensors that are summed up.
        at: tensors for which the gradients are wanted.
        weigh: gives the factors of an output's entries.

    Returns:
        A gradient for each of the tensors, in its shape. Those that the outputs do not depend on are missing, or 0 on
        JAX; all are missing on a backend without gradients (NumPy, OpenVINO).
    """
    import keras

    found = _BACKENDS.get(keras.backend.backend())
    return (
        {}
        if found is None
        else found(network, batch, outputs, sorted(set(at), key=lambda ref: (ref.call, ref.output)), weigh)
    )


def _run(
    network: Network, batch: Sequence[Array], outputs: Sequence[Ref], at: Sequence[Ref], mark: Callable[[Any, Ref], Any]
) -> dict[Ref, Any]:
    """A forward pass in which every tensor of `at` is marked before anything reads it."""
    values = network.given(batch)
    for ref in at:
        network.run(values, [ref], gradients=True)
        values[ref] = mark(values[ref], ref)
        if ref.output == BEFORE:
            values[Ref(ref.call, 0)] = network.activation(network.merged.graph.calls[ref.call].layer)(values[ref])
    network.run(values, outputs, gradients=True)
    return values


def _total(values: Mapping[Ref, Any], outputs: Sequence[Ref], weights: Mapping[Ref, Array]) -> Any:
    import keras

    convert = keras.ops.convert_to_tensor
    return sum(keras.ops.sum(values[ref] * convert(weights[ref].astype(np.float32))) for ref in outputs)


def _tensorflow(
    network: Network, batch: Sequence[Array], outputs: Sequence[Ref], at: Sequence[Ref], weigh: Weighting
) -> dict[Ref, Array]:
    import tensorflow as tf

    with tf.GradientTape() as tape:

        def mark(value: Any, _: Ref) -> Any:
            tape.watch(value)
            return value

        values = _run(network, batch, outputs, at, mark)
        total = _total(values, outputs, {ref: weigh(ref, to_numpy(values[ref])) for ref in outputs})
    return _found(at, tape.gradient(total, [values[ref] for ref in at]))


def _torch(
    network: Network, batch: Sequence[Array], outputs: Sequence[Ref], at: Sequence[Ref], weigh: Weighting
) -> dict[Ref, Array]:
    import torch

    def mark(value: Any, _: Ref) -> Any:
        return value if value.requires_grad else value.requires_grad_()

    with torch.enable_grad():
        values = _run(network, batch, outputs, at, mark)
        total = _total(values, outputs, {ref: weigh(ref, to_numpy(values[ref])) for ref in outputs})
    return _found(at, torch.autograd.grad(total, [values[ref] for ref in at], allow_unused=True))


def _jax(
    network: Network, batch: Sequence[Array], outputs: Sequence[Ref], at: Sequence[Ref], weigh: Weighting
) -> dict[Ref, Array]:
    import jax

    values = _run(network, batch, outputs, at, lambda value, _: value)
    weights = {ref: weigh(ref, to_numpy(values[ref])) for ref in outputs}
    still = {ref: values[ref] * 0 for ref in at}

    def total(added: Mapping[Ref, Any]) -> Any:
        moved = _run(network, batch, outputs, at, lambda value, ref: value + added[ref])
        return _total(moved, outputs, weights)

    found = jax.grad(lambda added: total(dict(zip(at, added, strict=True))))([still[ref] for ref in at])
    return _found(at, found)


def _found(at: Sequence[Ref], gradients: Sequence[Any]) -> dict[Ref, Array]:
    return {ref: to_numpy(value) for ref, value in zip(at, gradients, strict=True) if value is not None}


_BACKENDS = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
