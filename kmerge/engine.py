"""Stream weights from the sources' files through methods into the output, a few blocks at a time."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import numpy as np
from blake3 import blake3

from kmerge.dialects.vocabulary import WeightKind
from kmerge.errors import MergeError
from kmerge.methods import get_method, picked, pooled_mean, pooled_variance
from kmerge.methods.element import mean_in_place
from kmerge.methods.registry import Array
from kmerge.progress import Progress, silent
from kmerge.source import Source, Weight
from kmerge.store import Tensor, numpy_dtype

LEAF = 65_536
"""Entries of a weight that are read and digested together."""
BLOCK_BYTES = 3 * 2**20
"""Bytes of all sources together that one thread holds at a time. With less, threads wait for Python's lock more often;
with more, the bytes leave the core's cache before they are written: benchmarks/README.md has the times."""
_PULSE = 0.01
"""Seconds between two calls of `progress`."""


class Output(Protocol):
    def write(self, key: str, start: int, array: Array) -> None: ...


@dataclass(frozen=True)
class Target:
    """One weight of the output.

    Attributes:
        key: its place in the output; "" for a weight that is read for its source's digest alone.
        layer: name of its layer, for messages.
        members: (source number, weight), one for a private weight, one per source for a shared one.
        role: shared weights are merged, private ones copied.
        method, options: how.
        means: for a variance of BatchNormalization, the mean that belongs to it, per member.
        values: what to write, where that was found otherwise; the members are then read for their digests alone.
    """

    key: str
    layer: str
    members: tuple[tuple[int, Weight], ...]
    role: str = "private"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    means: tuple[Weight, ...] = ()
    values: Array | None = None

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
    _write_known(targets, output)
    targets = [target if target.values is None else replace(target, key="") for target in targets]
    targets = [*targets, *_unread(sources, targets)]
    worker = _Worker(share, labels, output, digests, _places(sources), _units(targets))
    total = sum(weight.tensor.nbytes for source in sources for state in source.states for weight in state.weights)
    count = threads or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)

    with ThreadPoolExecutor(count, thread_name_prefix="kmerge") as pool:
        try:
            running = {pool.submit(worker.run) for _ in range(count)}
            while running:
                finished, running = wait(running, _PULSE, FIRST_EXCEPTION)
                for item in finished:
                    item.result()
                progress(worker.done, total)
        except BaseException:
            worker.stop.set()
            raise
    progress(total, total)
    return tuple(digests.result(number, source) for number, source in enumerate(sources))


def copy_tensor(tensor: Tensor, output: Output, key: str) -> None:
    """Write one tensor as it is, block by block."""
    step = BLOCK_BYTES // numpy_dtype(tensor.dtype).itemsize
    for start in range(0, tensor.size, step):
        values = np.empty(min(step, tensor.size - start), numpy_dtype(tensor.dtype))
        tensor.read_into(start, values)
        output.write(key, start, values)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Some leaves of one weight of the output: what a thread merges before it asks for more."""

    target: Target
    start: int
    stop: int
    step: int
    """Entries that are merged at a time: leaves, or even parts of one."""


def _write_known(targets: Iterable[Target], output: Output) -> None:
    """Write what needs no merging."""
    for target in targets:
        if target.values is not None:
            stored = numpy_dtype(target.weight.tensor.dtype)
            output.write(target.key, 0, np.ascontiguousarray(target.values, dtype=stored).reshape(-1))


def _unread(sources: Sequence[Source], targets: Sequence[Target]) -> list[Target]:
    """Weights that no target reads, to be read for the digest alone: a source of weight 0 under an average."""
    read = {id(weight) for target in targets for _, weight in target.members}
    return [
        Target("", "", ((number, weight),))
        for number, source in enumerate(sources)
        for state in source.states
        for weight in state.weights
        if id(weight) not in read
    ]


def _places(sources: Sequence[Source]) -> list[dict[int, str]]:
    """Digest key of each weight object, per source."""
    return [
        {id(weight): f"{number}/{weight.key}" for number, state in enumerate(source.states) for weight in state.weights}
        for source in sources
    ]


def _units(targets: Iterable[Target]) -> Iterator[_Unit]:
    """The targets in pieces of whole leaves, to be merged in steps of which all sources' entries fit in one block."""
    for target in targets:
        size = target.weight.tensor.size
        width = max(numpy_dtype(weight.tensor.dtype).itemsize for _, weight in target.members)
        step = LEAF
        while step > 1024 and len(target.members) * width * step > BLOCK_BYTES:
            step //= 2
        leaves = max(1, BLOCK_BYTES // (len(target.members) * width * LEAF))
        for start in range(0, max(size, 1), leaves * LEAF):
            stop = min(start + leaves * LEAF, size)
            yield _Unit(target, start, stop, step if leaves == 1 else leaves * LEAF)


class _Worker:
    """What the threads share, and each thread's own buffers."""

    def __init__(
        self,
        share: Array,
        labels: Sequence[str],
        output: Output,
        digests: Digests,
        places: Sequence[Mapping[int, str]],
        units: Iterator[_Unit],
    ) -> None:
        self.share, self.labels, self.output = share, labels, output
        self.used = np.flatnonzero(share)
        self.digests, self.places = digests, places
        self.units, self.lock, self.done = units, threading.Lock(), 0
        self.stop = threading.Event()
        self.local = threading.local()

    def run(self) -> None:
        """Merge unit after unit until none is left; one call per thread."""
        read = 0
        while not self.stop.is_set():
            with self.lock:
                self.done += read
                unit = next(self.units, None)
            if unit is None:
                return
            read = self._run(unit)

    def _run(self, unit: _Unit) -> int:
        """Merge one unit, step by step; returns the bytes read."""
        target = unit.target
        stored = numpy_dtype(target.weight.tensor.dtype)
        parts = [blake3() if unit.step < LEAF else None for _ in target.members]
        read = 0
        for start in range(unit.start, max(unit.stop, 1), unit.step):
            stop = min(start + unit.step, unit.stop)
            stack = self._buffer(len(target.members), stop - start, stored)
            for row, (source, weight), part in zip(stack, target.members, parts, strict=True):
                read += self._read(row, source, weight, start, part)
            if target.key:
                self.output.write(target.key, start, self._merge(target, stack, start))
        return read

    def _buffer(self, rows: int, length: int, dtype: Any) -> Array:
        needed = rows * length * dtype.itemsize
        memory: Array | None = getattr(self.local, "memory", None)
        if memory is None or memory.nbytes < needed:
            memory = np.empty(needed, dtype=np.uint8)
            self.local.memory = memory
        stack: Array = memory[:needed].view(dtype).reshape(rows, length)
        return stack

    def _read(self, row: Array, source: int, weight: Weight, start: int, part: Any) -> int:
        """One source's entries into its row, digested leaf by leaf; another dtype is converted.

        `part` is the state of a leaf that is read in several steps, None where whole leaves are read.
        """
        own = numpy_dtype(weight.tensor.dtype)
        values = row if own == row.dtype else np.empty(row.shape, dtype=own)
        weight.tensor.read_into(start, values)
        leaves = self.digests.leaves[source][self.places[source][id(weight)]]
        first = start // LEAF
        original = getattr(weight.tensor, "original", None)  # under an alignment the file's own order is digested
        content = values if original is None else np.empty_like(values)
        if original is not None:
            original.read_into(start, content)
        raw = memoryview(content.view(np.uint8))  # type: ignore[arg-type]
        if part is None:
            step = LEAF * own.itemsize
            for number in range(max(1, -(-values.size // LEAF))):
                leaves[first + number] = blake3(raw[number * step : (number + 1) * step]).digest()
        else:
            part.update(raw)
            stop = start + values.size
            if stop % LEAF == 0 or stop == weight.tensor.size:
                leaves[first] = part.digest()
        if values is not row:
            with np.errstate(all="ignore"):  # what overflows is found when it is merged
                row[:] = values.astype(row.dtype)
        return raw.nbytes

    def _merge(self, target: Target, stack: Array, start: int) -> Array:
        """The merged entries; what `stack` holds is lost."""
        kind = target.weight.kind
        row: Array = stack[0]
        if target.role == "private" or len(target.members) == 1:
            return row
        method = get_method(target.method)
        if method.name == "pick":
            row = stack[picked(target.options.get("label"), self.labels)]
            return row
        if kind in (WeightKind.STATE, WeightKind.LEARNED):
            return row
        with np.errstate(all="ignore"):
            result = self._combine(target, stack, start, kind)
            finite = _finite(result)
        if not finite:
            self._explain(target, start, result)
        return result

    def _combine(self, target: Target, stack: Array, start: int, kind: WeightKind) -> Array:
        used, share = self.used, self.share[self.used]
        if kind is WeightKind.MEAN:
            return pooled_mean(stack[used], weights=share).astype(stack.dtype)
        if kind is WeightKind.VARIANCE:
            means = np.stack([_read(weight, start, stack.shape[1]).astype(np.float64) for weight in target.means])
            return pooled_variance(means[used], stack[used].astype(np.float64), weights=share).astype(stack.dtype)
        plain = stack.dtype in (np.float32, np.float64, np.complex64, np.complex128)
        working = stack if plain else stack.astype(np.float32)
        if target.method in ("mean", "align"):
            merged = mean_in_place(working, self.share)
        else:
            merged = get_method(target.method).function(working, weights=self.share, **target.options)
        return merged.astype(stack.dtype, copy=False)

    def _explain(self, target: Target, start: int, result: Array) -> NoReturn:
        """Raise because merged values are not finite: such a trunk would be lost for every source."""
        sources = [source for source, _ in target.members]
        means = zip(sources, target.means, strict=False)
        for source, weight in (*target.members, *means):
            if self.share[source] and not np.all(np.isfinite(_comparable(_read(weight, start, result.size)))):
                label = self.labels[source]
                raise MergeError(
                    f"layer '{target.layer}': {weight.name} of '{label}' holds values that are not finite "
                    f"numbers (NaN or infinity), and merging would spread them to every source. "
                    f"Leave '{label}' out, or keep the layer per source with --private {target.layer}."
                )
        raise MergeError(
            f"layer '{target.layer}': merging {target.weight.name} overflows {result.dtype}. "
            f"Keep the layer per source with --private {target.layer}."
        )


def _read(weight: Weight, start: int, count: int) -> Array:
    values = np.empty(count, dtype=numpy_dtype(weight.tensor.dtype))
    weight.tensor.read_into(start, values)
    return values


def _comparable(values: Array) -> Array:
    """Values of a type that NumPy can test for numbers."""
    return values if values.dtype.kind in "fc" else values.astype(np.float64)


def _finite(values: Array) -> bool:
    """Whether all are finite; their sum, which is quick, usually tells it."""
    plain = values if values.dtype.kind in "fc" else values.astype(np.float32)
    return bool(np.isfinite(np.add.reduce(plain)) or np.all(np.isfinite(plain)))
