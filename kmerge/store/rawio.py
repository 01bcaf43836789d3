"""Files as bytes: opened safely, read and written at absolute positions, without a shared file pointer."""

import errno
import io
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from kmerge.errors import FormatError

_seek_lock = threading.Lock()  # only where the system has no positional reads


class Descriptor:
    """An open file descriptor that is closed once and never used afterwards.

    Attributes:
        path: what messages call the file.
        size: bytes when it was opened.
    """

    __slots__ = ("_fd", "path", "size")

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self.path = path
        self.size = os.fstat(fd).st_size

    @property
    def fd(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path.name} is closed: read its tensors before closing it.")
        return self._fd

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on; the number of bytes found, fewer only at the end of the file."""
        return read_at(self.fd, offset, view)

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; never more than the file holds."""
        data = bytearray(max(0, min(count, self.size - offset)) if offset >= 0 else 0)
        return bytes(data[: self.read_into(offset, memoryview(data))])

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "Descriptor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Part:
    """A range of an open file that is looked at as if it were a file of its own.

    Args:
        file: open file, not owned.
        start: first byte.
        size: how many bytes.
    """

    __slots__ = ("_file", "_start", "size")

    def __init__(self, file: Descriptor, start: int, size: int) -> None:
        self._file, self._start, self.size = file, start, size

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; never more than the part holds."""
        return self._file.read(self._start + offset, max(0, min(count, self.size - offset)))


def read_at(fd: int, offset: int, view: memoryview) -> int:
    """Fill `view` from `offset` on and return how many bytes there were."""
    done, wanted = 0, len(view)
    while done < wanted:
        if hasattr(os, "preadv"):
            count = os.preadv(fd, [view[done:] if done else view], offset + done)
        else:
            with _seek_lock:
                os.lseek(fd, offset + done, os.SEEK_SET)
                piece = os.read(fd, wanted - done)
            count = len(piece)
            view[done : done + count] = piece
        if not count:
            break
        done += count
    return done


def write_at(fd: int, offset: int, view: memoryview) -> None:
    """Write all of `view` at `offset`."""
    done, wanted = 0, len(view)
    while done < wanted:
        piece = view[done:] if done else view
        if hasattr(os, "pwrite"):
            done += os.pwrite(fd, piece, offset + done)
        else:
            with _seek_lock:
                os.lseek(fd, offset + done, os.SEEK_SET)
                done += os.write(fd, piece)


def open_regular(path: Path) -> Descriptor:
    """Open a regular file for reading; anything else, say a pipe or a device, is never opened.

    Args:
        path: the file.

    Returns:
        The open file.

    Raises:
        FormatError: if there is no such file, it may not be read, or it is no regular file.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FormatError(f"{path.name} is a folder; a file was expected.")
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path.name} is a {special(mode)}, not a file: save the model as a regular file first.")
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags)
    except OSError as error:
        raise FormatError(why_unreadable(path, error)) from None
    except ValueError as error:  # a NUL in the path
        raise FormatError(f"{path.name!r} is no valid file name: {error}.") from None
    file = Descriptor(fd, path)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise FormatError(f"{path.name} is no regular file any more: it was replaced while being opened.")
    return file


def why_unreadable(path: Path, error: OSError) -> str:
    """Turn the error of an attempt to open `path` into one line."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():
            return f"{path} is a symbolic link to {os.readlink(path)!r}, which does not exist."
        return f"{path} does not exist: check the path."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} may not be read (permission denied): check its permissions."
    return f"{path} cannot be opened: {error.strerror or error}."


def special(mode: int) -> str:
    """Name what is neither file nor folder."""
    for test, name in (
        (stat.S_ISFIFO, "named pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "character device"),
        (stat.S_ISBLK, "block device"),
    ):
        if test(mode):
            return name
    return "special file"


class Window:
    """A part of an open file that looks like a file of its own: what h5py's file-like driver needs.

    HDF5 calls it from C, where an exception would get lost or turn into another one. So none is raised while HDF5 is at
    work: it is kept, the rest of the work goes nowhere, and whoever asked HDF5 for something asks `check` afterwards.

    Args:
        fd: descriptor, not owned.
        start: first byte of the window within the file.
        size: bytes of the window; grows when `writable`.
        writable: whether it may be written, growing the file.
    """

    def __init__(self, fd: int, start: int, size: int, writable: bool = False) -> None:
        self._fd, self._start, self._size, self._writable, self._position = fd, start, size, writable, 0
        self._error: BaseException | None = None
        self._released = False

    def check(self) -> None:
        """Raise what went wrong since the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def release(self) -> None:
        """Touch the descriptor no more: HDF5 may flush what it failed to close when the number is another file's."""
        self._released = True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        try:
            wanted = 0 if self._released else max(0, min(len(view), self._size - self._position))
            if wanted:
                done = read_at(self._fd, self._start + self._position, view[:wanted])
                if done < wanted:
                    raise OSError(errno.EIO, "the file became shorter while being read")
        except BaseException as error:  # also Ctrl-C: see above
            self._error = self._error or error
        if done < len(view):
            view[done:] = bytes(len(view) - done)
        self._position += len(view)
        return len(view)

    def read(self, count: int = -1) -> bytes:
        data = bytearray(self._size - self._position if count < 0 else count)
        self.readinto(data)
        return bytes(data)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if not self._writable:
                raise io.UnsupportedOperation("not writable")
            if not self._released:
                write_at(self._fd, self._start + self._position, view)
        except BaseException as error:
            self._error = self._error or error
            self._released = True
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            if self._writable and size != self._size and not self._released:
                os.ftruncate(self._fd, self._start + size)
        except BaseException as error:
            self._error = self._error or error
            self._released = True
        self._size = size
        return size

    def flush(self) -> None:
        pass
