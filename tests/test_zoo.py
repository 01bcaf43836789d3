"""The zoo is sound: Keras itself saves and loads every case in the formats flagged for it, and in no other."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

REFUSALS = [(name, suffix) for suffix, names in zoo.REFUSED.items() for name in names]


def equal(first: list[np.ndarray], second: list[np.ndarray], tolerance: float) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(first, second, strict=True)
    )


def reloaded(case: zoo.Case, model: Any, suffix: str, folder: Path) -> list[np.ndarray]:
    return zoo.predictions(zoo.load(zoo.save(model, folder / f"model{suffix}")), case.inputs())


@pytest.mark.parametrize("name", zoo.CASES)
def test_case_survives_its_formats(name: str, tmp_path: Path) -> None:
    case = zoo.CASES[name]
    model = case.build(1)
    before = zoo.predictions(model, case.inputs())
    assert all(np.isfinite(output).all() for output in before)
    assert before[-1].std() > 1e-4, "a constant output would hide every mistake"
    assert equal(before, zoo.predictions(model, case.inputs()), 0), "predictions change from call to call"
    for suffix in case.formats:
        assert equal(before, reloaded(case, model, suffix, tmp_path), case.tolerance), suffix
    if not case.seeded_config:
        other = case.build(2)
        other.load_weights(zoo.save(model, tmp_path / "model.weights.h5"))
        assert equal(before, zoo.predictions(other, case.inputs()), case.tolerance), ".weights.h5"


@pytest.mark.parametrize(("name", "suffix"), REFUSALS)
@pytest.mark.filterwarnings("ignore")
def test_refused_formats_really_fail(name: str, suffix: str, tmp_path: Path) -> None:
    case = zoo.CASES[name]
    assert case.reason(suffix)
    assert suffix not in case.formats
    model = case.build(1)
    before = zoo.predictions(model, case.inputs())
    try:
        after = reloaded(case, model, suffix, tmp_path)
    except Exception:
        return  # Keras raises whatever it likes here
    assert not equal(before, after, case.tolerance)


def test_every_layer_class_has_a_case() -> None:
    import keras

    exported = {o for o in vars(keras.layers).values() if inspect.isclass(o) and issubclass(o, keras.layers.Layer)}
    seen = {type(layer).__name__ for case in zoo.CASES.values() for layer in zoo.all_layers(case.build(0))}
    assert {o.__name__ for o in exported} - seen <= set(zoo.LEFT_OUT)


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    case = zoo.TOPOLOGIES["conv_net"]
    first, again, other = (zoo.predictions(case.build(seed), case.inputs()) for seed in (5, 5, 6))
    assert equal(first, again, 0)
    assert not equal(first, other, 1e-3)


def test_related_sources_are_near_and_heads_may_differ() -> None:
    case = zoo.LAYERS["batch_normalization"]
    models = zoo.sources(case, 3, related=True, classes=(4, 3, 2), fresh=True)
    assert [model.output.shape[-1] for model in models] == [4, 3, 2]
    assert len({model.layers[1].name for model in models}) == 1
    gammas = [np.asarray(model.layers[1].gamma) for model in models]
    assert np.corrcoef(gammas)[0, 1] > 0.9
    assert not np.array_equal(gammas[0], gammas[1])
    unrelated = [np.asarray(model.layers[1].gamma) for model in zoo.sources(case, 2)]
    assert abs(np.corrcoef(unrelated)[0, 1]) < 0.9


def test_unzipped_folder_and_shards(tmp_path: Path) -> None:
    case = zoo.TOPOLOGIES["conv_net"]
    model = case.build(1)
    before = zoo.predictions(model, case.inputs())
    assert equal(before, zoo.predictions(zoo.load(zoo.save(model, tmp_path / "folder")), case.inputs()), 1e-6)
    other = case.build(2)
    other.load_weights(zoo.save(model, tmp_path / "m.weights.json", max_shard_size=2e-7))
    assert len(list(tmp_path.glob("m_*.weights.h5"))) > 1
    assert equal(before, zoo.predictions(other, case.inputs()), 1e-6)


@pytest.mark.parametrize(("name", "size"), [("m.weights.h5", None), ("m.weights.json", 2e-7)])
def test_subclassed_weights(name: str, size: float | None, tmp_path: Path) -> None:
    model, other = zoo.sources(zoo.SUBCLASSED, 2)
    other.load_weights(zoo.save(model, tmp_path / name, max_shard_size=size))
    inputs = zoo.SUBCLASSED.inputs()
    assert equal(zoo.predictions(model, inputs), zoo.predictions(other, inputs), 1e-6)


def test_collecting_imports_no_framework() -> None:
    code = "import sys, zoo; assert not {'keras', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
