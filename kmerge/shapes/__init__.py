"""Shapes of the tensors of a graph, and multiply-adds of its calls, without a framework.

What a configuration records on its tensors is taken as it is; everything else follows from the classes of the layers.
What cannot be known is None: an unknown size within a shape, or a whole shape. Nothing here raises for a configuration
that makes no sense.

    values   configuration values, checked
    calls    the arguments of a call in either dialect
    layers   output shapes by class of layer
    cost     multiply-adds by class of layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kmerge.graph import Graph, Layer, Ref, refs
from kmerge.shapes.calls import Inputs, inputs_of
from kmerge.shapes.cost import layer_cost
from kmerge.shapes.layers import is_keras, layer_outputs, operation_outputs
from kmerge.shapes.values import Shape, as_shape

__all__ = ["Shape", "infer_shapes", "multiply_adds"]


def infer_shapes(graph: Graph) -> dict[Ref, Shape | None]:
    """Shapes of all tensors of a graph.

    Of three sources the first that knows a tensor decides: the shape recorded on its `Ref`s, the class and
    configuration of the layer that makes it, the `build_config` of a layer that is called once, on this tensor.

    Args:
        graph: the network.

    Returns:
        Shape per tensor, batch first, None for a size that is free or unknown; None for a shape that is unknown.
        Every call has output 0; further outputs are there where the class of the layer or the graph tells of them.
    """
    recorded: dict[Ref, Shape] = {}
    outputs: dict[int, set[int]] = {}
    for structure in (graph.inputs, graph.outputs, *(call.arguments for call in graph.calls)):
        for ref in refs(structure):
            outputs.setdefault(ref.call, set()).add(ref.output)
            shape = as_shape(ref.shape)
            if shape is not None:
                recorded.setdefault(ref, shape)
    hints = _hints(graph)
    shapes: dict[Ref, Shape | None] = {}
    for index, call in enumerate(graph.calls):
        computed = _outputs(graph.layers[call.layer], inputs_of(call.arguments, shapes))
        for number in sorted(outputs.get(index, set()) | {0, *range(len(computed))}):
            ref = Ref(index, number)
            shapes[ref] = recorded.get(ref)
            if shapes[ref] is None and number < len(computed):
                shapes[ref] = computed[number]
            if shapes[ref] is None:
                shapes[ref] = hints.get(ref)
    return shapes


def multiply_adds(
    graph: Graph,
    shapes: Mapping[Ref, Shape | None],
    weights: Mapping[int, Sequence[tuple[int, ...]]],
) -> dict[int, int | None]:
    """Multiply-add operations of each call, for one row (a batch of one).

    As is usual, only products with weight matrices and the two products of attention count. Normalisation,
    activations, look-ups, pooling, element-wise layers and bare operations are 0.

    Args:
        graph: the network.
        shapes: what `infer_shapes` returned for it.
        weights: shapes of each layer's weights by the layer's index, in Keras's order (kernel first). A layer
            without weights may be left out.

    Returns:
        Multiply-adds per call; None where a size that matters is unknown, or a layer of an unknown class has a
        weight of two or more dimensions.
    """
    costs: dict[int, int | None] = {}
    for index, call in enumerate(graph.calls):
        layer = graph.layers[call.layer]
        if layer.is_operation:
            costs[index] = 0
            continue
        costs[index] = layer_cost(
            layer.class_name if is_keras(layer.class_name, layer.entry) else "",
            layer.config,
            inputs_of(call.arguments, shapes),
            shapes.get(Ref(index)),
            [tuple(shape) for shape in weights.get(call.layer, ())],
        )
    return costs


def _outputs(layer: Layer, inputs: Inputs) -> list[Shape | None]:
    if layer.is_operation:
        return operation_outputs(layer.class_name, layer.config, inputs)
    if not is_keras(layer.class_name, layer.entry):
        return [None]
    return layer_outputs(layer.class_name, layer.config, inputs)


def _hints(graph: Graph) -> dict[Ref, Shape]:
    """What layers that are called once remember of the tensor that they were built on."""
    counts: dict[int, int] = {}
    for call in graph.calls:
        counts[call.layer] = counts.get(call.layer, 0) + 1
    hints: dict[Ref, Shape] = {}
    for call in graph.calls:
        build = graph.layers[call.layer].entry.get("build_config")
        tensors = refs(call.arguments)
        if counts[call.layer] != 1 or not isinstance(build, Mapping) or len(tensors) != 1:
            continue
        shape = as_shape(build.get("input_shape"))
        if shape:
            hints.setdefault(tensors[0], (None, *shape[1:]))
    return hints
