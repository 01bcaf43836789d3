"""Weights in an HDF5 file: listed with every check made first, never an h5py object handed out.

HDF5 is a small file system: its objects can be links to other files, views of other data, references, or claims of a size that
is not there. Weights need none of that, so each object is looked at before it is opened and refused unless it is a plain group
or a plain tensor whose bytes are really in the file.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import h5py
from h5py import h5a, h5d, h5g, h5l, h5o, h5p, h5s

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import limits
from kmerge.store.attributes import AttributeValue, join_names, read_attributes, text
from kmerge.store.dtypes import EXTENDED, logical
from kmerge.store.rawio import Descriptor, Window, open_regular
from kmerge.store.sniff import hdf5_start, what_else
from kmerge.store.tensors import DirectTensor, LibraryTensor, Tensor, cache_for

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_OPEN_DATASETS = 4


@dataclass
class Tree:
    """What lies under one group.

    Attributes:
        groups: attributes by relative path; "" is the group itself.
        tensors: tensors by relative path.
        attributes: attributes of those tensors that have some.
    """

    groups: dict[str, dict[str, AttributeValue]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, AttributeValue]] = field(default_factory=dict)


class Weights:
    """Named tensors in groups: an HDF5 file, a member of a zip, or a set of shards.

    Attributes:
        path: the file, for messages.
    """

    path: Path

    def attributes(self, group: str = "") -> dict[str, AttributeValue]:
        """The attributes of a group: text, numbers, or lists of them."""
        raise NotImplementedError

    def names(self, group: str = "") -> tuple[str, ...]:
        """The names of a group's children, in HDF5's order by name."""
        raise NotImplementedError

    def tree(self, group: str = "") -> Tree:
        """Everything under a group, checked.

        Raises:
            UnsafeFileError: if there is anything but plain groups and plain tensors that are really stored.
            FormatError: if there is no such group, or the file is damaged.
        """
        raise NotImplementedError

    def has(self, group: str) -> bool:
        """Tell whether there is a group or tensor of this path."""
        raise NotImplementedError

    def names_attribute(self, group: str, name: str) -> list[str]:
        """A list of names stored as an attribute, joined where Keras split it; [] if there is none."""
        return join_names(self.attributes(group), name)

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        self._file, self._start = file, start
        self._size = file.size - start if size is None else size
        self._lock = threading.RLock()
        self._datasets: OrderedDict[bytes, h5d.DatasetID] = OrderedDict()
        try:
            self._h5 = h5py.File(Window(file.fd, start, self._size), "r")
            self._root: h5g.GroupID = self._h5["/"].id
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise FormatError(f"{label} {_why_not_opened(error)}") from None

    def close(self) -> None:
        with self._lock:
            self._datasets.clear()
            self._h5.close()
            self._file.close()

    def attributes(self, group: str = "") -> dict[str, AttributeValue]:
        with self._guard(group):
            return read_attributes(self._open(group), self._where(group), self._size)

    def names(self, group: str = "") -> tuple[str, ...]:
        with self._guard(group):
            return tuple(text(name) for name, _ in self._links(self._open(group), group))

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
            plain = [name for name, (kind, _) in self._links(loc, group) if kind == h5l.TYPE_HARD]
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
            return _Walk(self).run(self._open(group), "/".join(text(part) for part in _parts(group)))

    @contextmanager
    def dataset(self, path: bytes) -> Iterator[h5d.DatasetID]:
        """Hold the lock and an open dataset, with a chunk cache that fits reading it in order."""
        with self._lock, self._guard(text(path)):
            dataset = self._datasets.pop(path, None)
            if dataset is None:
                dataset = h5d.open(self._root, path)
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
                raise FormatError(f"{self.label} has no group {group!r}.")
            loc = self._enter(loc, part, group)
            if not isinstance(loc, h5g.GroupID):
                raise FormatError(f"{self._where(group)}: {text(part)!r} is no group.")
        return loc

    def _enter(self, loc: h5g.GroupID, part: bytes, group: str) -> h5g.GroupID | h5d.DatasetID:
        refuse_link(loc.links.get_info(part).type, f"{self._where(group)}: {text(part)!r}")
        return h5o.open(loc, part)

    def _links(self, loc: h5g.GroupID, group: str) -> list[tuple[bytes, tuple[int, int]]]:
        if loc.get_num_objs() > limits.OBJECTS:
            raise too_many(self._where(group))
        found: list[tuple[bytes, tuple[int, int]]] = []
        loc.links.iterate(lambda name, info: found.append((name, _copy(info))), info=True)
        return found

    def _where(self, path: str) -> str:
        return f"{self.label}: {path!r}" if path else self.label

    @contextmanager
    def _guard(self, path: str) -> Iterator[None]:
        """Turn what h5py raises on a damaged file into one error."""
        self._file.fd  # noqa: B018 - raises where the file is closed
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise FormatError(
                f"{self._where(path)} cannot be read ({_brief(error)}): the file is damaged, get it again."
            ) from None


def _copy(info: h5l.LinkInfo) -> tuple[int, int]:
    """Type and address: h5py reuses the object it hands to a callback."""
    return info.type, info.u


class _Walk:
    """One walk of a group: what it has seen, and what that claims in all."""

    def __init__(self, weights: Hdf5Weights) -> None:
        self.weights, self.tree = weights, Tree()
        self.groups_seen: set[int] = set()
        self.objects = self.direct_bytes = self.claimed_bytes = 0

    def run(self, loc: h5g.GroupID, base: str) -> Tree:
        self.base = base
        self.groups_seen.add(h5o.get_info(loc).addr)
        self._group(loc, "", 0)
        return self.tree

    def _where(self, path: str) -> str:
        return self.weights._where("/".join(part for part in (self.base, path) if part))

    def _group(self, loc: h5g.GroupID, path: str, depth: int) -> None:
        if depth > limits.GROUP_DEPTH:
            raise UnsafeFileError(
                f"{self._where(path)} is nested more than {limits.GROUP_DEPTH} groups deep; models need about 10."
            )
        self.tree.groups[path] = read_attributes(loc, self._where(path), self.weights._size)
        for name, (kind, address) in self.weights._links(loc, path):
            self.objects += 1
            if self.objects > limits.OBJECTS:
                raise too_many(self._where(""))
            child = f"{path}/{text(name)}" if path else text(name)
            if kind != h5l.TYPE_HARD:
                refuse_link(kind, self._where(child))
            item = h5o.open(loc, name)
            if isinstance(item, h5d.DatasetID):
                self._tensor(item, child)
            elif isinstance(item, h5g.GroupID):
                if address in self.groups_seen:
                    raise UnsafeFileError(
                        f"{self._where(child)} is a group that has been met before under another name, which may go round in "
                        "circles. Groups of weights are a tree: re-save the file with Keras."
                    )
                self.groups_seen.add(address)
                self._group(item, child, depth + 1)
            else:
                raise UnsafeFileError(
                    f"{self._where(child)} is neither a group nor a tensor. Re-save the weights with Keras."
                )

    def _tensor(self, dataset: h5d.DatasetID, path: str) -> None:
        where = self._where(path)
        plist = (
            dataset.get_create_plist()
        )  # looked at first: asking a virtual dataset for its shape may open other files
        layout = plist.get_layout()
        if layout == h5d.VIRTUAL:
            raise UnsafeFileError(
                f"{where} is a virtual dataset, a view of data in other files. kmerge reads only what the file itself holds: "
                "re-save the weights with Keras."
            )
        if layout == h5d.CONTIGUOUS and plist.get_external_count():
            name, _, _ = plist.get_external(0)
            raise UnsafeFileError(
                f"{where} keeps its numbers in another file ({text(name)!r}). kmerge reads only what the file itself holds: "
                "re-save the weights with Keras."
            )
        space = dataset.get_space()
        if space.get_simple_extent_type() == h5s.NULL:
            raise FormatError(f"{where} is an empty dataset without a shape. Re-save the weights with Keras.")
        shape = tuple(int(length) for length in space.shape)
        dtype, direct, swapped = logical(dataset.get_type(), where)
        attributes = read_attributes(dataset, where, self.weights._size)
        if attributes:
            self.tree.attributes[path] = attributes
            named = attributes.get("dtype")
            if dtype.startswith("void") and isinstance(named, str) and f"void{EXTENDED.get(named)}" == dtype:
                dtype = named
        size = 1
        for length in shape:
            size *= length
        itemsize = dataset.get_type().get_size()
        nbytes = size * itemsize
        if len(shape) > limits.RANK or any(not 0 <= length < 2**62 for length in shape) or nbytes >= 2**62:
            raise UnsafeFileError(f"{where} claims the shape {shape}, which no machine can hold.")
        offset = dataset.get_offset() if layout == h5d.CONTIGUOUS and direct else None
        self._check_stored(dataset, layout, plist, where, shape, nbytes, offset)
        if size == 0 or offset is not None:
            word = itemsize // 2 if dtype.startswith("complex") else itemsize
            self.tree.tensors[path] = DirectTensor(
                shape,
                dtype,
                size,
                nbytes,
                where,
                self.weights._file,
                self.weights._start + (offset or 0),
                word if swapped else 0,
            )
        else:
            inner = "/".join(part for part in (self.base, path) if part)
            self.tree.tensors[path] = LibraryTensor(
                shape, dtype, size, nbytes, where, self.weights, inner.encode("utf-8", "surrogateescape")
            )

    def _check_stored(
        self,
        dataset: h5d.DatasetID,
        layout: int,
        plist: h5p.PropDCID,
        where: str,
        shape: tuple[int, ...],
        nbytes: int,
        offset: int | None,
    ) -> None:
        """Hold what the tensor claims against what the file stores for it, and against the whole file."""
        stored = dataset.get_storage_size() if nbytes else 0
        if offset is not None and nbytes:
            if stored < nbytes or offset + nbytes > self.weights._size:
                raise UnsafeFileError(
                    f"{where} claims the shape {shape}, {limits.human(nbytes)}, but the file stores "
                    f"{limits.human(max(0, min(stored, self.weights._size - offset)))} of them: it is truncated or forged. Get it again."
                )
            self.direct_bytes += nbytes
            if self.direct_bytes > self.weights._size:
                raise UnsafeFileError(
                    f"{where}: the tensors up to here claim more bytes than the whole file has: they overlap."
                )
            return
        if layout == h5d.CHUNKED:
            chunk = dataset.get_type().get_size()
            for length in plist.get_chunk():
                chunk *= length
            if chunk > limits.CHUNK_BYTES:
                raise UnsafeFileError(
                    f"{where} is stored in chunks of {limits.human(chunk)}; at most {limits.human(limits.CHUNK_BYTES)} are read. "
                    "Re-save the weights with Keras, which does not use chunks."
                )
            for index in range(plist.get_nfilters()):
                code = plist.get_filter(index)[0]
                if code not in _FILTERS:
                    raise UnsafeFileError(
                        f"{where} is compressed with HDF5 filter {code}; kmerge reads {', '.join(_FILTERS.values())}. "
                        "Re-save the weights with Keras."
                    )
        self.claimed_bytes += nbytes
        if stored > self.weights._size or limits.expands_too_far(nbytes, stored):
            raise UnsafeFileError(
                f"{where} claims the shape {shape}, {limits.human(nbytes)}, from {limits.human(stored)} stored. "
                "That is no honest compression: check where this file comes from."
            )
        if limits.expands_too_far(self.claimed_bytes, self.weights._size):
            raise UnsafeFileError(
                f"{where}: the tensors up to here claim {limits.human(self.claimed_bytes)}, far more than the file can hold."
            )


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
        if hdf5_start(file) is None:
            raise FormatError(f"{path.name} {what_else(file)}")
        return Hdf5Weights(file, path.name)
    except BaseException:
        file.close()
        raise


def refuse_link(kind: int, where: str) -> None:
    """Raise unless a link is a hard one, that is the object itself."""
    if kind != h5l.TYPE_HARD:
        name = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}.get(
            kind, "an unknown kind of link"
        )
        raise UnsafeFileError(
            f"{where} is {name}. kmerge reads only what the file itself holds: re-save the weights with Keras."
        )


def too_many(where: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{where} holds more than {limits.OBJECTS:,} objects; models need some thousand. Check where it comes from."
    )


def _parts(group: str) -> list[bytes]:
    return [part.encode("utf-8", "surrogateescape") for part in group.split("/") if part]


def _brief(error: BaseException) -> str:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return message[:160]


def _why_not_opened(error: BaseException) -> str:
    if "truncated" in str(error).lower():
        return "is a truncated HDF5 file: its end is missing. Download or copy it again."
    return f"starts like HDF5 but cannot be opened ({_brief(error)}): it is damaged, get it again."
