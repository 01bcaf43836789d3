"""Function space: one trunk from networks that were trained apart, fitted to what they compute.

batches     inputs, a batch at a time, and which are held back
chains      where the result of a linear layer is aimed at
design      linear layers as matrices
pairs       merge and unmerge, and weights brought there
mixing      linear maps of axes, block by block
units       what units do, and which become one
clusters    of units, by weighted k-means
blend       units as blends of several, by what follows from them
selection   units kept as they are
sensitivity how much errors of units matter at the outputs
pairing     the same by assignment, zip and transport
widen       a trunk wider than a source's
context     what every step works with
ridge       least squares
linear, recurrent, attention, scale, other, repair   steps, by kind of layer
cells       recurrent cells in numbers
order       steps in an order in which each knows what it needs
unfitted    what is left as it is, and told of
model       a fusion from end to end
"""

from kmerge.fuse.model import Fusion, fuse_models

__all__ = ["Fusion", "fuse_models"]
