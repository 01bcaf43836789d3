"""Bring the units of networks that were trained apart into one order.

permute   permutations per space, and sources that read permuted
weights   which permutations: by the weights alone
"""

from kmerge.align.permute import Alignment, PermutedTensor, permuted
from kmerge.align.weights import align_by_weights

__all__ = ["Alignment", "PermutedTensor", "align_by_weights", "permuted"]
