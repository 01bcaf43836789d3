"""Old Keras files: what opens, merges, converts, and still predicts what it predicted, against plain Keras.

    python benchmarks/legacy.py FOLDER [--json FILE]

Walks a folder with files of any age. Predictions that were recorded beside a model (`NAME_inputs_and_outputs.h5` with
the groups `inputs` and `predictions`, or `NAME.npz` with x0, x1, … and y0, y1, …) are held against those of the
converted file. Models run in processes of their own, so that a crash of Keras ends none but one file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
TOLERANCE = 1e-5
CHUNK = 60


def models(folder: Path) -> list[Path]:
    """Everything that may be a model file."""
    found = [path for path in folder.rglob("*") if path.suffix in (".h5", ".hdf5", ".keras") and path.is_file()]
    return sorted(path for path in found if not path.name.endswith("_inputs_and_outputs.h5"))


def recorded(path: Path) -> tuple[dict[str, Any], list[Any]] | None:
    """Inputs by name (or "x0", "x1", …) and predictions, where they were recorded."""
    import h5py
    import numpy as np

    beside = path.with_suffix(".npz")
    if beside.exists():
        with np.load(beside) as data:
            return (
                {key: data[key] for key in sorted(data.files) if key.startswith("x")},
                [data[key] for key in sorted(data.files) if key.startswith("y")],
            )
    beside = path.with_name(path.name.replace("_model.h5", "_inputs_and_outputs.h5"))
    if beside != path and beside.exists():
        with h5py.File(beside) as file:
            if "predictions" not in file:  # inputs and outputs that are wanted, not what the model gave
                return None
            inputs = {name.removesuffix("_input"): np.asarray(file["inputs"][name]) for name in file["inputs"]}
            return inputs, [np.asarray(file["predictions"][name]) for name in file["predictions"]]
    return None


def largest_difference(model: Any, inputs: dict[str, Any], predictions: list[Any]) -> float:
    """Between what a model gives and what was recorded."""
    import keras
    import numpy as np

    names = [tensor.name for tensor in keras.tree.flatten(model.inputs)]
    given = [inputs[name] for name in names] if set(names) == set(inputs) else list(inputs.values())
    got = keras.tree.flatten(model(given if len(given) > 1 else given[0], training=False))
    worst = 0.0
    for mine, theirs in zip(got, predictions, strict=True):
        array = np.asarray(keras.ops.convert_to_numpy(mine))
        if array.shape != theirs.shape:
            return float("inf")
        worst = max(worst, float(np.max(np.abs(array.astype("float64") - theirs), initial=0.0)))
    return worst


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def look(path: Path, folder: Path) -> dict[str, Any]:
    """Everything that needs no Keras: opened, merged with itself, converted."""
    import kmerge

    facts: dict[str, Any] = {"path": str(path)}
    try:
        seen = kmerge.inspect(path)
    except kmerge.KmergeError as error:
        return {**facts, "inspected": one_line(error)}
    facts |= {"inspected": "yes", "writer": seen.writer, "whole": bool(seen.layers)}
    if not seen.layers:
        return facts
    facts["blocked"] = [f"{item['layer']} ({item['class_name']}): {item['kind']}" for item in seen.obstacles]
    try:
        kmerge.combine([path, path], folder / f"merged{path.suffix}", method="mean", force=True)
        facts["merged"] = "yes"
    except kmerge.KmergeError as error:
        facts["merged"] = one_line(error)
    new = folder / f"{abs(hash(str(path)))}.keras"
    try:
        kmerge.convert(path, new, force=True)
        facts |= {"converted": "yes", "new": str(new)}
    except kmerge.KmergeError as error:
        facts["converted"] = one_line(error)
    return facts


def run(job: Path) -> None:
    """In a process of its own: open and run files with plain Keras, one line of JSON each."""
    import keras

    for item in json.loads(job.read_text()):
        print(json.dumps({"begin": item["path"]}), flush=True)
        facts: dict[str, Any] = {"path": item["path"]}
        data = recorded(Path(item["path"]))
        for what, file in (("old", item["path"]), ("new", item.get("new"))):
            if file is None or (what == "old" and item.get("crashed")):
                continue
            keras.backend.clear_session()
            try:
                model = keras.models.load_model(file, compile=False)
                facts[f"{what}_loads"] = "yes"
            except Exception as error:
                facts[f"{what}_loads"] = one_line(error)
                continue
            if what == "new":
                try:
                    keras.models.load_model(file)
                    facts["compiles"] = "yes"
                except Exception as error:
                    facts["compiles"] = one_line(error)
            if data is not None:
                try:
                    facts[f"{what}_difference"] = largest_difference(model, *data)
                except Exception as error:
                    facts[f"{what}_difference"] = one_line(error)
        print(json.dumps(facts), flush=True)


def run_all(jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """What plain Keras says of every file; a file that ends its process is named and left behind."""
    results: dict[str, dict[str, Any]] = {}
    waiting = list(jobs)
    while waiting:
        part, waiting = waiting[:CHUNK], waiting[CHUNK:]
        job = folder / "job.json"
        job.write_text(json.dumps(part))
        process = subprocess.run(
            [sys.executable, __file__, "--run", str(job)], capture_output=True, text=True, timeout=1800, check=False
        )
        begun = ""
        for line in process.stdout.splitlines():
            if line.startswith("{"):
                facts = json.loads(line)
                begun = facts.get("begin", begun)
                if "begin" not in facts:
                    results[facts["path"]] = facts
        ended = f"the process ended with {process.returncode}"
        for item in part:
            if item["path"] == begun and begun not in results:
                if item.get("crashed") or item.get("new") is None:
                    results[begun] = {"new_loads": ended}
                item["crashed"] = ended
        left = [item for item in part if item["path"] not in results]
        if left and not begun:
            raise SystemExit(process.stderr)
        waiting = left + waiting
    return results


def measure(folder: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="legacy-") as name:
        room = Path(name)
        found = [look(path, room) for path in models(folder)]
        jobs = [item for item in found if item.get("whole")]
        results = run_all(jobs, room)
        for item in jobs:
            item.update(results.get(item["path"], {}))
            if "crashed" in item:
                item["old_loads"] = item["crashed"]
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Rows by writer."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in found:
        if item.get("whole"):
            rows[item["writer"]].append(item)
    head = (
        "| writer | files | inspected | merged | convertible | converted | opens in Keras: old, new | recorded | "
        "equal: old, new |"
    )
    lines = [head, "|---" * 9 + "|"]
    whole = [item for item in found if item.get("whole")]
    for writer, items in [*sorted(rows.items()), ("all", whole)]:
        free = [item for item in items if not item["blocked"]]
        with_data = [item for item in items if "new_difference" in item or "old_difference" in item]

        def equal(key: str, items: list[dict[str, Any]] = with_data) -> int:
            return sum(isinstance(item.get(key), float) and item[key] <= TOLERANCE for item in items)

        def yes(key: str, items: list[dict[str, Any]] = items) -> int:
            return sum(item.get(key) == "yes" for item in items)

        lines.append(
            f"| {writer} | {len(items)} | {yes('inspected')} | {yes('merged')} | {len(free)} | {yes('converted')} | "
            f"{yes('old_loads')}, {yes('new_loads')} | {len(with_data)} | "
            f"{equal('old_difference')}, {equal('new_difference')} |"
        )
    return "\n".join(lines)


def failures(found: list[dict[str, Any]], folder: Path) -> list[str]:
    """Every failure of kmerge's, and why."""
    lines = []
    for item in found:
        name = Path(item["path"]).relative_to(folder)
        for key in ("inspected", "merged", "converted", "new_loads", "compiles"):
            if item.get(key, "yes") != "yes":
                lines.append(f"{name}: {key}: {item[key]}")
        difference = item.get("new_difference", 0.0)
        if not isinstance(difference, float) or difference > TOLERANCE:
            lines.append(f"{name}: differs by {difference}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--json", type=Path, help="write all facts there")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run)
        return
    found = measure(given.folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    print(f"\nwithout a graph (weights only): {sum(not item.get('whole') for item in found)} files")
    print("\nfailures:")
    print("\n".join(failures(found, given.folder)) or "none")


if __name__ == "__main__":
    main()
