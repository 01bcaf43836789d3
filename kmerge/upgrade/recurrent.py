"""Recurrent layers: gates under the old hard_sigmoid, CuDNN's own layouts, where the bias is added in a GRU."""

from __future__ import annotations

import numpy as np

from kmerge.methods.registry import Array
from kmerge.store import Tensor
from kmerge.upgrade.part import Chain, Context, Part, Rule, made_from, multiplied, reshaped
from kmerge.upgrade.settings import HARD_SIGMOID, OLD_HARD_SIGMOID
from kmerge.upgrade.theano import conv_lstm

RECURRENT = frozenset({"SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "RNN", "Bidirectional"})
_GATES = {"LSTM": "ifco", "GRU": "zrh", "ConvLSTM": "ifco", "SimpleRNN": "h"}


def recurrent_rules() -> dict[str, Rule]:
    """Rules by class of layer."""
    rules: dict[str, Rule] = dict.fromkeys(
        ("SimpleRNN", "LSTM", "GRU", "SimpleRNNCell", "LSTMCell", "GRUCell", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
        _recurrent,
    )
    return {**rules, "CuDNNLSTM": _cudnn_lstm, "CuDNNGRU": _cudnn_gru}


def _kind(class_name: str) -> str:
    return next(kind for kind in ("ConvLSTM", "LSTM", "GRU", "SimpleRNN") if class_name.startswith(kind))


def _recurrent(part: Part, context: Context) -> Chain:
    kind = _kind(part.class_name)
    config = part.config
    if kind == "GRU" and context.old and "reset_after" not in config:
        # Before Keras 2.2 the reset gate was always applied before the product; current Keras's default is after.
        part = part.having(reset_after=False)
    if context.old and kind != "SimpleRNN" and "recurrent_activation" not in config:
        # hard_sigmoid was the default before Keras 2.3, and of convolutional ones until 2.15.
        hard = context.version < (2, 3) or kind == "ConvLSTM"
        part = part.having(recurrent_activation="hard_sigmoid" if hard else "sigmoid")
    if context.old:
        part = _scaled(part, kind, context)
        if kind in ("LSTM", "ConvLSTM") and config.get("activation") == "hard_sigmoid":
            part = part.having(activation=OLD_HARD_SIGMOID)
    first = kind == "ConvLSTM" and context.old and config.get("data_format") == "channels_first"
    if first and not context.inside:
        part = part.having(data_format="channels_last")
    elif first:
        context.note(f"'{context.layer}': {part.class_name} with channels first runs on few CPUs, as before")
    chain = conv_lstm(part, context) if kind == "ConvLSTM" and context.theano else [part]
    if len(chain) > 1 and context.inside:
        context.refuse(part.class_name, "unknown", "pads its input as Theano does, inside a wrapper")
    return _channels_last(part, chain) if first and not context.inside else chain


def _channels_last(part: Part, chain: Chain) -> Chain:
    """Channels first, (steps, channels, *sizes), between two Permutes: TensorFlow knows it on few CPUs."""
    rank = next(int(letter) for letter in part.class_name if letter.isdigit())
    sizes = range(3, 3 + rank)
    if part.config.get("return_sequences"):
        back = (1, rank + 2, *range(2, rank + 2))
    else:
        back = (rank + 1, *range(1, rank + 1))
    return [
        Part("Permute", {"dims": [1, *sizes, 2]}, suffix="channels_last"),
        *chain,
        Part("Permute", {"dims": list(back)}, suffix="channels_first"),
    ]


def _scaled(part: Part, kind: str, context: Context) -> Part:
    """Columns whose sum goes through the old hard_sigmoid, clip(0.2 x + 0.5), are multiplied by 1.2."""
    config, gates = part.config, _GATES[kind]
    inner = "h" if kind != "LSTM" and kind != "ConvLSTM" else ""
    if not part.tensors:
        return part
    units = part.tensors[0].shape[-1] // len(gates)
    factors = []
    for gate in gates:
        key = "activation" if gate in ("h", "c") else "recurrent_activation"
        hard = config.get(key) == "hard_sigmoid" and (gate != "c") and (gate != "h" or bool(inner))
        factors += [HARD_SIGMOID if hard else 1.0] * units
    if all(factor == 1.0 for factor in factors):
        return part
    return part.weighing(*(multiplied(tensor, np.array(factors), context) for tensor in part.tensors))


def _cudnn_lstm(part: Part, context: Context) -> Part:
    """Kernels stored for CuDNN, and two biases that are only ever added."""
    kernel, recurrent, *bias = _checked(part, 4)
    tensors = [_from_cudnn(kernel, 4, True), _from_cudnn(recurrent, 4, False)]
    if bias:
        half = bias[0].shape[0] // 2
        tensors.append(made_from(bias, (half,), lambda arrays: arrays[0].reshape(2, half).sum(axis=0)))
    part = part.called("LSTM").weighing(*tensors)
    return part.having(activation="tanh", recurrent_activation="sigmoid", use_bias=True)


def _cudnn_gru(part: Part, context: Context) -> Part:
    kernel, recurrent, *bias = _checked(part, 3)
    tensors = [_from_cudnn(kernel, 3, True), _from_cudnn(recurrent, 3, False)]
    if bias:
        tensors.append(reshaped(bias[0], (2, bias[0].size // 2)))
    part = part.called("GRU").weighing(*tensors)
    return part.having(activation="tanh", recurrent_activation="sigmoid", use_bias=True, reset_after=True)


def _checked(part: Part, gates: int) -> tuple[Tensor, ...]:
    """The weights of a CuDNN layer: (inputs, gates x units), (units, gates x units), (2 x gates x units,)."""
    units = int(part.config.get("units") or 0)
    columns = gates * units
    inputs = part.tensors[0].shape[0] if part.tensors and part.tensors[0].shape else 0
    expected = ((inputs, columns), (units, columns), (2 * columns,))[: max(2, len(part.tensors))]
    found = tuple(tensor.shape for tensor in part.tensors)
    if found != expected:
        raise ValueError(f"weights are {found}, expected {expected} for {units} units of {gates} gates")
    return part.tensors


def _from_cudnn(kernel: Tensor, gates: int, reordered: bool) -> Tensor:
    """Each gate's matrix is stored transposed; that of the inputs keeps its shape besides."""

    def one(matrix: Array) -> Array:
        return matrix.T.reshape(matrix.shape, order="F") if reordered else matrix.T

    def make(arrays: list[Array]) -> Array:
        return np.hstack([one(matrix) for matrix in np.hsplit(arrays[0], gates)])

    return made_from([kernel], kernel.shape, make, reorders=True)
