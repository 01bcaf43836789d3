"""Which units of all sources become one: what they do on the same inputs, and how much they matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kmerge.calibration.network import to_numpy
from kmerge.fuse.blend import FUNCTIONS, Sample
from kmerge.fuse.chains import NORMALS, activation_of
from kmerge.fuse.clusters import cluster_units, distances
from kmerge.fuse.context import MIXING, Context, Site, Task
from kmerge.fuse.pairs import Frame, Kept, Pair
from kmerge.fuse.sensitivity import Sensitivities
from kmerge.graph import Ref
from kmerge.methods.registry import Array
from kmerge.spaces import Space

ROWS = 20_000
"""Rows of each site whose products are summed."""
SAMPLE = 6_000
"""Rows of each site that are kept."""
_LEAST = 1e-12


@dataclass(eq=False)
class Moments:
    """Sums over rows for one space: values of all sources' units, (sources * units,), and their products.

    Attributes:
        samples: some rows of each site, by its number.
        judges: the same of inputs that are held back.
    """

    total: Array
    products: Array
    count: int = 0
    samples: dict[int, list[Array]] = field(default_factory=dict)
    judges: dict[int, list[Array]] = field(default_factory=dict)

    def add(self, values: Array) -> None:
        values = values.astype(np.float64)
        self.total += values.sum(axis=0)
        self.products += values.T @ values
        self.count += len(values)


def unit_moments(context: Context, tasks: Sequence[Task]) -> dict[int, Moments]:
    """One pass of the sources over all inputs: moments of every space that can be seen and is not fixed."""
    sites: list[Site] = [site for task in tasks for site in task.sites()]
    wanted = tuple(dict.fromkeys(ref for site in sites for ref in site.tensors))
    later = frozenset(ref for task in tasks for ref in task.sees)
    result: dict[int, Moments] = {}
    passes = zip(context.source_tape.passes(wanted, later), context.held, strict=True)
    for turn, (values, held) in enumerate(passes):
        for number, site in enumerate(sites):
            for chosen, apart, share in _parts(site, values, held):
                rng = context.random(f"site/{number}/batch/{turn}/{'held' if apart else 'fitted'}")
                for space, rows in site.views(chosen, ROWS / context.examples, rng):
                    if context.frame.spaces[space].fixed:
                        continue
                    size = rows.shape[1]
                    found = result.setdefault(space, Moments(np.zeros(size), np.zeros((size, size))))
                    found.add(rows)
                    part = SAMPLE * share * len(held) / context.examples
                    kept = rng.random(len(rows)) < part / max(len(rows), 1)
                    samples = found.judges if apart else found.samples
                    samples.setdefault(number, []).append(rows[kept].astype(np.float32))
    return result


def _parts(site: Site, values: Mapping[Ref, Any], held: Array) -> Iterator[tuple[Mapping[Ref, Any], bool, float]]:
    """What a site needs of inputs that are fitted to, and of those that are held back: which it is, and its share.

    Undivided where units are not averaged, so that nothing is judged by it, and where rows do not belong to inputs.
    """
    lengths = [len(values[ref]) for ref in site.tensors]
    whole = not site.averaged or any(length % len(held) for length in lengths)
    if whole or not held.any() or held.all():
        yield values, not whole and bool(held.all()), 1.0
        return
    for away in (~held, held):
        chosen = {
            ref: to_numpy(values[ref])[np.repeat(away, length // len(held))]
            for ref, length in zip(site.tensors, lengths, strict=True)
        }
        yield chosen, away is held, float(away.mean())


def samples_of(
    context: Context,
    tasks: Sequence[Task],
    number: int,
    moments: Moments,
    matters: Sensitivities,
    together: bool = False,
) -> list[Sample] | None:
    """Sampled rows of each site of a space with the activation that follows; None where one is not known."""
    sites = [site for task in tasks for site in task.sites()]
    found = []
    for place, rows in moments.samples.items():
        functions = {id(function): function for ref in sites[place].tensors if (function := context.follows(ref))}
        if not functions or any(context.follows(ref) is None for ref in sites[place].tensors):
            return None
        linear = FUNCTIONS["linear"] in functions.values()
        if linear and any(context.meets_maximum(ref) for ref in sites[place].tensors):
            return None
        values = np.concatenate(rows)
        if len(values) >= 2 * values.shape[1]:  # with fewer, what follows from blends follows by chance
            judges = np.concatenate([values[:0], *moments.judges.get(place, ())]) if context.num_held else None
            function = next(iter(functions.values()))
            found.append(Sample(values, function, matters.get((place, number)), together, judges))
    return found


def importance(frame: Frame, space: Space) -> Array:
    """How strongly each unit is read: sum of squared weights of all layers that read it, shape (sources, units)."""
    result = np.zeros((len(frame.sources), space.size))
    for use in space.axes:
        if use.role == "input" and not use.part:
            values = frame.sources[use.source].states[use.layer].weights[use.weight].tensor.read().astype(np.float64)
            moved = np.moveaxis(values, use.axis, 0)[use.places]
            result[use.source] += np.sum(moved.reshape(space.size, -1) ** 2, axis=1)
    return result


def clustered(
    frame: Frame,
    number: int,
    moments: Moments,
    scaled: bool,
    rng: np.random.Generator,
    shares: Sequence[float] | None = None,
) -> Pair:
    """Units of one space by weighted k-means.

    Args:
        frame: of the merge.
        number: of the space.
        moments: of its units.
        scaled: whether a unit's size means nothing, because what follows keeps multiples multiples (ReLU).
        rng: source of random numbers.
        shares: importance of the sources; equal by default.
    """
    size, count = frame.sizes[number], len(frame.sources)
    crowd = _crowd(frame, number, moments, scaled, shares)
    labels = cluster_units(crowd.likeness, crowd.weights, size, rng)
    units = np.arange(len(labels))
    merge = np.zeros((len(labels), size))
    merge[units, labels] = crowd.weights + 1e-9 * crowd.weights.mean()
    merge = merge / merge.sum(axis=0) / crowd.length[:, None]
    made = np.einsum("ic,ij,jc->c", merge, crowd.products, merge, optimize=True)
    with_made = np.einsum("ij,ji->i", crowd.products, merge[:, labels])
    unmerge = np.zeros((size, len(labels)))
    unmerge[labels, units] = with_made / np.maximum(made[labels], _LEAST)
    return Pair(
        merge.reshape(count, -1, size), np.ascontiguousarray(unmerge.reshape(size, count, -1).transpose(1, 0, 2))
    )


@dataclass(frozen=True, eq=False)
class _Crowd:
    """Units of all sources as k-means sees them."""

    products: Array
    likeness: Array
    length: Array
    weights: Array


def _crowd(frame: Frame, number: int, moments: Moments, scaled: bool, shares: Sequence[float] | None = None) -> _Crowd:
    products = moments.products / max(moments.count, 1)
    square = np.maximum(np.diagonal(products), _LEAST)
    length = np.sqrt(square) if scaled else np.ones_like(square)
    matters = importance(frame, frame.spaces[number]) * (square.reshape(len(frame.sources), -1) if scaled else 1.0)
    matters = matters / np.maximum(matters.sum(axis=1, keepdims=True), 1e-300)
    weights = matters if matters.any() else np.ones_like(matters)
    weights = (weights if shares is None else weights * np.asarray(shares)[:, None]).ravel()
    return _Crowd(products, products / np.outer(length, length), length, weights)


def unexplained(
    frame: Frame,
    number: int,
    moments: Moments,
    scaled: bool,
    size: int,
    rng: np.random.Generator,
    shares: Sequence[float] | None = None,
) -> float:
    """Share of what the units of a space do, by how much they matter, that is lost with so many clusters."""
    crowd = _crowd(frame, number, moments, scaled, shares)
    labels = cluster_units(crowd.likeness, crowd.weights, min(size, len(crowd.weights)), rng)
    lost = (
        crowd.weights
        @ distances(crowd.likeness, crowd.weights, labels, int(labels.max()) + 1)[np.arange(len(labels)), labels]
    )
    return float(lost / max(float(crowd.weights @ np.diagonal(crowd.likeness)), 1e-300))


_SIGN_FREE = frozenset({"relu", "leaky_relu", "linear", None})
"""Activations that give a positive multiple where they are given one."""
_PASSES = (
    "ReLU",
    "LeakyReLU",
    "PReLU",
    *MIXING,
    "Maximum",
    *(f"{kind}Pooling{rank}D" for kind in ("Max", "GlobalMax") for rank in (1, 2, 3)),
)
"""Layers that do the same."""


def keeps_multiples(context: Context, tasks: Sequence[Task]) -> dict[int, bool]:
    """Per space, whether a positive factor on one of its units can be taken back by the layers that read it."""
    found: dict[int, bool] = {}
    graph = context.merged.graph
    for task in tasks:
        sites = task.sites()
        keeps = all(site.scaled for site in sites) and all(
            _keeps(context, Ref(call)) and activation_of(graph.layers[layer]) in _SIGN_FREE
            for layer in task.layers
            for call in graph.calls_of(layer)
        )
        for site in sites:
            for space in site.spaces:
                found[space] = found.get(space, True) and keeps
    return found


def _keeps(context: Context, start: Ref) -> bool:
    graph = context.merged.graph
    waiting, seen = [start], {start}
    while waiting:
        for call in context.chains.readers.get(waiting.pop(), ()):
            if call < 0:
                return False
            layer = graph.layers[graph.calls[call].layer]
            config = layer.config
            if layer.class_name in NORMALS or graph.calls[call].layer in context.chains.linear:
                if layer.class_name in NORMALS:
                    follow = True
                else:
                    continue
            elif layer.class_name == "Activation" or layer.is_operation:
                name = config.get("activation") if layer.class_name == "Activation" else layer.class_name.lower()
                follow = name in _SIGN_FREE or name in ("add", "maxpool", "reshape")
            elif layer.class_name == "ReLU":
                follow = not config.get("max_value") and not config.get("threshold")
            else:
                follow = layer.class_name in _PASSES
                if not follow and context.weights(graph.calls[call].layer):
                    follow = layer.class_name.endswith(("LSTM", "GRU", "RNN")) or "Conv" in layer.class_name
                    if follow:
                        continue
            if not follow:
                return False
            following = Ref(call)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return True


def is_ours(frame: Frame, space: Space, shared: Mapping[int, frozenset[int]]) -> bool:
    """Whether a space is one of the trunk: axes of shared layers stand on it.

    Args:
        shared: per source, numbers of its shared layers.
    """
    return any(use.layer in shared[use.source] for use in space.axes)


def means_the_same(space: Space) -> bool:
    """Whether fixed units mean the same at the same place in every source: outputs and inputs of the networks."""
    return space.reason.startswith(("output of", "input ", "positions in"))


def settled(frame: Frame, space: Space, ours: bool, shares: Sequence[float]) -> Kept:
    """The pair of a space whose units keep their places."""
    count = len(frame.sources)
    if not ours:  # units of one source alone
        return Kept((1.0,) * count)
    return Kept(tuple(shares) if means_the_same(space) else (1.0,) + (0.0,) * (count - 1))
