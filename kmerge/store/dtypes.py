"""Logical names of number types, and what HDF5 and NumPy call them."""

import sys
from functools import lru_cache
from typing import Any

import h5py
import numpy as np
from h5py import h5t

from kmerge.errors import FormatError, UnsafeFileError

PLAIN = (
    "bool",
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
EXTENDED = {  # of ml_dtypes: HDF5 knows them as opaque bytes
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e4m3b11fnuz": 1,
    "float8_e4m3": 1,
    "float8_e3m4": 1,
}
_FLOATS = {  # size, fields (sign, exponent position and size, mantissa position and size), bias
    (2, (15, 10, 5, 0, 10), 15): "float16",
    (4, (31, 23, 8, 0, 23), 127): "float32",
    (8, (63, 52, 11, 0, 52), 1023): "float64",
    (2, (15, 7, 8, 0, 7), 127): "bfloat16",
    (1, (7, 3, 4, 0, 3), 7): "float8_e4m3fn",
    (1, (7, 2, 5, 0, 2), 15): "float8_e5m2",
}
_NATIVE = h5t.ORDER_LE if sys.byteorder == "little" else h5t.ORDER_BE


@lru_cache(maxsize=64)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a logical type.

    Args:
        name: for example "float32", "bfloat16" or "void2".

    Returns:
        The type; of the package ml_dtypes where NumPy has none.

    Raises:
        FormatError: if there is no such type.
    """
    if name in PLAIN:
        return np.dtype(name)
    if name in EXTENDED:
        import ml_dtypes  # few files need it

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return extended
    if name.startswith("void") and name[4:].isdigit() and int(name[4:]):
        return np.dtype(f"V{int(name[4:])}")
    raise FormatError(f"{name!r} is no type of numbers that kmerge knows; these are {', '.join((*PLAIN, *EXTENDED))}.")


def is_number(name: str) -> bool:
    """Whether a logical type is one of numbers, which can be combined; opaque bytes ("void2") are none.

    >>> is_number("bfloat16"), is_number("bool"), is_number("void2")
    (True, True, False)
    """
    return name in PLAIN or name in EXTENDED


def logical(tid: h5t.TypeID, where: str) -> tuple[str, bool, bool]:
    """Name the type of a stored tensor.

    Args:
        tid: HDF5's type.
        where: file and tensor, for messages.

    Returns:
        The logical type (opaque ones as "void<n>"); whether the bytes lie in the file as NumPy wants them in memory,
        perhaps swapped; and whether they are swapped.

    Raises:
        UnsafeFileError: if it is a type of objects: references, variable-length data, compounds.
        FormatError: if it is no type of numbers.
    """
    kind = tid.get_class()
    size = tid.get_size()
    if kind == h5t.FLOAT:
        swapped = size > 1 and tid.get_order() != _NATIVE
        name = _FLOATS.get((size, tid.get_fields(), tid.get_ebias()))
        if name and tid.get_order() in (h5t.ORDER_LE, h5t.ORDER_BE):
            return name, True, swapped
    elif kind == h5t.INTEGER:
        if size in (1, 2, 4, 8) and tid.get_precision() == 8 * size:
            sign = "" if tid.get_sign() == h5t.SGN_2 else "u"
            return f"{sign}int{8 * size}", True, size > 1 and tid.get_order() != _NATIVE
    elif kind == h5t.OPAQUE:
        return f"void{size}", True, False
    elif kind == h5t.ENUM:
        if size == 1 and tid.dtype == np.dtype(bool):
            return "bool", True, False
    elif kind == h5t.COMPOUND:
        complex_type = _complex(tid)
        if complex_type:
            return complex_type
        raise UnsafeFileError(
            f"{where} has a compound type; weights are plain numbers. Re-save the weights with Keras."
        )
    elif kind in (h5t.REFERENCE, h5t.VLEN) or (kind == h5t.STRING and tid.is_variable_str()):
        raise UnsafeFileError(
            f"{where} holds {'references' if kind == h5t.REFERENCE else 'objects of variable length'}; "
            "weights are plain numbers. Re-save the weights with Keras."
        )
    raise FormatError(f"{where} holds {_describe(kind)}; kmerge expects numbers. Re-save the weights with Keras.")


def _complex(tid: h5t.TypeCompoundID) -> tuple[str, bool, bool] | None:
    """Complex numbers are a compound of two equal floats, `r` and `i`."""
    if tid.get_nmembers() != 2 or tid.get_size() not in (8, 16):
        return None
    half = tid.get_size() // 2
    for index, (name, offset) in enumerate(((b"r", 0), (b"i", half))):
        part = tid.get_member_type(index)
        if (
            tid.get_member_name(index) != name
            or tid.get_member_offset(index) != offset
            or part.get_class() != h5t.FLOAT
            or (half, part.get_fields(), part.get_ebias()) not in _FLOATS
            or part.get_order() != tid.get_member_type(0).get_order()
        ):
            return None
    return f"complex{16 * half}", True, tid.get_member_type(0).get_order() != _NATIVE


def _describe(kind: int) -> str:
    names = {h5t.STRING: "text", h5t.FLOAT: "floats of an unusual width", h5t.INTEGER: "integers of an unusual width"}
    names |= {h5t.ENUM: "named values", h5t.ARRAY: "small arrays", h5t.BITFIELD: "bit fields", h5t.TIME: "times"}
    return names.get(kind, "something unusual")


def stored_type(name: str) -> h5t.TypeID:
    """The HDF5 type for the logical type `name`; extended ones are opaque bytes, as Keras stores them."""
    dtype = np.dtype(f"V{EXTENDED[name]}") if name in EXTENDED else numpy_dtype(name)
    return h5py.h5t.py_create(dtype, logical=True)
