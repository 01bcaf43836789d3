"""kmerge: several separately trained Keras models of one architecture, merged into one ordinary Keras model.

Importing kmerge imports no framework. What it offers is loaded when it is first used, so that the command line answers
at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kmerge.version import __version__

if TYPE_CHECKING:
    from kmerge.api import add_head, combine, compare, convert, fine_tune, inspect, merge_models
    from kmerge.errors import (
        DataError,
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
    from kmerge.report.conversion import Conversion
    from kmerge.report.facts import Report
    from kmerge.tune import Tuning

__all__ = [
    "METHODS",
    "Conversion",
    "DataError",
    "FormatError",
    "GraphError",
    "KmergeError",
    "LayoutError",
    "MergeError",
    "MethodError",
    "OutputError",
    "Plan",
    "PlanError",
    "Report",
    "Tuning",
    "UnrelatedError",
    "UnsafeFileError",
    "__version__",
    "add_head",
    "combine",
    "compare",
    "convert",
    "fine_tune",
    "inspect",
    "merge_models",
]

_HOMES = {
    **dict.fromkeys(
        ("add_head", "combine", "compare", "convert", "fine_tune", "inspect", "merge_models"), "kmerge.api"
    ),
    "Conversion": "kmerge.report.conversion",
    "METHODS": "kmerge.methods",
    "Plan": "kmerge.plan",
    "Report": "kmerge.report.facts",
    "Tuning": "kmerge.tune",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kmerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "kmerge.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
