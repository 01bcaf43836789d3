"""Calibration inputs: what is read of what users give, what is refused and in which words, and what is made up."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge.calibration import evidence, patterns
from kmerge.calibration.inputs import Inputs, read_inputs, usual_rows
from kmerge.calibration.synthetic import synthesise
from kmerge.dialects.vocabulary import WeightKind
from kmerge.errors import DataError, FormatError, KmergeError, PlanError, UnsafeFileError
from kmerge.graph import Call, Graph, Layer, Ref
from kmerge.source import Source, State, Weight, open_source
from kmerge.store import Asset, Kind, Tensor


@dataclass(frozen=True, slots=True, eq=False)
class InMemory(Tensor):
    """A weight that stands in no file."""

    values: np.ndarray

    def _read(self, start: int, raw: np.ndarray) -> None:
        offset = start * self.values.itemsize
        raw[:] = np.frombuffer(self.values.tobytes(), np.uint8)[offset : offset + raw.size]


def weight(name: str, values: Any) -> Weight:
    array = np.asarray(values, np.float32)
    return Weight(name, name, WeightKind.LEARNED, InMemory(array.shape, "float32", array.size, array.nbytes, "", array))


def entry(shape: tuple[int | None, ...], name: str = "image", dtype: str = "float32") -> Layer:
    return Layer(name, "InputLayer", {"batch_shape": [None, *shape], "dtype": dtype, "name": name})


def source(label: str, inputs: Any, *layers: tuple[Any, ...], assets: dict[str, bytes] | None = None) -> Source:
    """A network: one chain of layers (class, configuration, weights by name) behind its first input."""
    flat = list(inputs.values()) if isinstance(inputs, dict) else inputs if isinstance(inputs, list) else [inputs]
    made = [Layer(f"layer_{n}", item[0], item[1]) for n, item in enumerate(layers)]
    calls = [Call(n) for n in range(len(flat))]
    for number in range(len(made)):
        before = Ref(len(flat) + number - 1 if number else 0)
        calls.append(Call(len(flat) + number, {"args": [before], "kwargs": {}}))
    refs = [Ref(n) for n in range(len(flat))]
    structure: Any = refs if isinstance(inputs, list) else refs[0]
    if isinstance(inputs, dict):
        structure = dict(zip(inputs, refs, strict=True))
    states = [State() for _ in flat]
    for item in layers:
        found = tuple(weight(name, values) for name, values in (item[2] if len(item) > 2 else {}).items())
        files = {name: Asset(len(data), lambda data=data: data) for name, data in (assets or {}).items()}
        states.append(State(found, assets=files))
    graph = Graph("model", (*flat, *made), tuple(calls), structure, Ref(len(calls) - 1))
    return Source(label, label, None, Kind.KERAS, 0, graph=graph, states=tuple(states))


def three(inputs: Any = None, *layers: tuple[Any, ...]) -> list[Source]:
    return [source(label, entry((4, 4, 1)) if inputs is None else inputs, *layers) for label in "abc"]


def pair() -> list[Source]:
    """Two inputs, a dictionary whose keys are not in the order in which it lists them."""
    return three({"signal": entry((6,), "first"), "colour": entry((), "second", "int32")})


IMAGES = np.arange(30 * 16, dtype=np.float32).reshape(30, 4, 4, 1)


def rows_of(inputs: Inputs) -> list[int]:
    """Which rows of IMAGES were drawn."""
    return [int(value) // 16 for value in inputs.arrays[0].reshape(inputs.rows, -1)[:, 0]]


def message(data: Any, sources: list[Source] | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_inputs(data, three() if sources is None else sources, **options)
    return str(caught.value)


# ---- what is read


def test_an_array_is_read_as_it_is() -> None:
    inputs = read_inputs(IMAGES, three())
    np.testing.assert_array_equal(inputs.arrays[0], IMAGES)
    assert inputs.owners.tolist() == [-1] * 30
    assert (inputs.rows, inputs.synthetic, inputs.description) == (30, False, "30 inputs")


def test_a_sample_keeps_the_order_and_depends_on_the_seed_only() -> None:
    first, again, other = (read_inputs(IMAGES, three(), samples=9, seed=seed) for seed in (1, 1, 2))
    assert rows_of(first) == rows_of(again) == sorted(set(rows_of(first)))
    assert rows_of(first) != rows_of(other)
    assert first.description == "9 of 30 inputs"


@pytest.mark.parametrize("names", [["x"], ["image"], ["x0"], ["image", "y"], ["x", "y", "y_a", "y_b"]])
def test_an_npz_is_read_by_names_and_its_labels_are_not(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{name: np.arange(30) if name.startswith("y") else IMAGES for name in names})
    inputs = read_inputs(path, three(), samples=12)
    np.testing.assert_array_equal(inputs.arrays[0], IMAGES[rows_of(inputs)])
    assert inputs.description == "12 of 30 inputs from x.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_members_of_an_npz_are_read_block_by_block(
    save: Any, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmerge.data.columns.BLOCK", 200)
    save(tmp_path / "x.npz", x=np.asarray(IMAGES, order=order))  # type: ignore[call-overload]
    inputs = read_inputs(str(tmp_path / "x.npz"), three(), samples=11)
    np.testing.assert_array_equal(inputs.arrays[0], IMAGES[rows_of(inputs)])


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_is_one_input(order: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asarray(IMAGES.astype(">f8"), order=order))  # type: ignore[call-overload]
    inputs = read_inputs(tmp_path / "x.npy", three(), samples=10)
    np.testing.assert_array_equal(inputs.arrays[0], IMAGES[rows_of(inputs)])
    assert inputs.arrays[0].dtype == np.float32
    assert inputs.description == "10 of 30 inputs from x.npy"


def test_several_inputs_come_in_the_order_of_the_network(tmp_path: Path) -> None:
    signal, colour = np.arange(60.0).reshape(10, 6), np.arange(10)
    np.savez(tmp_path / "x.npz", signal=signal, colour=colour)
    np.save(tmp_path / "signal.npy", signal)
    for data in (
        {"signal": signal, "colour": colour},
        {"first": signal, "second": colour},
        {"x0": colour, "x1": signal},
        [colour, signal],
        (colour, signal),
        ([colour, signal], np.zeros(10)),
        ({"signal": signal, "colour": colour}, np.zeros(10), np.ones(10)),
        {"signal": signal.tolist(), "colour": colour.tolist(), "y": np.zeros(10)},
        {"signal": tmp_path / "signal.npy", "colour": colour},
        tmp_path / "x.npz",
        [(colour[:5], signal[:5]), (colour[5:], signal[5:])],
        [({"signal": signal[:5], "colour": colour[:5]}, 0), ({"signal": signal[5:], "colour": colour[5:]}, 0)],
    ):
        inputs = read_inputs(data, pair())
        np.testing.assert_array_equal(inputs.arrays[0], colour)
        np.testing.assert_array_equal(inputs.arrays[1], signal)
        assert [array.dtype.name for array in inputs.arrays] == ["int32", "float32"]


def batches(size: int = 7) -> list[np.ndarray]:
    return [IMAGES[start : start + size] for start in range(0, 30, size)]


class Numbered:
    """Batches by number, as a `keras.utils.PyDataset` gives them; beyond the last one it goes on for ever."""

    num_batches: int | None = 5

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return batches()[number % 5], 0


@pytest.mark.parametrize(
    "data",
    [
        batches(),
        [(x, 0) for x in batches()],
        ((x, 0, 1) for x in batches()),
        ([x, 0] for x in batches()),
        [{"image": x} for x in batches()],
        [{"x": x.tolist()} for x in batches()],
        (IMAGES, np.zeros(30)),
        [IMAGES],
        IMAGES.tolist(),
        IMAGES[..., 0],
        Numbered(),
        (x for x in batches(1)),
    ],
    ids=range(12),
)
def test_batches_are_read_without_labels(data: Any) -> None:
    inputs = read_inputs(data, three())
    np.testing.assert_array_equal(inputs.arrays[0], IMAGES)
    assert inputs.description == "30 inputs"


def test_data_sets_of_keras_and_tensorflow_are_read() -> None:
    import keras
    import tensorflow as tf

    class Images(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            return batches()[index], 0

    stored = tf.data.Dataset.from_tensor_slices((IMAGES, np.zeros(30)))
    for data in (Images(), stored.batch(7), stored.batch(7).map(lambda x, y: {"image": x}), tf.constant(IMAGES)):
        np.testing.assert_array_equal(read_inputs(data, three()).arrays[0], IMAGES)
    assert message(stored.repeat().batch(7)) == (
        "The data never end: give a data set without repetition, or a part of it."
    )
    texts = read_inputs(tf.constant(["red", "gelb"] * 5), three(entry((), "text", "string")))
    assert texts.arrays[0].tolist() == ["red", "gelb"] * 5


@given(size=st.integers(1, 40), other=st.integers(1, 40), samples=st.integers(8, 35), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_stream_gives_the_same_sample_whatever_its_batches(size: int, other: int, samples: int, seed: int) -> None:
    first, second = (read_inputs(iter(batches(n)), three(), samples=samples, seed=seed) for n in (size, other))
    assert rows_of(first) == rows_of(second) == sorted(set(rows_of(first)))
    assert first.rows == min(samples, 30)
    np.testing.assert_array_equal(first.arrays[0], IMAGES[rows_of(first)])


def test_all_rows_of_a_stream_have_the_same_chance() -> None:
    counts = np.zeros(30)
    for seed in range(300):
        counts[rows_of(read_inputs(iter(batches()), three(), samples=10, seed=seed))] += 1
    assert counts.sum() == 3000
    assert 60 < counts.min() < counts.max() < 140  # 100 expected, deviation 8


def test_a_stream_is_never_held() -> None:
    def stream() -> Iterator[np.ndarray]:
        for number in range(200):
            yield np.full((64, 4, 4, 64), number, np.float32)  # a quarter of a megabyte, 50 MB in all

    tracemalloc.start()
    inputs = read_inputs(stream(), three(entry((4, 4, 64))), samples=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert inputs.description == "32 of 12,800 inputs"


# ---- data per source


def test_data_per_source_give_equally_many_rows_of_each(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=IMAGES[10:])
    data = {"a": IMAGES[:10], "b": tmp_path / "b.npz", "c": iter(batches())}
    inputs = read_inputs(data, three())
    assert inputs.owners.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    rows = rows_of(inputs)
    assert rows[:10] == list(range(10))
    assert min(rows[10:20]) >= 10
    assert inputs.description == "30 of 60 inputs from b.npz, 10 for each source"
    assert read_inputs({**data, "c": batches()}, three(), samples=27).owners.tolist() == [0] * 9 + [1] * 9 + [2] * 9


@pytest.mark.parametrize("name", ["x", "image"])
def test_inputs_of_separate_networks_stand_under_their_labels(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{f"{label}/{name}": IMAGES + 16 * n for n, label in enumerate("abc")})
    inputs = read_inputs(tmp_path / "x.npz", three())
    assert inputs.owners.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert rows_of(inputs)[::30] == [0, 1, 2]


def test_input_names_win_over_labels() -> None:
    inputs = [entry((4, 4, 1), "a"), entry((4, 4, 1), "b"), entry((4, 4, 1), "c")]
    read = read_inputs(dict.fromkeys("abc", IMAGES), three(inputs))
    assert len(read.arrays) == 3
    assert set(read.owners) == {-1}
    single = [source(f"x{n}", entry((4, 4, 1))) for n in range(2)]
    assert set(read_inputs({"x0": IMAGES, "x1": IMAGES}, single).owners) == {0, 1}


# ---- values


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("float32", np.uint8, np.float32),
        ("float32", np.float64, np.float32),
        ("float16", np.float32, np.float16),
        ("bfloat16", np.float32, np.float32),
        ("int32", np.float32, np.int32),
        ("uint8", np.int64, np.uint8),
        ("bool", np.int64, np.bool_),
        ("float32", np.bool_, np.float32),
    ],
)
def test_numbers_take_the_dtype_of_the_input_layer(dtype: str, given: Any, expected: Any) -> None:
    data = np.array([[0, 1, 1]] * 9, given)
    read = read_inputs(data, three(entry((3,), dtype=dtype))).arrays[0]
    assert read.dtype == expected
    assert read.tolist() == [[0, 1, 1]] * 9


@pytest.mark.parametrize("given", [np.array(["ä", "b"] * 5), np.array(["ä".encode(), b"b"] * 5), ["ä", "b"] * 5])
def test_strings_are_read_for_string_inputs(given: Any) -> None:
    read = read_inputs(given, three(entry((1,), "word", "string"))).arrays[0]
    assert read.shape == (10, 1)
    assert read[:2, 0].tolist() == ["ä", "b"]


def test_free_axes_take_any_size() -> None:
    assert read_inputs(np.zeros((9, 17, 3)), three(entry((None, 3)))).arrays[0].shape == (9, 17, 3)


# ---- errors, word by word


SMALL = np.zeros((9, 3))


@pytest.mark.parametrize(
    ("data", "shape", "expected"),
    [
        (
            np.zeros((400, 4, 4, 3)),
            (4, 4, 1),
            "The data for input 'image' have shape (400, 4, 4, 3), expected (rows, 4, 4, 1). Prepare them as for the "
            "training of the models.",
        ),
        (
            np.zeros((9, 3, 4, 5)),
            (4, 5, 3),
            "The data for input 'image' have shape (9, 3, 4, 5), expected (rows, 4, 5, 3). Bring the channels to the "
            "end: np.moveaxis(x, 1, -1).",
        ),
        (
            np.zeros((9, 16)),
            (4, 4, 1),
            "The data for input 'image' have shape (9, 16), expected (rows, 4, 4, 1). Reshape them: x.reshape(-1, "
            "4, 4, 1).",
        ),
        (
            np.zeros((4, 4, 1)),
            (4, 4, 1),
            "The data for input 'image' have shape (4, 4, 1), expected (rows, 4, 4, 1). This is one row: give many, "
            "rows first.",
        ),
        (
            iter(np.zeros((9, 4, 4, 3))),
            (4, 4, 3),
            "The batch for input 'image' has shape (4, 4, 3), expected (rows, 4, 4, 3). These are single rows: batch "
            "them first.",
        ),
        (
            np.zeros((9, 7, 1)),
            (7,),
            "The data for input 'image' have shape (9, 7, 1), expected (rows, 7). Leave out the last axis: x[..., 0].",
        ),
        (
            np.zeros((9, 3, 7)),
            (None, 3),
            "The data for input 'image' have shape (9, 3, 7), expected (rows, any, 3). Bring the channels to the end: "
            "np.moveaxis(x, 1, -1).",
        ),
        (np.zeros((9, 0)), (None,), "The data for input 'image' have shape (9, 0): they hold no values."),
        (np.zeros((0, 3)), (3,), "The data hold no rows: expected at least 8."),
        (iter(()), (3,), "The data hold no rows: expected at least 8."),
        (
            np.zeros((7, 3)),
            (3,),
            "The data hold 7 rows, too few to calibrate on and to hold some back: give at least 8, "
            "better some hundreds.",
        ),
        (
            iter([np.zeros((1, 3))]),
            (3,),
            "The data hold 1 row, too few to calibrate on and to hold some back: give at least 8, "
            "better some hundreds.",
        ),
        ({"z": SMALL}, (3,), "The data hold 'z', which is no input of the network: expected image (or x)."),
        ({"x": SMALL, "image": SMALL}, (3,), "The data hold input 'image' under two names: leave one out."),
        ({}, (3,), "The data hold nothing for input 'image': expected image."),
        (
            {"a": SMALL, "b": SMALL},
            (3,),
            "There are data for 'a' and 'b' but none for 'c': give some for every source, or one data set for all.",
        ),
        (
            {"a": SMALL, "b": SMALL, "c": np.zeros((9, 4))},
            (3,),
            "The data for input 'image' of 'c' have shape (9, 4), expected (rows, 3). Prepare them as for the training "
            "of the models.",
        ),
        (
            SMALL + [np.nan, 0, 0] * np.array([[1], [0], [1], *[[0]] * 6]),
            (3,),
            "The data for input 'image' hold NaN or infinity in 9 of 9 rows: leave these rows out, or fill them as for "
            "the training of the models.",
        ),
        (
            np.full((9, 3), 1e300),
            (3,),
            "The data for input 'image' hold NaN or infinity in 9 of 9 rows: leave these rows out, or fill them as for "
            "the training of the models.",
        ),
        (
            np.array([[None] * 3] * 9),
            (3,),
            "The data for input 'image' are Python objects: expected numbers, with all rows of one shape.",
        ),
        (
            np.array([["a"] * 3] * 9),
            (3,),
            "The data for input 'image' are strings: expected numbers, with all rows of one shape.",
        ),
        (np.zeros((9, 3), complex), (3,), "The data for input 'image' are complex numbers: expected float32."),
        (
            [np.zeros((5, 4)), np.zeros((5, 5))],
            (None,),
            "The batches for input 'image' have rows of shapes (4,) and (5,): pad them to one.",
        ),
    ],
    ids=range(23),
)
def test_data_that_do_not_fit(data: Any, shape: tuple[int | None, ...], expected: str) -> None:
    assert message(data, three(entry(shape))) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            SMALL,
            "The data hold one array, and the network takes 2 inputs: give a dictionary with colour, signal.",
        ),
        (
            {"signal": np.zeros((9, 6))},
            "The data hold nothing for input 'colour': expected colour, signal.",
        ),
        (
            {"signal": np.zeros((9, 6)), "colour": np.zeros(10)},
            "The data hold 10 rows for input 'colour' but 9 for 'signal': expected equally many.",
        ),
        (
            {"signal": np.zeros((9, 6)), "z": np.zeros(9)},
            "The data hold 'z', which is no input of the network: expected colour, signal (or x0 to x1).",
        ),
        (
            {"signal": np.zeros((9, 6)), "colour": np.full(9, 0.5)},
            "The data for input 'colour' are float64 and not all whole numbers from -2147483648 to 2147483647: "
            "expected int32.",
        ),
        (
            iter([np.zeros((9, 6))]),
            "The data hold one array, and the network takes 2 inputs: give a dictionary with colour, signal.",
        ),
    ],
    ids=range(6),
)
def test_several_inputs_that_do_not_fit(data: Any, expected: str) -> None:
    assert message(data, pair()) == expected


def test_things_that_are_no_data() -> None:
    expected = "expected a path, an array, a dictionary of arrays, a data set or an iterable of batches."
    assert message(object()) == f"The data are a object: {expected}"
    assert message([IMAGES[:5], IMAGES[5:], [[0, 1], [2]]]).startswith(
        "The data cannot be read as an array (ValueError: "
    )
    numbered = Numbered()
    numbered.num_batches = None
    assert message(numbered) == "The data never end: give a data set without repetition, or a part of it."
    assert message(np.zeros(9), three(entry((), "text", "string"))) == (
        "The data for input 'text' are float64: expected strings."
    )

    def broken() -> Iterator[np.ndarray]:
        yield IMAGES
        raise OSError("disk on fire")

    assert message(broken()) == "Reading the data failed (OSError: disk on fire)."


def test_too_few_samples() -> None:
    with pytest.raises(PlanError, match=r"^samples is 7: expected at least 8 rows\.$"):
        read_inputs(IMAGES, three(), samples=7)
    with pytest.raises(PlanError, match=r"^samples is 7: expected at least 8 rows\.$"):
        synthesise(three(), rows=7)


def test_an_npz_with_other_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES, y_train=np.zeros(30))
    assert message(tmp_path / "mnist.npz") == (
        "The data in mnist.npz hold 'x_train', which is no input of the network: expected image (or x)."
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(name: str, kind: type[KmergeError] = FormatError) -> str:
        with pytest.raises(kind) as caught:
            read_inputs(tmp_path / name, three())
        return str(caught.value)

    assert refused("x.npz") == f"{tmp_path / 'x.npz'} does not exist: check the path."
    assert refused(".") == (
        f"{tmp_path} is a folder without data: expected a folder of images for each class, images, or tables "
        "or records of one kind."
    )
    (tmp_path / "x.dat").write_text("1,2,3")
    assert refused("x.dat") == (
        "x.dat is no file of data that kmerge reads (.npz, .npy, .csv, .tsv, .parquet, .tfrecord, or a folder of "
        "images): write inputs with np.savez('x.npz', x=x)."
    )
    np.save(tmp_path / "x.npy", IMAGES)
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:-5])
    assert refused("cut.npy") == "cut.npy is cut short: its header tells of shape (30, 4, 4, 1). Write it again."
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("x.npy", data[:-5])
    assert refused("cut.npz") == "'x' in cut.npz is cut short: 5 bytes are missing. Write it again."
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    assert refused("model.keras") == (
        "model.keras holds 'config.json', which is no array: expected an .npz as np.savez writes it."
    )
    (tmp_path / "half.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    assert refused("half.npz") == (
        "half.npz cannot be read as an .npz (File is not a zip file): write it again with np.savez."
    )
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'shape': 5}     \n")
    assert refused("bad.npy").startswith("bad.npy is no array that NumPy reads (")


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 9, object)
    if name == "x.npy":
        np.save(tmp_path / name, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / name, x=objects)
    with pytest.raises(UnsafeFileError, match="holds pickled Python objects, which kmerge never opens: write an array"):
        read_inputs(tmp_path / name, three())


# ---- what Inputs does


def test_batches_cover_all_rows_in_order() -> None:
    inputs = read_inputs(IMAGES, three())
    sizes = [batch[0].shape[0] for batch in inputs.batches(8)]
    assert sizes == [8, 8, 8, 6]
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in inputs.batches(8)]), IMAGES)


@given(
    owners=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_split_divides_the_rows(owners: list[int], share: float, seed: int) -> None:
    inputs = Inputs((np.arange(len(owners)),), np.array(owners))
    used, held = inputs.split(share, seed)
    assert sorted([*used.arrays[0], *held.arrays[0]]) == list(range(len(owners)))
    assert list(held.arrays[0]) == list(inputs.split(share, seed)[1].arrays[0])
    assert used.rows >= 1
    assert held.rows >= (len(owners) > 1)
    for owner in set(owners):
        count = owners.count(owner)
        if count > 1:
            wanted = min(max(round(share * count), 1), count - 1)
            assert list(held.owners).count(owner) == wanted


# ---- what is made up


def dense(units: int, size: int, **settings: Any) -> tuple[Any, ...]:
    kernel = np.random.default_rng(0).standard_normal((size, units))
    return "Dense", {"units": units, "activation": "linear", **settings}, {"kernel": kernel, "bias": np.zeros(units)}


def conv(rank: int, size: int, channels: int, filters: int = 4, **settings: Any) -> tuple[Any, ...]:
    kernel = np.random.default_rng(0).standard_normal((*(size,) * rank, channels, filters)) / 3
    config = {"filters": filters, "kernel_size": [size] * rank, "activation": "linear", "padding": "valid", **settings}
    return f"Conv{rank}D", config, {"kernel": kernel, "bias": np.zeros(filters)}


@pytest.mark.parametrize(
    ("inputs", "layers", "expected"),
    [
        (entry((28, 28, 1)), [conv(2, 3, 1)], "images (28, 28, 1), values 0 to 1"),
        (entry((3, 28, 28)), [conv(2, 3, 3, data_format="channels_first")], "images (28, 28, 3), values 0 to 1"),
        (entry((None, None, 3)), [conv(2, 3, 3)], "images (64, 64, 3), values 0 to 1"),
        (
            entry((28, 28)),
            [("Reshape", {"target_shape": [28, 28, 1]}), conv(2, 3, 1)],
            "images (28, 28, 1), values 0 to 1",
        ),
        (
            entry((784,)),
            [("Reshape", {"target_shape": [28, 28, 1]}), conv(2, 3, 1)],
            "images (28, 28, 1), values 0 to 1",
        ),
        (entry((28, 28)), [("Flatten", {}), dense(4, 784)], "images (28, 28, 1), values 0 to 1"),
        (
            entry((8, 8, 1)),
            [("Rescaling", {"scale": 1 / 255, "offset": 0.0}), conv(2, 3, 1)],
            "images (8, 8, 1), values 0 to 255",
        ),
        (
            entry((8, 8, 1)),
            [("Rescaling", {"scale": 1 / 127.5, "offset": -1}), conv(2, 3, 1)],
            "images (8, 8, 1), values 0 to 255",
        ),
        (entry((8, 8, 1), dtype="uint8"), [conv(2, 3, 1)], "images (8, 8, 1), values 0 to 255"),
        (entry((8, 8, 8, 1)), [conv(3, 3, 1)], "volumes (8, 8, 8, 1), values 0 to 1"),
        (entry((50, 3)), [conv(1, 3, 3)], "signals (50, 3), standardised"),
        (entry((None, 3)), [("LSTM", {"units": 2})], "signals (32, 3), standardised"),
        (entry((25, 4)), [("LSTM", {"units": 2})], "signals (25, 4), standardised"),
        (entry((80, 4)), [conv(1, 5, 4)], "sequences of 80 out of 4 letters, one-hot"),
        (entry((6,)), [dense(4, 6)], "rows of 6 features, standardised"),
        (
            entry((2,)),
            [("Normalization", {"axis": [-1]}, {"mean": [100, 5], "variance": [9, 4]}), dense(4, 2)],
            "rows of 2 features, mean and variance of the networks' first layers",
        ),
        (
            entry((9,), dtype="int32"),
            [("Embedding", {"input_dim": 50, "mask_zero": True}, {"embeddings": np.zeros((50, 2))})],
            "sequences of 9 tokens out of 50",
        ),
        (entry((9,), dtype="bool"), [], "masks (9,)"),
        (entry((2,), dtype="int32"), [("IntegerLookup", {"vocabulary": [3, 5]})], "choices (2,) out of 2 numbers"),
        (entry((2,), dtype="string"), [("StringLookup", {"vocabulary": ["b", "c"]})], "strings (2,) out of 2 words"),
        (entry((), dtype="string"), [("TextVectorization", {"split": "whitespace"})], "texts out of 2 words"),
        (entry((1,)), [("Discretization", {"bin_boundaries": [0.0, 1.0]})], "numbers (1,) from -0.5 to 1.5"),
    ],
    ids=range(22),
)
def test_inputs_are_made_up_by_what_reads_them(inputs: Layer, layers: list[tuple[Any, ...]], expected: str) -> None:
    sources = [source(label, inputs, *layers, assets={"vocabulary.txt": b"\n[UNK]\nred\ngelb"}) for label in "ab"]
    made = synthesise(sources, rows=40)
    assert made.description == f"40 made-up {expected}"
    assert made.synthetic
    assert made.owners.tolist() == [-1] * 40
    wanted = tuple(inputs.config["batch_shape"])
    assert len(made.arrays[0]) == 40
    assert all(w in (None, size) for w, size in zip(wanted[1:], made.arrays[0].shape[1:], strict=True))
    assert made.arrays[0].dtype == (object if inputs.config["dtype"] == "string" else inputs.config["dtype"])
    again, other = synthesise(sources, rows=40), synthesise(sources, rows=40, seed=1)
    np.testing.assert_array_equal(made.arrays[0], again.arrays[0])
    assert not np.array_equal(made.arrays[0], other.arrays[0])
    read = read_inputs(list(made.arrays), sources)  # what is made up fits the network
    np.testing.assert_array_equal(read.arrays[0], made.arrays[0])


def test_several_inputs_are_made_up_each_by_itself() -> None:
    made = synthesise(pair(), rows=20)
    assert made.description == (
        "20 made-up inputs, 'colour': rows of 1 feature, standardised, 'signal': rows of 6 features, standardised"
    )
    assert [array.shape for array in made.arrays] == [(20,), (20, 6)]
    assert made.arrays[0].dtype == np.int32


def test_what_cannot_be_made_up_is_said() -> None:
    def refused(layer: Layer, *layers: tuple[Any, ...]) -> str:
        with pytest.raises(DataError) as caught:
            synthesise(three(layer, *layers))
        return str(caught.value)

    start = "No inputs can be made up for input 'image': "
    assert refused(entry((3,), dtype="complex64")) == start + "it takes complex numbers. Give inputs with --data."
    assert refused(entry((None,))) == start + "the size of its last axis is not known. Give inputs with --data."
    assert refused(entry((8, None))) == start + "the size of its last axis is not known. Give inputs with --data."
    assert refused(entry((8, 8, None))) == start + "the number of its channels is not known. Give inputs with --data."
    assert refused(entry((3,), dtype="string")) == (
        start + "it takes strings, and no layer tells which. Give inputs with --data."
    )
    unknown = Layer("image", "InputLayer", {"dtype": "float32"})
    assert refused(unknown) == start + "its shape is not known. Give inputs with --data."


def test_features_have_the_moments_of_a_normalisation() -> None:
    layers = [("Normalization", {"axis": [-1]}, {"mean": [100, 5], "variance": [9, 4]}), dense(4, 2)]
    values = synthesise(three(entry((2,)), *layers), rows=500).arrays[0]
    np.testing.assert_allclose(values.mean(0), [100, 5], rtol=0.01)
    np.testing.assert_allclose(values.std(0), [3, 2], rtol=0.01)


def test_moments_differ_from_source_to_source() -> None:
    sources = []
    for label, mean in (("a", 0), ("b", 50)):
        statistics = {"moving_mean": [mean, mean], "moving_variance": [1, 1]}
        sources.append(source(label, entry((2,)), ("BatchNormalization", {"axis": 1}, statistics), dense(4, 2)))
    values = synthesise(sources, rows=100).arrays[0]
    assert abs(values[::2].mean()) < 0.1
    assert abs(values[1::2].mean() - 50) < 0.1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (-1, 1)])
@pytest.mark.parametrize("rest", [0, 0.1])
def test_the_range_is_that_for_which_statistics_come_out(low: float, high: float, rest: float) -> None:
    """The statistics of a BatchNormalization behind the first convolution tell the range of the images."""
    images = low + (high - low) * patterns.images(np.random.default_rng(5), 200, (16, 16, 1))
    first = conv(2, 3, 1, 8)
    windows = np.lib.stride_tricks.sliding_window_view(images[..., 0], (3, 3), (1, 2))
    outputs = np.einsum("nhwij,ijf->nhwf", windows, first[2]["kernel"][:, :, 0])
    # After a short training a rest of where moving statistics start is left in them.
    statistics = {
        "moving_mean": (1 - rest) * outputs.mean((0, 1, 2)),
        "moving_variance": (1 - rest) * outputs.var((0, 1, 2)) + rest,
    }
    network = source("a", entry((16, 16, 1)), first, ("BatchNormalization", {"axis": -1}, statistics))
    made = synthesise([network, network], rows=200).arrays[0]
    assert abs(made.mean() - images.mean()) < 0.12 * (high - low)
    assert 0.7 < made.std() / images.std() < 1.4


def test_features_that_are_pixels_are_found_to_be_an_image() -> None:
    """The weights of neighbours in both directions are alike."""
    random = np.random.default_rng(0)
    kernel = patterns.smooth_noise(random, 64, (12, 10), 1, 1.5, 1.5).reshape(64, 120).T
    layer = ("Dense", {"units": 64}, {"kernel": kernel, "bias": np.zeros(64)})
    made = synthesise(three(entry((120,)), layer), rows=20)
    assert made.description == "20 made-up images (12, 10, 1), values 0 to 1"
    assert made.arrays[0].shape == (20, 120)


def test_tokens_end_in_padding_where_it_is_masked() -> None:
    def made(masked: bool) -> np.ndarray:
        layer = ("Embedding", {"input_dim": 9, "mask_zero": masked}, {"embeddings": np.zeros((9, 2))})
        return synthesise(three(entry((12,), dtype="int32"), layer), rows=300).arrays[0]

    values = made(True)
    assert values.min() == 0
    assert values.max() == 8
    assert (values[:, 0] > 0).all()
    ended = np.maximum.accumulate(values == 0, axis=1)
    assert (values[ended] == 0).all()
    assert 0.3 < (values > 0).all(1).mean() < 0.7
    assert (made(False)[:, 0] == 0).any()


def test_letters_are_one_hot_and_hold_what_first_layers_look_for() -> None:
    layer = conv(1, 8, 4, 2)
    word = np.eye(4)[[0, 1, 2, 3, 3, 2, 1, 0]] * 8
    layer[2]["kernel"][:] = word[..., None]
    values = synthesise(three(entry((60, 4)), layer), rows=200).arrays[0]
    assert set(np.unique(values)) == {0, 1}
    assert (values.sum(-1) == 1).all()
    windows = np.lib.stride_tricks.sliding_window_view(values, 8, 1)
    found = np.einsum("nscw,wc->ns", windows, word / 8).max(1)
    assert (found >= 7).mean() > 0.3


def test_large_inputs_are_made_in_smaller_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmerge.calibration.synthetic._LARGEST", 100 * 64)
    assert synthesise(three(entry((8, 8, 1)), conv(2, 3, 1)), rows=1000).rows == 100


def test_fewer_rows_are_usual_where_they_take_long_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three convolutions of 3×3 with 4 filters on 4×4 pixels: 3 * 2*2 * 9*4 = 432 multiply-adds without padding."""
    sources = three(None, conv(2, 3, 1))
    assert usual_rows(sources) == 2000
    monkeypatch.setattr("kmerge.calibration.inputs.MULTIPLY_ADDS", 20 * 432 + 5)
    monkeypatch.setattr("kmerge.calibration.inputs.LEAST_ROWS", 12)
    assert [usual_rows(sources), usual_rows(sources, 15), usual_rows([*sources, *sources])] == [20, 15, 12]
    assert synthesise(sources).rows == read_inputs(IMAGES, sources).rows == 20
    assert synthesise(sources, 25).rows == read_inputs(IMAGES, sources, 25).rows == 25


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (9, 70, 4), (130, 65, 3)])
def test_images_of_any_size_are_finite_and_in_range(shape: tuple[int, int, int]) -> None:
    values = patterns.images(np.random.default_rng(0), 13, shape)
    assert values.shape == (13, *shape)
    assert values.dtype == np.float32
    assert (values >= 0).all()
    assert (values <= 1).all()


@pytest.mark.parametrize("size", [1, 2, 33])
def test_other_patterns_are_finite_at_any_size(size: int) -> None:
    random = np.random.default_rng(0)
    assert np.isfinite(patterns.signals(random, 11, size, size)).all()
    assert np.isfinite(patterns.features(random, 11, size)).all()
    assert np.isfinite(patterns.volumes(random, 3, (size, 2, 3), 2)).all()
    assert set(np.unique(patterns.tokens(random, 11, size, size, True))) <= set(range(size))
    assert set(np.unique(patterns.letters(random, 11, size, 3))) <= {0, 1, 2}


@pytest.mark.parametrize("family", ["cnn", "lstm", "mlp"])
def test_inputs_are_made_up_for_files(family: str, fixtures_dir: Path) -> None:
    sources = [open_source(fixtures_dir / f"{family}_{label}.keras") for label in "abc"]
    what = {
        "cnn": "images (8, 8, 1), values 0 to 1",
        "lstm": "signals (8, 8), standardised",
        "mlp": "images (8, 8, 1), values 0 to 1",
    }[family]
    assert synthesise(sources, rows=30).description == f"30 made-up {what}"


def test_operations_at_the_input_rescale_it() -> None:
    graph = Graph(
        "model",
        (
            entry((8, 8, 1)),
            Layer("divide", "TrueDivide", {}, is_operation=True),
            Layer("subtract", "Subtract", {}, is_operation=True),
            Layer("conv", "Conv2D", {"filters": 1, "kernel_size": [3, 3]}),
        ),
        (
            Call(0),
            Call(1, {"args": [Ref(0), 255.0], "kwargs": {}}),
            Call(2, {"args": [Ref(1), 0.5], "kwargs": {}}),
            Call(3, {"args": [Ref(2)], "kwargs": {}}),
        ),
        Ref(0),
        Ref(3),
    )
    network = Source("a", "a", None, Kind.KERAS, 0, graph=graph, states=(State(),) * 4)
    (reading,) = evidence.readings(network, Ref(0))
    assert (reading.class_name, round(reading.scale * 255, 6), reading.offset) == ("Conv2D", 1, -0.5)
    assert synthesise([network, network], rows=9).description == "9 made-up images (8, 8, 1), values 0 to 255"
