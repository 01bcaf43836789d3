"""Multiply-adds by class of layer: products with weight matrices, and the two products of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from kmerge.shapes.calls import Inputs
from kmerge.shapes.layers import UNCHANGED, canonical_class, chain, einsum, inner_layer, layer_outputs
from kmerge.shapes.recurrent import GATES, cells
from kmerge.shapes.values import Shape, Size, axes, names, product
from kmerge.shapes.windows import conv

Config = Mapping[str, Any]
Weights = Sequence[tuple[int, ...]]
Cost = Callable[[Config, Inputs, "Shape | None", Weights], "int | None"]


def layer_cost(class_name: str, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    """Multiply-adds of one call of a layer, for a batch of one; None where they cannot be known.

    Args:
        class_name: one of Keras's classes; anything else is a custom layer.
        config: the layer's configuration.
        inputs: what the layer is called with.
        output: shape of its first output.
        weights: shapes of its weights, in Keras's order.
    """
    class_name = canonical_class(class_name)
    if class_name in _FREE:
        return 0
    rule = _COSTS.get(class_name)
    if rule is not None:
        return rule(config, inputs, output, weights)
    return 0 if all(len(shape) < 2 for shape in weights) else None


def _matrix(weights: Weights, index: int, rank: int) -> tuple[int, ...] | None:
    """One kernel, if it has the expected rank."""
    return weights[index] if index < len(weights) and len(weights[index]) == rank else None


def _positions(shape: Shape | None, rank: int, config: Config) -> int | None:
    """Number of places of a tensor: everything but batch and channels."""
    found = axes(shape, rank, config)
    return product(size for axis, size in enumerate(shape) if axis not in (0, found[1])) if shape and found else None


def _dense(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    kernel = _matrix(weights, 0, 2)
    return product((*kernel, *inputs.first[1:-1])) if kernel and inputs.first else None


def _einsum_dense(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    shape, labels = inputs.first, einsum(config)
    if not shape or labels is None or not weights or len(weights[0]) != len(labels[1]):
        return None
    source, shared, _, left = labels
    elided = len(shape) - len(source)
    if elided < 0 or (elided and left is None) or (source[0] in shared and not (left and elided)):
        return None
    open_axes = [None] * elided
    labelled = [*open_axes, *source] if left else [*source, *open_axes]
    rest = [size for label, size in list(zip(labelled, shape, strict=True))[1:] if label is None or label not in shared]
    return product((*weights[0], *rest))


def _embedding(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    if inputs.argument("reverse", 1) is not True:
        return 0
    return _dense(config, inputs, output, weights)


def _conv(rank: int, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    kernel = _matrix(weights, 0, rank + 2)
    return product((*kernel, _positions(output, rank, config))) if kernel else None


def _separable(rank: int, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    depth, point = _matrix(weights, 0, rank + 2), _matrix(weights, 1, rank + 2)
    places = _positions(output, rank, config)
    if depth is None or point is None or places is None:
        return None
    return _sum((product((*depth, places)), product((*point, places))))


def _transposed(rank: int, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    kernel = _matrix(weights, 0, rank + 2)
    return product((*kernel, _positions(inputs.first, rank, config))) if kernel else None


def _local(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    """LocallyConnected in its first implementation, where every place has weights of its own."""
    kernel = _matrix(weights, 0, 3)
    return product(kernel) if kernel and config.get("implementation", 1) == 1 else None


def _recurrent(class_name: str, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    shape, found = inputs.first, cells(class_name, config)
    if not shape or len(shape) < 2 or found is None or config.get("time_major"):
        return None
    matrices = [kernel for kernel in weights if len(kernel) > 1]
    total, start = 0, 0
    for cell in found:
        kernel, recurrent = _matrix(matrices, start, 2), _matrix(matrices, start + 1, 2)
        columns = cell.gates * cell.units
        if kernel is None or kernel[1] != columns or recurrent != (cell.units, columns):
            return None
        total += (kernel[0] + recurrent[0]) * columns
        start += 3 if cell.wide_bias else 2
    return product((total, shape[1]))


def _conv_lstm(rank: int, config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    shape = inputs.first
    kernel, recurrent = _matrix(weights, 0, rank + 2), _matrix(weights, 1, rank + 2)
    if not shape or len(shape) < 2 or kernel is None or recurrent is None:
        return None
    step = conv(rank, config, Inputs.of((shape[0], *shape[2:])))
    places = product((shape[1], _positions(step, rank, config)))
    return _sum((product((*kernel, places)), product((*recurrent, places))))


def _bidirectional(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    forward = inner_layer(config)
    backward = inner_layer(config, "backward_layer") if config.get("backward_layer") is not None else forward
    matrices = [kernel for kernel in weights if len(kernel) > 1]
    if forward is None or backward is None or len(matrices) % 2:
        return None
    half = len(matrices) // 2
    return _sum(
        [
            layer_cost(*forward, inputs, None, matrices[:half]),
            layer_cost(*backward, inputs, None, matrices[half:]),
        ]
    )


def _time_distributed(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    shape, inner = inputs.first, inner_layer(config)
    if not weights:
        return 0
    if not shape or len(shape) < 2 or inner is None:
        return None
    step = Inputs.of((shape[0], *shape[2:]))
    return product((shape[1], layer_cost(*inner, step, layer_outputs(*inner, step)[0], weights)))


def _sequential(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    """A Sequential in a wrapper: its layers take the matrices in turn; None where it is not plain whose is whose."""
    layers, shape = chain(config), inputs.first
    matrices: Iterator[tuple[int, ...]] = iter([kernel for kernel in weights if len(kernel) > 1])
    costs: list[int | None] = []
    for class_name, inner in layers or ():
        name = canonical_class(class_name)
        step = Inputs.of(shape)
        shape = layer_outputs(name, inner, step)[0]
        if name in _FREE and name != "PReLU":
            continue
        if name not in _KERNELS or inner.get("trainable") is False:
            return None  # frozen layers are listed last
        taken = list(islice(matrices, _KERNELS[name]))
        costs.append(layer_cost(name, inner, step, shape, taken))
    return _sum(costs) if layers is not None and next(matrices, None) is None else None


def _wrapped(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    inner = inner_layer(config)
    return layer_cost(*inner, inputs, output, weights) if inner is not None else None


def _attention(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    """Attention and AdditiveAttention: scores (queries × keys × size) and the weighted sum of the values."""
    shapes = inputs.shapes
    if len(shapes) < 2 or any(not shape or len(shape) < 3 for shape in shapes[:2]):
        return None
    query, value = shapes[0] or (), shapes[1] or ()
    return _sum((product((*query[1:], value[-2])), product((*query[1:-1], *value[-2:]))))


def _multi_head(config: Config, inputs: Inputs, output: Shape | None, weights: Weights) -> int | None:
    """Projections of query, key and value, (gate,) output; queries × keys × all heads' sizes, twice."""
    query, value = inputs.tensor("query", 0), inputs.tensor("value", 1)
    gate = 1 if config.get("use_gate") else 0
    kernels = [kernel for kernel in weights if len(kernel) > 2][: 4 + gate]  # biases are smaller
    if not query or not value or len(kernels) != 4 + gate or len(query) != len(value):
        return None
    given = config.get("attention_axes")
    attended = [given] if isinstance(given, int) else given
    if attended is None:
        attended = list(range(1, len(query) - 1))
    if not isinstance(attended, (list, tuple)) or not all(isinstance(axis, int) for axis in attended):
        return None
    attended = [axis % len(query) for axis in attended]
    beside = product(size for axis, size in enumerate(query[:-1]) if axis > 0 and axis not in attended)
    queries = product((beside, *(query[axis] for axis in attended)))
    keys = product(value[axis] for axis in attended)
    first, values = kernels[0], kernels[2 + gate]
    heads = first[-2]
    costs = [product((*kernels[number], queries)) for number in (0, 3 + gate, *((2,) if gate else ()))]
    costs += [product((*kernels[number], keys, beside)) for number in (1, 2 + gate)]
    costs += [product((queries, keys, heads, size)) for size in (first[-1], values[-1])]
    return _sum(costs)


def _sum(costs: Iterator[Size] | Sequence[Size]) -> int | None:
    known = list(costs)
    return None if None in known else sum(cost for cost in known if cost is not None)


_FREE = (
    UNCHANGED
    | names(
        """Identity InputLayer Embedding Resizing CenterCrop RandomCrop RandomHeight RandomWidth Flatten Reshape Permute
        RepeatVector Add Average Maximum Minimum Multiply Subtract Concatenate Dot Lambda CategoryEncoding
        Discretization Hashing HashedCrossing StringLookup IntegerLookup TextVectorization"""
    )
    | {
        f"{name}{rank}D"
        for rank in (1, 2, 3)
        for name in names(
            """MaxPooling AveragePooling GlobalMaxPooling GlobalAveragePooling AdaptiveMaxPooling
            AdaptiveAveragePooling UpSampling ZeroPadding Cropping"""
        )
    }
)
_COSTS: dict[str, Cost] = {
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "ReversibleEmbedding": _embedding,
    "LocallyConnected1D": _local,
    "LocallyConnected2D": _local,
    **{name: partial(_recurrent, name) for name in (*GATES, "RNN")},
    "Bidirectional": _bidirectional,
    "TimeDistributed": _time_distributed,
    "Sequential": _sequential,
    "SpectralNormalization": _wrapped,
    "Attention": _attention,
    "AdditiveAttention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _multi_head,
}
_KERNELS = {"Dense": 1, "EinsumDense": 1}
"""Number of kernels of layers whose other weights are vectors."""
for _rank in (1, 2, 3):
    _COSTS |= {
        f"Conv{_rank}D": partial(_conv, _rank),
        f"DepthwiseConv{_rank}D": partial(_conv, _rank),
        f"SeparableConv{_rank}D": partial(_separable, _rank),
        f"Conv{_rank}DTranspose": partial(_transposed, _rank),
        f"ConvLSTM{_rank}D": partial(_conv_lstm, _rank),
    }
    _KERNELS |= {
        f"Conv{_rank}D": 1,
        f"DepthwiseConv{_rank}D": 1,
        f"SeparableConv{_rank}D": 2,
        f"Conv{_rank}DTranspose": 1,
    }
