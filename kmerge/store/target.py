"""A file or folder that appears whole or not at all: written beside its place, renamed into it."""

import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kmerge.errors import OutputError
from kmerge.store.limits import human

_FORCE = "choose another name, or overwrite it with --force (force=True in Python)."
_NO_LINKS = {
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
    errno.EINVAL,
}
_WEIGHTS = ("model.weights.h5", "model.weights.json")
_BESIDE = {  # what Keras and KerasHub save in a folder beside the weights
    *("config.json", "metadata.json", "assets", "task.json", "task.weights.h5", "preprocessor.json"),
    *("tokenizer.json", "image_converter.json", "audio_converter.json"),
}
_CHUNK = 16 * 2**20


def check_target(path: Path, overwrite: bool, folder: bool, needed: int) -> None:
    """Refuse a target that could not be written, before anything is.

    Args:
        path: where the result is to appear.
        overwrite: whether what stands there may be replaced.
        folder: whether the result is a folder.
        needed: bytes of the result.

    Raises:
        OutputError: if it cannot be written there.
    """
    with explain(path):
        parent = path.parent.stat()
        if not stat.S_ISDIR(parent.st_mode):
            raise OutputError(f"{path} cannot be written: {path.parent} is no folder.")
        try:
            present = path.lstat()
        except FileNotFoundError:
            present = None
    if present is not None:
        if not overwrite:
            raise OutputError(f"{path} exists already: {_FORCE}")
        if stat.S_ISDIR(present.st_mode) and not folder:
            raise OutputError(
                f"{path} is a folder; the result is a file. Choose another name, or remove the folder first."
            )
        if stat.S_ISDIR(present.st_mode):
            _check_model_folder(path)
        if not (stat.S_ISDIR(present.st_mode) or stat.S_ISREG(present.st_mode) or stat.S_ISLNK(present.st_mode)):
            raise OutputError(f"{path} is neither a file nor a folder, so it is not replaced. Choose another name.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: permission denied in {path.parent}. Choose another place.")
    if hasattr(os, "statvfs"):
        with suppress(OSError):
            disk = os.statvfs(path.parent)
            if disk.f_blocks and disk.f_bavail * disk.f_frsize < needed:
                raise OutputError(
                    f"{path} needs {human(needed)} but the disk has {human(disk.f_bavail * disk.f_frsize)} left. "
                    "Free some space or choose another disk."
                )


def _check_model_folder(path: Path) -> None:
    """Refuse to replace a folder unless it is empty, or holds a saved model and nothing else."""
    with explain(path):
        names = sorted(os.listdir(path))
    if not names:
        return
    stray = [name for name in names if name not in _BESIDE and not name.startswith("model.weights")]
    if stray:
        raise OutputError(
            f"{path} is a folder that holds '{stray[0]}', which is no part of a saved model, so it is not replaced. "
            "Choose another name."
        )
    if "config.json" not in names or not any(mark in names for mark in _WEIGHTS):
        raise OutputError(f"{path} is a folder that holds no saved model, so it is not replaced. Choose another name.")


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Turn what the system says about writing into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {_reason(path, error)}") from None
    except ValueError as error:  # a NUL in the path
        raise OutputError(f"{str(path)!r} is no valid file name: {error}.") from None


def _reason(path: Path, error: OSError) -> str:
    code = error.errno
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}). Free some space or choose another disk."
    if code == errno.EFBIG:
        return (
            "the file grows larger than the disk or a limit of this process allows (see 'ulimit "
            "-f'). Choose another disk."
        )
    if code in (errno.EACCES, errno.EPERM):
        return f"permission denied in {path.parent}. Choose another place."
    if code == errno.EROFS:
        return "the disk is read-only. Choose another place."
    if code == errno.ENOENT:
        return f"the folder {path.parent} does not exist. Create it first."
    if code == errno.ENOTDIR:
        return f"{path.parent} is no folder. Choose another place."
    if code == errno.ENAMETOOLONG:
        return "the name is too long. Choose a shorter one."
    if code == errno.EEXIST:
        return f"it exists by now: {_FORCE}"
    return f"{error.strerror or error}."


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`."""
    stem = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
    return path.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")


@contextmanager
def temporary_file(path: Path, overwrite: bool) -> Iterator[int]:
    """Hand out a descriptor of a new file that becomes `path` when the block ends normally and vanishes otherwise."""
    temporary = temporary_name(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with explain(path):
        fd = os.open(temporary, flags, 0o666)
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        with explain(path):
            _publish(temporary, path, overwrite)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # fails where `path` exists, which a rename would not
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


@contextmanager
def temporary_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Hand out a new folder that becomes `path` when the block ends normally and vanishes otherwise."""
    temporary = temporary_name(path)
    with explain(path):
        os.mkdir(temporary)
    try:
        yield temporary
        with explain(path):
            if not os.path.lexists(path):
                os.rename(temporary, path)
            elif not overwrite:
                raise FileExistsError(errno.EEXIST, "exists", str(path))
            else:
                if path.is_dir() and not path.is_symlink():
                    _check_model_folder(path)  # it may have changed since the start
                _exchange(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of `path`, and remove what stood there.

    On Linux both change names in one step, so that at any moment there is a whole folder at `path`. Where the system or
    the file system cannot do so, the old one is renamed away first: a kill in between leaves it under a hidden name.
    """
    old = temporary
    if not _swap(temporary, path):
        old = temporary_name(path)
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.unlink(old)


def _swap(first: Path, second: Path) -> bool:
    """Let two names change places in one step; False, with nothing done, where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # seldom needed

    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def copy_file(source: Path, target: Path, overwrite: bool) -> None:
    """Copy a finished file to its place, whole or not at all.

    Args:
        source: the file; left as it is.
        target: where the copy is to appear.
        overwrite: whether a file that stands there may be replaced.

    Raises:
        OutputError: if it cannot be written there, or the source cannot be read or changes meanwhile.
    """
    try:
        file = source.open("rb", buffering=0)
    except OSError as error:
        raise OutputError(f"{source} cannot be read: {error.strerror or error}.") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        check_target(target, overwrite, False, size)
        buffer = memoryview(bytearray(_CHUNK))
        with temporary_file(target, overwrite) as fd:
            done = 0
            while True:
                try:
                    count = file.readinto(buffer)
                except OSError as error:
                    raise OutputError(f"{source} cannot be read: {error.strerror or error}.") from None
                if not count:
                    break
                written = 0
                with explain(target):
                    while written < count:
                        written += os.write(fd, buffer[written:count])
                done += count
            if done != size:
                raise OutputError(f"{target} was not written: {source} holds {size:,} bytes but {done:,} were read.")
