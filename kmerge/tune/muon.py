"""The optimizer where sources teach: steps that turn every direction of a kernel alike.

Muon (https://kellerjordan.github.io/posts/muon, arXiv:2502.16982) replaces the momentum of a matrix by the nearest
orthogonal one, found by Newton and Schulz's iteration. A student that starts from a merge is right along the directions
that carry most of its outputs, and Adam spends its steps on these; what a merge lost lies along the others. Keras's own
`Muon` takes matrices alone; here kernels of convolutions are matrices too, from all that one unit reads to the units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from kmerge.graph import Ref
from kmerge.shapes.calls import Inputs
from kmerge.shapes.cost import layer_cost

LEAST = 16
"""Rows and columns that a matrix has at least: with few there is nothing to turn."""
SHARE = 0.3
"""Of the operations of a step, what finding orthogonal matrices may come to on top: of a dense layer that reads few
rows they come to many times its own. Several processes share a step's rows, and each finds all matrices: the choice is
that of one process, so that the result is."""
ITERATIONS = 5


def kernels_of(layers: Iterable[Any], others: Iterable[Any], rows: int) -> list[tuple[Any, int]]:
    """Which kernels are worth it, and how many of their axes are the rows of their matrix; the cheapest come first.

    Args:
        layers: live and built, whose kernels may be taken.
        others: the other layers, which take their part of a step's operations.
        rows: of a batch.
    """
    found: list[tuple[float, float, Any, int]] = []
    total = sum(6.0 * rows * _uses(layer) * _kernel_size(layer) for layer in _plain(others))
    for layer in _plain(layers):
        uses = _uses(layer)
        total += 6.0 * rows * uses * _kernel_size(layer)
        for kernel, split in _kernels(layer):
            less, more = sorted((math.prod(kernel.shape[:split]), math.prod(kernel.shape[split:])))
            if less >= LEAST:
                cost = ITERATIONS * (4.0 * less * less * more + 2.0 * less**3)
                found.append((cost, 6.0 * rows * uses * less * more, kernel, split))
    chosen, spent = [], 0.0
    for cost, _, kernel, split in sorted(found, key=lambda item: item[0] / item[1]):
        spent += cost
        if spent > SHARE * total:
            break
        chosen.append((kernel, split))
    return chosen


def _plain(layers: Iterable[Any]) -> Iterator[Any]:
    """Layers of Keras, those of nested models for the models."""
    import keras

    for layer in layers:
        if isinstance(layer, keras.Model):
            yield from _plain(layer.layers)
        elif type(layer).__module__.startswith("keras."):
            yield layer


def _kernel_size(layer: Any) -> int:
    """Entries of all weights of a layer but its vectors."""
    return sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)


def _uses(layer: Any) -> float:
    """How often a layer's weights are used for one row of a batch: once, where that is not known, as of free sizes."""
    weights, total = [tuple(weight.shape) for weight in layer.weights], 0
    for node in layer._inbound_nodes:
        given = {Ref(number): tuple(tensor.shape) for number, tensor in enumerate(node.input_tensors)}
        made = tuple(node.output_tensors[0].shape)
        total += (
            layer_cost(type(layer).__name__, layer.get_config(), Inputs(tuple(given), {}, given), made, weights) or 0
        )
    return max(total / max(_kernel_size(layer), 1), 1.0)


def _kernels(layer: Any) -> Iterator[tuple[Any, int]]:
    """What a layer multiplies all its inputs with at once, and how many axes are rows of its matrix; nothing of
    recurrent, grouped and depthwise ones, and of tables.
    """
    import keras

    kinds = (keras.layers.Dense, keras.layers.EinsumDense, *_convolutions(keras))
    for inner in layer._flatten_layers():
        if isinstance(inner, kinds) and getattr(inner, "groups", 1) == 1:
            kernel: Any = inner._kernel if hasattr(inner, "_kernel") else inner.kernel  # not what adapters add up to
            if kernel.trainable and math.prod(kernel.shape):
                free = isinstance(inner, keras.layers.EinsumDense)
                yield kernel, _split(kernel.shape) if free else len(kernel.shape) - 1


def _convolutions(keras: Any) -> tuple[Any, ...]:
    return tuple(getattr(keras.layers, f"Conv{rank}D{kind}") for rank in (1, 2, 3) for kind in ("", "Transpose"))


def _split(shape: Sequence[int]) -> int:
    """How many axes of a kernel are rows, so that its matrix is most nearly square.

    >>> _split((64, 4, 16))
    1
    >>> _split((4, 16, 64))
    2
    """

    def unevenness(split: int) -> float:
        return abs(math.log(math.prod(shape[:split]) / math.prod(shape[split:])))

    return min(range(1, len(shape)), key=unevenness)


def make_muon(rate: Any, splits: Mapping[int, int]) -> Any:
    """An optimizer that takes its steps for some kernels so, and for all other variables as Adam.

    Args:
        rate: number or schedule; an entry of a kernel changes by about 0.2 of it, the root of the mean of squares.
        splits: by the places of these kernels among the variables, how many of their axes are rows of their matrix.
    """
    settings = {"weight_decay": None, "adam_weight_decay": None, "ns_steps": ITERATIONS}
    return _muon_class()(rate, splits=splits, **settings)


@cache
def _muon_class() -> Any:
    import keras
    from keras import ops

    class KernelMuon(keras.optimizers.Muon):  # type: ignore[misc]
        def __init__(self, *settings: Any, splits: Mapping[int, int], **more: Any) -> None:
            super().__init__(*settings, **more)
            self.splits = dict(splits)

        def _should_use_adamw(self, variable: Any) -> bool:
            return self._get_variable_index(variable) not in self.splits

        def _muon_update_step(self, gradient: Any, variable: Any, lr: Any, m: Any) -> None:
            self.assign_add(m, ops.subtract(gradient, (1 - self.momentum) * m))
            ahead = ops.cast(ops.add(gradient, self.momentum * m), "float32")
            shape, split = tuple(variable.shape), self.splits[self._get_variable_index(variable)]
            matrix = ops.reshape(ahead, (math.prod(shape[:split]), math.prod(shape[split:])))
            turned = self.zeropower_via_newtonschulz5(matrix, self.ns_steps)
            step = self.lr_adjust(ops.cast(lr, "float32") * turned)
            self.assign_sub(variable, ops.cast(ops.reshape(step, shape), variable.dtype))

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "splits": self.splits}

    return KernelMuon
