"""Attention: heads of the sources that together tell most, imitated by those of the merged layer.

Scores are not linear, and heads of networks that were trained apart look at different things, so that they are not
averaged. The merged layer gets heads that are chosen out of all sources' heads: its queries, keys and values are fitted
to theirs, and its output projection to what the sources' layers give, from what its own heads really find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.chains import Chain
from kmerge.fuse.context import Context, Passes, Site
from kmerge.fuse.design import DenseRows
from kmerge.fuse.linear import LEAST_ROWS, ROWS_PER_COLUMN, Columns, side_by_side
from kmerge.fuse.mixing import reached
from kmerge.fuse.ridge import Regression, whole_rows
from kmerge.graph import Ref, refs
from kmerge.methods.registry import Array
from kmerge.shapes.calls import inputs_of
from kmerge.shapes.layers import is_keras

HEADED = ("MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention")
_NAMES = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "gate": ("gate",),
    "output": ("output", "attention_output"),
}
_READS = {"query": ("query", 0), "key": ("key", 2), "value": ("value", 1), "gate": ("query", 0)}
"""Which argument each projection reads, and its position."""
_JITTER = 1e-7


def choose_groups(products: Array, crosses: Array, sizes: int, owners: Sequence[int], count: int) -> list[int]:
    """Groups of columns that together explain most, one after the other.

    Args:
        products: of all columns with each other, shape (groups * sizes, groups * sizes).
        crosses: of all columns with the targets, shape (groups * sizes, targets).
        sizes: columns per group.
        owners: whose each group is; every owner gets at least one where there are as many to choose.
        count: how many to choose.

    Returns:
        Numbers of groups.

    >>> import numpy as np
    >>> choose_groups(np.eye(3), np.array([[1.], [3.], [2.]]), 1, [0, 0, 1], 2)
    [1, 2]
    """
    left, cross = np.array(products), np.array(crosses)
    ridge = _JITTER * max(float(np.trace(products)) / len(products), 1e-12)
    chosen: list[int] = []
    everyone = set(owners) if count >= len(set(owners)) else set()
    while len(chosen) < min(count, len(owners)):
        missing = everyone - {owners[group] for group in chosen}
        free = [group for group in range(len(owners)) if group not in chosen]
        if missing and len(missing) >= count - len(chosen):
            free = [group for group in free if owners[group] in missing]
        gains = []
        for group in free:
            own = slice(group * sizes, (group + 1) * sizes)
            inverse = np.linalg.pinv(left[own, own] + ridge * np.eye(sizes))
            gains.append(float(np.einsum("it,ij,jt->", cross[own], inverse, cross[own])))
        best = free[int(np.argmax(gains))]
        own = slice(best * sizes, (best + 1) * sizes)
        share = left[:, own] @ np.linalg.pinv(left[own, own] + ridge * np.eye(sizes))
        cross = cross - share @ cross[own]
        left = left - share @ left[own]
        chosen.append(best)
    return chosen


@dataclass(eq=False)
class AttentionTask:
    """One layer of MultiHeadAttention or GroupQueryAttention; a group is a head of keys with its heads of queries."""

    context: Context
    layer: int
    at: int
    chains: tuple[Chain, ...]
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """(source, group) that each group of the merged layer imitates."""

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """Kernel and bias of each projection."""
        source, own = self.context.origin(self.layer).members[0]
        weights = self.context.frame.sources[source].states[own].weights
        found: dict[str, list[int]] = {}
        for role, names in _NAMES.items():
            mine = [
                place
                for place, weight in enumerate(weights)
                if any(part.strip("_").removesuffix("_dense") in names for part in weight.key.split("/")[:-1])
            ]
            if mine:
                found[role] = sorted(mine, key=lambda place: -len(weights[place].tensor.shape))
        return found

    def _tensor(self, call: int, role: str, merged: bool) -> Ref:
        graph = self.context.merged.graph if merged else self.context.every.merged.graph
        inputs = inputs_of(graph.calls[call].arguments, {})
        name, place = _READS[role]
        found = refs(inputs.argument(name, place)) or refs(inputs.argument("value", 1))
        return Ref(found[0].call, found[0].output)

    def _given(self, call: int, merged: bool) -> list[Ref]:
        graph = self.context.merged.graph if merged else self.context.every.merged.graph
        return [Ref(ref.call, ref.output) for ref in refs(graph.calls[call].arguments)]

    def _targets(self, chain: Chain) -> list[tuple[int, Ref]]:
        return self.context.seen(chain.call if chain.end is None else chain.end.call)

    @cached_property
    def sees(self) -> tuple[Ref, ...]:
        found = [ref for chain in self.chains for _, ref in self._targets(chain)]
        for chain in self.chains:
            for _, ref in self.context.seen(chain.call):
                found += [ref, *self._given(ref.call, False)]
        return tuple(dict.fromkeys(found))

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        found = [ref for chain in self.chains for ref in (*self._given(chain.call, True), *chain.others)]
        return tuple(dict.fromkeys(found))

    def sites(self) -> Sequence[Site]:
        context = self.context
        if context.origin(self.layer).role != "shared":
            return ()
        place, found = self.places["output"][0], []
        members = dict(context.origin(self.layer).members)
        for chain in self.chains:
            for source, ref in self._targets(chain):
                own = (source, members[source], place)
                if len(context.frame.shape(own)) == 3:
                    uses = context.frame.uses.get(own, {}).get(2, ())
                    found.append((source, ref, DenseRows(False), {space: use.places for space, use in uses}))
        return side_by_side(found, len(context.frame.sources))

    # ---- the steps

    def run(self, passes: Passes) -> str:
        context, layer = self.context, self.layer
        groups = context.values[layer, self.places["key"][0]].shape[1]
        self.chosen = self._choose(passes, groups)
        self._imitate(passes)
        explained = self._project(passes)
        labels = [context.frame.sources[source].label for source, _ in self.chosen]
        shares = ", ".join(f"{labels.count(label)} of '{label}'" for label in dict.fromkeys(labels))
        return f"{context.layer(layer).name}: heads {shares}, {explained:.4f} explained"

    def _together(self) -> Iterator[dict[int, tuple[int, Ref]]]:
        """Calls of all sources side by side: per source, the call in the sources' network and what it gives."""
        rows: dict[int, list[tuple[int, Ref]]] = {}
        for chain in self.chains:
            for source, ref in self.context.seen(chain.call):
                rows.setdefault(source, []).append((ref.call, ref))
        for turn in zip(*rows.values(), strict=False):
            yield dict(zip(rows, turn, strict=True))

    def _choose(self, passes: Passes, count: int) -> list[tuple[int, int]]:
        """Which groups of the sources' heads are kept."""
        context, layer = self.context, self.layer
        members = dict(context.origin(layer).members)
        first = context.origin(layer).members[0][0]
        uses = context.frame.uses.get((first, members[first], self.places["key"][0]), {}).get(1, ())
        held = any(context.frame.spaces[space].fixed for space, _ in uses)
        if len(members) == 1 or held:
            return [(first, group) for group in range(count)]
        sums: _Gram | None = None
        order = sorted(members)
        for theirs, _, away in passes.again():
            for turn in self._together():
                features, targets = [], []
                for source in order:
                    call, made = turn[source]
                    found = to_numpy(context.every.given_to(theirs, call, "_output_dense"))
                    features.append(found.reshape(-1, found.shape[-2] * found.shape[-1]))
                    result = to_numpy(theirs[made])
                    targets.append(result.reshape(len(features[-1]), -1))
                if len({len(one) for one in features}) > 1:
                    continue
                picked = passes.pick(len(features[0]), len(away), LEAST_ROWS / context.examples)
                x, y = (np.concatenate(rows, axis=1)[picked].astype(np.float64) for rows in (features, targets))
                sums = sums or _Gram.empty(x.shape[1], y.shape[1])
                sums.add(x, y)
        if sums is None:
            return [(first, group) for group in range(count)]
        products, crosses, spread = sums.centred()
        width = len(spread) // len(order)
        for number, source in enumerate(order):
            own = slice(number * width, (number + 1) * width)
            crosses[:, own] *= np.sqrt(context.shares[source] / max(float(spread[own].sum()), 1e-300))
        groups = context.frame.shape((first, members[first], self.places["key"][0]))[1]
        owners = [source for source in order for _ in range(groups)]
        chosen = choose_groups(products, crosses, len(products) // len(owners), owners, count)
        return [(owners[number], number % groups) for number in sorted(chosen)]

    def _imitate(self, passes: Passes) -> None:
        """Fit the projections of each chosen head to those of the source's own."""
        context, layer = self.context, self.layer
        roles = [role for role in self.places if role != "output"]
        members = dict(context.origin(layer).members)
        sources = list(dict.fromkeys(source for source, _ in self.chosen))
        stored = {(s, r): [context.stored(s, members[s], place).astype(np.float64) for place in self.places[r]]
                  for s in sources for r in roles}  # fmt: skip
        heads = {role: self._heads(role) for role in roles}
        fits: dict[tuple[int, str], Regression] = {}
        for theirs, ours, away in passes.again():
            for chain in self.chains:
                for source, ref in context.seen(chain.call):
                    for role in roles if source in sources else ():
                        kernel, *bias = stored[source, role]
                        x = _flat(to_numpy(ours[self._tensor(chain.call, role, True)]))
                        own = _flat(to_numpy(theirs[self._tensor(ref.call, role, False)]))
                        wanted = max(LEAST_ROWS, ROWS_PER_COLUMN * x.shape[1]) / context.examples
                        picked = passes.pick(len(x), len(away), wanted)
                        mine = heads[role][source]
                        target = np.einsum("rd,dhk->rhk", own[picked].astype(np.float64), kernel[:, mine])
                        target = target + (bias[0][mine] if bias else 0.0)
                        target = target.reshape(len(picked), -1)
                        if (source, role) not in fits:
                            fits[source, role] = Regression(x.shape[1], target.shape[1])
                        fits[source, role].add(x[picked], target, away[picked // (len(x) // len(away))])
        for role in roles:
            kernel = np.array(context.values[layer, self.places[role][0]], dtype=np.float64)
            offset = np.zeros(kernel.shape[1:])
            for source in sources:
                guess = stored[source, role][0]
                axis = context.frame.axis((source, members[source], self.places[role][0]), 0)
                if axis is not None:
                    guess = axis.line(context.pairs, source, guess.shape[0], 1.0).apply(guess, 0)
                guess = guess[:, heads[role][source]]
                biased = len(self.places[role]) > 1
                solved = fits[source, role].solve(guess.reshape(len(guess), -1), biased)
                theirs_ = self._heads(role, merged=True)[source]
                kernel[:, theirs_] = solved.kernel.reshape(guess.shape)
                offset[theirs_] = solved.offset.reshape(guess.shape[1:])
            context.set(layer, self.places[role][0], kernel)
            for place in self.places[role][1:]:
                context.set(layer, place, offset)

    def _heads(self, role: str, merged: bool = False) -> dict[int, list[int]]:
        """Per source, its heads that are imitated, or the merged heads that imitate them."""
        key, own = (self.context.values[self.layer, self.places[name][0]].shape[1] for name in ("key", role))
        times = own // key
        found: dict[int, list[int]] = {}
        for number, (source, group) in enumerate(self.chosen):
            start = (number if merged else group) * times
            found.setdefault(source, []).extend(range(start, start + times))
        return found

    def _project(self, passes: Passes) -> float:
        """Fit the output projection to what the sources' layers give; returns the share that it explains."""
        context, layer = self.context, self.layer
        assert context.own is not None
        place, *more = self.places["output"]
        shape = context.values[layer, place].shape
        width = shape[0] * shape[1]
        members = dict(context.origin(layer).members)
        axes = [(place, axis) for axis in range(2, len(shape))]
        kinds = [tuple(source for source, _ in self._targets(chain)) for chain in self.chains]
        known = {kind: context.several(layer, axes, kind) for kind in dict.fromkeys(kinds)}
        valid = [reached([*own.values()]) for own in known.values()]
        fit = Columns(width, valid)
        wanted = max(LEAST_ROWS, ROWS_PER_COLUMN * width) / context.examples
        for theirs, ours, away in passes:
            for number, chain in enumerate(self.chains):
                x = to_numpy(context.own.given_to(ours, chain.call, "_output_dense")).reshape(-1, width)
                picked = passes.pick(len(x), len(away), wanted)
                columns = known[kinds[number]]
                target: Any = 0.0
                for source, ref in self._targets(chain):
                    rows = to_numpy(theirs[ref]).reshape(len(x), -1)
                    target = target + rows[picked].astype(np.float64) @ columns[source]
                for ref in chain.others:
                    target = target - to_numpy(ours[ref]).reshape(len(x), -1)[picked]
                kind = list(known).index(kinds[number])
                fit.add(kind, x[picked], target, away[picked // (len(x) // len(away))])
        guess = np.zeros((shape[0], shape[1], int(np.prod(shape[2:]))))
        mine, heads = self._heads("query"), self._heads("query", merged=True)
        for source, own_heads in mine.items():
            kernel = context.stored(source, members[source], place).astype(np.float64)
            kernel = kernel.reshape(*kernel.shape[:2], -1)
            guess[heads[source]] = kernel[own_heads] @ context.several(layer, axes, [source])[source]
        solved = fit.solve(guess.reshape(width, -1), bool(more))
        context.set(layer, place, solved.kernel.reshape(shape))
        for number in more:
            context.set(layer, number, solved.offset.reshape(context.values[layer, number].shape))
        return solved.explained


@dataclass(eq=False)
class _Gram:
    """Sums over rows of products of columns with columns and with targets."""

    x: Array
    y: Array
    xx: Array
    xy: Array
    yy: Array
    count: int = 0

    @classmethod
    def empty(cls, width: int, outputs: int) -> _Gram:
        crosses = np.zeros((width, outputs))
        return cls(np.zeros(width), np.zeros(outputs), np.zeros((width, width)), crosses, np.zeros(outputs))

    def add(self, x: Array, y: Array) -> None:
        told = whole_rows(x, y)
        x, y = x[told], y[told]
        self.x += x.sum(axis=0)
        self.y += y.sum(axis=0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y * y).sum(axis=0)
        self.count += len(x)

    def centred(self) -> tuple[Array, Array, Array]:
        """Covariances of columns, and with targets; variances of targets."""
        count = max(self.count, 1)
        x, y = self.x / count, self.y / count
        return self.xx / count - np.outer(x, x), self.xy / count - np.outer(x, y), self.yy / count - y * y


def _flat(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def attention_tasks(context: Context) -> list[AttentionTask]:
    """Tasks for all layers with heads."""
    graph, chains = context.merged.graph, context.chains
    ends = [chains.chain(call).joins for layer in chains.linear for call in graph.calls_of(layer)]
    found: dict[int, AttentionTask] = {}
    for number, call in enumerate(graph.calls):
        own = graph.layers[call.layer]
        if own.class_name not in HEADED or not is_keras(own.class_name, own.entry) or call.layer in found:
            continue
        calls = graph.calls_of(call.layer)
        if not context.origin(call.layer).members:
            continue
        aimed = [chains.chain(other) for other in calls]
        aimed = [chain if chain.joins not in ends else Chain(chain.call, None, None) for chain in aimed]
        ends += [chain.joins for chain in aimed if chain.joins is not None]
        late = [ref.call for chain in aimed for ref in chain.others if len(calls) == 1]
        task = AttentionTask(context, call.layer, max(number, *late, 0), tuple(aimed))
        if set(_NAMES) - set(task.places) <= {"gate"} and sum(map(len, task.places.values())) == _count(task):
            found[call.layer] = task
    return list(found.values())


def _count(task: AttentionTask) -> int:
    source, own = task.context.origin(task.layer).members[0]
    return len(task.context.frame.sources[source].states[own].weights)


def score_weights(context: Context) -> Mapping[int, str]:
    """Layers of Attention and AdditiveAttention that hold weights, with their classes."""
    return {
        number: layer.class_name
        for number, layer in enumerate(context.merged.graph.layers)
        if layer.class_name in ("Attention", "AdditiveAttention")
        and is_keras(layer.class_name, layer.entry)
        and context.weights(number)
    }
