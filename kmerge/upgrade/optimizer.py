"""The state of an optimizer, brought along: what an old file counted of its gradients, where current Keras keeps it.

Each kind of variable that an optimizer keeps per weight (a *slot*) is put in the place of the weights and goes through
the same upgrade as they did: it is transposed, joined and turned round with them. Where a weight was multiplied, its
gradient is divided, so a slot is divided as often as it counts gradients (`Slot.degree`). What cannot be told for
certain is not carried at all.

Sources: the optimizers of Keras 1.2, 2.0 to 2.3, tf.keras (`optimizer_v2`, and those of 2.11 and later) and Keras 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kmerge.dialects.reading import Dialect, dissolve
from kmerge.dialects.vocabulary import WeightKind
from kmerge.dialects.writing import parse_version
from kmerge.errors import FormatError
from kmerge.graph import Graph, layer_order
from kmerge.source import Source, Weight, stored_layers
from kmerge.store import Tensor
from kmerge.store.derived import derived, is_scaled, origins
from kmerge.upgrade.network import plain_name
from kmerge.upgrade.slots import listed_weights, slots
from kmerge.upgrade.whole import Upgraded


@dataclass(frozen=True)
class Slot:
    """One kind of variable that an optimizer keeps for every trainable weight.

    Attributes:
        name: as current Keras calls it.
        degree: the power of the gradient that it counts; None where it mixes several.
        old: what tf.keras called it.
        needs: the setting without which it is not kept.
        start: the setting that holds the value it starts from; "" for zero.
    """

    name: str
    degree: float | None
    old: tuple[str, ...]
    needs: str = ""
    start: str = ""


_MOMENTS = (Slot("momentum", 1, ("m",)), Slot("velocity", 2, ("v",)))
_ADAM = (_MOMENTS, (Slot("velocity_hat", 2, ("vhat",), needs="amsgrad"),))
_START = "initial_accumulator_value"
_LAYOUTS: dict[str, tuple[tuple[Slot, ...], ...]] = {
    "SGD": ((Slot("momentum", 1, ("momentum", "m"), needs="momentum"),),),
    "RMSprop": (
        (Slot("velocity", 2, ("rms", "velocity")),),
        (Slot("momentum", 0, ("momentum",), needs="momentum"),),
        (Slot("average_gradient", 1, ("mg", "average_gradient"), needs="centered"),),
    ),
    "Adagrad": ((Slot("accumulator", 2, ("accumulator",), start=_START),),),
    "Adadelta": (
        (
            Slot("accumulated_grad", 2, ("accum_grad", "accumulated_grad")),
            Slot("accumulated_delta_var", 0, ("accum_var", "accumulated_delta_var")),
        ),
    ),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": ((Slot("momentum", 1, ("m",)), Slot("norm", 1, ("u", "v"))),),
    "Nadam": (_MOMENTS,),
    "Ftrl": ((Slot("accumulator", 2, ("accumulator",), start=_START), Slot("linear", None, ("linear",))),),
}
"""Slots in the order in which Keras 3 and tf.keras from 2.11 on store them: those of one group weight by weight."""

_AVERAGE = Slot("average", -1, ("average",))

Place = tuple[int, int]
"""A weight: number of the layer in the graph, and of the weight in the layer."""


@dataclass(frozen=True)
class Variables:
    """The variables of an optimizer as a `.keras` file holds them.

    Attributes:
        name: of the optimizer.
        tensors: in Keras's order: iterations, learning rate, slots.
    """

    name: str
    tensors: tuple[Tensor, ...]


class _Lost(Exception):
    """Why the state cannot be carried, as the end of a sentence."""


def upgrade_state(
    source: Source, upgraded: Upgraded, optimizer: Any, again: Callable[..., Upgraded]
) -> tuple[Variables | None, list[str]]:
    """The state of a source's optimizer for its upgraded form.

    Args:
        source: with the old state.
        upgraded: what became of it.
        optimizer: the optimizer in current Keras's words.
        again: upgrades a source with other tensors, given the `power` of the factors on its weights.

    Returns:
        The variables, None where none are recorded or they cannot be carried; and what the user should know.
    """
    try:
        recorded = source.optimizer()
        if not recorded:
            return None, ["the file records no state of its optimizer: training goes on with a fresh one"]
        if len({name for name, _ in recorded}) != len(recorded):
            raise _Lost("it lists a variable more than once")
        if _is_current(source) and isinstance(optimizer, Mapping) and _listed_alike(source, upgraded):
            _check_taken_over(upgraded, optimizer, [tensor for _, tensor in recorded])
            return Variables(_name_of(optimizer), tuple(tensor for _, tensor in recorded)), []
        found = _State(source, upgraded, optimizer, again).carried(recorded)
        nadam = "Nadam has another schedule of its momentum today, and goes on with that"
        return found, [nadam] if found.name.lower().startswith("nadam") and not _is_current(source) else []
    except (FormatError, _Lost) as error:
        reason = error.args[0] if isinstance(error, _Lost) else str(error).rstrip(".")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"what is recorded makes no sense ({type(error).__name__}: {error})"
    return None, [f"the state of the optimizer was dropped, and training goes on with a fresh one: {reason}"]


def _groups(class_name: str, config: Mapping[str, Any]) -> list[tuple[Slot, ...]]:
    """The slots that an optimizer keeps by its settings, in the order in which Keras 3 stores them."""
    groups = [
        tuple(slot for slot in group if not slot.needs or config.get(slot.needs))
        for group in (*(((_AVERAGE,),) if config.get("use_ema") else ()), *_LAYOUTS[class_name])
    ]
    return [group for group in groups if group]


def _check_taken_over(upgraded: Upgraded, optimizer: Mapping[str, Any], recorded: Sequence[Tensor]) -> None:
    """Hold variables that are taken over as they are against the weights that they should belong to.

    Raises:
        _Lost: if they are too many, or of other shapes or types.
    """
    class_name, config = str(optimizer.get("class_name")), optimizer.get("config") or {}
    weights = [weight.tensor for weights in upgraded.order for weight in weights]
    shapes = {tensor.shape for tensor in weights}
    count = len(recorded)
    for tensor in recorded:
        if tensor.shape and not _is_float(tensor):
            raise _Lost(f"it has a variable of the type {tensor.dtype}")
        if tensor.shape not in shapes and tensor.shape and class_name in _LAYOUTS:
            raise _Lost(f"it has a variable of the shape {tensor.shape}, and no weight has that")
    if class_name in _LAYOUTS:
        kept = sum(map(len, _groups(class_name, config))) + bool(config.get("gradient_accumulation_steps"))
        head = 2 if isinstance(config.get("learning_rate"), (int, float)) else 1
        trained = _trained(upgraded)
        wanted = head + kept * (trained or 0) + (class_name == "Nadam")
        if trained is not None and count not in (head, wanted):
            raise _Lost(f"it has {count:,} variables, expected {wanted:,}")
    numbers, most = sum(tensor.size for tensor in recorded), _MOST * sum(tensor.size for tensor in weights) + _SINGLE
    if count > _MOST * len(weights) + _SINGLE or numbers > most:
        raise _Lost(f"it has {count:,} variables of {numbers:,} numbers, more than any optimizer keeps of its weights")


def _trained(upgraded: Upgraded) -> int | None:
    """How many weights are trained; None where a custom layer has some of which that is not known."""
    try:
        return len(_new_places(upgraded))
    except _Lost:
        return None


_MOST = 8
"""Variables that an optimizer of Keras keeps of one weight, at most: moments, an average, gradients added up."""
_SINGLE = 16
"""Variables that it keeps besides, at most: steps, rate, the scale of the loss."""


class _State:
    def __init__(self, source: Source, upgraded: Upgraded, optimizer: Any, again: Callable[..., Upgraded]) -> None:
        if not isinstance(optimizer, Mapping):
            raise _Lost("the optimizer is another one now")
        self.source, self.upgraded, self.again = source, upgraded, again
        self.class_name = str(optimizer.get("class_name"))
        self.config: Mapping[str, Any] = optimizer.get("config") or {}
        self.name = _name_of(optimizer)
        self.current = _is_current(source)
        self.old, self.new = _old_places(source), _new_places(upgraded)

    def carried(self, recorded: Sequence[tuple[str, Tensor]]) -> Variables:
        tensors = [tensor for _, tensor in recorded]
        old = [self._weight(place).tensor for place in self.old]
        new = [self.upgraded.order[layer][number].tensor for layer, number in self.new]
        if self.class_name not in _LAYOUTS:
            raise _Lost(f"of '{self.class_name}' it is not known which variable belongs to which weight")
        if self.config.get("gradient_accumulation_steps") or self.config.get("loss_scale_factor"):
            raise _Lost("it accumulates or scales gradients")
        self._check_origins(old, new)
        groups = _groups(self.class_name, self.config)
        steps, found = self._read(recorded, groups)
        moved = {slot.name: self._moved(slot, found[slot.name]) for group in groups for slot in group}
        ordered = [moved[slot.name][place] for group in groups for place in range(len(self.new)) for slot in group]
        head = [_number(tensors[0], "int64", steps)]
        rate = self.config.get("learning_rate")
        if isinstance(rate, (int, float)):
            head.append(_number(tensors[0], "float32", rate))
        elif rate is None:
            raise _Lost("its learning rate is not recorded")
        tail = [_number(tensors[0], "float32", self._schedule(steps))] if self.class_name == "Nadam" else []
        return Variables(self.name, (*head, *ordered, *tail))

    def _weight(self, place: Place) -> Weight:
        return self.source.states[place[0]].weights[place[1]]

    def _check_origins(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Every trainable weight of before must be found whole in one of today's, and there must be no others."""
        found: list[int] = []
        for tensor in new:
            inner = origins(tensor)
            if inner is None:
                raise _Lost("a trainable weight is computed from others now")
            found += [id(item) for item in inner]
        if sorted(found) != sorted(id(tensor) for tensor in old):
            raise _Lost("the trainable weights are not those of before")

    # ----------------------------------------------------------------------------------------------- reading

    def _read(
        self, recorded: Sequence[tuple[str, Tensor]], groups: Sequence[tuple[Slot, ...]]
    ) -> tuple[int, dict[str, list[Tensor]]]:
        """Steps taken, and per slot one tensor for each trainable weight of the old network."""
        kept = [slot for group in groups for slot in group]
        lead = 0
        while lead < min(2, len(recorded)) and recorded[lead][1].shape == () and self._leads(recorded[lead][0], lead):
            lead += 1
        steps = int(recorded[0][1].read()) if lead else 0
        if steps < 0:
            raise _Lost(f"it has taken {steps:,} steps")
        rest = list(recorded[lead:])
        if self.class_name == "Nadam" and self.current and rest:
            rest.pop()  # the product of its schedule
        if lead and not rest:
            if steps and kept:
                raise _Lost(f"it has taken {steps:,} steps and records nothing of them")
            return steps, {slot.name: self._fresh(slot) for slot in kept}
        if not kept:
            return steps, {}
        named = self._by_name(rest, kept)
        found = named if named is not None else self._by_order(rest, groups)
        for slot in kept:
            for place, tensor in zip(self.old, found[slot.name], strict=True):
                if tensor.shape != self._weight(place).tensor.shape:
                    what = f"'{self._weight(place).key}' is {self._weight(place).tensor.shape}"
                    raise _Lost(f"{what}, but what belongs to it is {tensor.shape}")
                if not _is_float(tensor) and tensor.dtype != self._weight(place).tensor.dtype:
                    raise _Lost(f"what belongs to '{self._weight(place).key}' is {tensor.dtype}")
        return steps, found

    def _leads(self, name: str, place: int) -> bool:
        """Whether a single number stands before the slots: steps, then perhaps a learning rate or a schedule."""
        last = name.removesuffix(":0").rpartition("/")[2]
        if place == 0:
            return True
        return self.current or self.class_name == "Nadam" or last in ("learning_rate", "current_learning_rate")

    def _fresh(self, slot: Slot) -> list[Tensor]:
        """What a slot holds before the first step."""
        if slot is _AVERAGE:
            return [self._weight(place).tensor for place in self.old]
        value = float(self.config.get(slot.start, 0.1)) if slot.start else 0.0

        def filled(tensor: Tensor) -> Tensor:
            return derived(tensor, tensor.shape, lambda: np.full(tensor.shape, value))

        return [filled(self._weight(place).tensor) for place in self.old]

    def _by_name(self, rest: Sequence[tuple[str, Tensor]], kept: Sequence[Slot]) -> dict[str, list[Tensor]] | None:
        """tf.keras names its slots: `Adam/dense/kernel/m:0`, from 2.11 on `Adam/m/dense/kernel:0`."""
        spelled = {old: slot for slot in reversed(kept) for old in slot.old}
        for last in (True, False):
            found: dict[str, list[tuple[str, Tensor]]] = {slot.name: [] for slot in kept}
            for name, tensor in rest:
                parts = name.removesuffix(":0").split("/")
                key = parts[-1] if last else parts[1] if len(parts) > 2 else ""
                if key in spelled:
                    variable = parts[:-1] if last else parts[2:]
                    found[spelled[key].name].append(("/".join(variable), tensor))
            if sum(map(len, found.values())) == len(rest) and all(
                len(items) == len(self.old) for items in found.values()
            ):
                return {slot: self._in_order(items) for slot, items in found.items()}
        return None

    def _in_order(self, items: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """In the order of the weights: by their names where all fit, else as they were saved."""
        matched = []
        for place in self.old:
            key = self._weight(place).key.removesuffix(":0")
            fitting = [tensor for name, tensor in items if name == key or name.endswith(f"/{key}")]
            if len(fitting) != 1:
                return [tensor for _, tensor in items]
            matched += fitting
        return matched

    def _by_order(
        self, rest: Sequence[tuple[str, Tensor]], groups: Sequence[tuple[Slot, ...]]
    ) -> dict[str, list[Tensor]]:
        """Files without names: slot after slot before tf.keras 2.11, then weight by weight within a group."""
        if self.source.dialect is Dialect.KERAS2:
            version = parse_version(self.source.version)
            if version >= (2, 4) or (version >= (2, 2, 4) and self.source.version.endswith("-tf")):
                raise _Lost("its variables have other names than those that tf.keras gives them")
            groups = [(slot,) for group in groups for slot in group]
        count = len(self.old)
        tensors = [tensor for _, tensor in rest]
        wanted = count * sum(map(len, groups))
        spare = tensors[wanted:]  # Keras 2 keeps a number for each weight where Adam has no use of vhat
        if len(tensors) < wanted or (spare and not (len(spare) == count and all(one.size == 1 for one in spare))):
            raise _Lost(f"it has {len(tensors)} variables for {count} trainable weights, expected {wanted}")
        found: dict[str, list[Tensor]] = {slot.name: [] for group in groups for slot in group}
        place = 0
        for group in groups:
            for _ in range(count):
                for slot in group:
                    found[slot.name].append(tensors[place])
                    place += 1
        return found

    # ----------------------------------------------------------------------------------------------- moving

    def _moved(self, slot: Slot, found: Sequence[Tensor]) -> list[Tensor]:
        """A slot's tensors where the weights that they belong to are now."""
        mine = dict(zip(self.old, found, strict=True))
        states = tuple(
            replace(
                state,
                weights=tuple(
                    replace(weight, tensor=mine.get((layer, number), weight.tensor))
                    for number, weight in enumerate(state.weights)
                ),
            )
            for layer, state in enumerate(self.source.states)
        )
        made = self.again(replace(self.source, states=states), power=-(slot.degree or 0))
        tensors = [made.order[layer][number].tensor for layer, number in self.new]
        start = self.config.get(slot.start, 0.1) if slot.start else 0.0
        if (slot.degree is None or start) and any(is_scaled(tensor) for tensor in tensors):
            raise _Lost(f"weights were multiplied, and how '{slot.name}' of {self.class_name} would be is not known")
        return tensors

    def _schedule(self, steps: int) -> float:
        """The product that Nadam keeps of its schedule, which depends on the number of steps alone."""
        rate = float(self.config.get("beta_1", 0.9))
        return float(np.prod(rate * (1.0 - 0.5 * 0.96 ** np.arange(1, min(steps, 100_000) + 1))))


def _number(like: Tensor, dtype: str, value: float) -> Tensor:
    """A single number, made at once, so that one that does not fit is known before anything is written."""
    made = np.asarray(value, dtype)
    return derived(like, (), lambda: made, dtype)


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype.startswith(("float", "bfloat"))


def _name_of(optimizer: Mapping[str, Any]) -> str:
    config = optimizer.get("config")
    name = config.get("name") if isinstance(config, Mapping) else None
    return plain_name(str(name or str(optimizer.get("class_name")).lower()))


def _is_current(source: Source) -> bool:
    return source.dialect is not Dialect.KERAS2 and parse_version(source.version) >= (3,)


def _listed_alike(source: Source, upgraded: Upgraded) -> bool:
    """Whether current Keras lists the same weights in the same order for both, whichever of them are trained."""
    graph = upgraded.source.graph
    assert graph is not None
    old = [id(source.states[layer].weights[place].tensor) for layer, place in _listed(source)]
    kept = [index for index in layer_order(graph) if graph.layers[index].config.get("trainable") is not False]
    return old == [id(weight.tensor) for index in kept for weight in upgraded.order[index]]


def _listed(source: Source) -> Iterator[Place]:
    """All weights in the order in which the writer listed them, without those of layers that were frozen."""
    assert source.nested is not None
    dissolved = dissolve(source.nested)
    numbers = {address: number for number, address in enumerate(dissolved.addresses)}
    for address, layer in stored_layers(source.nested):
        number = numbers.get(address)
        if number is None or layer.config.get("trainable") is False:
            continue
        weights = source.states[number].weights
        places = {id(weight): place for place, weight in enumerate(weights)}
        if source.dialect is Dialect.KERAS3:  # whose files have them by path
            weights = listed_weights(layer.class_name, layer.config, weights)
        yield from ((number, places[id(weight)]) for weight in weights)


def _old_places(source: Source) -> list[Place]:
    """Trainable weights in the order in which the writer listed them."""
    found = [
        (layer, place)
        for layer, place in _listed(source)
        if source.states[layer].weights[place].kind is WeightKind.WEIGHT
    ]
    if source.dialect is Dialect.KERAS2 and parse_version(source.version)[:1] in ((1,), ()):
        # Keras 1 sorts them by the names of its variables.
        names = [source.states[layer].weights[place].key for layer, place in found]
        if len(set(names)) != len(names) or not all(name.endswith(":0") for name in names):
            raise _Lost("Keras 1 on Theano does not record in which order it listed the weights")
        found = [place for _, place in sorted(zip(names, found, strict=True))]
    return found


def _new_places(upgraded: Upgraded) -> list[Place]:
    """Trainable weights in the order in which current Keras lists them."""
    graph: Graph | None = upgraded.source.graph
    assert graph is not None
    found: list[Place] = []
    for index in layer_order(graph):
        layer = graph.layers[index]
        weights = upgraded.order[index]
        if not weights or layer.config.get("trainable") is False:
            continue
        known = {slot.key: slot.trainable for slot in slots(layer.class_name, layer.config) or ()}
        for place, weight in enumerate(weights):
            if weight.kind is not WeightKind.WEIGHT:
                continue
            if weight.key not in known:
                raise _Lost(f"of '{layer.name}' ({layer.class_name}) it is not known which weights are trained")
            if known[weight.key]:
                found.append((index, place))
    return found
