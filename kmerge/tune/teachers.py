"""Sources that teach: read once, and what they give kept on disk as far as it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from kmerge.data import Batch, generator, row_digests
from kmerge.errors import MergeError, PlanError
from kmerge.live import one_line, quiet
from kmerge.methods.registry import Array
from kmerge.tune.heads import Head, ending_of, logits_of
from kmerge.tune.processes import Processes
from kmerge.tune.stored import Budget, Rows, Store
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
    _lock: Lock = field(default_factory=Lock, init=False)

    def of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """What they give on a batch: by the name of the output, shapes (rows, ...)."""
        with self._lock:  # Keras reads ahead from a thread of its own, while held-back rows are measured
            return self._of(inputs)

    def _of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
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


def spread(data: Taught, seed: int) -> dict[str, float]:
    """The variance of what was taught, each entry centred, on some rows."""
    rows: dict[str, list[Array]] = {}
    seen = 0
    for batch in data.sample(BATCH, seed):
        for name, values in batch.targets.items():
            rows.setdefault(name, []).append(values)
        seen += batch.rows
        if seen >= SAMPLE:
            break
    found = {}
    for name, parts in rows.items():
        values = np.concatenate(parts).astype(np.float64)
        found[name] = max(float(np.mean(np.square(values - values.mean(0)))), 1e-12)
    return found


# ------------------------------------------------------------------------------------------------- what they taught


class Taught(Passes, Protocol):
    """Data with what the teachers gave as targets."""

    def sample(self, size: int, seed: int) -> Iterator[Batch]:
        """Rows to look at; as many as are asked for, of one pass."""


FOR_PAIRS, FOR_ROWS = 0.25, 0.5
"""Share of the time that asking the teachers may take, with rows made of pairs and without."""


def taught(
    data: Passes,
    teachers: Teachers,
    folder: Path,
    budget: Budget,
    seed: int,
    late: Callable[[float], bool] = lambda share: False,
    more: Enriching | None = None,
) -> Taught:
    """Data with what the teachers give as targets.

    Where rows and targets fit into the budget, both are kept on disk, so that each pass may have an order of its own;
    with `more`, rows made of pairs too. Where they do not, or it gets late, the teachers are asked in each pass, but
    for as many rows as are kept.

    Args:
        data: the rows.
        teachers: who are asked.
        folder: for what they give.
        budget: how much of it is kept.
        seed: of the order of data that are not kept.
        late: whether a share of the time that there is has passed.
        more: the same rows, and made ones after them.
    """
    if more is not None:
        kept = _keep(more, teachers, folder, budget, lambda rows: rows >= more.given and late(FOR_PAIRS), True)
        if kept is not None:
            made = len(kept.inputs[0]) - more.given
            told = f"{data.description}, with {made:,} more made of pairs of them" if made else data.description
            return replace(kept, given=more.given, taken=min(more.taken, made), description=told)
    # Fewer rows than their spread is told from are asked for in any case.
    kept = _keep(data, teachers, folder, budget, lambda rows: rows >= SAMPLE and late(FOR_ROWS), False)
    return kept if kept is not None else Streamed(data, teachers, folder, budget, seed)


def _keep(
    data: Passes, teachers: Teachers, folder: Path, budget: Budget, late: Callable[[int], bool], partly: bool
) -> Kept | None:
    """Rows and targets on disk; None where they do not fit, or it gets late and not even some of them would do."""
    store = Store(folder, budget)
    for batch in data.batches(BATCH):
        arrays = {**{f"{number}": array for number, array in enumerate(batch.inputs)}, **teachers.of(batch.inputs)}
        # Told by the first batch where the number of rows is known, so that the teachers are not asked in vain.
        per_row = sum(array.nbytes for array in arrays.values() if array.dtype.kind != "O") / batch.rows
        hopeless = not store.rows and (data.rows or 0) * per_row > budget.left
        if hopeless or not store.append(arrays):
            store.remove()
            return None
        if late(store.rows) and store.rows != data.rows:
            if partly:
                break
            store.remove()
            return None
    if not store.rows:
        raise PlanError("There are no rows to learn from.")
    columns = store.columns()
    names = [name for group in teachers.names for name in group]
    inputs = tuple(columns[str(number)] for number in range(len(columns) - len(names)))
    return Kept(inputs, {name: columns[name] for name in names}, data.description)


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows and targets that can be read in any order.

    Attributes:
        inputs, targets, description: of all rows.
        given: how many of them, the first ones, are given; None for all.
        taken: how many of the others each pass takes.
    """

    inputs: tuple[Rows, ...]
    targets: Mapping[str, Rows]
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

    def sample(self, size: int, seed: int) -> Iterator[Batch]:
        return self.batches(size, seed)

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


@dataclass(eq=False)
class Streamed:
    """Data that do not fit into the budget. All passes that are to be shuffled have one order, and all others another,
    so that what was taught can be found again; and where a source has orders of its own, it is not taken for it.
    """

    data: Passes
    teachers: Teachers
    folder: Path
    budget: Budget
    seed: int
    _places: dict[bool, _Places] = field(default_factory=dict, init=False)

    @property
    def rows(self) -> int | None:
        return self.data.rows

    @property
    def description(self) -> str:
        return self.data.description

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """One pass; of `seed` matters only whether there is one."""
        shuffled = seed is not None
        if shuffled not in self._places:
            name = "shuffled" if shuffled else "as_it_stands"
            self._places[shuffled] = _Places(Store(self.folder / name, self.budget), self.teachers)
        row = start * size
        for batch in self.data.batches(size, self.seed if shuffled else None, start):
            yield Batch(batch.inputs, self._places[shuffled].targets(batch.inputs, row), {})
            row += batch.rows

    def sample(self, size: int, seed: int) -> Iterator[Batch]:
        for batch in self.data.batches(size, seed):
            yield Batch(batch.inputs, self.teachers.of(batch.inputs), {})


@dataclass(eq=False)
class _Places:
    """What was taught at the first places of a pass, with digests of the rows that it was taught on."""

    store: Store
    teachers: Teachers
    _full: bool = field(default=False, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def targets(self, inputs: tuple[Array, ...], row: int) -> dict[str, Array]:
        digests = row_digests(inputs)
        with self._lock:
            found = self._found(digests, row)
            if found is not None:
                return found
            values = self.teachers.of(inputs)
            if row == self.store.rows and not self._full:
                self._full = not self.store.append({"": digests, **values})
            return values

    def _found(self, digests: Array, row: int) -> dict[str, Array] | None:
        end = row + len(digests)
        if end > self.store.rows:
            return None
        columns = self.store.columns()
        if not np.array_equal(columns.pop("")[row:end], digests):
            return None
        return {name: np.array(column[row:end]) for name, column in columns.items()}
