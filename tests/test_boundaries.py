"""Who may import whom, held to the table of ARCHITECTURE.md, and what a merge never loads."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kmerge"
FRAMEWORKS = frozenset({"keras", "tensorflow", "torch", "jax", "flax", "tf_keras", "keras_hub", "openvino"})
NO_FRAMEWORK_UP_TO = 3
HEAVY = FRAMEWORKS | {"scipy", "sklearn"}


@dataclass(frozen=True)
class Part:
    """One line of the table's second column."""

    name: str
    row: int
    place: int


@cache
def table() -> dict[str, Part]:
    """Parts by name, as ARCHITECTURE.md lists them: `| row | parts | duty |`."""
    parts: dict[str, Part] = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isdigit():
            for name in re.findall(r"`([^`]+)`", cells[1]):
                name = name.rstrip("/")
                assert name not in parts, f"{name} stands in the table twice"
                parts[name] = Part(name, int(cells[0]), len(parts))
    return parts


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def part_of(module: str) -> str:
    """`kmerge.store.hdf5` is a piece of `store`; `kmerge` itself is `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import: at the top, inside functions, for type checkers, or by name."""
    own = module_name(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules() else base
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "find_spec") and node.args:
                given = node.args[0]
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    yield node.lineno, given.value


def test_the_table_lists_every_module_and_nothing_else() -> None:
    found = {part_of(module) for module in modules()}
    assert sorted(found - table().keys()) == [], "missing in ARCHITECTURE.md"
    assert sorted(table().keys() - found) == [], "only in ARCHITECTURE.md"


def test_the_table_marks_packages() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for name in table():
        assert (f"`{name}/`" in text) == (PACKAGE / name).is_dir(), name


def test_rows_stand_in_order() -> None:
    rows = [part.row for part in table().values()]
    assert rows == sorted(rows)


@pytest.mark.parametrize("module", modules())
def test_imports_only_what_stands_above(module: str) -> None:
    parts = table()
    own = parts.get(part_of(module))
    if own is None:
        pytest.fail(f"{module} is in no row of ARCHITECTURE.md")
    for line, imported in imports_of(modules()[module]):
        if imported.split(".")[0] != "kmerge":
            continue
        other = parts.get(part_of(imported))
        assert other is not None, f"{module}:{line} imports {imported}, which is in no row of ARCHITECTURE.md"
        assert other.place <= own.place, (
            f"{module}:{line} imports {imported}, but '{other.name}' (row {other.row}) stands below '{own.name}'"
        )


@pytest.mark.parametrize("module", [name for name in modules() if name != "kmerge"])
def test_packages_have_no_circles(module: str) -> None:
    """Nothing imports a module that imports it back, also within a part."""
    mine = {name for _, name in imports_of(modules()[module]) if name in modules() and not _for_types(module, name)}
    for other in mine - {module}:
        theirs = {name for _, name in imports_of(modules()[other]) if not _for_types(other, name)}
        package = other == module.rpartition(".")[0]  # a package imports its modules
        assert package or module not in theirs, f"{module} and {other} import each other"


@cache
def _typing_only(module: str) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    found |= {inner.module or "", *(f"{inner.module}.{alias.name}" for alias in inner.names)}
    return frozenset(found)


def _for_types(module: str, imported: str) -> bool:
    return imported in _typing_only(module)


@pytest.mark.parametrize("module", modules())
def test_frameworks_only_where_they_may_be(module: str) -> None:
    part = table().get(part_of(module))
    if part is not None and part.row > NO_FRAMEWORK_UP_TO:
        return
    named = {name.split(".")[0] for _, name in imports_of(modules()[module])}
    assert not named & FRAMEWORKS, f"rows 0 to {NO_FRAMEWORK_UP_TO} never import a framework"


@pytest.mark.parametrize("module", modules())
def test_frameworks_are_never_imported_at_the_top(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    top = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    top += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in top} & HEAVY


def test_nothing_runs_code_from_elsewhere() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else ""
            assert name not in ("eval", "exec", "compile", "__import__"), f"{module}:{getattr(node, 'lineno', 0)}"
        imported = {name.split(".")[0] for _, name in imports_of(path)}
        assert not imported & {"pickle", "marshal", "dill", "cloudpickle", "shelve"}, module


# ---- fresh processes


def fresh(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def loaded_by(code: str, cwd: Path) -> set[str]:
    """Top-level modules that a fresh process has loaded after running the code."""
    done = fresh("-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_merge_by_api_loads_no_framework(suffix: str, fixtures_dir: Path, tmp_path: Path) -> None:
    code = f"""
import kmerge
from pathlib import Path
folder = Path({str(fixtures_dir)!r})
files = lambda family: [folder / f"{{family}}_{{label}}{suffix}" for label in "abc"]
kmerge.combine(files("finetuned"), "finetuned{suffix}")
kmerge.combine(files("cnn"), "mean{suffix}", method="mean")
kmerge.combine(files("cnn"), "median{suffix}", method="median", weights=[1, 2, 1])
kmerge.combine(files("lstm"), "private{suffix}", trunk="none")
kmerge.inspect("mean{suffix}")
kmerge.compare(files("mlp"))
"""
    loaded = loaded_by(code, tmp_path)
    assert "kmerge" in loaded
    assert "h5py" in loaded
    assert not loaded & HEAVY
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{name}{suffix}" for name in ("finetuned", "mean", "median", "private")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["combine", "{0}", "{1}", "{2}", "-o", "merged.h5"],
        ["combine", "{0}", "{1}", "{2}", "-o", "merged.h5", "--json"],
        ["combine", "{0}", "{1}", "{2}", "--dry-run"],
        ["inspect", "{0}"],
        ["compare", "{0}", "{1}"],
        ["methods"],
    ],
    ids=lambda arguments: " ".join(word for word in arguments if "{" not in word),
)
def test_a_command_loads_no_framework(arguments: list[str], fixtures_dir: Path, tmp_path: Path) -> None:
    files = [str(fixtures_dir / f"finetuned_{label}.h5") for label in "abc"]
    command = [word.format(*files) for word in arguments]
    done = fresh("-X", "importtime", "-m", "kmerge", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    loaded = imported_in(done.stderr)
    assert "kmerge" in loaded
    assert not loaded & HEAVY
    assert (tmp_path / "merged.h5").exists() is ("-o" in arguments)


def imported_in(log: str) -> set[str]:
    """Top-level modules in what `-X importtime` writes."""
    lines = re.findall(r"^import time:\s*\d+ \|\s*\d+ \|\s*(\S+)$", log, re.MULTILINE)
    return {line.split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["combine", "--help"], ["methods", "--help"]], ids=" ".join
)
def test_help_loads_no_numbers(arguments: list[str], tmp_path: Path) -> None:
    done = fresh("-X", "importtime", "-m", "kmerge", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout
    loaded = imported_in(done.stderr)
    assert "kmerge" in loaded
    assert not loaded & (HEAVY | {"numpy", "h5py", "rich"})


def test_importing_kmerge_loads_nothing_else(tmp_path: Path) -> None:
    assert not loaded_by("import kmerge; kmerge.__version__; dir(kmerge)", tmp_path) & (
        HEAVY | {"numpy", "h5py", "click"}
    )


def test_every_public_name_is_there(tmp_path: Path) -> None:
    code = "import kmerge\nfor name in kmerge.__all__: getattr(kmerge, name)"
    assert not loaded_by(code, tmp_path) & HEAVY


@pytest.mark.parametrize("module", [name for name in modules() if not name.endswith("__main__")])
def test_parts_have_a_docstring(module: str) -> None:
    path = modules()[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, f"{module} says nothing about itself"
