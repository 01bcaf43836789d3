"""What the documents say is real: commands, Python snippets, examples."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def marked_block(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_main_command_does_its_job(copy: Path) -> None:
    from click.testing import CliRunner

    from kmerge.cli import main

    command = marked_block("main").split("&&")[-1]
    words = shlex.split(command)
    assert words[0] == "kmerge"
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.output
    assert (copy / words[words.index("-o") + 1]).is_file()


def test_the_test_command_runs_pytest() -> None:
    assert marked_block("test").strip().endswith("python -m pytest -n 2")


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_python_in_the_readme_runs(number: int, copy: Path) -> None:
    snippet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    exec(compile(snippet, f"README.md, Python block {number + 1}", "exec"), {})
    assert (copy / "merged.keras").is_file()


def test_every_command_of_the_readme_is_there() -> None:
    from kmerge.cli import main

    named = set(re.findall(r"`kmerge (\w+)", README))
    assert named == set(main.commands)


def test_every_method_of_the_readme_is_there_and_all_are_named() -> None:
    from kmerge.methods import METHODS

    table = README.split("| method | what it does |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {*METHODS, "auto"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_and_assert_their_number(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert "assert" in path.read_text(encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_document_names_a_path_of_one_machine() -> None:
    for document in ROOT.glob("*.md"):
        assert not re.search(r"(?<![\w.])/(home|work|root|tmp)/", document.read_text(encoding="utf-8"))
