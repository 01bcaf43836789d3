"""Hypothesis strategies: everything that tests draw at random."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

SHAPES = ((), (1,), (3,), (2, 3, 4))
COUNTS = (1, 2, 3, 7)
FLOATS = ("float16", "float32", "float64")

shapes = st.sampled_from(SHAPES)
counts = st.sampled_from(COUNTS)
dtypes = st.sampled_from(FLOATS).map(np.dtype)


def values(dtype: np.dtype, limit: float = 1000.0) -> st.SearchStrategy[float]:
    """Finite numbers of a dtype between -limit and limit, of both signs of zero, without subnormal ones."""
    return st.floats(-limit, limit, width=8 * dtype.itemsize, allow_subnormal=False)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """Values of one weight."""
    shape = draw(shapes) if shape is None else shape
    dtype = draw(dtypes) if dtype is None else dtype
    return draw(npst.arrays(dtype, shape, elements=values(dtype)))


@st.composite
def shares(draw: st.DrawFn, count: int) -> np.ndarray:
    """Importance per source: sums to 1; some may be 0."""
    raw = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    return np.array(raw, dtype=np.float64) / sum(raw)


@st.composite
def weighted_stacks(draw: st.DrawFn, min_count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Values of one weight in several sources, and the importance of each."""
    count = draw(st.sampled_from([n for n in COUNTS if n >= min_count]))
    shape, dtype = draw(shapes), draw(dtypes)
    stack = draw(npst.arrays(dtype, (count, *shape), elements=values(dtype)))
    return stack, draw(shares(count))
