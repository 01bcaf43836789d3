"""An old file to one that current Keras opens: decided, then written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kmerge import live
from kmerge.assembly import Assembly, assemble
from kmerge.custom import registered_of, replacements_of
from kmerge.dialects.reading import Dialect
from kmerge.dialects.writing import parse_version
from kmerge.engine import copy_tensor, merge_tensors
from kmerge.errors import FormatError, OutputError
from kmerge.graph import flatten
from kmerge.output import create_output
from kmerge.progress import Progress, silent
from kmerge.report.conversion import Conversion, explain_obstacles
from kmerge.source import Source, open_source
from kmerge.store import Kind, Layout, TensorSpec
from kmerge.store.target import check_target
from kmerge.upgrade import Upgraded, alone, as_legacy, is_current, upgrade
from kmerge.upgrade.optimizer import Variables, upgrade_state
from kmerge.upgrade.training import upgrade_training
from kmerge.version import __version__
from kmerge.workspace import Workspace, family, size_of


def convert_model(
    old: Path,
    new: Path,
    lambdas: Mapping[str, Any],
    objects: Mapping[str, Any],
    force: bool,
    progress: Progress = silent,
) -> Conversion:
    """Convert one file.

    Args:
        old, new: paths; the suffix of `new` decides the format, `.keras` or `.h5`.
        lambdas: live layers, or functions, that stand in for Lambdas, by the Lambda's name.
        objects: classes and functions of the user's, by the name under which Keras registered them.
        force: replace an existing output.
        progress: told the bytes.

    Raises:
        KmergeError: with what happened and how to go on.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(old))
        work = Workspace(stack)
        work.claim(source)
        work.protect(new, None)
        legacy = family(new) is False
        if not legacy and family(new) is not True and new.suffix:
            raise OutputError(f"'{new.name}' tells no format: give a name that ends in .keras or .h5.")
        check_target(new.absolute(), force, not new.suffix, source.size)
        replacements, own = replacements_of(lambdas, _lambdas_of(source))
        upgraded = upgrade(source, replacements, registered_of(objects))
        objects = {**objects, **own}
        if upgraded.obstacles:
            raise FormatError(explain_obstacles(source.name, upgraded.obstacles))
        road = _road(source, upgraded, legacy, objects)
        carried, notes = _training_of(source, upgraded)
        if carried is not None and road.through_keras:
            carried = None
            notes.append("the training configuration was dropped, since Keras rebuilt the custom layers: compile anew")
        again = partial(upgrade, replacements=replacements, custom=registered_of(objects))
        variables, lost = _state_of(source, upgraded, carried, legacy, again)
        notes = [*upgraded.notes, *notes, *lost]
        target = work.folder / f"middle{road.suffix}" if road.through_keras else new
        facts = {"file": source.name, "version": source.version, "backend": source.backend}
        written = as_legacy(upgraded) if road.suffix == ".h5" else upgraded.source
        if not new.suffix and not road.through_keras:
            written = replace(written, kind=Kind.FOLDER)
        assembly = assemble(alone(written), [written])
        if carried is not None:
            assembly = _compiled(assembly, carried, variables)
        stored = {"kmerge": __version__, "converted": {**facts, "notes": notes}}
        with create_output(assembly, target, force, lambda: stored) as output:
            merge_tensors([written], assembly.targets, output, [1.0], progress)
            for number, tensor in enumerate(variables.tensors if variables is not None else ()):
                copy_tensor(tensor, output, f"{_VARIABLES}/{number}")
        if road.through_keras:
            plain = {name.rpartition(">")[2]: value for name, value in objects.items()}  # as .h5 files name them
            live.rewrite(target, new, {**plain, **objects}, force)
        writer = f"Keras {source.version}" if source.version else "unknown"
        if source.backend:
            writer += f" ({source.backend})"
        assert written.graph is not None
        return Conversion(
            source=str(old),
            output=str(new),
            writer=writer,
            layers=len(written.graph.layers),
            parameters=written.num_parameters,
            training=carried is not None,
            bytes=size_of(new),
            seconds=time.perf_counter() - started,
            notes=tuple(dict.fromkeys(notes)),
        )


def _lambdas_of(source: Source) -> Mapping[str, Mapping[str, Any]]:
    """Settings of the Lambdas of a source, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    for layer in source.graph.layers if source.graph else ():
        if layer.class_name == "Lambda":
            found[layer.name] = layer.config
    return found


@dataclass(frozen=True)
class _Road:
    """How a converted model comes into its file.

    Attributes:
        suffix: of the format that is written here.
        through_keras: whether Keras then opens it, with the user's classes, and saves it in the format that is wanted.
    """

    suffix: str
    through_keras: bool = False


def _road(source: Source, upgraded: Upgraded, legacy: bool, objects: Mapping[str, Any]) -> _Road:
    """Keras is needed where a format keeps the weights of a custom layer in an order that only its class knows.

    `.keras` files have them by path and `.h5` files in the order in which the class made them, so Keras is given a file
    that has them as the source does.

    Raises:
        FormatError: if that is so and the class was not given.
    """
    custom = _first_custom(upgraded)
    by_path = source.dialect is Dialect.KERAS3
    if custom is None or (legacy and not by_path) or (is_current(source) and not legacy):
        return _Road(".h5" if legacy else ".keras")
    if not objects:
        raise FormatError(
            f"'{custom[0]}' ({custom[1]}) is none of Keras's own layers, and only its class knows in which "
            f"order its weights stand in an .h5 file: write a .keras file, which takes it over as it is, or name the "
            "module that registers it with --custom MODULE."
        )
    _check_modules(upgraded.source.model, objects, source.name)
    return _Road(".keras" if by_path else ".h5", through_keras=True)


def _check_modules(value: Any, objects: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration that Keras would have to import further modules for.

    Raises:
        FormatError: naming the module.
    """
    if isinstance(value, list):
        for item in value:
            _check_modules(item, objects, name)
    if not isinstance(value, Mapping):
        return
    module, class_name = value.get("module"), str(value.get("class_name"))
    # Keras looks for functions by their names and for classes by those under which they are registered.
    wanted = value.get("config") if class_name == "function" else value.get("registered_name")
    known = isinstance(wanted, str) and wanted in {*objects, *(key.rpartition(">")[2] for key in objects)}
    if isinstance(module, str) and not known and not _is_of_keras(module):
        raise FormatError(
            f"'{name}' names '{class_name}' of the module '{module}', which is never imported because a file asks for "
            "it: register it with Keras in a module of yours, and name that with --custom MODULE."
        )
    for item in value.values():
        _check_modules(item, objects, name)


def _is_of_keras(module: str) -> bool:
    """Whether Keras itself writes such a module into files; of those inside it, operations' and models' alone."""
    if module.startswith("keras.src"):
        return module.startswith(("keras.src.ops.", "keras.src.models."))
    return module in ("keras", "builtins") or module.startswith("keras.")


def _first_custom(upgraded: Upgraded) -> tuple[str, str] | None:
    """Name and class of the first layer that is none of Keras's own, or of one inside a wrapper."""
    graph = upgraded.source.graph
    assert graph is not None
    for layer in graph.layers:
        if layer.is_input:
            continue
        if not _is_own(layer.entry.get("module") or "", layer.entry.get("registered_name")):
            return layer.name, layer.class_name
        inner = _custom_inside(layer.config)
        if inner is not None:
            return f"{layer.name}/{inner[0]}", inner[1]
    return None


def _is_own(module: Any, registered: Any) -> bool:
    module = str(module)
    return (module == "keras" or module.startswith("keras.")) and ">" not in str(registered)


def _custom_inside(value: Any, key: str = "") -> tuple[str, str] | None:
    """A custom layer in the settings of another one; initialisers, regularisers and constraints have no weights."""
    if key.endswith(("_initializer", "_regularizer", "_constraint")):
        return None
    if isinstance(value, list):
        return next(filter(None, map(_custom_inside, value)), None)
    if not isinstance(value, Mapping):
        return None
    class_name, config, module = value.get("class_name"), value.get("config"), value.get("module")
    if isinstance(class_name, str) and isinstance(config, Mapping):
        registered = value.get("registered_name")
        if not _is_own(module if module is not None else "keras", registered):
            return str(config.get("name") or class_name), class_name
    return next(filter(None, (_custom_inside(item, str(name)) for name, item in value.items())), None)


def _state_of(
    source: Source,
    upgraded: Upgraded,
    carried: Mapping[str, Any] | None,
    legacy: bool,
    again: Callable[..., Upgraded],
) -> tuple[Variables | None, list[str]]:
    """The state of the optimizer where the file can hold it, and what is to be said of it."""
    if carried is None:
        return None, []
    if legacy:
        dropped = "the state of the optimizer was dropped: current Keras cannot train on with one from an .h5 file"
        try:
            recorded = bool(source.optimizer())
        except FormatError:
            recorded = True
        return None, [f"{dropped}; a .keras file keeps it"] if recorded else []
    return upgrade_state(source, upgraded, carried.get("optimizer"), again)


def _training_of(source: Source, upgraded: Upgraded) -> tuple[dict[str, Any] | None, list[str]]:
    """The training configuration in current words, and what was dropped of it."""
    old, new = source.graph, upgraded.source.graph
    assert old is not None
    assert new is not None
    if source.dialect is Dialect.KERAS3 and not source.version.startswith("2"):
        training = source.training if isinstance(source.training, Mapping) else None
        return dict(training) if training else None, []
    names = {
        old.layer_of(first).name: new.layer_of(second).name
        for first, second in zip(flatten(old.outputs), flatten(new.outputs), strict=True)
    }
    return upgrade_training(source.training, names, parse_version(source.version) >= (3,))


_VARIABLES = "optimizer/vars"


def _compiled(assembly: Assembly, carried: Mapping[str, Any], variables: Variables | None) -> Assembly:
    """The file with a training configuration, and with the state of the optimizer."""
    layout = assembly.layout
    if assembly.kind in (Kind.KERAS, Kind.FOLDER):
        if variables is not None:
            groups = dict(layout.groups)
            groups[_VARIABLES] = {"name": variables.name}
            specs = {
                f"{_VARIABLES}/{number}": TensorSpec(tensor.shape, tensor.dtype)
                for number, tensor in enumerate(variables.tensors)
            }
            layout = Layout(groups, {**layout.tensors, **specs})
        config = {**(assembly.config or {}), "compile_config": dict(carried)}
        return replace(assembly, config=config, layout=layout)
    plain = {("optimizer_config" if key == "optimizer" else key): value for key, value in carried.items()}
    if isinstance(plain["optimizer_config"], str):
        plain["optimizer_config"] = {"class_name": plain["optimizer_config"], "config": {}}
    root = {**layout.groups[""], "training_config": json.dumps(plain)}
    return replace(assembly, layout=replace(layout, groups={**layout.groups, "": root}))


def convert_path(value: Any, what: str) -> Path:
    """A path that a caller gave."""
    if not isinstance(value, (str, os.PathLike)):
        raise OutputError(f"The {what} is {value!r}: expected a path.")
    return Path(value)
