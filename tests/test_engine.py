"""The engine, on tensors in memory and on real files."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kmerge import engine
from kmerge.dialects.vocabulary import WeightKind
from kmerge.engine import LEAF, Target, merge_tensors
from kmerge.errors import MergeError
from kmerge.methods import mean, median, pooled_mean, pooled_variance
from kmerge.progress import silent
from kmerge.source import Source, State, Weight, open_source
from kmerge.store import Kind, Layout, TensorSpec, create_hdf5, numpy_dtype

SIZES = (0, 1, LEAF - 1, LEAF, LEAF + 1, 4 * LEAF - 1, 4 * LEAF, 4 * LEAF + 1, 9 * LEAF + 5)


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor as the store hands it out, but of an array."""

    array: np.ndarray
    dtype: str
    reads: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read_into(self, start: int, out: np.ndarray) -> None:
        assert out.dtype == numpy_dtype(self.dtype)
        assert out.flags.c_contiguous
        self.reads.append(start)
        out[:] = self.array.reshape(-1)[start : start + out.size]


@dataclass(frozen=True, eq=False)
class Endless:
    """A large tensor that takes no memory; `fails` raises at its first entry."""

    size: int
    reads: list[int] = field(default_factory=list)
    fails: BaseException | None = None
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    def read_into(self, start: int, out: np.ndarray) -> None:
        self.reads.append(start)
        if self.fails and start == 0:
            raise self.fails
        out[:] = 1


class Collected:
    """An output in memory that knows how often each entry was written."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.times: dict[str, np.ndarray] = {}
        for target in targets:
            tensor = target.weight.tensor
            self.arrays[target.key] = np.zeros(tensor.size, numpy_dtype(tensor.dtype))
            self.times[target.key] = np.zeros(tensor.size, "u1")

    def write(self, key: str, start: int, array: np.ndarray) -> None:
        assert array.dtype == self.arrays[key].dtype
        self.arrays[key][start : start + array.size] = array
        self.times[key][start : start + array.size] += 1


class Forgotten:
    """An output that keeps nothing."""

    def write(self, key: str, start: int, array: np.ndarray) -> None:
        pass


def weight(array: Any, key: str = "vars/0", name: str = "kernel", kind: WeightKind = WeightKind.WEIGHT) -> Weight:
    array = np.asarray(array)
    return Weight(key, name, kind, InMemory(array, array.dtype.name))  # type: ignore[arg-type]


def source(label: str, *layers: Sequence[Weight], model: Any = None) -> Source:
    """A source whose layers hold the given weights."""
    states = tuple(State(tuple(weights)) for weights in layers)
    return Source(
        label, f"{label}.keras", None, Kind.KERAS, 0, model=model or {"class_name": "Sequential"}, states=states
    )


def random_source(label: str, seed: int, sizes: Sequence[int] = (3, 4), dtype: str = "float32") -> Source:
    """One layer with a weight of each size."""
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal(size).astype(dtype) for size in sizes]
    return source(label, [weight(array, f"vars/{number}") for number, array in enumerate(drawn)])


def shared_targets(sources: Sequence[Source], method: str = "mean", **options: Any) -> list[Target]:
    """Every weight of the first source shared; statistics find their means."""
    targets = []
    for number, state in enumerate(sources[0].states):
        for index, own in enumerate(state.weights):
            members = tuple((place, item.states[number].weights[index]) for place, item in enumerate(sources))
            means: tuple[Weight, ...] = ()
            if own.kind is WeightKind.VARIANCE:
                means = tuple(item.states[number].weights[index - 1] for item in sources)
            layer = f"layer_{number}"
            targets.append(Target(f"{number}/{own.key}", layer, members, "shared", method, options, means))
    return targets


def private_targets(sources: Sequence[Source]) -> list[Target]:
    return [
        Target(f"{place}/{number}/{own.key}", f"layer_{number}", ((place, own),))
        for place, item in enumerate(sources)
        for number, state in enumerate(item.states)
        for own in state.weights
    ]


def merge(
    sources: Sequence[Source], targets: Sequence[Target], weights: Sequence[float] | None = None, **options: Any
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Merged arrays by key, and the digests of the sources."""
    output = Collected(targets)
    shares = [1 / len(sources)] * len(sources) if weights is None else weights
    digests = merge_tensors(sources, targets, output, shares, **options)
    for key, times in output.times.items():
        assert np.all(times == 1), f"{key}: every entry is written once"
    return output.arrays, digests


def merge_one(*arrays: Any, weights: Sequence[float] | None = None, method: str = "mean", **options: Any) -> np.ndarray:
    """One shared weight."""
    sources = [source(label, [weight(array)]) for label, array in zip("abcdefghijklmnop", arrays, strict=False)]
    files, _ = merge(sources, shared_targets(sources, method, **options), weights)
    return files["0/vars/0"]


# ---- blocks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_blocks_merge_like_the_whole(size: int, count: int) -> None:
    rng = np.random.default_rng(size)
    stack = rng.standard_normal((count, size)).astype("f4")
    shares = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    assert merge_one(*stack, weights=shares).tobytes() == mean(stack, weights=shares).tobytes()
    if count * size < 20 * LEAF:
        assert merge_one(*stack, weights=shares, method="median").tobytes() == median(stack, weights=shares).tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    assert merge_one(np.full(shape, 1, "f4"), np.full(shape, 3, "f4")).tolist() == [2] * int(np.prod(shape))


def test_no_weights_at_all() -> None:
    sources = [source("a", []), source("b", [])]
    files, digests = merge(sources, [])
    assert files == {}
    assert all(digest.startswith("blake3:") for digest in digests)


def test_every_source_is_read_once() -> None:
    sources = [random_source(label, seed, (LEAF * 3 + 1,)) for seed, label in enumerate("abc")]
    merge(sources, shared_targets(sources))
    for item in sources:
        reads = item.states[0].weights[0].tensor.reads  # type: ignore[attr-defined]
        assert len(reads) == len(set(reads))


def test_private_weights_are_copied() -> None:
    sources = [random_source(label, seed, SIZES) for seed, label in enumerate("ab")]
    files, _ = merge(sources, private_targets(sources))
    for place, item in enumerate(sources):
        for own in item.states[0].weights:
            assert files[f"{place}/0/{own.key}"].tobytes() == own.tensor.array.tobytes()  # type: ignore[attr-defined]


# ---- digests


def digests_of(sources: Sequence[Source], **options: Any) -> tuple[str, ...]:
    return merge(sources, shared_targets(sources), **options)[1]


def test_digests_do_not_depend_on_threads_blocks_role_or_method(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [random_source(label, seed, SIZES) for seed, label in enumerate("ab")]
    expected = digests_of(sources)
    assert len(set(expected)) == 2
    for threads in (1, 2, 5):
        assert digests_of(sources, threads=threads) == expected
    assert digests_of(sources, weights=(0.25, 0.75)) == expected
    assert merge(sources, private_targets(sources))[1] == expected
    assert merge(sources, shared_targets(sources, "median"))[1] == expected
    assert merge(sources, shared_targets(sources, "pick"))[1] == expected
    assert digests_of(sources[::-1]) == expected[::-1]
    for size in (1, 2**20, 2**30):
        monkeypatch.setattr(engine, "BLOCK_BYTES", size)
        assert digests_of(sources) == expected


def test_digests_tell_models_apart() -> None:
    array = np.arange(LEAF + 6, dtype="f4")
    last, first = array.copy(), array.copy()
    last[-1] += 1
    first[0] = 1e-30
    models = {
        "itself": source("a", [weight(array)]),
        "last entry": source("a", [weight(last)]),
        "first entry": source("a", [weight(first)]),
        "shape": source("a", [weight(array.reshape(2, -1))]),
        "dtype": source("a", [weight(array.view("i4"), kind=WeightKind.STATE)]),
        "key": source("a", [weight(array, "vars/1")]),
        "layer": source("a", [], [weight(array)]),
        "configuration": source("a", [weight(array)], model={"class_name": "Functional"}),
        "no weights": source("a", []),
        "order": source("a", [weight(array), weight(array, "vars/1")]),
    }
    digests = {name: merge([item], private_targets([item]))[1][0] for name, item in models.items()}
    assert len(set(digests.values())) == len(models), digests
    again = replace(source("another label", [weight(array.copy())]), name="other.h5", kind=Kind.H5, size=7)
    assert merge([again], private_targets([again]))[1][0] == digests["itself"]


def test_weights_that_are_not_merged_are_read_for_the_digest() -> None:
    item = source("a", [weight(np.ones(2, "f4"))], [weight(np.ones(2, "f4"))])
    whole = merge([item], private_targets([item]))[1]
    written, digests = merge([item], private_targets([item])[:1])
    assert digests == whole
    assert len(written) == 1


# ---- numbers that are none


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_shared_weight_that_is_no_number(bad: float) -> None:
    array = np.zeros(2 * LEAF, "f4")
    array[LEAF + 3] = bad
    sources = [source("first", [weight(np.zeros(2 * LEAF, "f4"))]), source("second", [weight(array)])]
    with pytest.raises(MergeError, match=r"layer 'layer_0': kernel of 'second' holds .*not finite.*--private layer_0"):
        merge(sources, shared_targets(sources))
    assert merge(sources, shared_targets(sources), weights=(1.0, 0.0))[0]["0/vars/0"].tolist() == [0] * (2 * LEAF)
    assert merge(sources, shared_targets(sources, "pick"))[0]["0/vars/0"].tolist() == [0] * (2 * LEAF)


def test_a_private_weight_that_is_no_number_is_copied() -> None:
    array = np.array([1, np.nan, np.inf], "f4")
    sources = [source("a", [weight(array)]), source("b", [weight(array)])]
    files, _ = merge(sources, private_targets(sources))
    assert [item.tobytes() for item in files.values()] == [array.tobytes()] * 2


def test_large_numbers_are_not_mistaken_for_infinity() -> None:
    array = np.full(100, 3e38, "f4")  # the sum of their squares is infinite
    assert merge_one(array, array).tobytes() == array.tobytes()


def test_overflow_of_half_precision() -> None:
    layers = [
        [weight(np.array([center], "f2"), "vars/0", "moving_mean", WeightKind.MEAN),
         weight(np.array([60000], "f2"), "vars/1", "moving_variance", WeightKind.VARIANCE)]
        for center in (0, 500)
    ]  # fmt: skip
    sources = [source(label, layer) for label, layer in zip("ab", layers, strict=True)]
    with pytest.raises(MergeError, match=r"layer 'layer_0': merging moving_variance overflows float16\. .*--private"):
        merge(sources, shared_targets(sources))


def test_overflow_where_a_source_has_a_wider_type() -> None:
    with pytest.raises(MergeError, match=r"layer 'layer_0'"):
        merge_one(np.zeros(3, "f2"), np.full(3, 1e6, "f4"))


def test_complex_numbers() -> None:
    assert merge_one(np.array([1 + 2j], "c8"), np.array([3 - 4j], "c8")).tolist() == [2 - 1j]


def test_complex_numbers_that_are_none() -> None:
    with pytest.raises(MergeError, match="kernel of 'b' holds values that are not finite"):
        merge_one(np.array([1 + 2j], "c8"), np.array([complex(1, np.nan)], "c8"))


# ---- kinds and types


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "bool"])
@pytest.mark.parametrize("kind", [WeightKind.STATE, WeightKind.LEARNED])
def test_state_comes_from_the_first_source(dtype: str, kind: WeightKind) -> None:
    arrays = [np.array([1, 0, 3], dtype), np.array([7, 1, 0], dtype)]
    sources = [source(label, [weight(array, kind=kind)]) for label, array in zip("ab", arrays, strict=True)]
    for shares in ((0.5, 0.5), (0.0, 1.0)):
        assert merge(sources, shared_targets(sources), shares)[0]["0/vars/0"].tobytes() == arrays[0].tobytes()


@pytest.mark.parametrize("method", ["mean", "median"])
def test_statistics_are_pooled(method: str) -> None:
    rng = np.random.default_rng(0)
    size = 5 * LEAF + 7
    means, variances = rng.standard_normal((3, size)).astype("f4"), rng.uniform(0.5, 2, (3, size)).astype("f4")
    sources = [
        source(
            label,
            [
                weight(center, "vars/2", "moving_mean", WeightKind.MEAN),
                weight(spread, "vars/3", "moving_variance", WeightKind.VARIANCE),
            ],
        )
        for label, center, spread in zip("abc", means, variances, strict=True)
    ]
    shares = np.array([0.5, 0.2, 0.3])
    files, _ = merge(sources, shared_targets(sources, method), shares)
    assert files["0/vars/2"].tobytes() == pooled_mean(means, weights=shares).astype("f4").tobytes()
    expected = pooled_variance(means, variances, weights=shares).astype("f4")
    assert files["0/vars/3"].tobytes() == expected.tobytes()
    means[1] = variances[1] = np.nan
    files, _ = merge(sources, shared_targets(sources, method), (0.5, 0, 0.5))
    halves = np.array([0.5, 0.5])
    expected = pooled_variance(means[::2], variances[::2], weights=halves).astype("f4")
    assert files["0/vars/3"].tobytes() == expected.tobytes()
    with pytest.raises(MergeError, match=r"moving_(mean|variance) of 'b'"):
        merge(sources, shared_targets(sources, method), shares)


def test_a_variance_whose_mean_is_no_number() -> None:
    layers = [
        [weight(np.array([center], "f4"), "vars/0", "moving_mean", WeightKind.MEAN),
         weight(np.array([1], "f4"), "vars/1", "moving_variance", WeightKind.VARIANCE)]
        for center in (0, np.nan)
    ]  # fmt: skip
    sources = [source(label, layer) for label, layer in zip("ab", layers, strict=True)]
    with pytest.raises(MergeError, match="of 'b' holds values that are not finite"):
        merge(sources, shared_targets(sources)[1:])


def test_pick_takes_statistics_and_state_too() -> None:
    def of(value: float) -> list[Weight]:
        return [
            weight(np.array([value], "f4"), "vars/0", "moving_mean", WeightKind.MEAN),
            weight(np.array([value + 1], "f4"), "vars/1", "moving_variance", WeightKind.VARIANCE),
            weight(np.array([value + 2], "u4"), "vars/2", "seed", WeightKind.STATE),
        ]

    sources = [source("a", of(1)), source("b", of(5))]
    files, _ = merge(sources, shared_targets(sources, "pick", label="b"))
    assert [array.tolist() for array in files.values()] == [[5], [6], [7]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_merged_in_single_precision(dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = (100 * rng.standard_normal((7, 1000))).astype(numpy_dtype(dtype))
    merged = merge_one(*arrays)
    assert merged.dtype == numpy_dtype(dtype)
    expected = mean(arrays.astype("f4"), weights=np.full(7, 1 / 7)).astype(numpy_dtype(dtype))
    assert merged.tobytes() == expected.tobytes()
    assert merge_one(arrays[0], arrays[0]).tobytes() == arrays[0].tobytes()


def test_largest_half_precision_numbers() -> None:
    assert merge_one(np.array([65504], "f2"), np.array([-65504], "f2")).tolist() == [0]


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float16"), ("float32", "bfloat16")])
def test_the_first_source_gives_the_type(dtypes: tuple[str, str]) -> None:
    arrays = [np.array([1, 2, 3]).astype(numpy_dtype(name)) for name in dtypes]
    arrays[1] = arrays[1] * arrays[1].dtype.type(2)
    merged = merge_one(*arrays)
    assert merged.dtype == numpy_dtype(dtypes[0])
    assert merged.astype("f4").tolist() == [1.5, 3, 4.5]


# ---- progress


def test_progress_never_falls_and_ends_at_the_total() -> None:
    sources = [random_source(label, seed, (3 * LEAF, 5, 0, 9 * LEAF)) for seed, label in enumerate("abc")]
    total = sum(own.tensor.nbytes for item in sources for own in item.states[0].weights)
    for threads in (1, 4):
        done: list[int] = []
        totals: list[int] = []

        def progress(now: int, of: int, done: list[int] = done, totals: list[int] = totals) -> None:
            done.append(now)
            totals.append(of)

        merge(sources, shared_targets(sources), threads=threads, progress=progress)
        assert set(totals) == {total}
        assert done == sorted(done)
        assert done[-2:] == [total, total], "what was counted is what there was to read"


def test_progress_is_called_from_the_callers_thread() -> None:
    seen: set[int] = set()
    sources = [random_source("a", 0, (9 * LEAF,)), random_source("b", 1, (9 * LEAF,))]
    merge(sources, shared_targets(sources), progress=lambda done, total: seen.add(threading.get_ident()))
    assert seen == {threading.get_ident()}


# ---- failures


class Broken(Exception):
    pass


def endless(label: str, units: int = 500, fails: BaseException | None = None) -> Source:
    tensor: Any = Endless(units * 4 * LEAF, fails=fails)
    return source(label, [Weight("vars/0", "kernel", WeightKind.WEIGHT, tensor)])


def failing(place: str) -> Callable[[], None]:
    error = KeyboardInterrupt("stop") if place == "interrupt" else Broken(place)
    sources = [endless("a", fails=error if place == "read" else None), endless("b")]

    class Output:
        def write(self, key: str, start: int, array: np.ndarray) -> None:
            if place == "write":
                raise error

    def progress(done: int, total: int) -> None:
        if place in ("progress", "interrupt"):
            raise error

    def run() -> None:
        try:
            merge_tensors(sources, shared_targets(sources), Output(), (0.5, 0.5), progress, threads=2)
        finally:
            reads = sources[0].states[0].weights[0].tensor.reads  # type: ignore[attr-defined]
            assert 1 <= len(reads) < 50, f"{len(reads)} of 500 blocks were read"

    return run


@pytest.mark.parametrize("place", ["read", "write", "progress", "interrupt"])
def test_a_failure_stops_everything_soon(place: str) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt if place == "interrupt" else Broken, match=place.replace("interrupt", "stop")):
        failing(place)()
    assert threading.active_count() == before


# ---- memory


def peak(count: int, leaves: int, method: str, threads: int = 1) -> float:
    """Largest memory taken at a time, in MiB."""
    sources = []
    for number in range(count):
        tensor: Any = Endless(leaves * LEAF)
        sources.append(source(f"s{number}", [Weight("vars/0", "kernel", WeightKind.WEIGHT, tensor)]))
    targets = shared_targets(sources, method)
    tracemalloc.start()
    try:
        merge_tensors(sources, targets, Forgotten(), [1 / count] * count, silent, threads)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", ["mean", "median"])
def test_memory_does_not_grow_with_the_size_or_number_of_models(method: str) -> None:
    few, many, longer, parallel = (
        peak(2, 16, method), peak(16, 16, method), peak(2, 64, method), peak(2, 64, method, threads=2)
    )  # fmt: skip
    assert longer < 1.1 * few, "a larger weight takes no more memory"
    assert many < 2 * few, "16 sources take their smallest block: a leaf each"
    assert parallel < 2.2 * few
    assert max(few, many) < 16


# ---- files


def test_files_are_merged(fixtures_dir: Path, tmp_path: Path) -> None:
    names = [fixtures_dir / f"finetuned_{label}.h5" for label in "abc"]
    sources = [open_source(name) for name in names]
    try:
        places = [
            (number, index) for number, state in enumerate(sources[0].states) for index in range(len(state.weights))
        ]
        targets, tensors = [], {}
        for number, index in places[:-2]:  # without the heads
            members = tuple((place, item.states[number].weights[index]) for place, item in enumerate(sources))
            key = f"{number}_{index}"
            targets.append(Target(key, "dense", members, "shared", "mean"))
            tensors[key] = TensorSpec(members[0][1].tensor.shape, "float32")
        for place, item in enumerate(sources):
            for own in item.states[places[-1][0]].weights:
                key = f"{place}_{own.name}"
                targets.append(Target(key, "head", ((place, own),)))
                tensors[key] = TensorSpec(own.tensor.shape, "float32")
        shares = (0.5, 0.25, 0.25)
        with create_hdf5(tmp_path / "merged.h5", Layout({"": {}}, tensors)) as output:
            digests = merge_tensors(sources, targets, output, shares)
    finally:
        for item in sources:
            item.close()
    assert len(set(digests)) == 3
    originals = [stored(name) for name in names]
    with h5py.File(tmp_path / "merged.h5") as file:
        for target, arrays in zip(targets, zip(*(item[:-2] for item in originals), strict=True), strict=False):
            expected = np.tensordot(shares, np.stack(arrays).astype("f8"), axes=1)
            np.testing.assert_allclose(file[target.key][()], expected, atol=1e-6)
        for place, item in enumerate(originals):
            heads = [target.key for target in targets if target.role == "private" and target.members[0][0] == place]
            for key, array in zip(heads, item[-2:], strict=True):
                assert file[key][()].tobytes() == array.tobytes()


def stored(path: Path) -> list[np.ndarray]:
    """Weights of a file in the order of its layers, by h5py alone."""
    with h5py.File(path) as file:
        groups = [file["model_weights"][name] for name in file["model_weights"].attrs["layer_names"]]
        return [group[name][()] for group in groups for name in group.attrs["weight_names"]]
