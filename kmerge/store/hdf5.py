"""Weights in an HDF5 file; no h5py object is ever handed out."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
from h5py import h5a, h5d, h5g, h5l, h5o, h5p

from kmerge.errors import FormatError
from kmerge.store import limits
from kmerge.store.attributes import AttributeValue, read_attributes, text
from kmerge.store.headers import string_bytes
from kmerge.store.rawio import Descriptor, Part, Window, open_regular
from kmerge.store.sniff import hdf5_start, what_else
from kmerge.store.tensors import cache_for
from kmerge.store.walk import Walk, check_compressed, refuse_link, too_many
from kmerge.store.weights import Tree, Weights

_OPEN_DATASETS = 4


class Hdf5Weights(Weights):
    """One HDF5 file, or a part of a file that is one.

    Args:
        file: open file; owned, closed with this object.
        label: how messages call it.
        start: where the HDF5 data begin.
        size: how many bytes they are.
    """

    def __init__(self, file: Descriptor, label: str, start: int = 0, size: int | None = None) -> None:
        self.path, self.label = file.path, label
        self.file, self.start = file, start
        self.size = file.size - start if size is None else size
        self._part = Part(file, start, self.size)
        if hdf5_start(self._part) is None:
            within = "" if label == file.path.name else " The model it belongs to is damaged, get it again."
            raise FormatError(f"{label} {what_else(self._part)}{within}")
        self._lock = threading.RLock()
        self._checked: set[bytes] = set()
        self._datasets: OrderedDict[bytes, h5d.DatasetID] = OrderedDict()
        try:
            self._window = Window(file.fd, start, self.size)
            self._h5 = h5py.File(self._window, "r")
            self._root: h5g.GroupID = self._h5["/"].id
            self._window.check()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise FormatError(f"{label} {_why_not_opened(error)}") from None

    def close(self) -> None:
        with self._lock:
            self._datasets.clear()
            self._h5.close()
            self._window.release()
            self.file.close()

    def attributes(self, group: str = "") -> dict[str, AttributeValue]:
        with self._guard(group):
            return read_attributes(self._open(group), self.where(group), self.string_bytes)

    def names(self, group: str = "") -> tuple[str, ...]:
        with self._guard(group):
            return tuple(text(name) for name, _ in self.links(self._open(group), group))

    def attribute_names(self, group: str = "") -> set[str]:
        """The names of a group's attributes, without reading them."""
        with self._guard(group):
            names: list[bytes] = []
            h5a.iterate(self._open(group), names.append)
            return {text(name) for name in names}

    def children(self, group: str = "") -> list[tuple[str, bool]]:
        """Names of plain children, and whether each is a group; links are left out."""
        with self._guard(group):
            loc = self._open(group)
            plain = [name for name, (kind, _) in self.links(loc, group) if kind == h5l.TYPE_HARD]
            return [(text(name), h5o.get_info(loc, name).type == h5o.TYPE_GROUP) for name in plain]

    def has(self, group: str) -> bool:
        with self._guard(group):
            loc = self._root
            for part in _parts(group):
                if not isinstance(loc, h5g.GroupID) or not loc.links.exists(part):
                    return False
                loc = self._enter(loc, part, group)
            return True

    def tree(self, group: str = "") -> Tree:
        with self._guard(group):
            return Walk(self).run(self._open(group), "/".join(text(part) for part in _parts(group)))

    @contextmanager
    def dataset(self, path: bytes) -> Iterator[h5d.DatasetID]:
        """Hold the lock and an open dataset, with a chunk cache that fits reading it in order."""
        with self._lock, self._guard(text(path)):
            dataset = self._datasets.pop(path, None)
            if dataset is None:
                dataset = h5d.open(self._root, path)
                if path not in self._checked:
                    check_compressed(dataset, self.where(text(path)))
                    self._checked.add(path)
                if dataset.get_create_plist().get_layout() == h5d.CHUNKED:
                    access = h5p.create(h5p.DATASET_ACCESS)
                    access.set_chunk_cache(10_007, cache_for(dataset, limits.CHUNK_BYTES), 1.0)
                    del dataset  # HDF5 would ignore the cache of a dataset that is open already
                    dataset = h5d.open(self._root, path, access)
            self._datasets[path] = dataset
            if len(self._datasets) > _OPEN_DATASETS:
                self._datasets.popitem(last=False)
            yield dataset

    def _open(self, group: str) -> h5g.GroupID:
        loc = self._root
        for part in _parts(group):
            if not loc.links.exists(part):
                raise FormatError(
                    f"{self.label} has no group {group!r}: {text(part)!r} is missing. Get the file again."
                )
            loc = self._enter(loc, part, group)
            if not isinstance(loc, h5g.GroupID):
                raise FormatError(f"{self.where(group)}: {text(part)!r} is no group.")
        return loc

    def _enter(self, loc: h5g.GroupID, part: bytes, group: str) -> h5g.GroupID | h5d.DatasetID:
        refuse_link(loc.links.get_info(part).type, f"{self.where(group)}: {text(part)!r}")
        return h5o.open(loc, part)

    def string_bytes(self, loc: h5g.GroupID | h5d.DatasetID, name: bytes, count: int) -> int:
        """A bound of the bytes of an attribute that is a list of `count` strings."""
        bound = count * self.size
        if bound > limits.ATTRIBUTE_BYTES:
            found = string_bytes(self._part.read, h5o.get_info(loc).addr, self._h5.userblock_size, name)
            bound = bound if found is None else found
        return bound

    def links(self, loc: h5g.GroupID, group: str) -> list[tuple[bytes, tuple[int, int]]]:
        if loc.get_num_objs() > limits.OBJECTS:
            raise too_many(self.where(group))
        found: list[tuple[bytes, tuple[int, int]]] = []
        loc.links.iterate(lambda name, info: found.append((name, _copy(info))), info=True)
        return found

    def where(self, path: str) -> str:
        return f"{self.label}: {path!r}" if path else self.label

    @contextmanager
    def _guard(self, path: str) -> Iterator[None]:
        """Turn what h5py raises on a damaged file into one error."""
        self.file.fd  # noqa: B018 - raises where the file is closed
        try:
            try:
                yield
            finally:
                self._window.check()
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise FormatError(
                f"{self.where(path)} cannot be read ({_brief(error)}): the file is damaged, get it again."
            ) from None


def _copy(info: h5l.LinkInfo) -> tuple[int, int]:
    """Type and address: h5py reuses the object it hands to a callback."""
    return info.type, info.u


def open_hdf5(path: str | Path) -> Weights:
    """Open an HDF5 file of weights, with or without a model.

    Args:
        path: the file, whatever it is called.

    Returns:
        Its weights, to be closed or used in `with`.

    Raises:
        FormatError: if it is no HDF5 file, or a damaged one; the message names what it is instead.
    """
    path = Path(path)
    file = open_regular(path)
    try:
        return Hdf5Weights(file, path.name)
    except BaseException:
        file.close()
        raise


def _parts(group: str) -> list[bytes]:
    return [part.encode("utf-8", "surrogateescape") for part in group.split("/") if part]


def _brief(error: BaseException) -> str:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return message[:160]


def _why_not_opened(error: BaseException) -> str:
    if "truncated" in str(error).lower():
        return "is a truncated HDF5 file: its end is missing. Download or copy it again."
    return f"cannot be opened as HDF5 ({_brief(error)}): it is damaged, get it again."
