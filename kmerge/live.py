"""Everything that needs Keras: live models in and out, and conversion between formats.

Keras is imported when a function here is called, not before.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kmerge.errors import FormatError, MergeError, OutputError
from kmerge.store.target import copy_file

RUNS_CODE = {
    "Lambda": "holds Python bytecode",
    "TFSMLayer": "runs a TensorFlow SavedModel from disk",
    "TorchModuleWrapper": "holds a pickled PyTorch module",
}
"""Layers that hold code, and what that is: never run from a file."""


def is_model(value: Any) -> bool:
    """Whether a value is a live Keras model, without importing Keras."""
    return any(
        base.__name__ == "Model" and base.__module__.startswith(("keras.", "keras_core."))
        for base in type(value).__mro__
    )


class _Silence:
    """Who wants silence, and the standard error that comes back when nobody does any more."""

    lock = threading.Lock()
    count = 0
    saved: int | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is written to standard error meanwhile: by Python, and by TensorFlow's C++, which knows only the
    descriptor. It is the whole process's, so threads share one silence, and the last one to leave ends it."""
    with _Silence.lock:
        if not _Silence.count:
            _redirect()
        _Silence.count += 1
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.count -= 1
            if not _Silence.count:
                _restore()


def _redirect() -> None:
    _flush()
    try:
        _Silence.saved = os.dup(2)
    except OSError:  # it is closed
        _Silence.saved = None
    null = os.open(os.devnull, os.O_WRONLY)
    if null != 2:
        os.dup2(null, 2)
        os.close(null)


def _restore() -> None:
    _flush()
    if _Silence.saved is None:
        os.close(2)
    else:
        os.dup2(_Silence.saved, 2)
        os.close(_Silence.saved)


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):  # closed, or None
        sys.stderr.flush()


def save_model(model: Any, folder: Path, name: str) -> Path:
    """A live model as a `.keras` file in a folder.

    Raises:
        FormatError: if the model is not built, or Keras cannot save it.
    """
    if not getattr(model, "built", False):
        raise FormatError(f"The model '{model.name}' has no weights yet: call or build it once before merging.")
    path = folder / f"{name}.keras"
    try:
        with quiet():
            model.save(path)
    except Exception as error:
        raise FormatError(f"Keras cannot save the model '{model.name}': {one_line(error)}.") from error
    return path


def load_model(path: Path, what: str, custom_objects: Mapping[str, Any] | None = None, trusted: bool = False) -> Any:
    """Open a model file with Keras, in safe mode unless the file was made from the caller's own live models.

    Raises:
        MergeError: if Keras does not open it.
    """
    with quiet():
        import keras

    try:
        with quiet():
            return keras.saving.load_model(
                path, custom_objects=dict(custom_objects or {}), compile=False, safe_mode=not trusted
            )
    except Exception as error:
        raise MergeError(f"Keras {keras.__version__} cannot open {what}: {one_line(error)}.") from error


_WITHOUT_KERAS = (
    "Merge file to file in the sources' own format (kmerge combine, output with the same suffix), or replace the layer."
)


def check_runs_no_code(model: Mapping[str, Any] | None, name: str, way_out: str = _WITHOUT_KERAS) -> None:
    """Refuse a configuration that would run code of its own.

    Args:
        model: configuration as stored; None for weights only.
        name: of the file, for the message.
        way_out: what to do instead, for the message.

    Raises:
        FormatError: naming the layer.
    """
    for class_name, layer in _classes(model):
        if class_name in RUNS_CODE:
            raise FormatError(
                f"'{name}' has a {class_name} layer '{layer}', which holds code: kmerge never runs code from a "
                f"file, and Keras would have to. {way_out}"
            )


def _classes(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        if isinstance(value.get("class_name"), str):
            config = value.get("config")
            name = value.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
            yield value["class_name"], str(name)
        for item in value.values():
            yield from _classes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _classes(item)


def with_suffix(path: Path, model: Mapping[str, Any] | None, folder: Path) -> Path:
    """Keras goes by the suffix: a file whose suffix tells something else is handed over under another name."""
    suffix = ".keras" if model is not None and "module" in model else ".h5"
    if path.is_dir() or path.name.endswith(suffix) or (suffix == ".h5" and path.name.endswith(".hdf5")):
        return path
    link = folder / f"source_{len(os.listdir(folder))}{suffix}"
    link.symlink_to(path.resolve())
    return link


def write_as_h5(
    path: Path, target: Path, attribute: str | None, custom_objects: Mapping[str, Any] | None = None
) -> None:
    """A `.keras` file as a Keras 3 `.h5` at `target`, with kmerge's facts in an attribute.

    Args:
        path: the `.keras` file.
        target: where to write; what stands there is replaced.
        attribute: the facts; None for none.
        custom_objects: classes of custom layers, as for `load_model`.

    Raises:
        MergeError: if Keras does not open the `.keras` file.
        OutputError: if Keras cannot save it as `.h5`, or the attribute cannot be written.
    """
    import h5py

    model = load_model(path, "the merged model", custom_objects)
    try:
        with quiet():
            model.save(target)
        if attribute is not None:
            with h5py.File(target, "r+") as file:
                file.attrs["kmerge"] = attribute
    except Exception as error:
        raise OutputError(
            f"Keras cannot write the merged model as .h5: {one_line(error)}. Write it as .keras."
        ) from error


def rewrite(path: Path, target: Path, custom_objects: Mapping[str, Any], overwrite: bool) -> None:
    """A model file opened and saved again by Keras, in the format that the target's suffix tells; whole or not at all.

    Args:
        path: what to open.
        target: where to save.
        custom_objects: classes of custom layers, as for `load_model`.
        overwrite: replace what stands there.

    Raises:
        MergeError: if Keras does not open it.
        OutputError: if Keras cannot save it, or it cannot stand there.
    """
    model = load_model(path, "the converted model", custom_objects)
    middle = path.with_name(f"again{target.suffix}")
    try:
        with quiet():
            model.save(middle)
    except Exception as error:
        raise OutputError(f"Keras cannot save the converted model: {one_line(error)}.") from error
    copy_file(middle, target.absolute(), overwrite)


def freeze(model: Any, places: list[int]) -> None:
    """Set the layers at some places of `model.layers` to be not trainable, whatever their configuration records."""
    for place in places:
        if model.layers[place].weights:
            model.layers[place].trainable = False


_FACTS: weakref.WeakKeyDictionary[Any, Mapping[str, Any]] = weakref.WeakKeyDictionary()


def remember(model: Any, facts: Mapping[str, Any]) -> None:
    """Keep the facts of a merge beside a live model, as its file would hold them."""
    _FACTS[model] = facts


def facts_of(model: Any) -> Mapping[str, Any] | None:
    """The facts of the merge that a live model came from; None for any other."""
    return _FACTS.get(model)


def custom_objects_of(models: list[Any]) -> dict[str, Any]:
    """Classes of the layers of live models that are not Keras's own: the merged model is built from them."""
    found: dict[str, Any] = {}
    for model in models:
        for layer in [model, *model._flatten_layers()]:
            kind = type(layer)
            if not kind.__module__.startswith("keras."):
                found[kind.__name__] = kind
    return found


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks; of TensorFlow's, without the stack that it puts before."""
    text = str(error)
    if text.startswith("Graph execution error"):
        stack = ("Graph execution error", "Detected at node")
        lines = [line for line in text.splitlines() if line and not line[0].isspace() and not line.startswith(stack)]
        text = " ".join(lines) or text
    text = " ".join(text.split())
    return (text if len(text) <= 300 else text[:297] + "...").rstrip(".")
