"""Laws that every method of the registry keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import COUNTS, FLOATS, SHAPES, arrays, shares, weighted_stacks

from kmerge.methods import METHODS, Method

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TOLERANCE = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}

# Departures from a law, each with its reason.
WEIGHTS_DO_NOT_MATTER = {"pick": "takes one source, whatever its weight"}
ROBUST = {"median": "a source with less than half of the importance cannot move it: that is its purpose"}


def call(method: Method, stack: np.ndarray, weights: np.ndarray, chosen: int = 0) -> np.ndarray:
    """The method with its default options; `pick` takes the source with number `chosen`."""
    if method.name == "pick":
        labels = [f"source {number}" for number in range(len(stack))]
        return method.function(stack, weights=weights, label=labels[chosen], labels=labels)
    return method.function(stack, weights=weights)


def close(first: np.ndarray, second: np.ndarray, scale: float = 1000.0) -> bool:
    tolerance = TOLERANCE[first.dtype.name]
    return np.allclose(first.astype(np.float64), second.astype(np.float64), rtol=tolerance, atol=tolerance * scale)


@EVERY_METHOD
@given(value=arrays(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_equal_sources_return_themselves(method: Method, value: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from(COUNTS))
    weights = data.draw(shares(count))
    stack = np.stack([value] * count)
    assert call(method, stack, weights).tobytes() == value.tobytes()


@EVERY_METHOD
@given(drawn=weighted_stacks(min_count=2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter(method: Method, drawn: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    stack, weights = drawn
    order = data.draw(st.permutations(range(len(stack))))
    chosen = data.draw(st.sampled_from(order))
    before = call(method, stack, weights, chosen)
    after = call(method, stack[order], weights[order], order.index(chosen))
    assert close(before, after)


@EVERY_METHOD
@given(drawn=weighted_stacks())
@settings(max_examples=60, deadline=None)
def test_shape_and_dtype_are_kept_and_the_result_lies_among_the_sources(
    method: Method, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    stack, weights = drawn
    before = stack.copy()
    result = call(method, stack, weights)
    assert isinstance(result, np.ndarray)
    assert (result.shape, result.dtype) == (stack.shape[1:], stack.dtype)
    assert not np.shares_memory(result, stack)
    assert stack.tobytes() == before.tobytes()
    assert np.all(np.isfinite(result))
    slack = TOLERANCE[stack.dtype.name] * 1000
    assert np.all(result.astype("f8") >= stack.min(axis=0).astype("f8") - slack)
    assert np.all(result.astype("f8") <= stack.max(axis=0).astype("f8") + slack)


@EVERY_METHOD
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) < 2])
@pytest.mark.parametrize("count", COUNTS)
def test_a_change_never_becomes_none(method: Method, dtype: str, shape: tuple[int, ...], count: int) -> None:
    rng = np.random.default_rng([count, len(shape)])
    base = rng.standard_normal(shape).astype(dtype)
    for index in range(count):
        stack = np.stack([base] * count)
        stack[index, ...] += np.dtype(dtype).type(0.5)
        merged = call(method, stack, np.full(count, 1 / count), chosen=index)
        assert np.all(merged != base) or (method.name in ROBUST and count > 2)


@EVERY_METHOD
@given(data=st.data(), value=arrays())
@settings(max_examples=60, deadline=None)
def test_weight_zero_leaves_a_source_out(method: Method, data: st.DataObject, value: np.ndarray) -> None:
    if method.name in WEIGHTS_DO_NOT_MATTER:
        return
    count = data.draw(st.sampled_from([n for n in COUNTS if n > 1]))
    stack = np.stack([value * np.asarray(number + 1, value.dtype) / 8 for number in range(count)]).astype(value.dtype)
    weights = data.draw(shares(count))
    left_out = data.draw(st.sampled_from(range(count)))
    weights[left_out] = 0
    if not weights.any():
        weights[(left_out + 1) % count] = 1
    weights /= weights.sum()
    alone = call(method, np.delete(stack, left_out, axis=0), np.delete(weights, left_out))
    for poison in (np.nan, np.inf, 7):
        stack[left_out, ...] = poison
        assert call(method, stack, weights).tobytes() == alone.tobytes()


@EVERY_METHOD
def test_the_whole_weight_on_one_source_gives_that_source(method: Method) -> None:
    stack = np.random.default_rng(0).standard_normal((3, 4))
    for number in range(3):
        np.testing.assert_array_equal(call(method, stack, np.eye(3)[number], number), stack[number])


@EVERY_METHOD
def test_blocks_of_a_weight_merge_like_the_whole(method: Method) -> None:
    if method.scope != "element":
        return
    stack = np.random.default_rng(0).standard_normal((3, 1000)).astype("f4")
    weights = np.array([0.5, 0.2, 0.3])
    blocks = [call(method, stack[:, start : start + 96], weights, 2) for start in range(0, 1000, 96)]
    assert np.concatenate(blocks).tobytes() == call(method, stack, weights, 2).tobytes()


@EVERY_METHOD
def test_what_a_method_declares(method: Method) -> None:
    assert METHODS[method.name] is method
    assert method.scope in ("element", "tensor", "model")
    assert method.summary.endswith(".")
    assert method.paper
    facts = method.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert all(f"{option}:" in facts["description"] for option in method.options)


MERGE = """
import hashlib, sys
from kmerge.methods import METHODS
from test_engine import merge, random_source, shared_targets
sources = [random_source(label, seed, sizes=(3, 200_001)) for seed, label in enumerate("abc")]
for name in sorted(METHODS):
    targets = shared_targets(sources, method=name)
    files, digests = merge(sources, targets, weights=(0.5, 0.2, 0.3), threads=int(sys.argv[1]))
    print(name, hashlib.sha256(b"".join(files[key].tobytes() for key in sorted(files))).hexdigest(), *digests)
"""


def test_same_bytes_in_every_process() -> None:
    """Whatever the hash seed and the number of threads."""
    tests = Path(__file__).parent
    results = set()
    for seed, threads in (("0", 1), ("1", 4), ("4242", 3)):
        environment: dict[str, Any] = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        }
        command = [sys.executable, "-c", MERGE, str(threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results.add(done.stdout)
    assert len(results) == 1
    assert len(results.pop().splitlines()) == len(METHODS)
