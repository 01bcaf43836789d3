"""What belongs to which input of a network and to which of its heads, by name or by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmerge.data.checks import is_path
from kmerge.data.columns import Column
from kmerge.data.entries import Entry, is_plain, paths
from kmerge.errors import DataError


@dataclass(frozen=True)
class Parts:
    """A batch, or a whole data set, taken apart.

    Attributes:
        inputs: one thing per input of the network.
        targets, weights: by head label.
    """

    inputs: list[Any]
    targets: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


class Names:
    """The names of one network: of its inputs, and of its heads' labels and sample weights.

    Args:
        entries: its inputs.
        labels: of its heads.
        targets: whether labels and sample weights are wanted; else they are left out unread.
    """

    def __init__(self, entries: Sequence[Entry], labels: Sequence[str], targets: bool = True) -> None:
        self.entries, self.labels, self.targets = tuple(entries), tuple(labels), targets
        self.numbers = {name: number for number, entry in enumerate(entries) for name in entry.names}
        self.expected = ", ".join(entry.name for entry in entries)
        self.beside: dict[str, tuple[str, str | None]] = {}
        """What stands beside the inputs in a dictionary: "y" or "weights", and of which head; None for all."""
        for kind in ("y", "weights"):
            for label in (None, *self.labels):
                name = kind if label is None else f"{kind}_{label}"
                if name not in self.numbers and name not in self.labels:
                    self.beside[name] = (kind, label)

    # ------------------------------------------------------------------------------------------ data per head

    def divided(self, data: Any) -> dict[str | None, Any]:
        """Data given per label, by label (maybe not for all of them); under None what is for all."""
        if not isinstance(data, Mapping) or self._fits(data):
            return {None: data}
        found = {str(key): value for key, value in data.items() if str(key) not in self.beside}
        parts: dict[str | None, Any] = {}
        if found and found.keys() <= set(self.labels):
            parts.update(found)
        elif found and all(any(key.startswith(f"{label}/") for label in self.labels) for key in found):
            for label in self.labels:
                own = {key.removeprefix(f"{label}/"): v for key, v in found.items() if key.startswith(f"{label}/")}
                if own:
                    parts[label] = own
        return parts or {None: data}

    def _fits(self, data: Mapping[Any, Any]) -> bool:
        """Whether a dictionary holds something for each input, and nothing else but labels."""
        keys = [key for key, _ in paths(data) if key not in self.beside]
        found = [self.numbers.get(key) for key in keys]
        return None not in found and sorted(number for number in found if number is not None) == list(
            range(len(self.entries))
        )

    # ----------------------------------------------------------------------------------------- taking apart

    def is_whole(self, data: Any) -> bool:
        """Whether data stand whole, as arrays, and do not come in batches."""
        if isinstance(data, tuple):
            inputs, _, _ = self._separated(data)
            if self._is_whole(inputs):
                return True
        return self._is_whole(data)

    def _is_whole(self, data: Any) -> bool:
        if isinstance(data, Mapping) or is_array(data) or is_plain(data):
            return True
        fits = isinstance(data, (list, tuple)) and len(data) == len(self.entries)
        return fits and all(is_array(item) or is_plain(item) or is_path(item) for item in data)

    def parts(self, data: Any, where: str) -> Parts:
        """What belongs to what, in a batch or in data that stand whole.

        Args:
            data: `x`, `(x,)`, `(x, y)`, `(x, y, weights)`, or a dictionary with labels among the inputs.
            where: for errors: "", or " in x.npz".

        Raises:
            DataError: if an input is missing or something belongs nowhere.
        """
        inputs, targets, weights = self._separated(data)
        result = Parts(self._leaves(inputs, where))
        if not self.targets:
            return result
        if isinstance(inputs, Mapping):
            # What is for all comes first, so that what is for one wins.
            for name, (kind, label) in self.beside.items():
                if name in inputs:
                    into = result.targets if kind == "y" else result.weights
                    into.update(dict.fromkeys(self.labels if label is None else (label,), inputs[name]))
        for kind, given, into in (("y", targets, result.targets), ("weights", weights, result.weights)):
            into.update(self._by_label(given, kind, where))
        return result

    def _separated(self, data: Any) -> tuple[Any, Any, Any]:
        """Inputs, labels and sample weights of `x`, `(x,)`, `(x, y)` or `(x, y, weights)`."""
        if not isinstance(data, (tuple, list)) or not data or is_plain(data) or len(data) > 3:
            return data, None, None
        several = len(self.entries) > 1 and len(data) == len(self.entries)
        if several and not any(isinstance(item, (Mapping, list, tuple)) for item in data):
            return data, None, None
        return data[0], data[1] if len(data) > 1 else None, data[2] if len(data) > 2 else None

    def _by_label(self, given: Any, kind: str, where: str) -> dict[str, Any]:
        if given is None:
            return {}
        if isinstance(given, Mapping):
            names = {label: label for label in self.labels} | {f"{kind}_{label}": label for label in self.labels}
            for key in given:
                if str(key) not in names:
                    what = "labels" if kind == "y" else "sample weights"
                    raise DataError(
                        f"The data{where} hold {what} for '{key}', which is no head of the model: expected "
                        f"{', '.join(self.labels)}."
                    )
            return {names[str(key)]: value for key, value in given.items() if value is not None}
        if isinstance(given, (list, tuple)) and not is_plain(given) and len(given) == len(self.labels) > 1:
            return {label: value for label, value in zip(self.labels, given, strict=True) if value is not None}
        return dict.fromkeys(self.labels, given)

    def _leaves(self, data: Any, where: str) -> list[Any]:
        """The data of each input, from a structure of them."""
        if isinstance(data, Mapping):
            found: dict[int, Any] = {}
            for key, value in paths({str(key): value for key, value in data.items() if str(key) not in self.beside}):
                number = self.numbers.get(key)
                if number is None:
                    raise DataError(
                        f"The data{where} hold '{key}', which is no input of the network: expected {self.expected}"
                        f"{self._plain_names()}."
                    )
                if number in found:
                    raise DataError(
                        f"The data{where} hold input '{self.entries[number].name}' under two names: leave one out."
                    )
                found[number] = value
            for number, entry in enumerate(self.entries):
                if number not in found:
                    raise DataError(f"The data{where} hold nothing for input '{entry.name}': expected {self.expected}.")
            return [found[number] for number in range(len(self.entries))]
        leaves = [leaf for _, leaf in paths(data)] if isinstance(data, (list, tuple)) else [data]
        if len(leaves) != len(self.entries):
            have = "one array" if len(leaves) == 1 else f"{len(leaves)} arrays"
            takes = f"one input ({self.expected})" if len(self.entries) == 1 else f"{len(self.entries)} inputs"
            raise DataError(
                f"The data{where} hold {have}, and the network takes {takes}: give "
                + ("one array." if len(self.entries) == 1 else f"a dictionary with {self.expected}.")
            )
        return leaves

    def _plain_names(self) -> str:
        return " (or x)" if len(self.entries) == 1 else f" (or x0 to x{len(self.entries) - 1})"


def is_array(value: Any) -> bool:
    """Whether something is an array or tensor of any library, or a column of a file."""
    return hasattr(value, "__array__") or isinstance(value, Column)
