"""What a path holds, judged by content: names and suffixes lie."""

import os
import stat
from enum import StrEnum
from pathlib import Path

from kmerge.errors import FormatError
from kmerge.store import limits
from kmerge.store.archive import CONFIG, SHARD_MAP, WEIGHTS, check_members
from kmerge.store.hdf5 import Hdf5Weights
from kmerge.store.rawio import Descriptor, open_regular, why_unreadable
from kmerge.store.sniff import ZIP_SIGNATURES, hdf5_start, what_else
from kmerge.store.zipread import read_directory

_SEARCH_GROUPS = 2_000  # where weights may hide in a file whose root says nothing


class Kind(StrEnum):
    """What a file or folder is to kmerge.

    h5: a whole model in HDF5 (Keras 1 and 2, or Keras 3's legacy format); h5_weights: weights alone in that format;
    weights: Keras 3's .weights.h5; keras: a .keras zip; folder: an unzipped one, or a KerasHub preset; shards: a
    .weights.json with its shards.
    """

    H5 = "h5"
    H5_WEIGHTS = "h5_weights"
    WEIGHTS = "weights"
    KERAS = "keras"
    FOLDER = "folder"
    SHARDS = "shards"


def identify(path: str | Path) -> Kind:
    """Tell what a path holds, by content.

    Args:
        path: file or folder.

    Returns:
        Its kind.

    Raises:
        FormatError: if it is nothing that kmerge reads; the message names what it is and what to do.
        UnsafeFileError: if it looks like a model but asks for something no model needs.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
    except ValueError as error:
        raise FormatError(f"{path.name!r} is no valid file name: {error}.") from None
    if stat.S_ISDIR(mode):
        return _folder(path)
    with open_regular(path) as file:
        head = file.read(0, 4096)
        if (
            head[:4] in ZIP_SIGNATURES
        ):  # first: a stored HDF5 member may begin just where HDF5 looks for a file of its own
            check_members(read_directory(file), path.name)
            return Kind.KERAS
        if hdf5_start(file) is not None:
            return _hdf5(file)
        if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
            return _json(file)
        raise FormatError(f"{path.name} {what_else(file)}")


def _folder(path: Path) -> Kind:
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
    label = path.name or str(path)
    if CONFIG in names and (WEIGHTS in names or SHARD_MAP in names):
        return Kind.FOLDER
    if "saved_model.pb" in names or "saved_model.pbtxt" in names:
        raise FormatError(
            f"{label} is a TensorFlow SavedModel, which holds no Keras model that kmerge reads: "
            "load it in the Keras that wrote it and save it with model.save('model.keras') or model.save('model.h5')."
        )
    if "checkpoint" in names or any(name.endswith(".index") for name in names):
        raise FormatError(
            f"{label} is a folder of TensorFlow checkpoints: build the model, load them and save it "
            "with model.save('model.keras')."
        )
    if CONFIG in names and ("model.safetensors" in names or "pytorch_model.bin" in names):
        raise FormatError(
            f"{label} is a Hugging Face model for PyTorch: load it with KerasHub and save it with "
            "model.save('model.keras')."
        )
    if CONFIG in names:
        raise FormatError(
            f"{label} is a folder with {CONFIG!r} but without {WEIGHTS!r}: save the model with its weights."
        )
    models = sorted(name for name in names if name.endswith((".keras", ".h5", ".hdf5")))
    if models:
        raise FormatError(f"{label} is a folder; give the model in it, for example {os.path.join(label, models[0])}.")
    raise FormatError(f"{label} is a folder without a model ({CONFIG!r} and {WEIGHTS!r} were expected).")


def _hdf5(file: Descriptor) -> Kind:
    label = file.path.name
    with Hdf5Weights(Descriptor(os.dup(file.fd), file.path), label) as weights:
        attributes = weights.attribute_names()
        names = weights.names()
        if "model_config" in attributes:
            return Kind.H5
        if "layer_names" in attributes or "layer_names0" in attributes:
            return Kind.H5_WEIGHTS
        if {"layers", "vars", "_layer_checkpoint_dependencies"} & set(names) or _has_vars(weights):
            return Kind.WEIGHTS
        if "model_weights" in names:
            raise FormatError(
                f"{label} is an old Keras file without the model's architecture (no attribute 'model_config'): "
                "save the whole model with model.save('model.h5')."
            )
        some = ", ".join(repr(name) for name in names[:3]) or "nothing"
        raise FormatError(
            f"{label} is an HDF5 file with neither a model nor weights of Keras (it holds {some}): is it a data file? "
            "Give a file written by model.save() or model.save_weights()."
        )


def _has_vars(weights: Hdf5Weights) -> bool:
    """Look for a group `vars` with a tensor `0`, as every Keras 3 layer with weights has."""
    waiting = [("", 0)]
    for _ in range(_SEARCH_GROUPS):
        if not waiting:
            return False
        group, depth = waiting.pop()
        for name, is_group in weights.children(group):
            path = f"{group}/{name}" if group else name
            if not is_group:
                if name.isdigit() and group.rpartition("/")[2] == "vars":
                    return True
            elif depth < limits.GROUP_DEPTH:
                waiting.append((path, depth + 1))
    return False


def _json(file: Descriptor) -> Kind:
    label = file.path.name
    if file.size > limits.JSON_BYTES:
        raise FormatError(f"{label} is JSON text of {limits.human(file.size)}, far more than any model has.")
    content = limits.read_json(file.read(0, file.size), label)
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        if any(str(name).endswith((".safetensors", ".bin")) for name in content["weight_map"].values()):
            raise FormatError(
                f"{label} lists shards of a PyTorch model: load it in Keras and save it with model.save('model.keras')."
            )
        return Kind.SHARDS
    if isinstance(content, dict) and "class_name" in content and "config" in content:
        raise FormatError(
            f"{label} is a model's architecture alone (JSON), without weights: save the whole model "
            "with model.save('model.keras')."
        )
    raise FormatError(f"{label} is JSON text but no Keras model: kmerge reads .keras, .h5 and .weights.h5 files.")
