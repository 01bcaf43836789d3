"""Flags that several commands have, and what they say in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from kmerge.cli.program import note

F = TypeVar("F", bound=Callable[..., Any])


def labels_option(help: str) -> Callable[[F], F]:
    """Add `--labels`, whose names are checked and given as a tuple."""
    return click.option("--labels", metavar="A,B,...", callback=names, help=help)


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names with commas between them, of which none is empty."""
    if value is None:
        return None
    labels = tuple(label.strip() for label in value.split(","))
    if not all(labels):
        raise click.BadParameter(f"'{value}' has an empty label: give names with commas between them, such as cat,dog.")
    return labels


def seed_option(function: F) -> F:
    """Add `--seed`."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Of everything random: the same seed gives the same model.",
    )(function)


def force_option(help: str) -> Callable[[F], F]:
    """Add `--force`."""
    return click.option("--force", is_flag=True, help=help)


def quiet_option(function: F) -> F:
    """Add `--quiet`, of a command that also has `--json`."""
    return click.option("--quiet", is_flag=True, help="Print nothing but errors (and JSON where asked for).")(function)


def say_all(notes: Sequence[str], warnings: Sequence[str] = ()) -> None:
    """Say on standard error what a reader of the result should know."""
    for message in notes:
        note(message)
    for message in warnings:
        note(message, "warning")
