"""Labels as given, held against what a head learns from: every refusal says what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.errors import DataError
from kmerge.methods.registry import Array
from kmerge.tune.losses import is_keras_own, is_sparse, loss_name


@dataclass(frozen=True)
class Column:
    """What a head learns from.

    Attributes:
        name: of the head.
        dtype: "int32" for numbers of classes, else "float32".
        shape: per row; None for a free size.
        classes: how many there are, where labels are their numbers; 0 for no bound.
        ignored: a class that its loss leaves out, and so a missing label.
        shares: whether each label is between 0 and 1.
        over_classes: whether a row of labels says how much it is of each class.
        strict: whether labels have that shape; a loss of the user's own may take others.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    classes: int = 0
    ignored: int | None = None
    shares: bool = False
    over_classes: bool = False
    strict: bool = True

    def missing(self, rows: int, shape: tuple[int, ...] | None = None) -> Array:
        """Labels that are not there, of the shape of those that are."""
        shape = tuple(size or 1 for size in self.shape) if shape is None else shape
        whole = self.dtype.startswith("int")
        return np.full((rows, *shape), -1 if whole else np.nan, self.dtype)

    def read(self, values: Any) -> Array:
        """Labels as given, in the dtype and shape of this column; −1 where class numbers are missing.

        Raises:
            DataError: if the head cannot learn from them.
        """
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"The labels of '{self.name}' are {array.dtype}: expected numbers; give classes as whole numbers."
            )
        if array.dtype.kind == "f" and np.isinf(array).any():
            raise DataError(f"The labels of '{self.name}' hold infinity: leave such labels out, as NaN.")
        return self._numbers(array) if self.dtype.startswith("int") else self._values(array)

    def _numbers(self, array: Array) -> Array:
        """Numbers of classes."""
        if array.ndim == len(self.shape) + 2 and array.shape[-1] == 1:
            array = array[..., 0]
        if not self._fits(array, self.shape):
            many = array.ndim == len(self.shape) + 2 and array.shape[-1] == self.classes
            raise self._misshapen(
                array,
                self.shape,
                f"Give the number of the class, or another loss: --loss {self.name}=categorical_crossentropy."
                if many
                else "Give one number of a class for each.",
            )
        if array.dtype.kind == "f":
            array = np.where(np.isnan(array), -1, array)
            if not np.all(array == np.floor(array)):
                raise DataError(f"The labels of '{self.name}' are not whole: expected numbers of classes.")
        array = array.astype(np.int8) if array.dtype.kind == "b" else array
        if self.ignored is not None:
            array = np.where(array == self.ignored, np.array(-1, np.int64), array)
        if array.size and (array.min() < -1 or (self.classes and array.max() >= self.classes)):
            wrong = array.min() if array.min() < -1 else array.max()
            raise DataError(
                f"The labels of '{self.name}' hold class {int(wrong)}, and the head tells {self.classes} classes "
                f"apart: expected numbers from 0 to {self.classes - 1}, or -1 where a label is missing."
            )
        return array.astype(self.dtype)

    def _values(self, array: Array) -> Array:
        if array.ndim == len(self.shape) and self.shape and self.shape[-1] in (1, None):
            array = array[..., None]
        if self.strict and not self._fits(array, self.shape):
            numbers = self.over_classes and (array.ndim == len(self.shape) or array.shape[-1] == 1)
            raise self._misshapen(
                array,
                self.shape,
                f"Give a row for each with a 1 at its class (keras.utils.to_categorical), or another loss: "
                f"--loss {self.name}=sparse_categorical_crossentropy."
                if numbers
                else "Give as many values for each row as the head gives.",
            )
        array = array.astype(self.dtype)
        if self.shares or self.over_classes:
            known = array[~np.isnan(array)]
            wrong = known[((known < 0) & (known != -1)) | ((known > 1) & self.shares)]
            if len(wrong):
                expected = "from 0 to 1" if self.shares else "of at least 0"
                raise DataError(
                    f"The labels of '{self.name}' hold {wrong[0]:g}: expected numbers {expected}, or -1 or NaN where a "
                    f"label is missing. For values of any size give another loss, such as --loss {self.name}=mse."
                )
        return array

    def _fits(self, array: Array, shape: Sequence[int | None]) -> bool:
        return array.ndim == len(shape) + 1 and all(
            wanted is None or size == wanted for size, wanted in zip(array.shape[1:], shape, strict=True)
        )

    def _misshapen(self, array: Array, shape: Sequence[int | None], remedy: str) -> DataError:
        sizes = ", ".join(["rows", *("any" if size is None else str(size) for size in shape)])
        return DataError(
            f"The labels of '{self.name}' have shape {array.shape}, expected ({sizes}{',' if not shape else ''}). "
            f"{remedy}"
        )


def column_of(name: str, shape: Sequence[int | None], loss: Any) -> Column:
    """What a head learns from by a loss.

    Args:
        name: of the head.
        shape: of its output, rows first.
        loss: of Keras or of the user.
    """
    if is_sparse(loss):
        return Column(name, "int32", tuple(shape[1:-1]), shape[-1] or 0, getattr(loss, "ignore_class", None))
    kind = loss_name(loss)
    return Column(
        name,
        "float32",
        tuple(shape[1:]),
        shares=kind.startswith("Binary"),
        over_classes=kind.startswith("Categorical") and kind.endswith("rossentropy"),
        strict=is_keras_own(loss),
    )
