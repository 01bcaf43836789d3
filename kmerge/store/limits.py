"""What a file may ask of its reader, and JSON read under such limits.

Every limit stands far above what Keras writes and far below what hurts.
"""

import json
import re
from typing import Any

from kmerge.errors import FormatError, UnsafeFileError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

JSON_BYTES = 64 * MIB
JSON_DEPTH = 200
JSON_CONTAINERS = 2_000_000
JSON_VALUES = 16_000_000

GROUP_DEPTH = 64  # groups within groups
OBJECTS = 250_000  # groups and tensors of one tree
RANK = 32
ATTRIBUTES = 10_000  # of one group or tensor
ATTRIBUTE_BYTES = 64 * MIB
STRINGS_BYTES = 128 * MIB  # text in the attributes of one tree
CHUNK_BYTES = 64 * MIB
ODD_CHUNK_BYTES = 8 * MIB  # where the compression is not gzip, so that its true size is only known afterwards
EXPANSION = 1_100  # of compressed data; deflate itself reaches 1,032
EXPANSION_FLOOR = 16 * MIB  # below this many bytes no ratio is asked

MEMBERS = 10_000  # of a zip, or files of a folder
DIRECTORY_BYTES = 4 * MIB  # the central directory of a zip
ASSET_BYTES = 1 * GIB
SHARDS = 512

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[{]|[\]}]', re.DOTALL)


def human(num_bytes: int) -> str:
    """Say a number of bytes the way people do: 1,234 -> '1.2 kB'."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            return f"{num_bytes:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError


def expands_too_far(declared: int, stored: int) -> bool:
    """Tell whether `stored` bytes claim to hold implausibly many bytes once decompressed."""
    return declared > EXPANSION_FLOOR and declared > EXPANSION * stored


def read_json(data: bytes, what: str) -> Any:
    """Parse JSON under limits of size, depth and number of values.

    Args:
        data: the bytes, in UTF-8.
        what: how messages call it, for example "model.keras: 'config.json'".

    Returns:
        The parsed value.

    Raises:
        UnsafeFileError: if it is larger or nested deeper than any model's, or holds one key twice in an object.
        FormatError: if it is not JSON in UTF-8.
    """
    if len(data) > JSON_BYTES:
        raise UnsafeFileError(
            f"{what} has {human(len(data))} of JSON; at most {human(JSON_BYTES)} are read. No model needs more: "
            "check where this file comes from."
        )
    containers = data.count(b"[") + data.count(b"{")
    if containers > JSON_DEPTH:
        if containers > JSON_CONTAINERS or data.count(b",") > JSON_VALUES:
            raise UnsafeFileError(
                f"{what} holds more values than any model needs ({containers:,} lists and objects). "
                "Check where this file comes from."
            )
        _check_depth(data, what)
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{what}: {error}") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what} is not UTF-8 text (byte {error.start}): the file is damaged, get it again."
        ) from None
    except RecursionError:
        raise UnsafeFileError(f"{what} is nested too deeply to be a model.") from None
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON ({error}): the file is damaged, get it again.") from None


def _check_depth(data: bytes, what: str) -> None:
    depth = 0
    for token in _TOKEN.finditer(data):
        first = data[token.start()]
        if first in b"[{":
            depth += 1
            if depth > JSON_DEPTH:
                raise UnsafeFileError(
                    f"{what} nests JSON more than {JSON_DEPTH} levels deep; models need about 20. "
                    "Check where this file comes from."
                )
        elif first in b"]}":
            depth -= 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnsafeFileError(f"an object has the key {twice[:60]!r} twice, so readers disagree on what it says.")
    return result
