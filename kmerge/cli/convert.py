"""`kmerge convert`: an old file to one that current Keras opens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from kmerge.cli.options import force_option, say_all
from kmerge.cli.program import debug_option, json_option, print_json, show, written


def _lambdas(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not equals or not name or ":" not in place:
            raise click.BadParameter(f"'{value}' is not NAME=MODULE:FUNCTION.", ctx, param)
        if name in found:
            raise click.BadParameter(f"two stand in for '{name}': give one.", ctx, param)
        found[name] = place
    return found


@click.command(short_help="Bring an old model file to current Keras.")
@click.argument("old", type=click.Path(), metavar="IN")
@click.argument("new", type=click.Path(), metavar="OUT")
@click.option(
    "--lambda",
    "lambda_",
    multiple=True,
    metavar="NAME=MODULE:FUNCTION",
    callback=_lambdas,
    help="What stands in for a Lambda layer: a Layer class, or a function registered with Keras. Repeatable.",
)
@click.option(
    "--custom",
    multiple=True,
    metavar="MODULE",
    help="A Python module that registers custom layers with Keras; it is imported. Repeatable.",
)
@force_option("Replace an existing output.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@json_option
@debug_option
def convert(old: str, new: str, as_json: bool, **given: Any) -> None:
    """Write a model file of any age as one that current Keras opens, and that computes the same.

    Keras 1 and 2 and tf.keras are read; OUT is named .keras, or .h5. No code in the file is run, and nothing is
    imported but what --lambda and --custom name. Losses, metrics and the optimizer are carried along where current
    Keras has them, and into a .keras file the optimizer's state too.

    \b
    Examples:
      kmerge convert mlp_a.h5 mlp_a_new.keras
      kmerge convert lstm_a.h5 lstm_a_new.keras --json
    """
    from kmerge import api
    from kmerge.progress import terminal_bar

    with terminal_bar("converting", sys.stderr, given["quiet"] or sys.stderr is None) as progress:
        report = api.convert(
            old, new, lambda_=given["lambda_"], custom=given["custom"], force=given["force"], progress=progress
        )
    written(report.output)
    if not given["quiet"]:
        say_all(report.notes)
    if as_json:
        print_json(report.to_dict())
    elif not given["quiet"]:
        from kmerge.report.text import conversion_table

        show(conversion_table(report))
