"""Models that nobody here made: every set in ../shared/models, and small files of old Keras versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge

pytestmark = pytest.mark.real

SETS = ["rg4detector/*.h5", "dcase2022_ae/*.hdf5", "deepmrg/*.h5", "onsd/*.keras", "stock_vincentlee/*.keras"]


def files_of(shared: Path, pattern: str) -> list[Path]:
    found = sorted((shared / "models").glob(pattern))
    assert len(found) >= 3
    return found


def run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    import keras

    inputs = [x] if isinstance(getattr(model, "_inputs_struct", None), list) else x
    return [np.asarray(value) for value in keras.tree.flatten(model(inputs, training=False))]


def example(path: Path) -> np.ndarray:
    shape = next(iter(kmerge.inspect(path).inputs.values()))
    assert shape is not None
    return np.random.default_rng(0).normal(size=(4, *(size or 5 for size in shape[1:]))).astype("float32")


@pytest.mark.parametrize("pattern", SETS)
def test_all_private_is_exact(pattern: str, shared: Path, tmp_path: Path) -> None:
    import keras

    paths = files_of(shared, pattern)
    out = tmp_path / f"merged{paths[0].suffix}"
    report = kmerge.combine(paths, out, trunk="none")
    merged = keras.models.load_model(out, compile=False)
    x = example(paths[0])
    got = merged(x if not isinstance(merged.input, list) else [x], training=False)
    for label, path in zip(report.heads, paths, strict=True):
        wanted = run(keras.models.load_model(path, compile=False), x)[0]
        np.testing.assert_array_equal(np.asarray(got[report.heads[label][0]]), wanted)


@pytest.mark.parametrize("pattern", SETS)
def test_picked_source_is_exact_and_the_trunk_runs_once(pattern: str, shared: Path, tmp_path: Path) -> None:
    import keras

    paths = files_of(shared, pattern)
    out = tmp_path / f"merged{paths[0].suffix}"
    chosen = 1
    label = list(kmerge.combine(paths, out, dry_run=True, method="pick").heads)[chosen]
    report = kmerge.combine(paths, out, method="pick", option={"label": label})
    merged = keras.models.load_model(out, compile=False)
    x = example(paths[0])
    got = merged(x if not isinstance(merged.input, list) else [x], training=False)
    wanted = run(keras.models.load_model(paths[chosen], compile=False), x)[0]
    np.testing.assert_array_equal(np.asarray(got[report.heads[label][0]]), wanted)
    trunk = {layer.name for layer in report.plan.layers if layer.role == "shared"}
    calls = {layer["name"]: len(layer["inbound_nodes"]) for layer in merged.get_config()["layers"]}
    assert {calls[name] for name in trunk if calls[name]} == {1}


@pytest.mark.parametrize("pattern", SETS)
def test_unrelated_trunks_are_not_averaged_unasked(pattern: str, shared: Path) -> None:
    report = kmerge.combine(files_of(shared, pattern), dry_run=True)
    assert report.plan.method == "fuse"
    assert any(re.search(r"do not share an ancestor \(cosine -?0\.\d\d\)", note) for note in report.notes)


@pytest.mark.parametrize("pattern", SETS)
def test_a_real_model_with_itself(pattern: str, shared: Path, tmp_path: Path) -> None:
    import keras

    path = files_of(shared, pattern)[0]
    x = example(path)
    wanted = run(keras.models.load_model(path, compile=False), x)[0]
    for trunk in ("auto", "all"):
        out = tmp_path / f"{trunk}{path.suffix}"
        kmerge.combine([path] * 3, out, trunk=trunk, method="mean")
        for value in run(keras.models.load_model(out, compile=False), x):
            np.testing.assert_array_equal(value, wanted)


def test_old_files_merge_with_themselves_and_keep_their_predictions(shared: Path, tmp_path: Path) -> None:
    """Whatever current Keras opens of the small old files, it opens merged, with the same predictions."""
    import keras

    compared = 0
    for path in sorted((shared / "legacy" / "small").glob("*.h5")):
        out = tmp_path / path.name
        kmerge.combine([path] * 2, out, trunk="none")
        data = np.load(path.with_suffix(".npz"))
        inputs = [data[key] for key in sorted(data.files) if key.startswith("x")]
        try:
            model = keras.models.load_model(path, compile=False)
            wanted = model(inputs if len(inputs) > 1 else inputs[0], training=False)
        except Exception:
            continue  # what current Keras cannot open or run is the business of conversion
        merged = keras.models.load_model(out, compile=False)
        flat = [np.asarray(value) for value in keras.tree.flatten(wanted)]
        got = merged(inputs if len(inputs) > 1 else inputs[0], training=False)
        for number, value in enumerate(keras.tree.flatten(got)):
            np.testing.assert_array_equal(np.asarray(value), flat[number % len(flat)], err_msg=path.name)
        compared += 1
    assert compared >= 18  # what Keras 3.15.1 opens and runs of them


def test_every_old_whole_model_file_merges_in_weight_space(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.h5"
    done = 0
    for path in sorted((shared / "legacy").rglob("*.h5")):
        if path.name.endswith("_inputs_and_outputs.h5"):
            continue
        trunk = "auto" if kmerge.inspect(path).layers else "all"
        kmerge.combine([path] * 2, out, trunk=trunk, method="mean", force=True)
        done += 1
    assert done > 300
