"""One interface for progress: bars in a terminal, silence in a pipe, a callback in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

Progress = Callable[[int, int], None]
"""Called with what is done and what is to do in all, from one thread at a time: steps of a calibration, where there is
one, then bytes."""


def silent(done: int, total: int) -> None:
    """No progress."""


def in_steps(progress: Progress, description: str) -> Progress:
    """The same progress for work that is counted in steps and not in bytes."""
    return progress.in_steps(description) if isinstance(progress, TerminalBar) else progress


def tell(progress: Progress, text: str) -> None:
    """Show a few words beside a bar, where there is one."""
    if isinstance(progress, Steps):
        progress.tell(text)


class Steps:
    """Progress in steps of a terminal's bar, with a few words beside it."""

    def __init__(self, bar: TerminalBar, description: str) -> None:
        self._bar, self._description, self._text = bar, description, ""

    def __call__(self, done: int, total: int) -> None:
        self._bar.show(self._description, False, done, total, self._text)

    def tell(self, text: str) -> None:
        """What stands beside the bar from the next step on."""
        self._text = text


class TerminalBar:
    """A bar at a time on a terminal: with bytes, rate and remaining time, or with steps."""

    def __init__(self, description: str, stream: TextIO) -> None:
        self._description, self._stream = description, stream
        self._shown = ""
        self._bar: Bar | None = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        self.show(self._description, True, done, total)

    def in_steps(self, description: str) -> Progress:
        """The same for steps of something else."""
        return Steps(self, description)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def show(self, description: str, in_bytes: bool, done: int, total: int, text: str = "") -> None:
        """Bring the bar up to date, or begin it."""
        from rich.console import Console
        from rich.progress import Progress as Bar

        if self._bar is None or self._shown != description:
            self.close()
            self._shown = description
            self._bar = Bar(*_columns(in_bytes), console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(description, total=None, text="")
        self._bar.update(self._task, completed=done, total=total, text=text)


def _columns(in_bytes: bool) -> list[ProgressColumn]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    words = TextColumn("{task.fields[text]}")
    return [TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn(), words]


@contextmanager
def terminal_bar(description: str, stream: TextIO, quiet: bool = False) -> Iterator[Progress]:
    """A progress bar on a terminal; silence anywhere else."""
    if quiet or not stream.isatty():
        yield silent
        return
    bar = TerminalBar(description, stream)
    try:
        yield bar
    finally:
        bar.close()
