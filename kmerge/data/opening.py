"""Anything that users give as data, as one data set for one network."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.data.checks import as_array, is_path
from kmerge.data.columns import Column, Held, open_stored
from kmerge.data.dataset import Dataset, Indexed, generator
from kmerge.data.entries import Entry
from kmerge.data.images import open_images
from kmerge.data.names import Names
from kmerge.data.records import is_record, open_records
from kmerge.data.streams import Streamed
from kmerge.data.tables import is_available, is_table, open_table, table_in_memory
from kmerge.errors import DataError, FormatError
from kmerge.store.rawio import special, why_unreadable


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        targets: whether labels and sample weights are read; else they are left out.
        again: whether the data will be passed over more than once.
        columns: of a table, by name: the features of a network with one input; None for all that are not labels.
        labels: of a table, by head: the column with its labels; beside the columns `y` and `y_<label>`.
        pixels: lowest and highest value of the pixels of image files; None for 0 to 255 where the network rescales its
            input itself, else 0 to 1.
    """

    targets: bool = True
    again: bool = True
    columns: Sequence[str] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    pixels: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class From:
    """Data with the name of the file that they come from."""

    data: Any
    file: str


def open_dataset(
    data: Any, network: Sequence[Entry], labels: Sequence[str], reading: Reading | None = None, where: str = ""
) -> Dataset:
    """Open what users give as data.

    Args:
        data: a path: `.npz`, `.npy`, a table (`.csv`, `.tsv`, `.parquet`), a folder of images (a folder per class, or
            unlabelled), `.tfrecord`, each told by content where it can be, or a folder with several of one kind. Or
            arrays or tensors of any library: one, a list of them by input, a dictionary by name; a table in memory
            (pandas, polars, Arrow); of these also `(x, y)` and `(x, y, weights)`. Or batches: a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a grain data set or loader, a PyTorch loader, any iterable, or a function that
            gives an iterator. Inputs stand under their names, `x`, or `x0`, `x1` and so on; labels under `y` for all
            heads or `y_<label>`; sample weights under `weights` or `weights_<label>`.
        network: the inputs of the network, from `entries`.
        labels: of its heads.
        reading: how; by default with labels, for several passes.
        where: for errors: "" or " of 'a'".

    Raises:
        DataError: the data do not fit the network.
        FormatError: a file is missing, damaged or something else.
    """
    reading = reading or Reading()
    names = Names(network, labels, reading.targets)
    file = ""
    if is_path(data):
        data = From(stored(data, names, reading), Path(data).name)
    if isinstance(data, From):
        data, file = data.data, data.file
        where += f" in {file}" if file else ""
    if isinstance(data, Dataset):
        return data
    if _is_table(data) and is_available():
        return table_in_memory(data, names, reading, where)
    if names.is_whole(data):
        parts = names.parts(data, where)
        return Indexed(
            names.entries,
            tuple(_column(value, where) for value in parts.inputs),
            {label: _column(value, where) for label, value in parts.targets.items()},
            {label: _column(value, where) for label, value in parts.weights.items()},
            where,
            file,
        )
    stream = Streamed(names.entries, names, _source(data, where, reading.again), where, file)
    if reading.again and isinstance(data, Iterator):
        return _kept(stream)
    return stream


def open_parts(
    data: Any, network: Sequence[Entry], labels: Sequence[str], reading: Reading | None = None
) -> dict[str | None, Dataset]:
    """Open data that may be given per head: a dictionary of anything by label, or a file with `<label>/<input>`.

    Returns:
        The data sets by label, of the labels that data are given for; under None one for all.

    Raises:
        DataError, FormatError: as `open_dataset`.
    """
    reading = reading or Reading()
    names = Names(network, labels, reading.targets)
    file = ""
    if is_path(data):
        file, data = Path(data).name, stored(data, names, reading)
    parts = names.divided(data)
    return {
        label: open_dataset(
            From(part, file) if file else part, network, labels, reading, f" of '{label}'" if label else ""
        )
        for label, part in parts.items()
    }


def _kept(stream: Streamed) -> Dataset:
    held = stream.held()
    if held is stream:
        raise DataError(
            f"The data{stream.where} are an iterator, which can be passed over once only, and too large to be kept in "
            "memory, or empty: give a function that makes one, for each pass."
        )
    return held


# --------------------------------------------------------------------------------------------------------- files


def stored(path: Any, names: Names, reading: Reading) -> Dataset | Column | Mapping[str, Column]:
    """What stands under a path, told by content where it can be.

    Returns:
        A data set; of an `.npy` its array and of an `.npz` its arrays by name, unread.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder(path, names, reading)
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path} is a {special(mode)}: expected a file with inputs.")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
    found = _of_kind(_kind(path, head), [path], path.name, names, reading)
    return open_stored(path) if found is None else found


def _kind(path: Path, head: bytes) -> str:
    """ "table", "records" or "": by content, and for text by the suffix."""
    if is_table(path, head):
        return "table"
    return "records" if is_record(path, head) else ""


def _of_kind(kind: str, files: list[Path], name: str, names: Names, reading: Reading) -> Dataset | None:
    where = f" in {name}"
    if kind == "table":
        return open_table(files, name, names, reading, where)
    if kind == "records":
        return open_records(files, name, names, reading, where)
    return None


def _folder(path: Path, names: Names, reading: Reading) -> Dataset:
    files = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith((".", "_")))
    heads = {file: _head(file) for file in files}
    kinds = {_kind(file, head) for file, head in heads.items()}
    if len(kinds) == 1 and kinds != {""}:
        found = _of_kind(kinds.pop(), files, path.name, names, reading)
        assert found is not None
        return found
    return open_images(path, names, reading, f" in {path.name}")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


# --------------------------------------------------------------------------------------------------------- memory


def _column(value: Any, where: str) -> Column:
    if is_path(value):
        found = open_stored(value)
        if isinstance(found, Mapping):
            raise DataError(f"{Path(value).name} is an .npz: give a .npy for one input, or the .npz for all of them.")
        return found
    return value if isinstance(value, Column) else Held.of(as_array(value, where))


def _is_table(data: Any) -> bool:
    """Whether something is a table with named columns, of any library that speaks Arrow."""
    return hasattr(data, "__arrow_c_stream__") and (hasattr(data, "columns") or hasattr(data, "column_names"))


def _source(data: Any, where: str, again: bool) -> Callable[[int | None], Iterator[Any]]:
    """What makes the batches of a pass, by number where the data say how many they have."""
    if hasattr(data, "num_batches") and hasattr(data, "__getitem__"):  # keras.utils.PyDataset
        if data.num_batches is None:
            raise _endless(where)
        return lambda seed: _by_number(data, seed)
    if hasattr(data, "__iter__"):
        cardinality = getattr(data, "cardinality", None)  # of a tf.data.Dataset
        if callable(cardinality) and int(cardinality()) == -1:
            raise _endless(where)
        return lambda seed: iter(data)
    if callable(data) and not isinstance(data, type):
        return lambda seed: iter(data())
    raise DataError(
        f"The data{where} are a {type(data).__name__}: expected a path, an array, a dictionary of arrays, a data "
        "set or an iterable of batches."
    )


def _endless(where: str) -> DataError:
    return DataError(f"The data{where} never end: give a data set without repetition, or a part of it.")


def _by_number(data: Any, seed: int | None) -> Iterator[Any]:
    numbers = np.arange(data.num_batches)
    for number in numbers if seed is None else generator(seed, "batches").permutation(numbers):
        yield data[int(number)]
