"""Feature spaces: by hand for small networks, and by the law that permuting one never changes what is computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

from kmerge.align import Alignment, PermutedTensor, permuted
from kmerge.layout import lay_out, source_graph
from kmerge.source import Source, open_source
from kmerge.spaces import AxisUse, Space, derive_spaces, describe, layout_spaces, order_of
from kmerge.spaces.units import Equations

# Every case with a graph that Keras saves. Where Keras loads a shared layer as two, a file is not its live model.
NAMES = [
    name for name, case in zoo.CASES.items() if case.formats and name not in ("subclassed", "shared_inside_and_outside")
]


@contextmanager
def saved(model: Any, label: str = "a", suffix: str = ".keras") -> Iterator[Source]:
    """A live model, opened from a file."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_source(zoo.save(model, Path(folder) / f"m{suffix}"), label) as source,
    ):
        yield source


def built(recipe: Callable[[Any], Any], *specs: zoo.Spec) -> Any:
    """A model of the zoo's kind: `recipe(bench, *inputs)` gives its outputs."""
    return zoo.TopologyCase("built", list(specs), lambda b, x: recipe(b, *x)).build(1)


def shuffled(source: Source, spaces: tuple[Space, ...], seed: int = 0) -> Alignment:
    """A random order of every space that is free; never the order it has, where there is another."""
    rng = np.random.default_rng(seed)
    orders = []
    for space in spaces:
        order = np.arange(space.size)
        while not space.fixed and space.size > 1 and np.array_equal(order, np.arange(space.size)):
            order = rng.permutation(space.size)
        orders.append(order)
    return Alignment((source.label,), spaces, (tuple(orders),))


def assign(model: Any, twin: Source) -> int:
    """Bring a twin's weights into the live model it comes from; returns how many moved. Random weights tell which."""
    variables = [
        (variable, np.asarray(variable.numpy())) for variable in model.variables if "float" in str(variable.dtype)
    ]
    moved = 0
    for state in twin.states:
        for weight in state.weights:
            if isinstance(weight.tensor, PermutedTensor):
                old = weight.tensor.original.read()
                found = [one for one, value in variables if value.shape == old.shape and np.array_equal(value, old)]
                assert found, weight.key
                for variable in found:
                    variable.assign(weight.tensor.read())
                moved += 1
    return moved


def largest_difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    pairs = zip(first, second, strict=True)
    return max(float(np.max(np.abs(a.astype("float64") - b.astype("float64")), initial=0)) for a, b in pairs)


# ---- the law


@pytest.mark.parametrize("name", NAMES)
def test_permuting_every_free_space_keeps_the_function(name: str) -> None:
    case = zoo.CASES[name]
    model = case.build(1)
    with tempfile.TemporaryDirectory() as folder:
        path = zoo.save(model, Path(folder) / f"m{case.formats[0]}")
        if "lora" in name:  # a file holds the sum of kernel and adapter
            model = zoo.load(path)
        with open_source(path, "a") as source:
            spaces = derive_spaces(source)
            alignment = shuffled(source, spaces)
            inputs = case.inputs()
            before = zoo.predictions(model, inputs)
            moved = assign(model, permuted(source, alignment))
    assert (moved > 0) is any(not space.fixed and space.size > 1 for space in spaces)
    assert largest_difference(before, zoo.predictions(model, inputs)) < 1e-5
    assert all(space.reason for space in spaces if space.fixed)
    for space in spaces:
        assert {int(unit) for use in space.axes for unit in use.units} <= {-1, *range(space.size)}
        assert all(len(use.places) == space.size for use in space.axes)


@pytest.mark.parametrize("name", ["u_net", "transformer", "bidirectional", "encoder_decoder", "nested_called_in_a_row"])
def test_old_files_have_the_same_spaces(name: str) -> None:
    case = zoo.CASES[name]
    found = []
    for suffix in (".keras", ".h5"):
        if suffix in case.formats:
            with saved(case.build(1), suffix=suffix) as source:
                found.append(sorted((space.size, space.fixed, len(space.axes)) for space in derive_spaces(source)))
    assert all(rows == found[0] for rows in found)


def _inside_out(b: Any, x: Any) -> Any:
    """Depthwise, groups, a channel-wise gate, and a Flatten, as in mobile networks."""
    y = b.BatchNormalization()(b.Conv2D(6, 1, use_bias=False)(x))
    y = b.ReLU(6.0)(b.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(y))
    gate = b.Dense(12, activation="sigmoid")(b.Dense(3, activation="relu")(b.GlobalAveragePooling2D(keepdims=True)(y)))
    y = b.Conv2D(8, 3, groups=2, padding="same")(b.Multiply()([y, gate]))
    return b.head(b.Flatten()(b.GroupNormalization(groups=2)(y)))


def _channels_first(b: Any, x: Any) -> Any:
    # As many channels as columns, and Keras 3.15.1 on TensorFlow adds the bias along the wrong axis.
    y = b.Conv2D(6, 2, data_format="channels_first")(x)
    y = b.MaxPooling2D(2, data_format="channels_first")(b.PReLU(shared_axes=[2, 3])(y))
    return b.head(b.Concatenate()([b.Flatten()(y), b.Flatten(data_format="channels_first")(y)]))


def _mixer(b: Any, x: Any) -> Any:
    """Dense layers along both axes in turn."""
    y = b.Permute((2, 1))(b.Dense(5, activation="gelu")(b.Permute((2, 1))(b.Dense(4)(x))))
    return b.head(b.GlobalAveragePooling1D()(b.LayerNormalization()(b.Dense(6)(y))))


def _einsums(b: Any, x: Any) -> Any:
    y = b.EinsumDense("abc,cde->abde", output_shape=(3, 3, 4), bias_axes="de")(x)
    return b.head(b.EinsumDense("abde,def->abf", output_shape=(3, 5), bias_axes="f")(y))


def _several_grus(b: Any, x: Any) -> Any:
    y, state = b.GRU(4, return_sequences=True, return_state=True)(x)
    z = b.Bidirectional(b.LSTM(3, return_sequences=True), merge_mode="mul")(y)
    return b.head(b.Concatenate()([b.GRU(4)(z, initial_state=state), b.GlobalMaxPooling1D()(z)]))


def _steps_of_images(b: Any, x: Any) -> Any:
    """A network for each step, as recurrent networks over images have it."""
    inner = b.keras.Sequential([b.keras.Input((4, 4, 1)), b.Conv2D(5, 3), b.PReLU(), b.Flatten(), b.Dense(6)])
    y = b.SpectralNormalization(b.Dense(7))(b.TimeDistributed(inner)(x))
    return b.head(b.LSTM(3)(b.TimeDistributed(b.BatchNormalization())(y)))


def _heads_of_two_kinds(b: Any, x: Any) -> Any:
    y = b.Dense(6)(x)
    y = b.LayerNormalization()(b.Add()([y, b.MultiHeadAttention(3, 2, value_dim=4)(y, b.Dense(5)(x), b.Dense(7)(x))]))
    return b.head(b.GroupQueryAttention(2, 4, 2)(y, y))


@pytest.mark.parametrize(
    ("recipe", "spec", "sizes"),
    [
        (_inside_out, zoo.F(4, 4, 2), [3, 3, 3, 4, 4]),
        (_channels_first, zoo.F(2, 5, 5), [6]),
        (_mixer, zoo.F(3, 2), [4, 5, 6]),
        (_einsums, zoo.F(3, 2), [3, 4, 5]),
        (_several_grus, zoo.F(4, 3), [3, 4]),
        (_steps_of_images, zoo.F(3, 4, 4, 1), [3, 5, 6, 7]),
        (_heads_of_two_kinds, zoo.F(4, 3), [2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_the_law_for_networks_of_many_parts(recipe: Any, spec: zoo.Spec, sizes: list[int]) -> None:
    model = built(recipe, spec)
    inputs = [spec.draw(4, np.random.default_rng(0))]
    with saved(model) as source:
        spaces = derive_spaces(source)
        before = zoo.predictions(model, inputs)
        assign(model, permuted(source, shuffled(source, spaces)))
    assert largest_difference(before, zoo.predictions(model, inputs)) < 1e-5
    assert sorted(space.size for space in spaces if not space.fixed) == sizes


# ---- by hand


def summary(source: Source, space: Space) -> list[str]:
    """One line per axis: role, layer, weight, axis, mapping."""
    lines = []
    for use in space.axes:
        layer = source_graph(source).layers[use.layer]
        weight = source.states[use.layer].weights[use.weight].name
        lines.append(f"{use.role} {layer.class_name} {weight}[{use.axis}] {use.mapping}")
    return lines


def spaces_of(model: Any) -> tuple[list[tuple[int, str]], list[list[str]]]:
    with saved(model) as source:
        found = derive_spaces(source)
        names = [source_graph(source).layers[0].name, source_graph(source).layers[-1].name]
        reasons = [space.reason for space in found]
        for name, short in zip(names, ("input", "last"), strict=True):
            reasons = [reason.replace(f"'{name}'", short) for reason in reasons]
        sizes = [(space.size, reason) for space, reason in zip(found, reasons, strict=True)]
        return sizes, [summary(source, space) for space in found]


def test_mlp() -> None:
    sizes, axes = spaces_of(built(lambda b, x: b.Dense(3)(b.Dense(4, activation="relu")(b.Dense(5)(x))), zoo.F(6)))
    assert sizes == [(6, "input input"), (5, ""), (4, ""), (3, "output of last")]
    free = [rows for (_, reason), rows in zip(sizes, axes, strict=True) if not reason]
    assert free == [
        [
            "output Dense kernel[1] each once",
            "output Dense bias[0] each once",
            "input Dense kernel[0] each once",
        ],
        [
            "output Dense kernel[1] each once",
            "output Dense bias[0] each once",
            "input Dense kernel[0] each once",
        ],
    ]


def free_of(recipe: Callable[..., Any], *specs: zoo.Spec) -> dict[int, list[str]]:
    """Axes of the free spaces, by size; no two of them are equally large."""
    sizes, axes = spaces_of(built(recipe, *specs))
    found = {size: rows for (size, reason), rows in zip(sizes, axes, strict=True) if not reason}
    assert len(found) == sum(not reason for _, reason in sizes)
    return found


def test_cnn_with_normalisation_and_flatten() -> None:
    def recipe(b: Any, x: Any) -> Any:
        y = b.MaxPooling2D()(b.ReLU()(b.BatchNormalization()(b.Conv2D(5, 3)(x))))
        return b.Dense(2)(b.Dropout(0.2)(b.Flatten()(y)))

    assert free_of(recipe, zoo.F(6, 6, 1)) == {
        5: [
            "output Conv2D kernel[3] each once",
            "output Conv2D bias[0] each once",
            "output BatchNormalization gamma[0] each once",
            "output BatchNormalization beta[0] each once",
            "output BatchNormalization moving_mean[0] each once",
            "output BatchNormalization moving_variance[0] each once",
            "input Dense kernel[0] 4 blocks of all",
        ]
    }


def test_channels_first_flatten() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(2)(b.Flatten()(b.Conv2D(5, 3, use_bias=False, data_format="channels_first")(x)))

    assert free_of(recipe, zoo.F(1, 4, 4)) == {
        5: ["output Conv2D kernel[3] each once", "input Dense kernel[0] each 4 times in a row"]
    }


def test_residual_block() -> None:
    def recipe(b: Any, x: Any) -> Any:
        y = b.Dense(5, use_bias=False)(x)
        y = b.Add()([y, b.Dense(5, use_bias=False)(b.Dense(7, use_bias=False)(y))])
        return b.Dense(2)(y)

    kernel = "Dense kernel"
    assert free_of(recipe, zoo.F(3)) == {
        5: [
            f"output {kernel}[1] each once",
            f"input {kernel}[0] each once",
            f"output {kernel}[1] each once",
            f"input {kernel}[0] each once",
        ],
        7: [f"output {kernel}[1] each once", f"input {kernel}[0] each once"],
    }


def test_two_branches_side_by_side() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(2)(b.Concatenate()([b.Dense(4, use_bias=False)(x), b.Dense(5, use_bias=False)(x)]))

    assert free_of(recipe, zoo.F(3)) == {
        4: ["output Dense kernel[1] each once", "input Dense kernel[0] at 0 to 3 of 9"],
        5: ["output Dense kernel[1] each once", "input Dense kernel[0] at 4 to 8 of 9"],
    }


@pytest.mark.parametrize(("kind", "gates"), [("SimpleRNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrence(kind: str, gates: int) -> None:
    mapping = f"{gates} blocks of all" if gates > 1 else "each once"
    assert free_of(lambda b, x: b.Dense(2)(getattr(b, kind)(5)(x)), zoo.F(4, 3)) == {
        5: [
            f"output {kind} kernel[1] {mapping}",
            f"input {kind} recurrent_kernel[0] each once",
            f"output {kind} recurrent_kernel[1] {mapping}",
            f"output {kind} bias[{int(kind == 'GRU')}] {mapping}",
            "input Dense kernel[0] each once",
        ]
    }


def test_groups_are_convolutions_of_their_own() -> None:
    with saved(built(lambda b, x: b.head(b.Conv2D(6, 2, groups=2)(b.Conv2D(8, 1)(x))), zoo.F(3, 3, 1))) as source:
        free = [space for space in derive_spaces(source) if not space.fixed]
        parts = [[use.part for use in space.axes if use.part] for space in free]
    assert [space.size for space in free] == [4, 4, 3, 3]
    assert parts == [[((3, 0, 3),)], [((3, 3, 6),)], [], []]


def test_attention_has_heads_and_dimensions_within() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.head(b.MultiHeadAttention(3, 4, value_dim=5, use_bias=False)(x, x))

    with saved(built(recipe, zoo.F(4, 6))) as source:
        free = [space for space in derive_spaces(source) if not space.fixed]
    assert sorted(space.size for space in free) == [3, 4, 4, 4, 5, 5, 5, 6]
    heads = next(space for space in free if space.size == 3)
    assert [(use.axis, use.part, use.role) for use in heads.axes] == [
        (1, (), "output"),
        (1, (), "output"),
        (1, (), "output"),
        (0, (), "input"),
    ]
    within = [space for space in free if space.size == 4]
    assert [{use.part for use in space.axes} for space in within] == [{((1, head, head + 1),)} for head in range(3)]


def test_a_layer_called_twice_ties_its_calls() -> None:
    def recipe(b: Any, x: Any) -> Any:
        outer, inner = b.Dense(5, use_bias=False), b.Dense(5, use_bias=False)
        return b.Dense(2)(outer(inner(outer(b.Dense(5, use_bias=False)(x)))))

    sizes, axes = spaces_of(built(recipe, zoo.F(3)))
    free = [[row.split()[0] for row in rows] for (_, reason), rows in zip(sizes, axes, strict=True) if not reason]
    assert free == [["output", "input", "output"], ["output", "input", "input"]]


# ---- what is fixed


def reasons(recipe: Callable[..., Any], *specs: zoo.Spec) -> dict[int, str]:
    sizes, _ = spaces_of(built(recipe, *specs))
    return dict(sizes)


def test_inputs_and_outputs_are_fixed() -> None:
    assert reasons(lambda b, x: b.Dense(3)(x), zoo.F(6)) == {6: "input input", 3: "output of last"}


def test_softmax_in_the_middle_is_free_and_noted() -> None:
    model = built(
        lambda b, x: b.Dense(3)(b.Softmax(name="soft")(b.Dense(5, activation="softmax", name="d")(x))), zoo.F(6)
    )
    with saved(model) as source:
        (space,) = (space for space in derive_spaces(source) if space.size == 5)
    assert not space.fixed
    assert space.notes == ("'d' (Dense) acts across its units", "'soft' (Softmax) acts across its units")


def test_custom_layers_fix_what_flows_in_and_out() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(3)(zoo.register().Scaled(7, name="odd")(b.Dense(5)(x)))

    found = reasons(recipe, zoo.F(6))
    assert found[5] == "read by 'odd' (Scaled): kmerge does not know this layer"
    assert found[7] == "made by 'odd' (Scaled): kmerge does not know this layer"


def test_reshape_that_splits_channels() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.head(b.Reshape((2, 4), name="split")(b.Dense(8)(x)))

    sizes, axes = spaces_of(built(recipe, zoo.F(6)))
    (dense,) = (n for n, rows in enumerate(axes) if "output Dense kernel[1] each once" in rows and sizes[n][0] == 8)
    assert sizes[dense] == (8, "'split' (Reshape) splits the axis of its units")


def test_reshape_that_only_moves_axes() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(2)(b.Reshape((-1,))(b.Reshape((4, 1, 5))(b.Reshape((2, 2, 5))(b.Conv1D(5, 1)(x)))))

    assert free_of(recipe, zoo.F(4, 3))[5][-1] == "input Dense kernel[0] 4 blocks of all"


def test_units_that_meet_a_fixed_tensor_are_fixed() -> None:
    found = reasons(lambda b, x: b.Dense(2)(b.Add()([x, b.Dense(6, use_bias=False)(b.Dense(5)(x))])), zoo.F(6))
    assert found == {5: "", 6: "input input", 2: "output of last"}


def test_a_window_over_units_fixes_them() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.head(b.MaxPooling1D(2, name="pool")(b.Permute((2, 1))(b.Conv1D(8, 1)(x))))

    assert reasons(recipe, zoo.F(4, 3))[8] == "'pool' (MaxPooling1D) slides over positions"


def test_constants_and_single_units_are_fixed() -> None:
    assert (
        "constants"
        in reasons(lambda b, x: b.head(b.Dense(5, name="d")(x) * np.arange(5.0, dtype="float32")), zoo.F(6))[5]
    )
    assert (
        "by its number"
        in reasons(lambda b, x: b.head(b.Dense(5)(x)[:, 2:3] + b.Dense(7)(x)[:, 2][:, None]), zoo.F(6))[7]
    )


def test_a_layer_that_also_reads_an_input_fixes_its_units() -> None:
    def recipe(b: Any, x: Any) -> Any:
        shared = b.LayerNormalization()
        return b.Dense(2)(b.Concatenate()([shared(x), shared(b.Dense(6)(b.Dense(5)(x)))]))

    model = built(recipe, zoo.F(6))
    with saved(model) as source:
        assert [space.size for space in derive_spaces(source) if not space.fixed] == [5]


def test_code_is_not_guessed() -> None:
    def recipe(b: Any, x: Any) -> Any:
        return b.Dense(2)(b.Lambda(lambda y: y[..., ::-1], output_shape=(5,), name="turn")(b.Dense(5)(x)))

    found = [reason for _, reason in spaces_of(built(recipe, zoo.F(6)))[0]]
    assert found[1:3] == [f"{how} by 'turn' (Lambda): kmerge does not know this layer" for how in ("read", "made")]


def test_an_activation_that_is_not_known() -> None:
    import keras

    @keras.saving.register_keras_serializable("spaces")
    def odd(x: Any) -> Any:
        return x

    assert "activation" in reasons(lambda b, x: b.head(b.Dense(5, activation=odd)(x)), zoo.F(6))[5]


# ---- several sources


def test_what_one_source_fixes_is_fixed_where_it_is_shared() -> None:
    def plain(b: Any, x: Any) -> Any:
        return b.Dense(2)(b.Dense(7)(b.Dense(5)(x)))

    def odd(b: Any, x: Any) -> Any:
        return b.Dense(2)(zoo.register().Scaled(7)(b.Dense(5)(x)))

    with (
        saved(built(plain, zoo.F(6)), "a") as one,
        saved(built(plain, zoo.F(6)), "b") as two,
        saved(built(odd, zoo.F(6)), "c") as three,
    ):
        both = layout_spaces(lay_out([one, two]), [1])
        assert [(space.size, space.fixed) for space in both if space.size == 5] == [(5, False)]
        (space,) = (space for space in both if space.size == 5)
        assert [(use.source, use.layer, use.axis) for use in space.axes] == [
            (0, 1, 1), (0, 1, 0), (0, 2, 0), (1, 1, 1), (1, 1, 0), (1, 2, 0),
        ]  # fmt: skip
        assert [space.fixed for space in layout_spaces(lay_out([one, three]), [1]) if space.size == 5] == [True]
        assert len(describe(both, [one, two])) == len(both) + sum(len(space.axes) for space in both)


# ---- equations


def test_equal_positions_hold_equal_units() -> None:
    equations = Equations()
    small, large = equations.fresh(3), equations.fresh(6)
    equations.tie(np.tile(small, 2), large)
    found = equations.solve()
    assert found.sizes == (3,)
    np.testing.assert_array_equal(found.unit[large], [0, 1, 2, 0, 1, 2])


def test_units_cut_out_stay_together() -> None:
    equations = Equations()
    units = equations.fresh(5)
    equations.keep_whole(units[:2])
    assert sorted(equations.solve().sizes) == [2, 3]


def test_pins_spread_over_ties_and_the_first_reason_counts() -> None:
    equations = Equations()
    one, two = equations.fresh(3), equations.fresh(3)
    equations.tie(one, two)
    equations.pin(one[:1], "first")
    equations.pin(two, "second")
    found = equations.solve()
    assert sorted(zip(found.sizes, found.reasons, strict=True)) == [(1, "first"), (2, "second")]


def test_order_of_an_axis_by_hand() -> None:
    blocks = AxisUse(0, 0, 0, 0, np.array([-1, 0, 1, 0, 1]), "input")
    np.testing.assert_array_equal(order_of([(blocks, np.array([1, 0]))], 5), [0, 2, 1, 4, 3])
    assert blocks.mapping == "each 2 times among 5"
