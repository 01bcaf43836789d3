"""Reports as text and page, at every width and with whatever names."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kmerge
from kmerge.dialects.reading import Dialect
from kmerge.dialects.vocabulary import WeightKind
from kmerge.graph import Call, Graph, Layer, Ref, ancestors
from kmerge.live import RUNS_CODE
from kmerge.report.comparison import blocked_layers
from kmerge.report.facts import LayerSize, Report, Size
from kmerge.report.inspection import inspect_source
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
from kmerge.source import Source, State, Weight
from kmerge.store import Kind, Tensor
from kmerge.upgrade import refusals

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


# -------------------------------------------------------------------------------------------------- what is in a file


def opened(
    class_name: str, config: dict[str, Any], version: str = "2.2.4", dialect: Dialect = Dialect.KERAS2, *keys: str
) -> Source:
    """A source of one layer named "it", with weights of these keys, as `open_source` would give it."""
    layers = (Layer("in", "InputLayer", {"batch_input_shape": [None, 4, 3]}), Layer("it", class_name, config))
    calls = (Call(0), Call(1, [[Ref(0), {}]]))
    weights = tuple(
        Weight(key, key.rsplit("/", 1)[-1], WeightKind.WEIGHT, Unread((3, size), "float32", 3 * size, 12 * size, key))
        for size, key in enumerate(keys, 1)
    )
    return Source(
        label="a",
        name="a.h5",
        path=None,
        kind=Kind.H5,
        size=1,
        version=version,
        dialect=dialect,
        graph=Graph("g", layers, calls, [Ref(0)], [Ref(1)]),
        states=(State(), State(weights)),
    )


class Unread(Tensor):
    """A tensor of which nothing but its shape is asked."""

    def _read(self, start: int, raw: np.ndarray) -> None:
        raise AssertionError("an inspection reads no weight")


def test_weights_of_one_name_are_told_apart() -> None:
    keys = ("forward/kernel", "forward/bias", "backward/kernel", "backward/bias", "scale")
    layer = inspect_source(opened("Bidirectional", {}, "3.5.0", Dialect.KERAS3_H5, *keys)).layers[1]
    assert list(layer.weights) == list(keys)
    assert layer.weights["backward/kernel"] == (3, 3)
    assert layer.parameters == 45


HARD: dict[str, dict[str, Any]] = {
    "its own": {"activation": "hard_sigmoid"},
    "of the gates": {"activation": "tanh", "recurrent_activation": "hard_sigmoid"},
    "Keras 1's name": {"inner_activation": "hard_sigmoid"},
    "as an object": {"activation": {"class_name": "function", "config": "hard_sigmoid"}},
    "inside a wrapper": {"layer": {"class_name": "LSTM", "config": {"recurrent_activation": "hard_sigmoid"}}},
    "inside a list": {"cells": [{"class_name": "GRUCell", "config": {"recurrent_activation": "hard_sigmoid"}}]},
}


def hard(source: Source) -> list[str]:
    """Layers that current Keras would compute otherwise because of the old hard_sigmoid."""
    return [name for item in refusals(source) if item.silent and "hard_sigmoid" in item.reason for name in item.layers]


@pytest.mark.parametrize("config", HARD.values(), ids=HARD)
def test_the_old_hard_sigmoid_is_told(config: dict[str, Any]) -> None:
    for version in ("1.2.2", "2.2.4", "2.6.0", "2.4.0-tf", ""):
        source = opened("RNN", config, version)
        assert hard(source) == ["it"]
        told = [item for item in inspect_source(source).refused if item["silent"]]
        assert [item["layers"] for item in told] == [["it"]]
        assert told[0]["reason"].startswith("hard_sigmoid, clip(0.2x + 0.5) as it was")
    assert hard(opened("RNN", config, "2.15.0", Dialect.KERAS3)) == ["it"]
    for dialect in (Dialect.KERAS3, Dialect.KERAS3_H5):
        assert hard(opened("RNN", config, "3.0.0", dialect)) == []
        assert hard(opened("RNN", config, "", dialect)) == []


def test_other_activations_are_no_hard_sigmoid() -> None:
    assert hard(opened("LSTM", {"recurrent_activation": "sigmoid", "name": "hard_sigmoid"})) == []
    assert hard(opened("Dense", {"activation": None, "units": 3})) == []
    assert hard(opened("LSTM", {})) == ["it"]  # by default, before 2.3
    assert hard(opened("LSTM", {}, "2.3.0")) == []
    assert hard(replace(opened("LSTM", {}), graph=None)) == []


@pytest.mark.parametrize("class_name", RUNS_CODE)
def test_layers_that_hold_code_are_told(class_name: str) -> None:
    (hazard,) = inspect_source(opened(class_name, {})).hazards
    assert hazard == f"'it' ({class_name}) {RUNS_CODE[class_name]}: kmerge carries it along and never runs it"


@pytest.mark.parametrize(("trunk", "method"), [("none", "none"), ("auto", "mean")])
def test_no_method_where_nothing_is_merged(trunk: str, method: str, sources: list[Path], tmp_path: Path) -> None:
    kmerge.combine(sources, tmp_path / "m.h5", method="mean", trunk=trunk)
    shown = text(inspection_view(kmerge.inspect(tmp_path / "m.h5")), 120)
    assert f": method {method}, trunk {trunk}, " in shown


def test_what_stands_behind_a_layer_that_cannot_be_shared() -> None:
    """A layer called in two places is behind whatever one of its calls is behind."""
    wiring = [(0, []), (1, [0]), (2, [1]), (3, [0]), (2, [3]), (4, [2, 4]), (5, [0])]  # layer and parents, per call
    calls = tuple(Call(layer, [[Ref(call), {}] for call in above] or None) for layer, above in wiring)
    graph = Graph("g", tuple(Layer(str(n), "Dense", {}) for n in range(6)), calls, [Ref(0)], [Ref(5), Ref(6)])
    for blocking in range(6):
        above = {n: {calls[c].layer for c in ancestors(graph, graph.calls_of(n))} for n in range(6)}
        assert blocked_layers(graph, {blocking}) == {n for n in range(6) if blocking in above[n]}
    assert blocked_layers(graph, set()) == set()


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
