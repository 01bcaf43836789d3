"""The command line as scripts and people meet it: exit status, streams, JSON, help, signals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from kmerge.cli import main
from kmerge.rules import INPUTS, OUTPUTS
from kmerge.version import __version__

A, B, C = "finetuned_a.h5", "finetuned_b.h5", "finetuned_c.h5"
COMMANDS = dict(main.commands)


@dataclass(frozen=True)
class Run:
    """What a command left behind."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def here(tmp_path: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the fixtures. A fusion makes no more inputs than it is given, to be done sooner."""
    for name in ("ENOUGH", "ENOUGH_FOR_DENSE"):
        monkeypatch.setattr(f"kmerge.fuse.model.{name}", 0)
    for path in fixtures_dir.glob("*.*"):
        if path.suffix in (".h5", ".keras"):
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(*args: object) -> Run:
    """A command in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="kmerge")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Run(result.exit_code, result.stdout, result.stderr)


def ok(*args: object) -> Run:
    """A command that must work."""
    result = run(*args)
    assert result.status == 0, result.err
    return result


def process(*args: object, env: dict[str, str] | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    command = [sys.executable, "-m", "kmerge", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**_environment(), **(env or {})}, **options)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "80"}


def inputs(name: str = "inputs.npz") -> None:
    """Inputs for the convolutional fixtures."""
    np.savez(name, x=np.random.default_rng(0).random((64, 8, 8, 1), dtype="float32"))


def labelled() -> None:
    """Rows with labels for two of the convolutional fixtures: in one file, and in one for each."""
    random = np.random.default_rng(0)
    x, y = random.random((40, 8, 8, 1), np.float32), random.integers(0, 2, 40)
    np.savez("labelled.npz", x=x, y_cnn_a=y, y_cnn_b=y)
    for label in "ab":
        np.savez(f"{label}.npz", x=x, y=y)


def files() -> set[str]:
    return set(os.listdir())


# ------------------------------------------------------------------------------------------------------- combine


@pytest.mark.usefixtures("here")
def test_combine_writes_and_says_what_it_did() -> None:
    result = ok("combine", A, B, C, "-o", "merged.h5")
    assert Path("merged.h5").stat().st_size > 0
    assert result.err == ""
    for fragment in ("2 shared, 3 private", "36 % of 3 separate models' 6.73 k", "cosine 0.99", "merged.h5", "mean"):
        assert fragment in result.out
    assert max(map(len, result.out.splitlines())) <= 80


@pytest.mark.usefixtures("here")
def test_without_output_it_is_merged_with_the_suffix_of_the_first_source() -> None:
    assert "merged.keras" in ok("combine", "finetuned_a.keras", "finetuned_b.keras").out
    assert Path("merged.keras").exists()


@pytest.mark.usefixtures("here")
def test_json_is_one_document_and_nothing_else() -> None:
    result = process("combine", A, B, "-o", "merged.h5", "--json")
    report = json.loads(result.stdout)
    assert report["output"] == "merged.h5"
    assert report["plan"]["method"] == "mean"
    assert [layer["name"] for layer in report["layers"]] == [layer["name"] for layer in report["plan"]["layers"]]
    assert result.stderr == ""


@pytest.mark.usefixtures("here")
def test_labels_weights_freeze_and_outputs_reach_the_plan() -> None:
    plan = ok(
        *("combine", A, B, "--dry-run", "--json", "--labels", "low, high", "--weights", "1,3", "--freeze"),
        *("--outputs", "list", "--inputs", "separate", "--trunk", "dense", "--method", "median"),
    ).json()["plan"]
    assert [source["label"] for source in plan["sources"]] == ["low", "high"]
    assert plan["weights"] == [0.25, 0.75]
    assert (plan["freeze"], plan["outputs"], plan["inputs"], plan["trunk"]) == (True, "list", "separate", "dense")
    assert plan["method"] == "median"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("flags", "shared"),
    [
        (("--trunk", "none"), set()),
        (("--trunk", "none", "--share", "dense"), {"dense"}),
        (("--private", "dense_1"), {"dense"}),
        (("--private", "dense*", "--share", "dense"), {"dense"}),
        (("--share", "dense", "--private", "dense*"), set()),
        (("--private=dense*", "--share=dense_1", "--private", "dense_1", "--share", "dense"), {"dense"}),
    ],
)
def test_the_later_of_share_and_private_wins(flags: tuple[str, ...], shared: set[str]) -> None:
    plan = ok("combine", A, B, "--dry-run", "--json", "--method", "mean", *flags).json()["plan"]
    found = {layer["name"] for layer in plan["layers"] if layer["role"] == "shared" and layer["has_weights"]}
    assert found == shared


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("label", ["b", "1", "true"])
def test_an_option_reaches_its_method(label: str) -> None:
    ok("combine", A, B, "-o", "m.h5", "--method", "pick", "--labels", f"a,{label}", "--option", f"label={label}")
    assert np.array_equal(_largest_kernel("m.h5"), _largest_kernel(B))


def _largest_kernel(path: str) -> np.ndarray:
    found: list[np.ndarray] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(item[()]) if name.endswith("kernel") else None)
    return max(found, key=np.size)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0.2", 0.2), ("3", 3), ("true", True), ("false", False), ("1e-3", 1e-3)),
        *((text, text) for text in ("abc", "null", "[1]", "NaN", "", "a=b")),
    ],
)
def test_values_of_options(text: str, value: object) -> None:
    from kmerge.cli.combine import _option

    context = click.Context(COMMANDS["combine"])
    found = _option(context, COMMANDS["combine"].params[0], (f"key={text}",))
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_a_plan_does_again_what_made_it(suffix: str) -> None:
    sources = [f"finetuned_{letter}.{suffix}" for letter in "abc"]
    flags = ["--labels", "x,y,z", "--private", "dense_1"]
    Path("plan.json").write_text(ok("combine", *sources, *flags, "--dry-run", "--json").out)
    ok("combine", *sources, *flags, "-o", f"direct.{suffix}")
    ok("combine", *sources, "-o", f"planned.{suffix}", "--plan", "plan.json")
    ok("combine", *sources, "-o", f"again.{suffix}", "--plan", f"direct.{suffix}")
    direct = _content(Path(f"direct.{suffix}"))
    assert _content(Path(f"planned.{suffix}")) == direct
    assert _content(Path(f"again.{suffix}")) == direct


def _content(path: Path) -> dict[str, bytes]:
    """Bytes of a model file, without the date of its making."""
    import zipfile

    if path.suffix == ".h5":
        return {"": path.read_bytes()}
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(content["metadata.json"])
    metadata.pop("date_saved")
    return {**content, "metadata.json": json.dumps(metadata).encode()}


@pytest.mark.usefixtures("here")
def test_a_plan_made_from_other_files_is_noted() -> None:
    ok("combine", A, B, "-o", "one.h5")
    result = ok("combine", A, C, "-o", "two.h5", "--plan", "one.h5")
    assert "note: 'finetuned_b': finetuned_c.h5 is not the model that the plan was made from" in result.err
    assert ok("combine", A, C, "-o", "three.h5", "--plan", "one.h5", "--quiet").err == ""


@pytest.mark.usefixtures("here")
def test_a_dry_run_shows_the_plan_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = files()
    result = ok("combine", A, B, "-o", "merged.h5", "--dry-run")
    assert files() == before
    assert re.search(r"dense +Dense +shared +mean +\(None, 24\) +1,560 +dense_3", result.out)
    assert "(None, 5/3)" in result.out
    assert "this was a dry run" in result.out


@pytest.mark.usefixtures("here")
def test_a_dry_run_does_not_mind_an_existing_output() -> None:
    Path("merged.h5").write_bytes(b"mine")
    ok("combine", A, B, "-o", "merged.h5", "--dry-run")
    assert Path("merged.h5").read_bytes() == b"mine"


@pytest.mark.usefixtures("here")
def test_force_replaces_and_nothing_else_does() -> None:
    Path("merged.h5").write_bytes(b"mine")
    Path("r.json").write_bytes(b"mine")
    refused = run("combine", A, B, "-o", "merged.h5")
    assert refused.status == 1
    assert "exists already" in refused.err
    assert Path("merged.h5").read_bytes() == b"mine"
    refused = run("combine", A, B, "-o", "other.h5", "--report", "r.json")
    assert refused.status == 1
    assert not Path("other.h5").exists()
    ok("combine", A, B, "-o", "merged.h5", "--report", "r.json", "--force")
    assert json.loads(Path("r.json").read_text())["output"] == "merged.h5"
    assert Path("merged.h5").stat().st_size > 1000


@pytest.mark.usefixtures("here")
def test_quiet_says_nothing_and_still_answers_json() -> None:
    assert ok("combine", A, B, "-o", "one.h5", "--quiet") == Run(0, "", "")
    assert ok("combine", A, B, "-o", "two.h5", "--quiet", "--json").json()["bytes"] > 0
    refused = run("combine", A, B, "-o", "one.h5", "--quiet")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("kmerge: ")


@pytest.mark.usefixtures("here")
def test_reports_as_json_and_page() -> None:
    printed = ok("combine", A, B, "-o", "m.h5", "--json", "--report", "r.json").json()
    assert json.loads(Path("r.json").read_text()) == printed
    ok("combine", A, B, "-o", "n.h5", "--report", "r.html", "--quiet")
    assert Path("r.html").read_text().startswith("<!DOCTYPE html>")


def _weights_only(*letters: str) -> list[str]:
    """Weights of fixtures in files of their own, as Keras 2 wrote them."""
    for letter in letters:
        with h5py.File(f"finetuned_{letter}.h5") as whole, h5py.File(f"{letter}.h5", "w") as weights:
            for key, value in whole["model_weights"].attrs.items():
                weights.attrs[key] = value
            for name in whole["model_weights"]:
                whole.copy(f"model_weights/{name}", weights)
    return [f"{letter}.h5" for letter in letters]


@pytest.mark.usefixtures("here")
def test_a_base_gives_weights_their_architecture() -> None:
    (weights,) = _weights_only("a")
    refused = run("combine", weights, weights, "-o", "m.h5")
    assert refused.status == 1
    assert "--base" in refused.err
    result = ok("combine", weights, weights, "-o", "m.h5", "--base", A, "--json")
    assert result.json()["shared"]["layers"] == 2


@pytest.mark.usefixtures("here")
def test_weights_that_were_merged_can_be_merged_again() -> None:
    (weights,) = _weights_only("a")
    ok("combine", weights, weights, "-o", "one.h5", "--trunk", "all")
    assert "not known" in ok("combine", "one.h5", "one.h5", "-o", "two.h5", "--trunk", "all").out
    assert "merged by kmerge" in ok("inspect", "two.h5").out
    ok("combine", weights, weights, "-o", "three.h5", "--plan", "one.h5")


@pytest.mark.usefixtures("here")
def test_unrelated_sources_are_fused_and_told_so() -> None:
    before = files()
    result = ok("combine", "mlp_a.h5", "mlp_b.h5", "--dry-run")
    assert files() == before
    assert "note: the models do not share an ancestor (cosine -0.01)" in result.err
    assert "fuse" in result.out
    assert "not measured: this was a dry run" in result.out
    assert "not measured (give inputs with --data)" in ok("combine", "mlp_a.h5", "mlp_b.h5", "--method", "mean").out


@pytest.mark.usefixtures("here")
def test_flags_of_a_calibration_reach_the_plan() -> None:
    inputs()
    plan = ok(
        *("combine", "cnn_a.h5", "cnn_b.h5", "--dry-run", "--json", "--data", "inputs.npz", "--samples", "10"),
        *("--width", "1.5", "--keep", "0.9", "--seed", "4"),
    ).json()["plan"]
    assert (plan["method"], plan["width"], plan["keep"], plan["seed"]) == ("fuse", 1.5, 0.9, 4)
    assert plan["calibration"] == {"inputs": "10 of 64 inputs from inputs.npz", "rows": 10, "synthetic": False}


@pytest.mark.usefixtures("here")
def test_data_may_be_given_per_source_and_may_have_an_equals_sign_in_its_name() -> None:
    inputs("x=y.npz")
    inputs("inputs.npz")

    def said(*data: str) -> str:
        flags = [word for file in data for word in ("--data", file)]
        plan = ok("combine", "cnn_a.h5", "cnn_b.h5", "--dry-run", "--json", *flags).json()["plan"]
        return str(plan["calibration"]["inputs"])

    assert said("x=y.npz") == "64 inputs from x=y.npz"
    assert said("cnn_a=x=y.npz", "cnn_b=inputs.npz") == "128 inputs from x=y.npz and inputs.npz, 64 for each source"


@pytest.mark.usefixtures("here")
def test_agreement_is_shown_and_too_little_of_it_is_a_warning() -> None:
    inputs()
    result = ok("combine", "cnn_a.h5", "cnn_b.h5", "--method", "mean", "--data", "inputs.npz", "--report", "r.html")
    assert re.search(r"agreement +cnn_a \d+\.\d %, cnn_b \d+\.\d % \(of decisions\), on 64", result.out)
    assert "warning: part of what the sources know is lost" in result.err
    page = Path("r.html").read_text()
    assert "<h2>Agreement with the sources</h2>" in page
    assert "<h2>Warnings</h2>" in page
    assert "agreement of cnn_a with its source:" in ok("inspect", "merged.h5").out
    report = ok("combine", "cnn_a.h5", "cnn_a.h5", "--data", "inputs.npz", "--json", "--force").json()
    assert [item["value"] for item in report["agreement"]] == [1.0, 1.0]
    assert report["warnings"] == []


BAD_CALLS = [
    # arguments, exit status, a part of what is said
    ((), 2, "Usage"),
    (("frobnicate",), 2, "No such command"),
    (("combine",), 2, "Missing argument"),
    (("combine", A), 2, "at least two sources: 1 given"),
    (("combine", A, B, "--trnk", "all"), 2, "No such option"),
    (("combine", A, B, "--inputs", "both"), 2, "'both' is not one of"),
    (("combine", A, B, "--outputs", "sum"), 2, "'sum' is not one of"),
    (("combine", A, B, "--width", "9"), 2, "9 is no width: give a number from 0.25 to 8"),
    (("combine", A, B, "--width", "nan"), 2, "nan is no width"),
    (("combine", A, B, "--width", "2"), 1, "'mean' keeps the width of the sources. Take --method fuse"),
    (("combine", A, B, "--keep", "0"), 2, "0 is no share"),
    (("combine", A, B, "--keep", "1.1"), 2, "1.1 is no share"),
    (("combine", A, B, "--keep", "0.9", "--method", "mean"), 1, "does not run the models"),
    (("combine", A, B, "--keep", "0.9", "--method", "fuse", "--trunk", "none"), 1, "leave one of them out"),
    (("combine", A, B, "--samples", "7"), 2, "7 is not in the range"),
    (("combine", A, B, "--seed", "-1"), 2, "-1 is not in the range"),
    (("combine", A, B, "--data", "absent.npz"), 1, "absent.npz does not exist"),
    (("combine", A, B, "--data", "x=absent.npz"), 2, "no source is called 'x', they are finetuned_a, finetuned_b"),
    (("combine", A, B, "--data", "one.npz", "--data", "two.npz"), 2, "one as LABEL=FILE for each"),
    (("combine", A, B, "--data", "finetuned_a=x.npz"), 2, "none is given for 'finetuned_b'"),
    (("combine", A, B, "--data", "finetuned_a=x", "--data", "finetuned_a=y"), 2, "two files are given"),
    (("combine", A, B, "--method", "zip", "--option", "repair=1"), 1, "repair is 1: expected true or false"),
    (("combine", A, B, "--method", "align", "--option", "by=luck"), 1, "by is 'luck': expected auto or weights or"),
    (("combine", A, B, "--method", "transport", "--option", "epsilon=0"), 1, "expected a number above 0"),
    (("combine", A, B, "--plan", "p", "--seed", "1", "--width", "2"), 2, "leave out --width, --seed"),
    (("combine", A, B, "--weights", "1,x"), 2, "'x' is no importance"),
    (("combine", A, B, "--weights", "1,-1"), 2, "at least 0"),
    (("combine", A, B, "--weights", "1,nan"), 2, "'nan' is no importance"),
    (("combine", A, B, "--weights", "0,0"), 2, "all are 0"),
    (("combine", A, B, "--weights", "1"), 2, "1 given for 2 sources"),
    (("combine", A, B, "--labels", "a,b,c"), 2, "3 given for 2 sources"),
    (("combine", A, B, "--labels", "a,"), 2, "empty label"),
    (("combine", A, B, "--labels", "a,a"), 1, "Two sources are called 'a'"),
    (("combine", A, B, "--method", "magic"), 2, "There is no method 'magic': choose one of auto, align, fuse, mean"),
    (("combine", A, B, "--method", "mean", "--option", "density=1"), 2, "has no option 'density'"),
    (("combine", A, B, "--option", "density"), 2, "no KEY=VALUE"),
    (("combine", A, B, "--option", "=1"), 2, "no KEY=VALUE"),
    (("combine", A, B, "--method", "pick", "--option", "label=z"), 1, "no source is called 'z'"),
    (("combine", A, B, "--report", "r.txt"), 2, "neither .json nor .html"),
    (("combine", A, B, "-o", "m.json", "--report", "m.json"), 2, "is also the output"),
    (("combine", A, B, "--report", "nowhere/r.json"), 1, "nowhere does not exist"),
    (("combine", A, B, "--report", A, "--force"), 2, "neither .json nor .html"),
    (("combine", A, B, "-o", "m.h5", "--plan", "p.json", "--trunk", "all"), 2, "leave out --trunk"),
    (("combine", A, B, "-o", "m.h5", "--plan", "p.json", "--freeze", "--share", "x"), 2, "leave out --share, --freeze"),
    (("combine", A, B, "-o", "m.h5", "--plan", "missing.json"), 1, "There is no plan 'missing.json'"),
    (("combine", A, B, "-o", "m.h5", "--plan", B), 1, "holds no plan"),
    (("combine", A, B, "-o", A, "--force"), 1, "one of the sources"),
    (("combine", A, B, "-o", "nowhere/m.h5"), 1, "nowhere does not exist"),
    (("combine", A, B, "--trunk", "nonsense"), 1, "has no layer 'nonsense'"),
    (("combine", A, B, "--trunk", "all"), 1, "kernel is (24, 5) in 'finetuned_a' but (24, 3) in 'finetuned_b'"),
    (("combine", A, B, "--private", "nonsense*"), 1, "no layer of 'finetuned_a' has such a name"),
    (("combine", A, "missing.h5"), 1, "missing.h5 does not exist"),
    (("combine", A, "text.h5"), 1, "text.h5"),
    (("combine", A, B, "--base", "missing.h5"), 1, "missing.h5 does not exist"),
    (("inspect",), 2, "Missing argument"),
    (("inspect", "text.h5"), 1, "text.h5"),
    (("inspect", A, "--nonsense"), 2, "No such option"),
    (("compare", A), 2, "at least two sources: 1 given"),
    (("compare", A, "missing.h5"), 1, "missing.h5 does not exist"),
    (("methods", "magic"), 2, "There is no method 'magic'"),
    (("completion", "csh"), 2, "'csh' is not one of"),
    (("completion",), 2, "Missing argument"),
]


def _joined(value: object) -> str | None:
    """Arguments as the name of a test."""
    return " ".join(value) or "nothing" if isinstance(value, tuple) else None


@pytest.mark.parametrize(("args", "status", "fragment"), BAD_CALLS, ids=_joined)
def test_bad_calls(here: Path, args: tuple[str, ...], status: int, fragment: str) -> None:
    (here / "text.h5").write_text("not a model")
    before = {path: path.read_bytes() for path in here.iterdir()}
    result = run(*args)
    assert result.status == status, result.err
    assert fragment in " ".join(result.err.split())
    assert result.out == ""
    assert "Traceback" not in result.err
    if status == 1:
        assert result.err.startswith("kmerge: ")
    assert {path: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.usefixtures("here")
def test_a_message_brings_its_notes_and_debug_the_place() -> None:
    Path("cut.h5").write_bytes(Path(A).read_bytes()[:5000])
    plain, debug = run("inspect", "cut.h5"), run("inspect", "cut.h5", "--debug")
    assert plain.status == debug.status == 1
    assert "Traceback" not in plain.err
    assert "Traceback (most recent call last)" in debug.err
    assert debug.err.endswith(plain.err)


@pytest.mark.usefixtures("here")
def test_a_fault_of_kmerge_is_one_clean_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("odd\nthing")

    monkeypatch.setattr("kmerge.api.inspect", broken)
    result = run("inspect", A)
    assert result.status == 1
    assert result.err.startswith("kmerge: unexpected ValueError: odd thing\n")
    assert "--debug" in result.err


# ------------------------------------------------------------------------------------ inspect, compare, methods


@pytest.mark.usefixtures("here")
def test_inspect_shows_the_layers() -> None:
    result = ok("inspect", "cnn_a.keras")
    for fragment in (
        "whole model, Keras 3 (.keras)",
        "Keras 3.",
        "(None, 8, 8, 1)",
        "conv2d_1",
        "GlobalAveragePooling2D",
    ):
        assert fragment in result.out
    assert "role" not in result.out
    assert result.err == ""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_inspect_knows_a_merged_file(suffix: str) -> None:
    sources = [f"finetuned_{letter}.{suffix}" for letter in "ab"]
    ok("combine", *sources, "-o", f"m.{suffix}", "--labels", "low,high", "--private", "dense_1")
    result = ok("inspect", f"m.{suffix}")
    assert f"merged by kmerge {__version__}: method mean" in result.out
    assert re.search(rf"low +finetuned_a.{suffix} +[0-9.]+ kB +blake3:[0-9a-f]{{16}}\.\.\.", result.out)
    assert "private (high)" in result.out
    found = ok("inspect", f"m.{suffix}", "--json").json()
    roles = {layer["name"]: (layer["role"], layer["source"]) for layer in found["layers"]}
    assert roles["dense"] == ("shared", "")
    assert roles["low"] == ("private", "low")
    assert sorted(roles.values()).count(("private", "high")) == 2
    assert len(found["merge"]["plan"]["sources"][0]["digest"]) > 32


@pytest.mark.usefixtures("here")
def test_inspect_takes_several_files() -> None:
    assert ok("inspect", A, B).out.count("written by") == 2
    assert [item["name"] for item in ok("inspect", A, B, "--json").json()] == [A, B]
    mixed = run("inspect", A, "missing.h5", B)
    assert mixed.status == 1
    assert mixed.out.count("written by") == 2
    assert "missing.h5 does not exist" in mixed.err
    assert run("inspect", A, "missing.h5", "--json").out == ""


@pytest.mark.usefixtures("here")
def test_names_in_a_file_do_not_steer_the_terminal() -> None:
    with h5py.File(A, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            if layer["config"]["name"] == "dense_1":
                layer["config"]["trainable"] = False
                layer["class_name"] = "De\x1b[31mnse\u202e"
        file.attrs["model_config"] = json.dumps(config)
    result = ok("inspect", A)
    assert "\x1b" not in result.out
    assert "\u202e" not in result.out
    assert "(frozen)" in result.out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("sources", "fragments"),
    [
        ((A, B, C), ["share an ancestor", "0.99", "-o merged.h5\n", "default trunk ends with 'dense_1'"]),
        (
            ("mlp_a.keras", "mlp_b.keras"),
            ["do not share an ancestor", "To fuse them:", "-o merged.keras\n"],
        ),
        ((A, A), ["hold the same weights", "the same network.", "possible"]),
        (("cnn_a.h5", "cnn_b.h5"), ["(0.99)", "Cosines in brackets"]),
        (("mlp_a.h5", "lstm_a.h5"), ["No trunk can be shared", "--trunk none"]),
    ],
    ids=_joined,
)
def test_compare_says_what_to_do(sources: tuple[str, ...], fragments: list[str]) -> None:
    result = ok("compare", *sources)
    text = " ".join(result.out.split()) + "\n" + result.out
    for fragment in fragments:
        assert fragment in text or fragment.strip() in text, result.out
    command = result.out.splitlines()[-1].strip()
    assert command.startswith("kmerge combine ")
    ok(*shlex.split(command)[1:])


@pytest.mark.usefixtures("here")
def test_compare_as_json() -> None:
    result = ok("compare", A, B, "--json")
    found = result.json()
    assert found["ancestry"]["related"] is True
    assert found["layers"][-1]["differs"] == "shape"
    assert result.err == ""


def test_methods() -> None:
    listed = ok("methods").out
    everything = ok("methods", "--json").json()
    assert {"auto", "mean", "pick"} <= {item["name"] for item in everything}
    assert len({tuple(sorted(item)) for item in everything}) == 1
    for item in everything:
        assert item["name"] in listed
        one = ok("methods", item["name"])
        assert item["description"].split("\n")[0].split(".")[0] in " ".join(one.out.split())
        for option in item["options"]:
            assert f"--option {option}=" in one.out
        assert ok("methods", item["name"], "--json").json() == item


def test_version() -> None:
    assert ok("--version").out == f"kmerge {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = ok("completion", shell)
    assert "_KMERGE_COMPLETE" in result.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kmerge ", "combine"),
        ("kmerge combine --tr", "--trunk"),
        ("kmerge combine --method m", "mean"),
        ("kmerge combine --inputs ", "separate"),
        ("kmerge methods p", "pick"),
    ],
)
def test_completion_finds(words: str, expected: str) -> None:
    env = {"_KMERGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    found = subprocess.run(
        [sys.executable, "-c", "from kmerge.cli import main; main(prog_name='kmerge')"],
        env={**_environment(), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"plain,{expected}" in found.stdout.splitlines()


# ---------------------------------------------------------------------------------------------------------- help


def test_choices_are_those_of_the_plan() -> None:
    by_name = {param.name: param for param in COMMANDS["combine"].params}
    assert tuple(by_name["inputs"].type.choices) == INPUTS
    assert tuple(by_name["outputs"].type.choices) == OUTPUTS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_is_documented(name: str) -> None:
    command = COMMANDS[name]
    text = ok(name, "--help").out
    assert command.help
    assert command.short_help
    assert f"kmerge {name} " in text
    assert max(map(len, text.splitlines())) <= 80
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help, param.name
            assert param.help.rstrip("]").rstrip().endswith((".", "equal", "suffix", "names")), param.help
            assert all(option in text for option in param.opts)


def test_help_with_h() -> None:
    assert ok("-h").out == ok("--help").out


def _examples(command: click.Command) -> Iterator[str]:
    text = (command.help or "").replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip().startswith("kmerge "):
            yield " ".join(line.split())


@pytest.mark.parametrize("command", [main, *COMMANDS.values()], ids=lambda command: command.name)
def test_examples_in_the_help_run(here: Path, command: click.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / ".config/fish/completions").mkdir(parents=True)
    inputs()
    if command.name == "finetune":
        ok("combine", "cnn_a.keras", "cnn_b.keras", "-o", "merged.keras", "--method", "mean")
        labelled()
    examples = list(_examples(command))
    assert examples
    for line in examples:
        call, _, target = line.partition(" > ")
        result = ok(*shlex.split(call)[1:])
        if target:
            Path(os.path.expanduser(target)).write_text(result.out)


# ------------------------------------------------------------------------------------------- as a process


def test_help_loads_nothing_heavy() -> None:
    heavy = ["numpy", "h5py", "rich", "keras", "tensorflow", "kmerge.api"]
    code = "import sys\nfrom kmerge.cli import main\ntry: main(['combine', '--help'])\nexcept SystemExit: pass\n"
    code += f"sys.exit(', '.join(set(sys.modules) & set({heavy})) or 0)"
    result = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("args", "unused"),
    [
        (("combine", A, B, "-o", "m.h5"), {"keras", "tensorflow"}),
        (("combine", A, B, "-o", "m.h5", "--json"), {"keras", "tensorflow", "rich"}),
        (("compare", A, B, "--json"), {"keras", "tensorflow", "rich"}),
        (("inspect", "cnn_a.keras"), {"keras", "tensorflow"}),
    ],
)
def test_commands_load_no_framework(args: tuple[str, ...], unused: set[str]) -> None:
    code = (
        f"import sys\nfrom kmerge.cli import main\ntry: main({args!r})\nexcept SystemExit as end: assert not end.code\n"
    )
    code += f"sys.exit(', '.join(set(sys.modules) & {unused!r}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("here")
def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{shlex.quote(sys.executable)} -m kmerge inspect {' '.join([A, B, C] * 100)} | head -n 1"
    result = subprocess.run(command, shell=True, env=_environment(), capture_output=True, text=True)
    assert result.stdout.startswith("file")
    assert result.stderr == ""


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "kmerge", "inspect", A],
            stdout=full,
            stderr=subprocess.PIPE,
            env=_environment(),
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr.startswith("kmerge: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_harm(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m kmerge combine {A} {B} -o m.h5 {closed}"
    assert subprocess.run(command, shell=True, env=_environment()).returncode == 0
    ok("inspect", "m.h5")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"NO_COLOR": "1"}],
    ids=lambda env: next(iter(env)),
)
def test_names_that_the_terminal_cannot_print(env: dict[str, str]) -> None:
    labels = "ähre,日本"
    made = process("combine", A, B, "-o", "m.h5", "--labels", labels, "--report", "r.html", env={"PYTHONUTF8": "1"})
    assert made.returncode == 0, made.stderr
    for args in (("inspect", "m.h5"), ("inspect", "m.h5", "--json"), ("combine", A, B, "--plan", "m.h5", "--dry-run")):
        result = process(*args, env=env)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout
        if "--json" in args:
            assert json.loads(result.stdout)["outputs"].keys() == set(labels.split(","))


SLOW = """
import sys, time
import kmerge.api
def slow(*_):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
kmerge.job.merge_tensors = slow
from kmerge.cli import main
main()
"""


def _heed_signals() -> None:
    """Undo what `nohup` and `&` do to the processes that they start: to ignore signals is inherited."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "kmerge: interrupted, nothing was written"),
        (signal.SIGTERM, 143, "kmerge: stopped, nothing was written"),
        (signal.SIGHUP, 129, "kmerge: stopped, nothing was written"),
    ],
)
def test_signals_leave_nothing_behind(number: signal.Signals, status: int, message: str) -> None:
    before = files()
    command = [sys.executable, "-c", SLOW, "combine", A, B, "-o", "m.h5"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, env=_environment(), text=True, preexec_fn=_heed_signals
    ) as running:
        assert running.stderr
        assert running.stderr.readline() == "ready\n"
        assert len(files()) == len(before) + 1  # the temporary file
        running.send_signal(number)
        said = running.stderr.read()
    assert running.returncode == status
    assert said.strip() == message
    assert files() == before


@pytest.mark.usefixtures("here")
def test_an_interruption_after_the_merge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kmerge.cli.combine._write_report", interrupted)
    result = run("combine", A, B, "-o", "m.h5", "--report", "r.json")
    assert result.status == 130
    assert result.err.strip() == "kmerge: interrupted, after m.h5 was written"


def _in_terminal(width: int, *args: str) -> tuple[int, str]:
    """A command in a terminal of its own: status and all that it printed."""
    import fcntl
    import pty
    import struct
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**_environment(), "TERM": "xterm-256color"}
        environment.pop("COLUMNS")
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        os.execve(sys.executable, [sys.executable, "-m", "kmerge", *args], environment)
    said = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        said += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("width", [60, 80, 120])
def test_in_a_terminal_there_is_a_bar_and_nothing_is_too_wide(width: int) -> None:
    status, said = _in_terminal(width, "combine", A, B, "-o", "m.h5")
    assert status == 0
    assert "merging" in said
    assert "kB" in said
    status, said = _in_terminal(width, "inspect", "m.h5")
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert max(map(len, plain.splitlines())) <= width
    assert "merging" not in _in_terminal(width, "combine", A, B, "-o", "n.h5", "--quiet")[1]
