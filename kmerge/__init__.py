"""kmerge: several separately trained Keras models of one architecture, merged into one ordinary Keras model.

Importing kmerge imports no framework.
"""

from kmerge.api import combine, compare, inspect, merge_models
from kmerge.errors import (
    FormatError,
    GraphError,
    KmergeError,
    LayoutError,
    MergeError,
    MethodError,
    OutputError,
    PlanError,
    UnrelatedError,
    UnsafeFileError,
)
from kmerge.methods import METHODS
from kmerge.plan import Plan
from kmerge.version import __version__

__all__ = [
    "METHODS",
    "FormatError",
    "GraphError",
    "KmergeError",
    "LayoutError",
    "MergeError",
    "MethodError",
    "OutputError",
    "Plan",
    "PlanError",
    "UnrelatedError",
    "UnsafeFileError",
    "__version__",
    "combine",
    "compare",
    "inspect",
    "merge_models",
]
