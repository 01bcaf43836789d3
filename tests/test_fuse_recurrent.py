"""Recurrent layers in function space: gates as Keras has them, and what a merged layer remembers."""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmerge import merge_models
from kmerge.calibration.network import Network, open_network, to_numpy
from kmerge.calibration.slopes import slopes
from kmerge.errors import MergeError
from kmerge.fuse.cells import Cell
from kmerge.fuse.recurrent import Part, Sequences
from kmerge.fuse.selection import greedy
from kmerge.graph import Ref
from kmerge.layout import lay_out
from kmerge.planning import make_plan
from kmerge.rules import Rules
from kmerge.source import open_source
from kmerge.surgery import merge_graphs

keras = pytest.importorskip("keras")
layers = keras.layers

CELLS = {
    "simple": lambda **more: layers.SimpleRNN(4, bias_initializer="normal", **more),
    "simple without bias": lambda **more: layers.SimpleRNN(4, activation="relu", use_bias=False, **more),
    "lstm": lambda **more: layers.LSTM(4, bias_initializer="normal", **more),
    "lstm of other functions": lambda **more: layers.LSTM(
        4, activation="softsign", recurrent_activation="hard_sigmoid", **more
    ),
    "gru": lambda **more: layers.GRU(4, bias_initializer="normal", **more),
    "gru without bias": lambda **more: layers.GRU(4, use_bias=False, **more),
    "gru as it was": lambda **more: layers.GRU(4, reset_after=False, bias_initializer="normal", **more),
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some inputs are made of those that are given: sequences take long."""
    monkeypatch.setattr("kmerge.fuse.model.ENOUGH", 130)


def numbers(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def part_of(layer: Any) -> tuple[Part, Any]:
    cell = Cell.of(layer.cell)
    assert cell is not None
    weights = [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in layer.weights]
    part = Part(cell, (0, 1, 2 if len(weights) > 2 else None), layer.go_backwards)
    return part, part.weights(lambda place: weights[place])


# ---- running


def test_what_runs_step_by_step_gives_the_same_once_it_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its mask and its gradients, by one graph for batches of any size."""
    stepwise, runs = layers.GRU.call, list[Any]()

    @wraps(stepwise)
    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(inputs)
        return stepwise(self, inputs, *args, **kwargs)

    masked = [layers.Input((6,), dtype="int32"), layers.Embedding(5, 3, mask_zero=True)]
    model = keras.Sequential([*masked, layers.Bidirectional(layers.LSTM(4, return_sequences=True)), layers.GRU(3)])
    model.save(tmp_path / "model.keras")
    monkeypatch.setattr(layers.GRU, "call", call)
    rows = (3, 3, 2, 4, 5, 6, 7, 8)
    tokens = [np.random.default_rng(n).integers(0, 5, (count, 6)).astype(np.int32) for n, count in enumerate(rows)]
    found: dict[int, list[Any]] = {}
    for limit in (0, 1_000):
        monkeypatch.setattr("kmerge.calibration.network._UNCOMPILED", limit)
        with ExitStack() as stack:
            network = opened(tmp_path / "model.keras", tmp_path, stack)
            runs.clear()
            embedded, both, last = (Ref(len(network.merged.graph.calls) - place, 0) for place in (3, 2, 1))
            for number, batch in enumerate(tokens):
                values = network.given([batch])
                network.run(values, [last])
                np.testing.assert_array_equal(to_numpy(values[both]._keras_mask), batch != 0)
                gradients = slopes(network, [batch], [last], [embedded], lambda _, value: np.ones_like(value))
                found.setdefault(number, []).append([to_numpy(values[last]), gradients[embedded]])
            assert len(network._compiled) == (0 if limit else 2)
            assert len(runs) == (2 * len(rows) if limit else 1)
    for number, batch in enumerate(tokens):
        (compiled, inside), (eager, own) = found[number]
        np.testing.assert_allclose(compiled, eager, atol=1e-6)
        np.testing.assert_allclose(compiled, model.predict_on_batch(batch), atol=1e-6)
        np.testing.assert_allclose(inside, own, atol=1e-6)
        assert np.any(inside)


def opened(path: Path, folder: Path, stack: ExitStack) -> Network:
    """A model and itself, merged, live."""
    sources = [stack.enter_context(open_source(path, label)) for label in "ab"]
    merged = merge_graphs(lay_out(sources), make_plan(sources, Rules(trunk="all", method="mean"), "0"))
    return open_network(merged, sources, None, folder, "one")


def test_every_form_of_a_call_runs_step_by_step_and_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unrolled layer of sequences of two lengths, keywords, states to start from; compiled after some batches."""
    monkeypatch.setattr("kmerge.calibration.network._UNCOMPILED", 25)
    short, long = keras.Input((5, 2)), keras.Input((6, 2))
    shared = layers.GRU(3, unroll=True)
    named = layers.LSTM(3, return_state=True)(sequences=short, initial_state=None)
    begun = layers.LSTM(3)(sequences=long, initial_state=named[1:])
    model = keras.Model([short, long], layers.Concatenate()([shared(short), shared(long), named[0], begun]))
    model.save(tmp_path / "model.keras")
    with ExitStack() as stack:
        network = opened(tmp_path / "model.keras", tmp_path, stack)
        last = Ref(len(network.merged.graph.calls) - 1, 0)
        for turn, rows in enumerate((4, 3, 4, 2, 4, 4, 5)):
            batch = [numbers(rows, steps, 2, seed=turn) for steps in (5, 6)]
            values = network.given(batch)
            network.run(values, [last])
            np.testing.assert_allclose(to_numpy(values[last]), model.predict_on_batch(batch), atol=1e-6)
            assert bool(network._compiled) == (turn > 1)
        assert len(network._compiled) == 3


def test_what_a_compiled_layer_cannot_run_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([layers.Input((None, 2)), layers.GRU(3, unroll=True)])
    model.save(tmp_path / "model.keras")
    with ExitStack() as stack:
        network, found = opened(tmp_path / "model.keras", tmp_path, stack), []
        for limit in (1_000, 0):
            monkeypatch.setattr("kmerge.calibration.network._UNCOMPILED", limit)
            with pytest.raises(MergeError, match="Keras cannot run") as caught:
                network.run(network.given([numbers(3, 5, 7)]), [Ref(len(network.merged.graph.calls) - 1, 0)])
            found.append(str(caught.value))
    assert "in user code" not in found[1]
    first, second = (text.partition("\x1b")[0] for text in found)  # Keras's own words follow
    assert first == second
    assert "'gru" in first


# ---- cells


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_cell_does_what_the_layer_of_keras_does(name: str, backwards: bool) -> None:
    keras.utils.set_random_seed(1)
    layer = CELLS[name](return_sequences=True, return_state=True, go_backwards=backwards)
    x, mask = numbers(3, 5, 2), np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=bool)
    states = [numbers(3, 4, seed=seed) for seed in range(2 if "lstm" in name else 1)]
    expected = [np.asarray(value) for value in layer(x, mask=mask, initial_state=states)]
    part, weights = part_of(layer)
    turn = slice(None, None, -1 if backwards else 1)
    trace = part.cell.run(weights, x[:, turn], mask[:, turn], states)
    counts = mask[:, turn]
    assert trace.after[counts] == pytest.approx(expected[0][counts], abs=1e-5)
    assert trace.last == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("name", CELLS)
def test_gates_are_linear_in_what_they_are_said_to_be(name: str) -> None:
    keras.utils.set_random_seed(1)
    layer = CELLS[name]()
    x = numbers(3, 5, 2)
    layer(x)
    part, weights = part_of(layer)
    trace = part.cell.run(weights, x)
    made = np.zeros_like(trace.gates)
    for block in part.cell.blocks(4):
        if block.inputs:
            made[..., block.gates] += x @ weights.kernel[:, block.columns] + weights.bias[block.columns]
        if block.state:
            made[..., block.gates] += getattr(trace, block.state) @ weights.recurrent[:, block.columns]
            made[..., block.gates] += weights.inner[block.columns]
    assert made == pytest.approx(trace.gates, abs=1e-5)


def test_only_picked_steps_are_told_of() -> None:
    layer = layers.LSTM(4)
    x = numbers(3, 5, 2)
    layer(x)
    part, weights = part_of(layer)
    whole, some = (
        Sequences(x, None, ()).run(part.cell, weights, picked) for picked in (None, np.array([[4, 0], [1, 2], [3, 3]]))
    )
    assert np.array_equal(some.after[0], whole.after[0, [4, 0]])
    assert np.array_equal(some.gates[1], whole.gates[1, [1, 2]])
    assert np.array_equal(some.last, whole.after[:, -1])


# ---- selection


def test_of_two_equal_units_one_is_kept() -> None:
    values = numbers(50, 3)
    doubled = np.concatenate([values, values[:, ::-1]], axis=1)
    kept = greedy(np.cov(doubled.T), np.eye(6), 3)
    assert sorted({0: 0, 1: 1, 2: 2, 3: 2, 4: 1, 5: 0}[unit] for unit in kept.tolist()) == [0, 1, 2]


# ---- layers


def sequence_model(middle: list[Any], classes: int = 3) -> Any:
    head = [layers.Dense(6, activation="relu"), layers.Dense(classes, name="head")]
    return keras.Sequential([keras.Input((6, 3)), *middle, *head])


MODELS = {
    "stacked": lambda: [
        layers.LSTM(5, return_sequences=True, bias_initializer="normal"),
        layers.GRU(4, reset_after=False, go_backwards=True),
    ],
    "masked, both ways": lambda: [
        layers.Masking(),
        layers.Bidirectional(layers.GRU(4, return_sequences=True, bias_initializer="normal")),
        layers.RNN(layers.LSTMCell(4)),
    ],
    "both ways, summed": lambda: [
        layers.Bidirectional(
            layers.SimpleRNN(4, return_sequences=True),
            backward_layer=layers.SimpleRNN(4, return_sequences=True, go_backwards=True),
            merge_mode="sum",
        ),
        layers.GlobalAveragePooling1D(),
    ],
}


def made(name: str, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return sequence_model(MODELS[name]())


def masked(count: int) -> np.ndarray[Any, Any]:
    """Sequences that end at different steps."""
    x = numbers(count, 6, 3)
    for row, length in enumerate(np.random.default_rng(1).integers(2, 7, count)):
        x[row, length:] = 0
    return x


def twin(model: Any) -> Any:
    """The same function with the units of each recurrent layer in another order."""
    found = keras.models.clone_model(model)
    order: Any = slice(None)
    for old, new in zip(model.layers, found.layers, strict=True):
        kernel, *rest = old.get_weights()
        kernel = kernel[order]
        order = slice(None)
        if len(rest) > 1:
            units = len(rest[0])
            order = np.random.default_rng(2).permutation(units)
            columns = np.concatenate([order + start for start in range(0, kernel.shape[1], units)])
            kernel, rest = kernel[:, columns], [rest[0][order][:, columns], rest[1][..., columns]]
        new.set_weights([kernel, *rest])
    return found


def fused(models: list[Any], x: np.ndarray[Any, Any], folder: Path, **more: Any) -> list[np.ndarray[Any, Any]]:
    """What each head of the merged model gives."""
    paths = {}
    for label, model in zip("abc", models, strict=False):
        paths[label] = folder / f"{label}.keras"
        model.save(paths[label])
    given = {"method": "fuse", "data": x, "samples": len(x), **more}
    merged = merge_models(paths, **(given if given["method"] == "fuse" else {"method": given["method"]}))
    outputs = merged(x)
    return [np.asarray(outputs[label]) for label in paths]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_twin_give_the_original_function(name: str, tmp_path: Path) -> None:
    model, x = made(name, 1), masked(120)
    other = twin(model) if name == "stacked" else keras.models.clone_model(model)
    if name != "stacked":
        other.set_weights(model.get_weights())
    expected = np.asarray(model(x))
    assert np.asarray(other(x)) == pytest.approx(expected, abs=1e-5)
    for output in fused([model, other], x, tmp_path):
        assert output == pytest.approx(expected, abs=1e-4)


def test_unlike_models_agree_better_than_with_their_mean(tmp_path: Path) -> None:
    models, x = [made("stacked", seed) for seed in (1, 2)], numbers(120, 6, 3)
    expected = [np.asarray(model(x)) for model in models]

    def error(outputs: list[np.ndarray[Any, Any]]) -> float:
        assert all(np.isfinite(output).all() for output in outputs)
        return float(np.mean([np.mean((one - two) ** 2) for one, two in zip(outputs, expected, strict=True)]))

    assert error(fused(models, x, tmp_path)) < 0.5 * error(fused(models, x, tmp_path, method="mean"))


def test_a_private_layer_learns_to_read_merged_states(tmp_path: Path) -> None:
    """Each source's own GRU is fitted to what the merged LSTM gives."""
    models, x = [made("stacked", seed) for seed in (1, 2)], numbers(120, 6, 3)
    names = [layer.name for layer in models[0].layers[1:]]
    outputs = fused(models, x, tmp_path, private=names)
    for output, model in zip(outputs, models, strict=True):
        expected = np.asarray(model(x))
        assert np.mean((output - expected) ** 2) < 0.5 * expected.var()


def test_a_wider_trunk_before_recurrent_layers_runs() -> None:
    """What was built inside a wrapper is built again for the wider layer before it."""
    models = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        stack = [layers.Input((5, 3)), layers.Dense(4), layers.Bidirectional(layers.LSTM(3)), layers.Dense(2)]
        models.append(keras.Sequential(stack))
    merged = merge_models(models, method="fuse", data=numbers(40, 5, 3), width=1.5)
    assert merged.layers[1].units > 4
    assert merged.predict_on_batch(numbers(2, 5, 3))[merged.output_names[0]].shape == (2, 2)
