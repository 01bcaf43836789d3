"""A file or folder that appears whole or not at all: written beside its place, renamed into it."""

import errno
import os
import secrets
import shutil
import stat
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
_FOLDER_MARKS = ("config.json", "metadata.json", "model.weights.h5", "model.weights.json")


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
        if stat.S_ISDIR(present.st_mode) and not _is_model_folder(path):
            raise OutputError(
                f"{path} is a folder that holds no saved model, so it is not replaced. Choose another name."
            )
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


def _is_model_folder(path: Path) -> bool:
    names = set(os.listdir(path))
    return not names or any(mark in names for mark in _FOLDER_MARKS)


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
                _exchange(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(temporary: Path, path: Path) -> None:
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
