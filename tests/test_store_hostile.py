"""No file makes its reader follow a link, allocate what is not there, hang, or raise anything but one clear error."""

import os
import socket
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pytest

from kmerge.errors import FormatError, UnsafeFileError
from kmerge.store import identify, open_archive, open_hdf5, open_shards, read_json

Maker = Callable[[Path], Path]


def outcome(ask: Callable[[Path], object], path: Path) -> str:
    try:
        return str(ask(path))
    except FormatError as error:
        return type(error).__name__


def one_line(error: pytest.ExceptionInfo[FormatError], path: Path) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message, message
    assert len(message) < 500


@pytest.mark.parametrize("make", hostile.HDF5, ids=lambda make: make.__name__)
def test_hdf5_is_refused_when_listed(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as error, open_hdf5(path) as weights:
            weights.tree()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_line(error, path)
    assert peak < 200 << 20
    damaged = hostile.overflowing_shape, hostile.negative_shape, hostile.forged_shape, hostile.dot_as_a_name
    assert isinstance(error.value, UnsafeFileError) or make in damaged, error.value


@pytest.mark.parametrize("make", hostile.HDF5, ids=lambda make: make.__name__)
def test_identify_neither_hangs_nor_follows(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    assert outcome(identify, path) in ("weights", "FormatError", "UnsafeFileError")


def test_links_are_refused_on_the_way_to_a_group(tmp_path: Path) -> None:
    with open_hdf5(hostile.external_group(tmp_path)) as weights:
        for ask in (weights.attributes, weights.names, weights.tree, weights.has):
            with pytest.raises(UnsafeFileError, match="link to another file"):
                ask("layers/dense")


def test_a_chunk_that_unpacks_to_too_much_is_refused_when_read(tmp_path: Path) -> None:
    with open_hdf5(hostile.chunk_bomb(tmp_path)) as weights:
        tensor = weights.tree(hostile.GROUP).tensors["1"]
        with pytest.raises(UnsafeFileError, match="chunk"):
            tensor.read()


def test_a_file_cut_after_opening_is_truncated(tmp_path: Path) -> None:
    path = hostile.weights_file(tmp_path / "cut.h5")
    with open_hdf5(path) as weights:
        tensor = weights.tree(hostile.GROUP).tensors["0"]
        os.truncate(path, 100)
        with pytest.raises(FormatError, match="truncated"):
            tensor.read_into(0, np.empty(12, np.float32))


def test_no_cut_of_a_file_escapes(tmp_path: Path) -> None:
    """Every way of cutting a file gives a clear error, or the same numbers."""
    data = hostile.weights_bytes()
    path = tmp_path / "cut.h5"
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError), open_hdf5(path) as weights:
            weights.tree()


def test_no_flipped_byte_escapes(tmp_path: Path) -> None:
    """A damaged file gives a FormatError or a listing, never another error."""
    data = hostile.weights_bytes()
    path = tmp_path / "flipped.h5"
    random = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for position in random.integers(8, len(data), 3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            with open_hdf5(path) as weights:
                for tensor in weights.tree().tensors.values():
                    tensor.read()
            identify(path)
        except FormatError:
            pass


@pytest.mark.parametrize("make", hostile.ZIPS, ids=lambda make: make.__name__)
def test_zip_is_refused(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(UnsafeFileError) as error:
        open_archive(path)
    one_line(error, path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="encrypted"):
        open_archive(hostile.encrypted_member(tmp_path))


def test_no_flipped_byte_of_a_zip_escapes(tmp_path: Path) -> None:
    path = hostile.model_zip(tmp_path / "m.keras", {"assets/a.txt": b"abc"})
    data = path.read_bytes()
    random = np.random.default_rng(1)
    directory = data.index(b"PK\1\2")
    for round_number in range(400):
        damaged = bytearray(data)
        damaged[random.integers(directory if round_number % 2 else 0, len(data))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            identify(path)
            with open_archive(path) as archive:
                archive.weights.tree()
                for asset in archive.assets.values():
                    asset.read()
        except FormatError:
            pass


@pytest.mark.parametrize("make", hostile.FOLDERS, ids=lambda make: make.__name__)
def test_folders_lead_nowhere_else(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(UnsafeFileError) as error:
        open_archive(path)
    one_line(error, path)


def test_links_within_a_folder_are_fine(tmp_path: Path) -> None:
    model = hostile.model_folder(tmp_path / "model")
    (model / "model.weights.h5").rename(model / "blob")
    (model / "model.weights.h5").symlink_to("blob")
    with open_archive(model) as archive:
        assert hostile.GROUP + "/0" in archive.weights.tree().tensors


@pytest.mark.parametrize("name", hostile.SHARD_NAMES, ids=str)
def test_shards_are_named_without_a_path(name: object, tmp_path: Path) -> None:
    hostile.weights_file(tmp_path / "secret.h5")
    hostile.weights_file(tmp_path / "good.h5")
    (tmp_path / "in").mkdir()
    hostile.weights_file(tmp_path / "in" / "good.h5")
    path = hostile.shard_map(tmp_path / "in" / "x.weights.json", name)
    with pytest.raises(UnsafeFileError, match="without a path") as error:
        open_shards(path)
    one_line(error, path)


def test_a_shard_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x_0.h5").symlink_to(hostile.weights_file(tmp_path / "secret.h5"))
    with pytest.raises(UnsafeFileError, match="symbolic link"):
        open_shards(hostile.shard_map(tmp_path / "in" / "x.weights.json", "x_0.h5"))


def test_too_many_shards_are_refused(tmp_path: Path) -> None:
    path = hostile.shard_map(tmp_path / "x.weights.json", [f"x_{index}.h5" for index in range(1000)])
    with pytest.raises(UnsafeFileError, match="1,000 shards"):
        open_shards(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = hostile.shard_map(tmp_path / "x.weights.json", "x_0.h5")
    with pytest.raises(FormatError, match=r"'x_0\.h5' is missing"):
        open_shards(path)


@pytest.mark.parametrize("name", hostile.JSON)
def test_json_is_limited(name: str) -> None:
    with pytest.raises(UnsafeFileError, match=r"^m\.keras: 'config\.json'"):
        read_json(hostile.JSON[name], "m.keras: 'config.json'")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff{}", b"nul", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 150], ids=repr)
def test_json_that_is_none(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^x\.json"):
        read_json(data, "x.json")


def test_json_is_checked_in_linear_time() -> None:
    data = b'["' + b'\\"' * 4_000_000 + b"\\"
    data += b"[" * 201
    start = time.process_time()
    with pytest.raises(FormatError):
        read_json(data, "x.json")
    assert time.process_time() - start < 60  # a quadratic scan would take days


@pytest.mark.parametrize("name", hostile.STRANGERS)
def test_strangers_within_an_archive_are_named(name: str, tmp_path: Path) -> None:
    data, _ = hostile.STRANGERS[name]
    path = hostile.model_zip(tmp_path / "m.keras")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", data)
    if name in ("data", "no config"):  # HDF5 it is
        return
    with pytest.raises(FormatError, match=r"^m\.keras/model\.weights\.h5 ") as error:
        open_archive(path)
    assert "cannot be opened" not in str(error.value)


@pytest.mark.parametrize("name", hostile.STRANGERS)
def test_strangers_are_named(name: str, tmp_path: Path) -> None:
    data, words = hostile.STRANGERS[name]
    path = tmp_path / "model.keras"
    path.write_bytes(data)
    with pytest.raises(FormatError) as error:
        identify(path)
    one_line(error, path)
    assert words in str(error.value)
    for opener in (open_hdf5, open_archive, open_shards):
        if name in ("data", "no config") and opener is open_hdf5:
            continue
        with pytest.raises(FormatError):
            opener(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        identify(tmp_path / "missing.h5")
    (tmp_path / "link.h5").symlink_to("gone.h5")
    with pytest.raises(FormatError, match=r"symbolic link to 'gone\.h5'"):
        identify(tmp_path / "link.h5")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="named pipe"):
        identify(tmp_path / "pipe")
    with pytest.raises(FormatError, match="character device"):
        identify("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)
        server.bind("socket")
        with pytest.raises(FormatError, match="socket"):
            identify("socket")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="without a model"):
        identify(tmp_path / "empty")
    with pytest.raises(FormatError, match="no valid file name"):
        identify("a\0b")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    for name, words in {
        "saved_model.pb": "SavedModel",
        "checkpoint": "checkpoints",
        "config.json": "without 'model.weights.h5'",
        "best.keras": "for example",
    }.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("x")
        with pytest.raises(FormatError, match=words):
            identify(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = hostile.weights_file(tmp_path / "locked.h5")
    path.chmod(0)
    with pytest.raises(FormatError, match="permission denied"):
        identify(path)
