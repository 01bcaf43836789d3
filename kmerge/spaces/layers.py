"""Rules by class of layer: which axes of its weights and tensors hold the same units.

A rule returns the axes of its outputs, or None after `Scope.unknown`: then whatever flows in is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kmerge.dialects.vocabulary import is_quantized, stored_class
from kmerge.shapes.layers import canonical_class, chain, einsum, inner_layer
from kmerge.shapes.recurrent import GATES
from kmerge.shapes.values import Shape, integer, items, names
from kmerge.spaces.attention import attention, grouped_query_attention, multi_head_attention
from kmerge.spaces.scope import Scope, Slot, join
from kmerge.spaces.units import Axes, Axis, Order, is_units, length

Result = Sequence[Axes] | None
Rule = Callable[[Scope], Result]

ELEMENTWISE = names(
    """celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid
    mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus swish tanh
    tanh_shrink threshold LeakyReLU ReLU ELU ThresholdedReLU"""
)
"""Activations that see one number at a time."""
ACROSS = names("softmax log_softmax sparsemax Softmax")
"""Activations that see all units of the last axis, in whatever order."""


def layer_rule(class_name: str) -> Rule | None:
    """The rule of one of Keras's layer classes; None for a class without one."""
    return _RULES.get(canonical_class(class_name))


def activated(scope: Scope, axes: Axes) -> Axes:
    """The output of the layer's activation."""
    given = scope.config.get("activation")
    if isinstance(given, Mapping):
        name = given.get("config") if given.get("class_name") == "function" else given.get("class_name")
        custom = isinstance(given.get("registered_name"), str) and ">" in given["registered_name"]
        name = name if isinstance(name, str) and not custom else "?"
    else:
        name = given if isinstance(given, str) else "linear" if given is None else "?"
    if name in ACROSS:
        scope.note(axes[-1])
    elif name not in ELEMENTWISE:
        scope.hold(axes, f"has the activation '{name}', which kmerge does not know")
    return axes


def _pass(scope: Scope) -> Result:
    return scope.tensors


def _activation(scope: Scope) -> Result:
    return [activated(scope, scope.tensors[0])]


def _normalise(scope: Scope) -> Result:
    """Softmax and UnitNormalization: all units of an axis together."""
    axes = scope.tensors[0]
    for number in _numbers(scope.config.get("axis", -1), len(axes)):
        scope.note(axes[number])
    return [axes]


def _numbers(axis: Any, rank: int) -> list[int]:
    """Axes as numbers from 0; none where the configuration makes no sense."""
    given = [axis] if isinstance(axis, int) else items(axis) or []
    return [number % rank for number in given if isinstance(number, int) and -rank <= number < rank]


def _input(scope: Scope) -> Result:
    shape = scope.shapes[0]
    return None if shape is None else [tuple(Order(size, f"input {scope.title}") for size in shape)]


def _rescaling(scope: Scope) -> Result:
    axes = scope.tensors[0]
    if not all(isinstance(scope.config.get(key, 0), (int, float)) for key in ("scale", "offset")):
        scope.hold(axes, "scales each channel by a number of its own")
    return [axes]


def _held(scope: Scope) -> Result:
    """Layers that belong before the first weights: they work on images, words and numbers as they come."""
    for axes in scope.tensors:
        scope.hold(axes, "works on inputs, by position")
    shape = scope.shapes[0]
    return None if shape is None else [tuple(Order(size, f"made by {scope.title}") for size in shape)]


# ---- Dense and its like


def _dense(scope: Scope) -> Result:
    found = scope.weights("kernel", "bias?")
    axes = scope.tensors[0]
    if found is None or len(found[0].shape) != 2 or not scope.reads(found[0], 0, axes[-1]):
        return None
    units = scope.makes(found[0], 1)
    for bias in found[1:]:
        scope.follows(bias, 0, units)
    return [activated(scope, (*axes[:-1], units))]


def _einsum_dense(scope: Scope) -> Result:
    found, labels = scope.weights("kernel", "bias?"), einsum(scope.config)
    axes = scope.tensors[0]
    if found is None:
        return None
    if labels is None or len(set(labels[0])) < len(labels[0]) or len(set(labels[1])) < len(labels[1]):
        return scope.unknown("its equation is not understood")
    source, weight, target, left = labels
    elided = len(axes) - len(source)
    if elided < 0 or (elided and left is None) or len(weight) != len(found[0].shape):
        return scope.unknown("its equation does not fit its input")
    skipped, own = (axes[:elided], axes[elided:]) if left else (axes[len(source) :], axes[: len(source)])
    known: dict[str, Axis] = dict(zip(source, own, strict=True))
    for number, letter in enumerate(weight):
        if letter not in known:
            known[letter] = scope.makes(found[0], number)
        elif letter in target:
            scope.follows(found[0], number, known[letter])
        elif not scope.reads(found[0], number, known[letter]):
            return None
    if any(letter not in known for letter in target):
        return scope.unknown("its equation is not understood")
    made = tuple(known[letter] for letter in target)
    result = (*skipped, *made) if left else (*made, *skipped)
    for bias in found[1:]:
        for number, size in enumerate(bias.shape):
            if size > 1:
                scope.follows(bias, number, result[len(result) - len(bias.shape) + number])
    return [activated(scope, result)]


def _embedding(scope: Scope) -> Result:
    more = ("reverse_embeddings?",) if scope.class_name == "ReversibleEmbedding" else ()
    found = scope.weights("embeddings", *more)
    axes = scope.tensors[0]
    if found is None:
        return None
    units = scope.makes(found[0], 1)
    if len(found) > 1:
        scope.reads(found[1], 0, units)
    if scope.inputs.argument("reverse", 1) is not True:
        return [(*axes, units)]
    scope.tie(units, axes[-1])
    return [(*axes[:-1], Order(found[0].shape[0], f"words of {scope.title}"))]


# ---- convolutions


def _places(scope: Scope, rank: int, ordered: bool = True) -> tuple[int, range] | None:
    """The channel axis and the spatial axes, along which nothing may move if the layer goes by their order."""
    axes, first = scope.tensors[0], scope.config.get("data_format") == "channels_first"
    if len(axes) < rank + 2 or (first and len(axes) > rank + 2):
        scope.unknown("its input has an unexpected number of axes")
        return None
    end = len(axes)
    channel, spatial = (1, range(2, end)) if first else (end - 1, range(end - 1 - rank, end - 1))
    if ordered:
        scope.hold((axes[number] for number in spatial), "slides over positions")
    return channel, spatial


def _spatial(scope: Scope, channel: int, spatial: range, made: Axis) -> Axes:
    """The input's axes with new channels, at new positions."""
    shape = scope.shapes[0] if scope.shapes else None
    axes = list(scope.tensors[0])
    for number in spatial:
        axes[number] = scope.positions(shape[number] if shape is not None and len(shape) == len(axes) else None)
    axes[channel] = made
    return tuple(axes)


def _conv(rank: int, scope: Scope) -> Result:
    found, places = scope.weights("kernel", "bias?"), _places(scope, rank)
    if found is None or places is None or len(found[0].shape) != rank + 2:
        return None
    source, kernel = scope.tensors[0][places[0]], found[0]
    groups = integer(scope.config.get("groups", 1)) or 1
    if groups == 1 and not scope.reads(kernel, rank, source):
        return None
    made = scope.makes(kernel, rank + 1)
    if groups > 1 and not _groups(scope, kernel, rank, groups, source, made):
        return None
    for bias in found[1:]:
        scope.follows(bias, 0, made)
    result = _spatial(scope, *places, made)
    return [activated(scope, result)]


def _groups(scope: Scope, kernel: Slot, rank: int, groups: int, source: Axis, made: Any) -> bool:
    """Each group is a convolution of its own: units may change places within a group."""
    each, wide = kernel.shape[rank], kernel.shape[rank + 1] // groups
    if kernel.shape[rank + 1] % groups or (length(source) not in (None, groups * each)):
        scope.unknown("its groups do not fit its input")
        return False
    for group in range(groups):
        scope.part(made[group * wide : (group + 1) * wide])
        piece = source
        if is_units(source):
            piece = scope.part(source[group * each : (group + 1) * each])
        if not scope.reads(kernel, rank, piece, ((rank + 1, group * wide, (group + 1) * wide),)):
            return False
    return True


def _conv_transpose(rank: int, scope: Scope) -> Result:
    found, places = scope.weights("kernel", "bias?"), _places(scope, rank)
    if found is None or places is None or len(found[0].shape) != rank + 2:
        return None
    if not scope.reads(found[0], rank + 1, scope.tensors[0][places[0]]):
        return None
    made = scope.makes(found[0], rank)
    for bias in found[1:]:
        scope.follows(bias, 0, made)
    return [activated(scope, _spatial(scope, *places, made))]


def _per_channel(scope: Scope, rank: int, kernel: Slot, source: Axis) -> Axis:
    """Channels after a depthwise kernel: each makes several, which stay in their order."""
    times = kernel.shape[rank + 1]
    if not scope.follows(kernel, rank, source):
        return scope.positions()
    if not is_units(source):
        return Order(kernel.shape[rank] * times, source.reason)
    return source if times == 1 else scope.part(np.repeat(source, times))


def _depthwise(rank: int, scope: Scope) -> Result:
    found, places = scope.weights("depthwise_kernel" if _has(scope, "depthwise_kernel") else "kernel", "bias?"), None
    if found is not None:
        places = _places(scope, rank)
    if found is None or places is None or len(found[0].shape) != rank + 2:
        return None
    made = _per_channel(scope, rank, found[0], scope.tensors[0][places[0]])
    for bias in found[1:]:
        scope.follows(bias, 0, made)
    return [activated(scope, _spatial(scope, *places, made))]


def _has(scope: Scope, name: str) -> bool:
    return any(slot.name == name for slot in scope.slots)


def _separable(rank: int, scope: Scope) -> Result:
    found, places = scope.weights("depthwise_kernel", "pointwise_kernel", "bias?"), _places(scope, rank)
    if found is None or places is None or any(len(slot.shape) != rank + 2 for slot in found[:2]):
        return None
    middle = _per_channel(scope, rank, found[0], scope.tensors[0][places[0]])
    if not scope.reads(found[1], rank, middle):
        return None
    made = scope.makes(found[1], rank + 1)
    for bias in found[2:]:
        scope.follows(bias, 0, made)
    return [activated(scope, _spatial(scope, *places, made))]


def _window(rank: int, scope: Scope) -> Result:
    """Pooling, padding, cropping, up-sampling: channel by channel."""
    places = _places(scope, rank)
    if places is None:
        return None
    return [_spatial(scope, *places, scope.tensors[0][places[0]])]


def _global_pooling(rank: int, scope: Scope) -> Result:
    axes, places = scope.tensors[0], _places(scope, rank, ordered=False)
    if places is None:
        return None
    for number in places[1]:
        scope.note(axes[number])
    channel = axes[places[0]]
    return [_spatial(scope, *places, channel)] if scope.config.get("keepdims") else [(axes[0], channel)]


# ---- normalisation


def _batch_normalization(scope: Scope) -> Result:
    renorm = ("moving_stddev?", "renorm_mean?", "renorm_stddev?")
    found = scope.weights("gamma?", "beta?", "moving_mean", "moving_variance", *renorm)
    axes = scope.tensors[0]
    numbers = _numbers(scope.config.get("axis", -1), len(axes))
    if found is None:
        return None
    if len(numbers) != 1 or any(len(slot.shape) != 1 for slot in found):
        return scope.unknown("it normalises several axes together")
    for slot in found:
        if not scope.follows(slot, 0, axes[numbers[0]]):
            return None
    return [axes]


def _layer_normalization(scope: Scope) -> Result:
    found, axes = scope.weights("gamma?", "beta?", "scale?"), scope.tensors[0]
    numbers = _numbers(scope.config.get("axis", -1), len(axes))
    if found is None:
        return None
    if not numbers or any(len(slot.shape) != len(numbers) for slot in found):
        return scope.unknown("its axes are not understood")
    for place, number in enumerate(numbers):
        scope.note(axes[number])
        for slot in found:
            if not scope.follows(slot, place, axes[number]):
                return None
    return [axes]


def _group_normalization(scope: Scope) -> Result:
    """Units keep to their group; with one group, or as many as units, they are free."""
    found, axes = scope.weights("gamma?", "beta?"), scope.tensors[0]
    numbers = _numbers(scope.config.get("axis", -1), len(axes))
    groups = integer(scope.config.get("groups", 32), -1)
    if found is None:
        return None
    if len(numbers) != 1 or groups is None or groups == 0 or any(len(slot.shape) != 1 for slot in found):
        return scope.unknown("its axis is not understood")
    units = axes[numbers[0]]
    for slot in found:
        if not scope.follows(slot, 0, units):
            return None
    if is_units(units):
        size = len(units) // groups if groups > 0 else 1
        if size > 1:
            scope.note(units)
        if groups > 1 and size > 1:
            for start in range(0, len(units), size):
                scope.part(units[start : start + size])
    scope.hold((axis for number, axis in enumerate(axes) if number not in (0, numbers[0])), "averages over positions")
    return [axes]


def _prelu(scope: Scope) -> Result:
    found, axes = scope.weights("alpha"), scope.tensors[0]
    if found is None or len(found[0].shape) != len(axes) - 1:
        return None
    for number, size in enumerate(found[0].shape):
        if size > 1 and not scope.follows(found[0], number, axes[number + 1]):
            return None
    return [axes]


# ---- shapes of tensors


def _flatten(scope: Scope) -> Result:
    axes = scope.tensors[0]
    if scope.config.get("data_format") == "channels_first" and len(axes) > 2:
        axes = (axes[0], *axes[2:], axes[1])
    return regroup(scope, axes, scope.shapes[0])


def _reshape(scope: Scope) -> Result:
    return regroup(scope, scope.tensors[0], scope.shapes[0])


def regroup(scope: Scope, axes: Axes, shape: Shape | None) -> Result:
    """Axes after a change of shape that keeps the numbers in their order: an axis of units may be repeated as a whole.

    A position is a number whose digits are its places along the axes. Units that stand between `before` and `behind`
    other positions are found again where an axis of the result takes their digit, and more digits beside it.
    """
    if shape is None:
        return scope.unknown("its output has no known shape")
    reason = axes[-1].reason if not is_units(axes[-1]) else scope.positions().reason
    result: list[Axis] = [axes[0], *(Order(size, reason) for size in shape[1:])]
    units = [number for number in range(1, len(axes)) if is_units(axes[number]) and len(axes[number]) > 1]
    if len(units) > 1:
        scope.hold((axes[number] for number in units), "joins several axes of units into one")
    elif units:
        labels = axes[units[0]]
        behind = _product([length(axis) for axis in axes[units[0] + 1 :]])
        before = _product([length(axis) for axis in axes[1 : units[0]]])
        for number in range(1, len(shape)):
            tail, size = _product(shape[number + 1 :]), shape[number]
            if behind is None or tail is None or size is None or tail < 1 or behind % tail:
                continue
            times, left = divmod(size * tail, behind * len(labels))
            if times and not left and (times == 1 or (before is not None and before % times == 0)):
                result[number] = scope.part(np.tile(np.repeat(labels, behind // tail), times))
                return [tuple(result)]
        scope.hold((labels,), "splits the axis of its units")
    return [tuple(result)]


def _product(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _permute(scope: Scope) -> Result:
    axes, order = scope.tensors[0], items(scope.config.get("dims")) or []
    if sorted(order) != list(range(1, len(axes))):
        return scope.unknown("its order of axes is not understood")
    return [(axes[0], *(axes[number] for number in order))]


def _repeat(scope: Scope) -> Result:
    axes = scope.tensors[0]
    return [(axes[0], scope.positions(integer(scope.config.get("n"))), *axes[1:])]


# ---- several tensors


def _elementwise(scope: Scope) -> Result:
    if len({len(axes) for axes in scope.tensors}) != 1:
        return scope.unknown("its inputs have different numbers of axes")
    return [join(scope, scope.tensors)]


def _concatenate(scope: Scope) -> Result:
    return concatenated(scope, scope.tensors, scope.config.get("axis", -1))


def concatenated(scope: Scope, tensors: Sequence[Axes], axis: Any) -> Result:
    """Tensors side by side along an axis."""
    rank = len(tensors[0])
    numbers = _numbers(axis, rank)
    if len(numbers) != 1 or any(len(axes) != rank for axes in tensors):
        return scope.unknown("its axis is not understood")
    column = [axes[numbers[0]] for axes in tensors]
    rest = join(scope, [(*axes[: numbers[0]], Order(1, ""), *axes[numbers[0] + 1 :]) for axes in tensors])
    return [(*rest[: numbers[0]], _beside(scope, column), *rest[numbers[0] + 1 :])]


def _beside(scope: Scope, column: Sequence[Axis]) -> Axis:
    sizes = [length(axis) for axis in column]
    if not any(is_units(axis) for axis in column):
        reasons = list(dict.fromkeys(axis.reason for axis in column))
        return Order(None if None in sizes else sum(size or 0 for size in sizes), ", ".join(reasons))
    pieces = []
    for axis, size in zip(column, sizes, strict=True):
        if is_units(axis):
            pieces.append(axis)
        elif size is not None:
            pieces.append(scope.ledger.equations.fresh(size))
            scope.pin(pieces[-1], axis.reason)
        else:
            scope.hold(column, "puts units beside an axis of free length")
            return scope.positions()
    return scope.part(np.concatenate(pieces))


def _dot(scope: Scope) -> Result:
    """Sums over one axis of either tensor: the same units in both."""
    given = scope.config.get("axes")
    pair = [given, given] if isinstance(given, int) else items(given) or []
    if len(scope.tensors) != 2 or len(pair) != 2:
        return scope.unknown("its axes are not understood")
    rest: list[Axis] = [scope.tensors[0][0]]
    summed: list[Axis] = []
    for axes, number in zip(scope.tensors, pair, strict=True):
        place = _numbers(number, len(axes))
        if len(place) != 1 or place[0] == 0:
            return scope.unknown("its axes are not understood")
        summed.append(axes[place[0]])
        rest += [axis for other, axis in enumerate(axes) if other not in (0, place[0])]
    scope.tie(*summed)
    return [tuple(rest) if len(rest) > 1 else (rest[0], scope.positions(1))]


# ---- recurrence


def _recurrent(scope: Scope) -> Result:
    """SimpleRNN, LSTM and GRU: the same units in every gate, and in the state that is read back."""
    class_name = scope.class_name
    config = scope.config
    if class_name == "RNN":
        cell = inner_layer(config, "cell")
        if cell is None or not cell[0].endswith("Cell"):
            return scope.unknown("kmerge does not know its cell")
        class_name, own = cell[0].removesuffix("Cell"), cell[1]
        config = {**own, **{key: config.get(key) for key in ("return_sequences", "return_state", "time_major")}}
    gates, units = GATES.get(class_name), integer(config.get("units"))
    found = scope.weights("kernel", "recurrent_kernel", "bias?")
    if found is None:
        return None
    if gates is None or units is None or class_name.startswith("CuDNN") or config.get("time_major"):
        return scope.unknown("kmerge does not know its cell")
    return _cell(scope, config, found, gates, units, 0)


def _conv_lstm(rank: int, scope: Scope) -> Result:
    found, filters = scope.weights("kernel", "recurrent_kernel", "bias?"), integer(scope.config.get("filters"))
    if found is None or filters is None:
        return None
    if scope.config.get("data_format") == "channels_first" or len(scope.tensors[0]) != rank + 3:
        return scope.unknown("its layout is not understood")
    scope.hold(scope.tensors[0][2:-1], "slides over positions")
    return _cell(scope, scope.config, found, 4, filters, rank)


def _cell(scope: Scope, config: Mapping[str, Any], found: list[Slot], gates: int, units: int, rank: int) -> Result:
    kernel, recurrent, *biases = found
    axes = scope.tensors[0]
    if kernel.shape[-1] != gates * units or recurrent.shape[-2:] != (units, gates * units) or len(axes) != 3 + rank:
        return scope.unknown("its weights do not fit its class")
    own = config if config is not scope.config else scope.config
    for key in ("activation", "recurrent_activation"):
        if own.get(key) is not None and not (isinstance(own[key], str) and own[key] in ELEMENTWISE):
            return scope.unknown(f"kmerge does not know its {key}")
    scope.hold(axes[1:2], "runs over steps")
    if not scope.reads(kernel, rank, axes[-1]):
        return None
    columns = scope.makes(kernel, rank + 1)
    state = columns[:units]
    for gate in range(gates):
        scope.tie(state, scope.part(columns[gate * units : (gate + 1) * units]))
    scope.reads(recurrent, rank, state)
    for slot in (recurrent, *biases):
        scope.follows(slot, len(slot.shape) - 1, columns)
    initial = [*scope.tensors[1:], *scope.axes(scope.inputs.keywords.get("initial_state"))]
    for tensor in initial:
        if tensor is None or len(tensor) != 2 + rank:
            scope.hold((state,), "starts from a state that is not understood")
        else:
            scope.tie(state, tensor[-1])
    places = tuple(scope.positions() for _ in range(rank))
    result = (axes[0], *places, state)
    sequence = (axes[0], axes[1], *places, state)
    states = [result] * (2 if gates == 4 else 1) if config.get("return_state") else []
    return [sequence if config.get("return_sequences") else result, *states]


def _bidirectional(scope: Scope) -> Result:
    inner = inner_layer(scope.config)
    other = inner_layer(scope.config, "backward_layer") or inner
    mode = scope.config.get("merge_mode", "concat")
    if inner is None or other is None or mode not in ("concat", "sum", "mul", "ave", None):
        return scope.unknown("kmerge does not know what it wraps")
    if len(scope.tensors) > 1 or scope.axes(scope.inputs.keywords.get("initial_state")):
        return scope.unknown("it starts from states of another layer")
    forward = scope.within(lambda part: part.startswith("forward"))
    backward = tuple(slot for slot in scope.slots if slot not in forward)
    outputs = []
    for (class_name, config), slots in ((inner, forward), (other, backward)):
        rule = layer_rule(class_name)
        if rule is None or class_name not in (*GATES, "RNN"):
            return scope.unknown("kmerge does not know what it wraps")
        made = rule(scope.inner(class_name, config, slots, scope.tensors))
        if made is None:
            return None
        outputs.append(list(made))
    firsts = [made[0] for made in outputs]
    states = [state for made in outputs for state in made[1:]]
    if mode is None:
        return [*firsts, *states]
    joined = [join(scope, firsts)] if mode != "concat" else concatenated(scope, firsts, -1)
    return None if joined is None else [*joined, *states]


def _wrapped(scope: Scope, tensors: Sequence[Axes], slots: Sequence[Slot]) -> Result:
    inner = inner_layer(scope.config)
    rule = layer_rule(inner[0]) if inner is not None else None
    if inner is None or rule is None or is_quantized(inner[1]):
        return scope.unknown("kmerge does not know what it wraps")
    return rule(scope.inner(*inner, slots, tensors))


def _sequential(scope: Scope) -> Result:
    """A chain of layers within a wrapper; elsewhere a graph holds none."""
    tensors: Sequence[Axes] = scope.tensors
    numbers: dict[str, int] = {}
    for class_name, config in chain(scope.config) or [("", {})]:
        rule = layer_rule(class_name)
        if rule is None or is_quantized(config):
            return scope.unknown("kmerge does not know what it wraps")
        stored = stored_class(class_name)
        number = numbers[stored] = numbers.get(stored, -1) + 1
        place = f"{stored}_{number}" if number else stored
        name = config.get("name")
        slots = tuple(slot for slot in scope.slots if _lies_in(slot.key, place, name))
        made = rule(replace(scope.inner(class_name, config, slots, tensors), title=f"'{name}' in {scope.title}"))
        if made is None or len(made) != 1:
            return None
        tensors = made
    return tensors


def _lies_in(key: str, place: str, name: Any) -> bool:
    """Whether a weight is that of a layer in a chain: Keras 3 numbers the layers of a class, old files name them."""
    parts = key.split("/")[:-1]
    return place == parts[parts.index("layers") + 1] if "layers" in parts[:-1] else name in parts


def _time_distributed(scope: Scope) -> Result:
    axes = scope.tensors[0]
    scope.hold(axes[1:2], "runs over steps")
    made = _wrapped(scope, [(axes[0], *axes[2:])], scope.slots)
    return None if made is None else [(result[0], axes[1], *result[1:]) for result in made]


def _spectral_normalization(scope: Scope) -> Result:
    """The kernel stands in the file twice, and beside it a vector along its last axis."""
    own = [slot for slot in scope.slots if slot.name == "vector_u" or slot.key.startswith("vars/")]
    slots = [slot for slot in scope.slots if slot not in own]
    made = _wrapped(scope, scope.tensors, slots)
    if made is None or not slots:
        return None
    kernel = slots[0]
    for slot in own:
        for number in range(len(slot.shape)):
            axis = len(kernel.shape) - len(slot.shape) + number
            labels = scope.ledger.known.get((scope.key, kernel.place, axis, ())) if axis >= 0 else None
            if labels is not None and slot.shape[number] == len(labels):
                scope.follows(slot, number, labels)
    return made


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        names(
            """ActivityRegularization AlphaDropout Dropout GaussianDropout GaussianNoise Identity Masking
            SpatialDropout1D SpatialDropout2D SpatialDropout3D ELU LeakyReLU ReLU ThresholdedReLU"""
        ),
        _pass,
    ),
    **dict.fromkeys(
        names(
            """Normalization CategoryEncoding Discretization Hashing HashedCrossing StringLookup IntegerLookup
            TextVectorization AugMix AutoContrast CenterCrop ContrastLimitedAdaptiveHistogramEqualization CutMix
            Equalization MixUp Pipeline RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter
            RandomContrast RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur
            RandomGrayscale RandomHeight RandomHue RandomInvert RandomPerspective RandomPosterization RandomRotation
            RandomSaturation RandomSharpness RandomShear RandomTranslation RandomWidth RandomZoom Resizing
            Solarization STFTSpectrogram MelSpectrogram"""
        ),
        _held,
    ),
    **dict.fromkeys(names("Add Average Maximum Minimum Multiply Subtract"), _elementwise),
    **dict.fromkeys(names("SimpleRNN LSTM GRU RNN"), _recurrent),
    **dict.fromkeys(names("BatchNormalization BatchNormalizationV1 SyncBatchNormalization"), _batch_normalization),
    **dict.fromkeys(names("LayerNormalization RMSNormalization"), _layer_normalization),
    **dict.fromkeys(names("Attention AdditiveAttention"), attention),
    **dict.fromkeys(names("GroupQueryAttention GroupedQueryAttention"), grouped_query_attention),
    **dict.fromkeys(names("Softmax UnitNormalization"), _normalise),
    **dict.fromkeys(names("Embedding ReversibleEmbedding"), _embedding),
    "MultiHeadAttention": multi_head_attention,
    "InputLayer": _input,
    "Activation": _activation,
    "Rescaling": _rescaling,
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "GroupNormalization": _group_normalization,
    "PReLU": _prelu,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": _repeat,
    "Concatenate": _concatenate,
    "Dot": _dot,
    "Bidirectional": _bidirectional,
    "TimeDistributed": _time_distributed,
    "Sequential": _sequential,
    "SpectralNormalization": _spectral_normalization,
}
for _rank in (1, 2, 3):
    _RULES |= {
        f"Conv{_rank}D": partial(_conv, _rank),
        f"Conv{_rank}DTranspose": partial(_conv_transpose, _rank),
        f"DepthwiseConv{_rank}D": partial(_depthwise, _rank),
        f"SeparableConv{_rank}D": partial(_separable, _rank),
        f"ConvLSTM{_rank}D": partial(_conv_lstm, _rank),
        f"GlobalMaxPooling{_rank}D": partial(_global_pooling, _rank),
        f"GlobalAveragePooling{_rank}D": partial(_global_pooling, _rank),
    }
    _RULES |= {
        f"{name}{_rank}D": partial(_window, _rank)
        for name in names(
            "MaxPooling AveragePooling AdaptiveMaxPooling AdaptiveAveragePooling UpSampling ZeroPadding Cropping"
        )
    }
