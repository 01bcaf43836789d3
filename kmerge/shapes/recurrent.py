"""Output shapes of recurrent layers, and what their cells consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kmerge.shapes.calls import Inputs
from kmerge.shapes.values import Shape, integer, items
from kmerge.shapes.windows import conv

Config = Mapping[str, Any]

GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3, "CuDNNLSTM": 4, "CuDNNGRU": 3}


@dataclass(frozen=True)
class Cell:
    """One recurrent cell of Keras: `gates` × `units` columns; `states` states; whether its bias is a matrix."""

    units: int
    gates: int
    states: int
    wide_bias: bool


def cells(class_name: str, config: Config) -> list[Cell] | None:
    """The cells of a recurrent layer from the input on; None if one is of an unknown class."""
    if class_name == "RNN":
        cell = config.get("cell")
        return _cells([cell] if isinstance(cell, Mapping) else [])
    gates, units = GATES.get(class_name), integer(config.get("units"))
    if gates is None or units is None:
        return None
    wide_bias = class_name == "GRU" and bool(config.get("reset_after")) and config.get("use_bias", True) is not False
    return [Cell(units, gates, 2 if gates == 4 else 1, wide_bias)]


def _cells(entries: list[Any]) -> list[Cell] | None:
    found: list[Cell] = []
    for entry in entries:
        config = entry.get("config") if isinstance(entry, Mapping) else None
        if not isinstance(config, Mapping):
            return None
        class_name = str(entry.get("class_name"))
        if class_name == "StackedRNNCells":
            inner = _cells(items(config.get("cells")) or [])
        elif class_name.endswith("Cell") and not class_name.startswith("CuDNN"):
            inner = cells(class_name.removesuffix("Cell"), config)
        else:
            inner = None
        if inner is None:
            return None
        found += inner
    return found or None


def recurrent(class_name: str, config: Config, inputs: Inputs) -> list[Shape | None]:
    """SimpleRNN, LSTM, GRU and RNN; only the time axis and the batch come from the input."""
    found, shape = cells(class_name, config), inputs.first
    if found is None or config.get("time_major") or (shape is not None and len(shape) < 2):
        return [None]
    batch, steps = shape[:2] if shape is not None else (None, None)
    units = found[-1].units
    outputs: list[Shape | None] = [(batch, steps, units) if config.get("return_sequences") else (batch, units)]
    if config.get("return_state"):
        outputs += [(batch, cell.units) for cell in found for _ in range(cell.states)]
    return outputs


def conv_lstm(rank: int, config: Config, inputs: Inputs) -> list[Shape | None]:
    """ConvLSTM: a convolution at every time step."""
    shape = inputs.first
    step = conv(rank, config, Inputs.of((shape[0], *shape[2:]))) if shape is not None and len(shape) > 2 else None
    if shape is None or step is None:
        return [None]
    outputs: list[Shape | None] = [(step[0], shape[1], *step[1:]) if config.get("return_sequences") else step]
    return outputs + ([step, step] if config.get("return_state") else [])
