"""The sources laid over the first, and the network of one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kmerge.dialects.vocabulary import RANDOM
from kmerge.errors import FormatError
from kmerge.graph import Graph, refs
from kmerge.matching import Difference, Match, identity, layer_difference, match
from kmerge.source import Source


@dataclass(frozen=True)
class Layout:
    """The sources laid over the first: one match per source, the first with itself."""

    sources: tuple[Source, ...]
    matches: tuple[Match, ...]

    @property
    def first(self) -> Source:
        return self.sources[0]

    def difference(self, layer: int) -> tuple[Source, Difference] | None:
        """The first source in which something forbids the layer to be shared, and what."""
        for source, found in zip(self.sources[1:], self.matches[1:], strict=True):
            different = layer_difference(self.first, source, found, layer)
            if different:
                return source, different
        return None


def lay_out(sources: Sequence[Source]) -> Layout:
    """Match all sources to the first.

    Raises:
        FormatError: if one holds no graph.
    """
    for source in sources:
        if source.graph is None:
            raise FormatError(
                f"'{source.name}' holds no graph ({source.warnings[0] if source.warnings else 'weights only'}): "
                "only --trunk all can merge it, or give the architecture with --base FILE."
            )
    assert sources[0].graph is not None
    matches = [identity(sources[0].graph), *(match(sources[0], source) for source in sources[1:])]
    return Layout(tuple(sources), tuple(matches))


def source_graph(source: Source) -> Graph:
    assert source.graph is not None
    return source.graph


def head_layers(source: Source) -> set[int]:
    """The layers of the heads: the last ones with weights before each output, and whatever depends on them."""
    graph = source_graph(source)
    heads: set[int] = set()
    seen: set[int] = set()
    waiting = [ref.call for ref in refs(graph.outputs)]
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        layer = graph.calls[number].layer
        if source.states[layer].weights and graph.layers[layer].class_name not in RANDOM:
            heads.add(layer)
        else:
            waiting.extend(ref.call for ref in refs(graph.calls[number].arguments))
    # Whatever depends on a head is one: followed call by call, because one activation may stand in trunk and head.
    grown = True
    while grown:
        grown = False
        behind: set[int] = set()
        for number, call in enumerate(graph.calls):
            if call.layer in heads or any(ref.call in behind for ref in refs(call.arguments)):
                behind.add(number)
                if call.layer not in heads and not is_plain(source, call.layer):
                    heads.add(call.layer)
                    grown = True
    return heads | {graph.calls[n].layer for n in behind if _only_behind(graph, graph.calls[n].layer, behind)}


def _only_behind(graph: Graph, layer: int, behind: set[int]) -> bool:
    return all(number in behind for number in graph.calls_of(layer))


def is_plain(source: Source, layer: int) -> bool:
    """Whether a layer has neither weights nor randomness: it is shared wherever its inputs are, call by call."""
    return not source.states[layer].weights and source_graph(source).layers[layer].class_name not in RANDOM
