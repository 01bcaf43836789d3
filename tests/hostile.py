"""Files that try something: each function writes one into a folder and returns its path."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

GOOD = np.arange(12, dtype=np.float32).reshape(3, 4)
GROUP = "layers/dense/vars"


def weights_file(path: Path, fill: Callable[[h5py.Group], None] | None = None) -> Path:
    """A small .weights.h5; `fill` adds what is wrong with it to the group of a layer."""
    with h5py.File(path, "w") as file:
        group = file.create_group(GROUP)
        group.attrs["name"] = "dense"
        group["0"] = GOOD
        if fill:
            fill(group)
    return path


def weights_bytes() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file[f"{GROUP}/0"] = GOOD
    return buffer.getvalue()


def replace(path: Path, old: bytes, new: bytes, count: int = 1) -> Path:
    """Forge a file in place; `old` must be in it."""
    data = path.read_bytes()
    assert old in data, "the forger found nothing to forge"
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, count))
    return path


# HDF5 -----------------------------------------------------------------------------------------------------------------


def soft_link(folder: Path) -> Path:
    return weights_file(folder / "soft.h5", lambda group: group.__setitem__("1", h5py.SoftLink("/layers/dense/vars/0")))


def external_link(folder: Path) -> Path:
    weights_file(folder / "secret.h5")
    link = h5py.ExternalLink("secret.h5", f"/{GROUP}/0")
    return weights_file(folder / "external.h5", lambda group: group.__setitem__("1", link))


def external_group(folder: Path) -> Path:
    weights_file(folder / "secret.h5")
    with h5py.File(folder / "group.h5", "w") as file:
        file["layers"] = h5py.ExternalLink("secret.h5", "/layers")
    return folder / "group.h5"


def external_storage(folder: Path) -> Path:
    (folder / "secret.bin").write_bytes(bytes(48))
    return weights_file(
        folder / "storage.h5",
        lambda group: group.create_dataset("1", (12,), "f4", external=[(str(folder / "secret.bin"), 0, 48)]),
    )


def virtual_dataset(folder: Path) -> Path:
    weights_file(folder / "secret.h5")
    view = h5py.VirtualLayout((3, 4), "f4")
    view[:] = h5py.VirtualSource(str(folder / "secret.h5"), f"{GROUP}/0", (3, 4))
    return weights_file(folder / "virtual.h5", lambda group: group.create_virtual_dataset("1", view))


def unlimited_virtual_dataset(folder: Path) -> Path:
    """One whose shape is only known once other files, named by a pattern, have been opened."""
    weights_file(folder / "secret-0.h5")
    pattern = str(folder / "secret-%b.h5").encode()

    def fill(group: h5py.Group) -> None:
        space = h5py.h5s.create_simple((3, 4), (h5py.h5s.UNLIMITED, 4))
        space.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (3, 1), (3, 4))
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_virtual(space, pattern, f"{GROUP}/0".encode(), h5py.h5s.create_simple((3, 4)))
        h5py.h5d.create(group.id, b"1", h5py.h5t.IEEE_F32LE, space, plist)

    return weights_file(folder / "pattern.h5", fill)


def strings_of_any_length(folder: Path) -> Path:
    return weights_file(
        folder / "strings.h5", lambda group: group.create_dataset("1", data=["a", "b"], dtype=h5py.string_dtype())
    )


def ragged_arrays(folder: Path) -> Path:
    return weights_file(
        folder / "ragged.h5", lambda group: group.create_dataset("1", (2,), h5py.vlen_dtype(np.dtype("f4")))
    )


def object_references(folder: Path) -> Path:
    return weights_file(
        folder / "references.h5", lambda group: group.create_dataset("1", data=[group.ref], dtype=h5py.ref_dtype)
    )


def region_references(folder: Path) -> Path:
    return weights_file(
        folder / "regions.h5",
        lambda group: group.create_dataset("1", data=[group["0"].regionref[0:1]], dtype=h5py.regionref_dtype),
    )


def compound(folder: Path) -> Path:
    return weights_file(
        folder / "compound.h5", lambda group: group.create_dataset("1", (2,), np.dtype([("a", "f4"), ("b", "i4")]))
    )


def named_type(folder: Path) -> Path:
    return weights_file(folder / "type.h5", lambda group: group.__setitem__("1", np.dtype("f4")))


def group_in_itself(folder: Path) -> Path:
    return weights_file(folder / "circle.h5", lambda group: group.__setitem__("again", group.parent))


def root_in_itself(folder: Path) -> Path:
    return weights_file(folder / "root.h5", lambda group: group.__setitem__("again", group.file["/"]))


def doubling_groups(folder: Path) -> Path:
    """Sixty groups, each of which holds the next one twice: 2**60 paths."""

    def fill(group: h5py.Group) -> None:
        for _ in range(60):
            inner = group.create_group("a")
            group["b"] = inner
            group = inner

    return weights_file(folder / "doubling.h5", fill)


def deep_groups(folder: Path) -> Path:
    return weights_file(folder / "deep.h5", lambda group: group.create_group("/".join("g" * 100)))


def many_names_for_one_tensor(folder: Path) -> Path:
    def fill(group: h5py.Group) -> None:
        group["big"] = np.ones(50_000, np.float32)
        for index in range(200):
            group[f"copy_{index}"] = group["big"]

    return weights_file(folder / "names.h5", fill)


def shape_bomb(folder: Path) -> Path:
    """A compressed tensor of 8 TB that stores nothing."""
    return weights_file(
        folder / "bomb.h5",
        lambda group: group.create_dataset("1", (2_000_000, 1_000_000), "f4", chunks=(1000, 1000), compression="gzip"),
    )


def unstored_tensor(folder: Path) -> Path:
    """A contiguous tensor of 4 TB whose bytes were never allocated."""
    return weights_file(folder / "unstored.h5", lambda group: group.create_dataset("1", (1_000_000, 1_000_000), "f4"))


def many_unstored_tensors(folder: Path) -> Path:
    """Each is small enough to be believed; together they are not."""

    def fill(group: h5py.Group) -> None:
        for index in range(100):
            group.create_dataset(f"many_{index}", (1_000_000,), "f4")

    return weights_file(folder / "many.h5", fill)


def _dims(*shape: int) -> bytes:
    """A shape and its upper limit, as HDF5 stores them."""
    return struct.pack("<4Q", *shape, *shape)


def forged_shape(folder: Path) -> Path:
    """A tensor of 3 x 4 whose header says 3 x 2**40."""
    path = weights_file(folder / "forged.h5")
    return replace(path, _dims(3, 4), _dims(3, 2**40))


def overflowing_shape(folder: Path) -> Path:
    """2**33 * 2**31 elements of 4 bytes are 0 bytes modulo 2**64."""
    path = weights_file(folder / "overflow.h5")
    return replace(path, _dims(3, 4), _dims(2**33, 2**31))


def negative_shape(folder: Path) -> Path:
    path = weights_file(folder / "negative.h5")
    return replace(path, _dims(3, 4), _dims(2**64 - 3, 4))


def slash_in_a_name(folder: Path) -> Path:
    """An object named "x/1", which HDF5 would take for a path through the external link x."""
    weights_file(folder / "secret.h5")

    def fill(group: h5py.Group) -> None:
        group["x"] = h5py.ExternalLink("secret.h5", f"/{GROUP}")
        group["x_0"] = GOOD

    return replace(weights_file(folder / "slash.h5", fill), b"x_0", b"x/0")


def dot_as_a_name(folder: Path) -> Path:
    return replace(
        weights_file(folder / "dot.h5", lambda group: group.create_group("-")), b"-" + bytes(7), b"." + bytes(7)
    )


def huge_chunks(folder: Path) -> Path:
    return weights_file(
        folder / "chunks.h5",
        lambda group: group.create_dataset("1", (30_000_000,), "f4", chunks=(30_000_000,), compression="gzip"),
    )


def unknown_filter(folder: Path) -> Path:
    path = weights_file(
        folder / "filter.h5", lambda group: group.create_dataset("1", data=GOOD, chunks=(3, 4), compression="lzf")
    )
    return replace(path, struct.pack("<H", 32000), struct.pack("<H", 32123))


def chunk_bomb(folder: Path) -> Path:
    """A chunk of 4,000 bytes whose gzip stream unpacks to 40 MB, into HDF5's memory."""

    def fill(group: h5py.Group) -> None:
        dataset = group.create_dataset("1", (1000,), "f4", chunks=(1000,), compression="gzip")
        packed = zlib.compress(bytes(3_900_000), 9)
        dataset.id.write_direct_chunk((0,), packed)

    return weights_file(folder / "chunk_bomb.h5", fill)


def attribute_reference(folder: Path) -> Path:
    return weights_file(
        folder / "attr_ref.h5", lambda group: group.attrs.create("friend", group.ref, dtype=h5py.ref_dtype)
    )


def attribute_ragged(folder: Path) -> Path:

    def fill(group: h5py.Group) -> None:
        tid = h5py.h5t.py_create(h5py.vlen_dtype(np.dtype("f4")), logical=True)
        h5py.h5a.create(group.id, b"friend", tid, h5py.h5s.create_simple((2,)))

    return weights_file(folder / "attr_ragged.h5", fill)


def huge_attribute(folder: Path) -> Path:
    """An attribute of 100 MB, in the newer layout of HDF5 that allows it."""
    path = folder / "attr_size.h5"
    with h5py.File(path, "w", libver="latest") as file:
        group = file.create_group(GROUP)
        group["0"] = GOOD
        group.attrs["names"] = np.zeros(100_000_000, "S1")
    return path


def string_bomb(folder: Path) -> Path:
    """Four thousand strings that are all the same megabyte: 4 GB in memory."""

    def fill(group: h5py.Group) -> None:
        group.attrs.create("names", ["x" * 1_000_000] + ["y"] * 3999, dtype=h5py.string_dtype())

    return share_string(weights_file(folder / "string_bomb.h5", fill))


def text_bomb(folder: Path) -> Path:
    """A thousand groups with one string each, all of which are the same megabyte."""

    def fill(group: h5py.Group) -> None:
        group.attrs["text"] = "x" * 1_000_000
        for index in range(1000):
            group.create_group(f"g{index}").attrs["text"] = "y"

    return share_string(weights_file(folder / "text.h5", fill))


def share_string(path: Path) -> Path:
    """Let all strings of length 1 be the one of length 1,000,000: HDF5 points at one by length, heap and number."""
    data = path.read_bytes()
    heaps = [match.start() for match in re.finditer(b"GCOL", data)]
    [large] = [at for heap in heaps if (at := data.find(struct.pack("<LQ", 1_000_000, heap))) >= 0]
    entry = data[large : large + 16]
    for heap in heaps:
        small = re.escape(struct.pack("<LQ", 1, heap)) + b"...."
        data = re.sub(small, lambda _: entry, data, flags=re.DOTALL)
    path.write_bytes(data)
    return path


def many_attributes(folder: Path) -> Path:
    path = folder / "attr_count.h5"
    with h5py.File(path, "w", libver="latest") as file:
        group = file.create_group(GROUP)
        group["0"] = GOOD
        space = h5py.h5s.create(h5py.h5s.SCALAR)
        for index in range(10_001):
            h5py.h5a.create(group.id, b"a%d" % index, h5py.h5t.NATIVE_INT8, space)
    return path


HDF5 = [
    *(soft_link, external_link, external_group, external_storage, virtual_dataset, unlimited_virtual_dataset),
    *(strings_of_any_length, ragged_arrays, object_references, region_references, compound, named_type),
    *(group_in_itself, root_in_itself, doubling_groups, deep_groups, many_names_for_one_tensor),
    *(shape_bomb, unstored_tensor, many_unstored_tensors, forged_shape, overflowing_shape, negative_shape),
    *(slash_in_a_name, dot_as_a_name, huge_chunks, unknown_filter),
    *(attribute_reference, attribute_ragged, huge_attribute, string_bomb, text_bomb, many_attributes),
]


# Zip ------------------------------------------------------------------------------------------------------------------


def model_zip(path: Path, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """A small .keras, or what passes for one."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {}}))
        archive.writestr("model.weights.h5", weights_bytes())
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return path


def _with_member(path: Path, name: str, **settings: int) -> Path:
    model_zip(path)
    info = zipfile.ZipInfo(name)
    for key, value in settings.items():
        setattr(info, key, value)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, b"../../etc/passwd")
    return path


def climbing_member(folder: Path) -> Path:
    return _with_member(folder / "climb.keras", "assets/../../evil.txt")


def absolute_member(folder: Path) -> Path:
    return _with_member(folder / "absolute.keras", "/etc/evil.txt")


def backslash_member(folder: Path) -> Path:
    return replace(_with_member(folder / "backslash.keras", "assets/evil_txt"), b"evil_txt", b"evil\\txt", 2)


def drive_member(folder: Path) -> Path:
    return _with_member(folder / "drive.keras", "C:evil.txt")


def nul_member(folder: Path) -> Path:
    return replace(_with_member(folder / "nul.keras", "assets/evil_txt"), b"evil_txt", b"evil\0txt", 2)


def link_member(folder: Path) -> Path:
    return _with_member(folder / "link.keras", "assets/link", create_system=3, external_attr=0o120777 << 16)


def member_twice(folder: Path) -> Path:
    path = model_zip(folder / "twice.keras", {"config.jsoX": b"{}"})
    return replace(path, b"config.jsoX", b"config.json", 2)


def too_many_members(folder: Path) -> Path:
    return model_zip(folder / "members.keras", {f"assets/{index}": b"" for index in range(10_001)})


def huge_directory(folder: Path) -> Path:
    return model_zip(folder / "directory.keras", {f"assets/{'n' * 5000}{index}": b"" for index in range(1000)})


def zip_bomb(folder: Path) -> Path:
    """A member of 64 MB of zeros, packed to 62 kB, of which the directory claims that it unpacks to 10 GB."""
    path = model_zip(folder / "bomb.keras", {"assets/zeros": bytes(64_000_000)}, zipfile.ZIP_DEFLATED)
    claim = struct.pack("<L", 64_000_000)
    return replace(path, claim, struct.pack("<L", 4_000_000_000), 2)


def lying_size(folder: Path) -> Path:
    """Weights that unpack to more than both headers claim."""
    path = model_zip(folder / "lying.keras", method=zipfile.ZIP_DEFLATED)
    return replace(path, struct.pack("<L", len(weights_bytes())), struct.pack("<L", 100), 2)


def stored_size_differs(folder: Path) -> Path:
    path = model_zip(folder / "stored.keras")
    size = struct.pack("<LL", len(weights_bytes()), len(weights_bytes()))
    return replace(path, size, struct.pack("<LL", len(weights_bytes()), 10_000_000), 2)


def headers_disagree(folder: Path) -> Path:
    return replace(model_zip(folder / "headers.keras"), b"config.json", b"c0nfig.json", 1)


def overlapping_members(folder: Path) -> Path:
    """The directory sends one asset to bytes within another, which are a whole member themselves."""
    path = model_zip(folder / "overlap.keras", {"assets/inner": b"payload"})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = data[archive.getinfo("assets/inner").header_offset : archive.start_dir]
    model_zip(path, {"assets/outer": record, "assets/inner": b"payload"})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        outer, inner = (archive.getinfo(f"assets/{name}").header_offset for name in ("outer", "inner"))
    return replace(
        path, struct.pack("<L", inner) + b"assets/inner", struct.pack("<L", data.index(record, outer)) + b"assets/inner"
    )


ZIPS = [
    *(climbing_member, absolute_member, backslash_member, drive_member, nul_member, link_member, member_twice),
    *(too_many_members, huge_directory, zip_bomb, lying_size, stored_size_differs, headers_disagree),
    *(overlapping_members,),
]


def encrypted_member(folder: Path) -> Path:
    path = _with_member(folder / "encrypted.keras", "assets/secret")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo("assets/secret").header_offset
    data[local + 6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(bytes(data))
    return path


# Folders --------------------------------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"class_name": "Sequential", "config": {}}))
    (folder / "metadata.json").write_text(json.dumps({"keras_version": "3.15.1"}))
    (folder / "model.weights.h5").write_bytes(weights_bytes())
    return folder


def _linked(folder: Path, name: str) -> Path:
    model = model_folder(folder / "model")
    place = model / name
    place.parent.mkdir(exist_ok=True)
    secret = folder / "secret"
    secret.write_bytes(place.read_bytes() if place.exists() else b"root:x:0:0")
    place.unlink(missing_ok=True)
    place.symlink_to(secret)
    return model


def linked_config(folder: Path) -> Path:
    return _linked(folder, "config.json")


def linked_weights(folder: Path) -> Path:
    return _linked(folder, "model.weights.h5")


def linked_asset(folder: Path) -> Path:
    return _linked(folder, "assets/vocabulary.txt")


def linked_assets(folder: Path) -> Path:
    model = model_folder(folder / "model")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "secret").write_bytes(b"root:x:0:0")
    (model / "assets").symlink_to(folder / "elsewhere")
    return model


def piped_asset(folder: Path) -> Path:
    model = model_folder(folder / "model")
    (model / "assets").mkdir()
    os.mkfifo(model / "assets" / "pipe")
    return model


FOLDERS = [linked_config, linked_weights, linked_asset, linked_assets, piped_asset]


# Shards ---------------------------------------------------------------------------------------------------------------


def shard_map(path: Path, shards: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": {f"/{GROUP}": shards}}))
    return path


SHARD_NAMES = [
    "../secret.h5",
    "/etc/secret.h5",
    "a/b.h5",
    "a\\b.h5",
    "..",
    "C:secret.h5",
    "a\0b.h5",
    ["good.h5", "../x.h5"],
]


# JSON -----------------------------------------------------------------------------------------------------------------

JSON = {
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 300 + b"1" + b"}" * 300,
    "deep after strings": b'{"a": "]]]]]]", "b": ' + b"[" * 300 + b"]" * 300 + b"}",
    "deep behind quotes": b'["\\"", ' + b"[" * 300 + b"]" * 300 + b"]",
    "key twice": b'{"class_name": "Dense", "class_name": "Lambda"}',
    "too many values": b"[" + b"[]," * 2_100_000 + b"1]",
    "too large": b'"' + b"x" * (64 * 1024 * 1024) + b'"',
}


# What is no model -----------------------------------------------------------------------------------------------------


def _zip_of(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=GOOD)
    return buffer.getvalue()


def _hdf5(**content: object) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, value in content.items():
            file[name] = value
    return buffer.getvalue()


STRANGERS: dict[str, tuple[bytes, str]] = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", "run 'git lfs pull'"),
    "pytorch": (_zip_of({"archive/data.pkl": b"\x80\x02.", "archive/version": b"3"}), "PyTorch"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "old pickle": (pickle.dumps(GOOD, protocol=0), "pickle"),
    "cut hdf5": (weights_bytes()[:600], "truncated HDF5"),
    "cut signature": (weights_bytes()[:5], "truncated HDF5"),
    "cut zip": (_zip_of({"config.json": b"{}" * 500})[:400], "truncated zip"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "unfinished download"),
    "npz": (_npz(), "NumPy .npz"),
    "empty zip": (_zip_of({}), "no Keras model"),
    "zip": (_zip_of({"readme.txt": b"hello"}), "no Keras model"),
    "nested zip": (_zip_of({"m/config.json": b"{}", "m/model.weights.h5": b""}), "in a folder 'm'"),
    "npz weights": (_zip_of({"config.json": b"{}", "model.weights.npz": b""}), "re-save"),
    "zip without weights": (_zip_of({"config.json": b"{}"}), "without 'model.weights.h5'"),
    "zipped saved model": (_zip_of({"m/saved_model.pb": b""}), "SavedModel"),
    "office": (_zip_of({"[Content_Types].xml": b""}), "Office"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}'.ljust(40) + bytes(8), "safetensors"),
    "architecture": (b'{"class_name": "Sequential", "config": {}}', "architecture alone"),
    "json": (b'{"a": 1}', "no Keras model"),
    "json list": (b"[1, 2]", "JSON text"),
    "torch index": (b'{"weight_map": {"a": "model-1.safetensors"}}', "PyTorch"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "gzip"),
    "tar": (bytes(b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)), "tar archive"),
    "page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "text": ("Größe 1\n".encode(), "text file"),
    "data": (_hdf5(inputs=GOOD, outputs=GOOD), "data file"),
    "no config": (_hdf5(**{"model_weights/dense/kernel": GOOD}), "without the model's architecture"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite"),
    "onnx": (b"\x08\x08\x12\x07pytorch" + bytes(50), "ONNX"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(50), "NumPy array"),
    "noise": (bytes(range(200, 256)) * 9, "no format that kmerge knows"),
}
