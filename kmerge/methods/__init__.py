"""Merge methods: pure functions of a stack of arrays, in which the sources come first."""

from kmerge.methods import element as element
from kmerge.methods import model as model
from kmerge.methods.element import mean, median, pick, picked
from kmerge.methods.registry import METHODS, Array, Method, check_options, get_method, method, normalise_weights
from kmerge.methods.statistics import pooled_mean, pooled_variance

__all__ = [
    "METHODS",
    "Array",
    "Method",
    "check_options",
    "get_method",
    "mean",
    "median",
    "method",
    "normalise_weights",
    "pick",
    "picked",
    "pooled_mean",
    "pooled_variance",
]
