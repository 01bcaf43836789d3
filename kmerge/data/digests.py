"""Rows told by what they hold: the same row has the same digest in every pass, wherever it stands in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from blake3 import blake3

from kmerge.errors import DataError
from kmerge.methods.registry import Array

SKETCHED = 1024
"""Digests of a pass that are remembered."""
ALIKE = 0.75
"""Share of them that another pass has to have; loaders that leave out the last rows lack some."""


def row_digests(inputs: Sequence[Array], address: str = "") -> Array:
    """A digest of each row, shape (rows,), uint64, from all of its inputs.

    Args:
        inputs: shapes (rows, ...); objects are strings.
        address: what the digests are for: for another one they are others.
    """
    key = hashlib.sha256(address.encode()).digest()
    digests = np.empty(len(inputs[0]), np.uint64)
    arrays = [array if array.dtype.kind == "O" else np.ascontiguousarray(array) for array in inputs]
    for row in range(len(digests)):
        digest = blake3(key=key)
        for array in arrays:
            digest.update(_texts(array[row]) if array.dtype.kind == "O" else array[row].tobytes())
        digests[row] = int.from_bytes(digest.digest(length=8), "little")
    return digests


def row_draws(inputs: Sequence[Array], address: str) -> Array:
    """A number from 0 to below 1 for each row, which depends on what the row holds and on `address`."""
    return np.asarray((row_digests(inputs, address) >> np.uint64(11)) * 2.0**-53)


def _texts(row: Any) -> bytes:
    texts = [str(text).encode() for text in np.asarray(row, object).ravel()]
    return b"".join(len(text).to_bytes(8, "little") + text for text in texts)


class Sketch:
    """The least digests of a pass, by which two passes can be compared, whatever their orders."""

    def __init__(self) -> None:
        self._least = np.zeros(0, np.uint64)

    def add(self, digests: Array) -> None:
        self._least = np.unique(np.concatenate([self._least, digests]))[:SKETCHED]

    def is_like(self, other: Sketch) -> bool:
        """Whether two passes had mostly the same rows."""
        one, two = self._least, other._least
        if not len(one) or not len(two):
            return True
        # Beyond the last digest of a full sketch nothing is known.
        known = min(sketch[-1] if len(sketch) == SKETCHED else np.uint64(2**64 - 1) for sketch in (one, two))
        one, two = one[one <= known], two[two <= known]
        return len(np.intersect1d(one, two)) >= ALIKE * min(len(one), len(two))


class Repeated:
    """Holds the passes over rows that are told apart by what they hold against each other."""

    def __init__(self) -> None:
        self._first: Sketch | None = None

    def check(self, sketch: Sketch, where: str) -> None:
        """Raises:
        DataError: if a pass has other rows than the first.
        """
        if self._first is None:
            self._first = sketch
        elif not self._first.is_like(sketch):
            raise DataError(
                f"The data{where} give other rows in each pass, so that none can be held back: expected the same ones, "
                "in any order. Let layers of the model change them at random, or hold nothing back "
                "(--validation-split 0)."
            )
