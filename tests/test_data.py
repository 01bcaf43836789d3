"""Data: what is opened, what belongs to what, how it comes in batches, and what is refused."""

from __future__ import annotations

import gzip
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge.data import Batch, Dataset, Entry, Reading, entries, open_dataset, open_parts, row_digests
from kmerge.data import columns as columns_module
from kmerge.data import streams as streams_module
from kmerge.data.records import _checksum, _records
from kmerge.errors import DataError, FormatError, UnsafeFileError
from kmerge.source import open_source

FEATURES = (Entry("features", frozenset({"features", "x", "x0"}), (None, 3), "float32"),)
PAIR = (
    Entry("colour", frozenset({"colour", "x0"}), (None,), "int32"),
    Entry("signal", frozenset({"signal", "x1"}), (None, 2), "float32"),
)
LABELS = ("a", "b")
X = np.arange(60, dtype=np.float32).reshape(20, 3)
Y = np.arange(20)


def opened(data: Any, network: tuple[Entry, ...] = FEATURES, **reading: Any) -> Dataset:
    return open_dataset(data, network, LABELS, Reading(**reading))


def whole(dataset: Dataset, size: int = 7, **options: Any) -> Batch:
    """All rows of a pass as one batch."""
    return streams_module.concatenated(list(dataset.batches(size, **options)))


def rows_of(dataset: Dataset, **options: Any) -> list[int]:
    return [int(value) // 3 for value in whole(dataset, **options).inputs[0][:, 0]]


def message(data: Any, network: tuple[Entry, ...] = FEATURES, **reading: Any) -> str:
    with pytest.raises((DataError, FormatError)) as caught:
        whole(opened(data, network, **reading))
    return str(caught.value)


def pieces(*arrays: np.ndarray, size: int = 6) -> list[Any]:
    return [tuple(array[start : start + size] for array in arrays) for start in range(0, 20, size)]


class Numbered:
    """Batches by number, as a `keras.utils.PyDataset` and a grain MapDataset give them."""

    num_batches = 4

    def __getitem__(self, number: int) -> Any:
        return pieces(X, Y)[number]


# ---- what belongs to what


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (X, {}),
        ((X, Y), {"a": Y, "b": Y}),
        ((X, {"a": Y}), {"a": Y}),
        ((X, {"a": Y, "b": None}), {"a": Y}),
        ((X, {"y_b": Y + 1, "a": Y}), {"a": Y, "b": Y + 1}),
        ((X, [Y, Y + 1]), {"a": Y, "b": Y + 1}),
        ((X, Y.tolist()), {"a": Y, "b": Y}),
        ({"x": X, "y": Y, "y_b": Y + 1}, {"a": Y, "b": Y + 1}),
        ({"features": X, "y_a": Y}, {"a": Y}),
        (pieces(X, Y), {"a": Y, "b": Y}),
        ([{"x": x, "y_b": y} for x, y in pieces(X, Y)], {"b": Y}),
        (iter(pieces(X, Y)), {"a": Y, "b": Y}),
        (lambda: iter(pieces(X, Y)), {"a": Y, "b": Y}),
        (lambda: ([x, y] for x, y in pieces(X, Y)), {"a": Y, "b": Y}),
        (Numbered(), {"a": Y, "b": Y}),
    ],
    ids=range(15),
)
def test_labels_find_their_heads(data: Any, expected: dict[str, np.ndarray]) -> None:
    dataset = opened(data)
    for _ in range(2):  # and again
        batch = whole(dataset)
        np.testing.assert_array_equal(batch.inputs[0], X)
        assert batch.targets.keys() == expected.keys()
        for label, values in expected.items():
            np.testing.assert_array_equal(batch.targets[label], values)


def test_labels_are_left_out_where_they_are_not_wanted() -> None:
    for data in ((X, "no labels"), {"x": X, "y": np.zeros(3)}, pieces(X, Y)):
        assert whole(opened(data, targets=False)).targets == {}


def test_sample_weights_find_their_heads() -> None:
    weight = np.linspace(0, 1, 20)
    for data in ((X, Y, weight), {"x": X, "y": Y, "weights": weight}, pieces(X, Y, weight)):
        found = whole(opened(data)).weights
        assert {label: array.dtype.name for label, array in found.items()} == {"a": "float32", "b": "float32"}
        np.testing.assert_allclose(found["a"], weight, rtol=1e-6)
    assert whole(opened((X, Y, {"b": weight}))).weights.keys() == {"b"}
    assert message((X, Y, -weight)).startswith("The sample weights of 'a' have shape (7,) and type float64: expected")


def test_missing_labels_pass_through_untouched() -> None:
    fractions = np.where(Y % 3 == 0, np.nan, Y)
    numbers = np.where(Y % 3 == 0, -1, Y)
    nothing = [None if value % 3 == 0 else int(value) for value in Y]
    for labels, expected in ((fractions, fractions), (numbers, numbers), (np.array(nothing, object), fractions)):
        np.testing.assert_array_equal(whole(opened((X, {"a": labels}))).targets["a"], expected)


def test_labels_that_some_batches_lack_are_missing_there() -> None:
    first, second, *_ = pieces(X, Y, Y / 2)
    batches = [(first[0], {"a": first[1]}), (second[0], {"b": second[2]})]
    batch = whole(opened(batches), 12)
    assert batch.targets["a"].tolist() == [*first[1], *[-1] * 6]
    np.testing.assert_array_equal(batch.targets["b"], [*[np.nan] * 6, *second[2]])
    assert [sorted(part.targets) for part in opened(batches).batches(6)] == [["a"], ["b"]]


def test_several_inputs_find_their_place() -> None:
    colour, signal = Y, X[:, :2]
    for data in (
        [colour, signal],
        ([colour, signal], Y),
        ({"signal": signal, "colour": colour}, Y),
        {"x0": colour, "x1": signal, "y": Y},
        [({"signal": s, "colour": c}, y) for c, s, y in pieces(colour, signal, Y)],
    ):
        batch = whole(opened(data, PAIR))
        np.testing.assert_array_equal(batch.inputs[0], colour)
        np.testing.assert_array_equal(batch.inputs[1], signal)
        assert [array.dtype.name for array in batch.inputs] == ["int32", "float32"]


def test_data_per_head_are_opened_one_by_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X[:5], y=Y[:5])
    found = open_parts({"a": (X, Y), "b": tmp_path / "x.npz"}, FEATURES, LABELS)
    assert {label: part.rows for label, part in found.items()} == {"a": 20, "b": 5}
    assert open_parts({"b": (X, Y)}, FEATURES, LABELS).keys() == {"b"}
    assert open_parts((X, Y), FEATURES, LABELS).keys() == {None}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((X, Y[:9]), "The data hold 20 rows for input 'features' but 9 for the labels of 'a': expected equally many."),
        ((X, {"c": Y}), "The data hold labels for 'c', which is no head of the model: expected a, b."),
        (
            (X, np.array(["cat"] * 20)),
            "The labels of 'a' are strings: expected numbers, for classes their numbers from 0 on.",
        ),
        ({"x": X, "z": Y}, "The data hold 'z', which is no input of the network: expected features (or x)."),
        (
            np.where(X == 4, np.inf, X),
            "The data for input 'features' hold NaN or infinity in 1 of 7 rows: leave these rows out, or fill them as "
            "for the training of the models.",
        ),
        (
            iter(()),
            "The data are an iterator, which can be passed over once only, and too large to be kept in memory, or "
            "empty: give a function that makes one, for each pass.",
        ),
        (
            object(),
            "The data are a object: expected a path, an array, a dictionary of arrays, a data set or an iterable of "
            "batches.",
        ),
    ],
    ids=range(7),
)
def test_data_that_do_not_fit(data: Any, expected: str) -> None:
    assert message(data) == expected


# ---- passes


KINDS: dict[str, Any] = {
    "arrays": (X, Y),
    "stream": lambda: iter(pieces(X, Y)),
    "numbered": Numbered(),
}


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 25), seed=st.none() | st.integers(0, 3), start=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_same_arguments_give_the_same_batches(kind: str, size: int, seed: int | None, start: int) -> None:
    dataset = opened(KINDS[kind])
    batches = list(dataset.batches(size, seed))
    assert [batch.rows for batch in batches[:-1]] == [size] * (-(-20 // size) - 1)
    rows = [int(row) for batch in batches for row in batch.targets["a"]]
    assert sorted(rows) == list(range(20))
    assert seed is not None or rows == list(range(20))
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs[0][:, 0], 3 * batch.targets["b"])
    rest = [int(row) for batch in dataset.batches(size, seed, start) for row in batch.targets["a"]]
    assert rest == rows[start * size :]


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_give_different_orders(kind: str) -> None:
    orders = {tuple(rows_of(opened(KINDS[kind]), seed=seed)) for seed in range(5)}
    assert len(orders) == 5


def test_orders_are_the_same_on_every_platform() -> None:
    assert rows_of(opened((X, Y)), seed=1) == [4, 17, 1, 0, 15, 9, 8, 3, 7, 6, 14, 11, 16, 10, 13, 18, 12, 19, 5, 2]


@pytest.mark.parametrize("kind", KINDS)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 5), size=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_splits_are_disjoint_and_the_same_in_each_pass(kind: str, share: float, seed: int, size: int) -> None:
    used, held = opened(KINDS[kind]).split(share, seed)
    rows = [[int(row) for batch in part.batches(4) for row in batch.targets["a"]] for part in (used, held)]
    assert sorted(rows[0] + rows[1]) == list(range(20))
    for part, expected in zip((used, held), rows, strict=True):
        assert [int(r) for batch in part.batches(size) for r in batch.targets["a"]] == expected
        assert sorted(int(r) for batch in part.batches(size, seed=2) for r in batch.targets["a"]) == expected
        inner = [[int(r) for b in piece.batches(3) for r in b.targets["a"]] for piece in part.split(0.5, seed)]
        assert sorted(inner[0] + inner[1]) == expected


def test_a_stream_is_shuffled_beyond_its_batches_and_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "BUFFER", 200)
    passes = []

    def stream() -> Iterator[Any]:
        passes.append(0)
        for number in range(1000):
            passes[-1] = number
            yield np.full((1, 3), 3 * number)

    dataset = opened(stream)
    batches = dataset.batches(10, seed=1)
    first = next(batches).inputs[0][:, 0] / 3
    assert passes[-1] < 230
    assert first.max() > 50
    rows = [*first.astype(int), *(int(value) // 3 for batch in batches for value in batch.inputs[0][:, 0])]
    assert sorted(rows) == list(range(1000))
    assert np.corrcoef(rows, range(1000))[0, 1] < 0.99


def test_what_start_leaves_out_is_not_read() -> None:
    class Counted(columns_module.Column):
        shape = (20, 3)
        read: list[int] = []  # noqa: RUF012

        def take(self, rows: np.ndarray) -> np.ndarray:
            self.read.extend(rows.tolist())
            return X[rows]

    column = Counted()
    assert rows_of(opened({"x": column}), start=2) == list(range(14, 20))
    assert column.read == list(range(14, 20))


def test_descriptions(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    assert opened(tmp_path / "x.npy").description == "20 rows of x.npy"
    assert opened(X[:1]).description == "1 row"
    assert opened(pieces(X, Y)).description == "a stream of batches"


# ---- .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_an_npz_is_read_in_any_order(
    save: Any, order: Any, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns_module, "_IN_MEMORY", limit)
    monkeypatch.setattr(columns_module, "BLOCK", 50)
    save(tmp_path / "x.npz", x=np.asarray(X, order=order), y_a=Y)
    dataset = opened(tmp_path / "x.npz")
    batch = whole(dataset, seed=3)
    np.testing.assert_array_equal(batch.inputs[0][:, 0], 3 * batch.targets["a"])
    assert rows_of(dataset, seed=3) == rows_of(opened((X, Y)), seed=3)
    assert dataset.description == "20 rows of x.npz"


def test_hostile_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    data = (tmp_path / "x.npy").read_bytes()
    huge = data.replace(b"(20, 3), }" + b" " * 9, b"(99999999999, 3), }")
    assert len(huge) == len(data)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.npz"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", huge)
        assert message(path) == f"'x' in {path.name} is cut short: 1,199,999,999,748 bytes are missing. Write it again."
        # The same with a zip that lies as well.
        raw = path.read_bytes()
        path.write_bytes(raw.replace(struct.pack("<I", len(huge)), struct.pack("<I", 0xFFFFFFF0)))
        assert "than there can be" in message(path) or "cannot be read" in message(path)
    np.savez(tmp_path / "p.npz", x=X, y=np.array([{}] * 20, object))
    with pytest.raises(UnsafeFileError, match="pickled"):
        opened(tmp_path / "p.npz")


# ---- tables


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_columns_of_a_csv_are_features_but_for_the_labels(tmp_path: Path) -> None:
    lines = ["f0,f1,f2,y_a,y", *(f"{3 * n},{3 * n + 1}.0,{3 * n + 2},{n if n % 2 else ''},{n}" for n in range(20))]
    path = write_csv(tmp_path / "x.csv", "\n".join(lines))
    dataset = opened(path)
    batch = whole(dataset)
    np.testing.assert_array_equal(batch.inputs[0], X)
    np.testing.assert_array_equal(batch.targets["a"], np.where(Y % 2, Y, np.nan))
    np.testing.assert_array_equal(batch.targets["b"], Y)
    assert dataset.description == "20 rows of x.csv"
    assert rows_of(dataset, seed=1) == rows_of(opened(X), seed=1)  # small, so held and put into any order
    (tmp_path / "x.tsv").write_text(path.read_text().replace(",", "\t"))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(path.read_text().replace(",", ";").encode()))
    for name in ("x.tsv", "x.csv.gz"):
        np.testing.assert_array_equal(whole(opened(tmp_path / name)).inputs[0], X)


def test_columns_can_be_named(tmp_path: Path) -> None:
    lines = ["id,p,q,r,kind,n", *(f"{n},{3 * n},{3 * n + 1},{3 * n + 2},{['dog', 'cat'][n % 2]},{n}" for n in Y)]
    path = write_csv(tmp_path / "x.csv", "\n".join(lines))
    dataset = opened(path, columns=["p", "q", "r"], labels={"a": "kind", "b": "n"})
    batch = whole(dataset)
    np.testing.assert_array_equal(batch.inputs[0], X)
    assert dataset.classes == ("cat", "dog")
    assert batch.targets["a"].tolist() == [1 - n % 2 for n in Y]
    assert batch.targets["b"].tolist() == Y.tolist()
    reverse = whole(opened(path, columns=["r", "q", "p"]))
    np.testing.assert_array_equal(reverse.inputs[0], X[:, ::-1])
    assert message(path) == (
        "The table in x.csv has 6 columns that are no labels (id, p, q, r, kind, n), and input 'features' takes 3: "
        "leave the others out, or name the columns to be read, in the order of the training (finetune --columns)."
    )
    assert message(path, columns=["p", "q", "kind"]) == (
        "Column 'kind' in x.csv holds text: expected numbers. Leave it out, or name the columns to be read "
        "(finetune --columns)."
    )
    assert message(path, columns=["p", "z"]) == (
        "The table in x.csv has no column 'z': expected one of id, p, q, r, kind, n."
    )


def test_parquet_and_tables_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    table = arrow.table({"signal": X[:, :2].tolist(), "colour": Y, "y_b": arrow.array([None, *Y[1:].tolist()])})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=6)
    wide = arrow.table({"signal_1": X[:, 1], "signal_0": X[:, 0], "colour": Y, "y_b": table["y_b"]})
    monkeypatch.setattr(streams_module, "HELD_BYTES", 0)
    for data in (tmp_path / "x.parquet", table, wide):
        batch = whole(opened(data, PAIR))
        np.testing.assert_array_equal(batch.inputs[0], Y)
        np.testing.assert_array_equal(batch.inputs[1], X[:, :2])
        np.testing.assert_array_equal(batch.targets["b"], [np.nan, *Y[1:]])
    assert message(wide.drop_columns(["colour"]), PAIR) == (
        "The table has no columns for input 'colour': expected a column 'colour'."
    )
    extra = wide.append_column("id", arrow.array(Y))
    assert message(extra, PAIR) == (
        "The table has a column 'id', which belongs to no input: leave it out, or name the columns to be read "
        "(finetune --columns)."
    )
    assert whole(opened(extra, PAIR, columns=["colour", "signal_0", "signal_1"])).rows == 20


def test_weights_and_classes_of_tables(tmp_path: Path) -> None:
    kinds = ["NA", "EU", "", "null"]
    lines = ["f0,f1,f2,y,weights", *(f"{n},{n},{n},{kinds[n % 4]},{n / 2}" for n in range(8))]
    dataset = opened(write_csv(tmp_path / "x.csv", "\n".join(lines)))
    batch = whole(dataset)
    assert batch.targets["a"].tolist() == [1, 0, -1, 2] * 2  # EU, NA, null; what is empty is missing
    assert dataset.classes == ("EU", "NA", "null")
    np.testing.assert_array_equal(batch.weights["a"], np.arange(8) / 2)
    assert rows_of(opened(tmp_path / "x.csv", targets=False))
    # A column that is asked for is a feature, whatever it is called.
    assert whole(opened(tmp_path / "x.csv", columns=["f0", "f1", "weights"])).weights == {}


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    for number in range(2):
        lines = ["f0,f1,f2", *(",".join(map(str, row)) for row in X[10 * number : 10 * number + 10])]
        write_csv(tmp_path / f"part-{number}.csv", "\n".join(lines))
    np.testing.assert_array_equal(whole(opened(tmp_path)).inputs[0], X)
    write_csv(tmp_path / "part-2.csv", "f0,f1,z\n1,2,3")
    assert "have different columns, such as '" in message(tmp_path)


def test_tables_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(write_csv(tmp_path / "x.csv", "1,2,3\n4,5,6")) == (
        "The first line of x.csv holds numbers: expected names of columns there, such as f0,f1,y."
    )
    assert message(write_csv(tmp_path / "x.csv", "f,f,g\n4,5,6")).startswith("x.csv has two columns 'f'")
    assert message(write_csv(tmp_path / "x.csv", "f,g,h\n4,5")).startswith("x.csv cannot be read as a table (")
    assert message(write_csv(tmp_path / "x.csv", "")).startswith("x.csv cannot be read as a table (")
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(50))
    assert message(tmp_path / "x.parquet").startswith("x.parquet cannot be read as a table (")
    assert message(write_csv(tmp_path / "x.csv", "f,g,h\n4,5,")).startswith(
        "The data for input 'features' in x.csv hold NaN or infinity in 1 of 1 rows"
    )
    monkeypatch.setattr("kmerge.data.tables.find_spec", lambda name: None)
    assert message(tmp_path / "x.csv") == (
        "Tables such as x.csv are read by pyarrow, which is not installed: pip install 'kmerge[data]'."
    )


# ---- images


def image_entry(*shape: int | None, scaled: bool = False, dtype: str = "float32") -> tuple[Entry, ...]:
    return (Entry("image", frozenset({"image", "x"}), (None, *shape), dtype, scaled),)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, count in (("dogs", 3), ("cats", 2)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (9, 7, 3), np.uint8)
            encode = (tf.io.encode_jpeg, tf.io.encode_png)[number % 2]
            (folder / name / f"{number}{('.jpg', '.PNG')[number % 2]}").write_bytes(encode(pixels).numpy())
    return folder


def test_images_are_what_keras_makes_of_them(photos: Path) -> None:
    import keras

    theirs = keras.utils.image_dataset_from_directory(
        photos, image_size=(5, 6), batch_size=5, shuffle=False, verbose=False
    )
    pixels, numbers = next(iter(theirs))
    dataset = opened(photos, image_entry(5, 6, 3, scaled=True))
    batch = whole(dataset)
    np.testing.assert_allclose(batch.inputs[0], pixels, atol=1e-4)
    assert batch.targets["a"].tolist() == np.asarray(numbers).tolist() == [0, 0, 1, 1, 1]
    assert dataset.classes == ("cats", "dogs")
    assert dataset.description == f"5 rows of {photos.name}"
    small = whole(opened(photos, image_entry(5, 6, 3))).inputs[0]
    np.testing.assert_allclose(small, np.asarray(pixels) / 255, atol=1e-6)
    signed = whole(opened(photos, image_entry(3, 5, 6), pixels=(-1, 1))).inputs[0]
    np.testing.assert_allclose(signed, np.moveaxis(np.asarray(pixels) / 127.5 - 1, -1, 1), atol=1e-5)
    whole_numbers = whole(opened(photos, image_entry(5, 6, 3, dtype="uint8"))).inputs[0]
    np.testing.assert_array_equal(whole_numbers, np.rint(np.asarray(pixels)))
    assert whole(opened(photos, image_entry(None, None, 1))).inputs[0].shape == (5, 9, 7, 1)


def test_images_without_classes_have_no_labels(photos: Path) -> None:
    batch = whole(opened(photos / "dogs", image_entry(5, 6, 3)))
    assert (batch.rows, batch.targets) == (3, {})


def test_folders_that_are_no_images(photos: Path, tmp_path: Path) -> None:
    assert message(photos) == (
        f"The data in {photos.name} are images, and input 'features' takes rows of shape (3,): expected height, "
        "width and 1, 3 or 4 channels. Give arrays."
    )
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("meow")
    assert message(tmp_path, image_entry(5, 6, 3)).startswith("cats/notes.txt is no image: expected .bmp, .gif, ")
    (tmp_path / "cats" / "notes.txt").unlink()
    (tmp_path / "cats" / "1.png").write_bytes(b"meow")
    assert message(tmp_path, image_entry(5, 6, 3)) == "cats/1.png is no JPEG, PNG, GIF or BMP."
    png = next(photos.glob("*/*.PNG")).read_bytes()
    (tmp_path / "cats" / "1.png").write_bytes(png[:16] + struct.pack(">II", 1 << 17, 1 << 17) + png[24:])
    assert "declares 131,072 × 131,072 pixels, more than the 134,217,728 that are read" in message(
        tmp_path, image_entry(5, 6, 3)
    )
    frame = b"," + struct.pack("<HHHH", 0, 0, 8000, 8000) + b"\x80" + bytes(6) + b"\x02\x01\x00\x00"
    gif = b"GIF89a" + struct.pack("<HH", 8000, 8000) + b"\x80\0\0" + bytes(6) + b"!\xf9\x01\x00\x00" + 3 * frame
    (tmp_path / "cats" / "1.png").write_bytes(gif)
    assert "declares 192,000,000 pixels in all of its frames" in message(tmp_path, image_entry(5, 6, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kmerge.data.images.MOST_BYTES", 10)
        assert "more than 10: scale it down" in message(tmp_path, image_entry(5, 6, 3))
    (tmp_path / "cats" / "1.png").write_bytes(png[:60])
    assert message(tmp_path, image_entry(5, 6, 3)).startswith("cats/1.png cannot be read as an image (")


# ---- TFRecord


def record(**features: Any) -> bytes:
    import tensorflow as tf

    kinds = {bytes: ("bytes_list", tf.train.BytesList), float: ("float_list", tf.train.FloatList)}
    found = {}
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        kind, make = kinds.get(type(values[0]), ("int64_list", tf.train.Int64List))
        found[name] = tf.train.Feature(**{kind: make(value=values)})
    return bytes(tf.train.Example(features=tf.train.Features(feature=found)).SerializeToString())


def write_records(path: Path, records: list[bytes], compression: str | None = None) -> Path:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for item in records:
            writer.write(item)
    return path


@pytest.mark.parametrize("compression", [None, "GZIP"])
def test_records_are_read_by_names(compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        record(x=row.tolist(), y_a=int(n), id=b"-", **({} if n % 4 else {"y_b": float(n), "weights_b": float(n)}))
        for n, row in zip(Y, X, strict=True)
    ]
    path = write_records(tmp_path / "x.bin", made, compression)
    for limit in (0, 1 << 20):
        monkeypatch.setattr(streams_module, "HELD_BYTES", limit)
        dataset = opened(path)
        assert dataset.description == "20 rows of x.bin"
        batch = whole(dataset)
        np.testing.assert_array_equal(batch.inputs[0], X)
        np.testing.assert_array_equal(batch.targets["a"], Y)
        np.testing.assert_array_equal(batch.targets["b"], np.where(Y % 4, np.nan, Y))
        np.testing.assert_array_equal(batch.weights["b"], np.where(Y % 4, 1, Y))


def test_no_pipeline_of_records_is_tuned(tmp_path: Path) -> None:
    paths = [write_records(tmp_path / f"{number}.bin", [record(x=[1.0])]) for number in range(2)]
    for files in (paths[:1], paths):
        assert _records(files).batch(2).options().autotune.enabled is False


def test_records_hold_images_pixels_and_tensors(photos: Path, tmp_path: Path) -> None:
    import tensorflow as tf

    entry = image_entry(5, 6, 3)
    images = [file.read_bytes() for file in sorted(photos.glob("*/*"))]
    path = write_records(tmp_path / "x.tfrecord", [record(image=data) for data in images])
    np.testing.assert_array_equal(whole(opened(path, entry)).inputs[0], whole(opened(photos, entry)).inputs[0])
    values = np.arange(90, dtype=np.float32).reshape(5, 6, 3)
    for data in (
        values.astype(np.uint8).tobytes(),
        values.tobytes(),
        tf.io.serialize_tensor(values.astype(np.float64)).numpy(),
    ):
        path = write_records(tmp_path / "x.tfrecord", [record(image=data)])
        np.testing.assert_array_equal(whole(opened(path, entry)).inputs[0][0], values)


def test_a_tensor_that_declares_more_than_it_holds_is_never_made(tmp_path: Path) -> None:
    import tensorflow as tf

    proto = tf.make_tensor_proto(np.ones(2, np.float32))
    proto.ClearField("tensor_content")
    proto.float_val.append(1.0)
    proto.tensor_shape.CopyFrom(tf.TensorShape([1 << 40]).as_proto())
    path = write_records(tmp_path / "x.tfrecord", [record(x=proto.SerializeToString())])
    assert message(path).startswith("A record in x.tfrecord holds a tensor of shape (1099511627776,) for input")
    free = (Entry("x", frozenset({"x"}), (None, None), "float32"),)
    assert "and all of its values" in message(path, free)


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.tfrecord", [record(x=row.tolist()) for row in X])
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    assert message(path) == "Record 19 of x.tfrecord is cut short or longer than a gigabyte."
    length = struct.pack("<Q", 1 << 50)
    path.write_bytes(length + struct.pack("<I", _checksum(length)) + b"x")
    assert message(path) == "Record 0 of x.tfrecord is cut short or longer than a gigabyte."
    path.write_bytes(data[:40] + b"\0" + data[41:])
    assert "x.tfrecord" in message(path)
    write_records(path, [b"no example"])
    assert message(path).startswith("The records in x.tfrecord are no tf.train.Example (")
    write_records(path, [record(z=1.0)])
    assert message(path) == (
        "The records in x.tfrecord have no feature for input 'features': expected one of features, x, x0, "
        "and they have z."
    )
    write_records(path, [record(x=[1.0, 2.0])])
    assert message(path).startswith("Reading the data in x.tfrecord failed (InvalidArgumentError: ")


# ---- other libraries


def test_data_sets_of_keras_and_tensorflow() -> None:
    import keras
    import tensorflow as tf

    class Rows(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return pieces(X, Y)[index]

    stored = tf.data.Dataset.from_tensor_slices((X, {"a": Y}))
    for data in (Rows(), stored.batch(6), (tf.constant(X), tf.constant(Y))):
        for _ in range(2):
            batch = whole(opened(data))
            np.testing.assert_array_equal(batch.inputs[0], X)
            np.testing.assert_array_equal(batch.targets["a"], Y)


@pytest.mark.parametrize("library", ["torch", "grain", "pandas", "polars"])
def test_data_of_other_libraries(library: str) -> None:
    module: Any = pytest.importorskip(library, reason=f"{library} is not installed")
    data: Any
    if library == "torch":
        from torch.utils.data import DataLoader, TensorDataset

        data = DataLoader(TensorDataset(module.tensor(X), module.tensor(Y)), batch_size=6)
    elif library == "grain":
        data = module.MapDataset.source(list(zip(X, Y, strict=True))).batch(6)
    else:
        columns: dict[str, Any] = {f"f{n}": X[:, n] for n in range(3)}
        data = module.DataFrame({**columns, "y": Y})
    for _ in range(2):
        batch = whole(opened(data))
        np.testing.assert_array_equal(batch.inputs[0], X)
        np.testing.assert_array_equal(batch.targets["b"], Y)


def test_entries_tell_whether_a_network_rescales_by_itself(fixtures_dir: Path) -> None:
    entry = entries(open_source(fixtures_dir / "cnn_a.keras"))[0]
    assert (entry.shape, entry.scaled) == ((None, 8, 8, 1), False)


# ---- rows told by what they hold


def shuffling(data: list[np.ndarray]) -> Any:
    """Batches that come in another order in each pass, as of a PyTorch loader with shuffle=True."""
    random = np.random.default_rng(0)

    def source() -> Iterator[np.ndarray]:
        rows = random.permutation(np.concatenate(data))
        return iter(np.split(rows, range(50, len(rows), 50)))

    return source


def test_rows_that_are_held_back_stay_so_where_the_source_shuffles_by_itself() -> None:
    used, held = opened(shuffling([np.arange(3000, dtype=np.float32).reshape(1000, 3)])).split(0.2, 0)
    first, second = (set(rows_of(held)) for _ in range(2))
    assert first == second
    assert 150 < len(first) < 250
    for seed in (None, 1):
        assert set(rows_of(used, seed=seed)) == set(range(1000)) - first
    assert set(rows_of(opened(shuffling([X])).split(0.5, 1)[1])) != set(
        rows_of(opened(shuffling([X])).split(0.5, 2)[1])
    )


def test_rows_that_are_others_in_each_pass_cannot_be_held_back() -> None:
    random = np.random.default_rng(0)
    used, held = opened(lambda: iter([random.normal(size=(50, 3)) for _ in range(4)])).split(0.2, 0)
    list(used.batches(16))
    with pytest.raises(DataError, match=r"other rows in each pass.*--validation-split 0"):
        list(held.batches(16))
    # A loader that leaves out its last rows, which are others each time, has the same rows all the same.
    rows = 3 * np.repeat(np.arange(200.0), 3).reshape(200, 3)
    used, held = opened(lambda: iter(np.split(random.permutation(rows), 8)[:7])).split(0.2, 0)
    assert not set(rows_of(used)) & set(rows_of(held))


def test_text_and_numbers_both_tell_a_row() -> None:
    texts = np.array(["a", "ab", "a"], object)
    first = row_digests((texts, np.array([1, 1, 1])))
    assert first[0] == first[2] != first[1]
    assert (row_digests((texts, np.array([1, 1, 2])))[:2] == first[:2]).all()
    assert row_digests((texts, np.array([1, 1, 2])))[2] != first[2]
    split = row_digests((np.array([["a", "bc"]], object),)), row_digests((np.array([["ab", "c"]], object),))
    assert split[0][0] != split[1][0]


def test_shuffling_changes_no_array_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "BUFFER", 5)
    labels = Y.copy()
    batches = [(X[start : start + 5], labels[start : start + 5]) for start in range(0, 20, 5)]
    for seed in range(3):
        batch = whole(opened(batches), 5, seed=seed)
        np.testing.assert_array_equal(batch.inputs[0][:, 0], 3 * batch.targets["a"])
    np.testing.assert_array_equal(labels, Y)
