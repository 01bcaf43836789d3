"""Reading: what h5py and Keras stored comes back bit for bit, in any block, from any container."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import h5py
import hostile
import ml_dtypes
import numpy as np
import pytest

from kmerge.errors import FormatError
from kmerge.store import (
    Kind,
    Tree,
    Weights,
    identify,
    is_number,
    numpy_dtype,
    open_archive,
    open_hdf5,
    open_shards,
    read_json,
)
from kmerge.store.hdf5 import Hdf5Weights
from kmerge.store.tensors import DirectTensor, LibraryTensor, slabs

RANDOM = np.random.default_rng(0)
NUMBERS = RANDOM.normal(size=(7, 5, 11)).astype(np.float32)


def tree_of(path: Path, group: str = "") -> tuple[Weights, Tree]:
    weights = open_hdf5(path)
    return weights, weights.tree(group)


@pytest.mark.parametrize(
    "dtype",
    [
        *("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16", "V2", "V6"),
        *(">f2", ">f4", ">f8", ">i2", ">i8", ">u4", ">c8", ">c16"),
    ],
)
def test_every_type_comes_back(dtype: str, tmp_path: Path) -> None:
    wanted = np.frombuffer(RANDOM.integers(0, 100, 24 * 16, np.uint8).tobytes(), dtype)[:24].reshape(2, 3, 4)
    if dtype == "?":
        wanted = RANDOM.integers(0, 2, (2, 3, 4)).astype(bool)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plain"] = wanted
        file.create_dataset("packed", data=wanted, chunks=(1, 2, 3), compression="gzip", shuffle=True)
    with open_hdf5(tmp_path / "a.h5") as weights:
        tensors = weights.tree().tensors
        assert isinstance(tensors["plain"], DirectTensor)
        assert isinstance(tensors["packed"], LibraryTensor)
        for tensor in tensors.values():
            assert tensor.read().tobytes() == wanted.astype(wanted.dtype.newbyteorder("=")).tobytes()
            assert tensor.shape == (2, 3, 4)
            assert (tensor.size, tensor.nbytes) == (24, wanted.nbytes)
            assert numpy_dtype(tensor.dtype) == wanted.dtype.newbyteorder("=")
            assert is_number(tensor.dtype) is (wanted.dtype.kind != "V")


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_extended_types_go_by_their_attribute(name: str, tmp_path: Path) -> None:
    wanted = np.linspace(-2, 2, 9).astype(getattr(ml_dtypes, name))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        wanted_bytes = wanted.view(f"V{wanted.itemsize}")  # as h5py stores bfloat16
        file.create_dataset("named", data=wanted_bytes).attrs["dtype"] = name
        file.create_dataset("unnamed", data=wanted_bytes)
        file.create_dataset("misnamed", data=NUMBERS).attrs["dtype"] = name
    with open_hdf5(tmp_path / "a.h5") as weights:
        tree = weights.tree()
        assert (tree.tensors["named"].read() == wanted).all()
        assert tree.tensors["named"].dtype == name
        assert tree.attributes["named"] == {"dtype": name}
        assert tree.tensors["unnamed"].dtype == f"void{wanted.itemsize}"
        assert tree.tensors["misnamed"].dtype == "float32"


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (2, 3, 4)},
        {"chunks": (7, 5, 11), "compression": "gzip"},
        {"chunks": (3, 1, 5), "compression": "gzip", "fletcher32": True},
        {"chunks": (3, 5, 5), "compression": "lzf", "shuffle": True},
        {"chunks": (4, 4, 4), "fletcher32": True},
    ],
    ids=str,
)
def test_any_block_of_any_storage(storage: dict, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=NUMBERS, **storage)
    flat = NUMBERS.reshape(-1)
    weights, tree = tree_of(tmp_path / "a.h5")
    for start, stop in [(0, 0), (0, 1), (0, 385), (3, 17), (54, 56), (55, 110), (100, 350), (384, 385)]:
        out = np.empty(stop - start, np.float32)
        tree.tensors["x"].read_into(start, out)
        assert (out == flat[start:stop]).all()
    weights.close()


def test_compact_and_unwritten_tensors(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3, 4))
        h5py.h5d.create(file.id, b"compact", h5py.h5t.IEEE_F32LE, space, plist).write(
            h5py.h5s.ALL, h5py.h5s.ALL, hostile.GOOD
        )
        file.create_dataset("unwritten", (2, 3), "f4", fillvalue=7)
        file.create_dataset("holes", (4,), "f4", chunks=(2,), fillvalue=5)[:2] = 1
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"never", h5py.h5t.IEEE_F32LE, space, plist)
    weights, tree = tree_of(tmp_path / "a.h5")
    assert (tree.tensors["compact"].read() == hostile.GOOD).all()
    assert (tree.tensors["unwritten"].read() == 7).all()
    assert tree.tensors["holes"].read().tolist() == [1, 1, 5, 5]
    out = np.full(12, 9, np.float32)
    tree.tensors["never"].read_into(0, out)
    assert not out.any(), "memory of the reader must not shine through"
    weights.close()


def test_scalars_and_tensors_without_elements(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scalar"] = np.float32(3)
        file["none"] = np.zeros((0, 4), np.float32)
        file.create_dataset("packed", data=np.zeros((3, 0)), chunks=(1, 1), maxshape=(3, None), compression="gzip")
    weights, tree = tree_of(tmp_path / "a.h5")
    assert tree.tensors["scalar"].shape == ()
    assert tree.tensors["scalar"].read() == 3
    assert tree.tensors["none"].read().shape == (0, 4)
    assert tree.tensors["packed"].read().shape == (3, 0)
    weights.close()


def test_a_dataset_without_a_shape_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.Empty("f4")
    with open_hdf5(tmp_path / "a.h5") as weights, pytest.raises(FormatError, match="without a shape"):
        weights.tree()


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_a_user_block_before_the_data(block: int, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=block) as file:
        file[f"{hostile.GROUP}/0"] = NUMBERS
        file.create_dataset(f"{hostile.GROUP}/1", data=NUMBERS, compression="gzip")
    assert identify(tmp_path / "a.h5") is Kind.WEIGHTS
    weights, tree = tree_of(tmp_path / "a.h5", hostile.GROUP)
    assert all((tensor.read() == NUMBERS).all() for tensor in tree.tensors.values())
    weights.close()


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_listing(libver: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file.attrs["top"] = 1
        for index in (10, 2, 1):
            file[f"layers/dense/vars/{index}"] = NUMBERS
        file["layers/dense/vars"].attrs["name"] = "größe/β"
        file["layers/größe/vars/0"] = NUMBERS
        file.create_group("layers/empty")
    with open_hdf5(path) as weights:
        assert weights.path == path
        assert weights.names() == ("layers",)
        assert weights.names("layers") == ("dense", "empty", "größe")
        assert weights.names("/layers/dense/vars/") == ("1", "10", "2")
        tree = weights.tree("layers")
        assert list(tree.groups) == ["", "dense", "dense/vars", "empty", "größe", "größe/vars"]
        assert list(tree.tensors) == ["dense/vars/1", "dense/vars/10", "dense/vars/2", "größe/vars/0"]
        assert tree.groups["dense/vars"] == {"name": "größe/β"}
        assert tree.attributes == {}
        assert weights.attributes() == {"top": 1}
        assert weights.has("layers/dense/vars/1")
        assert not weights.has("layers/dense/vars/1/x")
        assert not weights.has("layers/none")
        for path_in_file, words in (("layers/none", "no group"), ("layers/dense/vars/1", "no group")):
            with pytest.raises(FormatError, match=words):
                weights.tree(path_in_file)
        assert tree.tensors["dense/vars/1"].where == "a.h5: 'layers/dense/vars/1'"


def test_attributes_are_decoded(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["text"] = "größe"
        file.attrs["bytes"] = b"abc"
        file.attrs["fixed"] = np.bytes_("größe".encode())
        file.attrs["none"] = ""
        file.attrs["names"] = np.array([b"a", "ß".encode()])
        file.attrs["strings"] = ["a", "ß"]
        file.attrs["nothing"] = []
        file.attrs["empty"] = h5py.Empty("f4")
        file.attrs["whole"] = np.int32(3)
        file.attrs["real"] = 0.5
        file.attrs["truth"] = np.bool_(True)
        file.attrs["list"] = np.array([[1, 2], [3, 4]], ">i8")
        file.attrs["long"] = "x" * 3_000_000
        file.attrs["latin"] = np.bytes_(b"gr\xf6\xdfe")
    with open_hdf5(tmp_path / "a.h5") as weights:
        found = weights.attributes()
        assert len(str(found.pop("long"))) == 3_000_000
        assert str(found.pop("latin")).encode("utf-8", "surrogateescape") == b"gr\xf6\xdfe"
        assert found == {
            **{"text": "größe", "bytes": "abc", "fixed": "größe", "none": "", "names": ["a", "ß"]},
            **{"strings": ["a", "ß"], "nothing": [], "empty": [], "whole": 3, "real": 0.5, "truth": True},
            "list": [1, 2, 3, 4],
        }
        assert isinstance(found["whole"], int)
        assert found["truth"] is True


def test_names_are_joined(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names0"] = [b"a", b"b"]
        file.attrs["layer_names1"] = [b"c"]
        file.create_group("g").attrs["weight_names"] = []
        file.create_group("h").attrs["weight_names"] = [1, 2]
    with open_hdf5(tmp_path / "a.h5") as weights:
        assert weights.names_attribute("", "layer_names") == ["a", "b", "c"]
        assert weights.names_attribute("g", "weight_names") == []
        assert weights.names_attribute("", "weight_names") == []
        with pytest.raises(FormatError, match=r"a\.h5: 'h': attribute 'weight_names' holds 1 where"):
            weights.names_attribute("h", "weight_names")
    assert identify(tmp_path / "a.h5") is Kind.H5_WEIGHTS


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("order", [False, True])
def test_the_length_of_strings_is_known_before_they_are_read(
    libver: str, userblock: int, order: bool, tmp_path: Path
) -> None:
    """Keras stores lists of names as strings of variable length, which need not be as short as they should."""
    names = [f"größe_{index}" for index in range(1000)]
    with h5py.File(tmp_path / "a.h5", "w", libver=libver, userblock_size=userblock) as file:
        group = file.create_group("model_weights", track_order=order)
        for index in range(5 if libver == "latest" or order else 20):
            group.attrs[f"other_{index}"] = "y" * 50
        group.attrs["layer_names"] = names
        group.attrs["late"] = ["z" * 100, "z"]
        file["x"] = np.zeros(10_000_000, np.uint8)  # large enough for a thousand strings of its size to be refused
    with open_hdf5(tmp_path / "a.h5") as weights:
        assert isinstance(weights, Hdf5Weights)
        loc = weights._open("model_weights")
        assert weights.string_bytes(loc, b"late", 1000) == 101
        assert weights.names_attribute("model_weights", "layer_names") == names


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    weights, tree = tree_of(hostile.weights_file(tmp_path / "a.h5"), hostile.GROUP)
    tensor = tree.tensors["0"]
    for start, out in [
        (0, np.empty(12, np.float64)),
        (0, np.empty((3, 4), np.float32)),
        (0, np.empty(24, np.float32)[::2]),
        (-1, np.empty(2, np.float32)),
        (11, np.empty(2, np.float32)),
    ]:
        with pytest.raises(ValueError, match=r"a\.h5"):
            tensor.read_into(start, out)
    weights.close()
    with pytest.raises(ValueError, match="closed"):
        tensor.read_into(0, np.empty(1, np.float32))
    with pytest.raises(ValueError, match="closed"):
        weights.tree()


def test_threads_read_at_once(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for index in range(8):
            storage = {"compression": "gzip", "chunks": (4, 5)} if index % 2 else {}
            file.create_dataset(str(index), data=np.full((40, 50), index, np.float32), **storage)
    weights, tree = tree_of(tmp_path / "a.h5")
    wrong: list[str] = []

    def work(first: int) -> None:
        out = np.empty(77, np.float32)
        for repeat in range(200):
            index = (first + repeat) % 8
            tree.tensors[str(index)].read_into(repeat * 9, out)
            if not (out == index).all():
                wrong.append(str(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    weights.close()


def test_flat_ranges_become_boxes() -> None:
    for shape in [(24,), (4, 6), (2, 3, 4), (2, 1, 3, 4), (24, 1, 1)]:
        whole = np.arange(24).reshape(shape)
        for start in range(24):
            for stop in range(start, 25):
                pieces = [
                    whole[tuple(slice(at, at + n) for at, n in zip(corner, count, strict=True))].reshape(-1)
                    for corner, count in slabs(shape, start, stop)
                ]
                assert len(pieces) <= 2 * len(shape) - 1
                joined = np.concatenate([*pieces, np.zeros(0, int)])
                assert joined.tolist() == list(range(start, stop))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives(method: int, tmp_path: Path) -> None:
    path = hostile.model_zip(tmp_path / "m.h5", {"assets/a/vocabulary.txt": b"one\ntwo"}, method)
    assert identify(path) is Kind.KERAS
    with open_archive(path) as archive:
        assert archive.path == path
        assert archive.config == {"class_name": "Sequential", "config": {}}
        assert archive.metadata == {"keras_version": "3.15.1"}
        tensor = archive.weights.tree("layers").tensors["dense/vars/0"]
        assert (tensor.read() == hostile.GOOD).all()
        assert tensor.where == "m.h5/model.weights.h5: 'layers/dense/vars/0'"
        assert list(archive.assets) == ["assets/a/vocabulary.txt"]
        assert archive.assets["assets/a/vocabulary.txt"].read() == b"one\ntwo"
        assert archive.assets["assets/a/vocabulary.txt"].size == 7
    assert os.listdir(tmp_path) == ["m.h5"]


def test_large_members_unpack_in_blocks(tmp_path: Path) -> None:
    data = RANDOM.integers(0, 4, 5_000_000, np.uint8).tobytes() + bytes(3_000_001)
    path = hostile.model_zip(tmp_path / "m.keras", {"assets/big": data}, zipfile.ZIP_DEFLATED)
    with open_archive(path) as archive:
        assert archive.assets["assets/big"].read() == data


def test_a_damaged_asset_is_noticed(tmp_path: Path) -> None:
    path = hostile.model_zip(tmp_path / "m.keras", {"assets/a": b"vocabulary"})
    hostile.replace(path, b"vocabulary", b"vocabulery")
    with open_archive(path) as archive, pytest.raises(FormatError, match="checksum"):
        archive.assets["assets/a"].read()


def test_folders(tmp_path: Path) -> None:
    path = hostile.model_folder(tmp_path / "model")
    (path / "assets" / "inner").mkdir(parents=True)
    (path / "assets" / "inner" / "v.txt").write_bytes(b"abc")
    (path / "tokenizer.json").write_text("{}")
    assert identify(path) is Kind.FOLDER
    with open_archive(path) as archive:
        assert archive.config["class_name"] == "Sequential"
        assert (archive.weights.tree(hostile.GROUP).tensors["0"].read() == hostile.GOOD).all()
        assert {name: asset.read() for name, asset in archive.assets.items()} == {
            "tokenizer.json": b"{}",
            "assets/inner/v.txt": b"abc",
        }


def shards(folder: Path) -> None:
    for index, keys in enumerate((["dense/vars/0"], ["dense/vars/1", "dense_1/vars/0"])):
        with h5py.File(folder / f"model_{index}.weights.h5", "w") as file:
            for key in keys:
                file[f"layers/{key}"] = np.full(3, index, np.float32)
            file["layers/dense/vars"].attrs["name"] = "dense"
    table = {"/layers/dense/vars": ["model_0.weights.h5", "model_1.weights.h5"]}
    table |= {"/layers/dense_1/vars": "model_1.weights.h5"}
    text = json.dumps({"metadata": {"total_size": 36}, "weight_map": table})
    (folder / "model.weights.json").write_text(text)


def test_shards_are_seen_as_one(tmp_path: Path) -> None:
    shards(tmp_path)
    assert identify(tmp_path / "model.weights.json") is Kind.SHARDS
    with open_shards(tmp_path / "model.weights.json") as weights:
        tree = weights.tree("layers")
        assert {key: tensor.read()[0] for key, tensor in tree.tensors.items()} == {
            **{"dense/vars/0": 0, "dense/vars/1": 1, "dense_1/vars/0": 1},
        }
        assert list(tree.groups) == ["", "dense", "dense/vars", "dense_1", "dense_1/vars"]
        assert weights.names("layers") == ("dense", "dense_1")
        assert weights.attributes("layers/dense/vars") == {"name": "dense"}
        assert weights.has("layers/dense_1")
        with pytest.raises(FormatError, match="any of its 2 shards"):
            weights.tree("layers/none")


def test_shards_in_folder_and_zip(tmp_path: Path) -> None:
    folder = hostile.model_folder(tmp_path / "preset")
    (folder / "model.weights.h5").unlink()
    shards(folder)
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for place in sorted(folder.iterdir()):
            archive.write(place, place.name)
    for path, kind in ((folder, Kind.FOLDER), (tmp_path / "m.keras", Kind.KERAS)):
        assert identify(path) is kind
        with open_archive(path) as model:
            assert len(model.weights.tree().tensors) == 3


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    hostile.weights_file(tmp_path / "a.h5")
    hostile.weights_file(tmp_path / "b.h5")
    path = hostile.shard_map(tmp_path / "x.weights.json", ["a.h5", "b.h5"])
    with open_shards(path) as weights, pytest.raises(FormatError, match="another shard"):
        weights.tree()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"attribute": "model_config"}, Kind.H5),
        ({"attribute": "layer_names"}, Kind.H5_WEIGHTS),
        ({"tensor": "_layer_checkpoint_dependencies/dense/vars/0"}, Kind.WEIGHTS),
        ({"tensor": "backbone/layers/dense/vars/0"}, Kind.WEIGHTS),
        ({"tensor": "a/b/c/d/vars/0"}, Kind.WEIGHTS),
        ({"tensor": "vars/0"}, Kind.WEIGHTS),
    ],
    ids=str,
)
def test_kinds_of_hdf5(content: dict[str, str], kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "wrong.keras"
    with h5py.File(path, "w") as file:
        if "attribute" in content:
            file.attrs[content["attribute"]] = "x"
        else:
            file[content["tensor"]] = NUMBERS
    assert identify(path) is kind
    assert identify(str(path)) == kind.value


def test_json() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\x9f", NaN]}', "x")["a"][3] == "ß"
    nested: object = 1
    for _ in range(199):
        nested = [nested]
    assert read_json(json.dumps(nested).encode(), "x") == nested
    text = json.dumps([{"[[[": '\\"[[[[' * 100}] * 300).encode()
    assert len(read_json(text, "x")) == 300


def test_importing_the_store_imports_no_framework() -> None:
    code = "import sys, kmerge.store; print(*{'keras', 'tensorflow', 'rich', 'ml_dtypes'} & set(sys.modules))"
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == ""


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list open files")
    model = hostile.model_zip(tmp_path / "m.keras", method=zipfile.ZIP_DEFLATED)
    shards(tmp_path)
    (tmp_path / "bad.keras").write_bytes(b"PK\3\4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        identify(model)
        open_archive(model).close()
        open_shards(tmp_path / "model.weights.json").close()
        for opener in (open_archive, open_hdf5, open_shards, identify):
            with pytest.raises(FormatError):
                opener(tmp_path / "bad.keras")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.real
def test_real_files_read_as_h5py_reads_them(shared: Path) -> None:
    count = 0
    for path in sorted([*shared.glob("models/**/*.*"), *shared.glob("legacy/**/*.h5")]):
        try:
            kind = identify(path)
        except FormatError:
            continue
        opened = open_archive(path) if kind is Kind.KERAS else open_hdf5(path)
        data = zipfile.ZipFile(path).read("model.weights.h5") if kind is Kind.KERAS else path.read_bytes()
        weights = opened.weights if kind is Kind.KERAS else opened  # type: ignore[union-attr]
        with opened, h5py.File(io.BytesIO(data)) as file:
            for key, tensor in weights.tree().tensors.items():
                assert np.array_equal(tensor.read(), file[key][()], equal_nan=True), (path, key)
                count += 1
    assert count > 3000
