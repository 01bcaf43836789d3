"""Bars on a terminal, silence anywhere else."""

from __future__ import annotations

import io

from kmerge.progress import in_steps, silent, terminal_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_nothing() -> None:
    stream = io.StringIO()
    with terminal_bar("merging", stream) as progress:
        assert progress is silent
        in_steps(progress, "calibrating")(1, 2)
        progress(1, 2)
    assert stream.getvalue() == ""


def test_a_quiet_terminal_gets_nothing() -> None:
    stream = Terminal()
    with terminal_bar("merging", stream, quiet=True) as progress:
        progress(1, 2)
    assert stream.getvalue() == ""


def test_steps_are_counted_as_steps_and_bytes_as_bytes() -> None:
    stream = Terminal()
    with terminal_bar("merging", stream) as progress:
        told = in_steps(progress, "calibrating")
        told(1, 7)
        told(7, 7)
        progress(1_000_000, 2_000_000)
        progress(2_000_000, 2_000_000)
    shown = stream.getvalue()
    assert "calibrating" in shown
    assert "7/7" in shown
    assert "2.0/2.0 MB" in shown
    assert shown.index("calibrating") < shown.index("merging")


def test_a_callback_hears_of_both() -> None:
    heard: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        heard.append((done, total))

    in_steps(progress, "calibrating")(1, 2)
    progress(3, 4)
    assert heard == [(1, 2), (3, 4)]
