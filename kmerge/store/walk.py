"""The walk over an HDF5 group, with every check that is made before a tensor is read.

HDF5 is a small file system: its objects can be links to other files, views of other data, references, or claims of a
size that is not there. Weights need none of that, so each object is looked at before it is opened and refused unless it
is a plain group, or a plain tensor whose bytes are really in the file.
"""

import zlib
from typing import TYPE_CHECKING

from h5py import h5d, h5g, h5l, h5o, h5p, h5s

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import limits
from kmerge.store.attributes import AttributeValue, Owner, read_attributes, text, text_size, too_much_text
from kmerge.store.dtypes import EXTENDED, logical
from kmerge.store.tensors import DirectTensor, LibraryTensor
from kmerge.store.weights import Tree

if TYPE_CHECKING:
    from kmerge.store.hdf5 import Hdf5Weights

_GZIP = 1
_FILTERS = {_GZIP: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_CHECKSUM = 3


class Walk:
    """One walk of a group: what it has seen, and what that claims in all."""

    def __init__(self, weights: "Hdf5Weights") -> None:
        self.weights, self.tree = weights, Tree()
        self.groups_seen: set[int] = set()
        self.objects = self.direct_bytes = self.claimed_bytes = self.text = 0

    def run(self, loc: h5g.GroupID, base: str) -> Tree:
        self.base = base
        self._group(loc, "", 0)
        return self.tree

    def _where(self, path: str) -> str:
        return self.weights.where("/".join(part for part in (self.base, path) if part))

    def _group(self, loc: h5g.GroupID, path: str, depth: int) -> None:
        if depth > limits.GROUP_DEPTH:
            raise UnsafeFileError(
                f"{self._where(path)} is nested more than {limits.GROUP_DEPTH} groups deep; models need about 10."
            )
        self.tree.groups[path] = self._attributes(loc, self._where(path))
        for name, (kind, address) in self.weights.links(loc, path):
            self.objects += 1
            if self.objects > limits.OBJECTS:
                raise too_many(self._where(""))
            child = f"{path}/{text(name)}" if path else text(name)
            if kind != h5l.TYPE_HARD:
                refuse_link(kind, self._where(child))
            if b"/" in name or name in (b"", b"."):  # HDF5 would take it for a path and follow links on it
                raise UnsafeFileError(f"{self._where(path)} holds an object named {text(name)!r}, which is no name.")
            item = h5o.open(loc, name)
            if isinstance(item, h5d.DatasetID):
                self._tensor(item, child)
            elif isinstance(item, h5g.GroupID):
                if address in self.groups_seen:
                    raise UnsafeFileError(
                        f"{self._where(child)} is a group that has been met before under another "
                        "name, which may go round in "
                        "circles. Groups of weights are a tree: re-save the file with Keras."
                    )
                self.groups_seen.add(address)
                self._group(item, child, depth + 1)
            else:
                raise UnsafeFileError(
                    f"{self._where(child)} is neither a group nor a tensor. Re-save the weights with Keras."
                )

    def _attributes(self, loc: Owner, where: str) -> dict[str, AttributeValue]:
        attributes = read_attributes(loc, where, self.weights.string_bytes)
        self.text += sum(map(text_size, attributes.values()))
        if self.text > limits.STRINGS_BYTES:
            raise too_much_text(where)
        return attributes

    def _tensor(self, dataset: h5d.DatasetID, path: str) -> None:
        where = self._where(path)
        plist = dataset.get_create_plist()  # first: asking a virtual dataset for its shape may open other files
        layout = plist.get_layout()
        if layout == h5d.VIRTUAL:
            raise UnsafeFileError(
                f"{where} is a virtual dataset, a view of data in other files. kmerge reads only what "
                "the file itself holds: "
                "re-save the weights with Keras."
            )
        if layout == h5d.CONTIGUOUS and plist.get_external_count():
            name, _, _ = plist.get_external(0)
            raise UnsafeFileError(
                f"{where} keeps its numbers in another file ({text(name)!r}). kmerge reads only what "
                "the file itself holds: "
                "re-save the weights with Keras."
            )
        space = dataset.get_space()
        if space.get_simple_extent_type() == h5s.NULL:
            raise FormatError(f"{where} is an empty dataset without a shape. Re-save the weights with Keras.")
        shape = tuple(int(length) for length in space.shape)
        dtype, direct, swapped = logical(dataset.get_type(), where)
        attributes = self._attributes(dataset, where)
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
                self.weights.file,
                self.weights.start + (offset or 0),
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
            if stored < nbytes or offset + nbytes > self.weights.size:
                raise UnsafeFileError(
                    f"{where} claims the shape {shape}, {limits.human(nbytes)}, but the file stores "
                    f"{limits.human(max(0, min(stored, self.weights.size - offset)))} of them: it is "
                    "truncated or forged. Get it again."
                )
            self.direct_bytes += nbytes
            if self.direct_bytes > self.weights.size:
                raise UnsafeFileError(
                    f"{where}: the tensors up to here claim more bytes than the whole file has: they overlap."
                )
            return
        if layout == h5d.CHUNKED:
            _check_chunks(plist, dataset.get_type().get_size(), where)
        self.claimed_bytes += nbytes
        if stored > self.weights.size or limits.expands_too_far(nbytes, stored):
            raise UnsafeFileError(
                f"{where} claims the shape {shape}, {limits.human(nbytes)}, from {limits.human(stored)} stored. "
                "That is no honest compression: check where this file comes from."
            )
        if limits.expands_too_far(self.claimed_bytes, self.weights.size):
            raise UnsafeFileError(
                f"{where}: the tensors up to here claim {limits.human(self.claimed_bytes)}, far more "
                "than the file can hold."
            )


def _check_chunks(plist: h5p.PropDCID, itemsize: int, where: str) -> None:
    """Refuse chunks that are too large to hold, and filters that would have to be loaded from somewhere."""
    codes = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    for code in codes:
        if code not in _FILTERS:
            raise UnsafeFileError(
                f"{where} is compressed with HDF5 filter {code}; kmerge reads {', '.join(_FILTERS.values())}. "
                "Re-save the weights with Keras."
            )
    chunk = itemsize
    for length in plist.get_chunk():
        chunk *= length
    limit = limits.CHUNK_BYTES if set(codes) <= {1, 2, 3} else limits.ODD_CHUNK_BYTES
    if chunk > limit or codes.count(_GZIP) > 1:
        raise UnsafeFileError(
            f"{where} is stored in chunks of {limits.human(chunk)}, packed {len(codes)} times; at "
            f"most {limits.human(limit)} "
            "and one compression are read. Re-save the weights with Keras, which uses no chunks."
        )


def check_compressed(dataset: h5d.DatasetID, where: str) -> None:
    """Hold every chunk against its size before HDF5 unpacks it, which it does into memory without a limit.

    Args:
        dataset: an open dataset; others than chunked and filtered ones pass.
        where: file and tensor, for messages.

    Raises:
        UnsafeFileError: if a chunk is larger than it may be, packed or unpacked.
    """
    plist = dataset.get_create_plist()
    if plist.get_layout() != h5d.CHUNKED or not plist.get_nfilters():
        return
    codes = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    size = dataset.get_type().get_size()
    for length in plist.get_chunk():
        size *= length
    room = size + size // 8 + limits.KIB  # what does not shrink may grow a little
    chunks: list[tuple[tuple[int, ...], int, int]] = []
    dataset.chunk_iter(lambda info: chunks.append((info.chunk_offset, info.filter_mask, info.size)))
    for corner, mask, stored in chunks:
        bad = stored > room
        if not bad and _GZIP in codes and not mask >> codes.index(_GZIP) & 1:
            packed = dataset.read_direct_chunk(corner)[1]
            if codes[-1] == _CHECKSUM and not mask >> (len(codes) - 1) & 1:
                packed = packed[:-4]
            unpack = zlib.decompressobj()
            try:
                bad = len(unpack.decompress(packed, room + 1)) > room
            except zlib.error as error:
                raise FormatError(f"{where} cannot be unpacked ({error}): the file is damaged, get it again.") from None
        if bad:
            raise UnsafeFileError(
                f"{where}: a chunk unpacks to more than its {limits.human(size)}: the file is forged."
            )


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
