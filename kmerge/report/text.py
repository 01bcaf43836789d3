"""Reports as text in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from kmerge.agreement import percent
from kmerge.report.comparison import Comparison, LayerComparison
from kmerge.report.conversion import Conversion
from kmerge.report.facts import Report
from kmerge.report.inspection import Inspection, LayerFacts
from kmerge.report.words import (
    UNKNOWN,
    cosine_text,
    digest_text,
    options_text,
    output_text,
    parameters_text,
    printable,
    shape_text,
    short,
    summary_rows,
)
from kmerge.store.limits import human
from kmerge.tune import Tuning

Part = RenderableType
"""What a view is made of. A plain `str` is a line to be printed as it is, without wrapping."""
_READABLE = 14
"""Width under which a column that wraps is hard to read."""


def make_console(stream: TextIO, width: int | None = None) -> Console:
    """A console that prints text as it is: no markup, no emoji, no colours of its own finding."""
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


Row = Mapping[str, str | Text]


@dataclass(frozen=True)
class _Sheet:
    """A table that leaves out or folds columns where the width is small.

    Attributes:
        rows: cells by heading.
        choices: headings, from wide to narrow. ">" in front of one sets its column to the right, "~" lets it wrap.
    """

    rows: Sequence[Row]
    choices: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = (choice for choice in self.choices if self._width(choice) <= options.max_width)
        columns = next(fitting, self.choices[-1])
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in columns:
            justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
            wraps = column.startswith("~")
            table.add_column(column.lstrip(">~"), justify=justify, overflow="fold", no_wrap=not wraps)
        for row in self.rows:
            table.add_row(*(row[column.lstrip(">~")] for column in columns))
        yield table

    def _width(self, columns: Sequence[str]) -> int:
        """What the columns need to be readable."""
        total = 2 * (len(columns) - 1)
        for column in columns:
            name = column.lstrip(">~")
            cells = (str(row[name]) for row in self.rows)
            widest = max(map(cell_len, (name, *cells)))
            total += min(widest, _READABLE) if column.startswith("~") else widest
        return total


def summary_table(report: Report) -> Part:
    """What a merge did, in a few lines."""
    return _facts(summary_rows(report))


def conversion_table(report: Conversion) -> Part:
    """What a conversion did, in a few lines."""
    carried = "losses and optimizer carried along" if report.training else "none carried along"
    return _facts(
        [
            ("written", f"{report.output} ({human(report.bytes)})"),
            ("from", f"{report.source}, written by {report.writer}"),
            ("layers", f"{report.layers}, {report.parameters:,} parameters"),
            ("training", carried),
        ]
    )


def tuning_table(tuning: Tuning) -> Part:
    """What a training did, in a few lines."""
    rows = [
        ("data", tuning.description),
        ("steps", f"{tuning.steps:,}, in {tuning.seconds:.1f} s"),
        ("kept", f"the state after epoch {tuning.epoch}" if tuning.epoch else "the state at the start"),
    ]
    for before, after in zip(tuning.before, tuning.after, strict=True):
        rows.append((f"'{after.output}' agrees", f"{percent(after.value)}, before {percent(before.value)}"))
    if not tuning.after:
        names = [name for name in tuning.scores_after if name != "val_loss" and name in tuning.scores_before]
        for name in names:
            shown = f"{tuning.scores_after[name]:.4f}, before {tuning.scores_before[name]:.4f}"
            rows.append((name.removeprefix("val_"), shown))
    if tuning.output:
        rows.append(("written", tuning.output))
    return _facts(rows)


def plan_table(report: Report) -> Part:
    """Every decision: role and method per layer, and the layer's name in each source."""
    labels = [f"in {printable(label)}" for label in report.plan.labels[1:]]
    rows: list[Row] = []
    for layer, size in zip(report.plan.layers, report.layers, strict=True):
        names = ["-" if name is None else printable(name) for name in layer.layers[1:]]
        rows.append(
            {
                "layer": printable(layer.name),
                "class": printable(layer.class_name),
                "role": _role(layer.role),
                "method": printable(f"{layer.method}{options_text(layer.options)}"),
                "output": output_text(size),
                "parameters": parameters_text(size),
                "in the others": ", ".join(names),
                **dict(zip(labels, names, strict=True)),
            }
        )
    end = ["role", "method", ">parameters", "~in the others"]
    every = ["layer", "class", "role", "method", "output", ">parameters", *labels]
    return _Sheet(rows, [every, ["layer", "class", *end], ["layer", "~class", *end], ["layer", *end], ["~layer", *end]])


def inspection_view(found: Inspection) -> list[Part]:
    """What is in a file."""
    rows = [
        ("file", found.name),
        ("kind", found.kind),
        ("written by", found.writer),
        ("size", f"{human(found.size)}, {found.parameters:,} parameters"),
    ]
    if found.layers:
        macs = UNKNOWN if found.multiply_adds is None else f"{short(found.multiply_adds)} for one input"
        rows.append(("multiply-adds", macs))
        rows.append(("inputs", _named_shapes(found.inputs)))
        rows.append(("outputs", _named_shapes(found.outputs)))
    parts: list[Part] = [_facts(rows), "", _layer_table(found) if found.layers else _weight_table(found)]
    if found.hazards:
        parts.extend(["", Text("to know before merging or loading:")])
        parts.extend(_bullet(hazard) for hazard in found.hazards)
    parts.extend(_age_parts(found))
    if found.merge is not None:
        parts.extend(_merge_parts(found.merge))
    return parts


def _age_parts(found: Inspection) -> list[Part]:
    """What current Keras makes of an old file, and whether a conversion helps."""
    parts: list[Part] = []
    for silent, head in ((False, "current Keras refuses this file:"), (True, "current Keras would compute otherwise:")):
        items = [item for item in found.refused if item["silent"] is silent]
        if items:
            parts.extend(["", Text(head)])
            parts.extend(_bullet(": ".join(filter(None, [item["reason"], _some(item["layers"])]))) for item in items)
    if found.refused and not found.obstacles:
        parts.extend(
            ["", Text("kmerge convert writes it as a file that current Keras opens, and that computes the same.")]
        )
    elif found.refused:
        parts.extend(["", Text("kmerge convert brings it to current Keras, but needs something for:")])
        parts.extend(
            _bullet(
                f"'{item['layer']}' ({item['class_name']}), which {item['reason']}" if item["layer"] else item["reason"]
            )
            for item in found.obstacles
        )
    return parts


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def comparison_view(found: Comparison, paths: Sequence[str]) -> list[Part]:
    """How alike sources are, what that means, and what to do next."""
    rows: list[Row] = []
    for layer in found.layers:
        values = [cosine_text(layer.cosine), cosine_text(layer.lowest)]
        cosines = [value if layer.kernels or not value else f"({value})" for value in values]
        rows.append(
            {
                "layer": printable(layer.name),
                "class": printable(layer.class_name),
                "cosine": cosines[0],
                "lowest": cosines[1],
                "trunk": _place(layer),
                "difference": printable(layer.difference) or "same",
            }
        )
    end = [">cosine", *([">lowest"] if len(found.labels) > 2 else []), "trunk", "~difference"]
    table = _Sheet(rows, [["layer", "class", *end], ["layer", "~class", *end], ["layer", *end], ["~layer", *end]])
    blocked = next((layer for layer in found.layers if layer.default and layer.differs not in ("", "state")), None)
    ends = [layer for layer in found.layers if layer.default and layer.trunk_can_end]
    sentences = [
        f"{first} and {second} hold the same weights: they are one model." for first, second in found.identical
    ]
    if found.same_network:
        sentences.append("The sources are the same network.")
    else:
        heads = all(layer.default is False for layer in found.layers if layer.difference)
        sentences.append(
            "The sources are the same network up to their heads."
            if heads and not blocked
            else "The sources are not the same network: the table says what differs."
        )
    cosine = cosine_text(found.ancestry.cosine)
    sentences.append(found.meaning + (f" The cosine is {cosine} (1 is equal, 0 is unrelated)." if cosine else ""))
    trunk = ""
    if blocked is None and ends:
        sentences.append(f"The default trunk ends with '{ends[-1].name}': every layer up to the heads can be shared.")
    elif ends:
        trunk = ends[-1].name
        what = f"'{blocked.name}'" if blocked else "The rest"
        sentences.append(f"{what} cannot be shared: a trunk can end with '{trunk}' at the latest.")
    else:
        trunk = "none"
        sentences.append("No trunk can be shared: every source has to stay whole.")
    if trunk == "none":
        sentences.append("Kept whole in one file, every source works as before:")
    elif found.ancestry.related is False:
        sentences.append("The method auto fuses what they compute, best on inputs of yours, given with --data FILE.")
        sentences.append("With --trunk none every source is kept whole in one file, and works as before.")
        sentences.append("To fuse them:")
    else:
        sentences.append("Next:")
    flag = f" --trunk {shlex.quote(trunk)}" if trunk else ""
    if any(layer.differs and layer.class_name == "InputLayer" for layer in found.layers):
        flag += " --inputs separate"
    command = f"kmerge combine {shlex.join(paths)} -o merged{_suffix(paths[0])}{flag}"
    places = {_place(layer) for layer in found.layers}
    legend = "A trunk can end at each layer marked default; by default it holds all of them."
    if "possible" in places:
        legend += " Those marked possible can be shared too."
    if "private" in places:
        legend += " Those marked private have adapted to data, and stay private by themselves."
    if any(layer.cosine is not None and not layer.kernels for layer in found.layers):
        legend += " Cosines in brackets are of biases and scales, which are alike in every network."
    parts: list[Part] = [table, "", Text(legend), ""]
    return [*parts, *(_bullet(sentence) for sentence in sentences[:-1]), "", sentences[-1], "  " + printable(command)]


def _place(layer: LayerComparison) -> str:
    """Where a layer stands to the trunk."""
    if layer.trunk_can_end:
        return "default" if layer.default else "possible"
    if layer.differs == "state":
        return "private"
    return "no" if layer.cosine is not None or layer.difference else ""


def methods_view(methods: Sequence[Mapping[str, Any]]) -> list[Part]:
    """All methods, one line each."""
    rows = [
        {
            "method": item["name"],
            "what it does": item["summary"],
            "options": _options(item["options"]),
            "needs": ", ".join(item["needs"]),
            "for": "one ancestor" if item["for_related_sources_only"] else "any sources",
        }
        for item in methods
    ]
    table = _Sheet(
        rows,
        [
            ["method", "~what it does", "~options", "needs", "for"],
            ["method", "~what it does", "~options", "~needs", "~for"],
        ],
    )
    return [table, "", Text("kmerge methods NAME tells more; --method NAME chooses one.")]


def method_view(item: Mapping[str, Any]) -> list[Part]:
    """One method in full."""
    rows = [
        ("method", item["name"]),
        ("works on", _SCOPES.get(item["scope"], item["scope"])),
        ("for", "sources with a common ancestor" if item["for_related_sources_only"] else "any sources"),
        ("needs", ", ".join(_NEEDS.get(need, need) for need in item["needs"]) or "nothing but the sources"),
        ("width", "any: --width 1.5 makes the trunk half as wide again" if item["width"] else ""),
        ("options", _options(item["options"]) or "none"),
        ("source", _paper(item["source"])),
    ]
    about, options = _explained(item["description"], list(item["options"]))
    rows.extend((f"--option {name}=...", words) for name, words in options.items())
    parts: list[Part] = [_facts([row for row in rows if row[1]])]
    return [*parts, *(part for paragraph in about for part in ("", Text(paragraph)))]


def _explained(description: str, wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What a docstring says to users: its paragraphs, and its words on some arguments."""
    paragraphs: list[str] = []
    options: dict[str, str] = {}
    for block in description.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head == "Args:":
            name = ""
            for line in rest.splitlines():
                key, colon, words = line.strip().partition(": ")
                if colon and line.startswith("    ") and not line.startswith("     "):
                    name, line = key, words
                options[name] = " ".join([*filter(None, [options.get(name)]), line.strip()])
        elif head not in ("Returns:", "Raises:") and not head.startswith(">>>"):
            paragraphs.append(" ".join(block.split()))
    return paragraphs, {name: options[name] for name in wanted if name in options}


_NEEDS = {"inputs": "unlabelled inputs (--data; made up where none are given)"}
_SCOPES = {
    "element": "every entry of a weight by itself",
    "tensor": "one weight at a time",
    "model": "the whole model",
}


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(name if default is None else f"{name}={default}" for name, default in options.items())


def _paper(source: str) -> str:
    return source.replace("arXiv:", "https://arxiv.org/abs/")


def _layer_table(found: Inspection) -> Part:
    merged = any(layer.role for layer in found.layers)
    previous = [(), *((layer.name,) for layer in found.layers)]
    chain = all(layer.inputs in ((), before) for layer, before in zip(found.layers, previous, strict=False))
    rows: list[Row] = [
        {
            "layer": _full_name(layer),
            "class": printable(layer.class_name),
            "output": shape_text(layer.output),
            "parameters": f"{layer.parameters:,}" if layer.weights else "",
            "reads": printable(", ".join(layer.inputs)),
            "role": _role(layer.role, layer.source),
        }
        for layer in found.layers
    ]
    end = ["output", ">parameters", *([] if chain else ["~reads"]), *(["~role"] if merged else [])]
    return _Sheet(
        rows, [["layer", "class", *end], ["layer", "~class", *end], ["~layer", "~class", *end], ["~layer", *end]]
    )


def _full_name(layer: LayerFacts) -> str:
    name = f"{layer.origin}/{layer.name}" if layer.origin else layer.name
    return printable(name) + ("" if layer.trainable else " (frozen)")


def _weight_table(found: Inspection) -> Part:
    rows = [{"weight": printable(name), "shape": shape_text(shape)} for name, shape in found.weights.items()]
    return _Sheet(rows, [["~weight", "shape"]])


def _merge_parts(merge: Mapping[str, Any]) -> Iterable[Part]:
    """How a merged file came to be. It comes from the file, so anything may be missing or of another kind."""
    plan = merge["plan"]
    rules = ("method", "trunk", "inputs", "outputs")
    if _merged_nothing(plan):
        plan = {**plan, "method": "none"}
    decided = [f"{key} {plan[key]}" for key in rules if isinstance(plan.get(key), str)]
    if plan.get("freeze") is True:
        decided.append("shared layers frozen")
    weights = plan.get("weights")
    if isinstance(weights, list) and len({str(weight) for weight in weights}) > 1:
        decided.append("weights " + ", ".join(f"{w:.3g}" if isinstance(w, float) else str(w) for w in weights))
    width = plan.get("width")
    if isinstance(width, float) and width != 1:
        decided.append(f"width {width:g}")
    calibration = plan.get("calibration")
    if isinstance(calibration, Mapping):
        decided.append(f"calibrated on {calibration.get('inputs', '')}")
    yield ""
    yield Text(printable(f"merged by kmerge {merge.get('kmerge', '')}: {', '.join(decided)}"))
    rows: list[Row] = []
    sources = plan.get("sources")
    for item in sources if isinstance(sources, list) else []:
        if isinstance(item, Mapping):
            size = item.get("size")
            rows.append(
                {
                    "source": printable(str(item.get("label", ""))),
                    "file": printable(str(item.get("name", ""))),
                    "size": human(size) if isinstance(size, int) else "",
                    "digest": printable(digest_text(str(item.get("digest", "")))),
                }
            )
    measured = merge.get("agreement")
    for item in measured if isinstance(measured, list) else []:
        if isinstance(item, Mapping) and isinstance(item.get("value"), float):
            where = "made-up inputs" if item.get("synthetic") else "inputs"
            what = f"agreement of {item.get('output', '')} with its source: {percent(item['value'])}"
            yield Text(printable(f"{what} ({item.get('measure', '')}, on {item.get('rows', '')} {where})"))
    end = [">size", "~digest"]
    yield _Sheet(rows, [["source", "file", *end], ["~source", "~file", *end]])


def _merged_nothing(plan: Mapping[str, Any]) -> bool:
    layers = plan.get("layers")
    return isinstance(layers, list) and not any(isinstance(layer, Mapping) and layer.get("method") for layer in layers)


def _named_shapes(shapes: Mapping[str, Sequence[int | None] | None]) -> str:
    return "\n".join(f"{printable(name)} {shape_text(shape)}" for name, shape in shapes.items())


def _role(role: str, source: str = "") -> Text:
    name = f"{role} ({source})" if source else role
    return Text(printable(name), style="cyan" if role == "shared" else "")


def _suffix(path: str) -> str:
    for suffix in (".weights.h5", ".keras", ".hdf5", ".h5"):
        if path.endswith(suffix):
            return suffix
    return ".keras"


def _bullet(text: str) -> Part:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("-", Text(printable(text), overflow="fold"))
    return grid


def _facts(rows: Sequence[tuple[str, str]]) -> Part:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, printable(value, keep_lines=True))
    return grid
