"""Rules of attention: heads change places as a whole, and within a head the dimensions of keys and of values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmerge.spaces.scope import Scope, Slot
from kmerge.spaces.units import Axes, Axis, Labels, Order, is_units


def multi_head_attention(scope: Scope) -> Sequence[Axes] | None:
    """MultiHeadAttention: query, key and value each make (heads, dimensions)."""
    return _heads(scope)


def grouped_query_attention(scope: Scope) -> Sequence[Axes] | None:
    """GroupQueryAttention: several heads of queries share a head of keys and values."""
    return _heads(scope)


def _heads(scope: Scope) -> Sequence[Axes] | None:
    slots = {role: _projection(scope, *parts) for role, parts in _PARTS.items()}
    if any(slots[role] is None for role in ("query", "key", "value", "output")) or sum(
        map(_count, slots.values())
    ) < len(scope.slots):
        return scope.unknown("it holds other weights than its class has")
    tensors = [scope.axes(scope.inputs.argument(name, place)) for place, name in enumerate(("query", "value", "key"))]
    query, value = tensors[0], tensors[1]
    key = tensors[2] or value
    if any(len(found) != 1 or found[0] is None for found in (query, value, key)):
        return scope.unknown("kmerge does not know what it is called with")
    sources: dict[str, Axes] = {"query": query[0], "key": key[0], "value": value[0], "gate": query[0]}  # type: ignore[dict-item]
    for axes in sources.values():
        scope.hold(axes[1:-1], "attends to positions")
    kernel = {role: found[0] for role, found in slots.items() if found}
    heads = scope.makes(kernel["key"], 1)
    times = kernel["query"].shape[1] // len(heads)
    wide: Labels = heads if times == 1 else np.repeat(heads, times)
    for role, axes in sources.items():
        if role in kernel and not scope.reads(kernel[role], 0, axes[-1]):
            return None
    inner = {  # one space per head and kind of dimension
        kind: [scope.makes(kernel[kind], 2, ((1, head, head + 1),)) for head in range(len(heads))]
        for kind in ("key", "value")
    }
    for role, kind, repeat in (
        ("query", "key", times),
        ("key", "key", 1),
        ("value", "value", 1),
        ("gate", "value", times),
    ):
        for number, slot in enumerate(slots[role] or ()):
            axis = 1 - number  # a bias has no axis for the input
            if not scope.follows(slot, axis, heads if repeat == 1 else wide):
                return None
            for head in range(slot.shape[axis]):
                part = ((axis, head, head + 1),)
                if not scope.follows(slot, axis + 1, inner[kind][head // repeat], part):
                    return None
    if not scope.reads(kernel["output"], 0, wide):
        return None
    for head in range(len(wide)):
        if not scope.reads(kernel["output"], 1, inner["value"][head // times], ((0, head, head + 1),)):
            return None
    made = tuple(scope.makes(kernel["output"], number) for number in range(2, len(kernel["output"].shape)))
    for bias in (slots["output"] or ())[1:]:
        for number, units in enumerate(made):
            scope.follows(bias, number, units)
    _masks(scope, heads)
    result = (*sources["query"][:-1], *made)
    if scope.inputs.keywords.get("return_attention_scores") is not True:
        return [result]
    steps = (scope.positions(), scope.positions())
    return [result, (sources["query"][0], wide, *steps)]


_PARTS = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "gate": ("gate",),
    "output": ("output", "attention_output"),
}


def _count(found: Sequence[Slot] | None) -> int:
    return len(found or ())


def _projection(scope: Scope, *names: str) -> list[Slot] | None:
    """Kernel and bias of one of the layer's projections."""
    found = scope.within(lambda part: part.strip("_").removesuffix("_dense") in names)
    found = tuple(sorted(found, key=lambda slot: -len(slot.shape)))
    return list(found) if 1 <= len(found) <= 2 else None


def _masks(scope: Scope, heads: Labels) -> None:
    """A mask with an axis of heads keeps them in place."""
    for name in ("attention_mask", "query_mask", "value_mask", "key_mask"):
        if any(axes is None or len(axes) > 3 for axes in scope.axes(scope.inputs.keywords.get(name))):
            scope.hold((heads,), "takes a mask for each head")


def attention(scope: Scope) -> Sequence[Axes] | None:
    """Attention and AdditiveAttention, called on [query, value] or [query, value, key]: nothing to make, units meet."""
    if len(scope.tensors) not in (2, 3) or any(len(axes) != 3 for axes in scope.tensors):
        return scope.unknown("kmerge does not know what it is called with")
    query, value = scope.tensors[:2]
    key = scope.tensors[-1]
    for axes in scope.tensors:
        scope.hold(axes[1:2], "attends to positions")
    _meet(scope, query[-1], key[-1])
    for slot in scope.slots:
        if len(slot.shape) > 1 or (slot.shape and not scope.follows(slot, 0, query[-1])):
            return scope.unknown("it holds other weights than its class has")
    result = (*query[:-1], value[-1])
    if scope.inputs.keywords.get("return_attention_scores") is True:
        return [result, (query[0], query[1], Order(None, "positions"))]
    return [result]


def _meet(scope: Scope, first: Axis, second: Axis) -> None:
    if is_units(first) or is_units(second):
        scope.tie(first, second)
