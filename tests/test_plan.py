"""Rules in, a role and a method per layer out; plans round-trip as JSON and can be replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from test_matching import Net, Recipe, chain, siamese, two_towers

import kmerge
from kmerge.errors import LayoutError, PlanError
from kmerge.plan import Calibration, LayerPlan, Plan, SourceFacts, read_plan
from kmerge.planning import make_plan
from kmerge.rules import Rules, unique_labels
from kmerge.source import open_source


class Bench:
    """Plans for models that recipes make."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack

    def save(self, *recipes: Recipe, suffix: str = ".h5") -> list[Path]:
        paths = []
        for seed, (label, recipe) in enumerate(zip("abc", recipes, strict=False)):
            net = Net(seed)
            paths.append(net.save(self.folder / f"{label}{suffix}", recipe(net)))
        return paths

    def plan(self, *recipes: Recipe, suffix: str = ".h5", **rules: Any) -> Plan:
        sources = [self.stack.enter_context(open_source(path)) for path in self.save(*recipes, suffix=suffix)]
        return make_plan(sources, Rules(**{"method": "mean", **rules}))

    def roles(self, *recipes: Recipe, **rules: Any) -> dict[str, str]:
        """Roles of the first source's layers; one recipe stands for two sources."""
        plan = self.plan(*(recipes if len(recipes) > 1 else recipes * 2), **rules)
        return {layer.name: layer.role for layer in plan.of_first}

    def private(self, *recipes: Recipe, **rules: Any) -> set[str]:
        return {name for name, role in self.roles(*recipes, **rules).items() if role == "private"}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


# ---- where the trunk ends by itself


def test_dense_head(bench: Bench) -> None:
    assert bench.private(chain) == {"dense_3"}


def test_head_with_an_activation_layer(bench: Bench) -> None:
    assert bench.private(lambda net: net.add("Softmax", chain(net))) == {"dense_3", "softmax"}


def test_dropout_before_the_head_is_shared(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        return net.dense(net.add("Dropout", net.dense(net.input(4), 4), rate=0.5), 2)

    assert bench.private(recipe) == {"dense_1"}


def test_dropout_of_another_rate_is_named_or_kept(bench: Bench) -> None:
    def recipe(rate: float) -> Recipe:
        return lambda net: net.dense(net.add("Dropout", net.dense(net.input(4), 4), rate=rate), 2)

    with pytest.raises(LayoutError, match=r"rate is 0.1 in 'a' but 0.5 in 'b'"):
        bench.plan(recipe(0.1), recipe(0.5))
    assert bench.private(recipe(0.1), recipe(0.5), roles=[("dropout", "private")]) == {"dense_1", "dropout"}


def test_several_outputs(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        x = net.dense(net.input(4), 4)
        return [net.dense(x, 2), net.add("Softmax", net.dense(net.dense(x, 3), 3))]

    assert bench.private(recipe) == {"dense_1", "dense_3", "softmax"}


def test_an_output_that_others_build_on(bench: Bench) -> None:
    """Whatever depends on a head is a head."""

    def recipe(net: Net) -> Any:
        x = net.dense(net.input(4), 4)
        early = net.dense(x, 3, name="early")
        return [early, net.dense(net.dense(early, 3, name="behind"), 2, name="late")]

    assert bench.private(recipe) == {"early", "behind", "late"}


def test_autoencoder(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        return net.dense(net.dense(net.dense(net.input(8), 4, name="code"), 4, name="decode"), 8, name="again")

    assert bench.private(recipe) == {"again"}


def test_a_convolution_as_head(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        x = net.conv(net.conv(net.input(8, 8, 1), 2), 5, name="classes")
        return net.add("Softmax", net.add("GlobalAveragePooling2D", x, shape=(None, 5)))

    assert bench.private(recipe) == {"classes", "global_average_pooling2d", "softmax"}


def test_two_towers_share_all_but_the_head(bench: Bench) -> None:
    assert bench.private(two_towers) == {"dense_2"}
    assert bench.private(siamese) == {"dense"}


def test_operations_are_followed(bench: Bench) -> None:
    """A residual sum and a normalisation behind the last kernel, as transformers have them."""

    def recipe(net: Net) -> Any:
        x = net.dense(net.input(4), 4)
        y = net.dense(x, 4, name="feed_forward")
        x = net.batch_normalization(net.operation("Add", x, y), name="last_normalization")
        return net.operation("Softmax", net.dense(net.operation("GetItem", x), 3, name="head"))

    assert bench.private(recipe, suffix=".keras") == {"head", "softmax"}


def test_a_normalisation_at_the_end_is_the_head(bench: Bench) -> None:
    """The last layer with weights, whatever it is."""
    assert bench.private(lambda net: net.batch_normalization(chain(net))) == {"batch_normalization"}


def test_without_weights_everything_is_shared(bench: Bench) -> None:
    assert bench.private(lambda net: net.add("Softmax", net.add("ReLU", net.input(4)))) == set()


def test_a_dropout_at_the_end_does_not_count(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        x = net.add("Dropout", net.dense(net.dense(net.input(4), 4), 2), weights={"seed_generator": (2,)}, rate=0.5)
        return x

    assert bench.private(recipe) == {"dense_1", "dropout"}


# ---- rules


def test_all_and_none(bench: Bench) -> None:
    assert bench.private(chain, trunk="all") == set()
    assert bench.private(chain, trunk="none") == {"dense", "dense_1", "dense_2", "dense_3"}
    assert bench.private(chain, trunk="none", inputs="separate") == {"input", "dense", "dense_1", "dense_2", "dense_3"}


def test_trunk_up_to_a_layer(bench: Bench) -> None:
    assert bench.private(chain, trunk="dense_1") == {"dense_2", "dense_3"}
    assert bench.private(chain, trunk="dense_3") == set()
    assert bench.private(chain, trunk="input") == {"dense", "dense_1", "dense_2", "dense_3"}


def test_trunk_up_to_a_layer_with_branches(bench: Bench) -> None:
    """What the layer depends on is shared, not what stands beside it."""
    assert bench.private(two_towers, trunk="dense") == {"dense_1", "concatenate", "dense_2"}
    assert bench.private(two_towers, trunk="concatenate") == {"dense_2"}
    assert bench.private(siamese, trunk="twin") == {"dense"}


def test_the_last_pattern_wins(bench: Bench) -> None:
    every, last = ("dense*", "private"), ("dense_3", "shared")
    assert bench.private(chain, roles=[every, last]) == {"dense", "dense_1", "dense_2"}
    assert bench.private(chain, roles=[last, every]) == {"dense", "dense_1", "dense_2", "dense_3"}
    assert bench.private(chain, trunk="all", roles=[("dense_[12]", "private")]) == {"dense_1", "dense_2"}
    assert bench.private(chain, trunk="none", roles=[("dense_?", "shared")]) == {"dense"}


def test_private_wins_over_share_in_keywords(bench: Bench) -> None:
    report = kmerge.combine(bench.save(chain, chain), dry_run=True, method="mean", share=["*"], private=["dense"])
    assert [layer.name for layer in report.plan.layers if layer.role == "private"] == ["dense"]


def test_a_star_leaves_inputs_alone(bench: Bench) -> None:
    assert bench.roles(chain, roles=[("*", "private")])["input"] == "shared"
    assert bench.roles(chain, roles=[("*", "shared")], inputs="separate")["input"] == "private"


def test_stateless_layers_follow_their_inputs(bench: Bench) -> None:
    """One ReLU in trunk and head: shared here, private there, so the layer is shared and the calls are two."""

    def recipe(net: Net) -> Any:
        x = net.add("ReLU", net.dense(net.input(4), 4), name="relu")
        return net.call("relu", net.dense(x, 4, name="head"))

    paths = bench.save(recipe, recipe)
    assert bench.private(recipe) == {"head"}
    kmerge.combine(paths, bench.folder / "out.h5", method="mean")
    with open_source(bench.folder / "out.h5") as merged:
        calls = [merged.graph.layers[call.layer].class_name for call in merged.graph.calls]
    assert calls.count("Dense") == 3
    assert calls.count("ReLU") == 3


def test_stateless_layers_behind_private_ones_are_private(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        return net.dense(net.add("ReLU", net.dense(net.input(4), 4)), 2)

    assert bench.private(recipe, trunk="all", roles=[("dense", "private")]) == {"dense", "re_lu"}


def test_a_stateless_layer_in_the_trunk_that_differs_raises(bench: Bench) -> None:
    def recipe(size: float) -> Recipe:
        return lambda net: net.dense(net.add("LeakyReLU", net.dense(net.input(4), 4), negative_slope=size), 2)

    with pytest.raises(LayoutError, match=r"negative_slope is 0.1 in 'a' but 0.3 in 'b'"):
        bench.plan(recipe(0.1), recipe(0.3))
    assert "leaky_re_lu" in bench.private(recipe(0.1), recipe(0.3), trunk="dense")


def test_shared_behind_private(bench: Bench) -> None:
    """Towers of another depth with one output layer for all."""

    def towers(depth: int) -> Recipe:
        def recipe(net: Net) -> Any:
            x = net.input(4)
            for _ in range(depth):
                x = net.batch_normalization(net.dense(x, 4))
            return net.dense(x, 2, name="out")

        return recipe

    plan = bench.plan(towers(1), towers(3), trunk="none", roles=[("out", "shared")])
    (out,) = [layer for layer in plan.layers if layer.name == "out"]
    assert (out.role, out.method, out.layers) == ("shared", "mean", ("out", "out"))
    alone = [layer for layer in plan.layers if layer.layers[0] is None]
    assert len(alone) == 4
    assert all(layer.role == "private" and layer.layers[1] == layer.name for layer in alone)


def test_heads_of_other_sizes(bench: Bench) -> None:
    plan = bench.plan(*(lambda net, classes=classes: chain(net, classes=classes) for classes in (2, 5, 9)))
    assert [layer.role for layer in plan.layers] == ["shared"] * 4 + ["private"]
    assert plan.layers[-1].layers == ("dense_3",) * 3


def test_every_layer_of_every_source_has_a_plan(bench: Bench) -> None:
    plan = bench.plan(chain, lambda net: net.add("Softmax", chain(net, 4)), chain)
    for place, count in enumerate((5, 7, 5)):
        names = [layer.layers[place] for layer in plan.layers if layer.layers[place] is not None]
        assert len(names) == len(set(names)) == count


def test_methods_and_options_stand_with_shared_weights_only(bench: Bench) -> None:
    def recipe(net: Net) -> Any:
        return net.dense(net.add("ReLU", net.dense(net.input(4), 4)), 2)

    plan = bench.plan(recipe, recipe, method="pick", options={"label": "b"})
    told = {layer.name: (layer.method, dict(layer.options), layer.has_weights) for layer in plan.layers}
    assert told == {
        "input": ("", {}, False),
        "dense": ("pick", {"label": "b"}, True),
        "re_lu": ("", {}, False),
        "dense_1": ("", {}, True),
    }


def test_weights_sum_to_one(bench: Bench) -> None:
    assert bench.plan(chain, chain, chain).weights == (1 / 3, 1 / 3, 1 / 3)
    assert bench.plan(chain, chain, weights=[1, 3]).weights == (0.25, 0.75)


# ---- learned state


def normalised(mean: float) -> Recipe:
    return lambda net: net.dense(net.dense(net.normalization(net.input(4), mean), 4), 2)


def test_equal_learned_state_is_shared(bench: Bench) -> None:
    plan = bench.plan(normalised(1.0), normalised(1.0))
    assert {layer.name: layer.role for layer in plan.layers}["normalization"] == "shared"
    assert not plan.notes


def test_other_learned_state_stays_private_and_says_so(bench: Bench) -> None:
    plan = bench.plan(normalised(1.0), normalised(2.0))
    assert {layer.name: layer.role for layer in plan.layers} == {
        "input": "shared",
        "normalization": "private",
        "dense": "shared",
        "dense_1": "private",
    }
    (note,) = plan.notes
    assert "'normalization' (Normalization) stays private" in note
    assert "1.0 in 'a' but 2.0 in 'b'" in note
    assert "once per source" in note


@pytest.mark.parametrize("rules", [{"trunk": "all"}, {"roles": [("norm*", "shared")]}, {"roles": [("*", "shared")]}])
def test_other_learned_state_cannot_be_shared(bench: Bench, rules: dict[str, Any]) -> None:
    with pytest.raises(
        LayoutError, match=r"mean is 1.0 in 'a' but 2.0 in 'b'.\nShared layers need equal learned state"
    ):
        bench.plan(normalised(1.0), normalised(2.0), **rules)


def test_other_learned_state_may_be_private(bench: Bench) -> None:
    plan = bench.plan(normalised(1.0), normalised(2.0), trunk="all", roles=[("norm*", "private")])
    assert [layer.role for layer in plan.layers] == ["shared", "private", "shared", "shared"]
    assert not plan.notes


# ---- plans as JSON

names = st.text(max_size=12)
options = st.dictionaries(
    names, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names, max_size=2
)


@st.composite
def plans(draw: Any) -> Plan:
    count = draw(st.integers(2, 4))
    facts = st.builds(SourceFacts, names, names, st.integers(0, 2**60), names, names, st.none() | options)
    layers = st.builds(
        LayerPlan,
        names,
        names,
        st.sampled_from(["shared", "private"]),
        names,
        options,
        st.tuples(*[st.none() | names] * count),
        st.booleans(),
    )
    weights = np.array(draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count)))
    return Plan(
        sources=tuple(draw(st.lists(facts, min_size=count, max_size=count))),
        layers=tuple(draw(st.lists(layers, max_size=3))),
        method=draw(names),
        options=draw(options),
        weights=tuple((weights / weights.sum()).tolist()),
        trunk=draw(names),
        inputs=draw(st.sampled_from(["shared", "separate"])),
        outputs=draw(st.sampled_from(["heads", "list", "mean"])),
        freeze=draw(st.booleans()),
        notes=tuple(draw(st.lists(names, max_size=2))),
        kmerge=draw(names),
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_round_trip(plan: Plan) -> None:
    text = json.dumps(plan.to_dict())
    assert Plan.from_dict(json.loads(text)) == plan
    assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()


def test_weights_of_an_edited_plan_are_shares(bench: Bench) -> None:
    values = bench.plan(chain, chain).to_dict()
    assert Plan.from_dict({**values, "weights": [1, 3]}).weights == (0.25, 0.75)


def test_a_plan_comes_from_anything(bench: Bench) -> None:
    plan = bench.plan(chain, chain)
    path = bench.folder / "plan.json"
    assert read_plan(plan) is plan
    assert read_plan(plan.to_dict()) == plan
    for content in (plan.to_dict(), {"plan": plan.to_dict(), "output": None}):
        path.write_text(json.dumps(content))
        assert read_plan(path) == read_plan(str(path)) == plan


def read(path: Path) -> dict[str, np.ndarray]:
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def same(first: Path, second: Path) -> bool:
    one, two = read(first), read(second)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"trunk": "all", "method": "median"},
        {"trunk": "none", "inputs": "separate"},
        {"private": ["dense_1"], "weights": [1, 3], "freeze": True},
        {"outputs": "mean", "method": "pick", "option": {"label": "b"}},
    ],
    ids=str,
)
def test_a_plan_can_be_replayed(bench: Bench, rules: dict[str, Any]) -> None:
    """From the plan, its JSON and the merged model itself, the same model."""
    paths, first = bench.save(chain, chain), bench.folder / "first.h5"
    plan = kmerge.combine(paths, first, **{"method": "mean", **rules}).plan
    (bench.folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    for number, given_plan in enumerate((plan, plan.to_dict(), bench.folder / "plan.json", first)):
        again = bench.folder / f"again_{number}.h5"
        report = kmerge.combine(paths, again, plan=given_plan)
        assert same(first, again)
        assert replace(report.plan, sources=plan.sources) == plan
        assert not report.notes


def test_a_replay_is_of_positions(bench: Bench) -> None:
    """Another process gave the same layers other names."""
    plan = kmerge.combine(bench.save(chain, chain), dry_run=True, method="mean", private=["dense_1"]).plan
    later = Net(5, count=8)
    path = later.save(bench.folder / "later.h5", chain(later))
    report = kmerge.combine([path, bench.folder / "b.h5"], plan=plan, dry_run=True)
    assert [layer.role for layer in report.plan.of_first] == [layer.role for layer in plan.of_first]


def test_a_replay_with_other_sources_says_so(bench: Bench) -> None:
    plan = kmerge.combine(bench.save(chain, chain), bench.folder / "first.h5", method="mean").plan
    paths = bench.save(chain, lambda net: chain(Net.__init__(net, 77) or net))
    report = kmerge.combine(paths, bench.folder / "again.h5", plan=plan)
    assert report.notes == ("'b': b.h5 is not the model that the plan was made from",)


def test_labels_of_a_replay(bench: Bench) -> None:
    paths = bench.save(chain, chain)
    plan = kmerge.combine(paths, dry_run=True, method="mean", labels=["x", "y"]).plan
    assert kmerge.combine(paths, dry_run=True, plan=plan).plan.labels == ("x", "y")
    assert kmerge.combine(paths, dry_run=True, plan=plan, labels=["v", "w"]).plan.labels == ("v", "w")


# ---- labels, freezing


@given(st.lists(st.sampled_from(["a", "a_2", "a_3", "b", ""]), max_size=8))
def test_labels_are_told_apart(labels: list[str]) -> None:
    told = unique_labels(labels)
    assert len(set(told)) == len(told) == len(labels)
    assert all(new == old or new.startswith(f"{old}_") for old, new in zip(labels, told, strict=True))
    assert all(new == old for old, new in zip(labels, told, strict=True) if labels.count(old) == 1)


def test_labels_keep_what_is_unique() -> None:
    assert unique_labels(["a", "a", "a_2"]) == ["a", "a_3", "a_2"]
    assert unique_labels(["model", "b", "model"]) == ["model", "b", "model_2"]


def test_freeze_is_for_shared_layers(bench: Bench) -> None:
    kmerge.combine(bench.save(chain, chain), bench.folder / "out.h5", method="mean", freeze=True)
    with open_source(bench.folder / "out.h5") as merged:
        trainable = {layer.name: layer.config.get("trainable") for layer in merged.graph.layers if not layer.is_input}
    assert trainable == {"dense": False, "dense_1": False, "dense_2": False, "a": True, "b": True}


def test_nothing_is_planned_twice_for_one_source(bench: Bench) -> None:
    with pytest.raises(PlanError, match="at least two sources: 1 given"):
        bench.plan(chain)


# ---- formats of plans


def test_a_plan_of_the_first_format_is_read_with_defaults(bench: Bench) -> None:
    plan = bench.plan(chain, chain)
    old = plan.to_dict()
    old["format"] = 1
    for key in ("width", "keep", "seed", "calibration"):
        del old[key]
    assert Plan.from_dict(old) == plan


def test_a_plan_holds_on_what_its_models_are_run(bench: Bench) -> None:
    plan = bench.plan(chain, chain, method="fuse", width=1.5, keep=0.9, seed=3)
    plan = replace(plan, calibration=Calibration("40 inputs from x.npz", 40, False))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert (plan.width, plan.keep, plan.seed) == (1.5, 0.9, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": "2"},
        {"width": None},
        {"keep": "all"},
        {"seed": 1.5},
        {"seed": True},
        {"calibration": 5},
        {"calibration": {"inputs": "x"}},
        {"calibration": {"inputs": "x", "rows": "many", "synthetic": True}},
        {"calibration": {"inputs": "x", "rows": 1, "synthetic": 1}},
    ],
    ids=str,
)
def test_a_plan_with_other_kinds_of_facts_is_none(wrong: dict[str, Any], bench: Bench) -> None:
    with pytest.raises(PlanError, match="no plan of kmerge"):
        Plan.from_dict({**bench.plan(chain, chain).to_dict(), **wrong})
