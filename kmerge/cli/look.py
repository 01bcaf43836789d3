"""Commands that read and change nothing: `kmerge inspect`, `kmerge compare`, `kmerge methods`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from kmerge.cli.program import complain, debug_option, explain, json_option, print_json, show
from kmerge.errors import KmergeError

AUTO: dict[str, Any] = {
    "name": "auto",
    "summary": "The mean where the sources share an ancestor, fuse where they do not.",
    "scope": "model",
    "needs": [],
    "options": {},
    "source": "",
    "for_related_sources_only": False,
    "choices": {},
    "width": True,
    "description": "Looks at the cosine between the sources' weights before anything is written. Models that were\n"
    "fine-tuned from one ancestor have weights that point the same way, and their mean keeps what\n"
    "they know: then auto is mean, and no framework is loaded. Weights of models trained from scratch\n"
    "have nothing to do with each other, and their mean would lose what each of them knows: then auto\n"
    "is fuse, which runs the models on unlabelled inputs, made up where --data gives none.",
}


@click.command(short_help="Show what is in model files.")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@json_option
@debug_option
@click.pass_context
def inspect(ctx: click.Context, files: Sequence[str], as_json: bool) -> None:
    """Show what is in model files: writer, layers, shapes, hazards, and how a merged one came to be.

    No weight is read and no code in the file is run, so this is safe for files of unknown origin.

    \b
    Examples:
      kmerge inspect cnn_a.keras
      kmerge inspect mlp_a.h5 mlp_b.h5 mlp_c.h5
      kmerge inspect lstm_a.h5 --json
    """
    from kmerge import api

    if as_json:
        found = [api.inspect(file).to_dict() for file in files]
        print_json(found[0] if len(found) == 1 else found)
        return
    failed = False
    for number, file in enumerate(files):
        try:
            inspection = api.inspect(file)
        except KmergeError as error:
            if len(files) == 1:
                raise
            failed = True
            sys.stdout.flush()
            complain(explain(error))
            continue
        from kmerge.report.text import inspection_view

        show(*([""] if number else []), *inspection_view(inspection))
    if failed:
        ctx.exit(1)


@click.command(short_help="Show whether models can be merged.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(), metavar="SOURCE...")
@json_option
@debug_option
@click.pass_context
def compare(ctx: click.Context, sources: Sequence[str], as_json: bool) -> None:
    """Show whether models can be merged: same network, common ancestor, where a trunk can end.

    For every layer: what differs between the sources, the cosine between their weights (1 is equal, 0 is unrelated),
    and whether a shared trunk can end there.

    \b
    Examples:
      kmerge compare finetuned_a.h5 finetuned_b.h5 finetuned_c.h5
      kmerge compare mlp_a.keras mlp_b.keras --json
    """
    if len(sources) < 2:
        raise click.UsageError(f"A comparison needs at least two sources: {len(sources)} given.", ctx)
    from kmerge import api

    comparison = api.compare(sources)
    if as_json:
        print_json(comparison.to_dict())
        return
    from kmerge.report.text import comparison_view

    show(*comparison_view(comparison, sources))


def _complete_name(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _all_methods() if name.startswith(incomplete)]


def _all_methods() -> dict[str, dict[str, Any]]:
    from kmerge.methods import METHODS

    return {"auto": AUTO, **{name: METHODS[name].to_dict() for name in sorted(METHODS)}}


@click.command(short_help="List the merge methods.")
@click.argument("name", required=False, shell_complete=_complete_name)
@json_option
@debug_option
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods; with a NAME, say what it does, its options, and where it comes from.

    \b
    Examples:
      kmerge methods
      kmerge methods mean
      kmerge methods --json
    """
    known = _all_methods()
    if name is None:
        if as_json:
            print_json(list(known.values()))
            return
        from kmerge.report.text import methods_view

        show(*methods_view(list(known.values())))
        return
    if name not in known:
        raise click.BadParameter(f"There is no method '{name}': choose one of {', '.join(known)}.", param_hint="NAME")
    if as_json:
        print_json(known[name])
        return
    from kmerge.report.text import method_view

    show(*method_view(known[name]))
