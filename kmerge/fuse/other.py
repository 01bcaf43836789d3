"""Embeddings, separable convolutions, and attention without heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.attention import score_weights
from kmerge.fuse.batches import FEW
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.design import ConvolutionRows, DenseRows, Linear, linear_rows
from kmerge.fuse.linear import LEAST_ROWS, ROWS_PER_COLUMN, Columns, Found, side_by_side
from kmerge.fuse.mixing import reached
from kmerge.graph import Ref, refs
from kmerge.methods.registry import Array
from kmerge.shapes.calls import inputs_of
from kmerge.shapes.layers import is_keras

EMBEDDINGS = ("Embedding", "ReversibleEmbedding")
_SCORES = 20_000
"""Rows of scores, and at most this many numbers at a time, times 16, of so many inputs of every 48."""


@dataclass(eq=False)
class EmbeddingTask:
    """Vectors of words: merged columns are exactly what the units that became one give, so there is nothing to fit."""

    context: Context
    layer: int
    at: int
    sees: tuple[Ref, ...] = ()
    reads: tuple[Ref, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def sites(self) -> Sequence[Site]:
        context, found = self.context, list[Found]()
        if context.origin(self.layer).role != "shared":
            return ()
        members, place = dict(context.origin(self.layer).members), 0
        for call in context.calls(self.layer):
            if is_reversed(context, call):
                continue
            for source, ref in context.seen(call):
                uses = context.frame.uses.get((source, members[source], place), {}).get(1, ())
                found.append((source, ref, DenseRows(False), {space: use.places for space, use in uses}))
        return side_by_side(found, len(context.frame.sources))

    def run(self, passes: Passes) -> str:
        return f"{self.context.layer(self.layer).name}: columns merged"


def is_reversed(context: Context, call: int) -> bool:
    """Whether a call of an embedding goes from vectors to words."""
    return inputs_of(context.merged.graph.calls[call].arguments, {}).argument("reverse", 1) is True


@dataclass(eq=False)
class SeparableTask:
    """A separable convolution: first its depthwise part, channel by channel, then what mixes the channels."""

    context: Context
    layer: int
    at: int
    spread: ConvolutionRows

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def _source_input(self, ref: Ref) -> Ref:
        found = refs(self.context.every.merged.graph.calls[ref.call].arguments)[0]
        return Ref(found.call, found.output)

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        found = [ref for call in self.context.calls(self.layer) for _, ref in self.context.results(call)]
        return tuple(dict.fromkeys([*found, *map(self._source_input, found)]))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(self.context.input(call) for call in self.context.calls(self.layer)))

    def sites(self) -> Sequence[Site]:
        context, found = self.context, list[Found]()
        if context.origin(self.layer).role != "shared":
            return ()
        place, members = context.weights(self.layer)["pointwise_kernel"], dict(context.origin(self.layer).members)
        for call in context.calls(self.layer):
            for source, ref in context.results(call):
                own = (source, members[source], place)
                uses = context.frame.uses.get(own, {}).get(len(context.frame.shape(own)) - 1, ())
                found.append((source, ref, self.spread, {space: use.places for space, use in uses}))
        return side_by_side(found, len(context.frame.sources))

    def run(self, passes: Passes) -> str:
        context, layer, names = self.context, self.layer, self.context.weights(self.layer)
        depthwise, pointwise = names["depthwise_kernel"], names["pointwise_kernel"]
        members = dict(context.origin(layer).members)
        stored = {
            source: self.spread.matrix(context.stored(source, own, depthwise).astype(np.float64))
            for source, own in members.items()
        }
        shape = context.values[layer, depthwise].shape
        guess = self.spread.matrix(context.values[layer, depthwise])
        channels, taps, times = guess.shape
        calls = context.calls(layer)
        kinds = [tuple(source for source, _ in context.results(call)) for call in calls]
        known = {kind: context.several(layer, [(depthwise, len(shape) - 2)], kind) for kind in dict.fromkeys(kinds)}
        valid = [reached([*own.values()]) for own in known.values()]
        fits = [Columns(taps, [np.repeat(own[channel], times) for own in valid]) for channel in range(channels)]
        for theirs, ours, away in passes.again():
            for call, kind in zip(calls, kinds, strict=True):
                seen = context.results(call)
                inputs = to_numpy(ours[context.input(call)])
                rows = len(self.spread.outputs(to_numpy(theirs[seen[0][1]])))
                picked = passes.pick(rows, len(away), LEAST_ROWS / context.examples)
                design = self.spread.rows(inputs, picked)
                target = np.zeros((len(picked), channels, times))
                for source, ref in seen:
                    own = self.spread.rows(to_numpy(theirs[self._source_input(ref)]), picked).astype(np.float64)
                    made = np.einsum("rct,ctm->rcm", own, stored[source])
                    target += np.swapaxes(np.swapaxes(made, 1, 2) @ known[kind][source], 1, 2)
                back = away[picked // (rows // len(away))]
                for channel, fit in enumerate(fits):
                    fit.add(list(known).index(kind), design[:, channel], target[:, channel], back)
        solved = np.stack([fit.solve(guess[channel], False).kernel for channel, fit in enumerate(fits)])
        context.set(layer, depthwise, self.spread.kernel(solved, shape))
        return self._mix(passes, solved, pointwise)

    def _mix(self, passes: Passes, spread: Array, place: int) -> str:
        """Fit the pointwise part to what the layer should give, from what the depthwise part really gives."""
        context, layer, names = self.context, self.layer, self.context.weights(self.layer)
        value = context.values[layer, place]
        width, outputs = value.shape[-2:]
        calls = context.calls(layer)
        kinds = [tuple(source for source, _ in context.results(call)) for call in calls]
        known = {kind: context.several(layer, [(place, value.ndim - 1)], kind) for kind in dict.fromkeys(kinds)}
        fit = Columns(width, [reached([*own.values()]) for own in known.values()])
        wanted = max(LEAST_ROWS, ROWS_PER_COLUMN * width) / context.examples
        for theirs, ours, away in passes:
            for call, kind in zip(calls, kinds, strict=True):
                seen = [(source, self.spread.outputs(to_numpy(theirs[ref]))) for source, ref in context.results(call)]
                rows = len(seen[0][1])
                picked = passes.pick(rows, len(away), wanted)
                design = self.spread.rows(to_numpy(ours[context.input(call)]), picked).astype(np.float64)
                design = np.einsum("rct,ctm->rcm", design, spread).reshape(len(picked), -1)
                target = sum(values[picked].astype(np.float64) @ known[kind][source] for source, values in seen)
                back = away[picked // (rows // len(away))]
                fit.add(list(known).index(kind), design, np.asarray(target), back)
        solved = fit.solve(value.reshape(width, outputs), "bias" in names)
        context.set(layer, place, solved.kernel.reshape(value.shape))
        if "bias" in names:
            context.set(layer, names["bias"], solved.offset)
        return f"{context.layer(layer).name}: {width} to {outputs}, {solved.explained:.4f} explained"


@dataclass(eq=False)
class ScoreTask:
    """Attention or AdditiveAttention: its scores are linear in one of its weights, and only their differences count."""

    context: Context
    layer: int
    at: int
    class_name: str

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def _given(self, call: int, merged: bool) -> list[Ref]:
        graph = self.context.merged.graph if merged else self.context.every.merged.graph
        inputs = inputs_of(graph.calls[call].arguments, {})
        found = refs(inputs.argument("inputs", 0) or list(inputs.positional))[:3]
        return [Ref(ref.call, ref.output) for ref in found]

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        context = self.context
        seen = [ref for call in context.calls(self.layer) for _, ref in context.seen(call)]
        return tuple(dict.fromkeys(own for ref in seen for own in self._given(ref.call, False)))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(ref for call in self.context.calls(self.layer) for ref in self._given(call, True)))

    def sites(self) -> Sequence[Site]:
        return ()

    def _features(self, tensors: Sequence[Array], inner: float) -> Array:
        """What the scores are linear in, less its mean over the keys, shape (batch, queries, keys, features)."""
        query, key = tensors[0].astype(np.float64), tensors[-1].astype(np.float64)
        if self.class_name == "AdditiveAttention":
            found = np.tanh(query[:, :, None] + key[:, None])
        elif self.context.layer(self.layer).config.get("score_mode") == "concat":
            found = np.tanh(inner * (query[:, :, None] + key[:, None])).sum(axis=-1, keepdims=True)
        else:
            found = (query @ key.transpose(0, 2, 1))[..., None]
        return np.asarray(found - found.mean(axis=2, keepdims=True))

    def run(self, passes: Passes) -> str:
        context, layer = self.context, self.layer
        names, members = list(context.weights(layer).values()), dict(context.origin(layer).members)
        place = names[-1]  # the scale, or what comes behind it
        inner = {s: float(context.stored(s, own, names[0])) if len(names) > 1 else 1.0 for s, own in members.items()}
        ours_inner = float(context.values[layer, names[0]]) if len(names) > 1 else 1.0
        guess = np.asarray(context.values[layer, place], dtype=np.float64)
        fit = Columns(max(guess.size, 1), [np.ones(1, dtype=bool)])
        for theirs, ours, away in passes:
            for call in context.calls(layer):
                seen = context.seen(call)
                query, key = (ours[ref].shape for ref in (self._given(call, True)[n] for n in (0, -1)))
                each = int(query[1] * key[1])
                few = max(1, min(FEW, 16 * _SCORES // max(1, each * int(query[2]))))
                total = sum(context.shares[source] for source, _ in seen) or 1.0
                for start in range(0, len(away), FEW):
                    part = slice(start, min(start + few, len(away)))
                    x = self._features([to_numpy(ours[ref])[part] for ref in self._given(call, True)], ours_inner)
                    target: Array = np.zeros(x.shape[:3])
                    for source, ref in seen:
                        own = [to_numpy(theirs[one])[part] for one in self._given(ref.call, False)]
                        weight = context.stored(source, members[source], place).astype(np.float64).reshape(-1)
                        target += context.shares[source] / total * (self._features(own, inner[source]) @ weight)
                    count, x, target = len(x), x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
                    picked = passes.pick(len(x), count, _SCORES / context.examples)
                    fit.add(0, x[picked], target[picked], away[part][picked // each])
        solved = fit.solve(guess.reshape(-1, 1), False)
        context.set(layer, place, solved.kernel.reshape(guess.shape))
        return f"{context.layer(layer).name}: scores, {solved.explained:.4f} explained"


def other_tasks(context: Context) -> list[EmbeddingTask | SeparableTask | ScoreTask]:
    """Tasks for embeddings, separable convolutions and attention without heads."""
    graph = context.merged.graph
    found: dict[int, EmbeddingTask | SeparableTask | ScoreTask] = {}
    scores = score_weights(context)
    for number, call in enumerate(graph.calls):
        own, names = graph.layers[call.layer], context.weights(call.layer)
        if call.layer in found or not names or not is_keras(own.class_name, own.entry):
            continue
        if own.class_name in EMBEDDINGS:
            back = any(is_reversed(context, other) for other in graph.calls_of(call.layer))
            plain = "embeddings" in names or own.class_name == "ReversibleEmbedding"  # whose weights have no names
            if plain and len(names) <= 2 and not (len(names) == 1 and back):
                found[call.layer] = EmbeddingTask(context, call.layer, number)
        elif own.class_name in ("SeparableConv1D", "SeparableConv2D"):
            spread = _spread(own.class_name, own.config)
            if {"depthwise_kernel", "pointwise_kernel"} <= set(names) <= {
                "depthwise_kernel",
                "pointwise_kernel",
                "bias",
            } and isinstance(spread, ConvolutionRows):
                found[call.layer] = SeparableTask(context, call.layer, number, spread)
        elif call.layer in scores:
            found[call.layer] = ScoreTask(context, call.layer, number, own.class_name)
    return list(found.values())


def _spread(class_name: str, config: Mapping[str, Any]) -> Linear | None:
    """The depthwise part of a separable convolution."""
    found = linear_rows(class_name.replace("Separable", "Depthwise"), config)
    return replace(found, bias=False) if found is not None else None
