"""Sources that teach: read once, and what they give kept on disk as far as it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kmerge.data import Batch, generator
from kmerge.errors import MergeError, PlanError
from kmerge.live import one_line, quiet
from kmerge.methods.registry import Array
from kmerge.tune.heads import Head, ending_of, logits_of
from kmerge.tune.processes import Processes
from kmerge.tune.workers import predicted

BATCH = 256
"""Rows that teachers are run on at a time."""
SAMPLE = 2000
"""Rows from which the spread of a teacher's values is told."""


class Passes(Protocol):
    """What can be passed over again and again: a data set, or one with what was taught."""

    @property
    def rows(self) -> int | None: ...

    @property
    def description(self) -> str: ...

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]: ...


class Enriching(Passes, Protocol):
    """Given rows, and made ones after them, of which each pass takes some."""

    @property
    def given(self) -> int: ...

    @property
    def taken(self) -> int: ...


def features_name(label: str) -> str:
    """Under which name the features of a source's trunk are taught."""
    return f"{label}/features"


@dataclass(eq=False)
class Teachers:
    """Live sources, and what they are asked for.

    Attributes:
        models: one per source; its outputs are what is taught, in the order of `names`.
        names: of what each of them teaches.
        processes: of which this is one; each asks the sources by itself.
    """

    models: Sequence[Any]
    names: Sequence[tuple[str, ...]]
    processes: Processes = Processes()  # noqa: RUF009

    def of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """What they give on a batch: by the name of the output, shapes (rows, ...)."""
        found: dict[str, Array] = {}
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        for model, names in zip(self.models, self.names, strict=True):
            try:
                with quiet(), self.processes.alone():
                    alone = self.processes.engine == "tensorflow"
                    outputs = predicted(model, given) if alone else model.predict_on_batch(given)
            except Exception as error:
                raise MergeError(f"Keras cannot run the source of '{names[0]}': {one_line(error)}.") from error
            listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            for name, value in zip(names, listed, strict=True):
                found[name] = np.asarray(value, np.float32)
                if not np.isfinite(found[name]).all():
                    raise MergeError(f"The source of '{name}' gives NaN or infinity: check the inputs and this source.")
        return found


def make_teachers(
    models: Mapping[str, Any],
    heads: Sequence[Head],
    shapes: Sequence[Any],
    features: Mapping[str, str],
    processes: Processes,
) -> Teachers:
    """Sources ready to teach.

    Args:
        models: live copies by label; their last activations are taken off.
        heads: of the model that learns.
        shapes: of its outputs, rows first.
        features: name of the layer whose output is taught too, by label.
        processes: of which this is one.

    Raises:
        PlanError: if a source does not fit the heads.
    """
    import keras

    found, names = [], []
    for label, model in models.items():
        own = [head for head in heads if head.label == label]
        if len(model.outputs) != len(own):
            raise PlanError(
                f"The source '{label}' has {len(model.outputs)} outputs, and the model has {len(own)} heads of that "
                "label: give the sources that the model was merged from."
            )
        for head, tensor in zip(own, model.outputs, strict=True):
            if tuple(tensor.shape[1:]) != tuple(shapes[head.place][1:]):
                raise PlanError(
                    f"The source '{label}' gives {tuple(tensor.shape[1:])} per row, but the head '{head.name}' gives "
                    f"{tuple(shapes[head.place][1:])}: give the sources in the order of the heads, or by label."
                )
            if ending_of(tensor) != head.ending:
                raise PlanError(
                    f"The source '{label}' ends in {ending_of(tensor) or 'no softmax or sigmoid'}, but the head "
                    f"'{head.name}' in {head.ending or 'none'}: give the sources that the model was merged from."
                )
        outputs = [logits_of(tensor) for tensor in model.outputs]
        taught = [head.name for head in own]
        if label in features:
            layer = _find(model, features[label])
            if layer is None:
                raise PlanError(
                    f"The source '{label}' has no layer '{features[label]}', where its trunk ends: leave features out."
                )
            outputs.append(layer.output)
            taught.append(features_name(label))
        teacher = keras.Model(model.inputs[0] if len(model.inputs) == 1 else model.inputs, outputs)
        teacher.compile(jit_compile=False)
        found.append(teacher)
        names.append(tuple(taught))
    return Teachers(found, names, processes)


def _find(model: Any, name: str) -> Any:
    for layer in model.layers:
        if layer.name == name:
            return layer
    return None


def spread(teachers: Teachers, data: Passes, seed: int) -> dict[str, float]:
    """The variance of what the teachers give, each entry centred, on some rows."""
    rows: dict[str, list[Array]] = {}
    seen = 0
    for batch in data.batches(BATCH, seed):
        for name, values in teachers.of(batch.inputs).items():
            rows.setdefault(name, []).append(values)
        seen += len(batch.inputs[0])
        if seen >= SAMPLE:
            break
    found = {}
    for name, parts in rows.items():
        values = np.concatenate(parts).astype(np.float64)
        found[name] = max(float(np.mean(np.square(values - values.mean(0)))), 1e-12)
    return found


# ------------------------------------------------------------------------------------------------- what they taught


def taught(
    data: Passes, teachers: Teachers, folder: Path, limit: int, seed: int, more: Enriching | None = None
) -> Passes:
    """Data with what the teachers give as targets.

    Where rows and targets fit into `limit` bytes, both are kept on disk, so that each pass may have an order of its
    own; with `more`, rows made of pairs too. Where they do not, passes have one order, and of it as many targets are
    kept as fit.
    """
    if more is not None:
        kept = _keep(more, teachers, folder, limit)
        if kept is not None:
            return replace(kept, given=more.given, taken=more.taken)
    kept = _keep(data, teachers, folder, limit)
    return kept if kept is not None else Streamed(data, teachers, folder, limit, seed)


def _keep(data: Passes, teachers: Teachers, folder: Path, limit: int) -> Kept | None:
    store = _Store(folder)
    try:
        for batch in data.batches(BATCH):
            if any(array.dtype.kind == "O" for array in batch.inputs):
                return _in_memory(data, teachers)
            values = teachers.of(batch.inputs)
            arrays = {**{f"{number}": array for number, array in enumerate(batch.inputs)}, **values}
            per_row = sum(array.nbytes for array in arrays.values()) / len(batch.inputs[0])
            if max(store.rows + len(batch.inputs[0]), data.rows or 0) * per_row > limit:
                store.close()
                return None
            store.append(arrays)
        if not store.rows:
            raise PlanError("There are no rows to learn from.")
        columns = store.columns()
    finally:
        store.close()
    names = [name for group in teachers.names for name in group]
    inputs = tuple(columns[str(number)] for number in range(len(columns) - len(names)))
    return Kept(inputs, {name: columns[name] for name in names}, data.description)


def _in_memory(data: Passes, teachers: Teachers) -> Kept:
    inputs: list[tuple[Array, ...]] = []
    values: list[dict[str, Array]] = []
    for batch in data.batches(BATCH):
        inputs.append(batch.inputs)
        values.append(teachers.of(batch.inputs))
    arrays = tuple(np.concatenate(column) for column in zip(*inputs, strict=True))
    return Kept(arrays, {name: np.concatenate([v[name] for v in values]) for name in values[0]}, data.description)


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows and targets that can be read in any order.

    Attributes:
        inputs, targets, description: of all rows.
        given: how many of them, the first ones, are given; None for all.
        taken: how many of the others each pass takes.
    """

    inputs: tuple[Array, ...]
    targets: Mapping[str, Array]
    description: str
    given: int | None = None
    taken: int = 0

    @property
    def rows(self) -> int:
        return len(self.inputs[0]) if self.given is None else self.given + self.taken

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """One pass: without a seed, the given rows in their order."""
        order = self._order(seed)
        for first in range(start * size, len(order), size):
            rows = order[first : first + size]
            yield Batch(
                tuple(np.asarray(array[rows]) for array in self.inputs),
                {name: np.asarray(array[rows]) for name, array in self.targets.items()},
                {},
            )

    def _order(self, seed: int | None) -> Array:
        every = len(self.inputs[0])
        given = every if self.given is None else self.given
        if seed is None:
            return np.arange(given)
        random = generator(seed, "pass")
        if given == every:
            return random.permutation(every)
        made = given + random.choice(every - given, self.taken, replace=False)
        return random.permutation(np.concatenate([np.arange(given), made]))


class _Store:
    """Arrays that grow row by row, each in a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.rows = 0

    def append(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            if name not in self._files:
                self._paths[name] = self._folder / f"column_{len(self._files)}.bin"
                self._files[name] = self._paths[name].open("wb")
                self._kinds[name] = (array.shape[1:], array.dtype)
            if self._kinds[name] != (array.shape[1:], array.dtype):
                raise PlanError("The rows have different shapes: pad them to one, so that they can be learned from.")
            self._files[name].write(np.ascontiguousarray(array).tobytes())
        self.rows += len(next(iter(arrays.values())))

    def columns(self) -> dict[str, Array]:
        """All rows, mapped."""
        found: dict[str, Array] = {}
        for name, file in self._files.items():
            file.flush()
            shape, dtype = self._kinds[name]
            if math.prod((self.rows, *shape)) == 0:
                found[name] = np.zeros((self.rows, *shape), dtype)
                continue
            found[name] = np.memmap(self._paths[name], dtype, "r", shape=(self.rows, *shape))
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass(eq=False)
class Streamed:
    """Data larger than the limit: passes in one order, so that what was taught can be found again."""

    data: Passes
    teachers: Teachers
    folder: Path
    limit: int
    seed: int
    _store: _Store | None = field(default=None, init=False)
    _size: int = field(default=0, init=False)
    _full: bool = field(default=False, init=False)

    @property
    def rows(self) -> int | None:
        return self.data.rows

    @property
    def description(self) -> str:
        return self.data.description

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """One pass; of `seed` matters only whether there is one."""
        if seed is None:
            for batch in self.data.batches(size, None, start):
                yield Batch(batch.inputs, self.teachers.of(batch.inputs), {})
            return
        row = start * size
        for batch in self.data.batches(size, self.seed, start):
            count = len(batch.inputs[0])
            yield Batch(batch.inputs, self._targets(batch.inputs, row, count), {})
            row += count

    def _targets(self, inputs: tuple[Array, ...], row: int, count: int) -> dict[str, Array]:
        if self._store is not None and row + count <= self._store.rows:
            return {name: np.array(column[row : row + count]) for name, column in self._store.columns().items()}
        values = self.teachers.of(inputs)
        if self._store is None:
            self._store = _Store(self.folder)
        if row == self._store.rows and not self._full:
            size = sum(array.nbytes for array in values.values())
            self._full = self._size + size > self.limit
            if not self._full:
                self._store.append(values)
                self._size += size
        return values
