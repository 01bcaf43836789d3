"""A network of live Keras layers, run call by call, and what it gives on many batches."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kmerge import live
from kmerge.assembly import Values, assemble
from kmerge.engine import merge_tensors
from kmerge.errors import MergeError
from kmerge.graph import Ref, flatten, refs
from kmerge.methods.registry import Array
from kmerge.output import create_output
from kmerge.shapes.layers import is_keras
from kmerge.source import Source
from kmerge.store import Kind
from kmerge.surgery import Merged

BEFORE = -1
"""Number of the output that stands for a layer's result before its own activation function."""
_SPLIT = frozenset(
    {
        "Dense",
        "EinsumDense",
        *(f"{kind}Conv{rank}D" for kind in ("", "Depthwise", "Separable") for rank in (1, 2, 3)),
        *(f"Conv{rank}DTranspose" for rank in (1, 2, 3)),
    }
)
"""Classes whose activation function is run apart from them."""
_STEPWISE = frozenset({"SimpleRNN", "LSTM", "GRU", "RNN", "Bidirectional", *(f"ConvLSTM{rank}D" for rank in (1, 2, 3))})
"""Classes that run their cells in Python, step by step, unless they are compiled."""
_UNCOMPILED = 250
"""Steps that a layer of theirs runs one by one before it is compiled, which takes about as long."""


@dataclass(eq=False)
class Network:
    """A merged graph with its live layers.

    Attributes:
        merged: the graph.
        layers: live layers and operations, in the order of the graph's layers.
    """

    merged: Merged
    layers: tuple[Any, ...]
    _nodes: tuple[Any, ...] = ()
    _ids: dict[int, Ref] = field(default_factory=dict)
    _activations: dict[int, Any] = field(default_factory=dict)
    _steps: Counter[int] = field(default_factory=Counter)
    _compiled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        graph = self.merged.graph
        nodes = []
        for number, call in enumerate(graph.calls):
            place = graph.calls_of(call.layer).index(number)
            node = self.layers[call.layer]._inbound_nodes[place]
            nodes.append(node)
            self._ids |= {id(tensor): Ref(number, output) for output, tensor in enumerate(node.outputs)}
        self._nodes = tuple(nodes)
        linear = _keras().activations.linear
        for number, (layer, live_layer) in enumerate(zip(graph.layers, self.layers, strict=True)):
            class_name, bearer = layer.class_name, live_layer
            if class_name == "TimeDistributed":
                class_name, bearer = type(live_layer.layer).__name__, live_layer.layer
            activation = getattr(bearer, "activation", None)
            if class_name in _SPLIT and activation is not None and activation is not linear:
                self._activations[number] = activation
                bearer.activation = linear

    @property
    def inputs(self) -> list[Ref]:
        return [Ref(ref.call, ref.output) for ref in flatten(self.merged.graph.inputs)]

    def given(self, batch: Sequence[Array]) -> dict[Ref, Any]:
        """A batch of inputs as tensors, in the order of the network's inputs."""
        return dict(zip(self.inputs, map(_tensor, batch), strict=True))

    def needed(self, wanted: Iterable[Ref], known: Collection[Ref]) -> list[int]:
        """Calls to run for some tensors, where some are known, in order."""
        graph = self.merged.graph
        waiting = [ref.call for ref in wanted if ref not in known]
        seen: set[int] = set()
        while waiting:
            call = waiting.pop()
            if call not in seen:
                seen.add(call)
                waiting += [
                    ref.call for ref in refs(graph.calls[call].arguments) if Ref(ref.call, ref.output) not in known
                ]
        return sorted(seen)

    def frontier(self, values: Mapping[Ref, Any], wanted: Collection[Ref]) -> dict[Ref, Any]:
        """Those of the known tensors that are wanted themselves, or that wanted ones are made from."""
        graph = self.merged.graph
        read = {
            Ref(ref.call, ref.output)
            for call in self.needed(wanted, values)
            for ref in refs(graph.calls[call].arguments)
        }
        return {ref: value for ref, value in values.items() if ref in wanted or ref in read}

    def run(self, values: dict[Ref, Any], wanted: Iterable[Ref], gradients: bool = False) -> None:
        """Add the wanted tensors, and what they are made from, to the known ones.

        Args:
            values: known tensors, by where they stand.
            wanted: which are to be known.
            gradients: whether PyTorch is to remember how they came about; other backends remember only what a tape asks
                for.
        """
        with contextlib.nullcontext() if gradients else _no_gradients():
            self._run(values, wanted)

    def _run(self, values: dict[Ref, Any], wanted: Iterable[Ref]) -> None:
        graph = self.merged.graph
        for call in self.needed(wanted, values):
            layer = graph.calls[call].layer
            if graph.layers[layer].is_input:
                continue
            outputs = self.outputs(values, call)
            if layer in self._activations:
                values[Ref(call, BEFORE)] = outputs
                mask = getattr(outputs, "_keras_mask", None)
                outputs = self._activations[layer](outputs)
                if mask is not None:
                    outputs._keras_mask = mask
            flat = _keras().tree.flatten(outputs)
            for number, tensor in enumerate(flat):
                values[Ref(call, number)] = tensor

    def outputs(self, values: Mapping[Ref, Any], call: int) -> Any:
        """What one call gives, before an activation function that was split off, from known tensors.

        Raises:
            MergeError: if Keras cannot run the layer on them.
        """
        args, kwargs = self._nodes[call].arguments.fill_in(_Filled(values, self._ids))
        number = self.merged.graph.calls[call].layer
        own = self.layers[number]
        if getattr(own, "_call_has_training_arg", False) and kwargs.get("training") is None:
            kwargs["training"] = False
        given = [(tensor, getattr(tensor, "_keras_mask", None)) for tensor in _keras().tree.flatten((args, kwargs))]
        self._compile_in_time(values, call)
        try:
            outputs = own(*args, **kwargs)
        except Exception as error:
            layer = self.merged.graph.layers[number]
            raise MergeError(
                f"Keras cannot run '{layer.name}' ({layer.class_name}) on the inputs: {live.one_line(error)}. Expected "
                "inputs such as the models were trained on, tokens below the size of their vocabulary for one: see to "
                "--data, or merge without running the models (--method mean)."
            ) from error
        for tensor, mask in given:  # attention takes masks off what it is given, which others read too
            if mask is not None:
                tensor._keras_mask = mask
        return outputs

    def _compile_in_time(self, values: Mapping[Ref, Any], call: int) -> None:
        """Compile the layer of a call if it goes step by step and has done so for long."""
        number = self.merged.graph.calls[call].layer
        layer = self.merged.graph.layers[number]
        if layer.class_name in _STEPWISE and is_keras(layer.class_name, layer.entry) and number not in self._compiled:
            given = [values[Ref(ref.call, ref.output)].shape for ref in refs(self.merged.graph.calls[call].arguments)]
            self._steps[number] += max(given, key=len)[1]  # of the sequences: states and masks have fewer dimensions
            if self._steps[number] > _UNCOMPILED:
                self._compiled.add(number)
                _compile(self.layers[number])

    def given_to(self, values: Mapping[Ref, Any], call: int, part: str) -> Any:
        """What reaches a layer inside the one that is called, in one call from known tensors.

        Args:
            values: known tensors.
            call: its number.
            part: attribute of the live layer that holds the inner one.
        """
        inner = getattr(self.layers[self.merged.graph.calls[call].layer], part)
        original, caught = inner.call, []

        def catch(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            caught.append(inputs)
            return original(inputs, *args, **kwargs)

        inner.call = catch
        try:
            self.outputs(values, call)
        finally:
            del inner.call
        return caught[-1]

    def target(self, call: int) -> Ref:
        """What a call gives before its own activation function."""
        return Ref(call, BEFORE if self.merged.graph.calls[call].layer in self._activations else 0)

    def variable(self, layer: int, key: str, place: int) -> Any:
        """The live variable of a weight.

        Args:
            layer: number of the layer.
            key: of the weight within its layer, as the file has it.
            place: of the weight among those of its layer.
        """
        own = self.layers[layer]
        parts = key.split("/")
        if "vars" not in parts:
            if getattr(own, "lora_enabled", False):
                return _stored_variables(own)[place]
            own.trainable = True
            return [*own.trainable_weights, *own.non_trainable_weights][place]
        for part in parts[: parts.index("vars")]:
            own = own[int(part)] if part.isdigit() else getattr(own, part, None) or getattr(own, f"_{part}")
        return _stored_variables(own)[int(parts[-1])]

    def activation(self, layer: int) -> Any:
        """The activation function that was split off a layer; None without one."""
        return self._activations.get(layer)


def _compile(own: Any) -> None:
    """Have TensorFlow run a layer as a graph from now on; other backends compile its loop or do not gain from it.

    There is a graph for each kind of call, for any number of rows: TensorFlow's own choice builds more and warns of it.
    """
    if _keras().backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    stepwise, tree = own.call, _keras().tree
    graphs: dict[tuple[Any, ...], Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = tree.flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]
        signature = [tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype) for tensor in tensors]
        kind = (*signature, *(None if tf.is_tensor(leaf) else repr(leaf) for leaf in leaves), *kwargs)
        if kind not in graphs:
            blank = object()  # in place of tensors, which are not to be kept
            form = tree.map_structure(lambda leaf: blank if tf.is_tensor(leaf) else leaf, (args, kwargs))

            def run(*filled: Any) -> Any:
                left = iter(filled)
                own_args, own_kwargs = tree.map_structure(lambda leaf: next(left) if leaf is blank else leaf, form)
                return stepwise(*own_args, **own_kwargs)

            graphs[kind] = tf.function(run, input_signature=signature, autograph=False)
        return graphs[kind](*tensors)

    own.call = call


def _stored_variables(own: Any) -> list[Any]:
    """Variables of one layer in the order in which a file has them; an adapter is not among them."""
    if getattr(own, "lora_enabled", False):
        first = getattr(own, "_kernel", None)
        bias = getattr(own, "bias", None)
        return [own._embeddings if first is None else first, *([] if bias is None else [bias])]
    return [*own._trainable_variables, *own._non_trainable_variables]


class _Filled(dict[int, Any]):
    """Values by the identity of Keras's symbolic tensors."""

    def __init__(self, values: Mapping[Ref, Any], ids: Mapping[int, Ref]) -> None:
        self._values, self._known = values, ids

    def __getitem__(self, key: int) -> Any:
        return self._values[self._known[key]]

    def get(self, key: int, default: Any = None) -> Any:
        found = self._known.get(key)
        return default if found is None else self._values[found]  # masks that Keras found on the way are found again


def open_network(
    merged: Merged,
    sources: Sequence[Source],
    values: Values | None,
    folder: Path,
    name: str,
    custom_objects: Mapping[str, Any] | None = None,
    trusted: bool = False,
    shares: Sequence[float] | None = None,
) -> Network:
    """A merged graph, live.

    Args:
        merged: the graph.
        sources: that it was made from.
        values: weights that are not merged.
        folder: for a temporary file.
        name: of that file.
        custom_objects: classes of custom layers.
        trusted: whether all sources are the caller's own live models.
        shares: importance of the sources in weights that are merged; the first source alone by default.

    Raises:
        MergeError: if Keras does not open it.
    """
    assembly = assemble(merged, sources, values)
    suffix = ".keras" if assembly.kind in (Kind.KERAS, Kind.FOLDER) else ".h5"
    path = folder / f"{name}{suffix}"
    share = shares or [1.0] + [0.0] * (len(sources) - 1)
    with create_output(assembly, path, True, dict) as output:
        merge_tensors(sources, assembly.targets, output, share)
    model = live.load_model(path, "the models that are to be merged", custom_objects, trusted)
    path.unlink()
    by_name = {operation.name: operation for operation in model.operations}
    try:
        layers = tuple(by_name[layer.name] for layer in merged.graph.layers)
    except KeyError as error:
        raise MergeError(f"Keras opens the models under other names: layer {error} is missing.") from error
    return Network(merged, layers)


def _keras() -> Any:
    import keras

    return keras


def _no_gradients() -> contextlib.AbstractContextManager[Any]:
    if _keras().backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    found: contextlib.AbstractContextManager[Any] = torch.no_grad()
    return found


@dataclass(eq=False)
class Tape:
    """Values of a network on all batches of inputs, kept as far as memory allows and run again where it does not.

    Attributes:
        network: that is run.
        batches: inputs, batch by batch.
        budget: bytes that may be kept between two passes.
    """

    network: Network
    batches: Sequence[tuple[Array, ...]]
    budget: int
    _kept: list[dict[Ref, Any]] = field(default_factory=list)
    _size: int = 0

    def __post_init__(self) -> None:
        self._kept = [{} for _ in self.batches]

    def passes(self, wanted: Sequence[Ref], remaining: Collection[Ref]) -> Iterator[dict[Ref, Any]]:
        """Tensors of each batch, until the next one is asked for.

        Args:
            wanted: which.
            remaining: what later passes will want: what it is made from is kept as far as there is memory, of each
                batch as much, small tensors before large ones.
        """
        done = 0
        for number, batch in enumerate(self.batches):
            values = self._kept[number]
            self._size -= _bytes(values)
            self._kept[number] = {}
            if not values or self._reaches_input(wanted, values):
                values |= self.network.given(batch)
            self.network.run(values, wanted)
            yield values
            room = min((self.budget - done) // (len(self.batches) - number), self.budget - self._size)
            kept = _smallest(self.network.frontier(values, remaining), room)
            values.clear()  # whoever holds it yet need not hold two batches
            size = _bytes(kept)
            self._kept[number] = kept
            self._size += size
            done += size

    def inputs(self, number: int) -> list[Any]:
        """The network's inputs in one batch."""
        return list(map(_tensor, self.batches[number]))

    def _reaches_input(self, wanted: Sequence[Ref], values: Mapping[Ref, Any]) -> bool:
        graph = self.network.merged.graph
        return any(graph.layers[graph.calls[call].layer].is_input for call in self.network.needed(wanted, values))

    def drop(self, calls: Collection[int]) -> None:
        """Let go of what some calls gave: their layers have other weights now."""
        for values in self._kept:
            stale = [ref for ref in values if ref.call in calls]
            self._size -= _bytes({ref: values.pop(ref) for ref in stale})


def _tensor(array: Array) -> Any:
    return _keras().ops.convert_to_tensor(array)


def to_numpy(value: Any) -> Array:
    """A tensor of any backend as an array."""
    return np.asarray(_keras().ops.convert_to_numpy(value))


def _smallest(values: Mapping[Ref, Any], room: int) -> dict[Ref, Any]:
    """As many of the tensors as have room, in bytes, the smallest first."""
    found: dict[Ref, Any] = {}
    for ref, value in sorted(values.items(), key=lambda item: _bytes(dict([item]))):
        room -= _bytes({ref: value})
        if room < 0:
            break
        found[ref] = value
    return found


def _bytes(values: Mapping[Ref, Any]) -> int:
    return sum(int(np.prod(value.shape, dtype=np.int64)) * 4 for value in values.values())
