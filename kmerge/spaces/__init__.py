"""Feature spaces: which axes of a network's weights index the same units, derived from its graph.

A Dense layer's columns, its bias, the normalisation behind it and the rows of whatever reads it are one space. Units of
a space may be permuted, everywhere at once, without changing what the network computes. What cannot be permuted, and
what flows into a layer that kmerge does not know, is fixed, with a reason.

    units       units, and the equations between them
    scope       what a rule works with
    layers      rules by class of layer
    attention   rules of attention
    operations  rules of bare operations
    model       the spaces
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from kmerge.dialects.vocabulary import is_quantized
from kmerge.graph import Call, Graph, Layer, Ref, flatten, refs
from kmerge.layout import Layout, source_graph
from kmerge.shapes import Shape, infer_shapes
from kmerge.shapes.calls import inputs_of
from kmerge.shapes.layers import is_keras
from kmerge.source import Source
from kmerge.spaces.layers import layer_rule
from kmerge.spaces.model import AxisUse, Space, order_of
from kmerge.spaces.operations import operation_rule
from kmerge.spaces.scope import Ledger, Scope, Slot
from kmerge.spaces.units import Axes, Order, is_units

__all__ = ["AxisUse", "Space", "derive_spaces", "describe", "layout_spaces", "order_of"]

Shapes = Mapping[Ref, Shape | None]
_FIRST = ("inputs", "sequences", "sequence", "query", "x", "x1")
"""Names of the first argument of Keras's layers and operations."""


def derive_spaces(source: Source, shapes: Shapes | None = None) -> tuple[Space, ...]:
    """The feature spaces of one network.

    Args:
        source: with a graph.
        shapes: of its tensors, where they are known already.

    Returns:
        Spaces in the order in which the graph makes them. Axes of weights that belong to none are never permuted.
    """
    ledger = Ledger()
    _Walk(ledger, 0, source, [("own", number) for number in range(len(source_graph(source).layers))], shapes).run()
    return _solved(ledger)


def layout_spaces(layout: Layout, shared: Collection[int]) -> tuple[Space, ...]:
    """The feature spaces of several networks that share layers: what may be permuted in each of them alike.

    Args:
        layout: the sources, laid over the first.
        shared: layers of the first source that are one for all.

    Returns:
        Spaces with their axes in every source. What is fixed in one source is fixed in all, as far as they share it.
    """
    ledger = Ledger()
    for number, (source, found) in enumerate(zip(layout.sources, layout.matches, strict=True)):
        keys: list[Hashable] = [(number, layer) for layer in range(len(source_graph(source).layers))]
        for mine, theirs in found.layers.items():
            if mine in shared:
                keys[theirs] = ("shared", mine)
        _Walk(ledger, number, source, keys, None).run()
    return _solved(ledger)


def describe(spaces: Sequence[Space], sources: Sequence[Source]) -> list[str]:
    """Lines for people: one per space, and one per axis of a weight."""
    lines = []
    for number, space in enumerate(spaces, 1):
        state = f"fixed: {space.reason}" if space.fixed else "free"
        lines.append(f"space {number}: {space.size} units, {state}" + "".join(f"; {note}" for note in space.notes))
        for use in space.axes:
            layer = source_graph(sources[use.source]).layers[use.layer]
            weight = sources[use.source].states[use.layer].weights[use.weight]
            piece = "".join(f", {start} to {stop - 1} of axis {axis}" for axis, start, stop in use.part)
            who = f"'{sources[use.source].label}': " if len(sources) > 1 else ""
            lines.append(
                f"  {use.role:6} {who}'{layer.name}' ({layer.class_name}) {weight.name}, axis {use.axis}{piece}: "
                f"{use.mapping}"
            )
    return lines


class _Walk:
    """One network, call by call: the axes of every tensor."""

    def __init__(
        self, ledger: Ledger, number: int, source: Source, keys: Sequence[Hashable], shapes: Shapes | None
    ) -> None:
        self.ledger, self.number, self.source, self.keys = ledger, number, source, keys
        self.graph: Graph = source_graph(source)
        self.shapes = infer_shapes(self.graph) if shapes is None else shapes
        self.tensors: dict[Ref, Axes | None] = {}
        self.slots = [
            tuple(
                Slot(place, weight.key, weight.name, weight.tensor.shape) for place, weight in enumerate(state.weights)
            )
            for state in source.states
        ]

    def run(self) -> None:
        for index, call in enumerate(self.graph.calls):
            for number, axes in enumerate(self._call(index, call)):
                self.tensors[Ref(index, number)] = axes
                for axis in axes or ():
                    if is_units(axis):
                        self.ledger.equations.keep_whole(axis)
        for ref in flatten(self.graph.outputs):
            if isinstance(ref, Ref):
                self._pin(self.tensors.get(ref), f"output of '{self.graph.layer_of(ref).name}'")

    def _pin(self, axes: Axes | None, reason: str) -> None:
        for axis in axes or ():
            if is_units(axis):
                self.ledger.equations.pin(axis, reason)

    def _axes(self, structure: Any) -> list[Axes | None]:
        return [self.tensors.get(Ref(ref.call, ref.output)) for ref in refs(structure)]

    def _call(self, index: int, call: Call) -> list[Axes | None]:
        layer = self.graph.layers[call.layer]
        outputs = sorted(ref.output for ref in self.shapes if ref.call == index)
        shapes = tuple(self.shapes.get(Ref(index, number)) for number in range((outputs or [0])[-1] + 1))
        inputs = inputs_of(call.arguments, self.shapes)
        first = refs(list(inputs.positional)) or next(
            (refs(inputs.keywords[name]) for name in _FIRST if name in inputs.keywords), []
        )
        given = self._axes(first)
        title = f"'{layer.name}'" if layer.is_input else f"'{layer.name}' ({layer.class_name})"
        scope = Scope(
            self.ledger,
            self.number,
            call.layer,
            self.keys[call.layer],
            title,
            layer.class_name,
            layer.config,
            self.slots[call.layer],
            tuple(axes for axes in given if axes is not None),
            inputs,
            self._axes,
            shapes,
        )
        made = self._apply(scope, layer, given)
        if made is not None:
            return [self._sized(axes, shape) for axes, shape in zip(made, (*shapes, *[None] * len(made)), strict=False)]
        problem = scope.problem[0] if scope.problem else "kmerge does not know this layer"
        for axes in self._axes(call.arguments):
            self._pin(axes, f"read by {title}: {problem}")
        self.ledger.opaque.setdefault(self.keys[call.layer], f"in {title}: {problem}")
        reason = f"made by {title}: {problem}"
        return [None if shape is None else tuple(Order(size, reason) for size in shape) for shape in shapes]

    def _apply(self, scope: Scope, layer: Layer, given: Sequence[Axes | None]) -> Sequence[Axes] | None:
        if layer.is_operation or layer.class_name in ("TFOpLambda", "SlicingOpLambda"):
            rule = operation_rule(layer.class_name, layer.config)
        else:
            rule = layer_rule(layer.class_name) if is_keras(layer.class_name, layer.entry) else None
        if rule is None:
            return None
        if any(axes is None for axes in given):
            return scope.unknown("the shape of its input is not known")
        if not given and not layer.is_input:
            return scope.unknown("kmerge does not know what it is called with")
        if is_quantized(layer.config):
            return scope.unknown("its weights are quantised")
        for name, value in scope.inputs.keywords.items():
            if name.endswith("mask"):
                for axes in scope.axes(value):
                    scope.hold(axes or (), "takes it as a mask")
        made = rule(scope)
        if made is None or scope.problem:
            return None
        for axes, shape in zip(made, scope.shapes, strict=False):
            if shape is not None and not _fits(axes, shape):
                for axis in axes:
                    scope.pin(axis, f"{scope.title}: its output has another shape than expected")
                return scope.unknown("its output has another shape than expected")
        return made

    @staticmethod
    def _sized(axes: Axes, shape: Shape | None) -> Axes:
        """The axes with lengths that only the shapes tell."""
        if shape is None:
            return axes
        return tuple(
            Order(size, axis.reason) if not is_units(axis) and axis.size is None else axis
            for axis, size in zip(axes, shape, strict=True)
        )


def _fits(axes: Axes, shape: Shape) -> bool:
    return len(axes) == len(shape) and all(
        size is None or not is_units(axis) or len(axis) == size for axis, size in zip(axes, shape, strict=True)
    )


def _solved(ledger: Ledger) -> tuple[Space, ...]:
    for (layer, *_), labels in ledger.known.items():
        if layer in ledger.opaque:
            ledger.equations.pin(labels, ledger.opaque[layer])
    solution = ledger.equations.solve()
    axes: list[list[AxisUse]] = [[] for _ in solution.sizes]
    for use in ledger.uses.values():
        spaces, units = solution.space[use.labels], solution.unit[use.labels]
        for space in np.unique(spaces):
            mine = np.where(spaces == space, units, -1)
            axes[space].append(AxisUse(use.source, use.layer, use.weight, use.axis, mine, use.role, use.part))
    return tuple(
        Space(size, tuple(uses), bool(reason), reason, notes)
        for size, uses, reason, notes in zip(solution.sizes, axes, solution.reasons, solution.notes, strict=True)
        if uses
    )
