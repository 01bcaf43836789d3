"""Sources match by their place in the graph, and the first difference that forbids sharing is named with both values.

`Net` writes small models as files without Keras; the tests of plans and of bad input use it, too.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kmerge.dialects.vocabulary import to_snake_case
from kmerge.errors import FormatError
from kmerge.matching import Difference, Match, identity, layer_difference, match, state_difference
from kmerge.source import Source, State, open_source
from kmerge.store import Asset

MODEL = "keras.src.models.functional"


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

    def operation(self, class_name: str, *tensors: Tensor, **kwargs: Any) -> Tensor:
        """A bare operation: `x + y`."""
        name = self._enter(class_name, None, {})
        self.layers[name] |= {"module": "keras.src.ops.numpy", "config": {"name": name}}
        made = self.call(name, tensors[0], kwargs=kwargs)
        self.layers[name]["inbound_nodes"] = [{"args": [tensor.entry for tensor in tensors], "kwargs": kwargs}]
        return made

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
        return {"module": MODEL, "class_name": "Functional", "config": config, "registered_name": "Functional"}

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
        module = MODEL if class_name == "Functional" else "keras.layers"
        entry = {"module": module, "class_name": class_name, "config": {"name": name, **config}}
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


# ---- positions

Recipe = Callable[[Net], Any]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., list[Source]]]:
    """Sources 'a', 'b', ... from recipes, or from nets with their outputs."""
    with ExitStack() as stack:

        def make(*recipes: Recipe | tuple[Net, Any], suffix: str = ".h5") -> list[Source]:
            sources = []
            for seed, (label, recipe) in enumerate(zip("abcd", recipes, strict=False)):
                net, outputs = recipe if isinstance(recipe, tuple) else ((made := Net(seed)), recipe(made))
                path = net.save(tmp_path / f"{label}{suffix}", outputs)
                sources.append(stack.enter_context(open_source(path)))
            return sources

        yield make


def names(first: Source, other: Source, found: Match | None = None) -> dict[str, str]:
    """Layers of the first source that have a counterpart, with its name."""
    assert first.graph
    assert other.graph
    found = found or match(first, other)
    return {first.graph.layers[mine].name: other.graph.layers[theirs].name for mine, theirs in found.layers.items()}


def difference(first: Source, other: Source, layer: str) -> Difference | None:
    assert first.graph
    return layer_difference(first, other, match(first, other), first.graph.layer_named(layer))


def chain(net: Net, depth: int = 3, classes: int = 2) -> Tensor:
    x = net.input(4)
    for _ in range(depth):
        x = net.dense(x, 4)
    return net.dense(x, classes)


def two_towers(net: Net, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Tensor:
    x = net.input(4)
    joined = net.add(
        "Concatenate", net.dense(x, 3, **(first or {})), net.dense(x, 3, **(second or {})), shape=(None, 6)
    )
    return net.dense(joined, 2)


def test_a_graph_lies_over_itself(opened: Any) -> None:
    for recipe in (chain, two_towers, siamese):
        (source,) = opened(recipe)
        assert match(source, source) == identity(source.graph)


def test_names_cross_ten(opened: Any) -> None:
    """HDF5 lists dense_10 before dense_8, and automatic names go on within a process."""
    later = Net(1, count=8)
    first, other = opened(chain, (later, chain(later)))
    assert names(first, other) == {
        "input": "input_8",
        "dense": "dense_8",
        "dense_1": "dense_9",
        "dense_2": "dense_10",
        "dense_3": "dense_11",
    }


@pytest.mark.parametrize(
    "rename",
    [lambda name: name[::-1], lambda name: f"κόμβος {name} 層", lambda name: f"{sum(map(ord, name))}/{name}"],
    ids=["backwards", "non-ascii", "paths"],
)
def test_names_do_not_matter(opened: Any, rename: Callable[[str], str]) -> None:
    for recipe in (chain, two_towers):
        renamed = Net(1, rename=rename)
        first, other = opened(recipe, (renamed, recipe(renamed)))
        assert names(first, other) == {layer.name: rename(layer.name) for layer in first.graph.layers}
        assert not any(difference(first, other, layer.name) for layer in first.graph.layers)


def test_misleading_names(opened: Any) -> None:
    """The same names in another order are other layers."""
    swap = {"dense": "dense_2", "dense_2": "dense"}
    swapped = Net(1, rename=lambda name: swap.get(name, name))
    first, other = opened(chain, (swapped, chain(swapped)))
    assert names(first, other)["dense"] == "dense_2"
    assert names(first, other)["dense_2"] == "dense"


def test_order_in_the_file_does_not_matter(opened: Any) -> None:
    net = Net(1)
    outputs = chain(net)
    net.layers = dict(reversed(net.layers.items()))
    first, other = opened(chain, (net, outputs))
    assert names(first, other) == {layer.name: layer.name for layer in first.graph.layers}


def test_equal_branches_match_in_order(opened: Any) -> None:
    first, other = opened(two_towers, two_towers)
    found = names(first, other)
    assert (found["dense"], found["dense_1"]) == ("dense", "dense_1")


def test_branches_match_by_configuration(opened: Any) -> None:
    relu, tanh = {"activation": "relu"}, {"activation": "tanh"}
    first, other = opened(lambda net: two_towers(net, relu, tanh), lambda net: two_towers(net, tanh, relu))
    found = names(first, other)
    assert (found["dense"], found["dense_1"]) == ("dense_1", "dense")


def test_a_branch_does_not_take_its_neighbours_counterpart(opened: Any) -> None:
    relu, tanh = {"activation": "relu"}, {"activation": "tanh"}

    def one_tower(net: Net) -> Any:
        return net.dense(net.dense(net.input(4), 3, **tanh), 2)

    first, other = opened(lambda net: two_towers(net, relu, tanh), one_tower)
    found = names(first, other)
    assert found["dense_1"] == "dense"
    assert "dense" not in found


def test_counterparts_of_another_configuration_are_still_counterparts(opened: Any) -> None:
    """So that the difference can be named."""
    first, other = opened(lambda net: two_towers(net, {"activation": "relu"}), lambda net: two_towers(net))
    assert names(first, other) == {layer.name: layer.name for layer in first.graph.layers}
    assert difference(first, other, "dense") == Difference("activation", "relu", "linear", "configuration")
    assert difference(first, other, "dense_1") is None


def test_more_branches_than_there(opened: Any) -> None:
    """Those that are there match in order."""

    def towers(*activations: str) -> Recipe:
        def recipe(net: Net) -> Any:
            x = net.input(4)
            joined = [net.dense(x, 3, activation=activation) for activation in activations]
            return net.dense(net.add("Concatenate", *joined, shape=(None, 3 * len(joined))), 2)

        return recipe

    first, other = opened(towers("relu", "tanh", "tanh"), towers("tanh", "tanh"))
    found = names(first, other)
    assert (found["dense_1"], found["dense_2"]) == ("dense", "dense_1")
    assert "dense" not in found


def test_heads_may_differ(opened: Any) -> None:
    """Another number of classes, more layers, another class of layer: the trunk matches all the same."""

    def with_head(head: Callable[[Net, Tensor], Any]) -> Recipe:
        return lambda net: head(net, net.dense(net.input(4), 4))

    first, wide, long, other = opened(
        with_head(lambda net, x: net.dense(x, 2)),
        with_head(lambda net, x: net.dense(x, 9)),
        with_head(lambda net, x: net.add("Softmax", net.dense(net.dense(x, 7), 2))),
        with_head(lambda net, x: net.batch_normalization(x)),
    )
    for source in (wide, long, other):
        assert names(first, source)["dense"] == "dense"
        assert difference(first, source, "dense") is None
    assert difference(first, wide, "dense_1") == Difference("kernel", (4, 2), (4, 9), "shape")
    assert difference(first, long, "dense_1") == Difference("kernel", (4, 2), (4, 7), "shape")
    assert difference(first, other, "dense_1") == Difference("its place", "layer 3, a Dense", None, "place")


def test_a_layer_behind_parts_that_differ(opened: Any) -> None:
    """Towers of another depth end in one output layer: it matches from the outputs back."""

    def towers(depth: int) -> Recipe:
        def recipe(net: Net) -> Any:
            x = net.input(4)
            for _ in range(depth):
                x = net.batch_normalization(net.dense(x, 4))
            return net.dense(net.add("Flatten", x), 2, name="out")

        return recipe

    first, other = opened(towers(1), towers(3))
    found = names(first, other)
    assert found["out"] == "out"
    assert found["flatten"] == "flatten"
    assert difference(first, other, "out") is None
    assert found["dense"] == "dense"


def siamese(net: Net) -> Tensor:
    one, two = net.input(4), net.input(4)
    left = net.dense(one, 3, name="twin")
    right = net.call("twin", two, shape=left.shape)
    return net.dense(net.add("Subtract", left, right), 2)


def test_a_layer_called_twice_matches_call_by_call(opened: Any) -> None:
    first, other = opened(siamese, siamese)
    found = match(first, other)
    twin = first.graph.layer_named("twin")
    assert [found.calls[call] for call in first.graph.calls_of(twin)] == list(other.graph.calls_of(twin))
    assert difference(first, other, "twin") is None


def test_another_number_of_calls(opened: Any) -> None:
    def again(times: int) -> Recipe:
        def recipe(net: Net) -> Any:
            x = net.dense(net.input(4), 4, name="again")
            for _ in range(times - 1):
                x = net.call("again", x)
            return net.dense(x, 2)

        return recipe

    more, fewer = opened(again(3), again(2))
    assert difference(more, fewer, "again") == Difference("the number of its calls", 3, 2, "call")
    assert difference(fewer, more, "again") == Difference("the number of its calls", 2, 3, "call")


def test_every_input_is_matched_by_its_place(opened: Any) -> None:
    def recipe(net: Net) -> Any:
        one, two = net.input(4), net.input(7)
        return net.dense(net.add("Concatenate", one, two, shape=(None, 11)), 2)

    first, other = opened(recipe, (renamed := Net(1, rename=lambda name: f"z{9 - len(name)}{name}"), recipe(renamed)))
    assert list(names(first, other).items())[:2] == [("input", "z4input"), ("input_1", "z2input_1")]


def test_models_inside_are_followed(opened: Any) -> None:
    """A nested model and the same layers one by one are the same network."""

    def nested(net: Net) -> Any:
        inner = Net()
        return net.dense(net.model(inner, inner.dense(inner.input(4), 4), net.input(4)), 2)

    first, other = opened(nested, lambda net: chain(net, 1))
    assert len(first.graph.layers) == 3
    assert not any(difference(first, other, layer.name) for layer in first.graph.layers)


def test_the_fixtures_match_in_order(fixtures_dir: Path) -> None:
    for family in ("mlp", "cnn", "lstm"):
        with (
            open_source(fixtures_dir / f"{family}_a.h5") as first,
            open_source(fixtures_dir / f"{family}_c.h5") as other,
        ):
            assert match(first, other).layers == dict(enumerate(range(len(first.graph.layers))))


def test_without_a_graph(opened: Any, fixtures_dir: Path, tmp_path: Path) -> None:
    (first,) = opened(chain)
    net = Net()
    chain(net)
    (tmp_path / "b.weights.h5").write_bytes(net.numbered())
    with open_source(tmp_path / "b.weights.h5") as other, pytest.raises(FormatError, match="'b' holds no graph"):
        match(first, other)


# ---- what forbids sharing

DICTIONARY = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}
ZEROS = {"module": "keras.initializers", "class_name": "Zeros", "config": {}}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "policy": ({}, {"dtype": DICTIONARY}),
    "policy of keras 2": ({}, {"dtype": {"class_name": "Policy", "config": {"name": "float32"}}}),
    "initialiser": ({}, {"kernel_initializer": ZEROS}),
    "seed": ({"seed": 1}, {"seed": 2}),
    "frozen": ({}, {"trainable": False}),
    "null": ({}, {"kernel_regularizer": None}),
    "default": ({}, {"quantization_config": None, "groups": 1}),
    "object number": ({}, {"activation": "linear", "shared_object_id": 7}),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_matter(name: str, opened: Any) -> None:
    one, two = SAME[name]
    first, other = opened(lambda net: net.dense(net.input(4), 2, **one), lambda net: net.dense(net.input(4), 2, **two))
    assert difference(first, other, "dense") is None
    assert difference(other, first, "dense") is None


def test_sentences() -> None:
    def said(first: Any, second: Any) -> str:
        return Difference("rate", first, second, "configuration").sentence("a", "b")

    assert said(0.1, None) == "rate is 0.1 in 'a' but not set in 'b'"
    assert said([2, 2], (3,)) == "rate is (2, 2) in 'a' but (3,) in 'b'"
    assert said("same", ["x"]) == "rate is 'same' in 'a' but ['x'] in 'b'"
    assert len(said("x" * 500, list(range(500)))) < 700
    assert "..." in said(1, list(range(500)))


def test_the_first_difference_is_named(opened: Any) -> None:
    """Shapes before configuration, the configuration by key."""
    one = {"padding": "same", "activation": "relu"}
    two = {"padding": "valid", "activation": "tanh"}
    first, other, wide = opened(
        lambda net: net.conv(net.input(8, 8, 1), 2, **one),
        lambda net: net.conv(net.input(8, 8, 1), 2, **two),
        lambda net: net.conv(net.input(8, 8, 1), 3, **two),
    )
    assert difference(first, other, "conv2d") == Difference("activation", "relu", "tanh", "configuration")
    assert difference(first, wide, "conv2d") == Difference("kernel", (3, 3, 1, 2), (3, 3, 1, 3), "shape")


def test_a_difference_deep_in_a_configuration(opened: Any) -> None:
    def wrapped(units: int) -> Recipe:
        inner = {"class_name": "LSTM", "config": {"name": f"lstm_{units}", "units": 3, "recurrent_dropout": units / 10}}
        return lambda net: net.add("Bidirectional", net.input(5, 4), weights={"kernel": (4, 12)}, layer=inner)

    first, other = opened(wrapped(1), wrapped(2))
    found = difference(first, other, "bidirectional")
    assert found == Difference("layer.config.recurrent_dropout", 0.1, 0.2, "configuration")


def test_inputs(opened: Any) -> None:
    def inputs(*shape: int | None, **options: Any) -> Recipe:
        return lambda net: net.dense(net.input(*shape, **options), 2)

    first, wide, whole, free = opened(inputs(4), inputs(5), inputs(4, dtype="int32"), inputs(4))
    assert difference(first, wide, "input") == Difference("the input's shape", (None, 4), (None, 5), "shape")
    assert difference(first, whole, "input") == Difference("the input's dtype", "float32", "int32", "shape")
    assert difference(first, free, "input") is None


def test_a_keyword_that_is_not_set_is_none(opened: Any) -> None:
    def told(**kwargs: Any) -> Recipe:
        return lambda net: net.add("Dropout", net.input(4), rate=0.5, kwargs=kwargs)

    first, same, other = opened(told(training=None), told(), told(training=True))
    assert difference(first, same, "dropout") is None
    assert difference(first, other, "dropout") == Difference("the call's kwargs.training", None, True, "call")


def test_learned_state(opened: Any) -> None:
    def adapted(mean: float) -> Recipe:
        return lambda net: net.dense(net.normalization(net.input(4), mean), 2)

    first, same, other = opened(adapted(0.5), adapted(0.5), adapted(1.5))
    assert difference(first, same, "normalization") is None
    assert difference(first, other, "normalization") == Difference("an entry of mean", 0.5, 1.5, "state")


def test_weights_are_no_learned_state(opened: Any) -> None:
    first, other = opened(chain, chain)
    assert not any(difference(first, other, layer.name) for layer in first.graph.layers)


@pytest.mark.parametrize("place", [0, 1_048_575, 1_048_576, 1_048_579])
def test_state_differs_anywhere(place: int, opened: Any) -> None:
    """State is compared in blocks, to its last entry; NaN equals itself."""
    values = np.zeros(1_048_580, "float32")
    values[7] = np.nan
    changed = values.copy()
    changed[place] = 3

    def holding(array: np.ndarray) -> Recipe:
        return lambda net: net.add(
            "Normalization", net.input(4), weights={"mean": array, "variance": array, "count": 1}
        )

    first, same, other = opened(holding(values), holding(values), holding(changed))
    assert difference(first, same, "normalization") is None
    found = difference(first, other, "normalization")
    assert found
    assert (found.first, found.second) == (0, 3)


def test_vocabularies() -> None:
    def holding(*words: str) -> State:
        content = "\n".join(words).encode()
        return State(assets={"vocabulary.txt": Asset(len(content), lambda: content)})

    assert state_difference(holding("red", "green"), holding("red", "green")) is None
    found = state_difference(holding("red", "green"), holding("red", "blue"))
    assert found == Difference("vocabulary.txt", "9 bytes", "8 other bytes", "state")
    assert state_difference(holding("red"), State()) == Difference(
        "vocabulary.txt", "3 bytes", "0 other bytes", "state"
    )
