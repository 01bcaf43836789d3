"""Values of a configuration, checked: a value of the wrong kind reads as None."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Size = int | None
Shape = tuple[int | None, ...]


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def items(value: Any) -> list[Any] | None:
    """The items of a list or tuple, however the configuration spells it."""
    if isinstance(value, Mapping) and value.get("class_name") in ("__tuple__", "TensorShape"):
        value = value.get("items")
    return list(value) if isinstance(value, (list, tuple)) else None


def integer(value: Any, minimum: int = 1) -> int | None:
    """A whole number of at least `minimum`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    return None


def integers(value: Any, count: int, minimum: int = 1) -> tuple[int, ...] | None:
    """`count` whole numbers, or one that stands for all of them."""
    single = integer(value, minimum)
    if single is not None:
        return (single,) * count
    found = [integer(item, minimum) for item in items(value) or ()]
    numbers = tuple(number for number in found if number is not None)
    return numbers if len(numbers) == len(found) == count else None


def pairs(value: Any, count: int) -> tuple[tuple[int, int], ...] | None:
    """What to add or cut on both sides of `count` axes: `1`, `[1, 2]` (one number per axis) or `[[1, 1], [0, 2]]`."""
    if count == 1 and (both := integers(value, 2, 0)) is not None:
        return ((both[0], both[1]),)
    single = integers(value, count, 0)
    if single is not None:
        return tuple((size, size) for size in single)
    sides = [integers(item, 2, 0) for item in items(value) or ()]
    found = tuple((side[0], side[1]) for side in sides if side is not None)
    return found if len(found) == len(sides) == count else None


def as_shape(value: Any) -> Shape | None:
    """A shape: whole numbers and None."""
    sizes = items(value)
    if sizes is None or not all(size is None or integer(size, 0) is not None for size in sizes):
        return None
    return tuple(sizes)


def product(sizes: Iterable[Size]) -> int | None:
    """Product of sizes, None if one is unknown."""
    known = list(sizes)
    numbers = [size for size in known if size is not None]
    return math.prod(numbers) if len(numbers) == len(known) else None


def axes(shape: Shape | None, rank: int, config: Mapping[str, Any]) -> tuple[range, int] | None:
    """The `rank` spatial axes of a tensor and its channel axis, by the layer's `data_format`."""
    data_format = config.get("data_format")
    if shape is None or len(shape) < rank + 2:
        return None
    if data_format in (None, "channels_last"):
        return range(len(shape) - 1 - rank, len(shape) - 1), len(shape) - 1
    if data_format == "channels_first" and len(shape) == rank + 2:
        return range(2, rank + 2), 1
    return None


def replaced(shape: Shape, changes: Mapping[int, Size]) -> Shape:
    """The shape with some sizes changed."""
    return tuple(changes.get(axis, size) for axis, size in enumerate(shape))


def merged(shapes: Iterable[Shape | None], first: int = 0) -> Shape | None:
    """NumPy's broadcasting of all sizes from axis `first` on.

    None where they do not fit. 1 and unknown is unknown, 5 and unknown is 5.
    """
    known = list(shapes)
    tails = [shape[first:] for shape in known if shape is not None and len(shape) >= first]
    if len(tails) != len(known) or not tails:
        return None
    rank = max(len(tail) for tail in tails)
    sizes: list[Size] = []
    for column in zip(*((1,) * (rank - len(tail)) + tail for tail in tails), strict=True):
        given = {size for size in column if size != 1}
        numbers = given - {None}
        if len(numbers) > 1:
            return None
        sizes.append(numbers.pop() if numbers else None if given else 1)
    return tuple(sizes)
