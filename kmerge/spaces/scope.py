"""What a rule works with: one call of a layer, its tensors, and the weights of the layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kmerge.shapes import Shape
from kmerge.shapes.calls import Inputs
from kmerge.shapes.layers import layer_outputs
from kmerge.spaces.units import Axes, Axis, Equations, Labels, Order, is_units, length

Role = Literal["output", "input"]
Part = tuple[tuple[int, int, int], ...]
"""A piece of a weight: (axis, start, stop) for each axis that it does not span."""


@dataclass(frozen=True, eq=False)
class Use:
    """An axis of a weight, or of a part of it, and the units on it."""

    source: int
    layer: int
    weight: int
    axis: int
    part: Part
    labels: Labels
    role: Role


@dataclass(frozen=True)
class Slot:
    """One weight of a layer: its place among the layer's weights, its key and name in the file, its shape."""

    place: int
    key: str
    name: str
    shape: tuple[int, ...]


@dataclass
class Ledger:
    """All statements about one or several networks so far.

    A layer that several sources share has the same key in each, and thereby the same units on the axes of its weights.
    """

    equations: Equations = field(default_factory=Equations)
    known: dict[tuple[Hashable, int, int, Part], Labels] = field(default_factory=dict)
    uses: dict[tuple[int, int, int, int, Part], Use] = field(default_factory=dict)
    opaque: dict[Hashable, str] = field(default_factory=dict)
    """Layers with a call that was not understood, and what is to be said of them: nothing in them may move."""


@dataclass(frozen=True)
class Scope:
    """One call of a layer, or of a layer inside it.

    Attributes:
        ledger: where statements go.
        source, layer: numbers of the source and of the layer in its graph.
        key: what the layer is known by.
        title: the layer, for reasons.
        class_name, config: of the layer.
        slots: its weights.
        tensors: axes of the tensors of the first argument.
        inputs: the call's arguments; shapes are known of them.
        axes: axes of any tensor in the arguments.
        shapes: of the outputs, as far as known.
        problem: why the rule gave up; a list so that the rule can write to it.
    """

    ledger: Ledger
    source: int
    layer: int
    key: Hashable
    title: str
    class_name: str
    config: Mapping[str, Any]
    slots: tuple[Slot, ...]
    tensors: tuple[Axes, ...]
    inputs: Inputs
    axes: Callable[[Any], list[Axes | None]]
    shapes: tuple[Shape | None, ...]
    problem: list[str] = field(default_factory=list)

    # ---- weights

    def weights(self, *names: str) -> list[Slot] | None:
        """The layer's weights by name, or by their numbers in the file where it has no names; None if they are others.

        A name that ends in "?" need not be there; without names, the last ones are those that may be missing.
        """
        wanted = [name.rstrip("?") for name in names]
        required = [name for name in names if not name.endswith("?")]
        by_name = {slot.name: slot for slot in self.slots}
        if len(by_name) == len(self.slots) and set(by_name) <= set(wanted) and set(required) <= set(by_name):
            return [by_name[name] for name in wanted if name in by_name]
        numbered = [slot.key.rpartition("/")[2] for slot in self.slots]
        if len(required) <= len(numbered) <= len(names) and numbered == [str(n) for n in range(len(numbered))]:
            return list(self.slots)
        self.unknown("it holds other weights than its class has")
        return None

    def within(self, keep: Callable[[str], bool]) -> tuple[Slot, ...]:
        """The weights under a part of the layer whose name `keep` accepts."""
        return tuple(slot for slot in self.slots if any(keep(part) for part in slot.key.split("/")[:-1]))

    def _labels(self, slot: Slot, axis: int, part: Part, size: int, role: Role) -> Labels:
        place = (self.key, slot.place, axis, part)
        labels = self.ledger.known.get(place)
        if labels is None:
            labels = self.ledger.known[place] = self.ledger.equations.fresh(size)
        self.ledger.uses.setdefault(
            (self.source, self.layer, slot.place, axis, part),
            Use(self.source, self.layer, slot.place, axis, part, labels, role),
        )
        return labels

    def makes(self, slot: Slot, axis: int, part: Part = ()) -> Labels:
        """The units that a weight makes along an axis."""
        return self._labels(slot, axis, part, slot.shape[axis], "output")

    def reads(self, slot: Slot, axis: int, source: Axis, part: Part = ()) -> bool:
        """A weight reads the units of a tensor along an axis; False if their numbers differ."""
        return self._joins(self._labels(slot, axis, part, slot.shape[axis], "input"), source)

    def follows(self, slot: Slot, axis: int, source: Axis, part: Part = ()) -> bool:
        """A weight holds a number per unit, such as a bias, and moves with it."""
        return self._joins(self._labels(slot, axis, part, slot.shape[axis], "output"), source)

    def _joins(self, labels: Labels, source: Axis) -> bool:
        if not is_units(source):
            self.pin(labels, source.reason)
        elif len(source) != len(labels):
            self.unknown("its weights do not fit its input")
            return False
        else:
            self.ledger.equations.tie(labels, source)
        return True

    # ---- tensors

    def tie(self, first: Axis, second: Axis) -> None:
        """Two axes hold the same units in the same order."""
        if is_units(first) and is_units(second) and len(first) == len(second):
            self.ledger.equations.tie(first, second)
        else:
            for one, other in ((first, second), (second, first)):
                if is_units(one):
                    self.pin(one, "it meets an axis of another length" if is_units(other) else other.reason)

    def pin(self, axis: Axis, reason: str) -> None:
        if is_units(axis):
            self.ledger.equations.pin(axis, reason)

    def hold(self, axes: Iterable[Axis], what: str) -> tuple[Axis, ...]:
        """Axes along which the layer acts by position: units on them may not move."""
        axes = tuple(axes)
        for axis in axes:
            self.pin(axis, f"{self.title} {what}")
        return axes

    def note(self, axis: Axis) -> None:
        """The layer looks at all units of the axis together, which a permutation does not mind."""
        if is_units(axis):
            self.ledger.equations.remark(axis, f"{self.title} acts across its units")

    def part(self, labels: Labels) -> Labels:
        """Units cut out of an axis: they stay together."""
        self.ledger.equations.keep_whole(labels)
        return labels

    def positions(self, size: int | None = None) -> Order:
        return Order(size, f"positions in the output of {self.title}")

    def unknown(self, problem: str) -> Sequence[Axes] | None:
        """Give up: the call is taken for that of an unknown layer. Returns None, a rule's answer in that case."""
        self.problem.append(problem)
        return None

    def inner(
        self, class_name: str, config: Mapping[str, Any], slots: Sequence[Slot], tensors: Sequence[Axes]
    ) -> Scope:
        """The call of a layer that this one wraps."""
        given = tuple(length(axis) for axis in tensors[0])
        shapes = tuple(layer_outputs(class_name, config, Inputs.of(given)))
        return replace(
            self, class_name=class_name, config=config, slots=tuple(slots), tensors=tuple(tensors), shapes=shapes
        )


def join(scope: Scope, tensors: Sequence[Axes]) -> Axes:
    """Axes of an element-wise result: tensors are broadcast, and units at one position are the same."""
    rank = max(len(axes) for axes in tensors)
    columns = [
        [axes[number - rank + len(axes)] for axes in tensors if number - rank + len(axes) >= 0]
        for number in range(rank)
    ]
    return tuple(_joined(scope, column) for column in columns)


def _joined(scope: Scope, column: list[Axis]) -> Axis:
    wide = [axis for axis in column if length(axis) != 1] or column
    units = [axis for axis in wide if is_units(axis)]
    orders = [axis for axis in wide if not is_units(axis)]
    for axis in units[1:]:
        scope.tie(units[0], axis)
    for order in orders[:1]:
        for axis in units:
            scope.pin(axis, order.reason)
    if units:
        return units[0]
    return next((order for order in orders if order.size is not None), orders[0])
