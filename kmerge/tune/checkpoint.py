"""The state of a training in a file: written whole or not at all, so that it can go on after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from kmerge.errors import FormatError, OutputError, PlanError
from kmerge.methods.registry import Array

NAME, LOCK = "training.npz", ".training.lock"
FORMAT = 2
"""Another number wherever the optimizer of a training keeps other variables than it did: 2 since sources teach by Muon.
"""


@dataclass(frozen=True, eq=False)
class State:
    """Where a training stands.

    Attributes:
        facts: step, epoch, history, seconds, what is best: JSON.
        groups: arrays by what they are: "model", "optimizer", "best".
    """

    facts: Mapping[str, Any]
    groups: Mapping[str, Sequence[Array]]


def fingerprint(facts: Mapping[str, Any], arrays: Sequence[Array]) -> str:
    """A digest of what a training starts from: another model, other settings or other data give another one."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_state(folder: Path, state: State, mark: str) -> None:
    """Write a state beside the last one, and put it in its place.

    Raises:
        OutputError: if it cannot be written.
    """
    values: dict[str, Array] = {}
    kinds: dict[str, list[str]] = {}
    for group, arrays in state.groups.items():
        kinds[group] = [str(array.dtype) for array in arrays]
        for number, array in enumerate(arrays):
            plain = array.dtype.kind in "biufc"
            # bfloat16 and smaller are stored as bytes.
            values[f"{group}_{number}"] = array if plain else array.view(np.uint8 if array.itemsize == 1 else np.uint16)
    facts = {"format": FORMAT, "mark": mark, "dtypes": kinds, **state.facts}
    values["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    target = folder / NAME
    half = folder / f".{NAME}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as file:
            np.savez(file, **values)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise OutputError(
            f"The checkpoint '{target}' cannot be written: {error.strerror or error}. Give another folder with "
            "--checkpoints, or make room."
        ) from error


def load_state(folder: Path, mark: str) -> State | None:
    """The last state in a folder; None where there is none.

    Raises:
        FormatError: if what is there is no checkpoint.
        PlanError: if it is of another training.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            of, written = facts["mark"], int(facts["format"])
            groups = {}
            for group, dtypes in facts["dtypes"].items():
                found = [file[f"{group}_{number}"] for number in range(len(dtypes))]
                groups[group] = [_typed(array, dtype) for array, dtype in zip(found, dtypes, strict=True)]
    except _DAMAGED as error:
        raise FormatError(
            f"'{path}' is no checkpoint of kmerge ({error}): remove it, and start without --resume."
        ) from error
    if written != FORMAT:
        other = "an earlier" if written < FORMAT else "a later"
        raise FormatError(
            f"The checkpoint in '{folder}' is of {other} kmerge (format {written}, expected {FORMAT}): go on with that "
            "one, or start again with another folder or with --force."
        )
    if of != mark:
        raise PlanError(
            f"The checkpoint in '{folder}' is of another training: the model, the sources, the data or the settings "
            "differ. Repeat the call as it was, or start again with another folder."
        )
    return State(facts, groups)


def _typed(array: Array, dtype: str) -> Array:
    if str(array.dtype) == dtype:
        return array
    import ml_dtypes

    kind = getattr(ml_dtypes, dtype, None)
    if kind is None:
        raise ValueError(f"it holds '{dtype}'")
    return array.view(kind)


_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def check_folder(folder: Path, resume: bool, force: bool) -> None:
    """Refuse what a training could not save its state in.

    Raises:
        OutputError: if it is no folder, or holds the checkpoint of a training that is not to be resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"'{folder}' is a file, and checkpoints need a folder: give another one with --checkpoints.")
    if not resume and not force and (folder / NAME).exists():
        raise OutputError(
            f"'{folder}' holds the checkpoint of a training: go on with it (--resume), replace it (--force), or give "
            "another folder with --checkpoints."
        )


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """While this lasts, no other training saves its state in a folder; the lock of a killed one is gone with it.

    Raises:
        OutputError: if one does, or the folder cannot be written in.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+b")
    except OSError as error:
        raise OutputError(
            f"Checkpoints cannot be written in '{folder}': {error.strerror or error}. Give another folder with "
            "--checkpoints."
        ) from error
    with file:
        if not _lock(file):
            raise OutputError(
                f"Another training saves its state in '{folder}': wait for it to end, or give another folder with "
                "--checkpoints."
            )
        yield


def _lock(file: IO[bytes]) -> bool:
    """Whether no other process holds a file; on file systems without locks nobody does."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def forget(folder: Path) -> None:
    """Remove what an earlier training left; what a killed one left half-written too. Needs the lock."""
    for path in (folder / NAME, *folder.glob(f".{NAME}.*.part")):
        path.unlink(missing_ok=True)
