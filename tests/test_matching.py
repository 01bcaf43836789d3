"""Sources match by their place in the graph, and the first difference that forbids sharing is named with both values.

`Net` writes small models as files without Keras; the tests of plans and of bad input use it, too.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kmerge.dialects.vocabulary import to_snake_case


@dataclass(frozen=True)
class Tensor:
    """Output `output` of call `call` of a layer, as `Net` hands it from call to call."""

    layer: str
    call: int
    output: int
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    @property
    def entry(self) -> dict[str, Any]:
        history = [self.layer, self.call, self.output]
        config = {"shape": list(self.shape), "dtype": self.dtype, "keras_history": history}
        return {"class_name": "__keras_tensor__", "config": config}


class Net:
    """A functional model of Keras 3, written by hand.

    Args:
        seed: of the weights. Seeds differ in small changes of the same weights, as models with an ancestor do.
        count: how many layers of each class the process built before: automatic names go on from there.
        rename: what becomes of a layer's automatic name.
    """

    def __init__(self, seed: int = 0, count: int = 0, rename: Callable[[str], str] = lambda name: name) -> None:
        self.layers: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, list[tuple[str, np.ndarray]]] = {}
        self.models: dict[str, Net] = {}
        self.inputs: list[Tensor] = []
        self._rename, self._count, self._counts = rename, count, dict[str, int]()
        self._ancestor, self._change = np.random.default_rng(0), np.random.default_rng(seed)

    def input(self, *shape: int | None, dtype: str = "float32", name: str | None = None) -> Tensor:
        config = {"batch_shape": [None, *shape], "dtype": dtype}
        made = Tensor(self._enter("InputLayer", name, config), 0, 0, (None, *shape), dtype)
        self.inputs.append(made)
        return made

    def add(
        self,
        class_name: str,
        *tensors: Tensor,
        name: str | None = None,
        weights: dict[str, Any] | None = None,
        shape: tuple[int | None, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> Tensor:
        """A layer, called on the tensors (a list of them where there are several).

        Args:
            weights: a shape, or an array, by name.
            shape: of the output; default that of the first tensor.
            kwargs: of the call.
        """
        own = self._enter(class_name, name, {"trainable": True, "dtype": "float32", **config})
        self.weights[own] = [(key, self._array(value, key)) for key, value in (weights or {}).items()]
        return self.call(own, *tensors, shape=shape, kwargs=kwargs)

    def call(
        self,
        layer: str,
        *tensors: Tensor,
        shape: tuple[int | None, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Another call of a layer."""
        nodes = self.layers[layer]["inbound_nodes"]
        entries = [tensor.entry for tensor in tensors]
        nodes.append({"args": entries if len(entries) == 1 else [entries], "kwargs": kwargs or {}})
        return Tensor(layer, len(nodes) - 1, 0, shape or tensors[0].shape)

    def dense(self, x: Tensor, units: int, **config: Any) -> Tensor:
        weights = config.pop("weights", {"kernel": (x.shape[-1], units), "bias": (units,)})
        config = {"units": units, "activation": "linear", **config}
        return self.add("Dense", x, weights=weights, shape=(*x.shape[:-1], units), **config)

    def conv(self, x: Tensor, filters: int, **config: Any) -> Tensor:
        weights = {"kernel": (3, 3, x.shape[-1], filters), "bias": (filters,)}
        config = {"filters": filters, "kernel_size": [3, 3], "strides": [1, 1], "padding": "same", **config}
        return self.add("Conv2D", x, weights=weights, shape=(*x.shape[:-1], filters), **config)

    def batch_normalization(self, x: Tensor, **config: Any) -> Tensor:
        weights = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (x.shape[-1],))
        return self.add("BatchNormalization", x, weights=weights, axis=-1, epsilon=0.001, momentum=0.99, **config)

    def normalization(self, x: Tensor, mean: float, **config: Any) -> Tensor:
        """A Normalization layer that was adapted to data."""
        size = x.shape[-1]
        state = {"mean": np.full(size, mean, "float32"), "variance": np.ones(size, "float32"), "count": np.int64(9)}
        return self.add("Normalization", x, weights=state, axis=[-1], mean=None, variance=None, **config)

    def model(self, inner: Net, outputs: Any, *tensors: Tensor, name: str | None = None) -> Tensor:
        """A whole model as a layer."""
        config = inner.config(outputs)["config"]
        own = self._enter("Functional", name, {})
        self.layers[own]["config"] = {**config, "name": own}
        self.models[own] = inner
        return self.call(own, *tensors, shape=outputs.shape)

    def save(self, path: Path, outputs: Any) -> Path:
        """Writes `.keras` or, under any other suffix, `.h5`. Weights lie in a `.keras` in the order of creation."""
        if path.suffix == ".keras":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
                archive.writestr("config.json", json.dumps(self.config(outputs)))
                archive.writestr("model.weights.h5", self.numbered())
            return path
        config = _without_modules(self.config(outputs))
        with h5py.File(path, "w") as file:
            file.attrs.update({"keras_version": "3.15.1", "backend": "jax", "model_config": json.dumps(config)})
            self.write_weights(file.create_group("model_weights"))
        return path

    def config(self, outputs: Any) -> dict[str, Any]:
        """The whole model's configuration."""

        def histories(structure: Any) -> Any:
            if isinstance(structure, dict):
                return {key: histories(value) for key, value in structure.items()}
            if isinstance(structure, list):
                return [histories(item) for item in structure]
            return [structure.layer, structure.call, structure.output]

        inputs = self.inputs[0] if len(self.inputs) == 1 else self.inputs
        config = {
            "name": "functional",
            "layers": list(self.layers.values()),
            "input_layers": histories(inputs),
            "output_layers": histories(outputs),
        }
        return {"module": "keras", "class_name": "Functional", "config": config, "registered_name": "Functional"}

    def write_weights(self, group: Any) -> None:
        """The old layout, as under `model_weights` or in a file with weights only."""
        group.attrs["layer_names"] = list(self.layers)
        for layer in self.layers:
            inside = group.create_group(layer)
            weights = self.models[layer].listed() if layer in self.models else self.named(layer)
            inside.attrs["weight_names"] = [name for name, _ in weights] or np.zeros(0)
            for name, array in weights:
                inside[name] = array

    def named(self, layer: str) -> list[tuple[str, np.ndarray]]:
        """The weights of a layer with the names that an old file gives them."""
        return [(f"{layer}/{name}", array) for name, array in self.weights.get(layer, [])]

    def listed(self) -> list[tuple[str, np.ndarray]]:
        """All weights as an old file lists those of a nested model: trainable ones first."""
        frozen = {name for name, layer in self.layers.items() if layer["config"].get("trainable") is False}
        weights = [(layer, *weight) for layer in self.layers for weight in self.named(layer)]
        fixed = [layer in frozen or "moving_" in name for layer, name, _ in weights]
        return [weights[n][1:] for wanted in (False, True) for n in range(len(weights)) if fixed[n] is wanted]

    def numbered(self) -> bytes:
        """The layout of Keras 3, numbered in the order of creation."""
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            self._number(file, "")
        return buffer.getvalue()

    def _number(self, file: Any, prefix: str) -> None:
        counts = dict[str, int]()
        for name, layer in self.layers.items():
            snake = to_snake_case(layer["class_name"])
            number = counts[snake] = counts.get(snake, -1) + 1
            place = f"{prefix}layers/{snake}_{number}" if number else f"{prefix}layers/{snake}"
            if name in self.models:
                self.models[name]._number(file, f"{place}/")
            group = file.create_group(f"{place}/vars")
            group.attrs["name"] = name
            for index, (_, array) in enumerate(self.weights.get(name, [])):
                group[str(index)] = array

    def _enter(self, class_name: str, name: str | None, config: dict[str, Any]) -> str:
        if name is None:
            snake = "input" if class_name == "InputLayer" else to_snake_case(class_name)
            number = self._counts[snake] = self._counts.get(snake, self._count - 1) + 1
            name = self._rename(f"{snake}_{number}" if number else snake)
        entry = {"module": "keras.layers", "class_name": class_name, "config": {"name": name, **config}}
        self.layers[name] = {**entry, "registered_name": None, "name": name, "inbound_nodes": []}
        return name

    def _array(self, value: Any, name: str) -> np.ndarray:
        if not isinstance(value, tuple):
            return np.asarray(value)
        array = self._ancestor.standard_normal(value) + 0.05 * self._change.standard_normal(value)
        return (np.abs(array) if "variance" in name else array).astype("float32")


def _without_modules(value: Any) -> Any:
    """A configuration as Keras 3 writes it into `.h5`."""
    if isinstance(value, dict):
        return {key: _without_modules(item) for key, item in value.items() if key != "module"}
    return [_without_modules(item) for item in value] if isinstance(value, list) else value
