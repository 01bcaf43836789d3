"""Measure what healing and fine-tuning win, from every starting merge, against training from a fresh model.

    python benchmarks/heal.py

The cases are those of `accuracy_cases.py`, whose sources are trained on the first run and kept in a folder. They are
merged by `mean`, `align` and `fuse` on unlabelled training inputs drawn with the seed, the whole trunk shared, and
healed on the same inputs by `kmerge.fine_tune` with its defaults. Beside that stand, in the same time as healing the
last of these took: distillation of the sources into a fresh model, and training of a fresh model with the labels of the
same inputs. Then all heads are fine-tuned with some labels for each class of their own, as one model from the healed
one, and each by itself from its source. Accuracy is measured on the test rows, for each head on its own classes; no
setting was chosen by it.

`--quick` tries the script itself on networks that have learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from accuracy import drawn, said, say, scores_of, spread, words
from accuracy_cases import CASES, Array, Case, Data, accuracy, make_sources, quick
from combine import ROOT, machine

BARS = {"fashion-cnn": 0.998, "mnist-cnn": 0.998, "cifar-conv6-32": 0.993}
CHOSEN = ("fashion-cnn", "mnist-cnn", "cifar-conv6-32")
MERGES = ("mean", "align", "fuse")
SAMPLES, LABELS_PER_CLASS = 4000, 100
SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        case, seed, what: which.
        sources: mean score of the sources.
        before, after: mean score over the heads; before is None where training began anew.
        seconds: that it took.
        agreement: mean over the heads on held-back inputs, before and after, where sources taught.
        kept_epoch: whose state was kept.
    """

    case: str
    seed: int
    what: str
    sources: float
    before: float | None
    after: float
    seconds: float
    agreement: tuple[float, float] | None = None
    kept_epoch: int = 0

    @property
    def kept(self) -> float:
        return self.after / self.sources


class Bench:
    """One run of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: list[Run] = []

    def measure(self, name: str, seed: int) -> None:
        import keras

        case = quick(CASES[name]) if self.options.quick else CASES[name]
        paths = make_sources(case, seed, self.options.folder, say)
        data = case.data(self.options.folder)
        inputs = drawn(data.train, 300 if self.options.quick else SAMPLES, seed)
        rows = np.random.default_rng(seed).choice(len(data.train), len(inputs), replace=False)
        assert np.array_equal(inputs[:5], data.train[rows[:5]])  # the same draw, so that labels are those of the inputs
        models = {label: keras.saving.load_model(path, compile=False) for label, path in paths.items()}
        outputs = {label: model.predict(data.test, batch_size=256, verbose=0) for label, model in models.items()}
        self.sources = fmean(_score(case, label, outputs[label], data) for label in case.labels)
        self.about = (case.name, seed)
        say(f"{case.name} seed {seed}: sources {self.sources:.4f}")
        with tempfile.TemporaryDirectory(prefix="kmerge-bench-") as folder:
            self._measure(case, seed, paths, data, inputs, data.train_targets[rows], Path(folder))

    def _measure(
        self, case: Case, seed: int, paths: dict[str, Path], data: Data, inputs: Array, targets: Array, folder: Path
    ) -> None:
        import keras

        import kmerge

        limits: dict[str, Any] = {"epochs": 1} if self.options.quick else {}
        if self.options.minutes:
            limits["minutes"] = self.options.minutes
        healed = None
        for method in self.options.merges:
            merged = folder / f"{method}.keras"
            kmerge.combine(paths, merged, method=method, data=inputs, samples=len(inputs), seed=seed)
            start = self._score(case, keras.saving.load_model(merged, compile=False), data)
            healed = kmerge.fine_tune(merged, inputs, paths, seed=seed, **limits)
            self._add(f"{method}, healed", case, healed, data, start)
        assert healed is not None
        minutes = {"minutes": max(healed.seconds / 60, 0.01)}
        if "fresh" in self.options.parts:
            fresh = _fresh(merged, seed)
            found = kmerge.fine_tune(fresh, inputs, paths, labels=case.labels, seed=seed, **minutes)
            self._add("fresh model, distilled", case, found, data, None)
            labels = {}
            for label, classes in zip(case.labels, case.classes, strict=True):
                own = np.isin(targets, classes)
                labels[label] = np.where(own, np.searchsorted(classes, targets), -1)
            found = kmerge.fine_tune(fresh, (inputs, labels), seed=seed, **minutes)
            self._add("fresh model, labels", case, found, data, None)
        if "labels" in self.options.parts:
            self._with_labels(case, seed, paths, data, healed.model, limits)

    def _with_labels(
        self, case: Case, seed: int, paths: dict[str, Path], data: Data, model: Any, limits: dict[str, Any]
    ) -> None:
        """Some labels per class: all heads as one model, and each source by itself."""
        import keras

        import kmerge

        random = np.random.default_rng(1000 + seed)
        sets = {}
        for label, classes in zip(case.labels, case.classes, strict=True):
            rows = [
                random.permutation(np.flatnonzero(data.train_targets == kind))[:LABELS_PER_CLASS] for kind in classes
            ]
            chosen = np.concatenate(rows)
            sets[label] = (data.train[chosen], np.searchsorted(classes, data.train_targets[chosen]))
        start = self._score(case, model, data)
        found = kmerge.fine_tune(model, sets, seed=seed, learning_rate=1e-4, **limits)
        self._add(f"{LABELS_PER_CLASS} labels per class, one model", case, found, data, start)
        scores, seconds = [], 0.0
        for label, path in paths.items():
            single = keras.saving.load_model(path, compile=False)
            given = {"learning_rate": 1e-4, "loss": "sparse_categorical_crossentropy", "seed": seed, **limits}
            alone = kmerge.fine_tune(single, sets[label], **given)
            seconds += alone.seconds
            scores.append(_score(case, label, alone.model.predict(data.test, batch_size=256, verbose=0), data))
        what = f"{LABELS_PER_CLASS} labels per class, separate copies"
        self.runs.append(Run(*self.about, what, self.sources, self.sources, fmean(scores), seconds))
        self._save()

    def _score(self, case: Case, model: Any, data: Data) -> float:
        return fmean(scores_of(case, model, data).values())

    def _add(self, what: str, case: Case, tuning: Any, data: Data, before: float | None) -> None:
        after = self._score(case, tuning.model, data)
        agreement = None
        if tuning.after:
            agreement = (fmean(a.value for a in tuning.before), fmean(a.value for a in tuning.after))
        run = Run(*self.about, what, self.sources, before, after, tuning.seconds, agreement, tuning.epoch)
        say(f"{run.case} seed {run.seed}, {what}: {before} -> {after:.4f}, kept {run.kept:.4f}, {run.seconds:.0f} s")
        self.runs.append(run)
        self._save()

    def _save(self) -> None:
        if self.options.json:
            text = json.dumps({"machine": machine(), "runs": [asdict(one) for one in self.runs]}, indent=1)
            self.options.json.write_text(text)


def _score(case: Case, label: str, predictions: Array, data: Data) -> float:
    classes = case.classes[case.labels.index(label)]
    own = np.isin(data.test_targets, classes)
    return accuracy(predictions[own], np.searchsorted(classes, data.test_targets[own]))


def _fresh(path: Path, seed: int) -> Any:
    """The merged model with weights as before any training."""
    import keras

    keras.utils.set_random_seed(seed)
    return keras.models.clone_model(keras.saving.load_model(path, compile=False))


HEADINGS = ("what", "before", "after", "min – max", "kept %", "agreement", "seconds", "bar", "")


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Means over the seeds, by case; missed bars are marked."""
    lines = []
    for case in dict.fromkeys(run.case for run in runs):
        own = [run for run in runs if run.case == case]
        lines.append((case, "", spread([100 * run.sources for run in own], 2)[0], *[""] * 6))
        for what in dict.fromkeys(run.what for run in own):
            found = [run for run in own if run.what == what]
            lines.append(_line(case, what, found))
    return lines


def _line(case: str, what: str, found: Sequence[Run]) -> tuple[str, ...]:
    befores = [100 * run.before for run in found if run.before is not None]
    kept = fmean(run.kept for run in found)
    agreements = [run.agreement for run in found if run.agreement]
    shown = " → ".join(f"{100 * fmean(pair[side] for pair in agreements):.1f}" for side in (0, 1)) if agreements else ""
    seconds = fmean(run.seconds for run in found)
    bar = limit = ""
    if what.endswith("healed"):
        limit = "≥ before"
        worst = min(100 * (run.after - (run.before or 0)) for run in found)
        bar = said(worst >= 0, f"{worst:+.2f}")
        if what == "fuse, healed" and case in BARS:
            limit = f"≥ {100 * BARS[case]:.1f} %, {limit}, ≤ {SECONDS:.0f} s"
            kept_all = kept >= BARS[case] and seconds <= SECONDS and worst >= 0
            bar = said(kept_all, f"{100 * (kept - BARS[case]):+.2f}, {worst:+.2f}")
    after = spread([100 * run.after for run in found], 2)
    before = f"{fmean(befores):.2f}" if befores else ""
    return (what, before, *after, f"{100 * kept:.2f}", shown, f"{seconds:.0f}", limit, bar)


def print_table(lines: Iterable[tuple[str, ...]]) -> None:
    rows = [HEADINGS, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what healing and fine-tuning win.")
    parser.add_argument("--only", type=words, default=CHOSEN, help=f"cases; default: {','.join(CHOSEN)}")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in words(text)], help="default: 0,1,2")
    parser.add_argument("--merges", type=words, default=MERGES, help="to start from; the last one is trained on")
    parser.add_argument("--parts", type=words, default=("fresh", "labels"), help="beside healing: fresh,labels")
    parser.add_argument("--minutes", type=float, metavar="M", help="for each training; default: as many as it takes")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "accuracy", help="where the sources are kept")
    parser.add_argument("--quick", action="store_true", help="a tiny version, to try the script itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    unknown = [name for name in options.only if name not in CASES]
    if unknown:
        sys.exit(f"There is no case {', '.join(unknown)}: choose of {', '.join(CASES)}.")
    return options


def main() -> int:
    options = read_options()
    sys.path.insert(0, str(ROOT))
    for name in ("tensorflow", "kmerge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="keras")
    print(f"{date.today()}: {machine()}", flush=True)
    started = time.perf_counter()
    bench = Bench(options)
    for name in options.only:
        for seed in options.seeds:
            bench.measure(name, seed)
    print_table(table(bench.runs))
    print(f"{time.perf_counter() - started:.0f} s in all.")
    if options.quick:
        print("Networks that learnt nothing only try this script out: their numbers and bars say nothing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
