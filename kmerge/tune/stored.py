"""Arrays on disk that grow row by row, within a limit that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kmerge.errors import OutputError, PlanError
from kmerge.methods.registry import Array


@dataclass
class Budget:
    """Bytes on disk that are left to all stores of a training.

    Attributes:
        left: how many.
    """

    left: int

    def takes(self, nbytes: int) -> bool:
        """Whether so many are left; they are then taken."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True


class Rows(Protocol):
    """What gives some rows of a column as an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Any: ...


class Store:
    """Arrays that grow together, each in a file of a folder; strings as UTF-8 and where each begins.

    Args:
        folder: made where it is missing.
        budget: what they may take.
    """

    def __init__(self, folder: Path, budget: Budget) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._budget = folder, budget
        self._columns: dict[str, _Numbers | _Texts] = {}
        self._taken = 0
        self.rows = 0

    def append(self, arrays: Mapping[str, Array]) -> bool:
        """Add rows; false, and nothing is added, where they do not fit any more.

        Raises:
            PlanError: if rows have other shapes than those before.
            OutputError: if they cannot be written.
        """
        for name, array in arrays.items():
            if name not in self._columns:
                kind = _Texts if array.dtype.kind == "O" else _Numbers
                self._columns[name] = kind(self._folder / f"column_{len(self._columns)}", array.shape[1:], array.dtype)
            self._columns[name].check(array)
        nbytes = sum(self._columns[name].size(array) for name, array in arrays.items())
        if not self._budget.takes(nbytes):
            return False
        self._taken += nbytes
        try:
            for name, array in arrays.items():
                self._columns[name].append(array)
        except OSError as error:
            raise OutputError(
                f"What the sources gave cannot be kept in '{self._folder}': {error.strerror or error}. Make room, or "
                "keep less with --cache."
            ) from error
        self.rows += len(next(iter(arrays.values())))
        return True

    def columns(self) -> dict[str, Rows]:
        """All rows, by name, as they can be read in any order."""
        return {name: column.read(self.rows) for name, column in self._columns.items()}

    def remove(self) -> None:
        """Give back what they take."""
        for column in self._columns.values():
            column.remove()
        self._budget.left += self._taken
        self._taken = self.rows = 0


@dataclass
class _Numbers:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)

    def check(self, array: Array) -> None:
        if (array.shape[1:], array.dtype) != (self.shape, self.dtype):
            raise PlanError("The rows have different shapes: pad them to one, so that they can be learned from.")

    def size(self, array: Array) -> int:
        return array.nbytes

    def append(self, array: Array) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(array).tobytes())

    def read(self, rows: int) -> Rows:
        shape = (rows, *self.shape)
        return np.memmap(self.path, self.dtype, "r", shape=shape) if math.prod(shape) else np.zeros(shape, self.dtype)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass
class _Texts:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bytes_: _Numbers = field(init=False)
    ends: _Numbers = field(init=False)
    end: int = 0

    def __post_init__(self) -> None:
        self.bytes_ = _Numbers(self.path, (), np.dtype(np.uint8))
        self.ends = _Numbers(self.path.with_suffix(".ends"), (), np.dtype(np.int64))

    def check(self, array: Array) -> None:
        if array.shape[1:] != self.shape:
            raise PlanError("The rows have different shapes: pad them to one, so that they can be learned from.")

    def size(self, array: Array) -> int:
        return sum(len(str(text).encode()) + 8 for text in array.ravel())

    def append(self, array: Array) -> None:
        texts = [str(text).encode() for text in array.ravel()]
        ends = self.end + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self.bytes_.append(np.frombuffer(b"".join(texts), np.uint8))
        self.ends.append(ends)
        self.end = int(ends[-1]) if len(ends) else self.end

    def read(self, rows: int) -> Rows:
        return _ReadTexts(self.bytes_.read(self.end), self.ends.read(rows * math.prod(self.shape)), self.shape, rows)

    def remove(self) -> None:
        self.bytes_.remove()
        self.ends.remove()


@dataclass(frozen=True)
class _ReadTexts:
    """Rows of strings, decoded when they are asked for."""

    bytes_: Rows
    ends: Rows
    shape: tuple[int, ...]
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Any) -> Array:
        numbers = np.arange(self.rows)[rows]
        each = math.prod(self.shape)
        found = np.empty((len(numbers), each), object)
        for place, row in enumerate(numbers):
            for column in range(each):
                number = int(row) * each + column
                start = int(self.ends[number - 1]) if number else 0
                found[place, column] = bytes(self.bytes_[start : int(self.ends[number])]).decode()
        return found.reshape(len(numbers), *self.shape)
