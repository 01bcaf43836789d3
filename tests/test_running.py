"""Merges that run their models: how methods, inputs and the trunk are chosen, and what is said of the result.

Where a test asks for `fake`, `fuse_models` is stood in for: it takes the mean, and its agreement falls with the length
of the trunk. The last tests run it in earnest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

import kmerge
from kmerge.agreement import Agreement
from kmerge.calibration.inputs import Inputs
from kmerge.fuse.batches import UNSEEN
from kmerge.plan import Calibration, Plan
from kmerge.surgery import merge_graphs


@dataclass
class Fake:
    """Stands for `fuse_models`, and remembers how it was called."""

    loss: float = 0.02
    plans: list[Plan] = field(default_factory=list)
    inputs: Any = None
    trusted: bool = False
    custom_objects: Mapping[str, Any] | None = None

    def __call__(
        self,
        layout: Any,
        plan: Plan,
        inputs: Any,
        folder: Path,
        progress: Any,
        custom_objects: Mapping[str, Any] | None = None,
        trusted: bool = False,
    ) -> Any:
        assert folder.is_dir()
        self.plans.append(plan)
        self.inputs, self.trusted, self.custom_objects = inputs, trusted, custom_objects
        progress(1, 2)
        progress(2, 2)
        shared = sum(bool(layer.method) for layer in plan.layers)
        merged = merge_graphs(layout, plan)
        found = tuple(
            Agreement(label, label, "decisions", 1 - self.loss * shared * (number + 1), inputs.rows, inputs.synthetic)
            for number, label in enumerate(plan.labels)
        )
        return SimpleNamespace(merged=merged, values={}, agreements=found, notes=("this is a fake",))

    @property
    def trunks(self) -> list[str]:
        return [plan.trunk for plan in self.plans]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr("kmerge.fuse.fuse_models", found, raising=False)
    return found


@pytest.fixture
def cnns(fixtures_dir: Path) -> list[Path]:
    return [fixtures_dir / f"cnn_{label}.h5" for label in "abc"]


@pytest.fixture
def mlps(fixtures_dir: Path) -> list[Path]:
    return [fixtures_dir / f"mlp_{label}.h5" for label in "ab"]


@pytest.fixture
def related(fixtures_dir: Path) -> list[Path]:
    return [fixtures_dir / f"finetuned_{label}.h5" for label in "ab"]


def rows_for(path: Path, count: int = 40) -> np.ndarray:
    (shape,) = kmerge.inspect(path).inputs.values()
    return np.random.default_rng(0).random((count, *shape[1:]), dtype="float32")


# ---- auto


def test_auto_fuses_what_shares_no_ancestor_and_says_why(fake: Fake, cnns: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(cnns, tmp_path / "o.h5", samples=16)
    assert report.plan.method == "fuse"
    assert {layer.method for layer in report.plan.layers if layer.method} == {"fuse"}
    assert (fake.inputs.rows, fake.inputs.synthetic) == (16, True)
    (why,) = [note for note in report.notes if "ancestor" in note]
    assert why.startswith("the models do not share an ancestor (cosine ")
    assert "made" in why
    assert "this is a fake" in report.notes
    assert [item.label for item in report.agreement] == ["cnn_a", "cnn_b", "cnn_c"]
    assert report.plan.calibration == Calibration(fake.inputs.description, 16, True)
    with h5py.File(tmp_path / "o.h5") as file:
        stored = json.loads(file.attrs["kmerge"])
    assert stored["agreement"] == report.to_dict()["agreement"]
    assert Plan.from_dict(stored["plan"]) == report.plan


def test_auto_takes_the_mean_of_related_sources(fake: Fake, related: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(related, tmp_path / "o.h5")
    assert report.plan.method == "mean"
    assert report.plan.calibration is None
    assert not fake.plans
    assert report.agreement == ()


def test_auto_says_what_it_chose_where_the_rules_do_not_fit(related: list[Path], tmp_path: Path) -> None:
    with pytest.raises(kmerge.PlanError, match=r"'mean' keeps the width.*--method fuse") as caught:
        kmerge.combine(related, tmp_path / "o.h5", width=1.5)
    assert any("'mean' here: the models share an ancestor" in note for note in caught.value.__notes__)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_decides_and_runs_nothing(fake: Fake, mlps: list[Path]) -> None:
    report = kmerge.combine(mlps, dry_run=True, width=1.5)
    assert (report.plan.method, report.plan.width) == ("fuse", 1.5)
    assert report.plan.calibration == Calibration("made-up inputs", 0, True)
    assert not fake.plans
    assert report.agreement == ()
    assert any("are to be fused on made-up inputs" in note for note in report.notes)


def test_weights_alone_cannot_be_fused(fixtures_dir: Path, tmp_path: Path) -> None:
    import keras

    paths = []
    for label in "ab":
        model = keras.saving.load_model(fixtures_dir / f"mlp_{label}.keras", compile=False)
        head = model.layers[-1]
        trunk = keras.Model(model.inputs, head.input)
        paths.append(tmp_path / f"{label}.weights.h5")
        trunk.save_weights(paths[-1])
    with pytest.raises(kmerge.UnrelatedError, match=r"(?s)cosine.*--base FILE.*--method mean.*--method pick"):
        kmerge.combine(paths, tmp_path / "o.weights.h5", trunk="all")
    with pytest.raises(kmerge.PlanError, match=r"cannot be run on --data.*--base FILE"):
        kmerge.combine(paths, tmp_path / "o.weights.h5", trunk="all", method="mean", data=np.zeros((9, 64)))


# ---- inputs


def test_data_reach_the_models(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    x = rows_for(mlps[0])
    report = kmerge.combine(mlps, tmp_path / "o.h5", data=x, samples=20, seed=3)
    assert (fake.inputs.rows, fake.inputs.synthetic) == (20, False)
    assert fake.plans[0].seed == 3
    assert report.plan.calibration is not None
    assert report.plan.calibration.rows == 20


@pytest.mark.parametrize("method", ["fuse", "zip", "transport"])
def test_methods_that_need_inputs_have_them_made(fake: Fake, method: str, mlps: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(mlps, tmp_path / "o.h5", method=method, samples=8)
    assert fake.inputs.synthetic
    assert all(item.synthetic for item in report.agreement)


def test_align_runs_the_models_where_there_are_inputs(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    kmerge.combine(mlps, tmp_path / "weights.h5", method="align")
    assert not fake.plans
    kmerge.combine(mlps, tmp_path / "given.h5", method="align", data=rows_for(mlps[0]))
    assert len(fake.plans) == 1
    kmerge.combine(mlps, tmp_path / "made.h5", method="align", option={"by": "activations"}, samples=8)
    assert fake.inputs.synthetic


def test_data_that_do_not_fit_leave_nothing_behind(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    with pytest.raises(kmerge.KmergeError, match="expected"):
        kmerge.combine(mlps, tmp_path / "o.h5", data=np.zeros((20, 3), "float32"))
    with pytest.raises(kmerge.KmergeError):
        kmerge.combine(mlps, tmp_path / "o.h5", data=tmp_path / "absent.npz")
    assert not fake.plans
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_known_before_any_work(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    (tmp_path / "o.h5").write_bytes(b"mine")
    with pytest.raises(kmerge.OutputError, match="--force"):
        kmerge.combine(mlps, tmp_path / "o.h5", samples=8)
    assert not fake.plans


def test_data_are_never_overwritten(mlps: list[Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.h5", x=rows_for(mlps[0]))
    (tmp_path / "x.h5.npz").rename(tmp_path / "x.h5")
    with pytest.raises(kmerge.OutputError, match="is the data"):
        kmerge.combine(mlps, tmp_path / "x.h5", data=tmp_path / "x.h5", force=True)


def test_what_is_not_needed_is_said(mlps: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(mlps, tmp_path / "a.h5", trunk="none", data=rows_for(mlps[0]))
    assert any(note.startswith("data has no effect") for note in report.notes)
    assert report.agreement == ()
    report = kmerge.combine(mlps, tmp_path / "b.h5", method="mean", samples=9)
    assert any(note.startswith("samples has no effect") for note in report.notes)


def test_files_that_hold_code_are_not_run(fake: Fake, tmp_path: Path) -> None:
    import keras
    from keras import layers

    for seed in range(2):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        x = layers.Lambda(lambda x: x * 2)(layers.Dense(40)(inputs))
        keras.Model(inputs, layers.Dense(2)(x)).save(tmp_path / f"{seed}.keras")
    paths = [tmp_path / "0.keras", tmp_path / "1.keras"]
    for rules in ({}, {"method": "mean", "data": np.zeros((20, 6), "float32")}):
        with pytest.raises(kmerge.FormatError, match=r"Lambda.*--method mean.*--trunk none"):
            kmerge.combine(paths, tmp_path / "o.keras", **rules)
    assert not fake.plans
    kmerge.combine(paths, tmp_path / "o.keras", method="mean")


# ---- plans


def test_a_merge_is_repeated_from_its_result(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    first = kmerge.combine(mlps, tmp_path / "one.h5", method="zip", samples=24, seed=7)
    again = kmerge.combine(mlps, tmp_path / "two.h5", plan=tmp_path / "one.h5")
    assert fake.inputs.rows == 24
    assert again.plan == first.plan
    assert fake.plans[0] == fake.plans[1] or replaced_digests(fake.plans[1]) == replaced_digests(fake.plans[0])


def replaced_digests(plan: Plan) -> dict[str, Any]:
    found = plan.to_dict()
    for source in found["sources"]:
        source["digest"] = ""
    return found


def test_a_plan_with_data_asks_for_them(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    x = rows_for(mlps[0])
    plan = kmerge.combine(mlps, method="align", data=x, dry_run=True).plan
    with pytest.raises(kmerge.PlanError, match=r"runs the models on 40 inputs.*--data"):
        kmerge.combine(mlps, tmp_path / "o.h5", plan=plan)
    kmerge.combine(mlps, tmp_path / "o.h5", plan=plan, data=x)
    assert fake.inputs.rows == 40


def test_a_plan_of_weights_stays_one_beside_data(fake: Fake, mlps: list[Path], tmp_path: Path) -> None:
    plan = kmerge.combine(mlps, method="align", dry_run=True).plan
    report = kmerge.combine(mlps, tmp_path / "o.h5", plan=plan, data=rows_for(mlps[0]))
    assert not fake.plans
    assert len(report.agreement) == 2


# ---- the largest trunk


def test_keep_takes_the_whole_trunk_where_it_agrees(fake: Fake, cnns: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(cnns, tmp_path / "o.h5", keep=0.65, samples=8)
    assert fake.trunks == ["auto"]
    assert any(note.startswith("the whole trunk keeps an agreement of 65.0 %") for note in report.notes)


def test_keep_looks_for_the_largest_trunk(fake: Fake, cnns: list[Path], tmp_path: Path) -> None:
    """The third head loses 6 % for each shared layer: 0.85 allows two."""
    report = kmerge.combine(cnns, tmp_path / "o.h5", keep=0.85, samples=8)
    shared = [layer.name for layer in report.plan.layers if layer.method]
    assert len(shared) == 2
    assert report.plan.trunk == shared[-1]
    assert report.plan.keep == 0.85
    assert report.agreement[-1].value == pytest.approx(0.88)
    assert any(f"ends with '{shared[-1]}': its lowest head has 88.0 %" in note for note in report.notes)
    again = kmerge.combine(cnns, tmp_path / "again.h5", plan=tmp_path / "o.h5")
    assert again.plan.layers == report.plan.layers


def test_keep_keeps_the_sources_whole_where_no_trunk_agrees(fake: Fake, cnns: list[Path], tmp_path: Path) -> None:
    report = kmerge.combine(cnns, tmp_path / "o.h5", keep=0.99, samples=8)
    assert report.plan.trunk == "none"
    assert not [layer for layer in report.plan.layers if layer.method]
    assert any("every source was kept whole" in note for note in report.notes)
    assert report.agreement == ()
    assert report.warnings == ()


# ---- agreement


def test_a_merge_of_weights_is_measured_where_inputs_are_given(mlps: list[Path], tmp_path: Path) -> None:
    import keras

    x = rows_for(mlps[0], 50)
    report = kmerge.combine(mlps, tmp_path / "o.h5", method="mean", data=x)
    merged = keras.saving.load_model(tmp_path / "o.h5", compile=False)
    got = dict(zip(report.heads, merged.predict(x, verbose=0).values(), strict=True))
    for path, item in zip(mlps, report.agreement, strict=True):
        wanted = keras.saving.load_model(path, compile=False).predict(x, verbose=0)
        assert (item.measure, item.rows, item.synthetic) == ("decisions", 50, False)
        assert item.value == pytest.approx(np.mean(wanted.argmax(-1) == got[item.label].argmax(-1)))
    with h5py.File(tmp_path / "o.h5") as file:
        assert json.loads(file.attrs["kmerge"])["agreement"] == report.to_dict()["agreement"]
    assert report.warnings


def test_a_head_is_measured_on_the_inputs_of_its_source(mlps: list[Path], tmp_path: Path) -> None:
    for path, count in zip(mlps, (12, 20), strict=True):
        np.savez(tmp_path / f"{path.stem}.npz", x=rows_for(path, count))
    data = {path.stem: tmp_path / f"{path.stem}.npz" for path in mlps}
    report = kmerge.combine(mlps, tmp_path / "o.h5", method="mean", data=data)
    assert [item.rows for item in report.agreement] == [12, 12]  # as many of each, where nobody says


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"outputs": "list"}, {"outputs": "mean"}, {"inputs": "separate"}, {"trunk": "all"}, {"method": "align"}],
    ids=str,
)
def test_a_model_agrees_with_itself(suffix: str, rules: dict[str, Any], fixtures_dir: Path, tmp_path: Path) -> None:
    path = fixtures_dir / f"mlp_a{suffix}"
    if rules.get("method") == "align":
        rules = {"method": "pick"}
    report = kmerge.combine(
        [path, path], tmp_path / f"o{suffix}", **{"method": "mean", "labels": ["v", "w"], **rules}, data=rows_for(path)
    )
    assert [item.value for item in report.agreement] == [1.0] * (1 if "mean" in rules.values() else 2)


def test_live_models_are_merged_and_measured(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    import keras
    from keras import layers

    class Twice(layers.Layer):
        def call(self, x: Any) -> Any:
            return x * 2

    def build(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(2)(Twice()(layers.Dense(50)(inputs))))

    x = np.random.default_rng(0).random((30, 6), dtype="float32")
    model = kmerge.merge_models({"a": build(0), "b": build(1)}, data=x)
    assert set(model.output) == {"a", "b"}
    assert fake.trusted
    assert set(fake.custom_objects or ()) == {"Twice"}
    fake.loss = 0.5
    kmerge.merge_models([build(0), build(1)], data=x)
    assert any("part of what the sources know is lost" in record.message for record in caplog.records)


# ---- in earnest: three tasks, nothing in common but the digits


def digits(paths: list[Path], load_task: Callable[..., Any]) -> np.ndarray:
    """What the networks learned from, 300 rows of it, without labels."""
    return np.concatenate([load_task(path.stem, held_back=False)[0][:100] for path in paths])


def decisions(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    import keras

    found = keras.saving.load_model(path, compile=False)(x)
    outputs = found if isinstance(found, dict) else {path.stem: found}
    return {name: np.asarray(values).argmax(-1) for name, values in outputs.items()}


def stored_agreement(path: Path) -> Any:
    with h5py.File(path) as file:
        return json.loads(file.attrs["kmerge"])["agreement"]


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_networks_that_were_trained_apart_are_fused(
    family: str,
    fixtures_dir: Path,
    load_task: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the digits that it knows, each head decides as its source does, and nearly so on those of the others."""
    for name in ("ENOUGH", "ENOUGH_FOR_DENSE"):
        monkeypatch.setattr(f"kmerge.fuse.model.{name}", 0)
    paths = [fixtures_dir / f"{family}_{label}.h5" for label in "abc"]
    x = digits(paths, load_task)
    report = kmerge.combine(paths, tmp_path / "o.h5", data=x)
    assert report.plan.method == "fuse"
    assert [item.label for item in report.agreement] == [path.stem for path in paths]
    assert stored_agreement(tmp_path / "o.h5") == report.to_dict()["agreement"]
    _, unseen = Inputs((x,), np.full(len(x), -1)).split(UNSEEN, report.plan.seed)
    merged = decisions(tmp_path / "o.h5", unseen.arrays[0])
    for path, item in zip(paths, report.agreement, strict=True):
        assert (item.measure, item.rows, item.synthetic) == ("decisions", unseen.rows, False)
        assert item.value == np.mean(merged[path.stem] == decisions(path, unseen.arrays[0])[path.stem])
        assert item.value > 0.7
        known, _ = load_task(path.stem)
        assert np.mean(decisions(tmp_path / "o.h5", known)[path.stem] == decisions(path, known)[path.stem]) > 0.9


@pytest.mark.parametrize("method", ["zip", "transport", "align"])
def test_other_methods_on_data_agree_better_than_the_mean(
    method: str, cnns: list[Path], load_task: Callable[..., Any], tmp_path: Path
) -> None:
    x = digits(cnns, load_task)
    report = kmerge.combine(cnns, tmp_path / "o.h5", method=method, data=x)
    mean = kmerge.combine(cnns, tmp_path / "mean.h5", method="mean", data=x)
    assert {layer.method for layer in report.plan.layers if layer.method} == {method}
    assert [item.label for item in report.agreement] == [path.stem for path in cnns]
    assert stored_agreement(tmp_path / "o.h5") == report.to_dict()["agreement"]
    ours, theirs = (np.mean([item.value for item in found.agreement]) for found in (report, mean))
    assert ours > theirs + 0.15
