"""The arguments of a call, in either dialect, with their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kmerge.graph import Ref, Structure, refs
from kmerge.shapes.values import Shape

_FIRST = ("inputs", "sequences", "sequence", "query", "x", "x1")
"""Names of the first argument of Keras's layers and operations."""


@dataclass(frozen=True)
class Inputs:
    """What a layer is called with.

    Attributes:
        positional: structures of `Ref`, and plain values.
        keywords: the same by name.
        known: shapes of the tensors so far.
    """

    positional: tuple[Structure, ...]
    keywords: Mapping[str, Structure] = field(default_factory=dict)
    known: Mapping[Ref, Shape | None] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape | None) -> Inputs:
        """One tensor, as a wrapper gives it to its inner layer."""
        return cls((Ref(0),), {}, {Ref(0): shape})

    @property
    def shapes(self) -> list[Shape | None]:
        """Shapes of the tensors that are meant by position; of the first argument by name if there are none."""
        found = refs(list(self.positional))
        if not found:
            found = next((refs(self.keywords[name]) for name in _FIRST if name in self.keywords), [])
        return [self.known.get(ref) for ref in found]

    @property
    def first(self) -> Shape | None:
        """Shape of the first tensor."""
        return next(iter(self.shapes), None)

    def argument(self, name: str, position: int) -> Structure:
        """An argument that may be given by name or by position."""
        if name in self.keywords:
            return self.keywords[name]
        return self.positional[position] if position < len(self.positional) else None

    def tensor(self, name: str, position: int) -> Shape | None:
        """Shape of an argument that is one tensor."""
        found = refs(self.argument(name, position))
        return self.known.get(found[0]) if len(found) == 1 else None

    def given(self, name: str, position: int) -> bool:
        """Whether an argument is a tensor."""
        return bool(refs(self.argument(name, position)))


def inputs_of(arguments: Any, shapes: Mapping[Ref, Shape | None]) -> Inputs:
    """The arguments of a call as a dialect spells them.

    Keras 3: `{"args": [...], "kwargs": {...}}`. Keras 2: `[tensor, kwargs]` for each tensor of the first argument, in
    a list or dictionary or alone; all other arguments are keywords.
    """
    if isinstance(arguments, Mapping) and "args" in arguments:
        args, kwargs = arguments["args"], arguments.get("kwargs")
        return Inputs(
            tuple(args) if isinstance(args, (list, tuple)) else (args,),
            kwargs if isinstance(kwargs, Mapping) else {},
            shapes,
        )
    heads: list[Structure] = []
    keywords: dict[str, Structure] = {}

    def collect(node: Any) -> None:
        if isinstance(node, (list, tuple)) and node and not isinstance(node[0], (list, tuple, Mapping)):
            if isinstance(node[-1], Mapping):  # a tensor, or `["_CONSTANT_VALUE", -1, value, kwargs]`
                heads.append(node[-2])
                for name, value in node[-1].items():
                    keywords.setdefault(name, value)
            else:
                heads.extend(refs(node))
        elif isinstance(node, Mapping):
            for key in sorted(node):
                collect(node[key])
        elif isinstance(node, (list, tuple)):
            for item in node:
                collect(item)
        elif isinstance(node, Ref):
            heads.append(node)

    collect(arguments)
    positional = (heads[0],) if len(heads) == 1 else (heads,) if heads else ()
    return Inputs(positional, keywords, shapes)
