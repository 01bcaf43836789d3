"""Rules of bare operations: `x + y`, `keras.ops.mean(x, axis=1)`, and what TensorFlow's operations were saved as."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kmerge.graph import Ref, refs
from kmerge.shapes.values import items, names
from kmerge.spaces.layers import ACROSS, concatenated, regroup
from kmerge.spaces.scope import Scope, join
from kmerge.spaces.units import Axes, Axis, Order, is_units

Result = Sequence[Axes] | None
Rule = Callable[[Scope], Result]


def operation_rule(class_name: str, config: Mapping[str, Any]) -> Rule | None:
    """The rule of an operation; None for one without a rule."""
    name = class_name
    if class_name in ("TFOpLambda", "SlicingOpLambda"):
        function = str(config.get("function", ""))
        if not re.match(r"(math|nn|keras\.activations|__operators__|identity|cast|concat)\b", function):
            return None
        name = re.sub(r"^(reduce_)", "", function.rsplit(".", 1)[-1])
    return _RULES.get(name.lower().replace("_", ""))


def _option(scope: Scope, name: str, place: int, default: Any = None) -> Any:
    """A setting that stands in the configuration, among the keywords, or by position."""
    for where in (scope.config, scope.inputs.keywords):
        if name in where:
            return where[name]
    given = scope.inputs.argument(name, place)
    return default if given is None else given


def _operand(scope: Scope, value: Any) -> Axes | None:
    """Axes of a tensor or constant; a constant array keeps its order."""
    if isinstance(value, Ref):
        return scope.axes(value)[0]
    if isinstance(value, Mapping):
        config = value.get("config")
        value = config.get("value") if isinstance(config, Mapping) else None
        if value is None:
            return None
    try:
        shape = np.shape(value)
    except ValueError:
        return None
    return tuple(Order(size, f"{scope.title} combines it with constants") for size in shape)


def _elementwise(scope: Scope) -> Result:
    """Any number of tensors and constants, broadcast."""
    values = [
        *scope.inputs.positional,
        *(scope.inputs.keywords.get(key) for key in ("condition", "x", "x1", "x2", "y")),
    ]
    found = [_operand(scope, value) for value in values if refs(value) or isinstance(value, (int, float, list, dict))]
    known = [axes for axes in found if axes is not None]
    if len(known) != len(found) or not known:
        return scope.unknown("kmerge does not know what it is called with")
    return [join(scope, known)]


def _unary(scope: Scope) -> Result:
    """One tensor, and plain numbers beside it."""
    more = [*scope.inputs.positional[1:], *scope.inputs.keywords.values(), *scope.config.values()]
    if len(scope.tensors) != 1 or any(isinstance(value, (list, Mapping)) for value in more):
        return scope.unknown("kmerge does not know what it is called with")
    return [scope.tensors[0]]


def _across(scope: Scope) -> Result:
    axes = scope.tensors[0]
    for number in _numbers(_option(scope, "axis", 1, -1), len(axes)) or range(len(axes)):
        scope.note(axes[number])
    return [axes]


def _numbers(axis: Any, rank: int) -> list[int]:
    given = [axis] if isinstance(axis, int) else items(axis) or []
    return [number % rank for number in given if isinstance(number, int) and -rank <= number < rank]


def _reduction(scope: Scope) -> Result:
    """Over units it does not matter in which order they stand."""
    axes, axis = scope.tensors[0], _option(scope, "axis", 1)
    numbers = list(range(len(axes))) if axis is None else _numbers(axis, len(axes))
    if not numbers:
        return scope.unknown("its axis is not understood")
    for number in numbers:
        scope.note(axes[number])
    if _option(scope, "keepdims", 2, False):
        return [tuple(scope.positions(1) if number in numbers else own for number, own in enumerate(axes))]
    return [tuple(own for number, own in enumerate(axes) if number not in numbers)]


def _concatenate(scope: Scope) -> Result:
    return concatenated(scope, scope.tensors, _option(scope, "axis", 1, 0))


def _stack(scope: Scope) -> Result:
    axis = _option(scope, "axis", 1, 0)
    if len({len(axes) for axes in scope.tensors}) != 1 or not isinstance(axis, int):
        return scope.unknown("its axis is not understood")
    joined = join(scope, scope.tensors)
    place = axis % (len(joined) + 1)
    return [(*joined[:place], scope.positions(len(scope.tensors)), *joined[place:])]


def _expand(scope: Scope) -> Result:
    axes, axis = list(scope.tensors[0]), _option(scope, "axis", 1)
    given = [axis] if isinstance(axis, int) else items(axis) or []
    rank = len(axes) + len(given)
    if not given or not all(isinstance(number, int) and -rank <= number < rank for number in given):
        return scope.unknown("its axis is not understood")
    for number in sorted(number % rank for number in given):
        axes.insert(number, scope.positions(1))
    return [tuple(axes)]


def _squeeze(scope: Scope) -> Result:
    axes, axis = scope.tensors[0], _option(scope, "axis", 1)
    numbers = _numbers(axis, len(axes))
    if not numbers:
        return scope.unknown("its axis is not understood")
    return [tuple(own for number, own in enumerate(axes) if number not in numbers)]


def _transpose(scope: Scope) -> Result:
    axes, order = scope.tensors[0], _option(scope, "axes", 1)
    numbers = list(range(len(axes)))[::-1] if order is None else _numbers(order, len(axes))
    if sorted(numbers) != list(range(len(axes))) or numbers[0] != 0:
        return scope.unknown("its order of axes is not understood")
    return [tuple(axes[number] for number in numbers)]


def _reshape(scope: Scope) -> Result:
    return regroup(scope, scope.tensors[0], scope.shapes[0])


def _split(scope: Scope) -> Result:
    axes, cuts = scope.tensors[0], _option(scope, "indices_or_sections", 1)
    numbers = _numbers(_option(scope, "axis", 2, 0), len(axes))
    if len(numbers) != 1:
        return scope.unknown("its axis is not understood")
    place = numbers[0]
    axis = axes[place]
    if not is_units(axis):
        count = cuts if isinstance(cuts, int) else len(items(cuts) or []) + 1
        return [(*axes[:place], scope.positions(), *axes[place + 1 :]) for _ in range(count)]
    if isinstance(cuts, int) and cuts > 0 and len(axis) % cuts == 0:
        ends = [len(axis) // cuts * number for number in range(1, cuts)]
    elif all(isinstance(end, int) and 0 < end < len(axis) for end in items(cuts) or [0]):
        ends = items(cuts) or []
    else:
        return scope.unknown("its parts are not understood")
    starts = [0, *ends]
    stops = [*ends, len(axis)]
    if starts != sorted(starts):
        return scope.unknown("its parts are not understood")
    pieces = [scope.part(axis[start:stop]) for start, stop in zip(starts, stops, strict=True)]
    return [(*axes[:place], piece, *axes[place + 1 :]) for piece in pieces]


def _get_item(scope: Scope) -> Result:
    """Slices; one unit taken out by its number has to stay."""
    axes, keys = scope.tensors[0], scope.inputs.argument("key", 1)
    if keys is None:
        return scope.unknown("its slice is not understood")
    keys = items(keys) if items(keys) is not None else [keys]
    result: list[Axis] = []
    place = 0
    for number, key in enumerate(keys or []):
        if _is(key, "__ellipsis__"):
            left = sum(1 for other in (keys or [])[number + 1 :] if other is not None)
            result += axes[place : len(axes) - left]
            place = len(axes) - left
        elif key is None:
            result.append(scope.positions(1))
        elif place >= len(axes):
            return scope.unknown("its slice is not understood")
        elif isinstance(key, int):
            scope.hold(axes[place : place + 1], "takes one by its number")
            place += 1
        elif _is(key, "__slice__"):
            made = _sliced(scope, axes[place], key["config"])
            if made is None:
                return scope.unknown("its slice is not understood")
            result.append(made)
            place += 1
        else:
            return scope.unknown("its slice is not understood")
    return [(*result, *axes[place:])]


def _is(key: Any, class_name: str) -> bool:
    return isinstance(key, Mapping) and key.get("class_name") == class_name


def _sliced(scope: Scope, axis: Axis, config: Any) -> Axis | None:
    start, stop, step = (config.get(name) for name in ("start", "stop", "step"))
    if start is None and stop is None and step is None:
        return axis
    if not is_units(axis):
        return scope.positions()
    if step not in (None, 1) or not all(value is None or isinstance(value, int) for value in (start, stop)):
        return None
    return scope.part(axis[start:stop])


def _einsum(scope: Scope) -> Result:
    subscripts = str(_option(scope, "subscripts", 0, "")).replace(" ", "")
    found = re.fullmatch(r"([a-zA-Z]+(?:,[a-zA-Z]+)*)->([a-zA-Z]+)", subscripts)
    terms = found[1].split(",") if found else []
    if not found or [len(term) for term in terms] != [len(axes) for axes in scope.tensors]:
        return scope.unknown("its equation is not understood")
    known: dict[str, Axis] = {}
    for term, axes in zip(terms, scope.tensors, strict=True):
        for letter, axis in zip(term, axes, strict=True):
            if letter in known:
                known[letter] = join(scope, [(known[letter],), (axis,)])[0]
            else:
                known[letter] = axis
    return [tuple(known[letter] for letter in found[2])]


def _matmul(scope: Scope) -> Result:
    if len(scope.tensors) != 2 or len(scope.tensors[0]) != len(scope.tensors[1]) or len(scope.tensors[0]) < 2:
        return scope.unknown("kmerge does not know what it is called with")
    first, second = scope.tensors
    if is_units(first[-1]) or is_units(second[-2]):
        scope.tie(first[-1], second[-2])
    batch = join(scope, [first[:-2], second[:-2]]) if len(first) > 2 else ()
    return [(*batch, first[-2], second[-1])]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        names(
            """abs absolute cast ceil celu clip copy cos elu erf exp expm1 floor gelu hardsigmoid hardsilu hardswish
            hardtanh identity isfinite isnan leakyrelu log log10 log1p log2 logicalnot logsigmoid mish neg negative
            onelike oneslike reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin softplus softsign sqrt
            square stopgradient swish tan tanh zeroslike"""
        ),
        _unary,
    ),
    **dict.fromkeys(
        names(
            """add addv2 bitwiseand divide equal floordiv floordivide greater greaterequal less lessequal logicaland
            logicalor maximum minimum mod mul multiply notequal pow power realdiv squareddifference sub subtract
            truediv truedivide where"""
        ),
        _elementwise,
    ),
    **dict.fromkeys(names("all amax amin any logsumexp max mean min prod std sum var variance"), _reduction),
    **dict.fromkeys(names("concat concatenate"), _concatenate),
    **dict.fromkeys((name.replace("_", "").lower() for name in ACROSS), _across),
    **dict.fromkeys(names("normalize l2normalize"), _across),
    "stack": _stack,
    "expanddims": _expand,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "reshape": _reshape,
    "split": _split,
    "getitem": _get_item,
    "einsum": _einsum,
    "matmul": _matmul,
}
