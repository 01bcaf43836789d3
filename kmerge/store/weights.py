"""What an open set of weights offers, whatever holds it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kmerge.store.attributes import AttributeValue, join_names
from kmerge.store.tensors import Tensor


@dataclass
class Tree:
    """What lies under one group.

    Attributes:
        groups: attributes by relative path; "" is the group itself.
        tensors: tensors by relative path.
        attributes: attributes of those tensors that have some.
    """

    groups: dict[str, dict[str, AttributeValue]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, AttributeValue]] = field(default_factory=dict)


class Weights(ABC):
    """Named tensors in groups: an HDF5 file, a member of a zip, or a set of shards.

    Attributes:
        path: the file, for messages.
    """

    path: Path

    @abstractmethod
    def attributes(self, group: str = "") -> dict[str, AttributeValue]:
        """The attributes of a group: text, numbers, or lists of them."""

    @abstractmethod
    def names(self, group: str = "") -> tuple[str, ...]:
        """The names of a group's children, in HDF5's order by name."""

    @abstractmethod
    def tree(self, group: str = "") -> Tree:
        """Everything under a group, checked.

        Raises:
            UnsafeFileError: if there is anything but plain groups and plain tensors that are really stored.
            FormatError: if there is no such group, or the file is damaged.
        """

    @abstractmethod
    def has(self, group: str) -> bool:
        """Tell whether there is a group or tensor of this path."""

    def names_attribute(self, group: str, name: str) -> list[str]:
        """A list of names stored as an attribute, joined where Keras split it; [] if there is none."""
        return join_names(self.attributes(group), name, f"{self.path.name}: {group!r}" if group else self.path.name)

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
