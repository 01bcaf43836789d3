"""The file of an assembly: created, and filled by whoever has the values of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from kmerge.assembly import Assembly
from kmerge.store import Kind, create_archive, create_hdf5


@contextmanager
def create_output(
    assembly: Assembly, target: Path, overwrite: bool, stored: Callable[[], dict[str, Any]]
) -> Iterator[Any]:
    """A file of the assembly's kind, to be filled: `write(key, start, array)`; it appears whole or not at all.

    Args:
        assembly: all but the values of the weights.
        target: where it is to stand.
        overwrite: replace what stands there.
        stored: gives the facts of the merge, when all weights are written.
    """
    if assembly.kind in (Kind.KERAS, Kind.FOLDER):
        version = assembly.version

        def metadata() -> dict[str, Any]:
            saved = datetime.now().strftime("%Y-%m-%d@%H:%M:%S")
            return {"keras_version": version, "date_saved": saved, "kmerge": stored()}

        folder = assembly.kind is Kind.FOLDER and target.suffix != ".keras"
        with create_archive(
            target,
            metadata=metadata,
            config=assembly.config or {},
            layout=assembly.layout,
            assets=assembly.assets,
            folder=folder,
            overwrite=overwrite,
        ) as output:
            yield output
    else:
        with create_hdf5(
            target, assembly.layout, overwrite=overwrite, closing=lambda: {"kmerge": json.dumps(stored())}
        ) as output:
            yield output
