"""Sources for `accuracy.py`: data sets, networks, and their training, kept in a folder.

A case is a data set, a split of its classes among sources, and a network. Its seeds are whole sets of sources: another
seed gives other initial weights, another order of the images and other dropout to each of them. What is trained lies in
`FOLDER/CASE/seedS/LABEL.keras`, with its accuracy in `LABEL.json` beside it, and is never trained twice.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA, MODELS = SHARED / "data", SHARED / "models"

Array = np.ndarray[Any, Any]
Classes = tuple[int, ...]


@dataclass(frozen=True)
class Data:
    """Inputs and targets: classes as integers, or measured values."""

    train: Array
    train_targets: Array
    test: Array
    test_targets: Array

    def of(self, classes: Classes) -> Data:
        """Only the rows of these classes, numbered in their order."""
        number = np.full(max(*classes, int(self.train_targets.max()), int(self.test_targets.max())) + 1, -1)
        number[list(classes)] = range(len(classes))
        train, test = number[self.train_targets], number[self.test_targets]
        return Data(self.train[train >= 0], train[train >= 0], self.test[test >= 0], test[test >= 0])

    def head(self, rows: int) -> Data:
        """Only the first rows of either part."""
        return Data(self.train[:rows], self.train_targets[:rows], self.test[:rows], self.test_targets[:rows])


@dataclass(frozen=True)
class Case:
    """Sources that are merged with each other.

    Attributes:
        name: `--only` takes it, or its beginning.
        what: one line for the reader.
        classes: of each source, in the order of the labels a, b, c, ...
        load: the data, given the folder that keeps what is unpacked.
        build: the network for a number of classes.
        epochs, batch, rate: of the training; the rate falls to 0 along a cosine.
        shift: pixels by which images are moved, with mirroring, at each epoch; 0 for neither.
        files: sources that are at hand, in place of training any.
        accelerator: whether the training is out of a CPU's reach.
        rows: of the data to use, all by default.
    """

    name: str
    what: str
    classes: tuple[Classes, ...] = ()
    load: Callable[[Path], Data] | None = None
    build: Callable[[tuple[int, ...], int], Any] | None = None
    epochs: int = 4
    batch: int = 128
    rate: float = 1e-3
    shift: int = 0
    files: tuple[Path, ...] = ()
    accelerator: bool = False
    rows: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("abcdefghij"[: len(self.classes) or len(self.files)])

    def data(self, folder: Path) -> Data:
        assert self.load is not None
        data = self.load(folder)
        return data if self.rows is None else data.head(self.rows)

    def place(self, folder: Path, seed: int) -> Path:
        return folder / ("quick" if self.rows else ".") / self.name / f"seed{seed}"


def quick(case: Case) -> Case:
    """The same on few rows and for one epoch, to try the script itself."""
    return replace(case, rows=600, epochs=1)


# ------------------------------------------------------------------------------------------------------------- data


@cache
def _npz(name: str) -> Data:
    with np.load(DATA / name) as file:
        images = [file[key][..., None].astype(np.float32) / 255 for key in ("x_train", "x_test")]
        return Data(images[0], file["y_train"].astype(int), images[1], file["y_test"].astype(int))


def mnist(_: Path) -> Data:
    return _npz("mnist.npz")


def fashion(_: Path) -> Data:
    return _npz("fashion_mnist.npz")


@cache
def _cifar_bytes(folder: Path) -> tuple[Array, Array, Array, Array]:
    """CIFAR-10 as bytes, in an order that mixes the classes; unpacked once."""
    kept = folder / "cifar10.npz"
    if not kept.exists():
        import tensorflow as tf

        images: dict[str, list[Array]] = {"train": [], "test": []}
        names: dict[str, list[str]] = {"train": [], "test": []}
        with tarfile.open(DATA / "cifar10_jpg.tar.gz") as archive:
            for member in archive:
                part, _, rest = member.name.partition("/")
                if member.isfile() and rest.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    decoded = tf.io.decode_jpeg(file.read(), channels=3, dct_method="INTEGER_ACCURATE")
                    images[part].append(decoded.numpy())  # the same bytes as Pillow's
                    names[part].append(rest)
        arrays = {}
        for part, found in images.items():
            order = np.random.default_rng(0).permutation(np.argsort(names[part]))
            kinds = sorted({name.split("/")[0] for name in names[part]})
            arrays[part] = np.stack([found[row] for row in order])
            arrays[f"{part}_classes"] = np.array([kinds.index(names[part][row].split("/")[0]) for row in order])
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f"half-{os.getpid()}.npz"
        np.savez(half, **arrays)
        half.replace(kept)
    with np.load(kept) as file:
        return file["train"], file["train_classes"], file["test"], file["test_classes"]


@cache
def cifar32(folder: Path) -> Data:
    train, train_classes, test, test_classes = _cifar_bytes(folder)
    return Data(train.astype(np.float32) / 255, train_classes, test.astype(np.float32) / 255, test_classes)


@cache
def cifar16(folder: Path) -> Data:
    """Every 2×2 pixels are one: their mean."""
    full = cifar32(folder)
    small = [images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)) for images in (full.train, full.test)]
    return Data(small[0], full.train_targets, small[1], full.test_targets)


def read_series(path: Path) -> tuple[list[Array], list[str]]:
    """Series of a `.ts` file, each of shape (steps, dimensions), and the names of their classes."""
    series, names = [], []
    for line in path.read_text().splitlines():
        line = line.strip()
        if line and line[0] not in "@#":
            *dimensions, name = line.split(":")
            series.append(np.array([[float(word) for word in row.split(",")] for row in dimensions]).T)
            names.append(name)
    return series, names


@cache
def _ucr(name: str) -> Data:
    """A UCR set, standardised per dimension; shorter series start with zeros."""
    (train, train_names), (test, test_names) = (
        read_series(DATA / "ucr" / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")
    )
    steps = np.concatenate(train)
    mean, deviation = steps.mean(0), steps.std(0)
    length = max(len(one) for one in train + test)
    kinds = sorted(set(train_names))

    def stack(series: list[Array]) -> Array:
        result = np.zeros((len(series), length, series[0].shape[1]), np.float32)
        for row, one in zip(result, series, strict=True):
            row[length - len(one) :] = (one - mean) / deviation
        return result

    order = np.random.default_rng(0).permutation(len(train))
    targets = [np.array([kinds.index(one) for one in found]) for found in (train_names, test_names)]
    return Data(stack(train)[order], targets[0][order], stack(test), targets[1])


def ucr(name: str) -> Callable[[Path], Data]:
    return lambda _: _ucr(name)


@cache
def rg4(_: Path) -> Data:
    """One-hot sequences of 80 letters, of rows that were read often enough; the targets are logarithms of signals."""

    def part(name: str) -> tuple[Array, Array]:
        header, *rows = (line.split(",") for line in (DATA / "rg4" / f"{name}_tr_data.csv").read_text().split())
        reads, signal = (np.array([float(row[header.index(key)]) for row in rows]) for key in ("total_reads", "rsr"))
        lines = (DATA / "rg4" / f"{name}-seq").read_text().split()
        letters = np.array([list(line[(len(line) - 80) // 2 :][:80].upper()) for line in lines])
        inputs = (letters[..., None] == np.array(list("ACGT"))).astype(np.float32)
        return inputs[reads > 2000], np.log(signal[reads > 2000])

    return Data(*part("val"), *part("test"))


# --------------------------------------------------------------------------------------------------------- networks


def small_cnn(shape: tuple[int, ...], num_classes: int) -> Any:
    from keras import Sequential, layers

    return Sequential(
        [
            layers.Input(shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(num_classes, activation="softmax"),
        ]
    )


def cnn_with_norm(shape: tuple[int, ...], num_classes: int) -> Any:
    from keras import Sequential, layers

    blocks = []
    for width in (32, 64):
        blocks += [layers.Conv2D(width, 3), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D()]
    return Sequential(
        [
            layers.Input(shape),
            *blocks,
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(num_classes, activation="softmax"),
        ]
    )


def mlp(shape: tuple[int, ...], num_classes: int) -> Any:
    from keras import Sequential, layers

    return Sequential(
        [
            layers.Input(shape),
            layers.Flatten(),
            *(layers.Dense(512, activation="relu") for _ in range(3)),
            layers.Dense(num_classes, activation="softmax"),
        ]
    )


def six_convolutions(width: int) -> Callable[[tuple[int, ...], int], Any]:
    """Six 3×3 convolutions with BatchNormalization, two each of `width`, twice and four times as many channels."""

    def build(shape: tuple[int, ...], num_classes: int) -> Any:
        from keras import Sequential, layers

        blocks = []
        for factor in (1, 2, 4):
            for _ in range(2):
                blocks.append(layers.Conv2D(factor * width, 3, padding="same", use_bias=False))
                blocks += [layers.BatchNormalization(), layers.ReLU()]
            blocks.append(layers.MaxPooling2D())
        blocks[-1] = layers.GlobalAveragePooling2D()
        return Sequential([layers.Input(shape), *blocks, layers.Dense(num_classes, activation="softmax")])

    return build


def residual(widths: Sequence[int], blocks: int) -> Callable[[tuple[int, ...], int], Any]:
    """A stem and `blocks` blocks of two 3×3 convolutions for each width; a 1×1 projection where the width changes."""

    def build(shape: tuple[int, ...], num_classes: int) -> Any:
        from keras import Input, Model, layers

        def convolve(x: Any, width: int, size: int, stride: int = 1) -> Any:
            x = layers.Conv2D(width, size, strides=stride, padding="same", use_bias=False)(x)
            return layers.BatchNormalization()(x)

        x = images = Input(shape)
        x = layers.ReLU()(convolve(x, widths[0], 3))
        before = widths[0]
        for width in widths:
            for _ in range(blocks):
                stride = 1 if width == before else 2
                branch = layers.ReLU()(convolve(x, width, 3, stride))
                branch = convolve(branch, width, 3)
                skip = x if width == before else convolve(x, width, 1, stride)
                x = layers.ReLU()(layers.Add()([branch, skip]))
                before = width
        x = layers.GlobalAveragePooling2D()(x)
        return Model(images, layers.Dense(num_classes, activation="softmax")(x))

    return build


def recurrent(kind: str) -> Callable[[tuple[int, ...], int], Any]:
    """64 LSTM or GRU units, a dense layer of 32, a head."""

    def build(shape: tuple[int, ...], num_classes: int) -> Any:
        from keras import Sequential, layers

        return Sequential(
            [
                layers.Input(shape),
                getattr(layers, kind)(64),
                layers.Dense(32, activation="relu"),
                layers.Dense(num_classes, activation="softmax"),
            ]
        )

    return build


# ------------------------------------------------------------------------------------------------------------ cases

THREE_TASKS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
TWO_TASKS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
TEN = tuple(range(10))
SERIES = {
    # name: data set, classes per source, epochs
    "italy": ("ItalyPowerDemand", ((0, 1),) * 3, 200),
    "motions": ("BasicMotions", ((0, 1, 2, 3),) * 3, 100),
    "vowels": ("JapaneseVowels", (tuple(range(9)),) * 3, 60),
    "vowels-split": ("JapaneseVowels", ((0, 1, 2), (3, 4, 5), (6, 7, 8)), 100),
}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("fashion-cnn", "three CNNs, disjoint tasks of Fashion-MNIST", THREE_TASKS, fashion, small_cnn),
        Case("mnist-cnn", "three CNNs, disjoint tasks of MNIST", THREE_TASKS, mnist, small_cnn, epochs=3),
        Case("fashion-bn", "three CNNs with BatchNorm, Fashion-MNIST", THREE_TASKS, fashion, cnn_with_norm, batch=64),
        Case("mnist-mlp", "five MLPs 3×512, MNIST, one task", (TEN,) * 5, mnist, mlp, epochs=3),
        Case(
            "cifar-conv6-16",
            "CIFAR-10 split 5+5, six convolutions with BatchNorm, width 16 to 64",
            TWO_TASKS,
            cifar32,
            six_convolutions(16),
            epochs=6,
            rate=3e-3,
            shift=2,
        ),
        Case(
            "cifar-conv6-32",
            "CIFAR-10 split 5+5, six convolutions with BatchNorm, width 32 to 128",
            TWO_TASKS,
            cifar32,
            six_convolutions(32),
            epochs=4,
            rate=3e-3,
            shift=2,
        ),
        Case(
            "cifar-resnet16",
            "CIFAR-10 split 5+5, residual network of six blocks, 16×16 pixels",
            TWO_TASKS,
            cifar16,
            residual((32, 64, 128), 2),
            epochs=6,
            rate=3e-3,
            shift=1,
        ),
        Case(
            "cifar-resnet20x4",
            "CIFAR-10 split 5+5, ResNet20 of width ×4",
            TWO_TASKS,
            cifar32,
            residual((64, 128, 256), 3),
            epochs=20,
            batch=256,
            rate=3e-3,
            shift=4,
            accelerator=True,
        ),
        Case(
            "rg4",
            "five rG4detector models",
            load=rg4,
            files=tuple(MODELS / "rg4detector" / f"model_{number}.h5" for number in range(5)),
        ),
        *(
            Case(
                f"ucr-{kind.lower()}-{name}",
                f"{kind} classifiers, {data}, {'one task each' if len(set(classes)) > 1 else 'one task'}",
                classes,
                ucr(data),
                recurrent(kind),
                epochs=epochs,
                batch=16,
                rate=3e-3,
            )
            for kind in ("LSTM", "GRU")
            for name, (data, classes, epochs) in SERIES.items()
        ),
    )
}


# --------------------------------------------------------------------------------------------------------- training


def _moved(images: Array, shift: int, random: np.random.Generator) -> Array:
    """Each image moved by up to `shift` pixels in both directions, and every second one mirrored."""
    count, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    down, right = random.integers(0, 2 * shift + 1, (2, count))
    result = np.empty_like(images)
    for y in range(2 * shift + 1):
        for x in range(2 * shift + 1):
            chosen = (down == y) & (right == x)
            result[chosen] = padded[chosen, y : y + height, x : x + width]
    mirrored = random.random(count) < 0.5
    result[mirrored] = result[mirrored, :, ::-1]
    return result


def train(case: Case, data: Data, num_classes: int, seed: int) -> Any:
    """One source, not compiled: the same seed gives the same network, up to the rounding of parallel sums."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    assert case.build is not None
    model = case.build(data.train.shape[1:], num_classes)
    steps = math.ceil(len(data.train) / case.batch) * case.epochs
    warm = steps // 8 if case.shift else 0
    rate = keras.optimizers.schedules.CosineDecay(
        case.rate / 10 if warm else case.rate,
        steps - warm,
        warmup_target=case.rate if warm else None,
        warmup_steps=warm,
    )
    compiled: Any = "auto" if keras.backend.backend() == "jax" else False  # XLA is no gain for TensorFlow on a CPU
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", jit_compile=compiled)
    for _ in range(case.epochs if case.shift else 1):
        images = _moved(data.train, case.shift, random) if case.shift else data.train
        epochs = 1 if case.shift else case.epochs
        model.fit(images, data.train_targets, batch_size=case.batch, epochs=epochs, verbose=0)
    bare = case.build(data.train.shape[1:], num_classes)
    bare.set_weights(model.get_weights())
    return bare


def accuracy(predictions: Array, targets: Array) -> float:
    return float(np.mean(predictions.argmax(-1) == targets))


def make_sources(case: Case, seed: int, folder: Path, say: Callable[[str], None] = print) -> dict[str, Path]:
    """Files of one set of sources by label; trains what is missing, and says how accurate it is on the test rows."""
    if case.files:
        return dict(zip(case.labels, case.files, strict=True))
    place = case.place(folder, seed)
    place.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, (label, classes) in enumerate(zip(case.labels, case.classes, strict=True)):
        path, facts = place / f"{label}.keras", place / f"{label}.json"
        if not (path.exists() and facts.exists()):
            started = time.perf_counter()
            data = case.data(folder).of(classes)
            model = train(case, data, len(classes), 1000 * seed + number)
            score = accuracy(model.predict(data.test, batch_size=256, verbose=0), data.test_targets)
            seconds = round(time.perf_counter() - started, 1)
            model.save(path)
            known = {"accuracy": score, "classes": classes, "epochs": case.epochs, "seconds": seconds}
            facts.write_text(json.dumps(known))
            say(f"trained {path.relative_to(folder)}: {100 * score:.2f} % in {seconds:.0f} s")
        found[label] = path
    return found
