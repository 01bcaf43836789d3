"""Writing: whole or not at all, the bytes that Keras would write, and no trace of an attempt that failed."""

import errno
import json
import os
import resource
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hostile
import ml_dtypes
import numpy as np
import pytest

from kmerge.errors import MergeError, OutputError
from kmerge.store import (
    Layout,
    Output,
    TensorSpec,
    copy_file,
    create_archive,
    create_hdf5,
    identify,
    numpy_dtype,
    open_archive,
    open_hdf5,
    zipwrite,
)
from kmerge.store import target as target_module
from kmerge.store.zipwrite import Member, crc32_combine, directory

RANDOM = np.random.default_rng(0)
LAYOUT = Layout(
    {"": {"top": "a"}, "layers/dense/vars": {"name": "dense"}},
    {"layers/dense/vars/0": TensorSpec((30, 40), "float32"), "layers/dense/vars/1": TensorSpec((40,), "float32")},
)
VALUES = {key: RANDOM.normal(size=spec.shape).astype(np.float32) for key, spec in LAYOUT.tensors.items()}
CONFIG: dict[str, Any] = {"class_name": "Sequential", "config": {}}


def fill(output: Output) -> None:
    for key, value in VALUES.items():
        output.write(key, 0, value)


def fill_and_raise(output: Output, error: type[BaseException]) -> None:
    fill(output)
    raise error


def fill_and_find(output: Output, path: Path) -> None:
    """Fill the output while somebody else puts a file where it is to appear."""
    fill(output)
    path.write_text("precious")


def write_spans(output: Output, key: str, spans: list[tuple[int, int]]) -> None:
    """Write parts of one tensor, and the others whole."""
    for other in VALUES.keys() - {key}:
        output.write(other, 0, VALUES[other])
    for start, stop in spans:
        output.write(key, start, VALUES[key][start:stop])


@contextmanager
def create(kind: str, path: Path, layout: Layout = LAYOUT, **options: Any) -> Iterator[Output]:
    """One writer of three."""
    if kind == "hdf5":
        with create_hdf5(path, layout, **options) as output:
            yield output
    else:
        with create_archive(
            path, metadata={}, config=CONFIG, layout=layout, folder=kind == "folder", **options
        ) as output:
            yield output


def read_all(path: Path) -> dict[str, np.ndarray]:
    opened = open_hdf5(path) if identify(path) in ("weights", "h5") else open_archive(path).weights
    with opened as weights:
        return {key: tensor.read() for key, tensor in weights.tree().tensors.items()}


every_kind = pytest.mark.parametrize("kind", ["hdf5", "zip", "folder"])


@every_kind
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with create(kind, path) as output:
        fill(output)
        assert not path.exists()
    assert os.listdir(tmp_path) == ["out"]
    found = read_all(path)
    assert list(found) == list(VALUES)
    assert all((found[key] == VALUES[key]).all() for key in VALUES)


@every_kind
def test_blocks_in_any_order_from_any_thread(kind: str, tmp_path: Path) -> None:
    blocks = [(key, start) for key, value in VALUES.items() for start in range(0, value.size, 7)]
    RANDOM.shuffle(blocks)
    with create(kind, tmp_path / "out") as output:

        def work(mine: list[tuple[str, int]]) -> None:
            for key, start in mine:
                output.write(key, start, VALUES[key].reshape(-1)[start : start + 7])

        threads = [threading.Thread(target=work, args=(blocks[index::4],)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read_all(tmp_path / "out")
    assert all((found[key] == VALUES[key]).all() for key in VALUES)
    if kind == "zip":
        assert zipfile.ZipFile(tmp_path / "out").testzip() is None


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float64", "int8", "int64", "uint32", "bool", "complex64", "bfloat16", "float8_e5m2", "void3"],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3, 5)], ids=str)
def test_every_type_and_shape(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = TensorSpec(shape, dtype)
    raw = RANDOM.integers(0, 2, spec.nbytes, np.uint8)
    value = raw.view(numpy_dtype(dtype)).reshape(shape) if spec.size else np.zeros(shape, numpy_dtype(dtype))
    with create_hdf5(tmp_path / "a.h5", Layout({}, {"vars/0": spec})) as output:
        output.write("vars/0", 0, value)
    with open_hdf5(tmp_path / "a.h5") as weights:
        tensor = weights.tree().tensors["vars/0"]
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (shape, dtype, spec.nbytes)
        assert tensor.read().tobytes() == value.tobytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["vars/0"].shape == shape


def test_a_layout_without_tensors(tmp_path: Path) -> None:
    with create("zip", tmp_path / "a.keras", Layout({"layers": {}}, {})):
        pass
    with open_archive(tmp_path / "a.keras") as archive:
        assert list(archive.weights.tree().groups) == ["", "layers"]
        assert archive.config == CONFIG
    assert zipfile.ZipFile(tmp_path / "a.keras").testzip() is None


def test_members_stand_in_keras_order_and_are_stored(tmp_path: Path) -> None:
    assets = {"assets/größe/v.txt": "ß".encode(), "assets/empty": b""}
    with create("zip", tmp_path / "a.keras", assets=assets) as output:
        fill(output)
    with zipfile.ZipFile(tmp_path / "a.keras") as archive:
        assert archive.namelist() == ["metadata.json", "config.json", "model.weights.h5", *assets]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
        archive.extractall(tmp_path / "unzipped")
    with open_archive(tmp_path / "a.keras") as first:
        for folder in (False, True):  # assets as they were read
            with create("folder" if folder else "zip", tmp_path / f"b{folder}", assets=first.assets) as output:
                fill(output)
            with open_archive(tmp_path / f"b{folder}") as second:
                assert {name: asset.read() for name, asset in second.assets.items()} == assets
    assert identify(tmp_path / "unzipped") == "folder"


@every_kind
def test_equal_content_gives_equal_bytes(kind: str, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        with create(kind, tmp_path / name) as output:
            fill(output)
        place = tmp_path / name / "model.weights.h5" if kind == "folder" else tmp_path / name
        found.append(place.read_bytes())
        time.sleep(1.1)  # HDF5 and zip could store the second
    assert found[0] == found[1]


def test_attributes_are_stored_as_h5py_and_keras_would(tmp_path: Path) -> None:
    names = [f"layer_{index}" * 20 for index in range(2000)]
    few = ["a", "größe", "b"]
    root: dict[str, Any] = {"text": "größe", "bytes": b"abc", "long": "x" * 3_000_000, "none": "", "i": 3, "f": 0.5}
    root |= {"b": True, "layer_names": few, "nothing": [], "many_names": names, "empty": [""], "ints": [1, 2]}
    with create_hdf5(tmp_path / "a.h5", Layout({"": root, "g/h": {"weight_names": []}}, {})):
        pass
    encoded = [name.encode() for name in names]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        for name, value in root.items():
            if name == "many_names":
                for index, piece in enumerate(np.array_split(np.array(encoded), 7)):
                    file.attrs[f"{name}{index}"] = piece
            elif isinstance(value, list) and value and isinstance(value[0], str):
                file.attrs[name] = np.array([item.encode() for item in value], None if any(value) else "S1")
            else:
                file.attrs[name] = value
        file.create_group("g/h").attrs["weight_names"] = []
    with h5py.File(tmp_path / "a.h5") as ours, h5py.File(tmp_path / "b.h5") as theirs:
        assert set(ours.attrs) == set(theirs.attrs)
        for place in ("/", "g/h"):
            for name in theirs[place].attrs:
                first, second = (file[place].attrs.get_id(name) for file in (ours, theirs))
                assert (first.get_type().equal(second.get_type()), first.shape) == (True, second.shape), name
                assert np.array_equal(ours[place].attrs[name], theirs[place].attrs[name]), name
    with open_hdf5(tmp_path / "a.h5") as weights:
        assert weights.names_attribute("", "many_names") == names
        assert weights.names_attribute("", "layer_names") == few
        assert weights.attributes("g/h") == {"weight_names": []}


def test_one_name_too_long_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(MergeError, match="64,512"),
        create_hdf5(tmp_path / "a.h5", Layout({"": {"names": ["x" * 70_000]}}, {})),
    ):
        pass
    assert not os.listdir(tmp_path)


def test_names_of_any_alphabet_and_order(tmp_path: Path) -> None:
    layout = Layout({}, {key: TensorSpec((1,), "float32") for key in ("größe/z", "größe/a", "日本/0", "\udcff/0")})
    with create_hdf5(tmp_path / "a.h5", layout) as output:
        for index, key in enumerate(layout.tensors):
            output.write(key, 0, np.array([index], np.float32))
    with open_hdf5(tmp_path / "a.h5") as weights:
        found = {key: int(tensor.read()[0]) for key, tensor in weights.tree().tensors.items()}
    assert found == {key: index for index, key in enumerate(layout.tensors)}


# What goes wrong ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_error_leaves_nothing(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), create(kind, tmp_path / "out") as output:
        fill_and_raise(output, error)
    assert not os.listdir(tmp_path)


@every_kind
def test_an_error_leaves_the_old_result(kind: str, tmp_path: Path) -> None:
    with create(kind, tmp_path / "out") as output:
        fill(output)
    before = read_all(tmp_path / "out")
    with pytest.raises(RuntimeError), create(kind, tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]
    assert read_all(tmp_path / "out").keys() == before.keys()


@every_kind
@pytest.mark.parametrize("missing", ["all of it", "the first element", "the last element", "one within"])
def test_a_tensor_not_written_whole_is_an_error(kind: str, missing: str, tmp_path: Path) -> None:
    key = "layers/dense/vars/1"
    spans: dict[str, list[tuple[int, int]]] = {
        "all of it": [],
        "the first element": [(1, 40)],
        "the last element": [(0, 39)],
    }
    with (
        pytest.raises(MergeError, match=r"out: tensor 'layers/dense/vars/1' was not written completely"),
        create(kind, tmp_path / "out") as output,
    ):
        write_spans(output, key, spans.get(missing, [(0, 20), (21, 40)]))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("again", [(0, 40), (39, 1), (0, 1), (20, 2)], ids=str)
def test_writing_twice_is_an_error(again: tuple[int, int], tmp_path: Path) -> None:
    key = "layers/dense/vars/1"
    with pytest.raises(MergeError, match="twice"), create("hdf5", tmp_path / "out") as output:
        write_spans(output, key, [(0, 40), (again[0], again[0] + again[1])])


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with create("hdf5", tmp_path / "out") as output:
        for key, start, block in [
            ("none", 0, np.zeros(1, np.float32)),
            ("layers/dense/vars/1", 0, np.zeros(1, np.float64)),
            ("layers/dense/vars/1", -1, np.zeros(1, np.float32)),
            ("layers/dense/vars/1", 40, np.zeros(1, np.float32)),
        ]:
            with pytest.raises(MergeError):
                output.write(key, start, block)
        fill(output)


@pytest.mark.parametrize(
    "layout",
    [
        Layout({}, {"a": TensorSpec((1,), "float32"), "a/b": TensorSpec((1,), "float32")}),
        Layout({"a": {}}, {"a": TensorSpec((1,), "float32")}),
        Layout({}, {"a//b": TensorSpec((1,), "float32")}),
        Layout({}, {"": TensorSpec((1,), "float32")}),
        Layout({}, {"a/.": TensorSpec((1,), "float32")}),
        Layout({"": {"a": {"b": 1}}}, {}),
    ],
    ids=str,
)
@every_kind
def test_layouts_that_are_none(kind: str, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(MergeError), create(kind, tmp_path / "out", layout):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "config.json", "a/../../b", ""])
def test_assets_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(MergeError), create("folder", tmp_path / "out", assets={name: b""}):
        pass
    assert not os.listdir(tmp_path)


@every_kind
def test_an_existing_result_is_kept(kind: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"), create(kind, tmp_path / "out"):
        pytest.fail("nothing may be written")
    assert (tmp_path / "out").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


@every_kind
def test_a_result_that_appears_meanwhile_is_kept(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--force"), create(kind, tmp_path / "out") as output:
        fill_and_find(output, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_disks_without_links(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    with create("hdf5", tmp_path / "out") as output:
        fill(output)
    with pytest.raises(OutputError, match="--force"), create("hdf5", tmp_path / "other") as output:
        fill_and_find(output, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    assert (tmp_path / "other").read_text() == "precious"


@every_kind
def test_overwriting(kind: str, tmp_path: Path) -> None:
    for old in ("file", "link", "model folder", "empty folder"):
        place = tmp_path / old.replace(" ", "_")
        place.mkdir()
        out = place / "out"
        secret = tmp_path / "secret"
        secret.write_text("precious")
        if old == "file":
            out.write_text("old")
        elif old == "link":
            out.symlink_to(secret)
        elif old == "model folder":
            hostile.model_folder(out)
        else:
            out.mkdir()
        if "folder" in old and kind != "folder":
            with pytest.raises(OutputError, match="is a folder"), create(kind, out, overwrite=True):
                pass
            continue
        with create(kind, out, overwrite=True) as output:
            fill(output)
        assert (read_all(out)["layers/dense/vars/1"] == VALUES["layers/dense/vars/1"]).all()
        assert secret.read_text() == "precious"
        assert os.listdir(place) == ["out"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("thesis.tex",), r"'thesis.tex', which is no part of a saved model"),
        (("config.json", "package.json", "src"), "'package.json', which is no part"),
        (("config.json", "metadata.json", "model.weights.h5", ".git"), "'.git', which is no part"),
        (("config.json", "metadata.json", "assets"), "holds no saved model"),
        (("model.weights.h5",), "holds no saved model"),
    ],
)
def test_a_folder_of_other_things_is_never_replaced(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for name in names:
        (tmp_path / "home" / name).write_text("precious")
    with pytest.raises(OutputError, match=message), create("folder", tmp_path / "home", overwrite=True):
        pytest.fail("nothing may be written")
    assert sorted(os.listdir(tmp_path / "home")) == sorted(names)
    assert os.listdir(tmp_path) == ["home"]


def test_a_folder_that_changes_meanwhile_is_kept(tmp_path: Path) -> None:
    hostile.model_folder(tmp_path / "out")
    with pytest.raises(OutputError, match=r"thesis\.tex"), create("folder", tmp_path / "out", overwrite=True) as output:
        fill_and_find(output, tmp_path / "out" / "thesis.tex")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


def test_a_sharded_model_in_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "assets").mkdir(parents=True)
    for name in ("config.json", "metadata.json", "model.weights.json", "model.weights_00000.h5", "tokenizer.json"):
        (tmp_path / "out" / name).write_text("old")
    with create("folder", tmp_path / "out", overwrite=True) as output:
        fill(output)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "metadata.json", "model.weights.h5"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("at_once", [True, False])
def test_folders_change_places(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step where the system can; else the old one is moved away, and back where the new one cannot come."""
    if not at_once:
        monkeypatch.setattr(target_module, "_swap", lambda *_: False)
    hostile.model_folder(tmp_path / "out")
    renamed: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (renamed.append(str(old)), rename(old, new)))
    with create("folder", tmp_path / "out", overwrite=True) as output:
        fill(output)
    assert (str(tmp_path / "out") in renamed) is not (at_once and sys.platform.startswith("linux"))
    assert os.listdir(tmp_path) == ["out"]
    assert (read_all(tmp_path / "out")["layers/dense/vars/1"] == VALUES["layers/dense/vars/1"]).all()


def test_the_old_folder_comes_back_where_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "_swap", lambda *_: False)
    hostile.model_folder(tmp_path / "out")
    rename = os.rename
    coming = []

    def fail(old: Path, new: Path) -> None:
        if new == tmp_path / "out":
            coming.append(old)
            if len(coming) == 1:
                raise OSError(errno.EIO, "broken")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="broken"), create("folder", tmp_path / "out", overwrite=True) as output:
        fill(output)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == {"keras_version": "3.15.1"}
    assert os.listdir(tmp_path) == ["out"]


# ---- copying


@pytest.mark.parametrize("size", [0, 1, 7, 21, 100])
def test_files_are_copied_in_pieces(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_CHUNK", 7)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    content = RANDOM.integers(0, 256, size, np.uint8).tobytes()
    (tmp_path / "a").write_bytes(content)
    copy_file(tmp_path / "a", tmp_path / "b", False)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes() == content
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        copy_file(tmp_path / "a", tmp_path / "b", False)
    (tmp_path / "b").write_text("old")
    copy_file(tmp_path / "a", tmp_path / "b", True)
    assert (tmp_path / "b").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(OutputError, match="missing cannot be read"):
        copy_file(tmp_path / "missing", tmp_path / "b", False)
    with pytest.raises(OutputError, match="does not exist"):
        copy_file(tmp_path / "a", tmp_path / "nowhere" / "b", False)
    with monkeypatch.context() as patch:
        patch.setattr(target_module, "_CHUNK", 7)
        write = os.write

        def cut(fd: int, data: memoryview) -> int:
            os.truncate(tmp_path / "a", 20)
            return write(fd, data)

        patch.setattr(os, "write", cut)
        with pytest.raises(OutputError, match="holds 100 bytes but 20 were read"):
            copy_file(tmp_path / "a", tmp_path / "b", False)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        copy_file(tmp_path / "a", tmp_path / "b", False)
    assert os.listdir(tmp_path) == ["a"]


@every_kind
def test_a_source_may_be_overwritten_while_it_is_read(kind: str, tmp_path: Path) -> None:
    with create(kind, tmp_path / "out") as output:
        fill(output)
    weights = open_hdf5(tmp_path / "out") if kind == "hdf5" else open_archive(tmp_path / "out").weights
    tensors = weights.tree().tensors
    with create(kind, tmp_path / "out", overwrite=True) as output:
        for key in VALUES:
            output.write(key, 0, 2 * tensors[key].read())
    assert (tensors["layers/dense/vars/1"].read() == VALUES["layers/dense/vars/1"]).all()
    assert (read_all(tmp_path / "out")["layers/dense/vars/1"] == 2 * VALUES["layers/dense/vars/1"]).all()
    weights.close()


@every_kind
def test_places_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, words in [
        (tmp_path / "none" / "out", "does not exist. Create it first"),
        (tmp_path / "file" / "out", "is no folder"),
        (tmp_path / ("x" * 300), "name is too long"),
        (Path("a\0b"), "no valid file name"),
    ]:
        with pytest.raises(OutputError, match=words), create(kind, path):
            pass
    assert os.listdir(tmp_path) == ["file"]


def test_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="neither"), create("hdf5", tmp_path / "pipe", overwrite=True):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="permission denied"), create("hdf5", tmp_path / "locked" / "out"):
        pass


@every_kind
def test_more_than_the_disk_holds_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    layout = Layout({}, {"vars/0": TensorSpec((10**7, 10**7), "float64")})
    with pytest.raises(OutputError, match=r"needs 800\.0 TB"), create(kind, tmp_path / "out", layout):
        pass
    assert not os.listdir(tmp_path)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@every_kind
@pytest.mark.parametrize("limit", [0, 10, 2_000, 50_000])
def test_a_full_disk(kind: str, limit: int, tmp_path: Path) -> None:
    layout = Layout({}, {f"layers/dense_{index}/vars/0": TensorSpec((100,), "float32") for index in range(300)})
    with (
        pytest.raises(OutputError, match="file grows larger"),
        file_size_limit(limit),
        create(kind, tmp_path / "out", layout) as output,
    ):
        [output.write(key, 0, np.ones(100, np.float32)) for key in layout.tensors]
    assert not os.listdir(tmp_path)


def test_enospc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="disk is full"), create("hdf5", tmp_path / "out") as output:
        fill(output)
    assert not os.listdir(tmp_path)


@every_kind
def test_permissions_follow_the_umask(kind: str, tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        old = os.umask(mask)
        try:
            with create(kind, tmp_path / f"out{mask}") as output:
                fill(output)
        finally:
            os.umask(old)
        place = tmp_path / f"out{mask}"
        assert place.stat().st_mode & 0o777 == (0o777 if kind == "folder" else 0o666) & ~mask
        for inner in place.iterdir() if kind == "folder" else []:
            assert inner.stat().st_mode & 0o777 == 0o666 & ~mask


def test_temporary_names_are_hidden_and_fit(tmp_path: Path) -> None:
    name = target_module.temporary_name(tmp_path / ("ß" * 120)).name
    assert name.startswith(".ß")
    assert name.endswith(".tmp")
    assert len(name.encode()) < 255
    with create("hdf5", tmp_path / "out.h5") as output:
        [temporary] = os.listdir(tmp_path)
        assert temporary.startswith(".out.h5.")
        assert temporary.endswith(".tmp")
        fill(output)


# Zip ------------------------------------------------------------------------------------------------------------------


def test_crc_combines_like_zlib() -> None:
    data = RANDOM.integers(0, 256, 300_000, np.uint8).tobytes()
    for cut in (0, 1, 2, 255, 4096, 131_072, 299_999, 300_000):
        first, second = data[:cut], data[cut:]
        assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)
    zeros = zlib.crc32(bytes(1 << 20))
    for doubling in range(20, 24):
        zeros = crc32_combine(zeros, zeros, 1 << doubling)
    assert zeros == zlib.crc32(bytes(1 << 24))


@pytest.mark.parametrize("threshold", [1, 400, 5000])
def test_zip64_records(threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipwrite, "ZIP64_FROM", threshold)
    monkeypatch.setattr("kmerge.store.output.ZIP64_FROM", threshold)
    with create("zip", tmp_path / "a.keras", assets={"assets/v.txt": b"abc"}) as output:
        fill(output)
    archive = zipfile.ZipFile(tmp_path / "a.keras")
    assert archive.testzip() is None
    assert archive.namelist()[-1] == "assets/v.txt"
    assert (read_all(tmp_path / "a.keras")["layers/dense/vars/1"] == VALUES["layers/dense/vars/1"]).all()


def test_a_member_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse archive: 5 GB of zeros that take no room, read by zipfile and by the store."""
    size = 5 << 30
    layout = Layout({}, {"layers/a/vars/0": TensorSpec((size,), "uint8"), "layers/a/vars/1": TensorSpec((4,), "uint8")})
    path = tmp_path / "big.keras"
    zeros = zlib.crc32(bytes(1 << 20))
    for doubling in range(20, 32):
        zeros = crc32_combine(zeros, zeros, 1 << doubling)
    quarter = zlib.crc32(bytes(1 << 20))
    for doubling in range(20, 30):
        quarter = crc32_combine(quarter, quarter, 1 << doubling)
    with create("zip", path, layout, assets={"assets/last": b"xyz"}) as output:
        output.write("layers/a/vars/1", 0, np.arange(4, dtype=np.uint8))
        offset = output._offsets["layers/a/vars/0"]  # as if written, without 5 GB of work
        output._pieces.append((offset, size, crc32_combine(zeros, quarter, 1 << 30)))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model.weights.h5")
        assert info.file_size > size
        assert archive.read("assets/last") == b"xyz"
        with archive.open("model.weights.h5") as member:
            assert member.read(4) == b"\x89HDF"
    with open_archive(path) as model:
        tensors = model.weights.tree().tensors
        assert tensors["layers/a/vars/0"].size == size
        assert tensors["layers/a/vars/1"].read().tolist() == [0, 1, 2, 3]
        out = np.ones(10, np.uint8)
        tensors["layers/a/vars/0"].read_into(size - 10, out)
        assert not out.any()
    assert path.stat().st_blocks * 512 < 100 << 20


def test_records_of_members_far_into_a_file() -> None:
    member = Member("größe", 5 << 32, 7 << 32, 123, wide=True)
    local, central = member.local(), member.central()
    assert struct.unpack_from("<HHQQ", local, 30 + len("größe".encode())) == (1, 16, 7 << 32, 7 << 32)
    assert struct.unpack_from("<HHQQQ", central, 46 + len("größe".encode())) == (1, 24, 7 << 32, 7 << 32, 5 << 32)
    tail = directory([member], 13 << 32)
    assert tail[len(central) :].startswith(b"PK\6\6")
    assert struct.unpack_from("<QQ", tail, len(central) + 40) == (len(central), 13 << 32)


# Keras ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras() -> Any:
    return pytest.importorskip("keras")


def rewrite(source: Path, target: Path, folder: bool = False) -> None:
    """Copy a model through layout and blocks."""
    with open_archive(source) as archive:
        tree = archive.weights.tree()
        tensors = {
            key: TensorSpec(tensor.shape, tensor.dtype, tree.attributes.get(key, {}))
            for key, tensor in tree.tensors.items()
        }
        with create_archive(
            target,
            metadata=archive.metadata,
            config=archive.config,
            layout=Layout(tree.groups, tensors),
            assets=archive.assets,
            folder=folder,
        ) as output:
            for key, tensor in tree.tensors.items():
                for start in range(0, tensor.size, 10):
                    block = np.empty(min(10, tensor.size - start), numpy_dtype(tensor.dtype))
                    tensor.read_into(start, block)
                    output.write(key, start, block)


def test_keras_reads_what_is_written(keras: Any, tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, dtype=keras.DTypePolicy("bfloat16"))(inputs)
    hidden = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(hidden))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    model.compile("adam", "mse")
    model.save(tmp_path / "a.keras")
    for folder in (False, True):
        target = tmp_path / ("b.keras" if not folder else "b")
        rewrite(tmp_path / "a.keras", target, folder)
        again = keras.models.load_model(target)
        for first, second in zip(model.variables, again.variables, strict=True):
            if "seed" in first.path:  # Keras itself does not keep it here
                continue
            assert first.dtype == second.dtype
            assert (np.asarray(first.value) == np.asarray(second.value)).all()
    with (
        zipfile.ZipFile(tmp_path / "a.keras") as first_zip,
        zipfile.ZipFile(tmp_path / "b.keras") as second_zip,
        first_zip.open("model.weights.h5") as first_file,
        second_zip.open("model.weights.h5") as second_file,
        h5py.File(first_file) as theirs,
        h5py.File(second_file) as ours,
    ):
        assert first_zip.namelist() == second_zip.namelist()
        seen: list[str] = []

        def compare(name: str, item: Any) -> None:
            seen.append(name)
            assert dict(item.attrs) == dict(ours[name].attrs)
            if isinstance(item, h5py.Dataset):
                assert item.id.get_type().equal(ours[name].id.get_type())
                assert item.shape == ours[name].shape

        theirs.visititems(compare)
        found: list[str] = []
        ours.visit(found.append)
        assert found == seen


def test_bfloat16_is_stored_as_keras_stores_it(keras: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, dtype=keras.DTypePolicy("bfloat16"))])
    model.save_weights(tmp_path / "a.weights.h5")
    key = "layers/dense/vars/0"
    value = np.arange(4).astype(ml_dtypes.bfloat16)
    with create_hdf5(tmp_path / "b.weights.h5", Layout({}, {key: TensorSpec((2, 2), "bfloat16")})) as output:
        output.write(key, 0, value)
    with h5py.File(tmp_path / "a.weights.h5") as theirs, h5py.File(tmp_path / "b.weights.h5") as ours:
        assert theirs[key].dtype == ours[key].dtype == np.dtype("V2")
        assert theirs[key].id.get_type().equal(ours[key].id.get_type())
        assert theirs[key].attrs["dtype"] == ours[key].attrs["dtype"] == "bfloat16"
        first, second = theirs[key].attrs.get_id("dtype"), ours[key].attrs.get_id("dtype")
        assert first.get_type().equal(second.get_type())


def test_keras_reads_shards_and_so_do_we(keras: Any, tmp_path: Path) -> None:
    from kmerge.store import open_shards

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    model.save_weights(tmp_path / "m.weights.json", max_shard_size=20_000 / 1024**3)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    with open_shards(tmp_path / "m.weights.json") as weights:
        found = [tensor.read() for tensor in weights.tree("layers").tensors.values()]
    assert all((one == other).all() for one, other in zip(found, model.get_weights(), strict=True))


# What is known only at the end ---------------------------------------------------------------------------------------


@every_kind
def test_what_is_known_only_after_the_tensors(kind: str, tmp_path: Path) -> None:
    done: list[bool] = []

    def late() -> dict[str, Any]:
        assert done
        return {"kmerge": "größe" * 100_000}

    path = tmp_path / "out"
    if kind == "hdf5":
        with create_hdf5(path, LAYOUT, closing=late) as output:
            fill(output)
            done.append(True)
        with open_hdf5(path) as weights:
            assert weights.attributes() == {"top": "a", **late()}
    else:
        with create_archive(path, metadata=late, config=CONFIG, layout=LAYOUT, folder=kind == "folder") as output:
            fill(output)
            done.append(True)
        with open_archive(path) as archive:
            assert archive.metadata == late()
        if kind == "zip":
            assert zipfile.ZipFile(path).testzip() is None
    assert all((found == VALUES[key]).all() for key, found in read_all(path).items())


def test_a_failing_last_word_leaves_nothing(tmp_path: Path) -> None:
    def late() -> dict[str, Any]:
        raise RuntimeError

    with pytest.raises(RuntimeError), create_hdf5(tmp_path / "out", LAYOUT, closing=late) as output:
        fill(output)
    assert not os.listdir(tmp_path)
