"""The parts of a training by themselves: what was taught and is kept, labels held against heads, marks, locks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmerge.data import Dataset, Entry, Reading, open_dataset
from kmerge.data import streams as streams_module
from kmerge.errors import PlanError
from kmerge.tune.feed import count_rows
from kmerge.tune.stored import Budget, Store
from kmerge.tune.teachers import Kept, Streamed, spread, taught

Array = np.ndarray[Any, Any]
ONE = (Entry("x", frozenset({"x"}), (None, 1), "float32"),)


# ---------------------------------------------------------------------------------------------------- what was taught


class Echo:
    """Teachers that give back what they are shown, so that a target that belongs to another row is seen."""

    names = (("t",),)

    def __init__(self) -> None:
        self.asked = 0

    def of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        self.asked += len(inputs[0])
        return {"t": np.array(inputs[0])}


def numbers(rows: int, itself: bool = False) -> Dataset:
    """A stream of the numbers from 0 on, in order or in an order of its own in each pass."""
    random = np.random.default_rng(0)

    def source() -> Iterator[Array]:
        order = random.permutation(rows) if itself else np.arange(rows)
        return iter([order[start : start + 100, None] for start in range(0, rows, 100)])

    return open_dataset(source, ONE, ["t"], Reading(targets=False))


def echoed(data: Any, size: int, seed: int | None) -> list[int]:
    """The rows of a pass; of each, the target has to be the input."""
    rows: list[int] = []
    for batch in data.batches(size, seed):
        np.testing.assert_array_equal(batch.inputs[0], batch.targets["t"])
        rows += batch.inputs[0][:, 0].astype(int).tolist()
    return rows


@pytest.mark.parametrize("itself", [False, True])
def test_targets_belong_to_their_rows_whatever_the_order(
    itself: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "BUFFER", 400)  # an order that depends on the size of batches
    teachers: Any = Echo()
    made = taught(numbers(2000, itself), teachers, tmp_path, Budget(9000), 0)
    assert isinstance(made, Streamed)
    assert spread(made, 0)["t"] > 0
    for seed in (1, None, 2, None):
        assert sorted(echoed(made, 64, seed)) == list(range(2000))
    teachers.asked = 0
    echoed(made, 64, 3)
    # 9,000 bytes hold 12 of a digest and a number, of either order.
    assert teachers.asked == 2000 if itself else 1000 < teachers.asked < 1700


def test_what_is_kept_shares_one_limit_and_nothing_stays_of_what_did_not_fit(tmp_path: Path) -> None:
    teachers: Any = Echo()
    budget = Budget(8 * 600)
    first = taught(numbers(500), teachers, tmp_path / "first", budget, 0)
    assert isinstance(first, Kept)
    assert budget.left == 8 * 100
    second = taught(numbers(500), teachers, tmp_path / "second", budget, 0)
    assert isinstance(second, Streamed)
    assert budget.left == 8 * 100
    assert not list((tmp_path / "second").iterdir())
    teachers.asked = 0
    assert count_rows(second) == 500
    assert teachers.asked == 0
    echoed(second, 50, None)
    assert teachers.asked == 500
    assert budget.left < 8 * 100
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8 * 600


def test_teachers_are_asked_row_by_row_where_it_gets_late(tmp_path: Path) -> None:
    teachers: Any = Echo()
    made = taught(numbers(2000), teachers, tmp_path, Budget(1 << 20), 0, lambda: teachers.asked > 300)
    assert isinstance(made, Streamed)
    assert teachers.asked < 600


def test_text_is_kept_on_disk_too(tmp_path: Path) -> None:
    entry = (Entry("x", frozenset({"x"}), (None, 2), "string"),)
    texts = np.array([["aé", ""], ["b", "cc"], ["", "ddd"]], object)

    class Length(Echo):
        def of(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
            return {"t": np.array([[len(text) for text in row] for row in inputs[0]], np.float32)}

    teachers: Any = Length()
    made = taught(open_dataset(texts, entry, ["t"]), teachers, tmp_path, Budget(1 << 10), 0)
    assert isinstance(made, Kept)
    batch = next(made.batches(3, 5))
    assert sorted(map(tuple, batch.inputs[0])) == sorted(map(tuple, texts))
    np.testing.assert_array_equal(batch.targets["t"], [[len(text) for text in row] for row in batch.inputs[0]])
    assert isinstance(taught(open_dataset(texts, entry, ["t"]), teachers, tmp_path / "b", Budget(40), 0), Streamed)


def test_rows_of_different_shapes_are_not_kept_together(tmp_path: Path) -> None:
    store = Store(tmp_path, Budget(100))
    assert store.append({"a": np.zeros((1, 2))})
    with pytest.raises(PlanError, match="different shapes"):
        store.append({"a": np.zeros((1, 3))})
