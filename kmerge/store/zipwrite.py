"""The few records of a zip archive whose members are stored, and CRC-32 sums combined without the data."""

import struct
from dataclasses import dataclass
from functools import lru_cache

from kmerge.errors import MergeError

_POLYNOMIAL = 0xEDB88320
ZIP64_FROM = 0xFFFFFFFF  # sizes and offsets from here on need the 64-bit records
ZIP64_COUNT = 0xFFFF
_DATE, _TIME = (1980 - 1980) << 9 | 1 << 5 | 1, 0  # 1980-01-01, so that equal merges are equal files
_UTF8, _MADE_BY_UNIX = 0x800, 3 << 8


@dataclass(slots=True)
class Member:
    """One stored member: its name, where its header stands, and what it holds."""

    name: str
    header: int
    size: int = 0
    crc: int = 0
    wide: bool = False  # whether the local header has room for 64-bit sizes

    @property
    def data(self) -> int:
        """Offset of the first byte of the member's data."""
        return self.header + len(self.local())

    def local(self) -> bytes:
        """The local header."""
        name = self.name.encode("utf-8")
        if not self.wide and self.size >= ZIP64_FROM:
            raise MergeError(f"zip member {self.name!r} grew beyond 4 GiB unexpectedly.")
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.wide else b""
        size = 0xFFFFFFFF if self.wide else self.size
        version = 45 if self.wide else 20
        return (
            struct.pack(
                "<4s5H3L2H",
                b"PK\3\4",
                version,
                _flags(name),
                0,
                _TIME,
                _DATE,
                self.crc,
                size,
                size,
                len(name),
                len(extra),
            )
            + name
            + extra
        )

    def central(self) -> bytes:
        """The entry in the central directory."""
        name = self.name.encode("utf-8")
        wide = [value for value in (self.size, self.size) if value >= ZIP64_FROM or self.wide]
        wide += [self.header] if self.header >= ZIP64_FROM else []
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = 0xFFFFFFFF if self.wide or self.size >= ZIP64_FROM else self.size
        version = 45 if wide else 20
        return (
            struct.pack(
                "<4s6H3L5H2L",
                *(b"PK\1\2", version | _MADE_BY_UNIX, version, _flags(name), 0, _TIME, _DATE, self.crc, size, size),
                *(len(name), len(extra), 0, 0, 0, 0o100644 << 16, min(self.header, 0xFFFFFFFF)),
            )
            + name
            + extra
        )


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8


def directory(members: list[Member], start: int) -> bytes:
    """The central directory and the records that end the archive.

    Args:
        members: all members, in order.
        start: offset at which these bytes will stand.

    Returns:
        The last bytes of the archive.
    """
    entries = b"".join(member.central() for member in members)
    end, count, size = b"", len(members), len(entries)
    if start >= ZIP64_FROM or size >= ZIP64_FROM or count >= ZIP64_COUNT:
        end += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45 | _MADE_BY_UNIX, 45, 0, 0, count, count, size, start)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    short = min(count, 0xFFFF), min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
    return entries + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *short, 0)


def crc32_combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two pieces in a row, from the sums of each.

    A CRC is a remainder of polynomials over GF(2): appending n bytes multiplies the first remainder by x^(8n), and
    the sums add.

    Args:
        first: CRC-32 of the first piece.
        second: CRC-32 of the second piece.
        length: bytes of the second piece.

    Returns:
        CRC-32 of both.

    >>> import zlib
    >>> crc32_combine(zlib.crc32(b"ab"), zlib.crc32(b"cde"), 3) == zlib.crc32(b"abcde")
    True
    """
    return _multiply(_power(8 * length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo CRC-32's; the highest bit is x^0."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _power(exponent: int) -> int:
    """x to the power of `exponent` modulo CRC-32's polynomial."""
    result, square = 0x80000000, 0x40000000  # 1 and x
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result
