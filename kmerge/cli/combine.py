"""`kmerge combine`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from kmerge.cli.options import force_option, labels_option, quiet_option, say_all, seed_option
from kmerge.cli.program import debug_option, json_option, print_json, show, written
from kmerge.errors import OutputError

if TYPE_CHECKING:
    from kmerge.report.facts import Report

_ORDER = "kmerge.order"
_RULES = (
    *("trunk", "share", "private", "inputs", "outputs", "method", "option", "weights"),
    *("width", "keep", "freeze", "seed"),
)
"""What a plan decides, so that it cannot be said beside one."""


class _Combine(click.Command):
    """Knows in which order `--share` and `--private` were given: the later one wins."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            ctx.meta[_ORDER] = [param.name for param in order if param.name in ("share", "private")]
        return super().parse_args(ctx, args)


def _weights(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = []
    for text in value.split(","):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise click.BadParameter(f"'{text}' is no importance: give numbers of at least 0, such as 1,1,2.")
        numbers.append(number)
    return tuple(numbers)


def _option(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    options = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"'{value}' is no KEY=VALUE, such as density=0.2.")
        options[key.strip()] = text if key.strip() == "label" else _value(text)
    return options


def _value(text: str) -> Any:
    """A number or true or false, as in JSON; anything else is text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    fits = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else text


def _number(low: float, high: float, what: str) -> Callable[..., float | None]:
    """A check of a flag's number: above or at `low`, at most `high`."""

    def checked(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise click.BadParameter(f"{value:g} is {what}.")
        return value

    return checked


def _method(_: click.Context, __: click.Parameter, value: str) -> str:
    if value != "auto":
        from kmerge.methods import METHODS

        if value not in METHODS:
            raise click.BadParameter(f"There is no method '{value}': choose one of auto, {', '.join(sorted(METHODS))}.")
    return value


def _complete_method(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from kmerge.methods import METHODS

    known = {"auto": "the mean where the sources share an ancestor, fuse where they do not"}
    known |= {name: method.summary for name, method in sorted(METHODS.items())}
    return [CompletionItem(name, help=text) for name, text in known.items() if name.startswith(incomplete)]


def _report_path(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and Path(value).suffix not in (".json", ".html"):
        raise click.BadParameter(f"'{value}' ends in neither .json nor .html, and the suffix decides what is written.")
    return value


@click.command(cls=_Combine, short_help="Merge models into one.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(), metavar="SOURCE...")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="OUT",
    help="Where to write; its suffix decides the format.  [default: merged, with the first source's suffix]",
)
@labels_option("Names of the heads, one per source, with commas between them.  [default: the files' names]")
@click.option(
    "--trunk",
    default="auto",
    metavar="auto|all|none|LAYER",
    help="What to share: auto, all but the heads; all; none; or everything up to and including a layer of the first "
    "source.",
)
@click.option(
    "--share",
    multiple=True,
    metavar="GLOB",
    help="Share the layers whose name in the first source fits (*, ? and [...] stand for letters). Repeatable; after "
    "--trunk; where --share and --private both fit, the later one wins.",
)
@click.option(
    "--private",
    multiple=True,
    metavar="GLOB",
    help="Keep the layers whose name fits once per source. Repeatable; same rules as --share.",
)
@click.option(
    "--inputs",
    type=click.Choice(["shared", "separate"]),
    default="shared",
    help="One input for all heads, or one per source.",
)
@click.option(
    "--outputs",
    type=click.Choice(["heads", "list", "mean"]),
    default="heads",
    help="A dictionary by label, a list in source order, or the average as one output.",
)
@click.option(
    "--method",
    default="auto",
    metavar="NAME",
    callback=_method,
    shell_complete=_complete_method,
    help="How to merge shared weights: see kmerge methods. auto is the mean for models of one ancestor, and fuse for "
    "models that were trained apart.",
)
@click.option(
    "--option",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_option,
    help="An option of the method, such as label=a. Repeatable.",
)
@click.option(
    "--weights",
    metavar="1,1,2",
    callback=_weights,
    help="Importance of each source, as numbers with commas between them.  [default: equal]",
)
@click.option(
    "--base",
    type=click.Path(),
    metavar="FILE",
    help="A whole model that gives the architecture to sources that hold weights only.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|LABEL=FILE",
    help="Inputs, whose labels are not read, to run the models on: for methods that need some, and to measure how well "
    "each head agrees with its source. "
    "A .npz, .npy, .csv, .tsv, .parquet or .tfrecord, or a folder of images. "
    "One file for all, or LABEL=FILE for each (repeatable). Without it, methods "
    "that need inputs make some up.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=8),
    metavar="N",
    help="How many inputs to use, in all. By default 2000, or all where there are fewer; down to 256 for large "
    "models of inputs of fixed sizes.",
)
@click.option(
    "--width",
    type=float,
    default=1.0,
    metavar="X",
    callback=_number(0.25, 8, "no width: give a number from 0.25 to 8, such as 1.5"),
    help="Width of the trunk against a source's; other than 1 with --method fuse only.",
)
@click.option(
    "--keep",
    type=float,
    metavar="SHARE",
    callback=_number(1e-9, 1, "no share: give a number above 0 and at most 1, such as 0.99"),
    help="Choose the largest trunk whose every head agrees this well with its source, such as 0.99.",
)
@click.option("--freeze", is_flag=True, help="Save the shared layers with trainable = false.")
@seed_option
@click.option(
    "--plan",
    type=click.Path(),
    metavar="FILE",
    help="Do what a plan says: JSON from --dry-run --json, or a merged model, which holds its own.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write no model.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(),
    metavar="FILE.json|FILE.html",
    callback=_report_path,
    help="Also write what was done to a file, as JSON or as a page.",
)
@force_option("Replace existing outputs.")
@quiet_option
@json_option
@debug_option
@click.pass_context
def combine(ctx: click.Context, /, **given: Any) -> None:
    """Merge models into one model with a shared trunk and one head per source.

    The sources are Keras models of one architecture: .h5 or .keras, or weights only. Their heads may differ. The result
    is an ordinary Keras model. The sources are never changed, and the result appears whole or not at all.

    Models of one ancestor are averaged. Models that were trained apart are run on inputs, given with --data or made up,
    to fuse what they compute; the closing table says how well each head then agrees with its source.

    \b
    Merge fine-tuned models of one ancestor:
      kmerge combine finetuned_a.h5 finetuned_b.h5 finetuned_c.h5 -o merged.h5
    Merge models that were trained apart, on inputs of your own:
      kmerge combine cnn_a.h5 cnn_b.h5 cnn_c.h5 -o fused.h5 --data inputs.npz
    Share only as much as keeps 99 % of what each source decides:
      kmerge combine cnn_a.h5 cnn_b.h5 -o kept.h5 --data inputs.npz --keep 0.99
    Name the heads, and let the second source count twice:
      kmerge combine finetuned_a.keras finetuned_b.keras -o named.keras \\
        --labels low,high --weights 1,2
    Keep models that share no ancestor whole, in one file:
      kmerge combine mlp_a.h5 mlp_b.h5 mlp_c.h5 -o ensemble.h5 --trunk none
    Share up to a layer, but keep its normalisation per source:
      kmerge combine cnn_a.h5 cnn_b.h5 -o early.h5 --trunk conv2d_1 \\
        --private "batch_norm*" --method mean
    Decide now, merge later:
      kmerge combine finetuned_a.h5 finetuned_b.h5 --dry-run --json > plan.json
      kmerge combine finetuned_a.h5 finetuned_b.h5 -o planned.h5 --plan plan.json
    Do with other files what made a model, and write down what was done:
      kmerge combine finetuned_a.h5 finetuned_c.h5 -o again.h5 \\
        --plan planned.h5 --report again.html
    """
    sources, output = given.pop("sources"), given.pop("output")
    report_path, quiet, as_json = given.pop("report_path"), given.pop("quiet"), given.pop("as_json")
    _check_call(ctx, sources, given)
    rules = {key: value for key, value in given.items() if key not in ("share", "private")}
    rules["roles"] = _roles(ctx, given)
    rules["data"] = _data(ctx, sources, given)
    files = rules["data"].values() if isinstance(rules["data"], dict) else [rules["data"]]
    if report_path is not None:
        _check_report(report_path, output, [*sources, given["base"], given["plan"], *files], given["force"])

    from kmerge import api
    from kmerge.progress import terminal_bar

    with terminal_bar("merging", sys.stderr, quiet or sys.stderr is None) as progress:
        report = api.combine(sources, output, progress=progress, **rules)
    if report.output is not None:
        written(report.output)
    if report_path is not None:
        _write_report(report, Path(report_path), given["force"])
    if not quiet:
        say_all(report.notes, report.warnings)
    if as_json:
        print_json(report.to_dict())
    elif not quiet:
        from kmerge.report.text import plan_table, summary_table

        show(*([plan_table(report), ""] if given["dry_run"] else []), summary_table(report))


def _check_call(ctx: click.Context, sources: Sequence[str], given: dict[str, Any]) -> None:
    """What is wrong with a call whatever the files hold."""
    count = len(sources)
    if count < 2:
        raise click.UsageError(f"A merge needs at least two sources: {count} given.", ctx)
    for name in ("labels", "weights"):
        values = given[name]
        if values is not None and len(values) != count:
            raise click.BadParameter(
                f"{len(values)} given for {count} sources: give one per source.", ctx, param_hint=f"--{name}"
            )
    if given["weights"] is not None and not any(given["weights"]):
        raise click.BadParameter("all are 0: at least one source has to count.", ctx, param_hint="--weights")
    if given["method"] != "auto":
        from kmerge.methods import METHODS

        known = METHODS[given["method"]].options
        for key in given["option"]:
            if key not in known:
                has = ", ".join(known) or "none"
                raise click.BadParameter(
                    f"The method '{given['method']}' has no option '{key}': it has {has}.", ctx, param_hint="--option"
                )
    if given["plan"] is not None:
        beside = [name for name in _RULES if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if beside:
            names = ", ".join(f"--{name}" for name in beside)
            raise click.UsageError(f"--plan decides everything: leave out {names}, or leave out --plan.", ctx)


def _data(ctx: click.Context, sources: Sequence[str], given: dict[str, Any]) -> str | dict[str, str] | None:
    """One file for all sources, or a file by label."""
    values = given["data"]
    if not values:
        return None

    def wrong(message: str) -> click.BadParameter:
        return click.BadParameter(message, ctx, param_hint="--data")

    labels = given["labels"]
    if labels is None:
        from kmerge.rules import unique_labels
        from kmerge.source import stem

        labels = unique_labels([stem(source) for source in sources])
    plain: list[str] = []
    by_label: dict[str, str] = {}
    for value in values:
        label, equals, file = value.partition("=")
        if not equals or label not in labels:
            plain.append(value)
            if equals and not Path(value).exists():
                raise wrong(
                    f"'{value}': no source is called '{label}', they are {', '.join(labels)}; nor is it a file."
                )
        elif label in by_label:
            raise wrong(f"two files are given for '{label}': give one.")
        else:
            by_label[label] = file
    if len(plain) > 1 or (plain and by_label):
        raise wrong("give one file for all sources, or one as LABEL=FILE for each.")
    missing = [label for label in labels if by_label and label not in by_label]
    if missing:
        raise wrong(f"none is given for '{missing[0]}': give one as LABEL=FILE for each source, or one file for all.")
    return by_label or plain[0]


def _roles(ctx: click.Context, given: dict[str, Any]) -> list[tuple[str, str]]:
    """Patterns and the roles they give, in the order of the command line."""
    left = {"share": iter(given["share"]), "private": iter(given["private"])}
    words = {"share": "shared", "private": "private"}
    return [(next(left[name]), words[name]) for name in ctx.meta.get(_ORDER, ())]


def _check_report(path: str, output: str | None, others: Sequence[str | None], force: bool) -> None:
    """Refuse, before any work is done, a report that could not be written or would replace something else.

    Raises:
        UsageError: if it is the output or a file that is read.
        OutputError: if it cannot be written there.
    """
    from kmerge.store.target import check_target

    full = Path(path).absolute()
    if full.is_dir():
        raise OutputError(f"{path} is a folder; a report is a file. Choose another name.")
    for other in (output, *others):
        if other is not None and Path(other).resolve() == full.resolve():
            raise click.BadParameter(
                f"{path} is also the output or a file that is read: choose another name.",
                param_hint="--report",
            )
    check_target(full, force, False, 0)


def _write_report(report: Report, path: Path, force: bool) -> None:
    """Write a report whole or not at all."""
    from kmerge.store.target import explain, temporary_file

    if path.suffix == ".json":
        text = json.dumps(report.to_dict(), indent=2) + "\n"
    else:
        from kmerge.report.page import report_page

        text = report_page(report)
    try:
        with (
            temporary_file(path.absolute(), force) as descriptor,
            explain(path),
            open(descriptor, "wb", closefd=False) as file,
        ):
            file.write(text.encode("utf-8", "backslashreplace"))
    except OutputError as error:
        if report.output is not None:
            error.add_note(f"The model itself is complete: {report.output}.")
        raise
