"""Alignment by weights: a permuted twin is found again exactly, and merging it gives the original function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from test_fixtures import FAMILIES
from test_spaces import NAMES, built, largest_difference, saved, shuffled

from kmerge.align import Alignment, PermutedTensor, align_by_weights, permuted
from kmerge.align.permute import Step, reordered
from kmerge.assembly import assemble
from kmerge.engine import merge_tensors
from kmerge.errors import MergeError
from kmerge.layout import head_layers, lay_out, source_graph
from kmerge.planning import make_plan
from kmerge.rules import Rules
from kmerge.source import Source, open_source
from kmerge.spaces import derive_spaces, layout_spaces
from kmerge.store import Kind, create_archive, create_hdf5
from kmerge.surgery import merge_graphs


def with_weights(source: Source) -> list[int]:
    return [number for number, state in enumerate(source.states) if state.weights]


def twin_of(source: Source, label: str, seed: int = 1) -> Source:
    """The same network with the units of every free space in a random order."""
    return replace(permuted(source, shuffled(source, derive_spaces(source), seed)), label=label)


def aligned(sources: list[Source], shared: list[int], seed: int = 0) -> list[Source]:
    layout = lay_out(sources)
    share = [1 / len(sources)] * len(sources)
    alignment = align_by_weights(layout, layout_spaces(layout, shared), shared, share, seed)
    return [permuted(source, alignment) for source in sources]


def distance(first: Source, second: Source) -> float:
    """The largest difference between weights of two sources of one network."""
    largest = 0.0
    for one, two in zip(first.states, second.states, strict=True):
        for mine, theirs in zip(one.weights, two.weights, strict=True):
            if mine.tensor.dtype.startswith(("float", "bfloat")) and mine.tensor.size:
                values = [weight.tensor.read().astype("float64") for weight in (mine, theirs)]
                largest = max(largest, float(np.max(np.abs(values[0] - values[1]))))
    return largest


# ---- twins


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_of_the_zoo_is_found_again(name: str) -> None:
    case = zoo.CASES[name]
    with saved(case.build(1), suffix=case.formats[0]) as source:
        if all(space.fixed or space.size == 1 for space in derive_spaces(source)):
            return
        twin = twin_of(source, "b")
        assert distance(source, twin) > 1e-3
        first, second = aligned([source, twin], with_weights(source))
        assert distance(source, first) == 0
        assert distance(source, second) < 1e-6


@contextmanager
def fixture_source(folder: Path, name: str, label: str) -> Iterator[Source]:
    with open_source(folder / name, label) as source:
        yield source


def merge(sources: list[Source], target: Path, **rules: Any) -> Path:
    """The mean of sources in a file, as `combine` writes it."""
    plan = make_plan(sources, Rules(method="mean", **rules))
    merged = merge_graphs(lay_out(sources), plan)
    assembly = assemble(merged, sources)
    if assembly.kind is Kind.KERAS:
        metadata = {"keras_version": assembly.version, "date_saved": ""}
        output = create_archive(target, metadata=metadata, config=assembly.config or {}, layout=assembly.layout)
    else:
        output = create_hdf5(target, assembly.layout)
    with output as file:
        merge_tensors(sources, assembly.targets, file, plan.weights)
    return target


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_with_aligned_twins_is_the_original(
    family: str, suffix: str, fixtures_dir: Path, load_task: Any, tmp_path: Path
) -> None:
    """With private heads, which read the trunk's units; surgery, assembly and engine know nothing of it."""
    inputs = load_task(f"{family}_a")[0][:20]
    path = fixtures_dir / f"{family}_a{suffix}"
    with open_source(path, "a") as source:
        shared = [layer for layer in with_weights(source) if layer not in head_layers(source)]
        twins = aligned([source, twin_of(source, "b", 1), twin_of(source, "c", 2)], shared)
        for twin in twins:
            assert distance(source, twin) < 1e-6
        wrong = merge([source, twin_of(source, "b", 1)], tmp_path / f"wrong{suffix}")
        right = merge(twins, tmp_path / f"right{suffix}")
    expected = zoo.predictions(zoo.load(path), inputs)
    for outputs in (zoo.predictions(zoo.load(right), inputs), zoo.predictions(zoo.load(wrong), inputs)[:1]):
        same = max(largest_difference([output], expected) for output in outputs) < 1e-5
        assert same is (len(outputs) == 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_unrelated_sources_come_nearer(family: str, fixtures_dir: Path) -> None:
    with (
        open_source(fixtures_dir / f"{family}_a.h5", "a") as one,
        open_source(fixtures_dir / f"{family}_b.h5", "b") as two,
        open_source(fixtures_dir / f"{family}_c.h5", "c") as three,
    ):
        shared = [layer for layer in with_weights(one) if layer not in head_layers(one)]
        sources = [one, two, three]
        before, after = _spread(sources, shared), _spread(aligned(sources, shared), shared)
        again = aligned(sources, shared)
        assert after < before or family == "finetuned"
        assert _spread(again, shared) == after


def test_one_source_may_carry_all_the_weight(fixtures_dir: Path) -> None:
    with (
        open_source(fixtures_dir / "mlp_a.h5", "a") as one,
        open_source(fixtures_dir / "mlp_b.h5", "b") as two,
        open_source(fixtures_dir / "mlp_c.h5", "c") as three,
    ):
        layout = lay_out([one, two, three])
        found = align_by_weights(layout, layout_spaces(layout, [1, 2]), [1, 2], [0, 1, 0], 3)
        for row in found.permutations:
            for order in row:
                np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))


def _spread(sources: list[Source], shared: list[int]) -> float:
    """Sum of squared distances of the shared weights to their means; statistics do not count."""
    layout = lay_out(sources)
    total = 0.0
    for layer in shared:
        for number, weight in enumerate(layout.first.states[layer].weights):
            if weight.kind == "weight":
                stack = np.stack(
                    [
                        source.states[found.layers[layer]].weights[number].tensor.read().astype("float64")
                        for source, found in zip(sources, layout.matches, strict=True)
                    ]
                )
                total += float(np.sum((stack - stack.mean(axis=0)) ** 2))
    return total


def test_related_sources_stay_as_they_are(fixtures_dir: Path) -> None:
    with (
        open_source(fixtures_dir / "finetuned_a.h5", "a") as one,
        open_source(fixtures_dir / "finetuned_b.h5", "b") as two,
    ):
        shared = [layer for layer in with_weights(one) if layer not in head_layers(one)]
        layout = lay_out([one, two])
        found = align_by_weights(layout, layout_spaces(layout, shared), shared, [0.5, 0.5])
        units = sum(space.size for space in found.spaces if not space.fixed)
        assert found.moved < 0.2 * units


# ---- what counts


def test_only_shared_layers_count_and_private_ones_follow() -> None:
    """The heads are unlike, so that matching by them would go wrong; yet they read what was permuted."""

    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(3)(b.Dense(6, activation="relu")(x))

    one, two = zoo.TopologyCase("one", zoo.F(4), recipe), zoo.TopologyCase("two", zoo.F(4), recipe)
    first, second = one.build(1), two.build(2)
    order = np.array([3, 1, 5, 0, 2, 4])
    kernel, bias = (np.asarray(value) for value in first.layers[1].get_weights())
    second.layers[1].set_weights([kernel[:, order], bias[order]])
    with saved(first, "a") as a, saved(second, "b") as b:
        back = aligned([a, b], [1])[1]
        np.testing.assert_array_equal(back.states[1].weights[0].tensor.read(), kernel)
        head = np.asarray(second.layers[2].get_weights()[0])
        np.testing.assert_array_equal(back.states[2].weights[0].tensor.read(), head[np.argsort(order)])
        assert back.states[2].weights[1] is b.states[2].weights[1]


def test_statistics_do_not_count_but_follow() -> None:
    model = built(lambda b, x: b.head(b.BatchNormalization()(b.Dense(5)(x))), zoo.F(4))
    with saved(model) as source:
        twin = twin_of(source, "b")
        mean = next(w for w in twin.states[2].weights if w.name == "moving_mean")
        noise = replace(mean, tensor=_constant(mean.tensor, np.arange(5, dtype="float32")))
        weights = tuple(noise if w is mean else w for w in twin.states[2].weights)
        states = tuple(replace(s, weights=weights) if n == 2 else s for n, s in enumerate(twin.states))
        back = aligned([source, replace(twin, states=states)], with_weights(source))[1]
        for mine, theirs in zip(source.states[2].weights, back.states[2].weights, strict=True):
            equal = np.array_equal(mine.tensor.read(), theirs.tensor.read())
            assert equal is (mine.name != "moving_mean")


def _constant(tensor: Any, values: np.ndarray) -> Any:
    facts = (tensor.shape, tensor.dtype, tensor.size, tensor.nbytes, tensor.where)
    return PermutedTensor(*facts, lambda: values, original=tensor)


def test_weights_that_are_not_finite_are_named() -> None:
    model = built(lambda b, x: b.head(b.Dense(5, name="bad")(x)), zoo.F(4))
    model.layers[1].bias.assign([0, np.nan, 0, 0, 0])
    with saved(model, "a") as one, saved(model, "b") as two, pytest.raises(MergeError, match=r"'bad': bias of 'a'"):
        aligned([one, two], [1])


# ---- permuted tensors


def test_a_permuted_tensor_reads_like_any_other() -> None:
    with saved(built(lambda b, x: b.head(b.Dense(5)(x)), zoo.F(4))) as source:
        spaces = derive_spaces(source)
        orders = tuple(np.array([4, 2, 0, 1, 3]) if space.size == 5 else np.arange(space.size) for space in spaces)
        twin = permuted(source, Alignment(("a",), spaces, (orders,)))
        old, new = (one.states[1].weights[0].tensor for one in (source, twin))
        assert isinstance(new, PermutedTensor)
        expected = old.read()[:, orders[1]]
        np.testing.assert_array_equal(new.read(), expected)
        assert new.memory.values is None
        parts = [np.empty(count, "float32") for count in (7, 13)]
        new.read_into(7, parts[1])
        assert new.memory.values is not None
        new.read_into(0, parts[0])
        assert new.memory.values is None
        np.testing.assert_array_equal(np.concatenate(parts), expected.ravel())
        assert (new.shape, new.dtype, new.size, new.nbytes, new.where) == (
            old.shape, old.dtype, old.size, old.nbytes, old.where,
        )  # fmt: skip
        assert twin.states[2].weights[1] is source.states[2].weights[1]
        assert source_graph(twin) is source_graph(source)


def test_whole_axes_come_before_parts() -> None:
    array = np.arange(6).reshape(2, 3)
    swap = Step(0, (), np.array([1, 0]))
    turn = Step(1, ((0, 0, 1),), np.array([2, 0, 1]))
    np.testing.assert_array_equal(reordered(array, [swap, turn]), [[5, 3, 4], [0, 1, 2]])
    np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
