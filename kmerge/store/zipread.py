"""The directory of a zip, read and checked before any member is."""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import limits
from kmerge.store.rawio import Descriptor, Window
from kmerge.store.sniff import ZIP_SIGNATURES, what_else

_BLOCK = 1 << 20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a zip.

    Attributes:
        name: its name, free of anything that could lead out of a folder.
        label: zip and name, for messages.
        data: where its bytes begin in the file.
        packed: how many bytes they are.
        size: how many bytes they unpack to.
        crc: CRC-32 of the unpacked bytes.
        deflated: whether they are compressed.
    """

    name: str
    label: str
    data: int
    packed: int
    size: int
    crc: int
    deflated: bool

    def blocks(self, file: Descriptor) -> Iterator[bytes]:
        """The unpacked bytes block by block, held against size and checksum."""
        done = crc = 0
        try:
            for block in self._unpack(file):
                done += len(block)
                crc = zlib.crc32(block, crc)
                if done > self.size:
                    raise UnsafeFileError(
                        f"{self.label} unpacks to more than the {self.size:,} bytes it claims: the zip is "
                        "forged or damaged."
                    )
                yield block
        except zlib.error as error:
            raise FormatError(
                f"{self.label} cannot be unpacked ({error}): the file is damaged, get it again."
            ) from None
        if done != self.size or crc != self.crc:
            raise FormatError(
                f"{self.label} is damaged: its size or checksum is not what the zip says. Get the file again."
            )

    def _unpack(self, file: Descriptor) -> Iterator[bytes]:
        unpack = zlib.decompressobj(-15)
        for offset in range(0, self.packed, _BLOCK):
            raw = file.read(self.data + offset, min(_BLOCK, self.packed - offset))
            if not self.deflated:
                yield raw
                continue
            while raw and not unpack.eof:
                yield unpack.decompress(raw, _BLOCK)
                raw = unpack.unconsumed_tail
        if self.deflated:
            yield unpack.flush()

    def read(self, file: Descriptor, limit: int) -> bytes:
        """All unpacked bytes, at most `limit`."""
        if self.size > limit:
            raise UnsafeFileError(
                f"{self.label} claims {limits.human(self.size)}; at most {limits.human(limit)} are read."
            )
        return b"".join(self.blocks(file))


def read_directory(file: Descriptor) -> dict[str, Entry]:
    """List the members of a zip after checking all of them.

    Args:
        file: the open file.

    Returns:
        Members by name, in the order of the directory.

    Raises:
        UnsafeFileError: if it holds too many members, one twice, links, names that lead out of a folder, members that
            overlap, or sizes that no honest compression reaches.
        FormatError: if it is no zip, one whose end is missing, or an encrypted one.
    """
    label = file.path.name
    if file.read(0, 4) not in ZIP_SIGNATURES:
        raise FormatError(f"{label} {what_else(file)}")
    start = _check_end(file, label)
    try:
        window = Window(file.fd, 0, file.size)
        with zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
        window.check()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise FormatError(f"{label} is a damaged zip ({error}): get it again.") from None
    if len(infos) > limits.MEMBERS:
        raise _too_many(label)
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for info in infos:
        entry = _check(file, info, label)
        if entry.name in entries:
            raise UnsafeFileError(
                f"{label} holds {entry.name!r} twice, so readers disagree on what it is. Save the model anew."
            )
        entries[entry.name] = entry
        spans.append((info.header_offset, entry.data + entry.packed, entry.name))
    spans.sort()
    for (_, end, name), (following, _, other) in pairwise([*spans, (start, start, "the directory")]):
        if end > following:
            raise UnsafeFileError(f"{label}: member {name!r} overlaps {other!r}: the zip is forged or damaged.")
    return entries


def _too_many(label: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{label} holds more than {limits.MEMBERS:,} members; a model has a handful. Is it the right file?"
    )


def _check_end(file: Descriptor, label: str) -> int:
    """Check the record that ends a zip; the offset at which the central directory begins."""
    tail_start = max(0, file.size - _END.size - 65_535)
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise FormatError(f"{label} is a truncated zip: its end is missing. Download or copy it again.")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if 0xFFFF in (count,) or 0xFFFFFFFF in (size, start):
        locator = file.read(end - _LOCATOR.size, _LOCATOR.size)
        if len(locator) == _LOCATOR.size and locator.startswith(b"PK\6\7"):
            record = file.read(end - _LOCATOR.size - _END64.size, _END64.size)
            if len(record) < _END64.size or not record.startswith(b"PK\6\6"):
                raise FormatError(f"{label} is a damaged zip: its 64-bit end record is missing. Get it again.")
            _, _, _, _, _, _, _, count, size, start = _END64.unpack(record)
            end -= _LOCATOR.size + _END64.size
    if count > limits.MEMBERS or size > limits.DIRECTORY_BYTES:
        raise _too_many(label)
    if size > end:
        raise FormatError(f"{label} is a damaged zip: its directory lies outside of it. Get it again.")
    return int(end - size)


def member_problem(name: str) -> str | None:
    """Say why a member's name could lead out of a folder; None if it cannot."""
    if not name or "\0" in name:
        return "has an empty name or one with a NUL in it"
    if "\\" in name or name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "has a name that is an absolute path or holds a backslash"
    parts = name.rstrip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has a name that leads out of its folder"
    return None


def _check(file: Descriptor, info: zipfile.ZipInfo, label: str) -> Entry:
    where = f"{label}: {info.orig_filename!r}"
    problem = member_problem(info.orig_filename)
    if problem:
        raise UnsafeFileError(f"{where} {problem}. Keras writes no such member: check where this file comes from.")
    if info.flag_bits & 0x2041:
        raise FormatError(f"{where} is encrypted, which Keras never does: unpack the zip and save the model anew.")
    mode = info.external_attr >> 16
    if info.create_system == 3 and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnsafeFileError(f"{where} is a link or a special file. Keras writes no such member: save the model anew.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(
            f"{where} is compressed with zip method {info.compress_type}; zip it anew without compression."
        )
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if not deflated and info.file_size != info.compress_size:
        raise UnsafeFileError(
            f"{where} claims {info.file_size:,} bytes but stores {info.compress_size:,}: the zip is forged or damaged."
        )
    if deflated and limits.expands_too_far(info.file_size, info.compress_size):
        raise UnsafeFileError(
            f"{where} claims to unpack {limits.human(info.compress_size)} to {limits.human(info.file_size)}. "
            "That is no honest compression: check where this file comes from."
        )
    header = file.read(info.header_offset, _LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
        raise FormatError(f"{where} has no header in the zip: the file is truncated or damaged, get it again.")
    _, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL.unpack(header)
    name = file.read(info.header_offset + _LOCAL.size, name_length)
    data = info.header_offset + _LOCAL.size + name_length + extra_length
    if (
        name.decode("utf-8" if flags & 0x800 else "cp437", "replace") != info.orig_filename
        or method != info.compress_type
    ):
        raise UnsafeFileError(
            f"{where} is named or packed differently in its own header and in the directory: the zip "
            "is forged or damaged."
        )
    streamed = flags & 8 and packed == 0  # sizes follow the data
    if not streamed and 0xFFFFFFFF not in (packed, size) and (packed, size) != (info.compress_size, info.file_size):
        raise UnsafeFileError(
            f"{where} has different sizes in its own header and in the directory: the zip is forged or damaged."
        )
    if data + info.compress_size > file.size:
        raise FormatError(f"{where} ends beyond the end of the zip: the file is truncated, get it again.")
    return Entry(info.orig_filename, where, data, info.compress_size, info.file_size, info.CRC, deflated)
