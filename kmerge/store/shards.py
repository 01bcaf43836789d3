"""Weights in several HDF5 files beside a JSON file that lists them, seen as one."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import limits
from kmerge.store.attributes import AttributeValue
from kmerge.store.hdf5 import Hdf5Weights
from kmerge.store.rawio import open_regular
from kmerge.store.weights import Tree, Weights

_Value = TypeVar("_Value")


class ShardedWeights(Weights):
    """Several sets of weights as one; a group may be spread over some of them.

    Args:
        path: what the user gave.
        label: how messages call it.
        shards: weights by file name, in order.
    """

    def __init__(self, path: Path, label: str, shards: dict[str, Weights]) -> None:
        self.path, self.label, self._shards = path, label, shards

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards' files."""
        return tuple(shard.path for shard in self._shards.values())

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _holding(self, group: str) -> list[Weights]:
        found = [shard for shard in self._shards.values() if shard.has(group)]
        if not found:
            raise FormatError(f"{self.label} has no group {group!r} in any of its {len(self._shards)} shards.")
        return found

    def has(self, group: str) -> bool:
        return any(shard.has(group) for shard in self._shards.values())

    def attributes(self, group: str = "") -> dict[str, AttributeValue]:
        merged: dict[str, AttributeValue] = {}
        for shard in self._holding(group):
            for name, value in shard.attributes(group).items():
                merged.setdefault(name, value)
        return merged

    def names(self, group: str = "") -> tuple[str, ...]:
        return tuple(sorted({name for shard in self._holding(group) for name in shard.names(group)}, key=_bytewise))

    def tree(self, group: str = "") -> Tree:
        merged = Tree()
        for shard in self._holding(group):
            tree = shard.tree(group)
            for path, attributes in tree.groups.items():
                merged.groups[path] = attributes | merged.groups.get(path, {})
            for path, tensor in tree.tensors.items():
                if path in merged.tensors:
                    raise FormatError(f"{tensor.where} is in another shard of {self.label}, too: save the model anew.")
                merged.tensors[path] = tensor
            merged.attributes |= tree.attributes
        clash = merged.tensors.keys() & merged.groups.keys()
        if clash:
            raise FormatError(
                f"{self.label}: {min(clash)!r} is a group in one shard and a tensor in another. Save the model anew."
            )
        return Tree(_sorted(merged.groups), _sorted(merged.tensors), _sorted(merged.attributes))


def _bytewise(path: str) -> list[bytes]:
    return [part.encode("utf-8", "surrogateescape") for part in path.split("/")]


def _sorted(values: dict[str, _Value]) -> dict[str, _Value]:
    return {path: values[path] for path in sorted(values, key=lambda path: _bytewise(path) if path else [])}


def open_map(data: bytes, what: str, path: Path, open_shard: Callable[[str], Weights]) -> Weights:
    """Open the shards that a map lists.

    Args:
        data: the JSON text.
        what: how messages call it.
        path: what the user gave.
        open_shard: opens one shard by its name.

    Returns:
        All of them as one.

    Raises:
        UnsafeFileError: if a shard is named by a path, or there are too many.
        FormatError: if the map is none, or a shard is missing.
    """
    content = limits.read_json(data, what)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{what} lists no shards (no 'weight_map'): save the weights anew with Keras.")
    names: dict[str, None] = {}
    for key, value in table.items():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or not name:
                raise FormatError(f"{what}: the shard of {key!r} is no file name. Save the weights anew with Keras.")
            if any(sign in name for sign in "/\\\0:") or name in (".", ".."):
                raise UnsafeFileError(
                    f"{what} looks for a shard at {name!r}. Shards lie beside it and are named "
                    "without a path: save the weights anew."
                )
            names[name] = None
    if len(names) > limits.SHARDS:
        raise UnsafeFileError(f"{what} lists {len(names):,} shards; at most {limits.SHARDS} are read.")
    shards: dict[str, Weights] = {}
    try:
        for name in names:
            shards[name] = open_shard(name)
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise
    return ShardedWeights(path, what, shards)


def open_shards(path: str | Path) -> Weights:
    """Open sharded weights by the JSON file that lists the shards beside it.

    Args:
        path: the `.weights.json` file.

    Returns:
        All shards as one set of weights, to be closed or used in `with`.

    Raises:
        UnsafeFileError: if it names files elsewhere.
        FormatError: if it is no such list, or a shard is missing.
    """
    path = Path(path)
    with open_regular(path) as file:
        if file.size > limits.JSON_BYTES:
            raise FormatError(f"{path.name} is too large to be a list of shards.")
        data = file.read(0, file.size)

    def open_shard(name: str) -> Weights:
        place = path.with_name(name)
        if place.is_symlink() and place.resolve().parent != path.resolve().parent:
            raise UnsafeFileError(
                f"{path.name}: shard {name!r} is a symbolic link to another folder. Copy it there instead."
            )
        if not place.exists():
            raise FormatError(f"{path.name}: shard {name!r} is missing beside it. Copy all shards into one folder.")
        file = open_regular(place)
        try:
            return Hdf5Weights(file, name)
        except BaseException:
            file.close()
            raise

    return open_map(data, path.name, path, open_shard)
