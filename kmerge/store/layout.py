"""The complete layout of an HDF5 file, and its skeleton: everything but the numbers, whose places are then known."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from kmerge.errors import MergeError
from kmerge.store.attributes import AttributeValue, write_attributes
from kmerge.store.dtypes import EXTENDED, numpy_dtype, stored_type
from kmerge.store.rawio import Window


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written.

    Attributes:
        shape: its shape.
        dtype: logical type; "bfloat16" and other extended types get the attribute `dtype` by themselves, as in Keras.
        attributes: further attributes.
    """

    shape: tuple[int, ...]
    dtype: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= int(length)
        return size

    @property
    def nbytes(self) -> int:
        return self.size * numpy_dtype(self.dtype).itemsize


@dataclass(slots=True)
class Layout:
    """What an HDF5 file will hold.

    Attributes:
        groups: attributes by path, in order of creation; "" is the root. Groups above others or tensors are implied.
        tensors: specifications by path, in order of creation.
    """

    groups: dict[str, dict[str, AttributeValue]] = field(default_factory=dict)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


def build_skeleton(window: Window, layout: Layout) -> dict[str, int]:
    """Write everything of an HDF5 file except the numbers of its tensors.

    Args:
        window: where to write, from its position 0 on.
        layout: what to write.

    Returns:
        Byte offset of each tensor within the window; 0 for tensors without elements.

    Raises:
        MergeError: if two paths collide or a value cannot be stored.
    """
    try:
        with h5py.File(window, "w") as file:
            offsets = _fill(file["/"].id, layout)
    except (RuntimeError, ValueError, KeyError) as error:
        window.check()
        raise MergeError(f"the layout cannot be written as HDF5: {error}") from error
    finally:
        window.release()
    window.check()
    return offsets


def add_root_attributes(window: Window, attributes: Mapping[str, AttributeValue]) -> None:
    """Add attributes to the root of a finished file."""
    try:
        with h5py.File(window, "r+") as file:
            write_attributes(file["/"].id, attributes)
    finally:
        window.release()
    window.check()


def _fill(root: h5g.GroupID, layout: Layout) -> dict[str, int]:
    made: dict[str, h5g.GroupID] = {"": root}
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)  # equal content, equal bytes
    links = h5p.create(h5p.LINK_CREATE)
    links.set_char_encoding(h5t.CSET_UTF8)

    def group(path: str) -> h5g.GroupID:
        if path not in made:
            parent, _, name = path.rpartition("/")
            made[path] = h5g.create(group(parent), _name(name, path), links)
        return made[path]

    types = {dtype: stored_type(dtype) for dtype in {spec.dtype for spec in layout.tensors.values()}}
    for path, attributes in layout.groups.items():
        write_attributes(group(path), attributes)
    offsets: dict[str, int] = {}
    for path, spec in layout.tensors.items():
        if path in made:
            raise MergeError(f"layout: {path!r} is a group and a tensor at once.")
        parent, _, name = path.rpartition("/")
        shape = tuple(int(length) for length in spec.shape)
        space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
        dataset = h5d.create(group(parent), _name(name, path), types[spec.dtype], space, plist, links)
        attributes = dict(spec.attributes)
        if spec.dtype in EXTENDED:
            attributes.setdefault("dtype", spec.dtype)
        write_attributes(dataset, attributes)
        offset = dataset.get_offset() if spec.size else 0
        if offset is None:
            raise MergeError(f"layout: HDF5 gave {path!r} no place.")
        offsets[path] = offset
    return offsets


def _name(name: str, path: str) -> bytes:
    if not name or name == "." or "\0" in name:
        raise MergeError(f"layout: {path!r} is no valid path of a group or tensor.")
    return name.encode("utf-8", "surrogateescape")


def as_bytes(array: np.ndarray, spec: TensorSpec, start: int, key: str) -> memoryview:
    """The bytes of a block to be written, after checking that it fits the specification."""
    if array.dtype != numpy_dtype(spec.dtype):
        raise MergeError(f"{key!r} is to be written as {spec.dtype} but a block of {array.dtype} was given.")
    if start < 0 or start + array.size > spec.size:
        raise MergeError(
            f"{key!r} has {spec.size:,} elements; a block claims to be {start:,} to {start + array.size:,}."
        )
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
