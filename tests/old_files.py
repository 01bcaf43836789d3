"""Files as an old Keras wrote them, made by hand, and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import kmerge


def write_old(
    path: Path,
    layers: Sequence[tuple[str, dict[str, Any]]],
    arrays: Mapping[str, np.ndarray],
    version: str = "1.2.2",
    backend: str | None = None,
) -> Path:
    """A Sequential model whose first layer has weights; `backend` is its name, which Keras 1 did not record."""
    entries = [{"class_name": name, "config": {"name": f"l{n}", **config}} for n, (name, config) in enumerate(layers)]
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": entries})
        file.attrs["keras_version"] = version
        if backend is not None:
            file.attrs["backend"] = backend
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [f"l{n}".encode() for n in range(len(layers))]
        for number in range(len(layers)):
            inner = group.create_group(f"l{number}")
            mine = arrays if number == 0 else {}
            inner.attrs["weight_names"] = [f"l0_{name}".encode() for name in mine]
            for name, array in mine.items():
                inner[f"l0_{name}"] = array.astype("float32")
    return path


def converted(path: Path, x: np.ndarray, suffix: str = ".keras") -> np.ndarray:
    """What the converted file predicts."""
    import keras

    new = path.with_name(f"new{suffix}")
    kmerge.convert(path, new, force=True)
    return np.asarray(keras.saving.load_model(new, compile=False)(x.astype("float32")))
