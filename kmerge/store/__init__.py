"""Bytes: models and weights on disk, read lazily, written atomically; every check against hostile files lives here."""

from kmerge.store.archive import Archive, Asset, open_archive
from kmerge.store.attributes import AttributeValue
from kmerge.store.dtypes import is_number, numpy_dtype
from kmerge.store.hdf5 import open_hdf5
from kmerge.store.identify import Kind, identify
from kmerge.store.layout import Layout, TensorSpec
from kmerge.store.limits import read_json
from kmerge.store.output import Output, create_archive, create_hdf5
from kmerge.store.shards import open_shards
from kmerge.store.target import copy_file
from kmerge.store.tensors import Tensor
from kmerge.store.weights import Tree, Weights

__all__ = [
    "Archive",
    "Asset",
    "AttributeValue",
    "Kind",
    "Layout",
    "Output",
    "Tensor",
    "TensorSpec",
    "Tree",
    "Weights",
    "copy_file",
    "create_archive",
    "create_hdf5",
    "identify",
    "is_number",
    "numpy_dtype",
    "open_archive",
    "open_hdf5",
    "open_shards",
    "read_json",
]
