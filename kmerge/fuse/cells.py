"""Recurrent cells in NumPy: what goes into each gate, step by step, so that it can be aimed at without Keras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.methods.registry import Array

KINDS = ("SimpleRNN", "LSTM", "GRU")
Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class CellWeights:
    """Weights of a cell; a bias that it lacks is zero.

    Attributes:
        kernel, recurrent: shapes (inputs, columns) and (units, columns).
        bias, inner: added to what inputs and what the state give, shape (columns,).
    """

    kernel: Array
    recurrent: Array
    bias: Array
    inner: Array


@dataclass(frozen=True, eq=False)
class Trace:
    """What a cell does on some sequences.

    Attributes:
        before, after: its state before and after each picked step, shape (sequences, picked, units).
        gates: what goes into its activation functions, shape (sequences, picked, copies * units).
        reset: the state before the step behind the reset gate; None where none stands in front of the kernel.
        last: its state in the end, shape (sequences, units).
    """

    before: Array
    after: Array
    gates: Array
    reset: Array | None
    last: Array


@dataclass(frozen=True)
class Block:
    """Some of the gates, linear in the same things.

    Attributes:
        gates: which columns of `Trace.gates`.
        columns: which columns of the kernels they come from.
        inputs: whether they depend on the input.
        state: on which they depend: that "before" the step, that behind the reset gate, "reset", or none, "".
        inner: whether their offset stands in the bias of the state.
    """

    gates: slice
    columns: slice
    inputs: bool = True
    state: str = "before"
    inner: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell of Keras.

    Attributes:
        kind: SimpleRNN, LSTM or GRU.
        activation, gate: functions of the candidate (or of the state), and of the gates.
        reset_after: whether GRU's reset gate acts behind the recurrent kernel.
    """

    kind: str
    activation: Function
    gate: Function
    reset_after: bool = False

    @classmethod
    def of(cls, live: Any) -> Cell | None:
        """That of a live layer; None for one that is not known."""
        kind = type(live).__name__.removesuffix("Cell")
        if kind not in KINDS:
            return None
        gate = _function(getattr(live, "recurrent_activation", None))
        return cls(kind, _function(live.activation), gate, bool(getattr(live, "reset_after", False)))

    @property
    def copies(self) -> int:
        """How often all units stand in `Trace.gates`; under `reset_after` the candidate has two parts."""
        return {"SimpleRNN": 1, "LSTM": 4, "GRU": 4 if self.reset_after else 3}[self.kind]

    def blocks(self, units: int) -> tuple[Block, ...]:
        """What is linear in what.

        >>> [block.state for block in Cell("GRU", np.tanh, np.tanh, reset_after=False).blocks(8)]
        ['before', 'reset']
        """
        if self.kind != "GRU":
            whole = slice(0, self.copies * units)
            return (Block(whole, whole),)
        gates, candidate = slice(0, 2 * units), slice(2 * units, 3 * units)
        if not self.reset_after:
            return Block(gates, gates), Block(candidate, candidate, state="reset")
        inner = Block(slice(3 * units, 4 * units), candidate, inputs=False, inner=True)
        return Block(gates, gates), Block(candidate, candidate, state=""), inner

    def run(
        self,
        weights: CellWeights,
        x: Array,
        mask: Array | None = None,
        initial: Sequence[Array] = (),
        picked: Array | None = None,
    ) -> Trace:
        """The cell on sequences.

        Args:
            weights: of the cell.
            x: shape (sequences, steps, inputs), in the order in which the cell reads them.
            mask: steps that count, shape (sequences, steps); None where all do.
            initial: states that it starts from, none for zeros.
            picked: steps to be told of, shape (sequences, picked); None for all.
        """
        (count, steps), units, dtype = x.shape[:2], weights.recurrent.shape[0], weights.kernel.dtype
        picked = np.broadcast_to(np.arange(steps), (count, steps)) if picked is None else picked
        states = [*(state.astype(dtype) for state in initial), *(np.zeros((count, units), dtype) for _ in range(2))]
        h, c = states[:2]
        widths = (units, units, self.copies * units, units)
        found = [np.zeros((*picked.shape, width), dtype) for width in widths]
        made = x.astype(dtype) @ weights.kernel + weights.bias
        with np.errstate(over="ignore", invalid="ignore"):
            for step in range(steps):
                new, other, gates, reset = self._step(weights, made[:, step], h, c)
                if mask is not None:
                    counts = mask[:, step, None]
                    new, other = np.where(counts, new, h), np.where(counts, other, c)
                rows, places = np.nonzero(picked == step)
                for values, result in zip((h, new, gates, reset), found, strict=True):
                    result[rows, places] = values[rows]
                h, c = new, other
        resets = self.kind == "GRU" and not self.reset_after
        return Trace(found[0], found[1], found[2], found[3] if resets else None, h)

    def _step(self, weights: CellWeights, made: Array, h: Array, c: Array) -> tuple[Array, Array, Array, Array]:
        """The states after one step, what goes into the gates, and the state behind the reset gate."""
        units, recurrent = h.shape[1], weights.recurrent
        if self.kind == "SimpleRNN":
            gates = made + h @ recurrent
            return self.activation(gates), c, gates, h
        if self.kind == "LSTM":
            gates = made + h @ recurrent
            keep, forget, candidate, out = np.split(gates, 4, axis=1)
            c = self.gate(forget) * c + self.gate(keep) * self.activation(candidate)
            return self.gate(out) * self.activation(c), c, gates, h
        both = 2 * units
        opening = made[:, :both] + h @ recurrent[:, :both] + weights.inner[:both]
        update, open_ = np.split(self.gate(opening), 2, axis=1)
        if self.reset_after:
            inner = h @ recurrent[:, both:] + weights.inner[both:]
            gates = np.concatenate([opening, made[:, both:], inner], axis=1)
            candidate, reset = made[:, both:] + open_ * inner, h
        else:
            reset = open_ * h
            candidate = made[:, both:] + reset @ recurrent[:, both:]
            gates = np.concatenate([opening, candidate], axis=1)
        return update * h + (1 - update) * self.activation(candidate), c, gates, reset


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _linear(x: Array) -> Array:
    return x


_KNOWN: dict[str, Function] = {"tanh": np.tanh, "sigmoid": _sigmoid, "relu": _relu, "linear": _linear}


def _function(live: Any) -> Function:
    """An activation function of Keras for arrays."""
    name = getattr(live, "__name__", "")
    if name in _KNOWN and getattr(live, "__module__", "").startswith("keras."):
        return _KNOWN[name]
    return lambda x: to_numpy(live(x)).astype(x.dtype)
