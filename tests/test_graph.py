"""Orders, paths and flat networks, against Keras itself and by hand."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import zoo

from kmerge.dialects import reading
from kmerge.dialects.reading import Dialect, Nested, dissolve, has_graph, read_model, weight_paths
from kmerge.errors import GraphError, UnsafeFileError
from kmerge.graph import (
    Call,
    Graph,
    Layer,
    Ref,
    ancestors,
    canonical,
    flatten,
    layer_order,
    refs,
    sort_calls,
    substitute,
    traversal,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras and NumPy

# Keras stores one object once, but its configuration does not tell that both are one: it does not load its own file.
STORED_ONCE = {"shared_inside_and_outside": {"layers/dense"}}


# ---- against Keras


def levels(nested: Nested, model: Any) -> Iterator[tuple[Nested, Any]]:
    """Each level of a configuration beside the model that Keras made it from."""
    yield nested, model
    own = {layer.name: layer for layer in [*model.layers, *getattr(model, "operations", [])]}
    for index, inner in nested.models.items():
        yield from levels(inner, own[nested.graph.layers[index].name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`saved(name)`: a model of the zoo and its `.keras` file; values do not matter here."""
    folder = tmp_path_factory.mktemp("zoo")
    patch = pytest.MonkeyPatch()
    patch.setattr(zoo, "randomise", lambda model, seed: None)

    def save(name: str) -> tuple[Any, Path]:
        model = zoo.TOPOLOGIES[name].build(0)
        return model, zoo.save(model, folder / f"{name}.keras")

    yield save
    patch.undo()


def paths_of_names(path: Path) -> tuple[dict[str, str], set[str]]:
    """From Keras's own file: the name of the layer at each path, and the paths with numbers."""
    names: dict[str, str] = {}
    filled: set[str] = set()

    def visit(key: str, item: Any) -> None:
        owner, _, last = key.rpartition("/")
        if last == "vars" and "name" in item.attrs:
            names[owner] = str(item.attrs["name"])
        elif isinstance(item, h5py.Dataset):
            filled.add(owner.removesuffix("/vars"))

    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as member, h5py.File(member) as file:
        file.visititems(visit)
    return names, filled


@pytest.mark.parametrize("name", zoo.TOPOLOGIES)
def test_orders_and_paths_are_those_of_keras(name: str, saved: Any) -> None:
    model, path = saved(name)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    assert has_graph(config)
    nested = read_model(config, Dialect.KERAS3)
    for level, own in levels(nested, model):
        assert [level.graph.layers[index].name for index in level.order()] == [layer.name for layer in own.layers]
        if not level.sequential:
            operations = [level.graph.layers[index].name for index in layer_order(level.graph)]
            assert operations == [operation.name for operation in own.operations]
    stored, filled = paths_of_names(path)
    by_address = {
        (id(level), index): layer.name
        for level, _ in levels(nested, model)
        for index, layer in enumerate(level.graph.layers)
    }
    mine = {place: by_address[address] for address, place in weight_paths(nested).items()}
    mine = {place: owner for place, owner in mine.items() if place not in STORED_ONCE.get(name, ())}
    assert {place: stored.get(place) for place in mine} == mine
    assert all(any(f"{place}/".startswith(f"{own}/") for own in mine) for place in filled), "all numbers are found"
    models = {place for place in stored if place and place not in mine and not _lies_under(place, mine)}
    classes = {item.rpartition("/")[2].rstrip("_0123456789") for item in models}
    assert classes <= {"functional", "sequential", ""}, "what has no path of its own is a dissolved model"


def _lies_under(place: str, owners: dict[str, str]) -> bool:
    return any(place.startswith(f"{owner}/") for owner in owners)


@pytest.mark.parametrize("name", zoo.TOPOLOGIES)
def test_the_flat_network_is_in_order_and_loses_no_layer(name: str, saved: Any) -> None:
    model, path = saved(name)
    with zipfile.ZipFile(path) as archive:
        nested = read_model(json.loads(archive.read("config.json")), Dialect.KERAS3)
    dissolved = dissolve(nested)
    graph = dissolved.graph
    check_graph(graph)
    names = [layer.name for layer in graph.layers]
    assert len(set(names)) == len(names)
    assert len(set(dissolved.addresses)) == len(graph.layers)
    assert len(refs(graph.outputs)) == len(model.outputs)
    assert len(refs(graph.inputs)) == len(model.inputs)
    places = weight_paths(nested)
    _, filled = paths_of_names(path)
    kept = [places[address] for address in dissolved.addresses if address in places]
    assert all(any(f"{place}/".startswith(f"{own}/") for own in kept) for place in filled)


def check_graph(graph: Graph) -> None:
    """Every tensor is made before it is used, every layer is called."""
    for number, call in enumerate(graph.calls):
        assert all(ref.call < number for ref in refs(call.arguments))
    assert {call.layer for call in graph.calls} == set(range(len(graph.layers)))
    for ref in [*refs(graph.inputs), *refs(graph.outputs)]:
        assert 0 <= ref.call < len(graph.calls)
    for ref in refs(graph.inputs):
        assert graph.layer_of(ref).is_input


# ---- by hand


def network(*calls: tuple[str, tuple[int, ...]], outputs: Any, inputs: Any = None) -> Graph:
    """A graph of calls `(layer, calls that give its arguments)`; layers named `in...` are inputs."""
    names = list(dict.fromkeys(name for name, _ in calls))
    layers = tuple(Layer(name, "InputLayer" if name.startswith("in") else "Dense", {"name": name}) for name in names)
    made = tuple(
        Call(names.index(name), {"args": [[Ref(number) for number in given]], "kwargs": {}} if given else None)
        for name, given in calls
    )
    given = [Ref(number) for number, call in enumerate(made) if layers[call.layer].is_input]
    return Graph("by_hand", layers, made, given if inputs is None else inputs, substitute_numbers(outputs))


def substitute_numbers(structure: Any) -> Any:
    if isinstance(structure, int):
        return Ref(structure)
    if isinstance(structure, dict):
        return {key: substitute_numbers(value) for key, value in structure.items()}
    return [substitute_numbers(value) for value in structure]


def order_of(graph: Graph) -> list[str]:
    return [graph.layers[index].name for index in layer_order(graph)]


def test_order_of_a_chain() -> None:
    assert order_of(network(("in", ()), ("b", (0,)), ("a", (1,)), outputs=2)) == ["in", "b", "a"]


def test_the_longer_branch_stands_first() -> None:
    graph = network(("in", ()), ("short", (0,)), ("long_1", (0,)), ("long_2", (2,)), ("add", (1, 3)), outputs=4)
    assert order_of(graph) == ["in", "long_1", "short", "long_2", "add"]


def test_within_a_depth_the_walk_from_the_outputs_decides() -> None:
    graph = network(("in", ()), ("z", (0,)), ("a", (0,)), ("add", (2, 1)), outputs=3)
    assert order_of(graph) == ["in", "a", "z", "add"]
    graph = network(("in", ()), ("z", (0,)), ("a", (0,)), outputs=[1, 2])
    assert order_of(graph) == ["in", "z", "a"]
    graph = network(("in", ()), ("z", (0,)), ("a", (0,)), outputs={"y": 1, "x": 2})
    assert order_of(graph) == ["in", "a", "z"], "dictionaries go by their sorted keys"


def test_a_shared_layer_counts_at_its_deepest_call() -> None:
    graph = network(
        ("in", ()), ("shared", (0,)), ("middle", (1,)), ("shared", (2,)), ("other", (0,)), ("add", (3, 4)), outputs=5
    )
    assert order_of(graph) == ["in", "shared", "middle", "other", "add"]
    calls, places = traversal(graph)
    assert sorted(calls) == list(range(6))
    assert all(calls.index(ref.call) < calls.index(number) for number in calls for ref in _given(graph, number))
    met = sorted(places, key=places.__getitem__)
    assert [graph.layers[layer].name for layer in met] == ["add", "shared", "middle", "in", "other"]


def _given(graph: Graph, call: int) -> list[Ref]:
    return refs(graph.calls[call].arguments)


def test_shared_layers_at_different_depths_against_keras() -> None:
    import keras

    layers = keras.layers
    x = keras.Input((4,), name="in")
    shared, norm = layers.Dense(4, name="shared"), layers.LayerNormalization(name="norm")
    early = norm(shared(x))
    late = shared(layers.Dense(4, name="deep")(norm(layers.Dense(4, name="before")(early))))
    model = keras.Model(
        x, {"b": layers.Dense(2, name="head_b")(late), "a": norm(layers.Dense(4, name="head_a")(early))}
    )
    nested = read_model(json.loads(json.dumps(keras.saving.serialize_keras_object(model))), Dialect.KERAS3)
    assert order_of(nested.graph) == [layer.name for layer in model.layers]
    assert len(nested.graph.calls_of(nested.graph.layer_named("norm"))) == 3
    again = dissolve(nested).graph
    assert order_of(again) == [layer.name for layer in model.layers]


def test_an_input_that_reaches_no_output_stands_within_depth_0() -> None:
    graph = network(("in_1", ()), ("in_2", ()), ("a", (0,)), outputs=2)
    assert order_of(graph) == ["in_1", "in_2", "a"]


def test_a_long_chain_is_no_deep_recursion() -> None:
    length = 3000
    graph = network(("in", ()), *((f"l{n}", (n,)) for n in range(length)), outputs=length)
    assert layer_order(graph) == list(range(length + 1))
    assert sort_calls(graph).calls == graph.calls


@pytest.mark.parametrize(
    "calls",
    [
        (("in", ()), ("a", (0, 2)), ("b", (1,))),
        (("in", ()), ("x", (0,)), ("b", (2,))),  # a layer that takes its own output
        (("in", ()), ("shared", (0, 3)), ("middle", (1,)), ("shared", (2,))),
    ],
)
def test_a_loop_is_refused(calls: Any) -> None:
    graph = network(*calls, outputs=len(calls) - 1)
    for function in (traversal, layer_order, sort_calls):
        with pytest.raises(
            GraphError, match=r"The network has a loop through layer '\w+': no Keras model can have one\."
        ):
            function(graph)


def test_sort_calls_drops_dead_calls_and_keeps_inputs() -> None:
    graph = network(
        ("b", (2,)), ("dead", (2,)), ("in_1", ()), ("in_2", ()), ("dead_too", (1,)), ("a", (0,)), outputs={"y": [5, 0]}
    )
    done = sort_calls(graph)
    assert [done.layers[call.layer].name for call in done.calls] == ["in_1", "b", "a", "in_2"]
    assert [done.layer_of(ref).name for ref in refs(done.outputs)] == ["a", "b"]
    assert [done.layer_of(ref).name for ref in refs(done.inputs)] == ["in_1", "in_2"]
    assert list(done.outputs) == ["y"]
    assert sort_calls(done) == done


def test_sort_calls_keeps_shapes_and_output_numbers() -> None:
    graph = network(("a", (1,)), ("in", ()), outputs=0)
    arguments = {"args": [Ref(1, 0, (None, 3), "float16")], "kwargs": {"mask": Ref(1, 2)}}
    done = sort_calls(Graph("g", graph.layers, (Call(0, arguments), Call(1)), graph.inputs, Ref(0, 1)))
    tensor, mask = refs(done.calls[1].arguments)
    assert (tensor.call, tensor.shape, tensor.dtype, mask.call, mask.output) == (0, (None, 3), "float16", 0, 2)
    assert (done.outputs.call, done.outputs.output) == (1, 1)


def test_calls_and_names_are_indexed() -> None:
    graph = network(("in", ()), ("a", (0,)), ("b", (1,)), outputs=2)
    twin = network(("in", ()), ("a", (0,)), ("b", (1,)), outputs=2)
    again = replace(graph, calls=(*graph.calls, Call(1, graph.calls[1].arguments)))
    assert graph.calls_of(1) == (1,)
    assert again.calls_of(1) == (1, 3)
    assert graph.calls_of(7) == ()
    assert graph.layer_named("b") == 2
    with pytest.raises(KeyError, match="nobody"):
        graph.layer_named("nobody")
    assert graph == twin  # whatever has been looked up
    assert graph != again
    assert repr(graph) == repr(twin)
    assert pickle.loads(pickle.dumps(graph)) == graph


def test_ancestors() -> None:
    graph = network(("in", ()), ("a", (0,)), ("b", (1,)), ("c", (1,)), ("d", (2, 3)), ("e", (0,)), outputs=[4, 5])
    assert ancestors(graph, [2]) == {0, 1, 2}


def test_structures() -> None:
    structure = {"b": [Ref(1), 7], "a": (Ref(0), {"x": Ref(2), "k": "text"})}
    assert [ref.call for ref in refs(structure)] == [0, 2, 1]
    assert flatten(structure) == [Ref(0), "text", Ref(2), Ref(1), 7]
    assert substitute(structure, lambda ref: ref.call) == {"b": [1, 7], "a": [0, {"x": 2, "k": "text"}]}
    assert Ref(1, 0, (3,), "float32") == Ref(1)
    assert canonical(structure) == canonical({"a": [Ref(0, 0, (2,)), {"k": "text", "x": Ref(2)}], "b": [Ref(1), 7]})
    assert canonical(structure) != canonical({"b": [Ref(1, 1), 7], "a": structure["a"]})
    with pytest.raises(TypeError, match="not JSON"):
        canonical({"a": object()})


# ---- dissolving


def dense(name: str, **more: Any) -> dict[str, Any]:
    return {"class_name": "Dense", "config": {"name": name, "units": 3}, "name": name, **more}


def taking(*names: str, node: int = 0, **kwargs: Any) -> dict[str, Any]:
    """One call in Keras 3's words."""
    tensors = [
        {"class_name": "__keras_tensor__", "config": {"shape": [None, 3], "keras_history": [name, node, 0]}}
        for name in names
    ]
    return {"args": [tensors[0] if len(tensors) == 1 else tensors], "kwargs": kwargs}


def model_of(name: str, layers: list[dict[str, Any]], output: list[Any], **more: Any) -> dict[str, Any]:
    shape = {"name": "in", "batch_shape": [None, 3]}
    start = {"class_name": "InputLayer", "config": shape, "name": "in", "inbound_nodes": []}
    config = {"name": name, "layers": [start, *layers], "input_layers": ["in", 0, 0], "output_layers": output}
    return {"module": "keras", "class_name": "Functional", "config": config, "name": name, **more}


def flat(model: dict[str, Any]) -> Graph:
    graph = dissolve(read_model(model, Dialect.KERAS3)).graph
    check_graph(graph)
    return graph


def chain(graph: Graph) -> list[str]:
    return [graph.layers[call.layer].name for call in graph.calls]


def test_a_sub_model_called_twice_has_its_layers_called_twice() -> None:
    inner = model_of(
        "inner", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0],
        inbound_nodes=[taking("in"), taking("inner", node=1)],
    )  # fmt: skip
    nested = read_model(
        model_of("outer", [inner, dense("y", inbound_nodes=[taking("inner", node=2)])], ["y", 0, 0]), Dialect.KERAS3
    )
    dissolved = dissolve(nested)
    assert chain(dissolved.graph) == ["in", "x", "x", "y"]
    assert [layer.name for layer in dissolved.graph.layers] == ["in", "x", "y"]
    assert [layer.origin for layer in dissolved.graph.layers] == [(), ("inner",), ()]
    assert sorted(weight_paths(nested).values()) == [
        "layers/dense",
        "layers/functional/layers/dense",
        "layers/functional/layers/input_layer",
        "layers/input_layer",
    ]


def test_one_object_inside_and_outside_is_one_layer() -> None:
    once = {"shared_object_id": 4711}
    inner = model_of(
        "inner", [dense("x", inbound_nodes=[taking("in")], **once)], ["x", 0, 0], inbound_nodes=[taking("in")]
    )
    outer = model_of("outer", [inner, dense("x", inbound_nodes=[taking("inner")], **once)], ["x", 0, 0])
    nested = read_model(outer, Dialect.KERAS3)
    graph = dissolve(nested).graph
    assert len([layer for layer in graph.layers if layer.class_name == "Dense"]) == 1
    assert len([call for call in graph.calls if graph.layers[call.layer].class_name == "Dense"]) == 2
    assert [place for place in weight_paths(nested).values() if place.endswith("dense")] == [
        "layers/functional/layers/dense"
    ]


@pytest.mark.parametrize("given", [False, True])
def test_training_given_to_a_model_reaches_its_layers(given: bool) -> None:
    innermost = model_of(
        "innermost",
        [dense("free", inbound_nodes=[taking("in")]), dense("own", inbound_nodes=[taking("free", training=not given)])],
        ["own", 0, 0],
        inbound_nodes=[taking("in")],
    )
    inner = model_of("inner", [innermost], ["innermost", 0, 0], inbound_nodes=[taking("in", training=given)])
    graph = flat(model_of("outer", [inner, dense("after", inbound_nodes=[taking("inner")])], ["after", 0, 0]))
    flags = {graph.layers[call.layer].name: call.arguments["kwargs"].get("training") for call in graph.calls[1:]}
    assert flags == {"free": given, "own": not given, "after": None}


def test_names_that_meet_are_told_apart() -> None:
    def inner(name: str, source: str) -> dict[str, Any]:
        return model_of(name, [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0], inbound_nodes=[taking(source)])

    layers = [inner("one", "in"), inner("two", "one"), dense("x", inbound_nodes=[taking("two")]),
              dense("one_x", inbound_nodes=[taking("x")])]  # fmt: skip
    graph = flat(model_of("outer", layers, ["one_x", 0, 0]))
    assert chain(graph) == ["in", "one_x_1", "two_x", "x", "one_x"]


def test_a_model_that_hands_its_input_through() -> None:
    inner = model_of("inner", [], ["in", 0, 0], inbound_nodes=[taking("in")])
    graph = flat(model_of("outer", [inner, dense("x", inbound_nodes=[taking("inner")])], ["x", 0, 0]))
    assert chain(graph) == ["in", "x"]


def test_dissolving_changes_nothing_it_was_given() -> None:
    inner = model_of(
        "inner", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0], inbound_nodes=[taking("in", training=False)]
    )
    model = model_of("outer", [inner], ["inner", 0, 0])
    before = json.dumps(model)
    nested = read_model(model, Dialect.KERAS3)
    assert dissolve(nested).graph == dissolve(nested).graph
    assert json.dumps(model) == before


def test_wrong_number_of_inputs_to_a_nested_model() -> None:
    inner = model_of(
        "inner", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0], inbound_nodes=[taking("in", "in")]
    )
    with pytest.raises(GraphError, match="nested model 'inner' has 1 inputs and is called with 2"):
        flat(model_of("outer", [inner], ["inner", 0, 0]))


# ---- hostile


def doubling(depth: int) -> dict[str, Any]:
    """Each level calls the next one twice: 2 ** depth calls of one layer."""
    model = model_of("m", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0])
    for level in range(depth):
        inner = {**model, "name": f"m{level}", "inbound_nodes": [taking("in"), taking(f"m{level}", node=1)]}
        model = model_of("m", [inner], [f"m{level}", 2, 0])
    return model


def test_exponential_nesting_is_refused_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_CALLS", 5000)  # what it takes grows with this number and with nothing else
    with pytest.raises(UnsafeFileError, match="more than 5000"):
        flat(doubling(38))
    assert len(flat(doubling(5)).calls) == 33


def test_exponential_nesting_without_any_layer_is_refused_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty models make no calls, but visiting them takes as long."""
    monkeypatch.setattr(reading, "MAX_CALLS", 5000)
    model = model_of("m", [], ["in", 0, 0])
    for level in range(14):
        inner = {**model, "name": f"m{level}", "inbound_nodes": [taking("in"), taking(f"m{level}", node=1)]}
        model = model_of("m", [inner], [f"m{level}", 2, 0])
    nested = read_model(model, Dialect.KERAS3)
    with pytest.raises(UnsafeFileError, match="more than"):
        dissolve(nested)


def test_deep_nesting_is_refused() -> None:
    model: dict[str, Any] = model_of("m", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0])
    for level in range(reading.MAX_DEPTH + 1):
        model = model_of("m", [{**model, "name": f"m{level}", "inbound_nodes": [taking("in")]}], [f"m{level}", 0, 0])
    with pytest.raises(UnsafeFileError, match="nested more than 40 deep"):
        read_model(model, Dialect.KERAS3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_layers": ["x", 7, 0]}, "call 7 of layer 'x'"),
        ({"output_layers": ["nobody", 0, 0]}, "a layer 'nobody' that it does not have"),
        ({"output_layers": []}, "no outputs"),
        ({"output_layers": ["x", "0", 0]}, r"expected \[layer, call, tensor\]"),
        ({"input_layers": ["x", 0, 0]}, "'x' as input, which is no input layer"),
        ({"layers": ["text"]}, "without a class name"),
        ({"layers": [{"class_name": "Dense"}]}, "without a configuration"),
        ({"layers": [dense("x", inbound_nodes=[]), dense("x", inbound_nodes=[])]}, "two layers named 'x'"),
        ({"layers": [dense("x", inbound_nodes={"a": 1})]}, "calls that are not a list"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    model = model_of("m", [dense("x", inbound_nodes=[taking("in")])], ["x", 0, 0])
    model["config"].update(change)
    with pytest.raises(GraphError, match=message):
        flat(model)
