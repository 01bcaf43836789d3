"""A new head on a model that stands: its trunk and its heads stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from kmerge import live
from kmerge.errors import PlanError
from kmerge.standing import open_standing
from kmerge.surgery import label_name
from kmerge.tune.heads import output_names
from kmerge.workspace import Workspace


def add_head_to(
    model: Any,
    head: Any,
    label: str,
    *,
    at: str | tuple[str, int] | None,
    output: str | os.PathLike[str] | None,
    force: bool,
    custom_objects: Mapping[str, Any] | None,
) -> Any:
    """Open, add, write; see `kmerge.api.add_head`."""
    if not isinstance(label, str) or not label.strip():
        raise PlanError(f"The label is {label!r}: expected a name for the new head.")
    with ExitStack() as stack:
        work = Workspace(stack)
        standing = open_standing(work, model, output, force, custom_objects, without_graph="takes no head")
        grown, names = _grown(standing.copy(), head, label, at, standing.known)
        facts = None
        if standing.facts is not None:
            added = {name: {"role": "private", "source": label} for name in names}
            facts = {**standing.facts, "layers": {**(standing.facts.get("layers") or {}), **added}}
        standing.succeed(grown, facts)
    return grown


def _grown(
    model: Any, head: Any, label: str, at: str | tuple[str, int] | None, known: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The model with the head, and the names of its new layers."""
    import keras

    outputs = dict(zip(output_names(model), model.outputs, strict=True))
    taken = {layer.name for layer in model.layers}
    name = label_name(label)
    if label in outputs or name in taken:
        what = "head" if label in outputs else "layer"
        raise PlanError(f"The model has a {what} '{label if what == 'head' else name}' already: give another label.")
    tensor = _place(model, outputs, at)
    names = _Names(name, taken)
    try:
        with keras.utils.custom_object_scope(dict(known)):
            made = _built(head, tensor, names)
        grown = keras.Model(model.input, {**outputs, label: made}, name=model.name)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"The head '{label}' does not fit the output of '{tensor._keras_history.operation.name}', shape "
            f"{tuple(tensor.shape)}: {live.one_line(error)}. Give another head, or another place with at=LAYER."
        ) from error
    new = [layer.name for layer in grown.layers if layer.name not in taken]
    return grown, new


class _Names:
    """Names of new layers: the one that makes the output is named after the label, the others begin with it."""

    def __init__(self, label: str, taken: set[str]) -> None:
        self.label, self.taken = label, {*taken, label}

    def inner(self, name: str) -> str:
        wanted = found = f"{self.label}_{name}"
        number = 1
        while found in self.taken:
            found, number = f"{wanted}_{number}", number + 1
        self.taken.add(found)
        return found


# --------------------------------------------------------------------------------------------------------- the place


def _place(model: Any, outputs: Mapping[str, Any], at: str | tuple[str, int] | None) -> Any:
    """The tensor that the new head reads."""
    if at is None:
        return _parting(model, outputs)
    name, number = at if isinstance(at, tuple) else (at, None)
    found = [layer for layer in model.layers if layer.name == name]
    if not found:
        listed = ", ".join(layer.name for layer in model.layers[-12:])
        raise PlanError(f"The model has no layer '{name}' to put a head at: expected one such as {listed}.")
    calls = [node for node in found[0]._inbound_nodes if node in _nodes(model)]
    if number is None and len(calls) > 1:
        raise PlanError(
            f"Layer '{name}' is called {len(calls)} times: say which call the head reads, counted from 0, with "
            f"at=('{name}', 0)."
        )
    if not 0 <= (number or 0) < len(calls):
        raise PlanError(f"Layer '{name}' is called {len(calls)} times, and call {number} is asked for.")
    tensors = calls[number or 0].output_tensors
    if len(tensors) != 1:
        raise PlanError(f"Layer '{name}' gives {len(tensors)} tensors: put the head at a layer that gives one.")
    return tensors[0]


def _nodes(model: Any) -> set[Any]:
    """The calls that the model consists of; a layer may have others, outside it."""
    return {node for nodes in _by_depth(model).values() for node in nodes}


def _by_depth(model: Any) -> Mapping[int, Any]:
    found: Mapping[int, Any] = getattr(model, "_functional", model)._nodes_by_depth  # of a Sequential, its inside
    return found


def _parting(model: Any, outputs: Mapping[str, Any]) -> Any:
    """The tensor behind which the heads part: the last one that all of them come from, if there is one only."""
    nodes = [node for _, found in sorted(_by_depth(model).items(), reverse=True) for node in found]
    if len(outputs) == 1:
        learned = [node for node in nodes if getattr(node.operation, "weights", None) and node.input_tensors]
        if learned and len(learned[-1].input_tensors) == 1:
            return learned[-1].input_tensors[0]
        raise PlanError("The model has one output, and it is not clear where its head begins: say so with at=LAYER.")
    reaches: dict[int, set[str]] = {}
    for name, tensor in outputs.items():
        reaches.setdefault(id(tensor), set()).add(name)
    for node in reversed(nodes):
        reached: set[str] = set().union(*(reaches.get(id(tensor), set()) for tensor in node.output_tensors))
        for tensor in node.input_tensors:
            reaches.setdefault(id(tensor), set()).update(reached)
    found = {}
    for node in nodes:
        own: set[str] = set().union(*(reaches.get(id(tensor), set()) for tensor in node.output_tensors))
        for tensor in node.input_tensors:
            if len(reaches[id(tensor)]) == len(outputs) and len(own) < len(outputs):
                found[id(tensor)] = tensor
    ends = {name for tensor in found.values() for name in [tensor._keras_history.operation.name]}
    if len(found) != 1:
        where = "nowhere" if not found else f"at {', '.join(sorted(ends))}"
        raise PlanError(
            f"The heads of the model part {where}, not at one place: say where the new one begins, with at=LAYER."
        )
    if any(found.get(id(tensor)) is not None for tensor in model.inputs):
        raise PlanError("The heads of the model share no layer: say where the new one begins, with at=LAYER.")
    return next(iter(found.values()))


# ---------------------------------------------------------------------------------------------------------- the head


def _built(head: Any, tensor: Any, names: _Names) -> Any:
    """The symbolic output of a copy of the head on a tensor."""
    import keras

    if isinstance(head, bool):
        raise PlanError(f"The head is {head}: expected a number of classes, a Keras layer or model.")
    if isinstance(head, int):
        if head < 1:
            raise PlanError(f"The head is {head}: expected a number of classes from 1 on.")
        rank = len(tensor.shape)
        if rank > 2:
            pools = {3: "GlobalAveragePooling1D", 4: "GlobalAveragePooling2D", 5: "GlobalAveragePooling3D"}
            if rank not in pools:
                raise PlanError(f"The trunk gives tensors of shape {tuple(tensor.shape)}: give a layer or model.")
            tensor = getattr(keras.layers, pools[rank])(name=names.inner("pool"))(tensor)
        activation = "softmax" if head > 1 else "sigmoid"
        return keras.layers.Dense(head, activation=activation, name=names.label)(tensor)
    if isinstance(head, keras.Model):
        return _model(head, tensor, names)
    if isinstance(head, keras.layers.Layer):
        copy = _copied(head, names.label)
        result = copy(tensor)
        _check_one(result)
        if head.built and head.weights:
            copy.set_weights(head.get_weights())
        return result
    raise PlanError(f"The head is a {type(head).__name__}: expected a number of classes, a Keras layer or model.")


def _copied(layer: Any, name: str) -> Any:
    return type(layer).from_config({**layer.get_config(), "name": name})


def _model(head: Any, tensor: Any, names: _Names) -> Any:
    """The layers of a model, one by one, on a tensor: what is added is as flat as the rest."""
    import keras

    if isinstance(head, keras.Sequential) and not head.built:
        head = _copied(head, head.name)
        head.build(tuple(tensor.shape))
    inputs, ends = getattr(head, "inputs", None), getattr(head, "outputs", None)
    if not inputs or not ends or len(inputs) != 1 or len(ends) != 1:
        raise PlanError(
            f"The head '{head.name}' is no functional or sequential model with one input and one output: give one."
        )
    last = ends[0]._keras_history.operation

    def renamed(layer: Any) -> Any:
        if isinstance(layer, keras.layers.InputLayer):
            return layer
        return _copied(layer, names.label if layer is last else names.inner(layer.name))

    copy = keras.models.clone_model(head, clone_function=renamed)
    copy.set_weights(head.get_weights())
    result = copy.call(tensor)
    if last not in head.layers:  # a bare operation makes the output
        result = keras.layers.Identity(name=names.label)(result)
    _check_one(result)
    return result


def _check_one(result: Any) -> None:
    if not hasattr(result, "shape"):
        raise PlanError("The head gives more than one output: give a layer or a model with one.")
    if math.prod(size or 1 for size in result.shape) < 1:
        raise PlanError(f"The head gives nothing, shape {tuple(result.shape)}: give another one.")
