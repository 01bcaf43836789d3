"""`kmerge finetune`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kmerge.cli.options import force_option, labels_option, names, quiet_option, say_all, seed_option
from kmerge.cli.program import debug_option, json_option, print_json, show, written

_WEIGHTINGS = ("equal", "uncertainty", "gradnorm", "pcgrad")


def _positive(low: float = 0.0) -> Callable[..., float | None]:
    """A check of a flag's number: above `low`."""

    def checked(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
        if value is not None and not (low < value < math.inf):
            raise click.BadParameter(f"{value:g} is out of range: give a number above {low:g}.")
        return value

    return checked


def _temperature(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise click.BadParameter(f"{value:g} is no temperature: give a number above 0, or inf.")
    return value


def _train(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None or value in ("all", "heads"):
        return value
    word, colon, number = value.partition(":")
    if word == "last" and colon and number.isdigit() and int(number) > 0:
        return value
    raise click.BadParameter(f"'{value}' is none of all, heads and last:K, such as last:2.")


def _split(_: click.Context, __: click.Parameter, value: float) -> float:
    if not 0 <= value < 1:
        raise click.BadParameter(f"{value:g} is no share: give a number from 0 to below 1, such as 0.1.")
    return value


def _pairs(values: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What is for all heads, and what is for one: LABEL=VALUE, unless that is a file."""
    plain: list[str] = []
    named: dict[str, str] = {}
    for value in values:
        label, equals, rest = value.partition("=")
        if not equals or not label or Path(value).exists():
            plain.append(value)
        elif label in named:
            raise click.BadParameter(f"two values are given for '{label}': give one.")
        else:
            named[label] = rest
    if len(plain) > 1 or (plain and named):
        raise click.BadParameter("give one for all heads, or one as LABEL=... for each.")
    return plain, named


def _one_or_each(_: click.Context, __: click.Parameter, values: Sequence[str]) -> Any:
    plain, named = _pairs(values)
    return named or (plain[0] if plain else None)


def _each(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    found = {}
    for value in values:
        label, equals, rest = value.partition("=")
        if not equals or not label or not rest:
            raise click.BadParameter(f"'{value}' is no LABEL=COLUMN, such as cat=kind.")
        found[label] = rest
    return found


def _loss_weights(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    if value is None or value in _WEIGHTINGS:
        return value
    return _numbers(value, f"'{value}' is none of {', '.join(_WEIGHTINGS)} and no numbers such as 1,1,2.")


def _numbers(value: str, message: str) -> list[float]:
    try:
        numbers = [float(text) for text in value.split(",")]
    except ValueError:
        raise click.BadParameter(message) from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise click.BadParameter(message)
    return numbers


def _mix(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, float] | None:
    found = {}
    for value in values:
        label, equals, number = value.partition("=")
        share = _numbers(number, f"'{value}' is no LABEL=SHARE, such as cat=2.") if equals else []
        if not label or len(share) != 1 or not share[0]:
            raise click.BadParameter(f"'{value}' is no LABEL=SHARE, such as cat=2.")
        found[label] = share[0]
    return found or None


@click.command(short_help="Heal or train a merged model.")
@click.argument("model", type=click.Path())
@click.argument("sources", nargs=-1, type=click.Path(), metavar="[SOURCE...]")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    required=True,
    metavar="OUT",
    help="Where to write, .keras or .h5.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|LABEL=FILE",
    callback=_one_or_each,
    help="Rows to learn from: .npz, .npy, .csv, .parquet, .tfrecord, or a folder of images; with labels, or where "
    "sources teach without. One file for all heads, or LABEL=FILE for each (repeatable). Without it, sources teach on "
    "made-up inputs.",
)
@click.option(
    "--columns",
    metavar="A,B,...",
    callback=names,
    help="Of a table: the features, in the order of the training. By default all columns that are no labels.",
)
@click.option(
    "--label-columns",
    multiple=True,
    metavar="LABEL=COLUMN",
    callback=_each,
    help="Of a table: the column with the labels of a head, beside y and y_LABEL. Repeatable.",
)
@click.option(
    "--pixels",
    nargs=2,
    type=float,
    metavar="BLACK WHITE",
    help="Values of the pixels of image files. By default 0 255 where the model rescales them, else 0 1.",
)
@labels_option("Labels of the heads, where the model does not hold them.")
@click.option(
    "--train",
    metavar="all|heads|last:K",
    callback=_train,
    help="What moves: all, heads, or heads and the last K layers of the trunk. By default what the layers say.",
)
@click.option(
    "--loss",
    multiple=True,
    metavar="LABEL=NAME",
    callback=_one_or_each,
    help="Loss of a head, by Keras's name. Repeatable. By default what its source was trained with.",
)
@click.option(
    "--loss-weights",
    metavar="1,1,2|uncertainty|gradnorm|pcgrad",
    callback=_loss_weights,
    help="How much each head counts: numbers in their order, or learned.  [default: equal]",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Passes over the data. By default 12, and more where these are few steps.",
)
@click.option(
    "--minutes",
    type=float,
    metavar="M",
    callback=_positive(),
    help="Time from the call on after which training ends; without --epochs, as many passes as fit.",
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Rows per step. By default 64.")
@click.option(
    "--learning-rate",
    type=float,
    metavar="R",
    callback=_positive(),
    help="The highest; it rises at the start and falls to 0. By default 0.001, less to heal a good start.",
)
@click.option(
    "--optimizer",
    metavar="NAME",
    help="By Keras's name. By default adam, and where sources teach, kernels of the trunk by a Muon of kmerge's own.",
)
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    callback=_temperature,
    help="At which sources and heads are compared; inf matches logits. By default 4.",
)
@click.option(
    "--features",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="W",
    help="Weight of matching each source's trunk features too.",
)
@click.option(
    "--trunk-rate",
    type=float,
    default=1.0,
    metavar="X",
    callback=_positive(),
    help="Factor on the learning rate in the trunk, such as 0.1.",
)
@click.option(
    "--layer-decay",
    type=float,
    default=1.0,
    metavar="X",
    callback=_positive(),
    help="Factor once more for each layer of the trunk further from the heads.",
)
@click.option(
    "--adapters",
    type=click.IntRange(min=1),
    metavar="RANK",
    help="Train low-rank adapters in place of the heads' kernels; they are merged into these in the end.",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["auto", "fixed", "moving"]),
    default="auto",
    help="Whether BatchNormalization keeps its statistics: auto does when sources teach, and where layers are frozen.",
)
@click.option(
    "--mix",
    multiple=True,
    metavar="LABEL=SHARE",
    callback=_mix,
    help="Rows of each batch by head, where each has its own data. Repeatable.  [default: equal]",
)
@click.option(
    "--validation-split",
    type=float,
    default=0.1,
    metavar="SHARE",
    callback=_split,
    help="Share of the rows that is held back, on which the best state is found.",
)
@click.option("--patience", type=click.IntRange(min=1), metavar="N", help="End after N epochs without a better state.")
@click.option(
    "--pairs",
    type=click.IntRange(min=0),
    metavar="N",
    help="Where sources teach, rows to make of pairs of the given ones, for each of them and pass. By default 3 of few "
    "rows, none of 32,000.",
)
@click.option("--samples", type=click.IntRange(min=8), metavar="N", help="How many inputs to make up. By default 4000.")
@click.option(
    "--cache",
    type=click.FloatRange(min=0),
    default=4096,
    metavar="MB",
    help="Disk for inputs and what the sources give on them.",
)
@click.option(
    "--checkpoints", type=click.Path(), metavar="FOLDER", help="Save the state of the training there, to resume it."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint.")
@click.option("--tensorboard", type=click.Path(), metavar="FOLDER", help="Write TensorBoard's logs there.")
@click.option("--mixed-precision", is_flag=True, help="Compute in bfloat16; weights stay as they are.")
@seed_option
@force_option("Replace an existing output, and another training's checkpoint.")
@quiet_option
@json_option
@debug_option
@click.pass_context
def finetune(ctx: click.Context, /, **given: Any) -> None:
    """Heal a merged model by its sources, or train it with labels.

    With sources, these teach: the model learns to give what they give, on inputs without labels. The result never
    agrees less with them than MODEL did. Without sources, the labels in the data teach, and each head learns from its
    own, by the loss that its source was trained with. MODEL is never changed; the best state on held-back rows is
    written.

    \b
    Heal, on unlabelled inputs or on made-up ones:
      kmerge finetune merged.keras cnn_a.keras cnn_b.keras -o healed.keras \\
        --data inputs.npz
      kmerge finetune merged.keras cnn_a.keras cnn_b.keras -o again.keras \\
        --samples 100 --epochs 5
    Train with labels, in one file (x, y_cnn_a, y_cnn_b) or in one for each head:
      kmerge finetune merged.keras -o tuned.keras --data labelled.npz --epochs 10
      kmerge finetune merged.keras -o mixed.keras --data cnn_a=a.npz \\
        --data cnn_b=b.npz --train last:1 --loss-weights uncertainty --epochs 5
    A long run that may be interrupted, and going on with it:
      kmerge finetune merged.keras -o long.keras --data labelled.npz \\
        --checkpoints run --epochs 5
      kmerge finetune merged.keras -o long.keras --data labelled.npz \\
        --checkpoints run --epochs 5 --resume --force
    """
    model, sources = given.pop("model"), given.pop("sources")
    quiet, as_json = given.pop("quiet"), given.pop("as_json")
    if given["data"] is None and not sources:
        raise click.UsageError("There is nothing to learn from: give --data with labels, or the sources.", ctx)
    if given["resume"] and given["checkpoints"] is None:
        raise click.UsageError("--resume needs --checkpoints FOLDER.", ctx)

    from kmerge import api
    from kmerge.progress import terminal_bar

    def log(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with terminal_bar("training", sys.stderr, quiet or sys.stderr is None) as progress:
        tuning = api.fine_tune(model, teachers=sources or None, progress=progress, log=log, **given)
    assert tuning.output is not None
    written(tuning.output)
    if not quiet:
        say_all(tuning.notes, tuning.warnings)
    if as_json:
        print_json(tuning.to_dict())
    elif not quiet:
        from kmerge.report.text import tuning_table

        show(tuning_table(tuning))
