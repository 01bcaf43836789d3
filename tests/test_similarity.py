"""Who is related: the cosine, the sample that it is taken of, and what fixtures and real sets show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmerge.dialects.vocabulary import WeightKind
from kmerge.layout import head_layers, lay_out
from kmerge.similarity import (
    RELATED,
    LayerCosine,
    ancestry,
    cosine,
    flat_cosines,
    layer_cosines,
    sample,
)
from kmerge.source import Source, State, Weight, open_source
from kmerge.store import Kind, numpy_dtype

LARGE = 3_000_017
UNRELATED = ("mlp", "cnn", "lstm")


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor as the store hands it out, but of an array."""

    array: np.ndarray
    reads: list[tuple[int, int]]

    dtype = property(lambda self: self.array.dtype.name)
    shape = property(lambda self: self.array.shape)
    size = property(lambda self: self.array.size)
    nbytes = property(lambda self: self.array.nbytes)

    def read_into(self, start: int, out: np.ndarray) -> None:
        assert 0 <= start <= start + out.size <= self.size
        assert out.dtype == numpy_dtype(self.dtype)
        self.reads.append((start, out.size))
        out[:] = self.array.reshape(-1)[start : start + out.size]


def weight(array: np.ndarray, key: str = "vars/0", kind: WeightKind = WeightKind.WEIGHT) -> Weight:
    tensor: Any = InMemory(array, [])
    return Weight(key, "kernel", kind, tensor)


# ---- cosine


def test_cosine() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 10_000))
    assert cosine(first, first) == pytest.approx(1)
    assert cosine(first, -first) == pytest.approx(-1)
    assert cosine(first, 1e-3 * first) == pytest.approx(1)
    assert abs(cosine(first, second)) < 0.05
    assert cosine(first, second) == cosine(second, first)
    assert cosine(first, first + second) == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert cosine(np.array([1.0, 0]), np.array([0.0, 2])) == 0


@pytest.mark.parametrize("bad", [0, np.nan, np.inf, 1e200])
def test_cosine_with_nothing_to_compare(bad: float) -> None:
    assert math.isnan(cosine(np.array([1.0, 2]), np.array([bad, 0])))
    assert math.isnan(cosine(np.zeros(0), np.zeros(0)))


# ---- sample


@pytest.mark.parametrize("shape", [(), (0,), (5,), (300, 400)])
def test_a_small_weight_is_looked_at_whole(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype("f4")
    values = sample(weight(array))
    assert values.dtype == np.float64
    assert np.array_equal(values, array.ravel())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_number_types(dtype: str) -> None:
    array = np.arange(6).astype(numpy_dtype(dtype))
    assert sample(weight(array)).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_sample_of_a_large_weight_is_the_same_every_time() -> None:
    array = np.random.default_rng(0).standard_normal(LARGE).astype("f4")
    values = sample(weight(array))
    assert values.size <= 1 << 17
    assert np.array_equal(values, sample(weight(array.copy())))
    assert np.array_equal(values, sample(weight(array.reshape(1, -1))))


def test_a_sample_covers_both_ends_and_no_entry_twice() -> None:
    own = weight(np.zeros(LARGE, "f4"))
    sample(own)
    reads = sorted(own.tensor.reads)  # type: ignore[attr-defined]
    assert reads[0][0] == 0
    assert sum(reads[-1]) == LARGE
    assert all(start + size <= following for (start, size), (following, _) in pairwise(reads))


@pytest.mark.parametrize("entries", [1, 100, 1 << 14, (1 << 14) + 1, 1 << 15])
def test_smaller_samples(entries: int) -> None:
    values = sample(weight(np.arange(40_000, dtype="f8")), entries)
    assert 0 < values.size <= entries
    assert len(set(values)) == values.size


def mixed(noise: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.standard_normal(LARGE)
    return first, first + noise * rng.standard_normal(LARGE)


@pytest.mark.parametrize(
    "noise",
    [0.2, 1.0, 5.0, 1e6, np.linspace(0, 3, LARGE), np.repeat(np.linspace(3, 0, 1000), LARGE // 1000 + 1)[:LARGE]],
    ids=["near", "half", "far", "unrelated", "fading", "by_rows"],
)
def test_the_sample_tells_what_the_whole_tells(noise: np.ndarray | float) -> None:
    first, second = mixed(noise)
    drawn = cosine(sample(weight(first)), sample(weight(second)))
    assert drawn == pytest.approx(cosine(first, second), abs=0.02)


# ---- ancestry


def test_ancestry_weighs_kernels_by_their_entries() -> None:
    kernels = [LayerCosine(0, 1.0, 1.0, 100, True), LayerCosine(1, 0.2, 0.5, 300, True)]
    found = ancestry(
        [*kernels, LayerCosine(2, -1.0, -1.0, 10**6, False), LayerCosine(3, math.nan, math.nan, 10**6, True)]
    )
    assert found.cosine == pytest.approx(0.4)
    assert found.related is (found.cosine >= RELATED)


def test_ancestry_with_nothing_to_tell_it_by() -> None:
    for cosines in ([], [LayerCosine(0, 0.9, 0.9, 10, False)], [LayerCosine(0, math.nan, math.nan, 10, True)]):
        found = ancestry(cosines)
        assert found.related is None
        assert math.isnan(found.cosine)


def trunk_cosines(paths: Sequence[Path]) -> list[LayerCosine]:
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(path)) for path in paths]
        layout = lay_out(opened)
        heads = head_layers(opened[0])
        return layer_cosines(
            layout, [n for n, state in enumerate(layout.first.states) if state.weights and n not in heads]
        )


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("family", UNRELATED)
def test_fixtures_trained_apart_are_unrelated(family: str, suffix: str, fixtures_dir: Path) -> None:
    for labels in (*combinations("abc", 2), "abc"):
        found = ancestry(trunk_cosines([fixtures_dir / f"{family}_{label}{suffix}" for label in labels]))
        assert found.related is False
        assert abs(found.cosine) < RELATED / 2, "far from the threshold"


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_fixtures_with_an_ancestor_are_related(suffix: str, fixtures_dir: Path) -> None:
    for labels in (*combinations("abc", 2), "abc"):
        found = ancestry(trunk_cosines([fixtures_dir / f"finetuned_{label}{suffix}" for label in labels]))
        assert found.related is True
        assert found.cosine > 2 * RELATED, "far from the threshold"


def test_one_stranger_among_relatives_is_noticed(fixtures_dir: Path, tmp_path: Path) -> None:
    import shutil

    import h5py

    stranger = Path(shutil.copy(fixtures_dir / "finetuned_c.h5", tmp_path / "c.h5"))
    with h5py.File(stranger, "r+") as file:
        rng = np.random.default_rng(0)

        def shuffle(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim > 1:
                item[...] = rng.permutation(item[()].ravel()).reshape(item.shape)

        file["model_weights"].visititems(shuffle)
    found = ancestry(trunk_cosines([fixtures_dir / "finetuned_a.h5", fixtures_dir / "finetuned_b.h5", stranger]))
    assert found.related is False


def test_statistics_and_scales_do_not_make_strangers_related(fixtures_dir: Path) -> None:
    cosines = trunk_cosines([fixtures_dir / f"cnn_{label}.h5" for label in "abc"])
    scales = [item for item in cosines if not item.kernels]
    assert min(item.lowest for item in scales) > RELATED, "they start equal in every network, so they tell nothing"
    assert all(item.entries == size for item, size in zip(scales, (16, 24), strict=True)), "gamma and beta only"


def test_cosines_of_three_sources_by_hand(fixtures_dir: Path) -> None:
    paths = [fixtures_dir / f"finetuned_{label}.h5" for label in "abc"]
    with ExitStack() as stack:
        opened = [stack.enter_context(open_source(path)) for path in paths]
        kernels = [source.states[1].weights[0].tensor.read().ravel().astype("f8") for source in opened]
        (found,) = layer_cosines(lay_out(opened), [1])
    pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(kernels, 2)]
    assert found.lowest == pytest.approx(min(pairs))
    assert found.mean == pytest.approx(np.mean(pairs))
    assert (found.layer, found.entries, found.kernels) == (1, 64 * 24, True)


def test_files_without_a_graph_are_compared_weight_by_weight() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 50))

    def source(label: str, kernel: np.ndarray) -> Source:
        weights = (
            weight(kernel, "dense/kernel"),
            weight(rng.standard_normal(50), "dense/bias"),
            weight(rng.standard_normal((4, 4)), "norm/mean", WeightKind.MEAN),
        )
        return Source(label, label, None, Kind.WEIGHTS, 0, states=(State(weights),))

    related = [source(label, base + 0.1 * rng.standard_normal(base.shape)) for label in "abc"]
    assert len(flat_cosines(related)) == 1
    assert ancestry(flat_cosines(related)).related is True
    strangers = [source(label, rng.standard_normal(base.shape)) for label in "abc"]
    assert ancestry(flat_cosines(strangers)).related is False
    assert ancestry(flat_cosines([related[0], source("zero", np.zeros_like(base))])).related is None


@pytest.mark.real
@pytest.mark.parametrize("name", ["dcase2022_ae", "deepmrg", "onsd", "rg4detector", "stock_vincentlee"])
def test_real_sets_are_unrelated(name: str, shared: Path) -> None:
    paths = sorted(path for path in (shared / "models" / name).iterdir() if path.suffix in (".h5", ".hdf5", ".keras"))
    assert len(paths) >= 3
    found = ancestry(trunk_cosines(paths))
    assert found.related is False
    assert abs(found.cosine) < RELATED / 4
