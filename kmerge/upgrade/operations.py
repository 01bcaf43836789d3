"""Operations that tf.keras recorded as layers (`TensorFlowOpLayer`, `TFOpLambda`, `SlicingOpLambda`) in current Keras.

A TFOpLambda names a function of TensorFlow by its symbol. It is looked up in a table here, and never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kmerge.graph import Layer, Ref, refs
from kmerge.upgrade.part import LAYERS, Context, Part, operation

Add = Callable[..., Ref]


def is_operation(layer: Layer) -> bool:
    return layer.class_name in ("TensorFlowOpLayer", "TFOpLambda", "SlicingOpLambda", "ClassMethod")


_TWO = {
    "add": "Add", "math.add": "Add", "__operators__.add": "Add", "AddV2": "Add", "Add": "Add", "add_v2": "Add",
    "math.subtract": "Subtract", "subtract": "Subtract", "Sub": "Subtract",
    "math.multiply": "Multiply", "multiply": "Multiply", "Mul": "Multiply",
    "math.truediv": "Divide", "math.divide": "Divide", "RealDiv": "Divide", "truediv": "Divide", "divide": "Divide",
    "math.divide_no_nan": "DivideNoNan",
    "math.floordiv": "FloorDivide", "FloorDiv": "FloorDivide", "math.floormod": "Mod", "FloorMod": "Mod",
    "math.pow": "Power", "pow": "Power", "Pow": "Power",
    "math.maximum": "Maximum", "maximum": "Maximum", "Maximum": "Maximum",
    "math.minimum": "Minimum", "minimum": "Minimum", "Minimum": "Minimum",
    "linalg.matmul": "Matmul", "matmul": "Matmul", "MatMul": "Matmul", "BatchMatMulV2": "Matmul",
    "math.greater": "Greater", "Greater": "Greater", "math.greater_equal": "GreaterEqual",
    "GreaterEqual": "GreaterEqual", "math.less": "Less", "Less": "Less", "math.less_equal": "LessEqual",
    "LessEqual": "LessEqual", "math.equal": "Equal", "Equal": "Equal", "math.not_equal": "NotEqual",
    "NotEqual": "NotEqual", "math.logical_and": "LogicalAnd", "math.logical_or": "LogicalOr",
    "math.atan2": "Arctan2",
}  # fmt: skip
_ONE = {
    "math.negative": "Negative", "Neg": "Negative", "math.abs": "Abs", "Abs": "Abs", "math.exp": "Exp", "Exp": "Exp",
    "math.log": "Log", "Log": "Log", "math.log1p": "Log1p", "math.sqrt": "Sqrt", "Sqrt": "Sqrt",
    "math.square": "Square", "Square": "Square", "math.sin": "Sin", "math.cos": "Cos", "math.tan": "Tan",
    "math.tanh": "Tanh", "nn.tanh": "Tanh", "Tanh": "Tanh", "math.floor": "Floor", "math.ceil": "Ceil",
    "math.round": "Round", "math.sign": "Sign", "math.reciprocal": "Reciprocal", "math.logical_not": "LogicalNot",
    "math.expm1": "Expm1",
}  # fmt: skip
_ONE_NN = {
    "nn.relu": "Relu", "Relu": "Relu", "nn.relu6": "Relu6", "Relu6": "Relu6", "math.sigmoid": "Sigmoid",
    "nn.sigmoid": "Sigmoid", "Sigmoid": "Sigmoid", "nn.elu": "Elu", "nn.selu": "Selu", "nn.silu": "Silu",
    "nn.swish": "Silu", "math.softplus": "Softplus", "nn.softplus": "Softplus", "nn.softsign": "Softsign",
    "math.softsign": "Softsign",
}  # fmt: skip
_ONE_MATH = {"math.rsqrt": "Rsqrt", "Rsqrt": "Rsqrt", "math.erf": "Erf", "math.erfc": "Erfc"}
_REDUCTIONS = {
    "math.reduce_mean": "Mean", "reduce_mean": "Mean", "math.reduce_sum": "Sum", "reduce_sum": "Sum",
    "math.reduce_max": "Max", "reduce_max": "Max", "math.reduce_min": "Min", "reduce_min": "Min",
    "math.reduce_prod": "Prod", "math.reduce_std": "Std", "math.reduce_variance": "Var",
    "Mean": "Mean", "Sum": "Sum", "Max": "Max", "Min": "Min", "Prod": "Prod",
    "math.reduce_any": "Any", "math.reduce_all": "All",
}  # fmt: skip
_FIRST_NAMES = (
    "x",
    "input",
    "inputs",
    "a",
    "features",
    "logits",
    "tensor",
    "values",
    "input_tensor",
    "value",
    "images",
)


def operation_calls(layer: Layer, arguments: Any, add: Add, context: Context) -> Ref | None:
    """The calls of current Keras's operations for one recorded call; None (and an obstacle) where none is known.

    Args:
        layer: as recorded.
        arguments: of the call, with the tensors of the new graph.
        add: `add(part, args)` adds a layer and its call.
    """
    if layer.class_name == "TensorFlowOpLayer":
        symbol, values = _raw(layer, arguments)
    else:
        symbol = str(layer.config.get("function", "__operators__.getitem"))
        values = _given(arguments)
    rank = len(context.input_shape) if context.input_shape is not None else 0
    if symbol in ("__operators__.getitem", "slice_with_spec"):
        found = _getitem(values, add, rank)
    else:
        found = _build(symbol, values, add)
    if found is None:
        context.refuse(layer.class_name, "unknown", f"calls TensorFlow's '{symbol}', for which no counterpart is known")
    elif left := values.left():
        what = f"calls TensorFlow's '{symbol}' with {', '.join(left)}, for which no counterpart is known"
        context.refuse(layer.class_name, "unknown", what)
    return found


class _Values:
    """The arguments of one operation, by place and by name."""

    def __init__(self, args: list[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, dict(kwargs)
        self._places: set[int] = set()
        self._names: set[str] = set()

    def take(self, place: int, *names: str, default: Any = None) -> Any:
        self._places.add(place)
        self._names |= set(names)
        for name in names:
            if self.kwargs.get(name) is not None:
                return self.kwargs[name]
        return self.args[place] if place < len(self.args) else default

    @property
    def first(self) -> Any:
        return self.take(0, *_FIRST_NAMES)

    def all_args(self) -> list[Any]:
        """All that are given by place."""
        self._places |= set(range(len(self.args)))
        return self.args

    def left(self) -> list[str]:
        """What no rule has looked at, and what is not as it would be without a word."""
        named = [key for key, value in self.kwargs.items() if key not in self._names and not _is_plain(key, value)]
        placed = [
            f"argument {place + 1}"
            for place, value in enumerate(self.args)
            if place not in self._places and not _is_plain("", value)
        ]
        return named + placed


_PLAIN = {"on_value": (1,), "dtype": ("float32",), "data_format": ("NHWC", "NWC", "NDHWC", "channels_last", "TkhXQw==")}
"""Values that mean no more than their absence, beside nothing and false; the last is how a graph writes NHWC."""


def _is_plain(key: str, value: Any) -> bool:
    if isinstance(value, Ref):
        return False
    return key == "name" or not value or value in _PLAIN.get(key, ())


def _given(arguments: Any) -> _Values:
    if isinstance(arguments, Mapping) and "args" in arguments:
        return _Values(list(arguments["args"]), arguments["kwargs"])
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    node = arguments
    while isinstance(node, list) and len(node) == 1:
        node = node[0]
    if isinstance(node, list) and len(node) == 2 and isinstance(node[0], Ref) and isinstance(node[1], Mapping):
        args, kwargs = [node[0]], dict(node[1])
    elif isinstance(node, list) and len(node) == 4 and node[0] == "_CONSTANT_VALUE":
        args, kwargs = [node[2]], dict(node[3])
    elif isinstance(node, list):
        pairs = [item for item in node if isinstance(item, list) and item and isinstance(item[0], Ref)]
        args = [[pair[0] for pair in pairs]]
        kwargs = dict(pairs[0][1]) if pairs and len(pairs[0]) > 1 and isinstance(pairs[0][1], Mapping) else {}
    kwargs.pop("name", None)
    return _Values(args, kwargs)


def _raw(layer: Layer, arguments: Any) -> tuple[str, _Values]:
    """An operation of a TensorFlow graph: tensors in order, with the recorded constants in between."""
    node = layer.config.get("node_def")
    symbol = str(node.get("op")) if isinstance(node, Mapping) else ""
    constants = layer.config.get("constants") or {}
    tensors = iter(refs(arguments))
    count = len(refs(arguments)) + len(constants)
    args = [constants[str(place)] if str(place) in constants else next(tensors, None) for place in range(count)]
    kwargs: dict[str, Any] = {}
    attributes = node.get("attr") if isinstance(node, Mapping) else None
    if isinstance(attributes, Mapping):
        for key, value in attributes.items():
            if isinstance(value, Mapping) and len(value) == 1:
                kwargs[_RAW.get(str(key), str(key))] = next(iter(value.values()))
    return symbol, _Values(args, {key: value for key, value in kwargs.items() if key in _MATTERS})


_RAW = {"adj_x": "transpose_a", "adj_y": "transpose_b"}
_MATTERS = ("keep_dims", "transpose_a", "transpose_b", "data_format", "exclusive", "reverse", "batch_dims")
"""Attributes of operations of a graph that say more than types and sizes."""


def _build(symbol: str, values: _Values, add: Add) -> Ref | None:
    symbol = symbol.removeprefix("compat.v1.").removeprefix("tf.")
    if symbol in _TWO:
        return _two(_TWO[symbol], values, add)
    for table, module in ((_ONE, "numpy"), (_ONE_NN, "nn"), (_ONE_MATH, "math")):
        if symbol in table:
            return add(operation(table[symbol], module), [values.first])
    if symbol in _REDUCTIONS:
        axis = values.take(1, "axis", "reduction_indices")
        keep = bool(values.take(2, "keepdims", "keep_dims", default=False))
        return add(operation(_REDUCTIONS[symbol], "numpy", axis=axis, keepdims=keep), [values.first])
    rule = _SINGLE.get(symbol)
    return rule(values, add) if rule is not None else None


def _two(class_name: str, values: _Values, add: Add) -> Ref | None:
    first = values.take(0, "x", "a", default=None)
    second = values.take(1, "y", "b")
    turned = values.take(9, "transpose_a", "adjoint_a") or values.take(9, "transpose_b", "adjoint_b")
    if class_name == "Matmul" and turned:
        return _transposed_matmul(first, second, values, add)
    if second is None:
        return None
    return add(operation(class_name, "numpy"), [first, second])


def _transposed_matmul(first: Any, second: Any, values: _Values, add: Add) -> Ref:
    def turned(value: Any) -> Ref:
        return add(operation("Swapaxes", "numpy", axis1=-1, axis2=-2), [value])

    first = turned(first) if values.take(9, "transpose_a", "adjoint_a") else first
    second = turned(second) if values.take(9, "transpose_b", "adjoint_b") else second
    return add(operation("Matmul", "numpy"), [first, second])


def _transpose(values: _Values, add: Add) -> Ref | None:
    axes = values.take(1, "perm")
    return add(operation("Transpose", "numpy", axes=axes), [values.first])


def _reshape(values: _Values, add: Add) -> Ref | None:
    shape = values.take(1, "shape")
    if not isinstance(shape, (list, tuple)) or refs(shape):
        return None
    return add(operation("Reshape", "numpy", newshape=list(shape)), [values.first])


def _concat(values: _Values, add: Add) -> Ref | None:
    tensors, axis = values.take(0, "values"), values.take(1, "axis", default=-1)
    return add(operation("Concatenate", "numpy", axis=axis), [tensors])


def _raw_concat(values: _Values, add: Add) -> Ref | None:
    *tensors, axis = values.all_args()
    return add(operation("Concatenate", "numpy", axis=axis), [tensors])


def _stack(values: _Values, add: Add) -> Ref | None:
    return add(operation("Stack", "numpy", axis=values.take(1, "axis", default=0)), [values.take(0, "values")])


def _expand(values: _Values, add: Add) -> Ref | None:
    return add(operation("ExpandDims", "numpy", axis=values.take(1, "axis", "dim", default=-1)), [values.first])


def _squeeze(values: _Values, add: Add) -> Ref | None:
    return add(operation("Squeeze", "numpy", axis=values.take(1, "axis", "squeeze_dims")), [values.first])


def _cast(values: _Values, add: Add) -> Ref | None:
    dtype = values.take(1, "dtype", "DstT")
    return add(operation("Cast", "core", dtype=dtype), [values.first]) if isinstance(dtype, str) else None


def _clip(values: _Values, add: Add) -> Ref | None:
    low, high = values.take(1, "clip_value_min", "min"), values.take(2, "clip_value_max", "max")
    if refs([low, high]):
        return None
    return add(operation("Clip", "numpy", x_min=low, x_max=high), [values.take(0, "t", "x")])


def _softmax(class_name: str) -> Callable[[_Values, Add], Ref | None]:
    def rule(values: _Values, add: Add) -> Ref | None:
        return add(operation(class_name, "nn", axis=values.take(1, "axis", "dim", default=-1)), [values.first])

    return rule


def _leaky_relu(values: _Values, add: Add) -> Ref | None:
    slope = values.take(1, "alpha", default=0.2)
    return add(operation("LeakyRelu", "nn", negative_slope=slope), [values.first])


def _gelu(values: _Values, add: Add) -> Ref | None:
    return add(operation("Gelu", "nn", approximate=bool(values.take(1, "approximate", default=False))), [values.first])


def _where(values: _Values, add: Add) -> Ref | None:
    condition, first, second = values.take(0, "condition"), values.take(1, "x"), values.take(2, "y")
    if first is None or second is None:
        return None
    return add(operation("Where", "numpy"), [condition, first, second])


def _argument(class_name: str) -> Callable[[_Values, Add], Ref | None]:
    def rule(values: _Values, add: Add) -> Ref | None:
        axis = values.take(1, "axis", "dimension", default=0)
        return add(operation(class_name, "numpy", axis=axis, keepdims=False), [values.first])

    return rule


def _tile(values: _Values, add: Add) -> Ref | None:
    repeats = values.take(1, "multiples")
    return None if refs(repeats) else add(operation("Tile", "numpy", repeats=repeats), [values.first])


def _pad(values: _Values, add: Add) -> Ref | None:
    width = values.take(1, "paddings")
    mode = str(values.take(2, "mode", default="CONSTANT")).lower()
    constant = values.take(3, "constant_values", default=0)
    if refs(width):
        return None
    kwargs = {"constant_values": constant} if mode == "constant" else {}
    return add(operation("Pad", "numpy", pad_width=width, mode=mode), [values.take(0, "tensor")], kwargs)


def _normalize(values: _Values, add: Add) -> Ref | None:
    axis, epsilon = values.take(1, "axis", "dim", default=-1), values.take(2, "epsilon", default=1e-12)
    return add(operation("Normalize", "nn", axis=axis, order=2, epsilon=float(epsilon) ** 0.5), [values.first])


def _one_hot(values: _Values, add: Add) -> Ref | None:
    classes = values.take(1, "depth")
    settings = {"num_classes": classes, "axis": values.take(4, "axis", default=-1), "dtype": "float32", "sparse": False}
    return add(operation("OneHot", "nn", **settings), [values.take(0, "indices")])


def _gather(values: _Values, add: Add) -> Ref | None:
    axis = values.take(3, "axis", default=0)
    return add(operation("Take", "numpy", axis=axis), [values.take(0, "params"), values.take(1, "indices")])


def _cumsum(values: _Values, add: Add) -> Ref | None:
    axis = values.take(1, "axis", default=0)
    return add(operation("Cumsum", "numpy", axis=axis, dtype=None), [values.first])


def _same(values: _Values, add: Add) -> Ref | None:
    return add(Part("Identity", {}, module=LAYERS), [values.first])


def _add_many(values: _Values, add: Add) -> Ref | None:
    tensors = values.take(0, "inputs")
    return add(Part("Add", {}, module=LAYERS), [tensors]) if isinstance(tensors, list) else None


def _bias(values: _Values, add: Add) -> Ref | None:
    return add(operation("Add", "numpy"), [values.take(0, "value"), values.take(1, "bias")])


def _resize(values: _Values, add: Add) -> Ref | None:
    size = values.take(1, "size")
    method = values.take(2, "method", default="bilinear")
    if not isinstance(size, list) or refs(size) or not isinstance(method, str):
        return None
    antialias = bool(values.take(4, "antialias", default=False))
    return add(operation("Resize", "image", size=size, interpolation=method, antialias=antialias), [values.first])


def _depth(class_name: str) -> Callable[[_Values, Add], Ref | None]:
    def rule(values: _Values, add: Add) -> Ref | None:
        block = values.take(1, "block_size")
        return add(operation(class_name, "nn", block_size=block, data_format="channels_last"), [values.first])

    return rule


def _getitem(values: _Values, add: Add, rank: int) -> Ref | None:
    """`x[…]`: slices as current Keras writes them; an ellipsis is spelled out, which Keras reads from no file."""
    spec = values.take(1, "slice_spec")
    items = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    places = [number for number, item in enumerate(items) if "llipsis" in str(item)]
    if len(places) == 1 and rank:
        whole = {"start": None, "stop": None, "step": None}
        own = sum(item is not None for item in items) - 1
        items[places[0] : places[0] + 1] = [whole] * (rank - own)
    elif places:
        return None
    found = [_slice(item) for item in items]
    if any(new is None and old is not None for new, old in zip(found, items, strict=True)):
        return None
    key = found if isinstance(spec, (list, tuple)) else found[0]
    return add(operation("GetItem", "numpy"), [values.take(0, "tensor", "x"), key])


def _slice(item: Any) -> Any:
    """One entry of a key; None for what is not known (and for None, a new axis)."""
    if isinstance(item, Mapping) and {"start", "stop", "step"} <= item.keys():
        ends = {key: item[key] for key in ("start", "stop", "step")}
        return None if refs(ends) else {"class_name": "__slice__", "config": ends}
    if isinstance(item, Mapping) and item.get("class_name") == "__slice__":
        return dict(item)
    return item if isinstance(item, int) and not isinstance(item, bool) else None


_SINGLE: dict[str, Callable[[_Values, Add], Ref | None]] = {
    **dict.fromkeys(("transpose", "Transpose"), _transpose),
    **dict.fromkeys(("reshape", "Reshape"), _reshape),
    "concat": _concat,
    "ConcatV2": _raw_concat,
    "stack": _stack,
    **dict.fromkeys(("expand_dims", "ExpandDims", "expand_dims_v2"), _expand),
    "squeeze": _squeeze,
    **dict.fromkeys(("cast", "Cast"), _cast),
    "clip_by_value": _clip,
    **dict.fromkeys(("nn.softmax", "Softmax", "nn.softmax_v2"), _softmax("Softmax")),
    "nn.log_softmax": _softmax("LogSoftmax"),
    "nn.leaky_relu": _leaky_relu,
    "nn.gelu": _gelu,
    **dict.fromkeys(("where", "where_v2"), _where),
    **dict.fromkeys(("math.argmax", "argmax"), _argument("Argmax")),
    **dict.fromkeys(("math.argmin", "argmin"), _argument("Argmin")),
    "tile": _tile,
    "pad": _pad,
    **dict.fromkeys(("math.l2_normalize", "linalg.l2_normalize", "nn.l2_normalize"), _normalize),
    "one_hot": _one_hot,
    "gather": _gather,
    "math.cumsum": _cumsum,
    **dict.fromkeys(("identity", "stop_gradient", "Identity"), _same),
    "math.add_n": _add_many,
    **dict.fromkeys(("nn.bias_add", "BiasAdd"), _bias),
    "image.resize": _resize,
    "nn.space_to_depth": _depth("SpaceToDepth"),
    "nn.depth_to_space": _depth("DepthToSpace"),
}
