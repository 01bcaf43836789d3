"""A fusion from end to end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kmerge.agreement import MEAN_LABEL, Agreement, ends_in_sigmoid, measure_agreement, own_rows
from kmerge.calibration.enrich import are_letters, channels_first
from kmerge.calibration.inputs import Inputs, usual_rows
from kmerge.calibration.network import Network, Tape, open_network, to_numpy
from kmerge.data import entries
from kmerge.errors import PlanError
from kmerge.fuse.attention import attention_tasks
from kmerge.fuse.batches import activation_bytes, held_back, in_batches, longest_free, share_unseen
from kmerge.fuse.blend import blended
from kmerge.fuse.chains import NORMALS
from kmerge.fuse.context import Context, Passes, Task
from kmerge.fuse.linear import linear_tasks
from kmerge.fuse.order import in_order
from kmerge.fuse.other import other_tasks
from kmerge.fuse.pairing import assigned, correlations, transported, zipped
from kmerge.fuse.pairs import Frame, Pair
from kmerge.fuse.recurrent import recurrent_tasks
from kmerge.fuse.repair import repair_tasks
from kmerge.fuse.scale import scale_tasks
from kmerge.fuse.selection import selected
from kmerge.fuse.sensitivity import Sensitivities, sensitivities
from kmerge.fuse.unfitted import held_spaces, left_layers, unfitted, unmatched
from kmerge.fuse.units import (
    Moments,
    clustered,
    is_ours,
    keeps_multiples,
    samples_of,
    settled,
    unexplained,
    unit_moments,
)
from kmerge.fuse.widen import can_change, spent, widened
from kmerge.graph import Ref, flatten
from kmerge.layout import Layout, source_graph
from kmerge.methods import METHODS
from kmerge.methods.registry import Array
from kmerge.plan import Plan
from kmerge.progress import Progress
from kmerge.shapes import Shape, infer_shapes
from kmerge.similarity import RELATED, ancestry, layer_cosines
from kmerge.source import Source
from kmerge.spaces import layout_spaces
from kmerge.surgery import Merged, merge_graphs

MEMORY, PER_PARAMETER, MOST_MEMORY = 32 << 20, 128, 1 << 30
"""Bytes of activations that each of both networks may keep between two steps: so many at least, so many for each
parameter of the first source, and so many at most. What is not kept is computed again, which takes long where networks
are large."""
ENOUGH, ENOUGH_OF_LETTERS, ENOUGH_FOR_DENSE = 1000, 3000, 8000
"""Inputs below which more are made out of pairs of them. More are worth their time where two rows of letters make
another one, and more still where each is but one row for every layer, as in a network of dense layers."""


@dataclass(frozen=True)
class Fusion:
    """What came of it.

    Attributes:
        merged: the merged graph, with wider layers where that was asked for.
        values: its weights that were found, by (layer, place): what `kmerge.assembly.assemble` takes.
        agreements: of each head with its source, on inputs that nothing was fitted to.
        notes: what a reader should know.
        log: what was done, line by line.
    """

    merged: Merged
    values: Mapping[tuple[int, int], Array]
    agreements: tuple[Agreement, ...]
    notes: tuple[str, ...] = ()
    log: tuple[str, ...] = ()


def fuse_models(
    layout: Layout,
    plan: Plan,
    inputs: Inputs,
    folder: Path,
    progress: Progress,
    custom_objects: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> Fusion:
    """Merge the trunk in function space: `fuse`, `align`, `zip` or `transport`, as the plan has it.

    Args:
        layout: the sources, laid over the first.
        plan: roles and method.
        inputs: unlabelled, at least 8; a tenth of them, more of few, measures the agreement and is not fitted to.
        folder: for temporary files.
        progress: called with steps done and in all.
        custom_objects: classes of custom layers, as for `keras.saving.load_model`.
        trusted: whether all sources are the caller's own live models.

    Raises:
        MergeError: if Keras does not open the sources or run them on the inputs, or something is not finite.
        PlanError: if the sources take inputs of different shapes.

    Memory, at its peak the sum of:
        - the weights of all sources and of the merged model, live, and those of the merged model in float64;
        - the inputs, and those made of them, up to `ENOUGH_FOR_DENSE`;
        - 32 MB of activations for each of both networks, up to 1 GB of large ones (`memory_for`), and all activations
          of one batch, which has at most 48 inputs, or 512 small ones, 2 MB of them and 512 MB of what the sources'
          layers give for them, but one input at least;
        - for all groups of units together, products of the units of all sources in float64, and 6,000 rows of them for
          each place where they are seen;
        - one layer's sums of products, columns squared in float64, or its rows where they are fewer than its columns;
          of a recurrent layer the sequences that it is fitted to, with their states and what reads them.
    """
    _check_inputs(layout)
    fitted, unseen = inputs.split(share_unseen(inputs.owners), plan.seed)
    run = _Run(layout, plan, fitted, folder, progress, custom_objects, trusted)
    context = run.solved()
    merged = widened(context, merge_graphs(layout, plan))
    values = _moved(context, merged)
    if run.method == "fuse" and plan.width == 1 and _maybe_related(layout, plan):
        mean = run.open(context.merged, None, "mean", plan.weights)
        judges = fitted.take(np.flatnonzero(held_back(fitted.rows)))  # others than those that the agreement is told of
        ours, theirs = (
            _agreements(context, network, layout, plan, merged.heads, judges) for network in (context.own, mean)
        )
        if all(one.value >= other.value for one, other in zip(theirs, ours, strict=True)):
            run.notes.append("the plain mean of the weights agrees with each source at least as well, so it was taken")
            values, context.own = {}, mean
            context.moved.clear()
    run.notes += _leaning(context)
    agreements = _agreements(context, context.own, layout, plan, merged.heads, unseen)
    return Fusion(merged, values, agreements, tuple(run.notes), tuple(run.log))


def _leaning(context: Context) -> list[str]:
    """A word on the heads that lean on each other, where it is more than a hundredth."""
    pulls = {context.layer(number).name: pull for number, pull in context.moved.items() if pull >= 0.01}
    if not pulls:
        return []
    names = ", ".join(f"'{name}'" for name in pulls)
    return [
        f"the sources do one task, so that heads lean on each other ({names}): each was fitted to its own source's "
        f"outputs, moved by up to {100 * max(pulls.values()):.0f} % towards the mean of all, within one standard error "
        "of the loss on held-back inputs (--option lean=false leaves that out)"
    ]


def _check_inputs(layout: Layout) -> None:
    """All sources are run on the same inputs, so all must take them, though each may have an input layer of its own."""
    first, *others = (entries(source) for source in layout.sources)
    for source, own in zip(layout.sources[1:], others, strict=True):
        same = len(own) == len(first) and all(
            a.is_text == b.is_text and _fit(a.shape, b.shape) for a, b in zip(first, own, strict=True)
        )
        if not same:
            one, two = (", ".join(str(entry.shape) for entry in found) for found in (first, own))
            raise PlanError(
                f"'{layout.first.label}' takes inputs of shape {one} but '{source.label}' {two}: all sources are run "
                "on the same inputs. Merge models that take the same, or merge without running them (--method mean, "
                "or align without --data)."
            )


def _fit(one: Shape | None, two: Shape | None) -> bool:
    """Whether one array can have both shapes, where None is any size."""
    if one is None or two is None:
        return True
    return len(one) == len(two) and all(a == b or a is None or b is None for a, b in zip(one, two, strict=True))


def _maybe_related(layout: Layout, plan: Plan) -> bool:
    """Whether the mean of the weights is worth a try."""
    shared = [number for number, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
    return ancestry(layer_cosines(layout, shared)).cosine > RELATED / 2


class _Run:
    """One fusion under way."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        inputs: Inputs,
        folder: Path,
        progress: Progress,
        custom_objects: Mapping[str, Any] | None,
        trusted: bool,
    ) -> None:
        self.layout, self.plan, self.inputs, self.progress = layout, plan, inputs, progress
        self.notes: list[str] = []
        self.log: list[str] = []
        self._matters: Sensitivities = {}
        self._opening = (folder, custom_objects, trusted)
        self.together = plan.outputs == "mean"
        self.method = next((layer.method for layer in plan.layers if layer.method), plan.method)
        given = next((layer.options for layer in plan.layers if layer.method), plan.options)
        self.options = {**METHODS[self.method].options, **given}
        self.seed = plan.seed if self.options.get("seed") is None else int(self.options["seed"])

    def open(
        self,
        merged: Merged,
        values: Mapping[tuple[int, int], Array] | None,
        name: str,
        shares: Sequence[float] | None = None,
    ) -> Network:
        """A graph of the sources' layers, live."""
        folder, custom_objects, trusted = self._opening
        return open_network(merged, self.layout.sources, values, folder, name, custom_objects, trusted, shares)

    def solved(self) -> Context:
        context = self._context()
        tasks = self._tasks(context)
        self.progress(1, len(tasks) + 2)
        self._pair(context)
        context.merged = widened(context, context.merged)
        context.__dict__.pop("chains", None)
        tasks = self._tasks(context)
        context.values = _guess(context, left_layers(context, self._every(context)))
        context.own = self.open(context.merged, context.values, "merged")
        context.merged_tape = Tape(context.own, context.source_tape.batches, memory_for(self.layout.first))
        self.progress(2, len(tasks) + 2)
        for number, task in enumerate(tasks):
            later = tasks[number + 1 :]
            sees = frozenset(ref for other in later for ref in other.sees)
            reads = frozenset(ref for other in later for ref in other.reads)
            self.log.append(task.run(Passes(context, task, sees, reads)))
            self.progress(number + 3, len(tasks) + 2)
        self.notes += unfitted(context, self._every(context))
        return context

    def _context(self) -> Context:
        """Both graphs with one input and all heads, whatever is to be written in the end."""
        layout, plan, inputs = self.layout, self.plan, self.inputs
        merged = merge_graphs(layout, _with_shared_inputs(plan))
        every = self.open(merge_graphs(layout, _apart(plan)), None, "sources")
        shared = [number for number, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
        spaces = layout_spaces(layout, shared)
        frame = Frame(layout.sources, spaces, tuple(space.size for space in spaces))
        first = channels_first(source_graph(layout.first))
        enough = ENOUGH_OF_LETTERS if are_letters(inputs) else ENOUGH
        enough = ENOUGH_FOR_DENSE if _gives_one_row(merged, layout.sources) else enough
        enough = usual_rows(layout.sources, enough)
        free = longest_free([entry.shape for entry in entries(layout.first)], inputs)
        activations = activation_bytes(every.merged.graph, free)
        batches, held = in_batches(inputs, enough if self.method == "fuse" else 0, self.seed, first, activations)
        tape = Tape(every, batches, memory_for(layout.first))
        lean = bool(self.options.get("lean")) and not self.together
        return Context(every, merged, frame, plan.weights, tape, held, self.seed, lean)

    def _every(self, context: Context) -> list[Task]:
        """A step for each layer that can be fitted."""
        linear, absorbed = linear_tasks(context)
        return [
            *linear,
            *recurrent_tasks(context),
            *scale_tasks(context, absorbed),
            *attention_tasks(context),
            *other_tasks(context),
        ]

    def _tasks(self, context: Context) -> list[Task]:
        """The steps that the method takes, in order."""
        found = self._every(context)
        if self.method != "fuse":
            private = [task for task in found if all(context.origin(n).role == "private" for n in task.layers)]
            found = [*private] if self.options.get("refit") else []
            found += repair_tasks(context) if self.options.get("repair") else []
        return in_order(context, found)

    def _pair(self, context: Context) -> None:
        """Decide which units become one, and how many there are to be."""
        frame, plan = context.frame, self.plan
        shared = [number for number, layer in enumerate(plan.of_first) if layer.role == "shared" and layer.has_weights]
        of_source = {n: frozenset(found.layers[s] for s in shared) for n, found in enumerate(self.layout.matches)}
        ours = [is_ours(frame, space, of_source) for space in frame.spaces]
        seen = self._every(context)
        moments = unit_moments(context, seen)
        for number in held_spaces(context, seen):
            moments.pop(number, None)
        free = [n for n, space in enumerate(frame.spaces) if ours[n] and n in moments and not space.fixed]
        scaled = keeps_multiples(context, seen)
        whole = {space for task in seen for site in task.sites() if not site.averaged for space in site.spaces}
        if self.method == "fuse" and plan.width != 1:
            changing = [number for number in free if can_change(context, number)]

            def loss(number: int, size: int) -> float:
                rng = context.random(f"width/{number}/{size}")
                return unexplained(frame, number, moments[number], scaled.get(number, False), size, rng, context.shares)

            context.frame = frame = replace(frame, sizes=spent(context, plan.width, changing, loss))
            self._tell_width(context, free, changing)
        loose = [n for n, space in enumerate(frame.spaces) if ours[n] and not space.fixed and n not in free]
        self.notes += unmatched(context, loose)
        self._matters = sensitivities(context, seen, self.together) if self.method == "fuse" and free else {}
        context.pairs = [
            self._paired(context, seen, number, moments[number], scaled.get(number, False), number in whole)
            if number in free
            else settled(frame, space, ours[number], context.shares)
            for number, space in enumerate(frame.spaces)
        ]

    def _paired(
        self, context: Context, seen: Sequence[Task], number: int, moments: Moments, scaled: bool, whole: bool
    ) -> Pair:
        frame = context.frame
        if self.method == "fuse" and whole:
            return selected(frame, number, moments, context.shares)
        if self.method == "fuse":
            pair = clustered(frame, number, moments, scaled, context.random(f"units/{number}"), context.shares)
            samples = samples_of(context, seen, number, moments, self._matters, self.together)
            return pair if samples is None else blended(frame, number, samples, pair, context.shares)
        likeness = correlations(moments.total, moments.products, moments.count)
        if self.method == "zip":
            return zipped(likeness, context.shares, frame.spaces[number].size)
        if self.method == "transport":
            return transported(likeness, context.shares, float(self.options["epsilon"]))
        return assigned(likeness, context.shares, context.random(f"units/{number}"))

    def _tell_width(self, context: Context, free: Sequence[int], changing: Sequence[int]) -> None:
        left = len(free) - len(changing)
        if left:
            self.notes.append(
                f"{left} of {len(free)} groups of units keep their number, because what follows counts on it: "
                "the trunk is wider elsewhere only"
            )


def memory_for(source: Source) -> int:
    """Bytes of activations that each of both networks may keep between two steps, for sources like this one."""
    return min(max(MEMORY, PER_PARAMETER * source.num_parameters), MOST_MEMORY)


def _gives_one_row(merged: Merged, sources: Sequence[Source]) -> bool:
    """Whether an input is one row for each layer that has weights: all of them are dense layers of plain features."""
    shapes = infer_shapes(merged.graph)
    for number, call in enumerate(merged.graph.calls):
        class_name, members = merged.graph.layers[call.layer].class_name, merged.layers[call.layer].members
        if not members or not sources[members[0][0]].states[members[0][1]].weights or class_name in NORMALS:
            continue
        shape = shapes.get(Ref(number))
        if class_name != "Dense" or shape is None or len(shape) != 2:
            return False
    return True


def _with_shared_inputs(plan: Plan) -> Plan:
    layers = tuple(
        replace(layer, role="shared") if layer.class_name == "InputLayer" else layer for layer in plan.layers
    )
    return replace(plan, inputs="shared", outputs="heads", layers=layers)


def _apart(plan: Plan) -> Plan:
    """All sources side by side on one input."""
    layers = tuple(replace(layer, role="private", method="", options={}) for layer in plan.layers)
    return _with_shared_inputs(replace(plan, layers=layers))


def _guess(context: Context, left: Collection[int]) -> dict[tuple[int, int], Array]:
    """All weights of the merged network as merging and unmerging gives them.

    Args:
        context: with pairs.
        left: layers that cannot be fitted: they are those of the first source, as a reader is told.
    """
    frame, found = context.frame, {}
    for layer, origin in enumerate(context.merged.layers):
        if not origin.members:
            continue
        source, own = origin.members[0]
        members = origin.members[:1] if layer in left else origin.members
        shares = [context.shares[n] for n, _ in members] if len(members) > 1 else [1.0]
        for place in range(len(frame.sources[source].states[own].weights)):
            found[layer, place] = frame.merged_weight(
                context.pairs, [(n, number, place) for n, number in members], shares
            )
    return found


def _moved(context: Context, merged: Merged) -> dict[tuple[int, int], Array]:
    """The weights under the numbers that their layers have in another graph of the same layers."""
    own = {(origin.role, origin.members): number for number, origin in enumerate(context.merged.layers)}
    by_layer: dict[int, list[tuple[int, Array]]] = {}
    for (layer, place), value in context.values.items():
        by_layer.setdefault(layer, []).append((place, value))
    return {
        (number, place): value
        for number, origin in enumerate(merged.layers)
        if origin.members and (origin.role, origin.members) in own
        for place, value in by_layer.get(own[origin.role, origin.members], ())
    }


def _agreements(
    context: Context,
    network: Network | None,
    layout: Layout,
    plan: Plan,
    names: Mapping[str, Sequence[str]],
    inputs: Inputs,
) -> tuple[Agreement, ...]:
    """What each head of a merged network gives against its source; `names` are those of the outputs by label."""
    assert network is not None
    merged_call = {pair: number for number, stands in enumerate(context.merged.calls) for pair in stands}
    outputs = iter(context.outputs())
    heads = []
    for number, source in enumerate(layout.sources):
        tensors = [ref for ref in flatten(source_graph(source).outputs) if isinstance(ref, Ref)]
        for ref, name in zip(tensors, names[source.label], strict=True):
            ours = Ref(merged_call[number, ref.call], ref.output)
            heads.append((number, name, ref, next(outputs), ours))
    given: list[tuple[list[Array], list[Array]]] = [([], []) for _ in heads]
    for batch in inputs.batches(max(len(batch[0]) for batch in context.source_tape.batches)):
        one = _outputs(context.every, batch, [head[3] for head in heads])
        two = _outputs(network, batch, [head[4] for head in heads])
        for (first, second), theirs_, ours_ in zip(given, one, two, strict=True):
            first.append(theirs_)
            second.append(ours_)
    values = [(np.concatenate(first), np.concatenate(second)) for first, second in given]
    synthetic = inputs.synthetic
    if plan.outputs == "mean" and len({pair[0].shape for pair in values}) == 1 and len(heads) == len(layout.sources):
        one_mean, two_mean = (np.tensordot(plan.weights, [pair[n] for pair in values], axes=1) for n in range(2))
        binary = ends_in_sigmoid(source_graph(layout.first), heads[0][2])
        return (measure_agreement(MEAN_LABEL, heads[0][1], one_mean, two_mean, synthetic, binary),)
    found = []
    for (number, name, ref, _, _), (before, after) in zip(heads, values, strict=True):
        source = layout.sources[number]
        own, binary = own_rows(inputs.owners, number), ends_in_sigmoid(source_graph(source), ref)
        found.append(measure_agreement(source.label, name, before[own], after[own], synthetic, binary))
    return tuple(found)


def _outputs(network: Network, batch: Sequence[Array], wanted: Sequence[Ref]) -> list[Array]:
    values = network.given(batch)
    network.run(values, wanted)
    return [to_numpy(values[ref]) for ref in wanted]
