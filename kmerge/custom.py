"""The user's own layers and functions, imported from the modules that they name, and from no other.

A file's configuration names modules too; those are never imported. Keras is imported when a function here is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kmerge.errors import PlanError
from kmerge.live import one_line, quiet

Registered = Mapping[str, tuple[str, str]]
"""`module` and `registered_name` of a class or function, by its plain name and by the registered one."""


def import_custom(modules: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What modules of the user's register with Keras, by registered name; a dictionary of objects is taken as it is.

    Raises:
        PlanError: if one cannot be imported, or registers nothing.
    """
    if isinstance(modules, str):
        raise PlanError(f"custom is one text, '{modules}': give a list of modules.")
    if isinstance(modules, Mapping):
        return dict(modules)
    modules = list(modules)
    if not modules:
        return {}
    with quiet():
        import keras
    before = set(keras.saving.get_custom_objects())
    found: dict[str, Any] = {}
    for name in modules:
        module = _import(name, "--custom")
        known = keras.saving.get_custom_objects()
        mine = {key: value for key, value in known.items() if key not in before or value.__module__ == module.__name__}
        if not mine:
            raise PlanError(
                f"The module '{name}' registers nothing with Keras: mark its layers with "
                "@keras.saving.register_keras_serializable()."
            )
        found |= mine
    return found


def import_lambdas(given: Mapping[str, Any]) -> dict[str, Any]:
    """Layers or functions by Lambda: what is spelled `MODULE:FUNCTION` is imported.

    Raises:
        PlanError: if one cannot be imported.
    """
    if not isinstance(given, Mapping):
        raise PlanError(f"lambda_ is {given!r}: expected a dictionary of name and MODULE:FUNCTION.")
    found = {}
    for name, value in given.items():
        if isinstance(value, str):
            module, separator, attribute = value.partition(":")
            if not separator or not module or not attribute:
                raise PlanError(f"--lambda {name}={value}: expected NAME=MODULE:FUNCTION.")
            imported: Any = _import(module, "--lambda")
            for part in attribute.split("."):
                if not hasattr(imported, part):
                    raise PlanError(f"--lambda {name}={value}: the module '{module}' has no '{attribute}'.")
                imported = getattr(imported, part)
            value = imported
        found[str(name)] = value
    return found


def _import(name: Any, flag: str) -> Any:
    if not isinstance(name, str):
        raise PlanError(f"{flag} {name!r}: expected the name of a module.")
    try:
        with _here(), quiet():
            return importlib.import_module(name)
    except Exception as error:
        raise PlanError(f"{flag} {name}: the module cannot be imported ({one_line(error)}).") from error


@contextmanager
def _here() -> Iterator[None]:
    """The current folder is looked in first, as `python -m` does."""
    place = os.getcwd()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)


def registered_of(objects: Mapping[str, Any]) -> Registered:
    """Under which module and name current Keras knows the user's classes and functions; files name them either way."""
    found = {name: (str(getattr(value, "__module__", "")), name) for name, value in objects.items()}
    return {**{name.rpartition(">")[2]: entry for name, entry in found.items()}, **found}


def replacements_of(
    given: Mapping[str, Any], lambdas: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """Entries of current Keras's configuration for what stands in for Lambdas, and the objects by registered name.

    Args:
        given: a `keras.layers.Layer` class, a layer, or a registered function of tensors, by the Lambda's name.
        lambdas: settings of the Lambdas in the file, by name.

    Raises:
        PlanError: if there is no such Lambda, or what is given is no layer and no registered function.
    """
    if not given:
        return {}, {}
    for name in given:
        if name not in lambdas:
            known = ", ".join(f"'{item}'" for item in lambdas) or "none"
            raise PlanError(f"There is no Lambda layer '{name}' in the file: it has {known}.")
    with quiet():
        import keras
    entries: dict[str, Mapping[str, Any]] = {}
    objects: dict[str, Any] = {}
    for name, value in given.items():
        settings = lambdas[name].get("arguments")
        settings = dict(settings) if isinstance(settings, Mapping) else {}
        try:
            with quiet():
                layer = _layer(keras, name, value, settings)
                entry = keras.saving.serialize_keras_object(layer)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"--lambda {name}: the layer cannot be made ({one_line(error)}).") from error
        kind = value if isinstance(value, type) or not isinstance(value, keras.layers.Layer) else type(value)
        objects[keras.saving.get_registered_name(kind)] = kind
        entries[name] = entry
    return entries, objects


def _layer(keras: Any, name: str, value: Any, settings: Mapping[str, Any]) -> Any:
    if isinstance(value, keras.layers.Layer):
        return value
    if isinstance(value, type) and issubclass(value, keras.layers.Layer):
        return value(name=name, **settings)
    if callable(value):
        if keras.saving.get_registered_name(value) not in keras.saving.get_custom_objects():
            raise PlanError(
                f"--lambda {name}: the function '{getattr(value, '__name__', value)}' is not registered with Keras, so "
                "a file cannot name it: mark it with @keras.saving.register_keras_serializable()."
            )
        return keras.layers.Lambda(value, name=name, arguments=dict(settings))
    raise PlanError(f"--lambda {name}: {value!r} is neither a layer nor a function.")
