"""Stream weights from the sources' files through methods into the output, a few blocks at a time."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from kmerge.dialects.vocabulary import WeightKind
from kmerge.errors import MergeError
from kmerge.methods import get_method, picked, pooled_mean, pooled_variance
from kmerge.methods.registry import Array
from kmerge.progress import Progress, silent
from kmerge.source import Source, Weight
from kmerge.store import numpy_dtype

LEAF = 65_536
"""Entries of a weight that are read and digested together."""
BLOCK_BYTES = 2 * 2**20
"""Bytes of all sources together that one thread holds at a time."""


class Output(Protocol):
    def write(self, key: str, start: int, array: Array) -> None: ...


@dataclass(frozen=True)
class Target:
    """One weight of the output.

    Attributes:
        key: its place in the output.
        layer: name of its layer, for messages.
        members: (source number, weight), one for a private weight, one per source for a shared one.
        role: shared weights are merged, private ones copied.
        method, options: how.
        means: for a variance of BatchNormalization, the mean that belongs to it, per member.
    """

    key: str
    layer: str
    members: tuple[tuple[int, Weight], ...]
    role: str = "private"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    means: tuple[Weight, ...] = ()

    @property
    def weight(self) -> Weight:
        return self.members[0][1]


@dataclass
class Digests:
    """Digest of each source, taken while its bytes stream past.

    BLAKE3 over the configuration and, for every weight in order of its place, name, dtype, shape and the digests of its
    leaves of 65,536 entries. It depends on what the model is, not on how its file is laid out.
    """

    leaves: list[dict[str, list[bytes]]]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Digests:
        leaves: list[dict[str, list[bytes]]] = []
        for source in sources:
            mine = {}
            for number, state in enumerate(source.states):
                for weight in state.weights:
                    mine[f"{number}/{weight.key}"] = [b""] * max(1, -(-weight.tensor.size // LEAF))
            leaves.append(mine)
        return cls(leaves)

    def result(self, number: int, source: Source) -> str:
        whole = blake3(json.dumps(source.model, sort_keys=True).encode())
        for place, state in enumerate(source.states):
            for weight in state.weights:
                key = f"{place}/{weight.key}"
                leaves = self.leaves[number][key]
                if not all(leaves):
                    return ""
                whole.update(f"{key}\0{weight.tensor.dtype}\0{weight.tensor.shape}\0".encode())
                whole.update(b"".join(leaves))
        return "blake3:" + whole.hexdigest()


def merge_tensors(
    sources: Sequence[Source],
    targets: Sequence[Target],
    output: Output,
    weights: Sequence[float],
    progress: Progress = silent,
    threads: int | None = None,
) -> tuple[str, ...]:
    """Read every weight of every source once, merge, write, and take the sources' digests on the way.

    Args:
        sources: opened.
        targets: every weight of the output.
        output: where `write(key, start, array)` puts flat entries; called from several threads.
        weights: importance per source, sums to 1.
        progress: called with bytes read so far and in all.
        threads: workers; default one per available core, at most 4.

    Returns:
        One digest per source.

    Raises:
        MergeError: if a merged weight is not finite.
    """
    share = np.asarray(weights, dtype=np.float64)
    labels = [source.label for source in sources]
    digests = Digests.of(sources)
    worker = _Worker(share, labels, output, digests, _places(sources))
    total = sum(weight.tensor.nbytes for source in sources for state in source.states for weight in state.weights)
    count = threads or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
    done = 0
    stop = threading.Event()
    worker.stop = stop

    with ThreadPoolExecutor(count, thread_name_prefix="kmerge") as pool:
        waiting: set[Future[int]] = set()
        try:
            for unit in _units(targets, len(sources)):
                waiting.add(pool.submit(worker.run, unit))
                if len(waiting) >= 4 * count:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    done += sum(item.result() for item in finished)
                    progress(done, total)
            for item in waiting:
                done += item.result()
                progress(done, total)
        except BaseException:
            stop.set()
            for item in waiting:
                item.cancel()
            raise
    progress(total, total)
    return tuple(digests.result(number, source) for number, source in enumerate(sources))


@dataclass(frozen=True)
class _Unit:
    target: Target
    start: int
    stop: int


def _places(sources: Sequence[Source]) -> list[dict[int, str]]:
    """Digest key of each weight object, per source."""
    return [
        {id(weight): f"{number}/{weight.key}" for number, state in enumerate(source.states) for weight in state.weights}
        for source in sources
    ]


def _units(targets: Iterable[Target], num_sources: int) -> Iterator[_Unit]:
    """The targets in pieces of whole leaves, small enough that all sources' pieces fit in one block."""
    for target in targets:
        size = target.weight.tensor.size
        width = max(1, numpy_dtype(target.weight.tensor.dtype).itemsize)
        step = max(1, BLOCK_BYTES // (len(target.members) * width * LEAF)) * LEAF
        for start in range(0, max(size, 1), step):
            yield _Unit(target, start, min(start + step, size))


class _Worker:
    """What the threads share, and each thread's own buffers."""

    stop: threading.Event

    def __init__(
        self, share: Array, labels: Sequence[str], output: Output, digests: Digests, places: Sequence[Mapping[int, str]]
    ) -> None:
        self.share, self.labels, self.output = share, labels, output
        self.digests, self.places = digests, places
        self.local = threading.local()

    def run(self, unit: _Unit) -> int:
        """Merge one piece of one weight; returns the bytes read."""
        if self.stop.is_set():
            return 0
        target, length = unit.target, unit.stop - unit.start
        stored = numpy_dtype(target.weight.tensor.dtype)
        stack = self._buffer(len(target.members), length, stored)
        read = 0
        for row, (source, weight) in zip(stack, target.members, strict=True):
            read += self._read(row, source, weight, unit)
        result = self._merge(target, stack, unit)
        self.output.write(target.key, unit.start, result)
        return read

    def _buffer(self, rows: int, length: int, dtype: Any) -> Array:
        needed = rows * length * dtype.itemsize
        memory: Array | None = getattr(self.local, "memory", None)
        if memory is None or memory.nbytes < needed:
            memory = np.empty(needed, dtype=np.uint8)
            self.local.memory = memory
        return memory[:needed].view(dtype).reshape(rows, length)

    def _read(self, row: Array, source: int, weight: Weight, unit: _Unit) -> int:
        """One source's piece into its row, digested leaf by leaf; another dtype is converted."""
        own = numpy_dtype(weight.tensor.dtype)
        values = row if own == row.dtype else np.empty(row.shape, dtype=own)
        weight.tensor.read_into(unit.start, values)
        leaves = self.digests.leaves[source][self.places[source][id(weight)]]
        first = unit.start // LEAF
        raw = values.view(np.uint8)
        step = LEAF * own.itemsize
        for number in range(max(1, -(-values.size // LEAF))):
            leaves[first + number] = blake3(raw[number * step : (number + 1) * step]).digest()
        if values is not row:
            row[:] = values.astype(row.dtype)
        return weight.tensor.nbytes if values.size == weight.tensor.size else raw.nbytes

    def _merge(self, target: Target, stack: Array, unit: _Unit) -> Array:
        if target.role == "private" or len(target.members) == 1:
            return stack[0]
        kind = target.weight.kind
        method = get_method(target.method)
        if method.name == "pick":
            return stack[picked(target.options.get("label"), self.labels)]
        if kind in (WeightKind.STATE, WeightKind.LEARNED):
            return stack[0]
        with np.errstate(all="ignore"):
            result = self._combine(target, stack, unit, kind)
        self._check(target, stack, result)
        return result

    def _combine(self, target: Target, stack: Array, unit: _Unit, kind: WeightKind) -> Array:
        used = np.flatnonzero(self.share)
        share = self.share[used]
        if kind is WeightKind.MEAN:
            return pooled_mean(stack[used], weights=share).astype(stack.dtype)
        if kind is WeightKind.VARIANCE:
            means = np.empty((len(target.means), unit.stop - unit.start), dtype=np.float64)
            for row, weight in zip(means, target.means, strict=True):
                values = np.empty(row.shape, dtype=numpy_dtype(weight.tensor.dtype))
                weight.tensor.read_into(unit.start, values)
                row[:] = values.astype(np.float64)
            return pooled_variance(means[used], stack[used].astype(np.float64), weights=share).astype(stack.dtype)
        working = stack if stack.dtype in (np.float32, np.float64, np.complex64, np.complex128) else stack.astype(np.float32)
        merged = get_method(target.method).function(working, weights=self.share, **target.options)
        return merged.astype(stack.dtype, copy=False)

    def _check(self, target: Target, stack: Array, result: Array) -> None:
        """Raise if the merged values are not finite: such a trunk would be lost for every source."""
        plain = result if result.dtype.kind in "fc" else result.astype(np.float32)
        with np.errstate(all="ignore"):
            if np.isfinite(np.vdot(plain, plain)) or np.all(np.isfinite(plain)):
                return
        for number, row in enumerate(stack):
            if self.share[number] and not np.all(np.isfinite(row.astype(np.float64))):
                label = self.labels[number]
                raise MergeError(
                    f"layer '{target.layer}': {target.weight.name} of '{label}' holds values that are not finite numbers "
                    f"(NaN or infinity), and merging would spread them to every source. "
                    f"Leave '{label}' out, or keep the layer per source with --private {target.layer}."
                )
        raise MergeError(
            f"layer '{target.layer}': merging {target.weight.name} overflows {stack.dtype}. "
            f"Keep the layer per source with --private {target.layer}."
        )

