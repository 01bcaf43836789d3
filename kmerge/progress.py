"""One interface for progress: bars in a terminal, silence in a pipe, a callback in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all; from one thread at a time."""


def silent(done: int, total: int) -> None:
    """No progress."""


@contextmanager
def terminal_bar(description: str, stream: TextIO, quiet: bool = False) -> Iterator[Progress]:
    """A progress bar with bytes, rate and remaining time on a terminal; silence anywhere else."""
    if quiet or not stream.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
