"""Measure what a merged model still knows, what it costs, and how long the merge takes.

    python benchmarks/accuracy.py

Every case of `accuracy_cases.py` is a set of networks that were trained apart; they are trained on the first run and
kept in a folder. They are merged with every method, the whole trunk shared, all heads private, without labels and
without a gradient step. Calibration inputs are training inputs drawn with the seed; accuracy is measured on the test
rows, for each head on its own classes. A number is the mean over the seeds, and beside it stand the smallest and the
largest. Bars are those of the default method for such sources, `fuse`.

`--quick` tries the script itself on a few networks that have learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from accuracy_cases import CASES, MODELS, Array, Case, Data, accuracy, make_sources, quick
from combine import ROOT, kmerge, machine, run

METHODS = ("mean", "align", "zip", "transport", "fuse")
JUDGED = "fuse"
QUICK = ("fashion-cnn", "ucr-gru-italy", "rg4", "process")
FILES = ("dcase2022_ae", "onsd", "stock_vincentlee")
SECONDS, BYTES = 15.0, 1e9
ROUNDS, BATCH = 15, 64


@dataclass(frozen=True)
class Variant:
    """One way to merge a case.

    Attributes:
        case: its name.
        samples: number of calibration inputs; None for no data at all, 0 for all training rows.
        outputs: as for `kmerge.combine`.
        bar: what `fuse` must reach: a share of the sources' mean score, or a score where `absolute`.
    """

    case: str
    samples: int | None
    outputs: str = "heads"
    bar: float | None = None
    absolute: bool = False

    @property
    def what(self) -> str:
        inputs = {None: "no data", 0: "all training rows"}.get(self.samples, f"{self.samples} inputs")
        return inputs if self.outputs == "heads" else f"{inputs}, --outputs {self.outputs}"


VARIANTS = (
    *(
        Variant(case, samples, bar=bar)
        for case in ("fashion-cnn", "mnist-cnn")
        for samples, bar in ((400, 0.993), (2000, 0.997), (None, 0.97))
    ),
    *(Variant("fashion-bn", samples) for samples in (400, 2000, None)),
    *(Variant("mnist-mlp", samples, "mean", 1.0) for samples in (1000, 4000)),
    Variant("cifar-conv6-32", 1000, bar=0.97),
    Variant("cifar-conv6-16", 1000),
    Variant("cifar-resnet16", 1000, bar=0.985),
    Variant("cifar-resnet20x4", 1000, bar=0.98),
    Variant("rg4", 500, "heads", 0.800, absolute=True),
    Variant("rg4", 500, "mean", 0.804, absolute=True),
    Variant("rg4", 1735, "heads", 0.803, absolute=True),
    Variant("rg4", 1735, "mean", 0.806, absolute=True),
    *(Variant(case, 0, bar=0.98) for case in CASES if case.startswith("ucr-")),
)


@dataclass(frozen=True)
class Run:
    """What one merge gave.

    Attributes:
        case, what, method, seed: which merge.
        sources: score of each source by label: share of right answers, or correlation.
        scores: of the merged model, by label; of the one output under "mean".
        parameters, multiply_adds: of the merged model.
        separate: the same of all sources together.
        latency: milliseconds for a batch, merged and separate.
        seconds: that the merge took, from files to a file.
        ensemble: score of the average of the sources' outputs, where they share one task.
        agreement: of each head with its source on inputs held back, as the report of the merge says.
        error: why there is no merged model.
    """

    case: str
    what: str
    method: str
    seed: int
    sources: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    multiply_adds: int | None = None
    separate: tuple[int, int | None] | None = None
    latency: tuple[float, float] | None = None
    seconds: float = 0.0
    ensemble: float | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def score(self) -> float:
        return fmean(self.scores.values()) if self.scores else math.nan

    @property
    def kept(self) -> float:
        return self.score / fmean(self.sources.values())


@dataclass(frozen=True)
class Verdict:
    """A bar, what was reached, and by how much it is above (or, negative, below) the bar."""

    what: str
    value: str
    bar: str
    margin: str
    passed: bool


Table = list[tuple[str, ...]]
HEADINGS = (
    "what",
    "method",
    "score",
    "min – max",
    "kept %",
    "min – max",
    "parameters",
    "multiply-adds",
    "ms per batch",
    "merge s",
    "bar",
    "",
)


# ---------------------------------------------------------------------------------------------------------- scores


def score(case: Case, label: str, predictions: Array, data: Data) -> float:
    """Of one output on the test rows: right answers among its classes, or correlation with what was measured."""
    if not case.classes:
        return float(np.corrcoef(predictions.ravel(), data.test_targets)[0, 1])
    classes = case.classes[case.labels.index(label)]
    own = np.isin(data.test_targets, classes)
    return accuracy(predictions[own], np.searchsorted(classes, data.test_targets[own]))


def by_label(outputs: Any, labels: Sequence[str]) -> dict[str, Array]:
    """Outputs of a merged model: a dictionary, a list where its format knows none, or their mean."""
    if isinstance(outputs, dict):
        return {label: np.asarray(outputs[label]) for label in labels}
    if isinstance(outputs, (list, tuple)):
        return {label: np.asarray(output) for label, output in zip(labels, outputs, strict=True)}
    return {"mean": np.asarray(outputs)}


def scores_of(case: Case, model: Any, data: Data) -> dict[str, float]:
    found = by_label(model.predict(data.test, batch_size=256, verbose=0), case.labels)
    return {
        label: score(case, label if label in case.labels else case.labels[0], found[label], data) for label in found
    }


def latency(merged: Any, separate: Sequence[Any], inputs: Array) -> tuple[float, float]:
    """Milliseconds for one batch through the merged model, and through all sources one after another."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 2):
        for models, kept in zip(([merged], separate), times, strict=True):
            started = time.perf_counter()
            for model in models:
                model.predict_on_batch(inputs)
            if number > 1:  # the first calls trace and warm up
                kept.append(1000 * (time.perf_counter() - started))
    return median(times[0]), median(times[1])


# ---------------------------------------------------------------------------------------------------------- merges


@dataclass(frozen=True)
class Sources:
    """One set of sources, opened: their files, the models, and what each of them knows."""

    case: Case
    seed: int
    paths: dict[str, Path]
    models: list[Any]
    data: Data
    scores: dict[str, float]
    ensemble: float | None


class Bench:
    """One run of the script: its options, its sources, and what it found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: list[Run] = []
        self.verdicts: list[Verdict] = []

    def case(self, name: str) -> Case:
        return quick(CASES[name]) if self.options.quick else CASES[name]

    def sources(self, case: Case, seed: int) -> dict[str, Path]:
        return make_sources(case, seed, self.options.folder, say)

    def measure(self, case: Case, variants: Sequence[Variant], seed: int) -> None:
        """Every variant and method on one set of sources."""
        sources = self.open(case, seed)
        say(f"{case.name} seed {seed}: sources {', '.join(f'{value:.4f}' for value in sources.scores.values())}")
        plain = set()
        for variant in variants:
            for method in self.options.methods:
                if method == "mean" and variant.outputs in plain:
                    continue  # it reads no data, so that the first variant has said it all
                plain |= {variant.outputs} if method == "mean" else set()
                self.runs.append(self.merge(sources, variant, method))
                self.save()

    def open(self, case: Case, seed: int) -> Sources:
        import keras

        paths = self.sources(case, seed)
        data = case.data(self.options.folder)
        models = [keras.saving.load_model(path, compile=False) for path in paths.values()]
        outputs = [model.predict(data.test, batch_size=256, verbose=0) for model in models]
        scores = {label: score(case, label, output, data) for label, output in zip(case.labels, outputs, strict=True)}
        one_task = len(set(case.classes)) <= 1
        ensemble = score(case, case.labels[0], np.mean(outputs, 0), data) if one_task else None
        return Sources(case, seed, paths, models, data, scores, ensemble)

    def save(self) -> None:
        """What was measured until now."""
        if self.options.json:
            found = {"runs": [asdict(one) for one in self.runs], "bars": [asdict(one) for one in self.verdicts]}
            self.options.json.write_text(json.dumps({"machine": machine(), **found}, indent=1))

    def merge(self, sources: Sources, variant: Variant, method: str) -> Run:
        """From files to a file, as from the command line, so that the report and the model are of one merge."""
        import keras

        from kmerge import combine

        case, seed, data = sources.case, sources.seed, sources.data
        about: dict[str, Any] = {"case": case.name, "what": variant.what, "method": method, "seed": seed}
        about |= {"sources": sources.scores, "ensemble": sources.ensemble}
        settings: dict[str, Any] = {"method": method, "outputs": variant.outputs, "seed": seed}
        if method == JUDGED and self.options.width is not None:
            settings["width"] = self.options.width
        if method != "mean" and variant.samples is not None:
            inputs = drawn(data.train, min(variant.samples, 100) if self.options.quick else variant.samples, seed)
            settings |= {"data": inputs, "samples": len(inputs)}
        suffix = next(iter(sources.paths.values())).suffix
        with tempfile.TemporaryDirectory(prefix="kmerge-bench-") as folder:
            output = Path(folder) / f"merged{suffix}"
            try:
                report = combine(sources.paths, output, **settings)
                merged = keras.saving.load_model(output, compile=False)
            except Exception as error:  # one merge that fails must not lose hours of others
                say(f"{case.name} seed {seed}, {variant.what}, {method}: {type(error).__name__}: {error}")
                return Run(**about, error=f"{type(error).__name__}: {error}")
        found = Run(
            **about,
            scores=scores_of(case, merged, data),
            parameters=report.merged.parameters,
            multiply_adds=report.merged.multiply_adds,
            separate=(report.separate.parameters, report.separate.multiply_adds),
            latency=latency(merged, sources.models, data.test[:BATCH]),
            seconds=report.seconds,
            agreement={item.label: item.value for item in report.agreement},
        )
        say(f"{case.name} seed {seed}, {variant.what}, {method}: {found.score:.4f}, kept {found.kept:.4f}")
        return found

    def measure_files(self, table: Table) -> None:
        """Networks that others trained, merged without data: the merge must go through and say how well it agrees."""
        from kmerge import combine

        for name in FILES:
            paths = sorted(path for path in (MODELS / name).iterdir() if path.suffix in (".h5", ".hdf5", ".keras"))
            for method in (method for method in self.options.methods if method == JUDGED):
                with tempfile.TemporaryDirectory(prefix="kmerge-bench-") as folder:
                    output = Path(folder) / f"merged{paths[0].suffix}"
                    try:
                        report = combine(paths, output, method=method, seed=0)
                        agreement = [f"{item.label} {item.value:.3f}" for item in report.agreement]
                        value = f"agreement {', '.join(agreement) or 'not reported'}"
                        passed, took = len(agreement) >= len(paths), f"{report.seconds:.1f}"
                    except Exception as error:
                        value, passed, took = f"{type(error).__name__}: {error}", False, ""
                bar = "merged, agreement reported"
                self.verdicts.append(Verdict(f"{name}, no data", value, bar, "", passed))
                table.append((f"{name}, no data", method, value, *[""] * 6, took, bar, "pass" if passed else "MISS"))

    def measure_process(self, table: Table) -> None:
        """Wall time and peak of `kmerge combine` of three CNNs with 400 images, as a process of its own."""
        if JUDGED not in self.options.methods:
            return
        case = self.case("fashion-cnn")
        costs = []
        for seed in self.options.seeds:
            paths = self.sources(case, seed)
            with tempfile.TemporaryDirectory(prefix="kmerge-bench-") as name:
                folder = Path(name)
                inputs = drawn(case.data(self.options.folder).train, 400, seed)
                np.save(folder / "inputs.npy", inputs)
                command = [*kmerge("combine", *paths.values(), "-o", folder / "out.keras", "--method", JUDGED)]
                command += ["--data", str(folder / "inputs.npy"), "--samples", str(len(inputs)), "--seed", str(seed)]
                try:
                    costs.append(run(command, folder / "log"))
                except SystemExit as error:
                    say(str(error))
        what = "kmerge combine of three CNNs, 400 inputs, as a process"
        if len(costs) < len(self.options.seeds):
            self.verdicts.append(Verdict(what, "failed", f"≤ {SECONDS:.0f} s", "", False))
            return
        for unit, scale, bar, values in (
            ("s", 1.0, SECONDS, [cost.wall for cost in costs]),
            ("MB of memory", 1e6, BYTES, [float(cost.peak) for cost in costs]),
        ):
            middle, passed = median(values), median(values) <= bar
            limit, margin = f"≤ {bar / scale:.0f} {unit}", f"{(bar - middle) / scale:+.1f}"
            shown = f"{middle / scale:.1f} {unit}"
            self.verdicts.append(Verdict(what, shown, limit, margin, passed))
            spread = f"{min(values) / scale:.1f} – {max(values) / scale:.1f}"
            table.append((what, JUDGED, shown, spread, *[""] * 6, limit, said(passed, margin)))

    # ------------------------------------------------------------------------------------------------------ table

    def rows(self, variants: Iterable[Variant]) -> Table:
        """The runs as lines of a table, grouped by case; judges them on the way."""
        table: Table = []
        shown = ""
        for variant in variants:
            chosen = [one for one in self.runs if (one.case, one.what) == (variant.case, variant.what)]
            if chosen and shown != variant.case:
                shown = variant.case
                table.append((shown, *[""] * (len(HEADINGS) - 1)))
                table += separate_rows([one for one in self.runs if one.case == shown])
            for method in self.options.methods:
                if found := [one for one in chosen if one.method == method]:
                    table.append(self.row(variant, method, found))
        return table

    def row(self, variant: Variant, method: str, found: Sequence[Run]) -> tuple[str, ...]:
        good = [one for one in found if not one.error]
        bar = limit = ""
        if method == JUDGED and variant.bar is not None:
            sign = ">" if variant.outputs == "mean" and not variant.absolute else "≥"
            limit = f"{sign} {variant.bar:.3f}" if variant.absolute else f"{sign} {100 * variant.bar:.1f} %"
            if len(good) < len(found):
                value, margin, passed = f"failed: {next(one.error for one in found if one.error)}", "", False
            else:
                reached = fmean(one.score if variant.absolute else one.kept for one in good)
                gap, passed = reached - variant.bar, reached >= variant.bar if sign == "≥" else reached > variant.bar
                value = f"{reached:.4f}" if variant.absolute else f"{100 * reached:.2f} %"
                margin = f"{gap:+.4f}" if variant.absolute else f"{100 * gap:+.2f}"
            bar = said(passed, margin)
            self.verdicts.append(Verdict(f"{variant.case}, {variant.what}", value, limit, margin, passed))
        if not good:
            return (variant.what, method, "failed", *[""] * 7, limit, bar)
        percent, digits = (100.0, 2) if CASES[variant.case].classes else (1.0, 4)
        first = good[0]
        times = [one.latency for one in good if one.latency]
        return (
            variant.what,
            method,
            *spread([percent * one.score for one in good], digits),
            *spread([100 * one.kept for one in good], 2),
            size(first.parameters),
            size(first.multiply_adds),
            f"{fmean(merged for merged, _ in times):.1f} of {fmean(separate for _, separate in times):.1f}",
            f"{fmean(one.seconds for one in good):.1f}",
            limit,
            bar,
        )


def separate_rows(runs: Sequence[Run]) -> Table:
    """The sources without a merge: each with its own network, and the average of their outputs."""
    percent, digits = (100.0, 2) if CASES[runs[0].case].classes else (1.0, 4)
    seeds = {one.seed: one for one in runs}.values()
    sizes = [size(number) for number in next((one.separate for one in runs if one.separate), ())] or ["", ""]
    means = spread([percent * fmean(one.sources.values()) for one in seeds], digits)
    table = [("separate models", "", *means, "", "", *sizes, *[""] * 4)]
    averages = [percent * one.ensemble for one in seeds if one.ensemble is not None]
    if averages:
        table.append(("average of their outputs", "", *spread(averages, digits), "", "", *sizes, *[""] * 4))
    return table


def drawn(inputs: Array, samples: int, seed: int) -> Array:
    """That many rows, drawn with the seed; all of them where `samples` is 0 or too many."""
    count = min(samples or len(inputs), len(inputs))
    return inputs[np.random.default_rng(seed).choice(len(inputs), count, replace=False)]


def spread(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Mean, and the smallest and the largest where there are several."""
    ends = f"{min(values):.{digits}f} – {max(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}", ends


def size(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e6:.2f} M"


def said(passed: bool, margin: str) -> str:
    return ("pass" if passed else "MISS") + (f" ({margin})" if margin else "")


def say(text: str) -> None:
    """Progress, which is no part of the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def print_table(table: Table) -> None:
    lines = [HEADINGS, *table]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def has_accelerator() -> bool:
    import keras

    return bool(keras.distribution.list_devices("gpu"))


def parts(options: argparse.Namespace) -> list[str]:
    """Names of the cases to run, and `files` and `process`; says what is left out."""
    every = [*CASES, "files", "process"]
    wanted = options.only or (QUICK if options.quick else every)
    chosen = [name for name in every if any(name == word or name.startswith(f"{word}-") for word in wanted)]
    if not chosen:
        sys.exit(f"There is no case {', '.join(wanted)}: choose of {', '.join(every)}, or the beginning of a name.")
    heavy = [name for name in chosen if name in CASES and CASES[name].accelerator]
    if heavy and not (options.accelerator or has_accelerator()):
        for name in heavy:
            print(f"Left out: {name} ({CASES[name].what}), as its training takes hours without an accelerator.")
        chosen = [name for name in chosen if name not in heavy]
    for name in ("rg4", "files"):
        if name in chosen and not MODELS.exists():
            print(f"Left out: {name}, as its files are not at hand ({MODELS.name} beside the project).")
            chosen.remove(name)
    return chosen


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the accuracy that merged models keep, and what they cost.")
    parser.add_argument("--only", type=words, help="cases to run, with commas between them (or their beginnings)")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in words(text)], help="default: 0,1,2")
    parser.add_argument("--methods", type=words, default=METHODS, help=f"default: {','.join(METHODS)}")
    parser.add_argument("--width", type=float, help="of the merged trunk against a source's")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "accuracy", help="where the sources are kept")
    parser.add_argument("--train", action="store_true", help="make the sources and merge nothing")
    parser.add_argument("--accelerator", action="store_true", help="also the case that a CPU cannot train")
    parser.add_argument("--quick", action="store_true", help="a tiny version, to try the script itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    return options


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def main() -> int:
    options = read_options()
    sys.path.insert(0, str(ROOT))
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # each model is traced anew, and so it must be
    warnings.filterwarnings("ignore", module="keras")  # old files spell some arguments in the old way
    print(f"{date.today()}: {machine()}", flush=True)
    chosen = parts(options)
    bench = Bench(options)
    variants = [one for one in VARIANTS if one.case in chosen and not (options.quick and (one.samples or 0) > 1000)]
    for name in (name for name in chosen if name in CASES):
        print(f"{name}: {CASES[name].what}", flush=True)
        for seed in options.seeds:
            if options.train:
                bench.sources(bench.case(name), seed)
            else:
                bench.measure(bench.case(name), [one for one in variants if one.case == name], seed)
    if options.train:
        return 0
    table = bench.rows(variants)
    if "files" in chosen:
        bench.measure_files(table)
    if "process" in chosen:
        bench.measure_process(table)
    print_table(table)
    bench.save()
    if options.quick:
        print("Networks that learnt nothing only try this script out: their numbers and bars say nothing.")
        return 0
    for error in sorted({f"{one.case}, {one.method}: {one.error}" for one in bench.runs if one.error}):
        print(f"- failed: {error}")
    missed = [one for one in bench.verdicts if not one.passed]
    print(f"{len(missed)} of {len(bench.verdicts)} bars missed" + (":" if missed else "."))
    for one in missed:
        print(f"- {one.what} is {one.value}, bar {one.bar}" + (f" ({one.margin})" if one.margin else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
