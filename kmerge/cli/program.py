"""What all commands share: exit status, streams, signals, `--json` and `--debug`."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from kmerge.errors import KmergeError
from kmerge.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

F = TypeVar("F", bound=Callable[..., Any])
_DEBUG = "kmerge.debug"
_WRITTEN = "kmerge.written"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """The system asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class Program(click.Group):
    """A group of commands whose failures are one clean line and an exit status: 0 done, 1 failed, 2 called wrongly."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn whatever ends it into a message and a status."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # where Keras converts a file, TensorFlow is to be silent
        _fill_closed_descriptors()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # what a terminal cannot print is spelled out
                stream.reconfigure(errors="backslashreplace")
        try:
            with _stoppable():
                result = super().invoke(ctx)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return result
        except KeyboardInterrupt:
            _end(ctx, "interrupted, " + _what_is_left(ctx), 130)
        except Stopped as stopped:
            _end(ctx, "stopped, " + _what_is_left(ctx), stopped.status)
        except KmergeError as error:
            _end(ctx, explain(error), 1)
        except MemoryError:
            _end(ctx, "the memory is full. Close other programs, or merge on a machine with more.", 1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has seen enough
                _abandon_stdout()
                ctx.exit(0)
            where = f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, (str, bytes)) else ""
            if sys.stdout is not None and not where:
                _abandon_stdout()
            _end(ctx, f"{where}{error.strerror or error}.", 1)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            _end(ctx, f"unexpected {what}\nThis is a fault of kmerge: --debug shows where it happened.", 1)


def explain(error: BaseException) -> str:
    """An error's message, with the notes that were added on its way."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def complain(message: str) -> None:
    """Say on standard error that something failed."""
    from kmerge.report.words import printable

    click.echo(f"kmerge: {printable(message, keep_lines=True)}", err=True)


def note(message: str, kind: str = "note") -> None:
    """Say on standard error what a reader should know."""
    from kmerge.report.words import printable

    click.echo(f"{kind}: {printable(message)}", err=True)


def written(path: str) -> None:
    """Remember that an output is complete, for what is said if the command is interrupted after that."""
    click.get_current_context().meta[_WRITTEN] = path


def print_json(value: Any) -> None:
    """The one JSON document of a command, in ASCII, so that every terminal and pipe can carry it."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(value), indent=2)
    click.echo(text)


def show(*parts: RenderableType) -> None:
    """Print tables and text to standard output."""
    if sys.stdout is None:
        return
    from kmerge.report.text import make_console

    console = make_console(sys.stdout)
    with console.capture() as capture:
        for part in parts:
            # A line that is given as text stays one: a terminal wraps it without breaking what is copied from it.
            console.print(part, soft_wrap=isinstance(part, str))
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(function)


def debug_option(function: F) -> F:
    """Add `--debug`."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show where in kmerge a failure happened."
    )(function)


def _end(ctx: click.Context, message: str, status: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)
    with suppress(OSError):
        complain(message)
    ctx.exit(status)


def _what_is_left(ctx: click.Context) -> str:
    return f"after {ctx.meta[_WRITTEN]} was written" if _WRITTEN in ctx.meta else "nothing was written"


def _abandon_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not complain about it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fill_closed_descriptors() -> None:
    """Put something where a standard stream was closed, so that no file that is written takes its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the signals that end a process into an exception, so that temporary files are removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:  # who ignores one, as nohup does, means it
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, message="kmerge %(version)s", help="Print the version.")
def program() -> None:
    """Merge separately trained Keras models into one ordinary Keras model.

    The layers that do the general work are merged into one shared trunk, which runs once; every source keeps its own
    head. Models of one ancestor are merged as files: no framework is loaded, and no code in them is run. Models that
    were trained apart are run on unlabelled inputs, to fuse what they compute.

    \b
    Look first, then merge, then look at the result:
      kmerge compare finetuned_a.h5 finetuned_b.h5 finetuned_c.h5
      kmerge combine finetuned_a.h5 finetuned_b.h5 finetuned_c.h5 -o merged.h5
      kmerge inspect merged.h5

    Exit status: 0 done, 1 the work failed, 2 the call is wrong.
    """


@click.command(short_help="Print a script for tab completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
def completion(shell: str) -> None:
    """Print the script that completes kmerge's commands and options in a shell.

    \b
    Examples:
      kmerge completion bash > kmerge-completion.bash
      kmerge completion zsh > kmerge-completion.zsh

    \b
    To have it in every new shell:
      echo 'eval "$(kmerge completion bash)"' >> ~/.bashrc
      echo 'eval "$(kmerge completion zsh)"' >> ~/.zshrc
      kmerge completion fish > ~/.config/fish/completions/kmerge.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(program, {}, "kmerge", "_KMERGE_COMPLETE").source())
