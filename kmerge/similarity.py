"""Do the sources share an ancestor? The cosine between their weights tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kmerge.dialects.vocabulary import WeightKind
from kmerge.layout import Layout
from kmerge.methods.registry import Array
from kmerge.source import Source, Weight
from kmerge.store import numpy_dtype

RELATED = 0.4
"""Cosine from which sources count as related: see `benchmarks/README.md` for what real sets show."""
SAMPLE = 1 << 17
"""Entries of each weight that are looked at: enough to tell a cosine to about 0.003."""
_BLOCK = 1 << 14


@dataclass(frozen=True)
class LayerCosine:
    """Cosine between sources of one layer's weights.

    Attributes:
        layer: number in the first source.
        lowest, mean: over all pairs of sources; NaN where the layer has no weights to compare.
        entries: how many numbers were compared per source.
        kernels: whether they are of kernels (two axes or more), which tell ancestry; biases and scales do not, because
            they start equal in every network.
    """

    layer: int
    lowest: float
    mean: float
    entries: int
    kernels: bool


def sample(weight: Weight, entries: int = SAMPLE) -> Array:
    """Some entries of a weight as float64: all of a small one, evenly spaced blocks of a large one; always the same."""
    tensor = weight.tensor
    dtype = numpy_dtype(tensor.dtype)
    if tensor.size <= entries:
        values = np.empty(tensor.size, dtype=dtype)
        tensor.read_into(0, values)
        return _numbers(values)
    block = min(_BLOCK, entries)
    blocks = entries // block
    values = np.empty((blocks, block), dtype=dtype)
    last = tensor.size - block
    for number, row in enumerate(values):
        tensor.read_into(last * number // max(1, blocks - 1), row)
    return _numbers(values.ravel())


def _numbers(values: Array) -> Array:
    """Values as float64; the bytes of those whose type is not known."""
    return (values.view(np.uint8) if values.dtype.type is np.void else values).astype(np.float64)


def cosine(first: Array, second: Array) -> float:
    """Cosine of the angle between two arrays; NaN where one is zero or not finite."""
    with np.errstate(all="ignore"):
        lengths = math.sqrt(_dot(first, first)) * math.sqrt(_dot(second, second))
        return _dot(first, second) / lengths if lengths > 0 and math.isfinite(lengths) else math.nan


def _dot(first: Array, second: Array) -> float:
    """Scalar product without BLAS, whose threads would wait in a loop for a core that others need."""
    return float(np.einsum("i,i->", first, second))


def layer_cosines(layout: Layout, layers: Sequence[int], entries: int = SAMPLE) -> list[LayerCosine]:
    """Cosines of the given layers of the first source with their counterparts, weight by weight.

    Kernels are compared where a layer has some, else whatever floating point weights it has.
    """
    result = []
    for layer in layers:
        if any(layer not in found.layers for found in layout.matches):
            continue
        lists = [
            source.states[found.layers[layer]].weights
            for source, found in zip(layout.sources, layout.matches, strict=True)
        ]
        floats = [n for n, weight in enumerate(lists[0]) if weight.kind is WeightKind.WEIGHT]
        chosen = [n for n in floats if len(lists[0][n].tensor.shape) >= 2] or floats
        kernels = bool(chosen) and len(lists[0][chosen[0]].tensor.shape) >= 2
        shapes = [[weights[n].tensor.shape for n in chosen] for weights in lists if len(weights) == len(lists[0])]
        if not chosen or len(shapes) != len(lists) or any(row != shapes[0] for row in shapes):
            continue
        arrays = [np.concatenate([sample(weights[n], entries) for n in chosen]) for weights in lists]
        values = [cosine(one, two) for one, two in combinations(arrays, 2)]
        known = [value for value in values if not math.isnan(value)]
        lowest, mean = (min(known), sum(known) / len(known)) if known else (math.nan, math.nan)
        result.append(LayerCosine(layer, lowest, mean, arrays[0].size, kernels))
    return result


def flat_cosines(sources: Sequence[Source]) -> list[LayerCosine]:
    """The same for files without a graph: weight by weight, by their places in the file."""
    by_key = [{weight.key: weight for weight in source.states[0].weights} for source in sources]
    result = []
    for number, weight in enumerate(sources[0].states[0].weights):
        if weight.kind is WeightKind.WEIGHT and len(weight.tensor.shape) >= 2:
            arrays = [sample(weights[weight.key]) for weights in by_key]
            values = [value for one, two in combinations(arrays, 2) if not math.isnan(value := cosine(one, two))]
            if values:
                result.append(LayerCosine(number, min(values), sum(values) / len(values), arrays[0].size, True))
    return result


@dataclass(frozen=True)
class Ancestry:
    """Whether sources share an ancestor.

    Attributes:
        related: True, False, or None where there is nothing to tell it by.
        cosine: the lowest over pairs, averaged over kernels by their number of entries.
    """

    related: bool | None
    cosine: float


def ancestry(cosines: Sequence[LayerCosine]) -> Ancestry:
    """Weigh the kernels' cosines by their entries; small kernels agree by chance."""
    kernels = [item for item in cosines if item.kernels and not math.isnan(item.lowest)]
    entries = sum(item.entries for item in kernels)
    if not entries:
        return Ancestry(None, math.nan)
    value = sum(item.lowest * item.entries for item in kernels) / entries
    return Ancestry(value >= RELATED, value)
