"""The exception tree of kmerge.

    KmergeError                 anything kmerge raises on purpose
    ├── FormatError             a file is not what it should be, or is damaged
    │   └── UnsafeFileError     a file asks its reader for something no weights file needs
    ├── DataError               calibration inputs do not fit the network, or none can be made up for it
    ├── GraphError              a configuration describes no network that kmerge can follow
    ├── LayoutError             layers that should be shared differ
    ├── PlanError               the rules of a merge contradict each other or the sources
    ├── MethodError             an option of a method is wrong
    ├── UnrelatedError          the method needs a common ancestor and the sources have none
    ├── MergeError              the merge itself failed, for example on weights that are not a number
    └── OutputError             the result cannot be written where it was asked for

Every message says what happened, what was expected and how to go on. Context is added with `add_note`, so the type
survives.
"""


class KmergeError(Exception):
    """Base of every error that kmerge raises on purpose."""


class FormatError(KmergeError):
    """A file is not what it should be, or is damaged."""


class UnsafeFileError(FormatError):
    """A file asks its reader for something that no weights file needs."""


class DataError(KmergeError):
    """Calibration inputs do not fit the network, or none can be made up for it."""


class GraphError(KmergeError):
    """A configuration describes no network that kmerge can follow."""


class LayoutError(KmergeError):
    """Layers that should be shared differ."""


class PlanError(KmergeError):
    """The rules of a merge contradict each other or the sources."""


class MethodError(KmergeError):
    """An option of a method is unknown or out of range."""


class UnrelatedError(KmergeError):
    """The method needs a common ancestor and the sources have none."""


class MergeError(KmergeError):
    """The merge itself failed, for example on weights that are not a number."""


class OutputError(KmergeError):
    """The result cannot be written where it was asked for."""
