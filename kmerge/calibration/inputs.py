"""Calibration inputs: what the user gives, checked against the network, and a sample of its rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.calibration.stored import Column, Held, open_stored
from kmerge.dialects.vocabulary import compute_dtype
from kmerge.errors import DataError, KmergeError, PlanError
from kmerge.graph import Ref, flatten
from kmerge.layout import source_graph
from kmerge.methods.registry import Array
from kmerge.rules import FEWEST_SAMPLES
from kmerge.shapes import Shape, infer_shapes
from kmerge.source import Source

ROWS = 2000
"""How many rows are drawn where nobody says."""
FEWEST = FEWEST_SAMPLES


@dataclass(frozen=True, eq=False)
class Inputs:
    """Calibration inputs, unlabelled.

    Attributes:
        arrays: one per input of the network, in the order of `flatten(graph.inputs)`, shapes (rows, ...), in the dtype
            of the input layer (float32 for bfloat16; objects, all `str`, for strings).
        owners: number of the source that each row was given for, shape (rows,); -1 where for all.
        synthetic: whether they are made up.
        description: for people: "400 of 60,000 inputs from x.npz".
    """

    arrays: tuple[Array, ...]
    owners: Array
    synthetic: bool = False
    description: str = ""

    @property
    def rows(self) -> int:
        return len(self.owners)

    def take(self, indices: Array) -> Inputs:
        """Some rows, in the given order."""
        return replace(self, arrays=tuple(array[indices] for array in self.arrays), owners=self.owners[indices])

    def batches(self, size: int) -> Iterator[tuple[Array, ...]]:
        """All rows in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, self.rows, size):
            yield tuple(array[start : start + size] for array in self.arrays)

    def split(self, share: float, seed: int) -> tuple[Inputs, Inputs]:
        """Two parts: what is used, and what is held back.

        Args:
            share: of the rows to hold back, between 0 and 1; the same share of each source's own rows. At least one
                row stands in either part where there are two.
            seed: of the draw.
        """
        random = generator(seed, "split")
        groups = [np.flatnonzero(self.owners == owner) for owner in np.unique(self.owners)]
        if self.rows > 1 and all(len(group) == 1 for group in groups):
            groups = [np.arange(self.rows)]
        held = np.zeros(self.rows, bool)
        for group in groups:
            count = min(max(round(share * len(group)), 1), len(group) - 1)
            held[random.permutation(group)[:count]] = True
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def generator(seed: int, address: str) -> np.random.Generator:
    """Random numbers that depend on a seed and on what they are for, and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{address}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


# ------------------------------------------------------------------------------------------ what a network takes


@dataclass(frozen=True)
class Entry:
    """One input of the network.

    Attributes:
        name: for people: its key where the inputs are a dictionary, else its layer's name.
        names: all names under which data may be given for it.
        shape: rows first; None for a free size, or for a shape that is not known.
        dtype: of the input layer; "string" too.
    """

    name: str
    names: frozenset[str]
    shape: Shape | None
    dtype: str

    @property
    def is_text(self) -> bool:
        return self.dtype == "string"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """In which the rows are handed on."""
        if self.is_text:
            return np.dtype(object)
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            return np.dtype(np.float32)
        # NumPy knows bfloat16 and smaller only where the package ml_dtypes is loaded.
        return dtype if dtype.kind in "biufc" else np.dtype(np.float32)


def entries(source: Source) -> tuple[Entry, ...]:
    """The inputs of a network, in the order of `flatten(graph.inputs)`."""
    graph = source_graph(source)
    shapes = infer_shapes(graph)
    found = []
    paths = _paths(graph.inputs)
    for number, (path, ref) in enumerate(paths):
        layer = graph.layer_of(ref)
        plain = {f"x{number}"} | ({"x"} if len(paths) == 1 else set())
        name = path if isinstance(graph.inputs, Mapping) else layer.name
        shape = shapes.get(Ref(ref.call, ref.output))
        found.append(Entry(name, frozenset({name, path, layer.name} | plain), shape, compute_dtype(layer.config)))
    assert [ref for _, ref in paths] == flatten(graph.inputs)
    return tuple(found)


def _paths(structure: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of a structure with the keys that lead to them: `("a/0", leaf)`; in Keras's order."""
    if isinstance(structure, Mapping):
        return [item for key in sorted(structure) for item in _paths(structure[key], f"{path}/{key}")]
    if isinstance(structure, (list, tuple)) and not _is_plain(structure):
        return [item for key, value in enumerate(structure) for item in _paths(value, f"{path}/{key}")]
    return [(path.removeprefix("/"), structure)]


# ---------------------------------------------------------------------------------------------------- reading


def read_inputs(data: Any, sources: Sequence[Source], samples: int | None = None, seed: int = 0) -> Inputs:
    """Draw calibration inputs from what the user gives.

    Args:
        data: a path (`.npz`, `.npy`), an array or tensor, a list of them by position or a dictionary by input, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, an iterable of batches that ends; or a dictionary of any of
            these by the labels of the sources, of each of which equally many rows are drawn. Of `(x, y)` and
            `(x, y, weights)` only `x` is read.
        sources: that are merged, with graphs; the inputs of the first decide.
        samples: how many rows to draw in all; default 2,000, or all where there are fewer.
        seed: of the draw.

    Returns:
        The rows, in the order in which they were given.

    Raises:
        DataError: the data do not fit the network.
        FormatError: a file is missing, damaged or something else.
        PlanError: `samples` is too small.
    """
    if samples is not None and (not isinstance(samples, int) or samples < FEWEST):
        raise PlanError(f"samples is {samples}: expected at least {FEWEST} rows.")
    samples = ROWS if samples is None else samples
    reader = _Reader(entries(sources[0]), tuple(source.label for source in sources))
    parts = reader.parts(data)
    if None in parts:
        drawn = reader.draw(parts[None], samples, generator(seed, "rows"), "")
        owners = np.full(len(drawn.arrays[0]), -1)
        return Inputs(drawn.arrays, owners, description=_described([drawn]))
    share = max(1, samples // len(sources))
    found = [
        reader.draw(parts[label], share, generator(seed, f"rows/{number}"), f" of '{label}'")
        for number, label in enumerate(reader.labels)
    ]
    rows = min(len(drawn.arrays[0]) for drawn in found)
    kept = []
    for number, drawn in enumerate(found):
        chosen = generator(seed, f"rows/{number}/kept").permutation(len(drawn.arrays[0]))[:rows]
        kept.append(replace(drawn, arrays=tuple(array[np.sort(chosen)] for array in drawn.arrays)))
    arrays = []
    for number, entry in enumerate(reader.entries):
        columns = [drawn.arrays[number] for drawn in kept]
        if len({column.shape for column in columns}) > 1:
            sizes = " and ".join(str(shape) for shape in sorted({column.shape[1:] for column in columns}))
            raise DataError(
                f"The data for input '{entry.name}' have rows of shapes {sizes} for different sources: bring them to "
                "one shape."
            )
        arrays.append(np.concatenate(columns))
    return Inputs(tuple(arrays), np.repeat(np.arange(len(sources)), rows), description=_described(kept))


@dataclass(frozen=True)
class _Drawn:
    """Rows drawn from one data set: of how many, and from which file."""

    arrays: tuple[Array, ...]
    total: int
    file: str


def _described(drawn: Sequence[_Drawn]) -> str:
    rows, total = len(drawn[0].arrays[0]) * len(drawn), sum(part.total for part in drawn)
    text = f"{rows:,} inputs" if rows == total else f"{rows:,} of {total:,} inputs"
    files = list(dict.fromkeys(part.file for part in drawn if part.file))
    if len(files) > 3:
        files = [f"{len(files)} files"]
    if files:
        text += " from " + " and ".join(filter(None, (", ".join(files[:-1]), files[-1])))
    return text if len(drawn) == 1 else f"{text}, {rows // len(drawn):,} for each source"


class _Reader:
    """Reads data for the inputs of one network."""

    def __init__(self, entries: tuple[Entry, ...], labels: tuple[str, ...]) -> None:
        self.entries, self.labels = entries, labels
        self.numbers = {name: number for number, entry in enumerate(entries) for name in entry.names}
        self.expected = ", ".join(entry.name for entry in entries)

    # ---------------------------------------------------------------------------------- what belongs to whom

    def parts(self, data: Any) -> dict[str | None, Any]:
        """The data per label; under None what is for all sources."""
        file = ""
        if isinstance(data, (str, os.PathLike)):
            file = Path(data).name
            data = open_stored(data)
        if not isinstance(data, Mapping):
            return {None: _From(data, file) if file else data}
        data = self._without_targets(data)
        if self._fits(data):
            return {None: _From(data, file)}
        parts: dict[str | None, Any] = {}
        if data and data.keys() <= set(self.labels):
            parts = {label: _From(value, file) if file else value for label, value in data.items()}
        elif data and all(any(key.startswith(f"{label}/") for label in self.labels) for key in data):
            for label in self.labels:
                own = {key.removeprefix(f"{label}/"): v for key, v in data.items() if key.startswith(f"{label}/")}
                if own:
                    parts[label] = _From(own, file)
        missing = [label for label in self.labels if label not in parts]
        if parts and missing:
            raise DataError(
                f"There are data for {_listed(list(map(str, parts)))} but none for '{missing[0]}': give some for every "
                "source, or one data set for all."
            )
        return parts or {None: _From(data, file)}

    def _without_targets(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        """A dictionary without the targets of a training, `y`, `y_<label>`."""
        known = self.numbers.keys() | set(self.labels)
        targets = {"y", *(f"y_{label}" for label in self.labels)} - known
        return {str(key): value for key, value in data.items() if str(key) not in targets}

    def _fits(self, data: Mapping[str, Any]) -> bool:
        """Whether a dictionary holds something for each input and nothing else."""
        found = [self.numbers.get(key) for key, _ in _paths(data)]
        return sorted(number for number in found if number is not None) == list(range(len(self.entries))) and (
            None not in found
        )

    # --------------------------------------------------------------------------------------------- drawing

    def draw(self, data: Any, count: int, random: np.random.Generator, where: str) -> _Drawn:
        """Rows of one data set.

        Args:
            data: the data set.
            count: how many rows at most.
            random: where from.
            where: for errors: "", or " of 'a'".
        """
        file = ""
        if isinstance(data, (str, os.PathLike)):
            data = _From(open_stored(data), Path(data).name)
        if isinstance(data, _From):
            data, file = data.data, data.file
        inside = f"{where} in {file}" if file else where
        given = self._columns(data, inside)
        if given is not None:
            arrays, total = self._sample(given, count, random, inside)
        else:
            arrays, total = self._stream(_batches(data, inside), count, random, inside)
        for array, entry in zip(arrays, self.entries, strict=True):
            _check_finite(array, entry, inside)
        return _Drawn(tuple(arrays), total, file)

    def _columns(self, data: Any, where: str) -> list[Column] | None:
        """Data that stand whole: one column per input; None where they come in batches."""
        if isinstance(data, tuple):
            inner = _without_labels(data, len(self.entries))
            data = inner if self._is_whole(inner) else data
        return [_column(value, where) for value in self._leaves(data, where)] if self._is_whole(data) else None

    def _is_whole(self, data: Any) -> bool:
        if isinstance(data, Mapping) or _is_array(data) or _is_plain(data):
            return True
        fits = isinstance(data, (list, tuple)) and len(data) == len(self.entries)
        return fits and all(_is_array(item) or _is_plain(item) or _is_path(item) for item in data)

    def _leaves(self, data: Any, where: str) -> list[Any]:
        """The data of each input, from a structure of them."""
        if isinstance(data, Mapping):
            found: dict[int, Any] = {}
            for key, value in _paths(self._without_targets(data)):
                number = self.numbers.get(key)
                if number is None:
                    raise DataError(
                        f"The data{where} hold '{key}', which is no input of the network: expected {self.expected}"
                        f"{self._plain_names()}."
                    )
                if number in found:
                    raise DataError(
                        f"The data{where} hold input '{self.entries[number].name}' under two names: leave one out."
                    )
                found[number] = value
            for number, entry in enumerate(self.entries):
                if number not in found:
                    raise DataError(f"The data{where} hold nothing for input '{entry.name}': expected {self.expected}.")
            return [found[number] for number in range(len(self.entries))]
        leaves = [leaf for _, leaf in _paths(data)] if isinstance(data, (list, tuple)) else [data]
        if len(leaves) != len(self.entries):
            have = "one array" if len(leaves) == 1 else f"{len(leaves)} arrays"
            takes = f"one input ({self.expected})" if len(self.entries) == 1 else f"{len(self.entries)} inputs"
            raise DataError(
                f"The data{where} hold {have}, and the network takes {takes}: give "
                + ("one array." if len(self.entries) == 1 else f"a dictionary with {self.expected}.")
            )
        return leaves

    def _plain_names(self) -> str:
        if len(self.entries) == 1:
            return " (or x)"
        return f" (or x0 to x{len(self.entries) - 1})"

    def _sample(
        self, columns: Sequence[Column], count: int, random: np.random.Generator, where: str
    ) -> tuple[list[Array], int]:
        shapes = [
            _fitted(column.shape, entry, where, False) for column, entry in zip(columns, self.entries, strict=True)
        ]
        total = self._rows(shapes, where)
        if total < FEWEST:
            raise _too_few(total, where)
        rows = np.arange(total)
        if total > count:
            rows = np.sort(random.choice(total, count, replace=False))
        arrays = [
            _converted(column.take(rows).reshape(len(rows), *shape[1:]), entry, where)
            for column, shape, entry in zip(columns, shapes, self.entries, strict=True)
        ]
        return arrays, total

    def _rows(self, shapes: Sequence[tuple[int, ...]], where: str) -> int:
        for entry, shape in zip(self.entries[1:], shapes[1:], strict=True):
            if shape[0] != shapes[0][0]:
                raise DataError(
                    f"The data{where} hold {shapes[0][0]:,} rows for input '{self.entries[0].name}' but {shape[0]:,} "
                    f"for '{entry.name}': expected equally many."
                )
        return shapes[0][0]

    def _stream(
        self, batches: Iterable[Any], count: int, random: np.random.Generator, where: str
    ) -> tuple[list[Array], int]:
        """Rows of a stream, each with the same chance (Vitter's algorithm R), whatever the sizes of its batches."""
        kept: list[tuple[int, list[Array]]] = []
        total = 0
        for batch in batches:
            leaves = self._leaves(_without_labels(batch, len(self.entries)), where)
            found = [_as_array(leaf, where) for leaf in leaves]
            shapes = [_fitted(a.shape, entry, where, True) for a, entry in zip(found, self.entries, strict=True)]
            rows = self._rows(shapes, where)
            numbers = np.arange(total, total + rows)
            slots = np.where(numbers < count, numbers, (random.random(rows) * (numbers + 1)).astype(np.int64))
            chosen = np.flatnonzero(slots < count)
            total += rows
            new = [
                _converted(array[chosen].reshape(len(chosen), *shape[1:]), entry, where)
                for array, shape, entry in zip(found, shapes, self.entries, strict=True)
            ]
            if kept:
                self._check_sizes(kept[0][1], new, where)
            for place, row in enumerate(chosen):
                # Copies, so that no batch stays in memory.
                item = (int(numbers[row]), [array[place : place + 1].copy() for array in new])
                if numbers[row] < count:
                    kept.append(item)
                else:
                    kept[slots[row]] = item
        if total < FEWEST:
            raise _too_few(total, where)
        kept.sort(key=lambda item: item[0])
        return [np.concatenate(column) for column in zip(*(arrays for _, arrays in kept), strict=True)], total

    def _check_sizes(self, before: Sequence[Array], new: Sequence[Array], where: str) -> None:
        for entry, first, second in zip(self.entries, before, new, strict=True):
            if first.shape[1:] != second.shape[1:]:
                raise DataError(
                    f"The batches for input '{entry.name}'{where} have rows of shapes {first.shape[1:]} and "
                    f"{second.shape[1:]}: pad them to one."
                )


@dataclass(frozen=True, eq=False)
class _From:
    """Data with the name of the file that they come from."""

    data: Any
    file: str


def _too_few(total: int, where: str) -> DataError:
    if not total:
        return DataError(f"The data{where} hold no rows: expected at least {FEWEST}.")
    rows = "1 row" if total == 1 else f"{total} rows"
    return DataError(
        f"The data{where} hold {rows}, too few to calibrate on and to hold some back: give at least {FEWEST}, better "
        "some hundreds."
    )


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


# ------------------------------------------------------------------------------------------------ what things are


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_array(value: Any) -> bool:
    """Whether something is an array or tensor of any library."""
    return hasattr(value, "__array__") or isinstance(value, Column)


def _is_plain(value: Any) -> bool:
    """Whether something is numbers, strings, or nested lists of them."""
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
    return isinstance(value, (bool, int, float, complex, str, bytes)) or (
        isinstance(value, (list, tuple)) and not len(value)
    )


def _as_array(value: Any, where: str) -> Array:
    """An array from a tensor of any library, or from nested lists."""
    for name in ("detach", "cpu"):  # PyTorch
        if hasattr(value, "__array__") and callable(getattr(value, name, None)):
            value = getattr(value, name)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    try:
        return np.asarray(value)
    except Exception as error:
        raise DataError(
            f"The data{where} cannot be read as an array ({type(error).__name__}: {error}): give arrays, with all rows "
            "of one shape."
        ) from error


def _column(value: Any, where: str) -> Column:
    if _is_path(value):
        stored = open_stored(value)
        if isinstance(stored, Mapping):
            raise DataError(f"{Path(value).name} is an .npz: give a .npy for one input, or the .npz for all of them.")
        return stored
    return value if isinstance(value, Column) else Held.of(_as_array(value, where))


def _without_labels(batch: Any, num_inputs: int) -> Any:
    """The inputs of `x`, `(x,)`, `(x, y)` or `(x, y, weights)`."""
    if not isinstance(batch, (tuple, list)) or not batch or _is_plain(batch):
        return batch
    if num_inputs > 1 and len(batch) == num_inputs and not any(isinstance(x, (Mapping, list, tuple)) for x in batch):
        return batch
    return batch[0] if len(batch) <= 3 else batch


def _batches(data: Any, where: str) -> Iterator[Any]:
    """The batches of a data set, by index where it says how many it has."""
    if hasattr(data, "num_batches") and hasattr(data, "__getitem__"):  # keras.utils.PyDataset
        last, batches = data.num_batches, _by_number(data)
    elif hasattr(data, "__iter__"):
        cardinality = getattr(data, "cardinality", None)  # of a tf.data.Dataset
        last, batches = (None if callable(cardinality) and int(cardinality()) == -1 else 0), data
    else:
        raise DataError(
            f"The data{where} are a {type(data).__name__}: expected a path, an array, a dictionary of arrays, a data "
            "set or an iterable of batches."
        )
    if last is None:
        raise DataError(f"The data{where} never end: give a data set without repetition, or a part of it.")
    try:
        yield from batches
    except KmergeError:
        raise
    except Exception as error:
        raise DataError(f"Reading the data{where} failed ({type(error).__name__}: {error}).") from error


def _by_number(data: Any) -> Iterator[Any]:
    for number in range(data.num_batches):
        yield data[number]


# ------------------------------------------------------------------------------------------------------- checks


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape[1:], wanted[1:], strict=True))


def _fitted(shape: tuple[int, ...], entry: Entry, where: str, batch: bool) -> tuple[int, ...]:
    """The shape as the network takes it: a missing last axis of size 1 is added.

    Raises:
        DataError: if it does not fit.
    """
    wanted = entry.shape
    if shape and (wanted is None or _fits(shape, wanted)):
        if 0 in shape[1:]:
            raise DataError(f"The data for input '{entry.name}'{where} have shape {shape}: they hold no values.")
        return shape
    if shape and wanted and wanted[-1] == 1 and len(wanted) > 1 and _fits((*shape, 1), wanted):
        return (*shape, 1)
    sizes = ", ".join(["rows", *("any" if size is None else str(size) for size in (wanted or ())[1:])])
    sizes += "," if "," not in sizes else ""
    what = "batch" if batch else "data"
    raise DataError(
        f"The {what} for input '{entry.name}'{where} {'has' if batch else 'have'} shape {shape}, expected ({sizes}). "
        f"{_remedy(shape, wanted or (), batch)}"
    )


def _remedy(shape: tuple[int, ...], wanted: Shape, batch: bool) -> str:
    if _fits((1, *shape), wanted):
        return "These are single rows: batch them first." if batch else "This is one row: give many, rows first."
    if len(shape) > 1 and shape[-1] == 1 and _fits(shape[:-1], wanted):
        return "Leave out the last axis: x[..., 0]."
    if len(shape) == len(wanted) > 2:
        last = len(shape) - 1
        if _fits((shape[0], *shape[2:], shape[1]), wanted):
            return "Bring the channels to the end: np.moveaxis(x, 1, -1)."
        if _fits((shape[0], shape[last], *shape[1:last]), wanted):
            return "Bring the channels to the front: np.moveaxis(x, -1, 1)."
        for order in permutations(range(1, len(shape))):
            if _fits((shape[0], *(shape[axis] for axis in order)), wanted):
                return f"Bring the axes into order: np.transpose(x, {(0, *order)})."
    known = [size for size in wanted[1:] if size is not None]
    if shape and len(known) == len(wanted) - 1 and np.prod(known) == np.prod(shape[1:]):
        return f"Reshape them: x.reshape({', '.join(map(str, (-1, *known)))})."
    return "Prepare them as for the training of the models."


def _converted(array: Array, entry: Entry, where: str) -> Array:
    """The rows in the input layer's dtype, values unchanged."""
    what = f"The data for input '{entry.name}'{where}"
    if entry.is_text:
        return _texts(array, what)
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 and smaller, of the package ml_dtypes
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        held = {"O": "Python objects", "U": "strings", "S": "strings", "T": "strings"}.get(array.dtype.kind)
        raise DataError(f"{what} are {held or array.dtype}: expected numbers, with all rows of one shape.")
    dtype = entry.numpy_dtype
    if array.dtype.kind == "c" and dtype.kind != "c":
        raise DataError(f"{what} are complex numbers: expected {dtype}.")
    if dtype.kind in "biu" and array.dtype.kind != "b" and array.dtype != dtype:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        whole = array.dtype.kind in "iu" or bool(np.all(array == np.floor(array)))
        if not whole or array.min() < low or array.max() > high:
            raise DataError(
                f"{what} are {array.dtype} and not all whole numbers from {low} to {high}: expected {dtype}."
            )
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _texts(array: Array, what: str) -> Array:
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    if array.dtype.kind not in "OUST" or not all(isinstance(item, str) for item in flat):
        raise DataError(f"{what} are {array.dtype}: expected strings.")
    result = np.empty(len(flat), object)
    result[:] = flat
    return result.reshape(array.shape)


def _check_finite(array: Array, entry: Entry, where: str) -> None:
    if array.dtype.kind in "fc":
        bad = int(np.count_nonzero(~np.isfinite(array).reshape(len(array), -1).all(1)))
        if bad:
            raise DataError(
                f"The data for input '{entry.name}'{where} hold NaN or infinity in {bad:,} of {len(array):,} rows: "
                "leave these rows out, or fill them as for the training of the models."
            )
