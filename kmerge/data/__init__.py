"""Data as users give them: files, arrays and batches of any library, opened for the inputs and heads of one network.

entries     what a network takes
names       what belongs to which input and which head
checks      shapes, types and values against what the network takes
columns     arrays of which some rows are read
dataset     data sets of columns
digests     rows told by what they hold
streams     data sets of batches
tables, images, records     kinds of files
opening     anything, opened
"""

from kmerge.data.dataset import Batch, Dataset, generator
from kmerge.data.digests import row_digests
from kmerge.data.entries import Entry, entries
from kmerge.data.names import Names
from kmerge.data.opening import Reading, open_dataset, open_parts

__all__ = [
    "Batch",
    "Dataset",
    "Entry",
    "Names",
    "Reading",
    "entries",
    "generator",
    "open_dataset",
    "open_parts",
    "row_digests",
]
