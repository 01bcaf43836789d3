"""The optimizer where sources teach: steps that turn every direction of a kernel alike.

Muon (https://kellerjordan.github.io/posts/muon, arXiv:2502.16982) replaces the momentum of a matrix by the nearest
orthogonal one, found by Newton and Schulz's iteration. A student that starts from a merge is right along the directions
that carry most of its outputs, and Adam spends its steps on these; what a merge lost lies along the others. Keras's own
`Muon` takes matrices alone; here kernels of convolutions are matrices too, split where they are most nearly square.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

LEAST = 16
"""Rows and columns that a matrix has at least: with few there is nothing to turn."""
SHARE = 0.3
"""Of the operations of a step, what finding orthogonal matrices may come to on top: of a dense layer that reads few
rows they come to many times its own."""
ITERATIONS = 5


def kernels_of(layers: Iterable[Any], others: Iterable[Any], rows: int) -> dict[str, int]:
    """Which kernels are worth it, and how many of their axes are the rows of their matrix, by the variable's path.

    Args:
        layers: live and built, whose kernels may be taken.
        others: the other layers, which take their part of a step's operations.
        rows: of a batch.
    """
    found = []
    total = 0.0
    for taken, group in ((True, layers), (False, others)):
        for layer in _inner(group):
            kernel = _kernel(layer)
            if kernel is None:
                continue
            own = 6.0 * rows * math.prod(kernel.shape) * _places(layer)
            total += own
            split = _split(kernel.shape)
            less, more = sorted((math.prod(kernel.shape[:split]), math.prod(kernel.shape[split:])))
            if taken and kernel.trainable and less >= LEAST:
                found.append((ITERATIONS * (4.0 * less * less * more + 2.0 * less**3), own, kernel.path, split))
    chosen, spent = {}, 0.0
    for cost, _, path, split in sorted(found, key=lambda item: item[0] / item[1]):
        spent += cost
        if spent > SHARE * total:
            break
        chosen[path] = split
    return chosen


def _inner(layers: Iterable[Any]) -> list[Any]:
    found = {id(inner): inner for layer in layers for inner in layer._flatten_layers()}
    return list(found.values())


def _kernel(layer: Any) -> Any:
    """Of a layer that multiplies all its inputs at once; None of any other, recurrent ones among them."""
    import keras

    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    convolutions = tuple(
        getattr(keras.layers, f"Conv{rank}D{kind}") for rank in (1, 2, 3) for kind in ("", "Transpose")
    )
    kernel = getattr(layer, "_kernel", None) if isinstance(layer, kinds + convolutions) else None
    return kernel if kernel is not None and len(getattr(kernel, "shape", ())) >= 2 else None


def _places(layer: Any) -> int:
    """For how many places of one row a kernel is used, as far as it is known."""
    try:
        shape = layer.output.shape
    except AttributeError:  # called within another layer, or several times
        return 1
    first = getattr(layer, "data_format", None) == "channels_first"
    return math.prod(size or 1 for size in (shape[2:] if first else shape[1:-1]))


def _split(shape: Sequence[int]) -> int:
    """How many axes are rows, so that the matrix is most nearly square.

    >>> _split((3, 3, 32, 64))
    3
    >>> _split((64, 4, 16))
    1
    """

    def unevenness(split: int) -> float:
        return abs(math.log(math.prod(shape[:split]) / math.prod(shape[split:])))

    return min(range(1, len(shape)), key=unevenness)


def make_muon(rate: Any, kernels: Mapping[str, int]) -> Any:
    """An optimizer that takes its steps for some kernels so, and for all other variables as Adam.

    Args:
        rate: number or schedule; for a kernel the change of an entry is 0.2 of it, in the mean of squares.
        kernels: as of `kernels_of`.
    """
    settings = {"weight_decay": None, "adam_weight_decay": None, "ns_steps": ITERATIONS}
    return _muon_class()(rate, kernels=kernels, **settings)


@cache
def _muon_class() -> Any:
    import keras
    from keras import ops

    class KernelMuon(keras.optimizers.Muon):  # type: ignore[misc]
        def __init__(self, *settings: Any, kernels: Mapping[str, int], **more: Any) -> None:
            super().__init__(*settings, **more)
            self.kernels = dict(kernels)

        def build(self, var_list: Sequence[Any]) -> None:
            # By place: an update may be given TensorFlow's own variables, which have no path.
            self._splits = [self.kernels.get(variable.path, 0) for variable in var_list]
            super().build(var_list)

        def _should_use_adamw(self, variable: Any) -> bool:
            return variable.path not in self.kernels

        def _muon_update_step(self, gradient: Any, variable: Any, lr: Any, m: Any) -> None:
            self.assign_add(m, ops.subtract(gradient, (1 - self.momentum) * m))
            ahead = ops.add(gradient, self.momentum * m)
            shape, split = tuple(variable.shape), self._splits[self._get_variable_index(variable)]
            matrix = ops.reshape(ahead, (math.prod(shape[:split]), math.prod(shape[split:])))
            step = self.lr_adjust(lr * self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
            self.assign_sub(variable, ops.reshape(step, shape))

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "kernels": self.kernels}

    return KernelMuon
