"""Function space: one trunk from networks that were trained apart, fitted to what they compute.

chains      where the result of a linear layer is aimed at
design      linear layers as matrices
pairs       merge and unmerge, and weights brought there
units       what units do, and which become one: clusters
pairing     the same by assignment, zip and transport
widen       a trunk wider than a source's
context     what every step works with
ridge       least squares
linear, recurrent, scale, repair   steps, by kind of layer
model       a fusion from end to end
"""

from kmerge.fuse.model import Fusion, fuse_models

__all__ = ["Fusion", "fuse_models"]
