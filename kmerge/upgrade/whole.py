"""A source of any age as a source that current Keras could have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kmerge.dialects.reading import Dialect
from kmerge.dialects.writing import parse_version, write_model
from kmerge.errors import FormatError, GraphError
from kmerge.graph import Call
from kmerge.source import Source, State, Weight
from kmerge.store import Kind
from kmerge.surgery import Merged, MergedLayer
from kmerge.upgrade.network import CURRENT, context_of, state_of, upgrade_network
from kmerge.upgrade.part import Obstacle
from kmerge.upgrade.slots import listed_weights


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade gave.

    Attributes:
        source: in current words, as a `.keras` file would hold it; its tensors are views of the old file's.
        order: per layer, its weights in the order in which Keras lists them (`source.states` has them by path).
        obstacles: why it is not the same function; empty where it is.
        notes: what a user should know.
    """

    source: Source
    order: tuple[tuple[Weight, ...], ...]
    obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...]


def upgrade(
    source: Source,
    replacements: Mapping[str, Mapping[str, Any]] | None = None,
    custom: Mapping[str, tuple[str, str]] | None = None,
    power: float = 1.0,
) -> Upgraded:
    """Bring a source to current Keras; no weight is read.

    Args:
        source: a whole model, of any age.
        replacements: entries of current Keras's layers that stand in for Lambdas, by the Lambda's name.
        custom: `module` and `registered_name` of custom classes, by class name.
        power: of the factors by which weights are multiplied (see `part.Context`).

    Returns:
        The source in current words, and what stands in the way.

    Raises:
        FormatError: if it holds no graph.
        GraphError: if its settings or weights make no sense.
    """
    if source.graph is None:
        raise FormatError(
            f"'{source.name}' holds no graph, so there is nothing to bring to current Keras. Give a whole model "
            "(.h5 or .keras)."
        )
    if is_current(source):
        return Upgraded(_with_replacements(source, replacements or {}), tuple(_in_order(source)), (), ())
    context = context_of(source, replacements=replacements or {}, custom=custom or {}, power=power)
    try:
        network = upgrade_network(source, context)
        model = write_model(network.graph, Dialect.KERAS3, CURRENT)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise GraphError(
            f"'{source.name}', layer '{context.layer}': its settings or weights make no sense ({type(error).__name__}: "
            f"{error}), so it cannot be brought to current Keras. Save the model again."
        ) from error
    states = tuple(
        state_of(layer, weights) for layer, weights in zip(network.graph.layers, network.states, strict=True)
    )
    made = replace(
        source,
        kind=Kind.KERAS,
        version=CURRENT,
        backend="",
        dialect=Dialect.KERAS3,
        model=model,
        metadata={},
        graph=network.graph,
        states=states,
        root={},
        nested=None,
    )
    return Upgraded(made, network.states, tuple(context.obstacles), tuple(context.notes))


def is_current(source: Source) -> bool:
    """Whether a source is a `.keras` file of Keras 3, which is taken over as it is."""
    return source.dialect is Dialect.KERAS3 and parse_version(source.version) >= (3,)


def _with_replacements(source: Source, replacements: Mapping[str, Mapping[str, Any]]) -> Source:
    """A current source with other layers in place of some Lambdas."""
    if not replacements or source.graph is None:
        return source
    layers, replaced = [], set()
    for number, layer in enumerate(source.graph.layers):
        found = replacements.get(layer.name) if layer.class_name == "Lambda" else None
        if found is not None:
            entry = {key: item for key, item in found.items() if key not in ("class_name", "config", "name")}
            config = {**found["config"], "name": layer.name}
            layer = replace(layer, class_name=str(found["class_name"]), config=config, entry=entry)
            replaced.add(number)
        layers.append(layer)
    calls = tuple(_plainly(call) if call.layer in replaced else call for call in source.graph.calls)
    return replace(source, graph=replace(source.graph, layers=tuple(layers), calls=calls))


def _plainly(call: Call) -> Call:
    """A call without the `mask=None` that every Lambda is recorded with, and that few layers take."""
    kwargs = {key: value for key, value in call.arguments["kwargs"].items() if value is not None}
    return replace(call, arguments={**call.arguments, "kwargs": kwargs})


def _in_order(source: Source) -> Iterator[tuple[Weight, ...]]:
    """Weights per layer as Keras lists them; files of Keras 3 have them by path."""
    assert source.graph is not None
    for layer, state in zip(source.graph.layers, source.states, strict=True):
        yield listed_weights(layer.class_name, layer.config, state.weights)


def as_legacy(upgraded: Upgraded) -> Source:
    """An upgraded source as a current `.h5` file would hold it: groups by layer, weights in Keras's order.

    Raises:
        FormatError: if it has a bare operation, which no `.h5` file can hold.
    """
    source = upgraded.source
    assert source.graph is not None
    states = []
    for layer, weights in zip(source.graph.layers, upgraded.order, strict=True):
        if layer.is_operation:
            raise FormatError(
                f"'{layer.name}' is an operation ({layer.class_name}), which Keras cannot open again from an .h5 file: "
                "write a .keras file."
            )
        named = [replace(weight, key=f"{layer.name}/{_legacy_key(weight)}") for weight in weights]
        states.append(State(tuple(named)))
    return replace(source, kind=Kind.H5, dialect=Dialect.KERAS3_H5, states=tuple(states), backend="tensorflow")


def _legacy_key(weight: Weight) -> str:
    """`forward_layer/cell/vars/0` -> `forward_layer/cell/kernel`."""
    return f"{weight.key.rpartition('vars/')[0]}{weight.name.rpartition('/')[2]}"


def alone(source: Source) -> Merged:
    """The graph of one source as the surgery would give it: everything kept."""
    assert source.graph is not None
    layers = tuple(MergedLayer("private", ((0, number),)) for number in range(len(source.graph.layers)))
    calls = tuple(((0, number),) for number in range(len(source.graph.calls)))
    return Merged(source.graph, layers, {}, calls)
