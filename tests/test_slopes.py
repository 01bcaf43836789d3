"""Gradients in the middle of a network, against numbers worked out by hand."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import keras
import numpy as np
from keras import layers

from kmerge.calibration.network import Network, Tape, open_network, to_numpy
from kmerge.calibration.slopes import slopes
from kmerge.graph import Ref
from kmerge.layout import lay_out
from kmerge.planning import make_plan
from kmerge.rules import Rules
from kmerge.source import open_source
from kmerge.surgery import merge_graphs


def side_by_side(folder: Path, stack: ExitStack) -> tuple[Network, list[keras.Model]]:
    """Two networks of a frozen hidden layer and a head, on one input."""
    models = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        hidden = layers.Dense(5, activation="relu", trainable=False)
        model = keras.Sequential([layers.Input((4,)), hidden, layers.Dense(3, activation="softmax")])
        model.save(folder / f"{seed}.keras")
        models.append(model)
    sources = [stack.enter_context(open_source(folder / f"{seed}.keras", "ab"[seed])) for seed in range(2)]
    merged = merge_graphs(lay_out(sources), make_plan(sources, Rules(trunk="none", method="mean"), "0"))
    return open_network(merged, sources, None, folder, "both"), models


def test_gradients_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    with ExitStack() as stack:
        network, models = side_by_side(tmp_path, stack)
        graph = network.merged.graph
        dense = [n for n, call in enumerate(graph.calls) if graph.layers[call.layer].class_name == "Dense"]
        number = {graph.calls[call].layer: call for call in dense}
        of = {
            source: [
                number[n] for n, one in enumerate(network.merged.layers) if one.members[0][0] == source and n in number
            ]
            for source in range(2)
        }
        x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
        weights = {Ref(of[s][1], -1): np.random.default_rng(1 + s).standard_normal((7, 3)) for s in range(2)}
        inside = [Ref(of[s][0], output) for s in range(2) for output in (-1, 0)]
        found = slopes(network, [x], list(weights), inside, lambda ref, _: weights[ref])
        for source, model in enumerate(models):
            kernel, bias = (to_numpy(value) for value in model.layers[0].weights)
            behind = weights[Ref(of[source][1], -1)] @ to_numpy(model.layers[1].kernel).T
            np.testing.assert_allclose(found[Ref(of[source][0], 0)], behind, atol=1e-5)
            open_ = x @ kernel + bias > 0
            np.testing.assert_allclose(found[Ref(of[source][0], -1)], behind * open_, atol=1e-5)


def test_what_the_outputs_do_not_depend_on_has_no_gradient(tmp_path: Path) -> None:
    with ExitStack() as stack:
        network, _ = side_by_side(tmp_path, stack)
        graph = network.merged.graph
        first, second = (
            [
                Ref(n, 0)
                for n, call in enumerate(graph.calls)
                if network.merged.layers[call.layer].members[0][0] == source
            ]
            for source in range(2)
        )
        x = np.ones((2, 4), np.float32)
        found = slopes(
            network, [x], [first[-1]], [first[-2], second[-1]], lambda _, v: np.arange(v.size).reshape(v.shape)
        )
        assert np.any(found.pop(first[-2]))
        assert not any(np.any(gradient) for gradient in found.values())


def test_a_tape_keeps_what_has_room_and_gives_the_same_whatever_it_keeps(tmp_path: Path) -> None:
    """Hidden layers have 5 units and heads 3, of 2 networks and 4 rows: 160 and 96 bytes for each of 3 batches."""
    with ExitStack() as stack:
        network, _ = side_by_side(tmp_path, stack)
        graph = network.merged.graph
        dense = [n for n, call in enumerate(graph.calls) if graph.layers[call.layer].class_name == "Dense"]
        wanted = [network.target(call) for call in dense]
        batches = [(np.random.default_rng(n).standard_normal((4, 4)).astype(np.float32),) for n in range(3)]
        expected = None
        for budget, kept in ((0, 0), (3 * 48, 1), (3 * 96, 2), (3 * 96 + 3 * 80, 3), (10_000, 4)):
            tape = Tape(network, batches, budget)
            first = [[to_numpy(values[ref]) for ref in wanted] for values in tape.passes(wanted, wanted)]
            assert [len(values) for values in tape._kept] == [kept] * 3
            assert sum(to_numpy(value).nbytes for values in tape._kept for value in values.values()) <= budget
            again = [[to_numpy(values[ref]) for ref in wanted] for values in tape.passes(wanted, ())]
            assert not any(tape._kept)
            expected = expected or first
            for one, two, three in zip(first, again, expected, strict=True):
                for a, b, c in zip(one, two, three, strict=True):
                    np.testing.assert_array_equal(a, b)
                    np.testing.assert_array_equal(a, c)
