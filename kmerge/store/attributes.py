"""Attributes of HDF5 groups and tensors: decoded under limits, encoded as Keras and h5py would."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import h5py
import numpy as np
from h5py import h5a, h5s, h5t

from kmerge.errors import FormatError, MergeError, UnsafeFileError
from kmerge.store import limits

AttributeValue: TypeAlias = str | int | float | bool | list[str] | list[int] | list[float]

HEADER_LIMIT = 64_512  # Keras splits lists of names above this many bytes


Owner: TypeAlias = h5py.h5g.GroupID | h5py.h5d.DatasetID
StringBytes: TypeAlias = Callable[[Owner, bytes, int], int]


def read_attributes(loc: Owner, where: str, strings: StringBytes) -> dict[str, AttributeValue]:
    """Decode all attributes of an object; bytes become str, arrays lists.

    Args:
        loc: the object.
        where: file and object, for messages.
        strings: gives a bound of the bytes of a list of strings, for object, name and number of them.

    Returns:
        Values by name, in order of names.

    Raises:
        UnsafeFileError: if there are references among them, or far more data than a model needs.
    """
    if not (count := h5a.get_num_attrs(loc)):
        return {}
    if count > limits.ATTRIBUTES:
        raise UnsafeFileError(f"{where} has {count:,} attributes; a model needs a handful. Re-save it with Keras.")
    names: list[bytes] = []
    h5a.iterate(loc, names.append)
    found: dict[str, AttributeValue] = {}
    total = 0
    for name in names:
        value = _read(loc, name, f"{where}: attribute {text(name)!r}", strings)
        total += text_size(value)
        if total > limits.STRINGS_BYTES:
            raise too_much_text(where)
        found[text(name)] = value
    return found


def text_size(value: AttributeValue) -> int:
    """How many characters a value holds."""
    if isinstance(value, list):
        return sum(len(item) for item in value if isinstance(item, str))
    return len(value) if isinstance(value, str) else 0


def too_much_text(where: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{where} holds more text than {limits.human(limits.STRINGS_BYTES)}; models need some MB. "
        "Check where this file comes from."
    )


def _read(loc: Owner, name: bytes, where: str, strings: StringBytes) -> AttributeValue:
    aid = h5a.open(loc, name)
    tid, space = aid.get_type(), aid.get_space()
    kind = tid.get_class()
    if kind == h5t.REFERENCE:
        raise UnsafeFileError(f"{where} is a reference to another object, which no model needs. Re-save it with Keras.")
    if kind not in (h5t.STRING, h5t.INTEGER, h5t.FLOAT, h5t.ENUM):
        raise UnsafeFileError(f"{where} is neither text nor a number, which no model needs. Re-save it with Keras.")
    if space.get_simple_extent_type() == h5s.NULL:
        return []
    points = space.get_simple_extent_npoints()
    declared = points * tid.get_size()
    if not 0 <= declared <= limits.ATTRIBUTE_BYTES:
        raise UnsafeFileError(
            f"{where} claims {limits.human(declared)}; at most {limits.human(limits.ATTRIBUTE_BYTES)} are read. "
            "Check where this file comes from."
        )
    variable = kind == h5t.STRING and tid.is_variable_str()
    if variable and points > 1:  # they may all point at one large string
        claimed = strings(loc, name, points)
        if claimed > limits.STRINGS_BYTES:
            raise UnsafeFileError(
                f"{where} is a list of {points:,} strings that claims {limits.human(claimed)}. "
                "Re-save the file with Keras, or check where it comes from."
            )
    if kind != h5t.STRING and tid.dtype.itemsize > 8:
        raise FormatError(f"{where} holds numbers wider than 64 bits. Re-save the file with Keras.")
    value = np.zeros(aid.shape, aid.dtype)
    if points:
        aid.read(value)
    listed = value.tolist()
    if kind == h5t.STRING:
        return [text(item) for item in _flat(listed)] if isinstance(listed, list) else text(listed)
    return _flat(listed) if isinstance(listed, list) else listed


def _flat(value: list[Any]) -> list[Any]:
    while value and isinstance(value[0], list):
        value = [item for row in value for item in row]
    return value


def text(value: bytes | str | int) -> str:
    """Decode a name or a string; bytes that are not UTF-8 survive a round trip."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else ""  # HDF5 gives 0 for a string without data


def join_names(attributes: dict[str, AttributeValue], name: str, where: str) -> list[str]:
    """Join a list of names that Keras may have split into `name0`, `name1`, …; [] if there is none.

    Args:
        attributes: of a group.
        name: of the list.
        where: file and group, for messages.

    Returns:
        The names.

    Raises:
        FormatError: if there is something other than names.
    """
    pieces = [attributes[name]] if name in attributes else []
    while name not in attributes and f"{name}{len(pieces)}" in attributes:
        pieces.append(attributes[f"{name}{len(pieces)}"])
    names: list[str] = []
    for piece in pieces:
        for item in piece if isinstance(piece, list) else [piece]:
            if not isinstance(item, str):
                raise FormatError(
                    f"{where}: attribute {name!r} holds {item!r} where a name belongs. Get the file again."
                )
            names.append(item)
    return names


def write_attributes(loc: h5py.h5g.GroupID | h5py.h5d.DatasetID, attributes: Mapping[str, Any]) -> None:
    """Store attributes: text as h5py does, lists of names as Keras does, that is split above 64,512 bytes.

    Args:
        loc: group or tensor.
        attributes: str, bytes, numbers, lists of str or of numbers.

    Raises:
        MergeError: if a value cannot be stored.
    """
    for name, value in attributes.items():
        if isinstance(value, (list, tuple)) and all(isinstance(item, (str, bytes)) for item in value):
            _write_names(loc, name, [item if isinstance(item, bytes) else _utf8(item) for item in value])
        elif isinstance(value, (str, bytes)):
            _write_text(loc, name, value)
        else:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise MergeError(
                    f"attribute {name!r} is a {type(value).__name__}; text, numbers and lists of them were expected."
                )
            _write_array(loc, name, array)


def _write_text(loc: h5py.h5g.GroupID, name: str, value: str | bytes) -> None:
    dtype = h5py.string_dtype("utf-8" if isinstance(value, str) else "ascii")
    holder = np.empty((), dtype)
    holder[()] = _utf8(value) if isinstance(value, str) else value
    attribute = h5a.create(loc, _utf8(name), h5t.py_create(dtype, logical=True), h5s.create(h5s.SCALAR))
    attribute.write(holder, h5t.py_create(dtype))


def _write_names(loc: h5py.h5g.GroupID, name: str, values: list[bytes]) -> None:
    longest = max((len(value) for value in values), default=0)
    if longest > HEADER_LIMIT:
        raise MergeError(
            f"a name of {longest:,} bytes does not fit into attribute {name!r}: at most {HEADER_LIMIT:,} do."
        )
    if not values:
        _write_array(loc, name, np.zeros(0))
        return
    array = np.array(values)
    if array.dtype.itemsize == 0:
        array = array.astype("S1")
    pieces = [array]
    while any(piece.nbytes > HEADER_LIMIT for piece in pieces):
        pieces = np.array_split(array, len(pieces) + 1)
    for index, piece in enumerate(pieces):
        _write_array(loc, name if len(pieces) == 1 else f"{name}{index}", np.ascontiguousarray(piece))


def _write_array(loc: h5py.h5g.GroupID, name: str, array: np.ndarray) -> None:
    space = h5s.create_simple(array.shape) if array.ndim else h5s.create(h5s.SCALAR)
    tid = h5t.py_create(array.dtype, logical=True)
    attribute = h5a.create(loc, _utf8(name), tid, space)
    if array.size:
        attribute.write(array)


def _utf8(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")
