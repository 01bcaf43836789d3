"""How fast and how lean `kmerge combine` is: whole processes, beside a Keras script and beside `cat` and `cp`.

Makes its own models, prints one table with the bars that kmerge sets itself, and cleans up. Its exit status is 0 even
where a bar is missed: it is a report. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

# Standard library only at the top: Linux counts the parent's memory into a child's peak until the child's exec, so this
# process must stay smaller than anything that it measures.

ROOT = Path(__file__).resolve().parent.parent
MEGA = 1_000_000
FORMATS = (".h5", ".keras")
BUSY = 0.5
"""Load average above which a note says that the machine was not quiet."""

KERAS_SCRIPT = """
import sys
import keras, numpy as np
*paths, out = sys.argv[1:]
models = [keras.saving.load_model(path, compile=False) for path in paths]
merged = [np.mean(arrays, axis=0) for arrays in zip(*(model.get_weights() for model in models))]
models[0].set_weights(merged)
models[0].save(out)
"""

MAKE_BIG = """
import sys
import keras, numpy as np
from keras import layers
folder, scale = sys.argv[1], float(sys.argv[2])
keras.utils.set_random_seed(0)
size = lambda n: max(4, round(n * scale))
x = inputs = keras.Input((224, 224, 3))
for block, (filters, repeats) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
    for number in range(repeats):
        x = layers.Conv2D(size(filters), 3, padding="same", activation="relu", name=f"block{block}_conv{number}")(x)
    x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
x = layers.Flatten(name="flatten")(x)
x = layers.Dense(size(4096), activation="relu", name="fc1")(x)
x = layers.Dense(size(4096), activation="relu", name="fc2")(x)
model = keras.Model(inputs, layers.Dense(10 + round(490 * scale), activation="softmax", name="head")(x))
base = model.get_weights()
for number, label in enumerate("abc"):
    random = np.random.default_rng(number)
    noisy = [w + np.float32(0.1 * w.std() + 1e-4) * random.standard_normal(w.shape, np.float32) for w in base]
    model.set_weights(noisy)
    for suffix in (".h5", ".keras"):
        model.save(f"{folder}/{label}{suffix}")
"""

MAKE_SPARSE = """
import json, math, sys
import h5py
from h5py import h5d, h5p, h5s, h5t
folder, size, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
width = max(4, round(math.sqrt(size / 8)))
units = {"first": width, "second": width, "head": 4}
config = {"class_name": "Sequential", "config": {"name": "wide", "layers": [
    {"class_name": "InputLayer", "config": {"batch_shape": [None, width], "dtype": "float32", "name": "input"}},
    *({"class_name": "Dense", "config": {"name": name, "units": number, "trainable": True, "dtype": "float32"}}
      for name, number in units.items())]}}
writer = {"keras_version": "3.15.1", "backend": "tensorflow"}
plist = h5p.create(h5p.DATASET_CREATE)
plist.set_layout(h5d.CONTIGUOUS)
plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
plist.set_fill_time(h5d.FILL_TIME_NEVER)  # holes: zeros that take no room on the disk
for place in range(count):
    with h5py.File(f"{folder}/source_{place}.h5", "w") as file:
        file.attrs.update({**writer, "model_config": json.dumps(config)})
        top = file.create_group("model_weights")
        top.attrs.update({**writer, "layer_names": list(units)})
        for name, number in units.items():
            layer = top.create_group(f"{name}/{name}")
            for key, shape in (("kernel", (width, number)), ("bias", (number,))):
                h5d.create(layer.id, key.encode(), h5t.NATIVE_FLOAT, h5s.create_simple(shape), plist)
            top[name].attrs["weight_names"] = [f"{name}/kernel", f"{name}/bias"]
"""

CHECK = """
import sys
import keras
for path in sys.argv[1:]:
    model = keras.saving.load_model(path, compile=False)
    assert model.count_params() > 0
"""


@dataclass(frozen=True)
class Cost:
    """What one process took: seconds of wall and CPU, bytes of its largest resident set."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Row:
    """A line of the table; `passed` is None where it has no bar."""

    what: str
    value: str
    spread: str = ""
    cpu: str = ""
    peak: str = ""
    bar: str = ""
    passed: bool | None = None

    def cells(self) -> tuple[str, ...]:
        verdict = {None: "", True: "pass", False: "MISS"}[self.passed]
        return (self.what, self.value, self.spread, self.cpu, self.peak, self.bar, verdict)


HEADINGS = ("what", "median", "min – max", "CPU s", "peak MB", "bar", "")


def run(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command to its end and measure it with its children.

    Raises:
        SystemExit: if it fails; its last words are printed.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    started = time.perf_counter()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = log.read_text(errors="replace").strip().splitlines()[-5:]
        sys.exit("\n".join([f"This failed: {' '.join(str(part) for part in command)[:400]}", *words]))
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


patience = 60.0
"""Seconds that are left, over the whole run, to wait for other processes."""


def settle() -> None:
    """Wait until nothing else keeps the cores busy, while patience lasts; on Linux only."""
    global patience
    stat = Path("/proc/stat")
    while stat.exists() and patience > 0:
        before = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        time.sleep(0.2)
        after = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        idle = after[3] + after[4] - before[3] - before[4]
        if idle > 0.9 * (sum(after) - sum(before)):
            return
        patience -= 0.2


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def kmerge(*arguments: object) -> list[str]:
    """The command line, from this checkout."""
    return [sys.executable, "-m", "kmerge", *map(str, arguments)]


def interleave(
    commands: dict[str, list[str]], rounds: int, log: Path, outputs: Sequence[Path] = ()
) -> dict[str, list[Cost]]:
    """Every command once per round, after one round that does not count and warms the page cache.

    No output is there when a command starts: all would have to replace it, and `cp` alone would write into its memory.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            if number or name != "Keras script":  # a warm-up of half a minute would teach nothing
                for path in outputs:
                    path.unlink(missing_ok=True)
                settle()
                cost = run(command, log)
                if number:
                    costs[name].append(cost)
        print(".", end="", file=sys.stderr, flush=True)
    return costs


def seconds(what: str, costs: Sequence[Cost]) -> Row:
    walls = [cost.wall for cost in costs]
    return Row(
        what,
        f"{median(walls):.2f} s",
        f"{min(walls):.2f} – {max(walls):.2f}",
        f"{median(cost.cpu for cost in costs):.2f}",
        f"{max(cost.peak for cost in costs) / MEGA:.0f}",
    )


def ratio(what: str, values: Sequence[float], unit: str, holds: Callable[[float], bool], bar: str) -> Row:
    middle = median(values)
    digits = 2 if unit == "×" else 1
    spread = f"{min(values):.{digits}f} – {max(values):.{digits}f}"
    return Row(what, f"{middle:.{digits}f} {unit}", spread, bar=bar, passed=holds(middle))


def measure_formats(folder: Path, rounds: int) -> list[Row]:
    """Speed and memory of a merge of three models, in each format."""
    rows = []
    for suffix in FORMATS:
        sources = [folder / f"{label}{suffix}" for label in "abc"]
        outputs = {name: folder / f"out-{name}{suffix}" for name in ("mean", "auto", "keras", "copy")}
        names = " ".join(f"'{path}'" for path in sources)
        commands = {
            method: kmerge("combine", *sources, "-o", outputs[method], "--force", "--method", method)
            for method in ("mean", "auto")
        }
        commands["copy"] = ["sh", "-c", f"cat {names} > /dev/null && cp '{sources[0]}' '{outputs['copy']}'"]
        commands["Keras script"] = python(KERAS_SCRIPT, *sources, outputs["keras"])
        costs = interleave(commands, rounds, folder / "log", list(outputs.values()))
        mean, auto, copy, keras = costs["mean"], costs["auto"], costs["copy"], costs["Keras script"]
        size = sources[0].stat().st_size / MEGA
        rows.append(Row(f"3 × {size:.0f} MB {suffix}", ""))
        rows.append(seconds("kmerge combine --method mean", mean))
        rows.append(seconds("kmerge combine --method auto", auto))
        rows.append(seconds("Keras script: load, average, save", keras))
        rows.append(seconds("cat a b c > /dev/null; cp a out", copy))
        for name, own in (("mean", mean), ("auto", auto)):
            faster = [other.wall / cost.wall for other, cost in zip(keras, own, strict=True)]
            rows.append(ratio(f"Keras script / kmerge {name}, wall", faster, "×", lambda value: value >= 12, "≥ 12 ×"))
            slower = [cost.wall / other.wall for other, cost in zip(copy, own, strict=True)]
            rows.append(ratio(f"kmerge {name} / (cat + cp), wall", slower, "×", lambda value: value <= 1.5, "≤ 1.5 ×"))
        lean = [100 * cost.peak / other.peak for other, cost in zip(keras, mean, strict=True)]
        rows.append(ratio("kmerge mean / Keras script, peak", lean, "%", lambda value: value <= 3, "≤ 3 %"))
        for path in outputs.values():
            path.unlink(missing_ok=True)
    return rows


def measure_memory(folder: Path, quick: bool) -> list[Row]:
    """Peak memory over the number of sources and over their size; sources of zeros, which take no room on the disk."""
    scale = 0.05 if quick else 1.0
    rows = []
    for what, sets in (
        (f"peak for {{}} sources of {100 * scale:.0f} MB", [(count, 100) for count in (2, 4, 8, 16)]),
        ("peak for 2 sources of {} MB", [(2, size) for size in (50, 200, 800, 2000)]),
    ):
        sets = [(count, size * MEGA * scale) for count, size in sets]
        peaks = [_peak(folder, size, count) for count, size in sets]
        more = max(peaks) - peaks[0]
        read = sets[-1][0] * sets[-1][1] - sets[0][0] * sets[0][1]
        counted = ", ".join(f"{size / MEGA:.0f}" if "2 sources" in what else str(count) for count, size in sets)
        listed = ", ".join(f"{peak / MEGA:.0f}" for peak in peaks)
        bar = "≤ 1 % of the bytes more"
        rows.append(Row(what.format(counted), f"+{more / MEGA:.1f} MB", "", "", listed, bar, more <= 0.01 * read))
    return rows


def _peak(folder: Path, size: float, count: int) -> int:
    place = folder / "sparse"
    place.mkdir()
    run(python(MAKE_SPARSE, place, size, count), folder / "log")
    sources = sorted(place.glob("source_*.h5"))
    command = kmerge("combine", *sources, "-o", place / "out.h5", "--force", "--method", "mean", "--trunk", "all")
    peaks = [run(command, folder / "log").peak for _ in range(3)]
    shutil.rmtree(place)
    print(".", end="", file=sys.stderr, flush=True)
    return int(median(peaks))


def measure_start(folder: Path, rounds: int) -> list[Row]:
    """CPU time of small commands: what a person waits for who merges small models."""
    fixtures = [ROOT / "fixtures" / f"finetuned_{label}.h5" for label in "abc"]
    commands = {
        "kmerge --help": (kmerge("--help"), 0.4),
        "kmerge inspect fixture": (kmerge("inspect", fixtures[0]), 0.4),
        "kmerge combine of three fixtures": (kmerge("combine", *fixtures, "-o", folder / "small.h5", "--force"), 0.8),
    }
    costs = interleave({name: command for name, (command, _) in commands.items()}, max(5, 2 * rounds), folder / "log")
    rows = []
    for name, (_, bar) in commands.items():
        times = [cost.cpu for cost in costs[name]]
        spread = f"{min(times):.2f} – {max(times):.2f}"
        peak = f"{max(cost.peak for cost in costs[name]) / MEGA:.0f}"
        value = f"{median(times):.2f} s CPU"
        rows.append(Row(name, value, spread, "", peak, f"≤ {bar} s CPU", median(times) <= bar))
    return rows


def make_models(folder: Path, quick: bool) -> None:
    """Three models with one ancestor in both formats, made by Keras, which also checks what is made without it."""
    kept = folder / "made.json"
    wanted = {"quick": quick, "version": 1}
    if kept.exists() and json.loads(kept.read_text()) == wanted:
        return
    run(python(MAKE_BIG, folder, math.sqrt(0.01) if quick else 1.0), folder / "log")
    place = folder / "sparse"
    place.mkdir()
    run(python(MAKE_SPARSE, place, MEGA, 2), folder / "log")
    run(python(CHECK, place / "source_0.h5"), folder / "log")
    shutil.rmtree(place)
    kept.write_text(json.dumps(wanted))


def print_table(rows: Sequence[Row]) -> None:
    table = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    for number, line in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} cores, {memory:.0f} GiB of memory, {platform.system()}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure kmerge combine beside a Keras script and beside cat and cp.")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small models, to try the script itself")
    parser.add_argument("--folder", type=Path, help="make the models here and keep them (default: a temporary folder)")
    parser.add_argument("--only", choices=("formats", "memory", "start"), help="measure one part only")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    with tempfile.TemporaryDirectory(prefix="kmerge-bench-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = (0.1e9 if options.quick else 6e9), shutil.disk_usage(folder).free
        print(f"{date.today()}: {machine()}")
        print(f"Needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.0f} GB free.", flush=True)
        if free < needed:
            parser.error("not enough room: give another folder with --folder")
        load = os.getloadavg()[0]
        make_models(folder, options.quick)
        rows: list[Row] = []
        if options.only in (None, "start"):
            rows += measure_start(folder, options.rounds)
        if options.only in (None, "memory"):
            rows += measure_memory(folder, options.quick)
        if options.only in (None, "formats"):
            rows += measure_formats(folder, options.rounds)
        for rest in ("log", "small.h5"):
            (folder / rest).unlink(missing_ok=True)

    print(file=sys.stderr)
    print_table(rows)
    if options.quick:
        print("Small models only try this script out: their times and bars say nothing.")
        return 0
    missed = [row for row in rows if row.passed is False]
    print(f"{len(missed)} of {sum(row.passed is not None for row in rows)} bars missed" + (":" if missed else "."))
    group = ""
    for row in rows:
        group = row.what if not row.value else group
        if row.passed is False:
            print(f"- {group + ': ' if group else ''}{row.what} is {row.value}, bar {row.bar}")
    if load > BUSY:
        print(f"The machine was not quiet at the start (load {load:.1f}): take the times with care.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
