"""Two processes on this machine train one model, and end with the weights of one process; one is lost, and they resume.

    python benchmarks/distributed.py --engine jax          pip install 'kmerge[jax]'
    python benchmarks/distributed.py --engine tensorflow

Prints JSON: the largest difference between the weights of two processes and of one, on the same global batches; what
the other one says when one is killed; and the difference after all were started again with `resume`. Ends with an error
where a difference is beyond what rounding explains, or where the other one does not fail in words.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MLPS = {"low": "mlp_a.keras", "middle": "mlp_b.keras", "high": "mlp_c.keras"}
TASKS = {"low": (0, 5), "middle": (5, 8), "high": (8, 10)}
EPOCHS = 3
ROUNDING = 1e-4
"""Difference of weights, as a share of the largest, that sums in another order explain."""
PATIENCE = 30.0
"""Seconds that a TensorFlow worker waits for the others: longer than any of them takes between two steps."""


def digits(healing: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 64 pixels, or images, and which digit each is."""
    from sklearn.datasets import load_digits

    images, kinds = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    return images.reshape(-1, 8, 8, 1) if healing else images, kinds


def sources(folder: Path, healing: bool) -> dict[str, Path]:
    """Three MLPs of the fixtures where labels teach; for healing, CNNs, whose kernels move by Muon."""
    if not healing:
        return {label: FIXTURES / name for label, name in MLPS.items()}
    return {label: folder / f"{label}.keras" for label in TASKS}


def make_sources(folder: Path) -> None:
    """CNNs that have learnt a little, each a task of its own; smooth, for where a unit or a maximum switches, last bits
    decide.
    """
    import keras

    images, kinds = digits(healing=True)
    for number, (label, path) in enumerate(sources(folder, healing=True).items()):
        first, end = TASKS[label]
        own = (kinds >= first) & (kinds < end)
        keras.utils.set_random_seed(number)
        x = keras.Input((8, 8, 1), name="image")
        y = keras.layers.Conv2D(16, 3, padding="same", activation="tanh")(x)
        y = keras.layers.Conv2D(32, 3, padding="same", activation="tanh")(y)
        y = keras.layers.Flatten()(keras.layers.AveragePooling2D(2)(y))
        model = keras.Model(x, keras.layers.Dense(end - first, activation="softmax", name="out")(y))
        model.compile("adam", "sparse_categorical_crossentropy")
        model.fit(images[own], kinds[own] - first, epochs=10, verbose=0)
        model.save(path)


def train(folder: Path, healing: bool, slow: bool, resume: bool) -> None:
    """What each process does: the same call of `fine_tune`."""
    import keras

    import kmerge

    images, kinds = digits(healing)
    labels = {name: np.where((kinds >= a) & (kinds < b), kinds - a, -1) for name, (a, b) in TASKS.items()}

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            time.sleep(0.1)

    kmerge.fine_tune(
        folder / "merged.keras",
        images if healing else (images, labels),
        teachers=sources(folder.parent, healing) if healing else None,
        epochs=EPOCHS,
        batch_size=50,  # the last batch of an epoch is smaller, and odd
        checkpoints=folder / "checkpoints",
        resume=resume,
        callbacks=[Slow()] if slow else [],
        output=folder / "tuned.keras",
        force=True,
    )


def process(arguments: argparse.Namespace) -> None:
    """One process: set up by Keras or TensorFlow, then as above."""
    work = (arguments.folder, arguments.healing, arguments.slow, arguments.resume)
    if arguments.count == 1:
        return train(*work)
    addresses = [f"127.0.0.1:{port}" for port in arguments.ports]
    if arguments.engine == "jax":
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        import keras

        keras.distribution.initialize(addresses[0], arguments.count, arguments.rank)
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
        return train(*work)
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": arguments.rank}}
    os.environ["TF_CONFIG"] = json.dumps(cluster)
    import tensorflow as tf

    # Without it, TensorFlow takes some two minutes to notice that a worker is lost.
    impatient = tf.distribute.experimental.CommunicationOptions(timeout_seconds=PATIENCE)
    with tf.distribute.MultiWorkerMirroredStrategy(communication_options=impatient).scope():
        train(*work)
    return None


def start(engine: str, folder: Path, count: int, *options: str) -> list[subprocess.Popen[str]]:
    ports = []
    for _ in range(count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    backend = {"KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, __file__, "--engine", engine, "--folder", str(folder), "--count", str(count), *options]
    return [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--ports", *ports],
            env={**os.environ, **backend},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finished(running: list[subprocess.Popen[str]], what: str) -> None:
    for number, one in enumerate(running):
        text, _ = one.communicate(timeout=300)
        if one.returncode:
            for other in running:
                other.kill()
            raise SystemExit(f"{what}: process {number} ended with {one.returncode}:\n{text[-3000:]}")


def weights(folder: Path) -> list[np.ndarray]:
    import zipfile

    import h5py

    with (
        zipfile.ZipFile(folder / "tuned.keras") as archive,
        archive.open("model.weights.h5") as member,
        h5py.File(member) as file,
    ):
        found: list[np.ndarray] = []
        file.visititems(lambda name, item: found.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    return found


def difference(one: Path, two: Path) -> float:
    pairs = zip(weights(one), weights(two), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def lost(engine: str, folder: Path, options: list[str]) -> dict[str, object]:
    """Kill one of two when there is a checkpoint; what the other does, and where all end when started again."""
    running = start(engine, folder, 2, "--slow", *options)
    while not (folder / "checkpoints" / "training.npz").exists():
        if any(one.poll() is not None for one in running):
            finished(running, "before one was to be lost")
        time.sleep(0.1)
    running[1].send_signal(signal.SIGKILL)
    begun = time.perf_counter()
    said = spoken = None
    lines = []
    assert running[0].stdout is not None
    for line in running[0].stdout:  # until it ends
        lines.append(line)
        if said is None and line.startswith("kmerge.errors."):
            said, spoken = line.strip(), time.perf_counter() - begun
    running[0].wait()
    ended = time.perf_counter() - begun
    running[1].communicate()
    finished(start(engine, folder, 2, "--resume", *options), "resumed")
    return {
        "what the other one said": said or "".join(lines)[-600:],
        "seconds until then": None if spoken is None else round(spoken, 1),
        "its exit status": running[0].returncode,
        "seconds until its end": round(ended, 1),
    }


def check(result: dict[str, Any], scale: float) -> None:
    """Hold what was found against what several processes have to keep to."""
    for what in ("two processes against one", "resumed against one"):
        if not result[what] <= ROUNDING * scale:
            raise SystemExit(f"{what}: weights differ by {result[what]:.2g}, more than rounding explains")
    lost = result["one lost"]
    if not lost["its exit status"] or "resume" not in str(lost["what the other one said"]):
        raise SystemExit(f"one lost: the other one did not end with an error that says how to go on: {lost}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("jax", "tensorflow"), default="tensorflow")
    for name in ("--healing", "--slow", "--resume"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return process(arguments)
    import kmerge

    options = ["--healing"] if arguments.healing else []
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("one", "two", "lost")]
        if arguments.healing:
            make_sources(Path(place))
        for folder in folders:
            folder.mkdir()
            kmerge.combine(sources(Path(place), arguments.healing), folder / "merged.keras", method="align")
        finished(start(arguments.engine, folders[0], 1, *options), "one process")
        finished(start(arguments.engine, folders[1], 2, *options), "two processes")
        scale = max(float(np.abs(array).max()) for array in weights(folders[0]))
        result: dict[str, object] = {
            "engine": arguments.engine,
            "kind": "healing" if arguments.healing else "labels",
            "largest weight": scale,
            "two processes against one": difference(folders[0], folders[1]),
        }
        result["one lost"] = lost(arguments.engine, folders[2], options)
        result["resumed against one"] = difference(folders[0], folders[2])
        print(json.dumps(result, indent=2))
        check(result, scale)
    return None


if __name__ == "__main__":
    main()
