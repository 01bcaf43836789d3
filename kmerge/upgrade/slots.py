"""Where current Keras stores the weights of a layer in a `.keras` file, in the order in which it lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge.dialects.reading import Dialect, has_graph, read_model
from kmerge.dialects.vocabulary import stored_class, weight_specs
from kmerge.source import Weight


@dataclass(frozen=True)
class Slot:
    """A place for one weight: its path under the layer, its name, and whether Keras lists it among the trainable."""

    key: str
    name: str
    trainable: bool = True


_CELLS = frozenset({"SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"})


def slots(class_name: str, config: Mapping[str, Any], prefix: str = "") -> list[Slot] | None:
    """Slots of a layer and of the layers inside it, those of current Keras; None for a class that is not known."""
    if class_name in _CELLS:
        return _own(("kernel", "recurrent_kernel", *_bias(config)), f"{prefix}cell/")
    if class_name in ("SimpleRNNCell", "LSTMCell", "GRUCell"):
        return _own(("kernel", "recurrent_kernel", *_bias(config)), prefix)
    if class_name == "Bidirectional":
        forward = _inner(config.get("layer"), f"{prefix}forward_layer/")
        backward = _inner(config.get("backward_layer") or config.get("layer"), f"{prefix}backward_layer/")
        return _joined(forward, backward)
    if class_name == "TimeDistributed":
        return _inner(config.get("layer"), f"{prefix}layer/")
    if class_name == "SpectralNormalization":
        own = [Slot(f"{prefix}vars/0", "vector_u", False)]
        return _joined(_inner(config.get("layer"), f"{prefix}layer/"), own)
    if class_name == "RNN":
        return _inner(config.get("cell"), f"{prefix}cell/")
    if class_name == "StackedRNNCells":
        return _numbered(config.get("cells"), f"{prefix}cells/")
    if class_name in ("Sequential", "Functional", "Model"):
        return _model({"class_name": class_name, "config": config}, prefix)
    if class_name == "MultiHeadAttention":
        parts = ("query_dense", "key_dense", "value_dense", "output_dense")
        return [slot for part in parts for slot in _own(("kernel", *_bias(config)), f"{prefix}{part}/")]
    if class_name in ("Attention", "AdditiveAttention"):
        names = ("scale",) if config.get("use_scale", class_name == "AdditiveAttention") else ()
        return _own((*names, *(("concat_score_weight",) if config.get("score_mode") == "concat" else ())), prefix)
    if class_name in ("StringLookup", "IntegerLookup", "TextVectorization", "Discretization"):
        return None
    specs = weight_specs(class_name, config)
    if specs is None:
        return [] if class_name in _WITHOUT else None
    return [Slot(f"{prefix}vars/{number}", spec.name, spec.trainable) for number, spec in enumerate(specs)]


_WITHOUT = frozenset({"RandomApply", "Pipeline"})


def _bias(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("bias",) if config.get("use_bias", True) else ()


def _own(names: tuple[str, ...], prefix: str) -> list[Slot]:
    return [Slot(f"{prefix}vars/{number}", name) for number, name in enumerate(names)]


def _joined(*parts: list[Slot] | None) -> list[Slot] | None:
    """The slots of several layers: trainable ones first, as Keras lists a layer's weights."""
    if any(part is None for part in parts):
        return None
    found = [slot for part in parts for slot in part or ()]
    return [slot for slot in found if slot.trainable] + [slot for slot in found if not slot.trainable]


def _inner(entry: Any, prefix: str) -> list[Slot] | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), Mapping):
        return None
    return _joined(slots(str(entry.get("class_name")), entry["config"], prefix))


def _numbered(entries: Any, prefix: str) -> list[Slot] | None:
    counts: dict[str, int] = {}
    found: list[list[Slot] | None] = []
    for entry in entries if isinstance(entries, list) else []:
        snake = stored_class(str(entry.get("class_name")))
        number = counts.get(snake, 0)
        counts[snake] = number + 1
        found.append(_inner(entry, f"{prefix}{snake}_{number}/" if number else f"{prefix}{snake}/"))
    return _joined(*found)


def _model(entry: Mapping[str, Any], prefix: str) -> list[Slot] | None:
    if not has_graph(entry):
        return None
    nested = read_model(entry, Dialect.KERAS3)
    counts: dict[str, int] = {}
    found: list[list[Slot] | None] = []
    for index in nested.order():
        layer = nested.graph.layers[index]
        snake = stored_class(layer.class_name)
        number = counts.get(snake, 0)
        counts[snake] = number + 1
        place = f"{prefix}layers/{snake}_{number}/" if number else f"{prefix}layers/{snake}/"
        found.append(_joined(slots(layer.class_name, layer.config, place)))
    return _joined(*found)


def listed_weights(class_name: str, config: Mapping[str, Any], weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Weights that a file has by path in the order in which Keras lists them; as they are for an unknown class.

    tf.keras 2.12 to 2.15 write underscores before some names in paths (`_query_dense`).
    """
    places = {slot.key: number for number, slot in enumerate(slots(class_name, config) or ())}
    keys = ["/".join(part.lstrip("_") for part in weight.key.split("/")) for weight in weights]
    if not all(key in places for key in keys):
        return tuple(weights)
    return tuple(weight for _, weight in sorted(zip((places[key] for key in keys), weights, strict=True), key=_first))


def _first(pair: tuple[int, Weight]) -> int:
    return pair[0]
