"""More rows to be taught on, made of pairs of few: sources can be asked what they give on anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from kmerge.calibration.enrich import cross
from kmerge.data import Batch, generator
from kmerge.tune.teachers import Passes

ENOUGH = 32_000
"""Of so many rows none are made; fewer are made up to it."""
PAIRS, POOL = 3, 8
"""Rows that are made for each given one: taken in each pass, and in all, so that passes differ."""


@dataclass(frozen=True, eq=False)
class Enriched:
    """Rows as they are given, and after them rows that are made of pairs of them.

    A network that learns by few rows alone soon knows these better than others. What lies between them shows more of
    what the sources compute, and looks like what they know.

    Attributes:
        data: what is given.
        given, made: how many rows of either.
        taken: made rows in each pass of a training.
        first: numbers of the inputs whose channels stand before their positions.
        seed: of the pairs.
    """

    data: Passes
    given: int
    made: int
    taken: int
    first: Collection[int]
    seed: int

    @property
    def rows(self) -> int:
        return self.given + self.made

    @property
    def description(self) -> str:
        return f"{self.data.description}, with {self.made:,} more made of pairs of them"

    def batches(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """All rows in their order, the given ones first; to be read once, and whole."""
        assert seed is None
        assert not start
        yield from self.data.batches(size)
        left, turn = self.made, 0
        while left:
            for batch in self._crossed(size, turn):
                kept = batch.take(slice(0, left))
                left -= kept.rows
                yield kept
                if not left:
                    return
            turn += 1

    def _crossed(self, size: int, turn: int) -> Iterator[Batch]:
        """A pass over the given rows, each crossed with another."""
        one, other = (self.data.batches(size, self._random(f"{turn}/{side}")) for side in ("one", "other"))
        for number, (here, there) in enumerate(zip(one, other, strict=True)):
            rng = generator(self.seed, f"pairs/{turn}/{number}")
            arrays = enumerate(zip(here.inputs, there.inputs, strict=True))
            yield Batch(tuple(cross(a, b, rng, place in self.first) for place, (a, b) in arrays))

    def _random(self, address: str) -> int:
        return int(generator(self.seed, f"pairs/{address}").integers(2**31))


def enriched(data: Passes, pairs: int | None, first: Collection[int], seed: int) -> Enriched | None:
    """Data with rows made of pairs; None where there are enough, or none are wanted.

    Args:
        data: what is given.
        pairs: rows to make for each given one in each pass; None: as many as suit their number.
        first: numbers of the inputs whose channels stand before their positions.
        seed: of the pairs.
    """
    given = data.rows
    if not given or given < 2 or pairs == 0:
        return None
    made = min(POOL * given, ENOUGH - given) if pairs is None else max(POOL, pairs) * given
    if made <= 0:
        return None
    return Enriched(data, given, made, min((PAIRS if pairs is None else pairs) * given, made), first, seed)
