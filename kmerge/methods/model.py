"""Methods that bring the units of whole models together.

Their work on hidden units is done before there is a stack: in `kmerge.align` by permutation, in `kmerge.fuse` on
calibration inputs. What their functions here merge are values whose units stand in one order already, such as those of
layers that keep their units.
"""

from __future__ import annotations

from kmerge.methods.element import mean
from kmerge.methods.registry import Array, method

_INPUTS = frozenset({"inputs"})


@method(
    "align",
    paper="arXiv:2209.04836",
    scope="model",
    related_only=False,
    choices={"by": ("auto", "weights", "activations")},
)
def align(
    stack: Array, *, weights: Array, by: str = "auto", repair: bool = True, refit: bool = True, seed: int | None = None
) -> Array:
    """Bring the units of all sources into one order, then average.

    Hidden units have no order of their own, so networks that were trained apart hold them in different ones. Every
    source's units are permuted to match the others, which changes no source's function. By weights: coordinate descent
    over the feature spaces of the graph, one linear assignment each. By activations: the units that respond alike on
    calibration inputs go together. More than two sources are aligned to the mean of the others until stable. What is
    left of a difference is averaged, so a merge of unrelated sources still loses accuracy; repair and refit win back
    much of it.

    Args:
        stack: values of the permuted sources, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1.
        by: auto, weights or activations. auto is activations where inputs are given, else weights.
        repair: whether to reset mean and variance of each merged unit to those of the sources' units
            (https://arxiv.org/abs/2211.08403). Only with inputs.
        refit: whether to fit each head anew to what its source gives, by least squares. Only with inputs.
        seed: of the order in which spaces are visited. Default: that of the merge, --seed.

    Returns:
        Merged value, shape (*shape), dtype of `stack`.

    Departs from the paper: the descent starts from a walk that matches spaces along weights whose other axes are
    settled; running statistics do not count; for more than two sources arXiv:2405.17897 inspired the common mean.

    >>> import numpy as np
    >>> align(np.array([[1., 2.], [3., 6.]]), weights=np.array([.5, .5]))
    array([2., 4.])
    """
    del by, repair, refit, seed  # they do their work before and after the stack
    return mean(stack, weights=weights)


@method(
    "fuse", paper="arXiv:2507.00037, arXiv:2407.02447", scope="model", needs=_INPUTS, related_only=False, widens=True
)
def fuse(stack: Array, *, weights: Array, lean: bool = True) -> Array:
    """Cluster the units of all sources, fit every shared layer to the clusters, then every head to the trunk.

    For models that were trained apart. The sources are run on calibration inputs, which need no labels. In each feature
    space of the graph the units of all sources are pooled and clustered by what they respond to, and the clusters'
    means bettered by a search for blends from which all units follow; each shared layer is then solved by ridge
    regression, front to back, from what the merged network itself computes to what the blends give. BatchNormalization
    takes the statistics that the merged network really has, and each head is fitted to what its source's gives. With
    --width above 1 the trunk gets more units than a source has.

    Args:
        stack: values whose units stand in one order already, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1.
        lean: whether heads of one task lean on each other: each is fitted to its own source's outputs, moved towards
            the mean of all within one standard error of the loss on held-back inputs. False fits it to its own alone.

    Returns:
        Merged value, shape (*shape), dtype of `stack`.

    Departs from the papers: one clustering per feature space, the sum of a residual stream included; blends of units in
    place of clusters' means, found by variable projection on sampled activations; recurrent units are selected, not
    averaged; regressions are drawn towards merged and unmerged weights, with a strength chosen on held-back inputs;
    heads lean on each other.

    >>> import numpy as np
    >>> fuse(np.array([[1., 2.], [3., 6.]]), weights=np.array([.5, .5]))
    array([2., 4.])
    """
    del lean
    return mean(stack, weights=weights)


@method("zip", paper="arXiv:2305.03053", scope="model", needs=_INPUTS, related_only=False)
def zip_units(stack: Array, *, weights: Array, repair: bool = True, refit: bool = True) -> Array:
    """Pair units by the correlation of what they compute, across sources and within one, then average each group.

    Unlike a permutation, two units of one source may become one, where they compute nearly the same and another's unit
    has no counterpart.

    Args:
        stack: values whose units stand in one order already, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1.
        repair: whether to reset mean and variance of each merged unit to those of the sources' units
            (https://arxiv.org/abs/2211.08403).
        refit: whether to fit each head anew to what its source gives, by least squares.

    Returns:
        Merged value, shape (*shape), dtype of `stack`.

    >>> import numpy as np
    >>> zip_units(np.array([[1., 2.], [3., 6.]]), weights=np.array([.5, .5]))
    array([2., 4.])
    """
    del repair, refit
    return mean(stack, weights=weights)


@method("transport", paper="arXiv:1910.05653", scope="model", needs=_INPUTS, related_only=False)
def transport(stack: Array, *, weights: Array, epsilon: float = 0.05, repair: bool = True, refit: bool = True) -> Array:
    """Align units softly by optimal transport of what they compute, then average.

    Each unit of one source is spread over the units of another in shares that cost least; a permutation is the limit of
    hard shares.

    Args:
        stack: values whose units stand in one order already, shape (n, *shape), one row per source.
        weights: importance, shape (n,), sums to 1.
        epsilon: strength of the entropic regularisation, in the unit of the cost, which is 1 less a
            correlation: larger is softer.
        repair: whether to reset mean and variance of each merged unit to those of the sources' units
            (https://arxiv.org/abs/2211.08403).
        refit: whether to fit each head anew to what its source gives, by least squares.

    Returns:
        Merged value, shape (*shape), dtype of `stack`.

    >>> import numpy as np
    >>> transport(np.array([[1., 2.], [3., 6.]]), weights=np.array([.5, .5]))
    array([2., 4.])
    """
    del epsilon, repair, refit
    return mean(stack, weights=weights)
