"""A report as one self-contained HTML page: no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kmerge.report.facts import Report
from kmerge.report.words import agreement_value, options_text, output_text, parameters_text, printable, summary_rows

_STYLE = """
:root { color-scheme: light dark;
  --text: #1d2329; --soft: #5c6670; --line: #d8dde2; --back: #ffffff; --mark: #0b6e75; --tint: #e7f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #9aa5b0; --line: #363d45; --back: #15191d; --mark: #6cc9cf; --tint: #17302f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th, tbody th { color: var(--soft); font-weight: 500; }
tbody th { white-space: nowrap; width: 1%; }
.scroll th, .scroll td { white-space: nowrap; }
.number { text-align: right; }
.scroll .digest { font: .8rem/1.5 ui-monospace, monospace; white-space: normal; overflow-wrap: anywhere;
  min-width: 20rem; }
.role { border-radius: .3rem; padding: .05rem .4rem; border: 1px solid var(--line); }
.shared { color: var(--mark); background: var(--tint); border-color: transparent; }
footer { margin-top: 3rem; color: var(--soft); font-size: .9rem; }
"""


def report_page(report: Report) -> str:
    """The page of a merge.

    Args:
        report: of the merge, or of a dry run.

    Returns:
        A whole HTML document.
    """
    plan = report.plan
    title = "Merge of " + ", ".join(plan.labels)
    rows = [(name, value) for name, value in summary_rows(report)]
    settings = [("trunk", plan.trunk), ("inputs", plan.inputs), ("outputs", plan.outputs)]
    if plan.keep is not None:
        settings.append(("agreement to keep", f"{plan.keep:g}"))
    if plan.calibration is not None:
        settings.append(("seed", str(plan.seed)))
    settings.append(("shared layers", "frozen" if plan.freeze else "trainable as in the first source"))
    parts = [
        f"<h1>{_text(title)}</h1>",
        _facts([*rows, *settings]),
        *_list("Warnings", report.warnings),
        *_agreement(report),
        *_list("Notes", report.notes),
        "<h2>Layers</h2>",
        _layers(report),
        "<h2>Sources</h2>",
        _sources(report),
        f"<footer>kmerge {_text(plan.kmerge)}</footer>",
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>"
    )
    body = "<main>\n" + "\n".join(parts) + "\n</main>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "\n".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f"<table>\n<tbody>\n{lines}\n</tbody>\n</table>"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    items = "\n".join(f"<li>{_text(line)}</li>" for line in lines)
    return [f"<h2>{_text(title)}</h2>", f"<ul>\n{items}\n</ul>"]


def _agreement(report: Report) -> list[str]:
    """Each head against its source."""
    if not report.agreement:
        return []
    rows = [
        _cell(item.label)
        + _cell(item.output)
        + _cell(agreement_value(item))
        + _cell(f"{item.rows:,}", "number")
        + _cell("made up" if item.synthetic else "given")
        for item in report.agreement
    ]
    return ["<h2>Agreement with the sources</h2>", _table(["source", "output", "agreement", ">rows", "inputs"], rows)]


def _layers(report: Report) -> str:
    plan = report.plan
    rows = []
    for layer, size in zip(plan.layers, report.layers, strict=True):
        names = ["–" if name is None else name for name in layer.layers]
        cells = [
            _cell(layer.name),
            _cell(layer.class_name),
            f'<td><span class="role {layer.role}">{layer.role}</span></td>',
            _cell(f"{layer.method}{options_text(layer.options)}"),
            _cell(output_text(size)),
            _cell(parameters_text(size), "number"),
            *(_cell(name) for name in names[1:]),
        ]
        rows.append("".join(cells))
    columns = [
        "layer",
        "class",
        "role",
        "method",
        "output",
        ">parameters",
        *(f"in {label}" for label in plan.labels[1:]),
    ]
    return _table(columns, rows)


def _sources(report: Report) -> str:
    rows = [
        _cell(source.label)
        + _cell(source.name)
        + _cell(f"{source.size:,}", "number")
        + _cell(f"Keras {source.version}" if source.version else "")
        + _cell(f"{weight:.3g}", "number")
        + _cell(source.digest, "digest")
        for source, weight in zip(report.plan.sources, report.plan.weights, strict=True)
    ]
    return _table(["label", "file", ">bytes", "written by", ">weight", "digest of the content"], rows)


def _cell(value: object, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"


def _table(columns: Sequence[str], rows: Iterable[str]) -> str:
    heads = "".join(
        f'<th scope="col" class="number">{_text(name[1:])}</th>'
        if name.startswith(">")
        else f'<th scope="col">{_text(name)}</th>'
        for name in columns
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll">\n<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    )
