"""What the rules of the upgrade work on: a layer with its weights, and the layers of current Keras that replace it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kmerge.dialects.reading import Dialect
from kmerge.methods.registry import Array
from kmerge.shapes import Shape
from kmerge.store import Tensor
from kmerge.store.derived import derived, scaled

LAYERS = "keras.layers"


@dataclass(frozen=True)
class Part:
    """One layer in the words of its dialect, or on the way to those of current Keras.

    Attributes:
        class_name, config: of the layer.
        tensors: its weights in Keras's own order.
        module: "keras.layers", or the module of an operation.
        registered: name under which a custom class or an operation is registered.
        suffix: of the name of a layer that has to be added to another one; "" for the one that keeps the name.
        keywords: that every call of the layer is given.
        back: which of the tensors made so far it is given, counted backwards: (1,) for the last one, (2, 1) for the
            last two. What the whole chain is given counts as its first tensor.
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...] = ()
    module: str = LAYERS
    registered: str | None = None
    suffix: str = ""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    back: tuple[int, ...] = (1,)

    def having(self, **settings: Any) -> Part:
        """The part with some settings changed; one that is given as `DROP` is left out."""
        config = {**self.config, **settings}
        return replace(self, config={key: value for key, value in config.items() if value is not DROP})

    def without(self, *keys: str) -> Part:
        return self.having(**dict.fromkeys(keys, DROP))

    def called(self, class_name: str) -> Part:
        return replace(self, class_name=class_name)

    def weighing(self, *tensors: Tensor) -> Part:
        return replace(self, tensors=tensors)


DROP: Any = object()


@dataclass(frozen=True)
class Obstacle:
    """Why a layer cannot be brought to current Keras as it is.

    Attributes:
        layer: its name, with the models and wrappers that it stands in.
        class_name: of the layer.
        kind: "lambda" (holds code), "custom" (not one of Keras's own) or "unknown" (no equivalent is known).
        reason: what is the matter, as a sentence without a subject.
    """

    layer: str
    class_name: str
    kind: str
    reason: str


@dataclass
class Context:
    """What the rules know of the file, and what they leave for the user to read.

    Attributes:
        version: of the writer, as numbers; () where it is not recorded.
        dialect: of the file.
        theano: whether Theano wrote it, whose convolutions flip their kernels.
        replacements: current Keras's entry for a layer, by its name in the file: what stands in for a Lambda.
        custom: entries' `module` and `registered_name` of custom classes, by class name.
        layer: name of the layer in work, for messages.
        inside: whether it stands inside a wrapper of recurrent layers.
        input_shape: of its first call, where that is known.
        power: of the factors by which weights are multiplied: 1 for the weights themselves, -1 for what is counted in
            their gradients, -2 for what is counted in squares of those (optimizers' state).
        paths: where a file that has weights by path keeps each tensor under its layer, by the tensor's identity: what
            is inside a custom layer stays there.
    """

    version: tuple[int, ...]
    dialect: Dialect
    theano: bool = False
    replacements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    custom: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    layer: str = ""
    inside: bool = False
    input_shape: Shape | None = None
    power: float = 1.0
    paths: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)

    @property
    def old(self) -> bool:
        """Whether the file was written before Keras 3."""
        return self.dialect is Dialect.KERAS2 or (bool(self.version) and self.version < (3,))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, class_name: str, kind: str, reason: str) -> None:
        found = Obstacle(self.layer, class_name, kind, reason)
        if found not in self.obstacles:
            self.obstacles.append(found)


Chain = list[Part]
"""Layers that are called one after the other in place of one; the last-named one keeps its name."""


def branches(chain: Chain) -> bool:
    """Whether some layer of a chain is given another tensor than the last one."""
    return any(part.back != (1,) for part in chain)


def operation(class_name: str, module: str, back: tuple[int, ...] = (1,), **settings: Any) -> Part:
    """A bare operation of current Keras."""
    return Part(class_name, settings, module=f"keras.src.ops.{module}", registered=class_name, back=back)


Rule = Callable[[Part, Context], "Chain | Part"]


def transposed(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The tensor with its axes in another order."""
    shape = tuple(tensor.shape[axis] for axis in axes)
    return derived(tensor, shape, lambda: np.transpose(tensor.read(), axes), parts=(tensor,))


def flipped(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The tensor backwards along some axes."""
    return derived(tensor, tensor.shape, lambda: np.flip(tensor.read(), tuple(axes)), parts=(tensor,))


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same numbers in another shape.

    Raises:
        ValueError: if they do not fill it.
    """
    if math.prod(shape) != tensor.size:
        raise ValueError(f"a weight is {tensor.shape}, expected {tuple(shape)}")
    return derived(tensor, tuple(shape), lambda: tensor.read().reshape(tuple(shape)), parts=(tensor,))


def made_from(
    tensors: Sequence[Tensor], shape: Sequence[int], make: Callable[[list[Array]], Array], reorders: bool = False
) -> Tensor:
    """A tensor of the first one's type, made from several; `reorders` where it holds each of their numbers once."""
    parts = tuple(tensors) if reorders else ()
    return derived(tensors[0], tuple(shape), lambda: make([tensor.read() for tensor in tensors]), parts=parts)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors concatenated along their last axis."""
    shape = (*tensors[0].shape[:-1], sum(tensor.shape[-1] for tensor in tensors))
    return made_from(tensors, shape, lambda arrays: np.concatenate(arrays, axis=-1), reorders=True)


def multiplied(tensor: Tensor, factors: float | Array, context: Context) -> Tensor:
    """The tensor with each column (entry of the last axis) multiplied, or with all of them by one factor."""
    return scaled(tensor, np.broadcast_to(np.asarray(factors), tensor.shape[-1:]) ** context.power)


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in another type."""
    return tensor if tensor.dtype == dtype else derived(tensor, tensor.shape, lambda: tensor.read(), dtype)
