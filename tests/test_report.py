"""Reports as text and page, at every width and with whatever names."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import kmerge
from kmerge.report.facts import LayerSize, Report, Size
from kmerge.report.page import report_page
from kmerge.report.text import (
    Part,
    comparison_view,
    inspection_view,
    make_console,
    plan_table,
    summary_table,
)
from kmerge.report.words import output_text, parameters_text, printable, share_text, short, summary_rows

VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def sources(fixtures_dir: Path) -> list[Path]:
    return [fixtures_dir / f"cnn_{letter}.h5" for letter in "abc"]


@pytest.fixture(scope="module")
def report(sources: list[Path]) -> Report:
    return kmerge.combine(sources, "merged.h5", method="mean", labels=["a", "b", "c"], dry_run=True)


def text(parts: Sequence[Part], width: int, encoding: str = "utf-8") -> str:
    """What a console of that width shows."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = make_console(stream, width)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


def widest(shown: str) -> int:
    return max(len(line.rstrip()) for line in shown.splitlines() if not line.startswith("  kmerge combine"))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_views_fit_the_width(width: int, sources: list[Path], report: Report) -> None:
    views = [
        [plan_table(report)],
        [summary_table(report)],
        inspection_view(kmerge.inspect(sources[0])),
        comparison_view(kmerge.compare(sources), [path.name for path in sources]),
    ]
    for view in views:
        shown = text(view, width)
        assert widest(shown) <= width, shown
        assert "\x1b" not in shown


def test_names_stay_whole_where_there_is_room(report: Report) -> None:
    for width in (80, 120, 200):
        assert "global_average_pooling2d " in text([plan_table(report)], width)
    wide = text([plan_table(report)], 200)
    for heading in ("layer", "class", "role", "method", "output", "parameters", "in b", "in c"):
        assert heading in wide.splitlines()[0]


def test_an_ascii_terminal_gets_ascii(report: Report) -> None:
    text([plan_table(report), summary_table(report)], 80).encode("utf-8")
    assert text([plan_table(report)], 80, "ascii").isascii()


def test_brackets_in_names_are_no_markup(report: Report) -> None:
    layers = (replace(report.plan.layers[0], name="[bold]x[/bold]"), *report.plan.layers[1:])
    odd = replace(report, plan=replace(report.plan, layers=layers))
    assert "[bold]x[/bold]" in text([plan_table(odd)], 120)


def test_what_is_not_known_is_said(report: Report) -> None:
    unknown = replace(
        report,
        merged=Size(0, 10, None, 0),
        shared=Size(0, 10, None, 0),
        private=Size(0, 0, None, 0),
        separate=Size(0, 20, None, 0),
        heads={},
    )
    rows = dict(summary_rows(unknown))
    assert rows["layers with weights"] == rows["multiply-adds"] == rows["heads"] == "not known"


def test_the_summary_tells_calls_heads_and_weights(report: Report) -> None:
    odd = replace(
        report,
        shared=Size(2, 10, 100, 6),
        heads={"a": ("a_one", "a_two"), "b": ("b",)},
        plan=replace(report.plan, weights=(0.25, 0.25, 0.5), outputs="list"),
        output="m.h5",
        bytes=1234,
        seconds=1.5,
    )
    rows = dict(summary_rows(odd))
    assert rows["layers with weights"] == "2 shared (called 6 times), 3 private"
    assert rows["heads"] == "a (a_one, a_two), b, as a list in this order"
    assert rows["method"] == "mean with weights 0.25, 0.25, 0.5"
    assert rows["written"] == "m.h5, 1.2 kB, in 1.50 s"
    same = replace(report, heads={"a": ("out",), "b": ("out",)}, plan=replace(report.plan, outputs="mean"))
    assert dict(summary_rows(same))["heads"] == "out, the mean of a, b"


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (1083264, "1.08 M"), (999_999, "1 M"), (5 * 10**15, "5e+03 T")],
)
def test_short_numbers(number: int, expected: str) -> None:
    assert short(number) == expected


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (1_080_000, 5_420_000, "1.08 M, 20 % of 5 separate models' 5.42 M"),
        (1, 1000, "1, 0.1 % of 5 separate models' 1 k"),
        (3, None, "3"),
        (0, 0, "0"),
        (None, 3, "not known"),
    ],
)
def test_shares(part: int | None, whole: int | None, expected: str) -> None:
    assert share_text(part, whole, 5) == expected


def test_sizes_of_layers() -> None:
    assert parameters_text(LayerSize("x", (10, None, 10), ())) == "10"
    assert parameters_text(LayerSize("x", (1000, 20), ())) == "1,000, 20"
    assert parameters_text(LayerSize("x", (0, 0), ())) == ""
    assert output_text(LayerSize("x", (), ((None, 5), None, (None, 3)))) == "(None, 5/3)"
    assert output_text(LayerSize("x", (), ((None,), (None,)))) == "(None,)"
    assert output_text(LayerSize("x", (), ((None, 2), (None, 2, 3)))) == "(None, 2), (None, 2, 3)"
    assert output_text(LayerSize("x", (), (None,))) == "?"


def test_printable() -> None:
    assert printable("ähre 日本 a/b") == "ähre 日本 a/b"
    assert printable("a\x1b[31m\u202eb\x00\x9b\u2028") == r"a\x1b[31m\u202eb\x00\x9b\u2028"
    assert printable("a\nb") == r"a\nb"
    assert printable("a\nb", keep_lines=True) == "a\nb"
    assert printable("\udcff") == r"\udcff"


# ---------------------------------------------------------------------------------------------------------- page


class _Page(HTMLParser):
    """Holds a page to being well formed, and collects what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def parsed(page: str) -> _Page:
    result = _Page()
    result.feed(page)
    result.close()
    assert result.open == []
    return result


def test_page_is_whole_and_self_contained(report: Report) -> None:
    source = report_page(report)
    page = parsed(source)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.seen)
    assert page.links == []
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    words = "\n".join(page.text)
    for layer in report.plan.layers:
        assert layer.name in words
    for fact in report.plan.sources:
        assert fact.name in words
    for name, value in summary_rows(report):
        assert name in words
        assert value in words


def test_page_holds_digests_and_notes(sources: list[Path], tmp_path: Path) -> None:
    made = kmerge.combine(sources[:2], tmp_path / "m.h5", method="mean")
    words = "\n".join(parsed(report_page(replace(made, notes=("mind <this>",)))).text)
    for source in made.plan.sources:
        assert source.digest
        assert source.digest in words
    assert "mind <this>" in words


def test_page_escapes_what_comes_from_files(report: Report) -> None:
    hostile = "<script>alert('x')</script>&\"\x00"
    layers = tuple(replace(layer, name=hostile, class_name=hostile) for layer in report.plan.layers)
    facts = tuple(replace(source, label=hostile, name=hostile) for source in report.plan.sources)
    odd = replace(
        report, notes=(hostile,), heads={hostile: (hostile,)}, plan=replace(report.plan, layers=layers, sources=facts)
    )
    source = report_page(odd)
    assert "script" not in parsed(source).seen
    assert "\x00" not in source


def test_report_round_trips_as_json(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert found == report.to_dict()
    assert found["layers"][-1]["outputs"] == [[None, 5], [None, 3], [None, 2]]
    assert len(found["layers"]) == len(found["plan"]["layers"])
