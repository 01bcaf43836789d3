"""Arrays held against what a network takes: shapes, types, finite values; every refusal says what to do instead."""

from __future__ import annotations

import os
from itertools import permutations
from typing import Any

import numpy as np

from kmerge.data.entries import Entry
from kmerge.errors import DataError
from kmerge.methods.registry import Array
from kmerge.shapes import Shape


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def as_array(value: Any, where: str) -> Array:
    """An array from a tensor of any library, or from nested lists."""
    for name in ("detach", "cpu"):  # PyTorch
        if hasattr(value, "__array__") and callable(getattr(value, name, None)):
            value = getattr(value, name)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    try:
        return np.asarray(value)
    except Exception as error:
        raise DataError(
            f"The data{where} cannot be read as an array ({type(error).__name__}: {error}): give arrays, with all rows "
            "of one shape."
        ) from error


def fitted(shape: tuple[int, ...], entry: Entry, where: str, batch: bool) -> tuple[int, ...]:
    """The shape as the network takes it: a missing last axis of size 1 is added.

    Raises:
        DataError: if it does not fit.
    """
    wanted = entry.shape
    if shape and (wanted is None or _fits(shape, wanted)):
        if 0 in shape[1:]:
            raise DataError(f"The data for input '{entry.name}'{where} have shape {shape}: they hold no values.")
        return shape
    if shape and wanted and wanted[-1] == 1 and len(wanted) > 1 and _fits((*shape, 1), wanted):
        return (*shape, 1)
    sizes = ", ".join(["rows", *("any" if size is None else str(size) for size in (wanted or ())[1:])])
    sizes += "," if "," not in sizes else ""
    what = "batch" if batch else "data"
    raise DataError(
        f"The {what} for input '{entry.name}'{where} {'has' if batch else 'have'} shape {shape}, expected ({sizes}). "
        f"{_remedy(shape, wanted or (), batch)}"
    )


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape[1:], wanted[1:], strict=True))


def _remedy(shape: tuple[int, ...], wanted: Shape, batch: bool) -> str:
    if _fits((1, *shape), wanted):
        return "These are single rows: batch them first." if batch else "This is one row: give many, rows first."
    if len(shape) > 1 and shape[-1] == 1 and _fits(shape[:-1], wanted):
        return "Leave out the last axis: x[..., 0]."
    if len(shape) == len(wanted) > 2:
        last = len(shape) - 1
        if _fits((shape[0], *shape[2:], shape[1]), wanted):
            return "Bring the channels to the end: np.moveaxis(x, 1, -1)."
        if _fits((shape[0], shape[last], *shape[1:last]), wanted):
            return "Bring the channels to the front: np.moveaxis(x, -1, 1)."
        for order in permutations(range(1, len(shape))):
            if _fits((shape[0], *(shape[axis] for axis in order)), wanted):
                return f"Bring the axes into order: np.transpose(x, {(0, *order)})."
    known = [size for size in wanted[1:] if size is not None]
    if shape and len(known) == len(wanted) - 1 and np.prod(known) == np.prod(shape[1:]):
        return f"Reshape them: x.reshape({', '.join(map(str, (-1, *known)))})."
    return "Prepare them as for the training of the models."


def converted(array: Array, entry: Entry, where: str) -> Array:
    """The rows in the input layer's dtype, values unchanged."""
    what = f"The data for input '{entry.name}'{where}"
    if entry.is_text:
        return _texts(array, what)
    array = _without_small_floats(array)
    if array.dtype.kind not in "biufc":
        raise DataError(f"{what} are {_held(array)}: expected numbers, with all rows of one shape.")
    dtype = entry.numpy_dtype
    if array.dtype.kind == "c" and dtype.kind != "c":
        raise DataError(f"{what} are complex numbers: expected {dtype}.")
    if dtype.kind in "biu" and array.dtype.kind != "b" and array.dtype != dtype and array.size:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        whole = array.dtype.kind in "iu" or bool(np.all(array == np.floor(array)))
        if not whole or array.min() < low or array.max() > high:
            raise DataError(
                f"{what} are {array.dtype} and not all whole numbers from {low} to {high}: expected {dtype}."
            )
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _without_small_floats(array: Array) -> Array:
    """bfloat16 and smaller, of the package ml_dtypes, as float32."""
    return array.astype(np.float32) if array.dtype.kind == "V" and array.dtype.names is None else array


def _held(array: Array) -> str:
    names = {"O": "Python objects", "U": "strings", "S": "strings", "T": "strings"}
    return names.get(array.dtype.kind, str(array.dtype))


def _texts(array: Array, what: str) -> Array:
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    if array.dtype.kind not in "OUST" or not all(isinstance(item, str) for item in flat):
        raise DataError(f"{what} are {array.dtype}: expected strings.")
    result = np.empty(len(flat), object)
    result[:] = flat
    return result.reshape(array.shape)


def converted_targets(array: Array, label: str, where: str) -> Array:
    """Labels of one head: numbers of any kind, as they are; None becomes NaN. Missing ones pass through.

    Raises:
        DataError: if they are no numbers.
    """
    array = _without_small_floats(array)
    if array.dtype.kind == "O":
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError):
            pass
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"The labels of '{label}'{where} are {_held(array)}: expected numbers, for classes their numbers from 0 on."
        )
    return array


def converted_weights(array: Array, label: str, where: str) -> Array:
    """Sample weights of one head, float32.

    Raises:
        DataError: if they are not one finite number from 0 on for each row.
    """
    found = array.reshape(len(array)) if array.ndim == 2 and array.shape[1] == 1 else array
    if found.dtype.kind not in "biuf" or found.ndim != 1 or not (np.isfinite(found).all() and (found >= 0).all()):
        raise DataError(
            f"The sample weights of '{label}'{where} have shape {array.shape} and type {array.dtype}: expected one "
            "finite number from 0 on for each row."
        )
    return found.astype(np.float32)


def check_rows(rows: int, other: int, what: str, first: Entry, where: str) -> None:
    """Raises:
    DataError: if what goes with an input has another number of rows.
    """
    if rows != other:
        raise DataError(
            f"The data{where} hold {rows:,} rows for input '{first.name}' but {other:,} for {what}: expected equally "
            "many."
        )


def check_finite(array: Array, entry: Entry, where: str) -> None:
    """Raises:
    DataError: if an input holds NaN or infinity.
    """
    if array.dtype.kind in "fc":
        bad = int(np.count_nonzero(~np.isfinite(array).reshape(len(array), -1).all(1)))
        if bad:
            raise DataError(
                f"The data for input '{entry.name}'{where} hold NaN or infinity in {bad:,} of {len(array):,} rows: "
                "leave these rows out, or fill them as for the training of the models."
            )
