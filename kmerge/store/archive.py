"""A model in Keras 3's format: a zip, or the folder that it unpacks to."""

import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import limits
from kmerge.store.hdf5 import Hdf5Weights
from kmerge.store.rawio import Descriptor, open_regular, write_at
from kmerge.store.shards import open_map
from kmerge.store.weights import Weights
from kmerge.store.zipread import Entry, read_directory

METADATA, CONFIG, WEIGHTS, SHARD_MAP = "metadata.json", "config.json", "model.weights.h5", "model.weights.json"
_PRESET_FILES = ("task.json", "preprocessor.json", "tokenizer.json", "image_converter.json", "audio_converter.json")


@dataclass(frozen=True, slots=True)
class Asset:
    """A further file of a model, for example a vocabulary.

    Attributes:
        size: bytes.
    """

    size: int
    _load: Callable[[], bytes] = field(repr=False)

    def read(self) -> bytes:
        """Its content."""
        return self._load()


class Archive:
    """An open model in Keras 3's format.

    Attributes:
        path: the file or folder.
        config: content of config.json.
        metadata: content of metadata.json; {} if there is none.
        weights: the weights.
        assets: further members by their full names, for example "assets/…/vocabulary.txt".
    """

    def __init__(
        self, path: Path, config: dict[str, Any], metadata: dict[str, Any], weights: Weights, assets: dict[str, Asset]
    ) -> None:
        self.path, self.config, self.metadata, self.weights, self.assets = path, config, metadata, weights, assets

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_archive(path: str | Path) -> Archive:
    """Open a `.keras` file, or the folder it unpacks to; KerasHub presets, too.

    Args:
        path: zip or folder.

    Returns:
        The model's parts, to be closed or used in `with`.

    Raises:
        UnsafeFileError: if a member or a link leads out of it, or claims more than it holds.
        FormatError: if it is neither, or a part is missing or damaged.
    """
    path = Path(path)
    return _open_folder(path) if os.path.isdir(path) else _open_zip(path)


def _object(data: bytes, what: str) -> dict[str, Any]:
    value = limits.read_json(data, what)
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a {type(value).__name__}; Keras writes an object. Get the file again.")
    return value


def _open_zip(path: Path) -> Archive:
    file = open_regular(path)
    weights: Weights | None = None
    try:
        entries = read_directory(file)
        check_members(entries, path.name)
        config = _object(entries[CONFIG].read(file, limits.JSON_BYTES), f"{path.name}: {CONFIG!r}")
        metadata = (
            _object(entries[METADATA].read(file, limits.JSON_BYTES), f"{path.name}: {METADATA!r}")
            if METADATA in entries
            else {}
        )

        def open_member(name: str) -> Weights:
            return _member_weights(path, file, entries, name)

        if WEIGHTS in entries:
            weights = open_member(WEIGHTS)
        else:
            data = entries[SHARD_MAP].read(file, limits.JSON_BYTES)
            weights = open_map(data, f"{path.name}: {SHARD_MAP!r}", path, open_member)
        used = {CONFIG, METADATA, WEIGHTS, SHARD_MAP}
        assets = {
            name: Asset(entry.size, lambda entry=entry: entry.read(file, limits.ASSET_BYTES))  # type: ignore[misc]
            for name, entry in entries.items()
            if name not in used and not name.endswith("/")
        }
        return _ZipArchive(path, config, metadata, weights, assets, file)
    except BaseException:
        if weights is not None:
            weights.close()
        file.close()
        raise


class _ZipArchive(Archive):
    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        metadata: dict[str, Any],
        weights: Weights,
        assets: dict[str, Asset],
        file: Descriptor,
    ) -> None:
        super().__init__(path, config, metadata, weights, assets)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


def check_members(entries: dict[str, Entry], label: str) -> None:
    """Raise unless a zip has the members of a Keras model; the message names what it is instead."""
    names = set(entries)
    if CONFIG in names and (WEIGHTS in names or SHARD_MAP in names):
        return
    if CONFIG in names and "model.weights.npz" in names:
        raise FormatError(
            f"{label} keeps its weights as 'model.weights.npz', which kmerge does not read: "
            "re-save it with keras.saving.save_model(model, path), whose default is HDF5."
        )
    base = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in base:
        what = (
            "is a PyTorch file (a zip with a pickle inside), which kmerge never opens since it can "
            "run code: build the model in Keras and save it"
        )
    elif names and all(name.endswith(".npy") for name in names):
        what = "is a NumPy .npz file, not a Keras model: save the model itself with model.save('model.keras')"
    elif "saved_model.pb" in base:
        what = "is a zipped TensorFlow SavedModel: load it in TensorFlow and save it with model.save('model.keras')"
    elif CONFIG in base and (WEIGHTS in base or SHARD_MAP in base):
        inner = next(name for name in sorted(names) if name.endswith("/" + CONFIG)).rpartition("/")[0]
        what = f"holds its model in a folder {inner!r} inside the zip: unpack it and give that folder"
    elif CONFIG in names:
        what = f"is a zip with {CONFIG!r} but without {WEIGHTS!r}: save the model with its weights"
    elif "[Content_Types].xml" in names:
        what = "is an Office document, not a Keras model"
    else:
        some = ", ".join(repr(name) for name in sorted(names)[:3]) or "nothing"
        what = f"is a zip archive but no Keras model (it holds {some}; {CONFIG!r} and {WEIGHTS!r} were expected)"
    raise FormatError(f"{label} {what}.")


def _member_weights(path: Path, file: Descriptor, entries: dict[str, Entry], name: str) -> Weights:
    entry = entries.get(name)
    label = f"{path.name}/{name}"
    if entry is None:
        raise FormatError(f"{path.name} has no member {name!r}: the archive is incomplete, get it again.")
    copy = Descriptor(os.dup(file.fd), path)
    try:
        if entry.deflated:
            copy.close()
            copy = _unpacked(path, file, entry)
            return Hdf5Weights(copy, label)
        return Hdf5Weights(copy, label, entry.data, entry.size)
    except BaseException:
        copy.close()
        raise


def _unpacked(path: Path, file: Descriptor, entry: Entry) -> Descriptor:
    """Unpack a compressed member of weights into a temporary file without a name."""
    with tempfile.TemporaryFile(prefix="kmerge-") as place:
        position = 0
        try:
            for block in entry.blocks(file):
                write_at(place.fileno(), position, memoryview(block))
                position += len(block)
        except OSError as error:
            raise FormatError(
                f"{path.name}: {entry.name!r} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}."
            ) from None
        return Descriptor(os.dup(place.fileno()), path)


def _open_folder(path: Path) -> Archive:
    folder = os.path.realpath(path)

    def inside(name: str) -> Path:
        """The real place of a file of the folder, refused if a link leads it elsewhere."""
        real = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([folder, real]) != folder:
            raise UnsafeFileError(
                f"{path.name}: {name!r} is a symbolic link out of the folder. kmerge reads only what "
                "the folder itself holds: "
                f"copy it with its links resolved (cp -rL)."
            )
        return Path(real)

    def read(name: str, limit: int) -> bytes:
        with open_regular(inside(name)) as file:
            if file.size > limit:
                raise UnsafeFileError(
                    f"{path.name}: {name!r} has {limits.human(file.size)}; at most {limits.human(limit)} are read."
                )
            return file.read(0, file.size)

    def open_file(name: str) -> Weights:
        file = open_regular(inside(name))
        try:
            return Hdf5Weights(file, f"{path.name}/{name}")
        except BaseException:
            file.close()
            raise

    if not os.path.lexists(os.path.join(folder, CONFIG)):
        raise FormatError(
            f"{path.name} is a folder without {CONFIG!r}: give the folder of an unzipped .keras file, or a file."
        )
    config = _object(read(CONFIG, limits.JSON_BYTES), f"{path.name}: {CONFIG!r}")
    has_metadata = os.path.lexists(os.path.join(folder, METADATA))
    metadata = _object(read(METADATA, limits.JSON_BYTES), f"{path.name}: {METADATA!r}") if has_metadata else {}
    assets = {
        name: Asset(inside(name).stat().st_size, lambda name=name: read(name, limits.ASSET_BYTES))  # type: ignore[misc]
        for name in _folder_assets(folder, path.name)
    }
    if os.path.lexists(os.path.join(folder, WEIGHTS)):
        weights = open_file(WEIGHTS)
    elif os.path.lexists(os.path.join(folder, SHARD_MAP)):
        weights = open_map(read(SHARD_MAP, limits.JSON_BYTES), f"{path.name}: {SHARD_MAP!r}", path, open_file)
    else:
        raise FormatError(
            f"{path.name} is a folder with {CONFIG!r} but without {WEIGHTS!r}: save the model with its weights."
        )
    return Archive(path, config, metadata, weights, assets)


def _folder_assets(folder: str, label: str) -> list[str]:
    names = [name for name in _PRESET_FILES if os.path.lexists(os.path.join(folder, name))]
    waiting = ["assets"] if os.path.isdir(os.path.join(folder, "assets")) else []
    if waiting and os.path.islink(os.path.join(folder, "assets")):
        raise UnsafeFileError(
            f"{label}: 'assets' is a symbolic link. Copy the folder with its links resolved (cp -rL)."
        )
    while waiting:
        inner = waiting.pop()
        with os.scandir(os.path.join(folder, inner)) as items:
            for item in sorted(items, key=lambda item: item.name):
                name = f"{inner}/{item.name}"
                if item.is_dir(follow_symlinks=False):
                    waiting.append(name)
                elif stat.S_ISREG(item.stat().st_mode):
                    names.append(name)
                else:
                    raise UnsafeFileError(f"{label}: {name!r} is no regular file. Remove it from the folder.")
                if len(names) + len(waiting) > limits.MEMBERS:
                    raise UnsafeFileError(
                        f"{label} holds more than {limits.MEMBERS:,} assets. Is this the right folder?"
                    )
    return names
