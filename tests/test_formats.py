"""Every format in and out: within one without a framework, between two through Keras, weights without a graph."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zoo

import kmerge
from kmerge import live

CASE = zoo.CASES["conv_net"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small convolutional networks, `a` and `b`, in every format that Keras writes."""
    made = tmp_path_factory.mktemp("formats")
    for label, model in zip("ab", zoo.sources(CASE, 2), strict=True):
        for suffix in (".h5", ".keras", ".weights.h5", ""):
            zoo.save(model, made / f"{label}{suffix}")
        model.save_weights(str(made / f"{label}.weights.json"), max_shard_size=0.0001)
    return made


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, np.ndarray]:
    return {label: zoo.predictions(zoo.load(folder / f"{label}.keras"), CASE.inputs())[0] for label in "ab"}


def array(value: Any) -> np.ndarray:
    """A tensor of any backend as NumPy array."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(value))


def heads(path: Path) -> dict[str, np.ndarray]:
    model = zoo.load(path)
    return {key: array(value) for key, value in model(zoo.tensors(CASE.inputs()), training=False).items()}


@pytest.mark.parametrize("target", [".h5", ".keras", ""])
@pytest.mark.parametrize("second", [".h5", ".keras", ""])
@pytest.mark.parametrize("first", [".h5", ".keras", ""])
def test_any_format_to_any_other(
    first: str, second: str, target: str, folder: Path, wanted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / f"merged{target}"
    kmerge.combine({"a": folder / f"a{first}", "b": folder / f"b{second}"}, out, trunk="none")
    if not target and (first, second) == (".h5", ".h5"):
        out = out.rename(tmp_path / "merged.h5")  # a name without suffix leaves the sources' format
    if not target and first and out.is_file() and zipfile.is_zipfile(out):
        out = out.rename(tmp_path / "merged.keras")
    got = heads(out)
    for label, values in wanted.items():
        np.testing.assert_array_equal(got[label], values)


def test_a_file_is_known_by_its_content(folder: Path, wanted: dict[str, np.ndarray], tmp_path: Path) -> None:
    paths = [tmp_path / "one.keras", tmp_path / "two.h5"]
    shutil.copy(folder / "a.h5", paths[0])
    shutil.copy(folder / "b.keras", paths[1])
    kmerge.combine(paths, tmp_path / "merged.keras", labels=["a", "b"], trunk="none")
    got = heads(tmp_path / "merged.keras")
    for label, values in wanted.items():
        np.testing.assert_array_equal(got[label], values)


@pytest.mark.parametrize("suffix", [".weights.h5", ".weights.json"])
def test_weights_without_a_graph(suffix: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean.weights.h5"
    paths = [folder / f"{label}{suffix}" for label in "ab"]
    with pytest.raises(kmerge.PlanError, match="--trunk all"):
        kmerge.combine(paths, out)
    kmerge.combine(paths, out, trunk="all", method="mean")
    import keras

    models = [zoo.load(folder / f"{label}.keras") for label in "ab"]
    merged = keras.models.clone_model(models[0])
    merged.load_weights(out)
    for weight, one, two in zip(merged.get_weights(), *(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(weight, (one + two) / 2, atol=1e-6)


@pytest.mark.parametrize("suffix", [".weights.h5", ".weights.json"])
def test_weights_with_a_base_that_has_the_graph(
    suffix: str, folder: Path, wanted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "merged.keras"
    paths = {label: folder / f"{label}{suffix}" for label in "ab"}
    kmerge.combine(paths, out, trunk="none", base=folder / "a.keras")
    got = heads(out)
    for label, values in wanted.items():
        np.testing.assert_array_equal(got[label], values)


def test_subclassed_models(tmp_path: Path) -> None:
    paths = [tmp_path / f"{label}.keras" for label in "ab"]
    models = zoo.sources(zoo.SUBCLASSED, 2)
    for model, path in zip(models, paths, strict=True):
        zoo.save(model, path)
    with pytest.raises(kmerge.PlanError, match="subclassed"):
        kmerge.combine(paths, tmp_path / "m.keras", method="mean")
    kmerge.combine([paths[0]] * 2, tmp_path / "m.keras", labels=["a", "b"], trunk="all", method="mean")
    inputs = zoo.SUBCLASSED.inputs()
    got = zoo.predictions(zoo.load(tmp_path / "m.keras"), inputs)
    for one, two in zip(got, zoo.predictions(zoo.load(paths[0]), inputs), strict=True):
        np.testing.assert_array_equal(one, two)


def test_files_and_live_models_together(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    live = zoo.load(folder / "a.keras")
    merged = kmerge.merge_models({"a": live, "b": folder / "b.h5"}, trunk="none")
    got = merged(zoo.tensors(CASE.inputs()), training=False)
    for label, values in wanted.items():
        np.testing.assert_array_equal(array(got[label]), values)


def _lambda_model() -> Any:
    import keras

    inputs = keras.Input((4,))
    x = keras.layers.Lambda(lambda value: value * 2, name="doubled")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def test_a_lambda_passes_through_a_file_and_is_never_run(tmp_path: Path) -> None:
    for suffix in (".h5", ".keras"):
        _lambda_model().save(tmp_path / f"one{suffix}")
    for suffix in (".h5", ".keras"):
        kmerge.combine([tmp_path / f"one{suffix}"] * 2, tmp_path / f"two{suffix}", trunk="none")
    with pytest.raises(kmerge.FormatError, match="Lambda layer 'doubled'"):
        kmerge.combine([tmp_path / "one.h5"] * 2, tmp_path / "three.keras", trunk="none")
    with pytest.raises(kmerge.FormatError, match="Lambda layer 'doubled'"):
        kmerge.merge_models([tmp_path / "one.keras"] * 2, trunk="none")
    assert not (tmp_path / "three.keras").exists()


def test_a_lambda_of_the_callers_own_live_models_is_kept() -> None:
    model = _lambda_model()
    merged = kmerge.merge_models([model, model], trunk="none")
    x = np.ones((2, 4), dtype="float32")
    for value in merged(x).values():
        np.testing.assert_array_equal(array(value), array(model(x)))


def test_a_custom_layer_of_live_models_need_not_be_registered() -> None:
    import keras

    class Scale(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(shape=(shape[-1],), initializer="uniform")

        def call(self, x: Any) -> Any:
            return x * self.factor

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(Scale()(inputs)))
    merged = kmerge.merge_models([model, model], method="mean")
    x = np.ones((2, 4), dtype="float32")
    for value in merged(x).values():
        np.testing.assert_array_equal(array(value), array(model(x)))


def test_facts_are_stored_and_shown(folder: Path, tmp_path: Path) -> None:
    for suffix, read in ((".h5", _stored_h5), (".keras", _stored_keras)):
        paths = {label: folder / f"{label}{suffix}" for label in "ab"}
        report = kmerge.combine(paths, tmp_path / f"m{suffix}", method="mean")
        stored = read(tmp_path / f"m{suffix}")
        assert stored["kmerge"] == kmerge.__version__
        assert stored["plan"] == report.plan.to_dict()
        for source, path in zip(stored["plan"]["sources"], paths.values(), strict=True):
            assert source["name"] == path.name
            assert source["size"] == path.stat().st_size
            assert source["digest"].startswith("blake3:")
        shown = kmerge.inspect(tmp_path / f"m{suffix}")
        assert shown.merge is not None
        assert shown.merge["plan"] == stored["plan"]
        again = kmerge.combine(paths, tmp_path / f"again{suffix}", plan=tmp_path / f"m{suffix}")
        assert [source.digest for source in again.plan.sources] == [source.digest for source in report.plan.sources]
        assert not again.notes
        swapped = {"a": folder / f"b{suffix}", "b": folder / f"a{suffix}"}
        other = kmerge.combine(swapped, tmp_path / f"other{suffix}", plan=tmp_path / f"m{suffix}")
        assert any("not the model that the plan was made from" in note for note in other.notes)


def _stored_h5(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return json.loads(file.attrs["kmerge"])


def _stored_keras(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("metadata.json"))["kmerge"]


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(suffix: str, folder: Path, tmp_path: Path) -> None:
    """Processes are killed at moments spread over the whole run; what is there then loads, and is one of the two."""
    out = tmp_path / f"merged{suffix}"
    kmerge.combine([folder / f"a{suffix}", folder / f"b{suffix}"], out, trunk="none")
    old = out.read_bytes()
    program = (
        "import kmerge, sys\n"
        f"kmerge.combine([{str(folder / f'a{suffix}')!r}] * 2, {str(out)!r}, labels=['x', 'y'], trunk='none', "
        "force=True)\n"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, env=_environment())
    whole = time.perf_counter() - started
    seen = set()
    for moment in np.linspace(0.1, 1.1, 12):
        out.write_bytes(old)
        process = subprocess.Popen([sys.executable, "-c", program], env=_environment())
        time.sleep(whole * float(moment))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.read_bytes() == old:
            seen.add("old")
        else:
            assert set(kmerge.inspect(out).outputs) == {"x", "y"}
            seen.add("new")
    assert "old" in seen


def _environment() -> dict[str, str]:
    root = str(Path(kmerge.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root}


def test_a_conversion_is_silent(folder: Path, tmp_path: Path) -> None:
    """Neither what Python prints on its way, nor what TensorFlow's C++ does; with or without standard error."""
    out = tmp_path / "merged.h5"
    command = [sys.executable, "-m", "kmerge", "combine", str(folder / "a.keras"), str(folder / "b.keras")]
    command += ["-o", str(out), "--trunk", "none", "--quiet"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert zoo.load(out).layers
    closed = f"{shlex.join([*command, '--force'])} 2>&-"
    done = subprocess.run(closed, shell=True, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_silence_ends_with_the_last_who_wants_it(capfd: pytest.CaptureFixture[str]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with live.quiet():
            entered.set()
            leave.wait(10)

    def fail() -> None:
        with live.quiet():
            thread.start()
            entered.wait(10)
            os.write(2, b"one ")
            raise KeyError

    thread = threading.Thread(target=other)
    with pytest.raises(KeyError):
        fail()
    os.write(2, b"two ")
    leave.set()
    thread.join()
    os.write(2, b"three")
    assert capfd.readouterr().err == "three"


def test_silence_without_standard_error() -> None:
    code = """if True:
        import os
        from kmerge import live
        os.close(2)
        with live.quiet():
            os.write(2, b"lost")
        try:
            os.fstat(2)
        except OSError:
            print("closed")
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "closed\n")


def test_an_h5_that_keras_cannot_write(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(kmerge.MergeError, match="cannot open the merged model"):
        live.write_as_h5(tmp_path / "missing.keras", tmp_path / "out.h5", "{}")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(kmerge.OutputError, match=r"cannot write the merged model as \.h5"):
        live.write_as_h5(folder / "a.keras", tmp_path / "folder.h5", "{}")


def test_an_h5_of_custom_layers(tmp_path: Path) -> None:
    import keras

    class Twice(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return 2 * x

    inputs = keras.Input((3,))
    keras.Model(inputs, keras.layers.Dense(2)(Twice()(inputs))).save(tmp_path / "a.keras")
    with pytest.raises(kmerge.MergeError, match="could not be deserialized"):
        live.write_as_h5(tmp_path / "a.keras", tmp_path / "a.h5", "{}")
    live.write_as_h5(tmp_path / "a.keras", tmp_path / "a.h5", "{}", {"Twice": Twice})
    assert _stored_h5(tmp_path / "a.h5") == {}


def test_the_default_output_takes_the_first_sources_suffix(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in (".h5", ".keras"):
        report = kmerge.combine([folder / f"a{suffix}", folder / f"b{suffix}"], trunk="none")
        assert report.output == f"merged{suffix}"
        assert (tmp_path / f"merged{suffix}").is_file()
