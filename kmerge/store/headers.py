"""How long the strings of an attribute are, read from the bytes of the object's header.

HDF5 reads an attribute in one piece. Where that is a list of strings of variable length, as Keras writes lists of
names, every entry may point at the same large string, and a small file becomes gigabytes of memory. The library does
not tell lengths beforehand; the header does. It is parsed only for lists that could be large, and only as far as
needed: whatever is not understood gives None, as do the many attributes that HDF5's newer layout moves elsewhere.
"""

import struct
from collections.abc import Callable, Iterator

from kmerge.store import limits

Read = Callable[[int, int], bytes]

_ATTRIBUTE, _CONTINUATION = 0x0C, 0x10
_BLOCKS = 1_000  # of one header


def string_bytes(read: Read, address: int, base: int, name: bytes) -> int | None:
    """Sum up the lengths of the variable-length strings of an attribute.

    Args:
        read: gives `count` bytes at an offset, fewer at the end of the file.
        address: of the object's header, relative to `base`.
        base: where HDF5's own addresses begin in the file.
        name: of the attribute.

    Returns:
        Bytes of all strings; None if the attribute is not where it usually is.
    """
    try:
        found = [_values(data, name) for kind, data in _messages(read, address, base) if kind == _ATTRIBUTE]
    except (struct.error, IndexError):
        return None
    sums = [
        sum(struct.unpack_from("<L", values, at)[0] for at in range(0, len(values) - 15, 16))
        for values in found
        if values is not None
    ]
    return max(sums, default=None)


def _messages(read: Read, address: int, base: int) -> Iterator[tuple[int, bytes]]:
    """The messages of an object header of either version, with all its continuations."""
    head = read(base + address, 32)
    new = head.startswith(b"OHDR")
    if new:
        flags = head[5]
        at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = int.from_bytes(read(base + address + at, width), "little")
        blocks = [(address + at + width, size)]
        prefix = struct.Struct("<BHB" + ("H" if flags & 4 else ""))
    else:
        blocks = [(address + 16, struct.unpack_from("<L", head, 8)[0])]
        prefix = struct.Struct("<HHB3x")
    for number in range(_BLOCKS):
        if number == len(blocks):
            return
        start, size = blocks[number]
        block = read(base + start, min(size, limits.MIB))
        if new and number:
            block = block[4:-4]  # a signature and a checksum
        at = 0
        while at + prefix.size <= len(block):
            kind, length = prefix.unpack_from(block, at)[:2]
            at += prefix.size
            data = block[at : at + length]
            at += length
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", data))
            else:
                yield kind, data


def _values(data: bytes, name: bytes) -> bytes | None:
    """The raw values in an attribute's message, if it is the attribute asked for."""
    version, _, name_size, type_size, space_size = struct.unpack_from("<BB3H", data)
    if version not in (1, 2, 3):
        return None
    sizes = [name_size, type_size, space_size]
    if version == 1:
        sizes = [-(-size // 8) * 8 for size in sizes]
    at = 9 if version == 3 else 8
    if data[at : at + name_size].rstrip(b"\0") != name:
        return None
    return data[at + sum(sizes) :]
