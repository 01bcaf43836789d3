"""Tables with named columns: CSV, Parquet, and tables in memory, read by pyarrow block by block."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kmerge.data.entries import Entry
from kmerge.data.names import Names
from kmerge.data.streams import Streamed
from kmerge.errors import DataError, FormatError
from kmerge.methods.registry import Array

if TYPE_CHECKING:
    from kmerge.data.dataset import Dataset
    from kmerge.data.opening import Reading

ROWS = 4096
"""Rows of a block."""
_TEXT = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
_PARQUET = b"PAR1"
MOST_CLASSES = 100_000


def is_table(path: Path, head: bytes) -> bool:
    """Whether a file is Parquet by content, or CSV by its suffix."""
    zipped = head.startswith(b"\x1f\x8b") and path.name.lower().endswith(".gz")
    return head.startswith(_PARQUET) or (bool(_TEXT.search(path.name)) and (zipped or b"\0" not in head))


def is_available() -> bool:
    """Whether pyarrow is installed."""
    return find_spec("pyarrow") is not None


def open_table(files: Sequence[Path], name: str, names: Names, reading: Reading, where: str) -> Dataset:
    """Open tables in files, one after the other; in memory where they are small and needed again.

    Args:
        files: all of one kind, with the same columns.
        name: for people.
        names: what belongs to what.
        reading: which columns are the features, and which the labels.
        where: for errors: " in x.csv".

    Raises:
        DataError: the columns do not fit the network, or pyarrow is missing.
        FormatError: a file is damaged.
    """
    if not is_available():
        raise DataError(
            f"Tables such as {name} are read by pyarrow, which is not installed: pip install 'kmerge[data]'."
        )
    tables = [_Parquet(path) if _starts(path) == _PARQUET else _Text(path) for path in files]
    return _opened(tables, name, names, reading, where)


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_PARQUET))


def table_in_memory(data: Any, names: Names, reading: Reading, where: str) -> Dataset:
    """Open a table of pandas, polars or Arrow.

    Raises:
        DataError: the columns do not fit the network.
    """
    import pyarrow as arrow

    with _readable("The table"):
        table = _Memory(arrow.table(data))
    return _opened([table], "", names, reading, where)


def _opened(tables: Sequence[_Table], name: str, names: Names, reading: Reading, where: str) -> Dataset:
    columns = tables[0].columns
    for table in tables[1:]:
        if table.columns.keys() != columns.keys():
            other = next(iter(table.columns.keys() ^ columns.keys()))
            raise DataError(f"The tables{where} have different columns, such as '{other}': give one kind of table.")
    layout = _Layout(names, reading, columns, where)
    classes = _classes(tables, layout, where)
    known = next(iter(classes.values())) if len({tuple(c) for c in classes.values()}) == 1 else []

    def source(seed: int | None) -> Iterator[Any]:
        for table in tables:
            for block in table.blocks(layout.wanted):
                yield layout.batch(block, classes)

    stream = Streamed(names.entries, names, source, where, name, tuple(known))
    return stream.held() if reading.again else stream


# --------------------------------------------------------------------------------------------------- what columns are


class _Layout:
    """Which columns of a table are which input, and which are labels.

    Args:
        names: of the network.
        reading: what the user says of columns.
        columns: name to type of Arrow.
        where: for errors.
    """

    def __init__(self, names: Names, reading: Reading, columns: Mapping[str, Any], where: str) -> None:
        self.where, self.entries = where, names.entries
        chosen = set(reading.columns or ())
        beside: dict[str, dict[str, str | None]] = {"y": {}, "weights": {}}
        for name, (kind, head) in names.beside.items():
            if name in columns and name not in chosen:
                beside[kind][name] = head
        for label, column in reading.labels.items():
            if column not in columns:
                raise DataError(f"The table{where} has no column '{column}': expected one of {_listed(columns)}.")
            if names.targets and label not in names.labels:
                raise DataError(f"Labels are named for '{label}', which is no head: expected {_listed(names.labels)}.")
        self.labels: dict[str, str] = {}
        self.weights: dict[str, str] = {}
        if names.targets:
            for kind, into in (("y", self.labels), ("weights", self.weights)):
                for column, of in beside[kind].items():  # what is for all comes first
                    into |= dict.fromkeys(names.labels if of is None else (of,), column)
            self.labels |= reading.labels
        taken = {*beside["y"], *beside["weights"], *reading.labels.values()}
        features = [column for column in columns if column not in taken]
        if reading.columns is not None:
            missing = [column for column in reading.columns if column not in columns]
            if missing:
                raise DataError(f"The table{where} has no column '{missing[0]}': expected one of {_listed(columns)}.")
            features = list(reading.columns)
        self.inputs = self._inputs(features, columns, names)
        used = [column for group in self.inputs for column in group]
        for column in features:
            if column not in used:
                raise DataError(
                    f"The table{where} has a column '{column}', which belongs to no input: leave it out, or name the "
                    "columns to be read (finetune --columns)."
                )
        self.wanted = list(dict.fromkeys((*used, *self.labels.values(), *self.weights.values())))

    def _inputs(self, features: Sequence[str], columns: Mapping[str, Any], names: Names) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for column in features:
            number = names.numbers.get(column)
            if number is not None and (_is_list(columns[column]) or _size(self.entries[number]) in (1, None)):
                groups.setdefault(number, []).append(column)
        if not groups and len(self.entries) == 1:
            wanted = _size(self.entries[0])
            if wanted is not None and wanted != len(features):
                raise DataError(
                    f"The table{self.where} has {len(features)} columns that are no labels ({_listed(features)}), and "
                    f"input '{self.entries[0].name}' takes {wanted}: leave the others out, or name the columns to be "
                    "read, in the order of the training (finetune --columns)."
                )
            return [list(features)]
        for column in features:
            stem, underscore, place = column.rpartition("_")
            number = names.numbers.get(stem)
            if number is not None and underscore and place.isdigit() and number not in groups:
                parts = [c for c in features if c.rpartition("_")[0] == stem and c.rpartition("_")[2].isdigit()]
                groups[number] = sorted(parts, key=lambda c: int(c.rpartition("_")[2]))
        for number, entry in enumerate(self.entries):
            size = _size(entry)
            found = groups.get(number, [])
            single = len(found) == 1 and _is_list(columns[found[0]])
            if not found or (size not in (None, len(found)) and not single):
                expected = f"a column '{entry.name}'" if size in (1, None) else f"'{entry.name}_0' to '_{size - 1}'"
                raise DataError(
                    f"The table{self.where} has {len(found) or 'no'} columns for input '{entry.name}': expected "
                    f"{expected}."
                )
        return [groups[number] for number in range(len(self.entries))]

    def batch(
        self, block: Mapping[str, Any], classes: Mapping[str, Sequence[str]]
    ) -> tuple[Any, dict[str, Array], dict[str, Array]]:
        """Inputs by name, labels and sample weights by head, of one block."""
        inputs = {}
        for entry, group in zip(self.entries, self.inputs, strict=True):
            columns = [_values(block[name], entry.is_text, name, self.where) for name in group]
            whole = columns[0] if len(columns) == 1 else np.column_stack(columns)
            sizes = tuple(size or 1 for size in (entry.shape or (None, *whole.shape[1:]))[1:])
            flat = whole.reshape(len(whole), -1)
            inputs[entry.name] = flat.reshape(len(whole), *sizes) if flat.shape[1] == math.prod(sizes) else whole
        targets = {}
        for label, name in self.labels.items():
            if name in classes:
                numbers = {value: number for number, value in enumerate(classes[name])}
                found = [numbers[value] if value else -1 for value in block[name].to_pylist()]
                targets[label] = np.array(found, np.int64)
            else:
                targets[label] = _values(block[name], False, name, self.where)
        weights = {label: _values(block[name], False, name, self.where) for label, name in self.weights.items()}
        return inputs, targets, weights


def _size(entry: Entry) -> int | None:
    """How many values a row of an input has; None where that is free."""
    if entry.shape is None or None in entry.shape[1:]:
        return None
    return math.prod(size for size in entry.shape[1:] if size is not None)


def _listed(names: Any) -> str:
    shown = list(names)
    return ", ".join(map(str, shown[:12])) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _classes(tables: Sequence[_Table], layout: _Layout, where: str) -> dict[str, list[str]]:
    """The names of the classes of each column of labels that holds strings, sorted; read in a pass of its own."""
    text = [name for name in dict.fromkeys(layout.labels.values()) if _is_text(tables[0].columns[name])]
    found: dict[str, set[str]] = {name: set() for name in text}
    if text:
        for table in tables:
            for block in table.blocks(text):
                for name in text:
                    found[name] |= {value for value in block[name].unique().to_pylist() if value}
                    if len(found[name]) > MOST_CLASSES:
                        raise DataError(
                            f"Column '{name}'{where} holds more than {MOST_CLASSES:,} different strings: expected "
                            "labels."
                        )
    return {name: sorted(values) for name, values in found.items()}


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _values(column: Any, text: bool, name: str, where: str) -> Array:
    """A column of a block as an array; nulls are NaN."""
    import pyarrow as arrow
    from pyarrow import compute

    kind = column.type
    if _is_list(kind):
        rows = len(column)
        lengths = set(compute.list_value_length(column).to_pylist())
        if len(lengths) != 1 or None in lengths:
            raise DataError(f"Column '{name}'{where} holds lists of different lengths: bring all rows to one.")
        flat = _values(compute.list_flatten(column), text, name, where)
        return flat.reshape(rows, -1)
    if text or _is_text(kind):
        if not text:
            raise DataError(
                f"Column '{name}'{where} holds text: expected numbers. Leave it out, or name the columns to be read "
                "(finetune --columns)."
            )
        return np.array(column.to_pylist(), object)
    if not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind)):
        with _readable(f"Column '{name}'{where}"):
            column = column.cast(arrow.float64())  # decimals, and columns of nulls only
    return np.asarray(column.to_numpy(zero_copy_only=False), None if not column.null_count else np.float64)


# -------------------------------------------------------------------------------------------------- kinds of tables


@contextmanager
def _readable(what: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, TypeError) as error:
        raise FormatError(f"{what} cannot be read as a table ({' '.join(str(error).split())}).") from error


@dataclass
class _Table(ABC):
    """Something with columns, read block by block."""

    columns: Mapping[str, Any]

    @abstractmethod
    def blocks(self, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Some columns, block by block."""


def _by_name(schema: Any, what: str) -> dict[str, Any]:
    names = [str(field.name) for field in schema]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{what} has two columns '{twice}': give each a name of its own.")
    return {str(field.name): field.type for field in schema}


class _Memory(_Table):
    def __init__(self, table: Any) -> None:
        super().__init__(_by_name(table.schema, "The table"))
        self._table = table

    def blocks(self, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for batch in self._table.select(list(wanted)).to_batches(max_chunksize=ROWS):
            yield {name: batch.column(number) for number, name in enumerate(wanted)}


class _Parquet(_Table):
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        with _readable(path.name), parquet.ParquetFile(path) as file:
            super().__init__(_by_name(file.schema_arrow, path.name))
        self._path = path

    def blocks(self, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        from pyarrow import parquet

        with _readable(self._path.name), parquet.ParquetFile(self._path) as file:
            for batch in file.iter_batches(ROWS, columns=list(wanted)):
                yield {name: batch.column(batch.schema.get_field_index(name)) for name in wanted}


class _Text(_Table):
    """CSV: the first line has the names; commas, semicolons or tabs; an empty cell is a missing value."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _readable(path.name), self._reader() as reader:
            columns = _by_name(reader.schema, path.name)
        if columns and all(_is_number(name) for name in columns):
            raise DataError(
                f"The first line of {path.name} holds numbers: expected names of columns there, such as f0,f1,y."
            )
        # Types are told by the first block; what looks whole there may be a fraction later.
        self._types = {name: None if _is_text(kind) else "float64" for name, kind in columns.items()}
        super().__init__(columns)

    def _reader(self, wanted: Sequence[str] | None = None) -> Any:
        import pyarrow as arrow
        from pyarrow import csv

        with arrow.input_stream(str(self._path)) as stream:
            first = stream.read(1 << 16).split(b"\n", 1)[0]
        delimiter = max(",;\t", key=lambda sign: first.count(sign.encode()))
        types = {name: arrow.float64() if self._types[name] else arrow.string() for name in wanted or ()}
        convert = csv.ConvertOptions(
            # A class may be called NA or null; what is empty is missing all the same.
            column_types=types,
            include_columns=list(wanted) if wanted else None,
            strings_can_be_null=False,
        )
        return csv.open_csv(self._path, parse_options=csv.ParseOptions(delimiter=delimiter), convert_options=convert)

    def blocks(self, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        with _readable(self._path.name), self._reader(wanted) as reader:
            for batch in reader:
                yield {name: batch.column(number) for number, name in enumerate(wanted)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
