"""The heads of a live model: to which source each output belongs, how it ends, and how to get at its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge.errors import PlanError

ENDINGS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Head:
    """One output of a merged model.

    Attributes:
        label: of its source.
        name: of the output.
        place: among the outputs, in Keras's order.
        number: among the outputs of its source.
        ending: "softmax" or "sigmoid" where that is the last that is done; else "".
    """

    label: str
    name: str
    place: int
    number: int = 0
    ending: str = ""


def heads_of(model: Any, labels: Sequence[str] = ()) -> tuple[Head, ...]:
    """The outputs of a model, in Keras's order.

    Args:
        model: live and functional.
        labels: of the sources, where they are known; otherwise every output is a head of its own.

    Raises:
        PlanError: if the model is no functional one.
    """
    names = output_names(model)
    heads: list[Head] = []
    for place, (name, tensor) in enumerate(zip(names, model.outputs, strict=True)):
        label = _label(name, place, len(names), labels)
        number = sum(head.label == label for head in heads)
        heads.append(Head(label, name, place, number, ending_of(tensor)))
    return tuple(heads)


def _label(name: str, place: int, count: int, labels: Sequence[str]) -> str:
    if name in labels or not labels:
        return name
    fitting = [label for label in labels if name.startswith(f"{label}_")]
    if fitting:
        return max(fitting, key=len)
    if count % len(labels) == 0 and count >= len(labels):
        return labels[place * len(labels) // count]
    return name


def output_names(model: Any) -> list[str]:
    """Names of the outputs in Keras's order: keys of the dictionary, else the layers that make them."""
    outputs = getattr(model, "outputs", None)
    if not outputs:
        raise PlanError(
            f"The model '{getattr(model, 'name', model)}' is no functional one, so its heads cannot be told apart: "
            "give a merged model, or a functional or sequential one."
        )
    structure = getattr(model, "_outputs_struct", None)
    if isinstance(structure, Mapping) and len(structure) == len(outputs):
        return [str(key) for key in sorted(structure)]
    names: list[str] = []
    for tensor in outputs:
        name = str(tensor._keras_history.operation.name)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def ending_of(tensor: Any) -> str:
    """What a head ends in, if that is a softmax over its last axis or a sigmoid."""
    operation = tensor._keras_history.operation
    kind = type(operation).__name__
    if kind in ("Softmax", "Sigmoid"):
        last = getattr(operation, "axis", -1) in (-1, len(tensor.shape) - 1)
        return kind.lower() if kind == "Sigmoid" or last else ""
    name = getattr(getattr(_bearer(operation), "activation", None), "__name__", "")
    return name if name in ENDINGS else ""


def _bearer(operation: Any) -> Any:
    return operation.layer if type(operation).__name__ == "TimeDistributed" else operation


def logits_of(tensor: Any) -> Any:
    """The tensor before a head's last activation; changes the layers of the model, which has to be a copy.

    The activation is taken off the layer where nothing else reads the output; where something does, logits are computed
    from the probabilities.
    """
    import keras
    from keras import ops

    ending = ending_of(tensor)
    if not ending:
        return tensor
    operation = tensor._keras_history.operation
    bearer = _bearer(operation)
    activation = getattr(bearer, "activation", None)
    if type(operation).__name__ == "Softmax" and not operation._outbound_nodes:
        return operation._inbound_nodes[tensor._keras_history.node_index].input_tensors[0]
    if activation is not None and (not operation._outbound_nodes or activation is keras.activations.linear):
        bearer.activation = keras.activations.linear
        return tensor
    share = ops.clip(tensor, 1e-7, 1.0 - 1e-7 if ending == "sigmoid" else 1.0)
    return ops.log(share) if ending == "softmax" else ops.log(share) - ops.log(1 - share)
