"""Facts in words: what the text in a terminal and the page say alike."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that an error can be said without loading what it is about
    from kmerge.agreement import Agreement
    from kmerge.report.facts import LayerSize, Report, Size
    from kmerge.similarity import Ancestry

UNKNOWN = "not known"
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows: a name with them can pass for another."""


def printable(text: str, keep_lines: bool = False) -> str:
    """Text from a file as it can be shown: characters that steer a terminal or hide others are spelled out."""

    def spelled(character: str) -> str:
        if character == "\n" and keep_lines:
            return character
        steers = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI
        return character.encode("unicode_escape", "surrogatepass").decode() if steers else character

    return "".join(map(spelled, text))


def shape_text(shape: Sequence[int | None] | None) -> str:
    """(None, 8, 8) as Keras writes it; "?" where it is not known."""
    return "?" if shape is None else str(tuple(shape))


def short(number: int) -> str:
    """A large number in three digits: 1,083,264 -> 1.08 M."""
    size = float(number)
    for unit in ("", " k", " M", " G", " T"):
        text = f"{size:.3g}" if unit else f"{number}"
        if float(text) < 1000 or unit == " T":
            return text + unit
        size /= 1000
    raise AssertionError


def share_text(part: int | None, whole: int | None, count: int) -> str:
    """A size against that of the separate models: "1.08 M, 20 % of 5 separate models' 5.42 M"."""
    if part is None:
        return UNKNOWN
    if not whole:
        return short(part)
    share = 100 * part / whole
    return f"{short(part)}, {share:.{0 if share >= 10 else 1}f} % of {count} separate models' {short(whole)}"


def options_text(options: Mapping[str, Any]) -> str:
    """(density=0.2) or nothing."""
    return " (" + ", ".join(f"{key}={value}" for key, value in options.items()) + ")" if options else ""


def cosine_text(cosine: float | None) -> str:
    return "" if cosine is None or math.isnan(cosine) else f"{round(cosine, 2) + 0.0:.2f}"  # + 0.0: no -0.00


def ancestry_text(ancestry: Ancestry | None) -> str:
    """What the weights say of a common ancestor; "" where that was not looked at."""
    if ancestry is None:
        return ""
    if ancestry.related is None or math.isnan(ancestry.cosine):
        return "nothing tells whether the sources share an ancestor"
    says = "share an ancestor" if ancestry.related else "do not share an ancestor"
    return f"the sources {says}: cosine {ancestry.cosine:.2f}"


def method_text(report: Report) -> str:
    """How the shared weights were merged."""
    merged = [layer for layer in report.plan.layers if layer.method]
    used = list(dict.fromkeys(f"{layer.method}{options_text(layer.options)}" for layer in merged))
    if not used:
        return "none: no shared layer has weights"
    text = ", ".join(used)
    if len(set(report.plan.weights)) > 1:
        text += " with weights " + ", ".join(f"{weight:.3g}" for weight in report.plan.weights)
    if report.plan.width != 1:
        text += f", {report.plan.width:g} times as wide as a source"
    looked = ancestry_text(report.ancestry)
    return f"{text}; {looked}" if looked else text


_MEASURES = {"decisions": "of decisions", "correlation": "correlation"}


def agreement_value(item: Agreement) -> str:
    """97.3 % of decisions, or 98.1 % correlation."""
    from kmerge.agreement import percent

    return f"{percent(item.value)} {_MEASURES[item.measure]}"


def agreement_text(report: Report) -> str:
    """How well each head agrees with its source, or why nobody knows."""
    found = report.agreement
    if found:
        kinds = {item.measure for item in found}
        if len(kinds) == 1:
            from kmerge.agreement import percent

            values = ", ".join(f"{item.output} {percent(item.value)}" for item in found)
            values += f" ({_MEASURES[found[0].measure]})"
        else:
            values = ", ".join(f"{item.output} {agreement_value(item)}" for item in found)
        rows = " and ".join(dict.fromkeys(f"{item.rows:,}" for item in found))
        made_up = any(item.synthetic for item in found)
        held = " held-back" if report.plan.calibration is not None else ""
        return f"{values}, on {rows}{held} inputs" + (", made up" if made_up else "")
    if not any(layer.method for layer in report.plan.layers):
        return "exact: no weights were merged"
    if report.output is None and report.bytes == 0 and report.plan.calibration is not None:
        return "not measured: this was a dry run"
    if not report.heads:
        return "not measured: weights without a graph cannot be run"
    return "not measured (give inputs with --data)"


def heads_text(report: Report) -> str:
    """Names of the outputs."""
    names = list(report.heads.values())
    if not names:
        return UNKNOWN
    if len(names) > 1 and all(name == names[0] for name in names):
        one = ", ".join(names[0])
        what = f"the mean of {', '.join(report.heads)}" if report.plan.outputs == "mean" else "one for all"
        return f"{one}, {what}"
    shown = [
        label if outputs == (label,) else f"{label} ({', '.join(outputs)})" for label, outputs in report.heads.items()
    ]
    return ", ".join(shown) + (", as a list in this order" if report.plan.outputs == "list" else "")


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """What a merge did, in a few lines: what a line is about, and what it says."""
    from kmerge.store.limits import human

    count = len(report.plan.sources)
    if report.output is None:
        end = ("written", "nothing: this was a dry run")
    else:
        end = ("written", f"{report.output}, {human(report.bytes)}, in {report.seconds:.2f} s")
    return [
        ("layers with weights", _layers_text(report.shared, report.private)),
        ("parameters", f"{report.shared.parameters:,} shared, {report.private.parameters:,} private"),
        ("all parameters", share_text(report.merged.parameters, report.separate.parameters, count)),
        ("multiply-adds", share_text(report.merged.multiply_adds, report.separate.multiply_adds, count)),
        ("method", method_text(report)),
        *([("calibrated on", report.plan.calibration.inputs)] if report.plan.calibration else []),
        ("heads", heads_text(report)),
        ("agreement", agreement_text(report)),
        end,
    ]


def _layers_text(shared: Size, private: Size) -> str:
    if not shared.layers and not private.layers:
        return UNKNOWN
    calls = f" (called {shared.calls} times)" if shared.calls > shared.layers else ""
    return f"{shared.layers} shared{calls}, {private.layers} private"


def parameters_text(size: LayerSize) -> str:
    """Parameters of a layer, per source where they differ."""
    known = [value for value in size.parameters if value is not None]
    values = known if len(set(known)) > 1 else known[:1]
    return ", ".join(f"{value:,}" for value in values) if any(values) else ""


def output_text(size: LayerSize) -> str:
    """Shape of a layer's output; lengths that differ between sources side by side, (None, 5/3)."""
    known = list(dict.fromkeys(shape for shape in size.outputs if shape is not None))
    if len({len(shape) for shape in known}) > 1:
        return ", ".join(map(shape_text, known))
    if not known:
        return "?"
    axes = ["/".join(dict.fromkeys(map(str, lengths))) for lengths in zip(*known, strict=True)]
    return f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"


def digest_text(digest: str) -> str:
    """A digest's beginning: enough to tell files apart."""
    kind, colon, value = digest.rpartition(":")
    return f"{kind}{colon}{value[:16]}..." if len(value) > 16 else digest
