"""How alike sources are, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmerge.graph import Graph, parents
from kmerge.layout import Layout, head_layers, source_graph
from kmerge.similarity import Ancestry, ancestry, layer_cosines, sample

MEANING = {
    True: "The sources share an ancestor: the mean of their weights keeps what they know.",
    False: "The sources do not share an ancestor: a mean of their weights would lose what each of them knows.",
    None: "There are no common kernels by which to tell whether the sources share an ancestor.",
}


@dataclass(frozen=True)
class LayerComparison:
    """One position.

    Attributes:
        name, class_name: in the first source.
        names: in every source, None where one has no counterpart.
        difference: what forbids sharing it, "" where nothing does.
        differs: in one word: place, shape, configuration, call or state; "" where nothing does. A layer of which only
            the state differs stays private by itself.
        cosine: mean over pairs of sources, None without weights to compare.
        lowest: the lowest of the pairs.
        kernels: whether kernels were compared; biases and scales are alike in every network, and tell little.
        trunk_can_end: whether a trunk up to and including this layer can be shared.
        default: whether the default trunk holds it.
    """

    name: str
    class_name: str
    names: tuple[str | None, ...]
    difference: str
    differs: str
    cosine: float | None
    lowest: float | None
    kernels: bool
    trunk_can_end: bool
    default: bool


@dataclass(frozen=True)
class Comparison:
    """What `kmerge compare` shows."""

    labels: tuple[str, ...]
    layers: tuple[LayerComparison, ...]
    same_network: bool
    ancestry: Ancestry
    identical: tuple[tuple[str, str], ...]
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """JSON, as `kmerge compare --json` prints it."""
        cosine = None if math.isnan(self.ancestry.cosine) else self.ancestry.cosine
        found: Mapping[str, Any] = {
            **vars(self),
            "ancestry": {"related": self.ancestry.related, "cosine": cosine},
            "layers": [vars(layer) for layer in self.layers],
        }
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def compare_sources(layout: Layout) -> Comparison:
    """Lay the sources over each other and measure every position; reads all weights that are compared."""
    graph = source_graph(layout.first)
    everything = list(range(len(graph.layers)))
    cosines = {item.layer: item for item in layer_cosines(layout, everything)}
    differences: dict[int, str] = {}
    kinds: dict[int, str] = {}
    for number in everything:
        found = layout.difference(number)
        if found:
            source, different = found
            kinds[number] = different.kind
            if different.kind == "place":
                differences[number] = f"no counterpart in '{source.label}'"
            else:
                differences[number] = different.sentence(layout.first.label, source.label)
    blocked = blocked_layers(graph, {number for number, kind in kinds.items() if kind != "state"})
    heads = head_layers(layout.first)
    layers = []
    for number in everything:
        layer, item = graph.layers[number], cosines.get(number)
        names = tuple(
            source_graph(source).layers[found.layers[number]].name if number in found.layers else None
            for source, found in zip(layout.sources, layout.matches, strict=True)
        )
        known = item is not None and not math.isnan(item.mean)
        layers.append(
            LayerComparison(
                name=layer.name,
                class_name=layer.class_name,
                names=names,
                difference=differences.get(number, ""),
                differs=kinds.get(number, ""),
                cosine=item.mean if item is not None and known else None,
                lowest=item.lowest if item is not None and known else None,
                kernels=item is not None and item.kernels,
                trunk_can_end=not (number in blocked or number in differences or layer.is_input),
                default=number not in heads,
            )
        )
    trunk = [item for number, item in cosines.items() if number not in heads] or list(cosines.values())
    kinship = ancestry(trunk)
    sizes = {len(source_graph(source).layers) for source in layout.sources}
    return Comparison(
        labels=tuple(source.label for source in layout.sources),
        layers=tuple(layers),
        same_network=not differences and len(sizes) == 1,
        ancestry=kinship,
        identical=_identical(layout),
        meaning=MEANING[kinship.related],
    )


def blocked_layers(graph: Graph, blocking: set[int]) -> set[int]:
    """The layers that depend on one of those that cannot be shared, themselves included."""
    behind: set[int] = set()
    for number, call in enumerate(graph.calls):  # in topological order
        if call.layer in blocking or not behind.isdisjoint(parents(graph, number)):
            behind.add(number)
    return {graph.calls[number].layer for number in behind}


def _identical(layout: Layout) -> tuple[tuple[str, str], ...]:
    """Pairs of sources whose weights are all equal: one model under two names."""
    pairs = []
    for number, one in enumerate(layout.sources):
        for other in range(number + 1, len(layout.sources)):
            pair = Layout(
                (one, layout.sources[other]),
                (layout.matches[number], layout.matches[other]),
            )
            if _all_equal(pair):
                pairs.append((one.label, layout.sources[other].label))
    return tuple(pairs)


def _all_equal(pair: Layout) -> bool:
    one, two = pair.sources
    shared = [layer for layer in pair.matches[0].layers if layer in pair.matches[1].layers]
    if len(shared) != len(source_graph(one).layers) or len(shared) != len(source_graph(two).layers):
        return False
    for layer in shared:
        mine = one.states[pair.matches[0].layers[layer]].weights
        theirs = two.states[pair.matches[1].layers[layer]].weights
        if [weight.tensor.shape for weight in mine] != [weight.tensor.shape for weight in theirs]:
            return False
        if not all(np.array_equal(sample(a), sample(b), equal_nan=True) for a, b in zip(mine, theirs, strict=True)):
            return False
    return True
