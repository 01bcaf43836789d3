"""The parts of a training by themselves: what was taught and is kept, labels held against heads, marks, locks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmerge.data import Dataset, Entry, Reading, open_dataset
from kmerge.data import streams as streams_module
from kmerge.errors import DataError, FormatError, OutputError, PlanError
from kmerge.tune.checkpoint import NAME, State, check_folder, load_state, locked, save_state
from kmerge.tune.columns import Column, column_of
from kmerge.tune.feed import Feed, Part, count_rows
from kmerge.tune.heads import Head
from kmerge.tune.losses import is_sparse, masked_loss, masked_metric
from kmerge.tune.marking import mark_of
from kmerge.tune.moving import Parts, keep_statistics, rates
from kmerge.tune.recorded import losses_of, metrics_of, training_of
from kmerge.tune.result import Tuning
from kmerge.tune.settings import Settings, check_heads, check_settings
from kmerge.tune.stored import Budget, Store
from kmerge.tune.student import make_student
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
    made = taught(numbers(5000), teachers, tmp_path, Budget(1 << 20), 0, lambda share: teachers.asked > 300)
    assert isinstance(made, Streamed)
    assert 2000 <= teachers.asked < 2500


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


def test_agreement_summed_by_batches_is_that_of_all_rows() -> None:
    from kmerge.agreement import measure_agreement
    from kmerge.tune.agreeing import Agreeing, Loss
    from kmerge.tune.heads import Head
    from kmerge.tune.losses import distilled_loss

    random = np.random.default_rng(0)
    theirs = 1000 + random.normal(size=(90, 4))
    for mine in (theirs + random.normal(size=theirs.shape), theirs, theirs * 0 + 3):
        for ending in ("", "softmax"):
            found, loss = Agreeing(Head("a", "a", 0, 0, ending), False), Loss()
            for rows in np.split(np.arange(90), [7, 8, 50]):
                found.add(theirs[rows], mine[rows])
                loss.add(distilled_loss(ending, 2.0), theirs[rows].astype("float32"), mine[rows].astype("float32"))
            if ending:
                expected = float(np.mean(theirs.argmax(-1) == mine.argmax(-1)))
            else:
                expected = measure_agreement("a", "a", theirs, mine, False).value
            assert found.found().value == pytest.approx(expected, abs=1e-9)
            assert found.found().rows == 90
            whole = float(distilled_loss(ending, 2.0)(theirs.astype("float32"), mine.astype("float32")))
            assert loss.mean == pytest.approx(whole, rel=1e-3, abs=1e-5)
    broken = Agreeing(Head("a", "a", 0, 0, "softmax"), False)
    broken.add(theirs, theirs)
    broken.add(theirs[:1], theirs[:1] * np.nan)
    assert broken.found().value == 0


# ------------------------------------------------------------------------------------------------- labels and heads


def refused(column: Any, labels: Any) -> str:
    with pytest.raises(DataError) as caught:
        column.read(np.array(labels))
    return str(caught.value)


def test_labels_are_held_against_their_head() -> None:
    import keras

    sparse = column_of("a", (None, 3), keras.losses.SparseCategoricalCrossentropy(ignore_class=255))
    assert sparse.read(np.array([[0.0], [np.nan], [255.0], [2.0]])).tolist() == [0, -1, -1, 2]
    assert refused(sparse, [0, 9]) == (
        "The labels of 'a' hold class 9, and the head tells 3 classes apart: expected numbers from 0 to 2, or -1 where "
        "a label is missing."
    )
    assert "hold class -5" in refused(sparse, [-5, 0])
    assert "hold class 4294967296" in refused(sparse, [2**32])
    assert "hold infinity" in refused(sparse, [np.inf])
    assert "--loss a=categorical_crossentropy" in refused(sparse, np.eye(3))
    hot = column_of("a", (None, 3), keras.losses.CategoricalCrossentropy())
    assert hot.read(np.eye(3)).shape == (3, 3)
    for numbers in ([0, 1], [[0], [1]]):
        assert "--loss a=sparse_categorical_crossentropy" in refused(hot, numbers)
    squared = column_of("a", (None, 3), keras.losses.MeanSquaredError())
    assert refused(squared, [1.0, 2.0]) == (
        "The labels of 'a' have shape (2,), expected (rows, 3). Give as many values for each row as the head gives."
    )
    one = column_of("a", (None, 1), keras.losses.BinaryCrossentropy())
    assert one.read(np.array([0, 1, -1])).shape == (3, 1)
    assert "hold 255" in refused(one, [0, 255])
    places = column_of("a", (None, None, 3), keras.losses.SparseCategoricalCrossentropy())
    assert places.read(np.zeros((2, 5, 1))).shape == (2, 5)

    def own(y: Any, p: Any) -> Any:
        return y - p

    free = column_of("a", (None, 3), losses_of([Head("a", "a", 0)], own, {}, [])["a"])
    assert free.read(np.ones((2, 7))).shape == (2, 7)


def test_weights_of_later_batches_count_and_what_goes_wrong_is_told_as_it_was() -> None:
    x, y = np.ones((10, 1), np.float32), np.ones((10, 1))
    data = open_dataset([(x, y), (x, y, np.full(10, 5.0)), (x, y + np.inf)], ONE, ["t"])
    column = Column("t", "float32", (1,))
    feed = Feed([Part(data, ("t",), 10, 30)], [column], 1, 0)
    batches = feed.once()
    with pytest.raises(DataError, match="infinity"):
        list(feed.own())
    assert feed.failure is not None
    small = Feed([Part(open_dataset([(x, y), (x, y, np.full(10, 5.0))], ONE, ["t"]), ("t",), 10, 20)], [column], 1, 0)
    assert sorted(set(next(small.once())[2]["t"])) == [1, 5]
    batches.close()


# --------------------------------------------------------------------------------------------------- losses, metrics


def test_metrics_over_classes_see_whole_rows() -> None:
    import keras

    mse = keras.losses.MeanSquaredError()
    y = np.array([[1, 0, 0], [0, 1, 0], [0, np.nan, 1], [0, 0, 1]], np.float32)
    p = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0, 0, 1], [0, 0, 1]], np.float32)
    expected = {
        keras.metrics.CategoricalAccuracy(): 2 / 3,  # the row with a gap is none
        keras.metrics.MeanAbsoluteError(): (0.2 + 1.6) / 11,
        keras.metrics.RootMeanSquaredError(): np.sqrt((0.02 + 1.28) / 11),
        keras.metrics.CosineSimilarity(): (0.9 / np.hypot(0.9, 0.1) + 0.2 / np.hypot(0.8, 0.2) + 1) / 3,
        keras.metrics.Precision(): 3 / 4,
    }
    for metric, value in expected.items():
        made = masked_metric(metric, mse)
        made.update_state(y, p)
        assert float(made.result()) == pytest.approx(value, rel=1e-5), metric.name


def test_every_head_has_a_metric_of_its_own() -> None:
    import keras

    heads = [Head("a", "a", 0), Head("b", "b", 1)]
    losses = losses_of(heads, "mse", {}, [])

    def gap(y: Any, p: Any) -> Any:
        return y - p

    given = [keras.metrics.MeanAbsoluteError(name="mine"), keras.metrics.MeanMetricWrapper(gap, name="gap")]
    given[0].update_state([1.0], [3.0])
    made = metrics_of(heads, given, {}, losses)
    assert [metric.name for metric in made["a"]] == ["mine", "gap"]
    made["a"][0].update_state([1.0], [2.0])
    assert [float(item.result()) for item in (given[0], made["a"][0], made["b"][0])] == [2, 1, 0]


def test_recorded_losses_belong_to_outputs_by_name_with_all_their_settings() -> None:
    heads = [Head("a", "a_x", 0, 0, "softmax"), Head("a", "a_y", 1, 1), Head("b", "b", 2, 0, "softmax")]
    sparse = {"class_name": "SparseCategoricalCrossentropy", "config": {"ignore_class": 255, "reduction": "sum"}}
    notes: list[str] = []
    training = {"a": {"loss": {"y": "mse", "x": "kl_divergence"}}, "b": {"loss": sparse}}
    found = losses_of(heads, None, training, notes)
    assert [type(loss).__name__ for loss in found.values()] == [
        "KLDivergence",
        "MeanSquaredError",
        "SparseCategoricalCrossentropy",
    ]
    assert found["b"].ignore_class == 255
    assert not notes
    found = losses_of(heads, None, {"a": {"loss": {"y": "mae"}}, "b": {"loss": "focal_tversky"}}, notes)
    assert type(found["a_y"]).__name__ == "MeanAbsoluteError"
    assert [text.split(", and takes")[0] for text in notes] == [
        "'a_x' has no loss that its source was trained with",
        "'b' was trained with 'focal_tversky', which is not a loss of Keras's that can be made anew",
    ]


def test_what_a_model_was_trained_with_itself_counts_where_it_is_not_merged() -> None:
    heads = [Head("p", "p", 0), Head("q", "q", 1)]
    for own in ({"loss": {"q": "mae", "p": "huber"}}, {"loss": ["huber", "mae"]}):
        found = losses_of(heads, None, training_of(heads, {}, own), [])
        assert [type(loss).__name__ for loss in found.values()] == ["Huber", "MeanAbsoluteError"]
    alone = training_of(heads[:1], {}, {"loss": "huber", "metrics": [["mae"]]})
    losses = losses_of(heads[:1], None, alone, [])
    assert [type(m).__name__ for m in metrics_of(heads[:1], None, alone, losses)["p"]] == ["MeanAbsoluteError"]


def test_losses_that_are_functions() -> None:
    import keras

    head = [Head("a", "a", 0, 0, "softmax")]
    assert is_sparse(losses_of(head, keras.losses.sparse_categorical_crossentropy, {}, [])["a"])

    def whole(y: Any, p: Any) -> Any:
        return keras.ops.mean(keras.ops.square(y - p))

    def rows(y: Any, p: Any) -> Any:
        return keras.ops.mean(keras.ops.square(y - p), -1)

    y, p = np.array([[1.0], [np.nan]], np.float32), np.array([[1.0], [10.0]], np.float32)
    assert float(masked_loss(losses_of(head, rows, {}, [])["a"])(y, p)) == 0
    with pytest.raises(PlanError, match="one number for a whole batch"):
        masked_loss(losses_of(head, whole, {}, [])["a"])(y, p)


# ------------------------------------------------------------------------------------------------------ loss weights


def student(weighting: str) -> Any:
    import keras

    x = keras.Input((1,))
    outputs = {name: keras.layers.Dense(1, name=name)(x) for name in "ab"}
    losses = {name: masked_loss(keras.losses.MeanSquaredError()) for name in "ab"}
    return make_student(
        [x], outputs, plain=None, losses=losses, weights={"a": 1.0, "b": 1.0}, weighting=weighting, halves="ab"
    )


def test_heads_without_labels_keep_their_weights() -> None:
    made = student("gradnorm")
    shapes = [variable.shape for variable in made.trainable_weights]
    ones, zeros = ([np.full(shape, value, np.float32) for shape in shapes] for value in (1, 0))
    made.combined([np.float32(1), np.float32(0)], [ones, zeros], [1.0, 0.0])
    for _ in range(20):
        made.combined([np.float32(1), np.float32(1)], [ones, ones], [1.0, 1.0])
    np.testing.assert_allclose(made.balance.numpy(), [1, 1], rtol=1e-5)
    made = student("uncertainty")
    made.compile(optimizer=keras_optimizer(1e-2))
    y = {"a": np.full((8, 1), 1.5, np.float32), "b": np.full((8, 1), np.nan, np.float32)}
    for _ in range(20):
        made.train_on_batch(np.ones((8, 1), np.float32), y, {name: np.ones(8, np.float32) for name in y})
    assert abs(made.balance.numpy()[0]) > 0.05
    assert made.balance.numpy()[1] == 0


def keras_optimizer(rate: float) -> Any:
    import keras

    return keras.optimizers.Adam(rate)


def test_scores_count_labels_by_their_weights() -> None:
    made = student("")
    made.compile(optimizer=keras_optimizer(0.0))
    x = np.ones((2, 1), np.float32)
    heavy = {"a": np.array([0, 4], np.float32), "b": np.ones(2, np.float32)}
    light = {"a": np.full(2, 0.5, np.float32), "b": np.ones(2, np.float32)}
    for y, weights in ((np.ones((2, 1), np.float32), heavy), (np.zeros((2, 1), np.float32), light)):
        outputs = made(x)
        made.parts({"a": outputs["a"] + y, "b": y}, outputs, weights)
    # 4 labels' weight of 1, and 1 of 0.
    assert float(made.loss_trackers["a"].result()) == pytest.approx(0.8, rel=1e-5)


def test_layers_that_keep_their_statistics_move_at_the_rate_of_the_trunk() -> None:
    import keras

    norm, dense = keras.layers.BatchNormalization(), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((3,)), dense, norm])
    keep_statistics(norm)
    assert rates(Parts((dense, norm), ()), model.trainable_variables, 0.1, 1.0) == [0.1] * 4


def test_rates_are_those_of_the_trunk_alone_where_layers_have_one_name() -> None:
    import keras

    def nested(name: str) -> Any:
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="dense")], name=name)

    one, two, head = nested("one"), nested("two"), nested("head")
    moved = [*one.trainable_variables, *two.trainable_variables, *head.trainable_variables]
    assert rates(Parts((one, two), (head,)), moved, 0.5, 0.5) == [0.25, 0.25, 0.5, 0.5, 1, 1]


# ------------------------------------------------------------------------------------------- settings, marks, locks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mix": {"a": -1}}, "The share of 'a' in mix is -1"),
        ({"mix": {"z": 5}}, "mix names 'z', but the heads are a, b."),
        ({"loss_weights": 3}, "loss_weights is 3: expected equal"),
        ({"loss_weights": [1, -2]}, "A loss weight is -2"),
        ({"loss_weights": [1]}, "There are 1 loss weights for 2 heads"),
        ({"loss": {"z": "mse"}}, "loss names 'z', but the heads are a, b."),
        ({"features": 0.5}, "features is for sources that teach"),
        ({"columns": "x"}, "columns is 'x': expected a list of names."),
    ],
)
def test_settings_are_checked_before_anything_is_done(settings: dict[str, Any], expected: str) -> None:

    def check() -> None:
        check_settings(Settings(**settings))
        check_heads(Settings(**settings), ["a", "b"], ["a", "b"], False)

    with pytest.raises(PlanError) as caught:
        check()
    assert str(caught.value).startswith(expected)
    with pytest.raises(PlanError, match="loss is for labels, and here the sources teach"):
        check_heads(Settings(loss="mse"), ["a"], ["a"], True)


def test_folders_of_checkpoints_are_checked_and_locked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(OutputError, match="Another training saves its state"), locked(folder):
        pass
    with locked(folder):  # and free again
        save_state(folder, State({"course": {}}, {}), "mark")
    check_folder(folder, True, False)
    check_folder(folder, False, True)
    with pytest.raises(OutputError, match="go on with it \\(--resume\\), replace it \\(--force\\)"):
        check_settings(Settings(checkpoints=folder))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        check_folder(tmp_path / "file", False, False)
    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "file"):
        pass
    for facts in ({"format": 1, "dtypes": {}}, {"format": 1, "mark": "m", "dtypes": {"model": ["odd"]}}):
        np.savez(
            folder / NAME, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), model_0=np.zeros(2, np.uint8)
        )
        with pytest.raises(FormatError, match="no checkpoint"):
            load_state(folder, "m")


def test_trainings_are_told_apart_by_all_that_decides_them() -> None:
    import keras

    def mark(kernel: float = 1.0, source: float = 1.0, data: Any = None, **settings: Any) -> str:
        models = []
        for value in (kernel, source):
            layers = [keras.layers.Dropout(0.5), keras.layers.Dense(1, use_bias=False)]  # Dropout has a seed of its own
            models.append(keras.Sequential([keras.Input((1,)), *layers]))
            models[-1].set_weights([np.full((1, 1), value)])
        x, y = np.arange(300.0)[:, None], np.arange(300)
        sets: Any = {"": (open_dataset((x, y) if data is None else data(x, y), ONE, ["t"]), None)}
        return mark_of(Settings(**settings), [Head("t", "t", 0)], models[0], {"t": models[1]}, sets)

    def function(y: Any, p: Any) -> Any:
        return y - p

    def other(y: Any, p: Any) -> Any:
        return y + p

    adam, sgd = keras.optimizers.Adam, keras.optimizers.SGD
    marks = [
        mark(),
        mark(kernel=2),
        mark(source=2),
        mark(data=lambda x, y: (x + (x == 299), y)),
        mark(data=lambda x, y: (x, y + (y == 299))),
        mark(data=lambda x, y: (x, y, y + 1.0)),
        mark(loss_weights=[1, 1]),
        mark(loss_weights=[9, 0]),
        mark(mix={"t": 1}),
        mark(mix={"t": 2}),
        mark(loss={"t": "mse"}),
        mark(loss=function),
        mark(loss=other),
        mark(loss=keras.losses.Huber(1.0)),
        mark(loss=keras.losses.Huber(2.0)),
        mark(optimizer=adam(0.1)),
        mark(optimizer=sgd(0.1)),
        mark(optimizer=sgd(0.1, momentum=0.9)),
    ]
    assert len(set(marks)) == len(marks)
    assert mark() == marks[0]
    assert mark(loss=function, every=3, minutes=2.0, checkpoints=Path("x")) == marks[11]
    random = np.random.default_rng(0)
    shuffled = [mark(data=lambda x, y: lambda: iter([random.permutation(x)])) for _ in range(2)]
    assert shuffled[0] == shuffled[1]


def test_results_are_json_whatever_was_measured() -> None:
    made = Tuning(None, {"loss": [1.0, float("nan")]}, scores_after={"val_loss": float("inf")})
    assert made.to_dict()["history"] == {"loss": [1.0, None]}
    assert made.to_dict()["scores_after"] == {"val_loss": None}
