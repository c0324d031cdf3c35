"""Files that Shoestring writes and reads where others may have been before it: never through a link, a pipe or a device planted there.

The run directory itself, and what is above it, may be a link to a larger disk. What is *in* it is not: a `metrics.jsonl` that is a link
to somebody's `.bashrc` is not appended to, and a second name (hard link) of such a file is not either.
"""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import IO, Any

_NO_TRICKS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would be waited for; of a file the last changes nothing
_MODES = {
    "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "ab+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "rb+": os.O_RDWR,
    "wb": os.O_WRONLY | os.O_CREAT,  # over what is there, which is cut only once it is known to be a file of one name
}
_TRIES = 10  # at making a new file, while others make the same


class UnsafeFile(OSError):
    """A file is not one that may be written or read here: a link, a pipe, a device, or one that has another name as well."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def opened(path: str | Path, mode: str, **options: Any) -> IO:
    """`open(path, mode)` of a regular file of one name, for "a", "ab", "ab+", "rb+" and "wb". Raises UnsafeFile for any other."""
    binary = mode if "b" in mode else f"{mode}b"
    handle = descriptor(path, _MODES[binary])
    if binary == "wb":
        os.ftruncate(handle, 0)
    return open(handle, mode, **options)


def descriptor(path: str | Path, flags: int, permissions: int = 0o666) -> int:
    """`os.open` of a regular file of one name, to be written in place. Raises UnsafeFile for any other."""
    refuse_special(path)
    with _explained(path):
        handle = os.open(path, flags | _NO_TRICKS, permissions)
    try:
        found = os.fstat(handle)
        _refuse(path, found.st_mode)
        if found.st_nlink > 1:
            rule = "has a second name (a hard link), under which it would be changed, too: copy it, and put the copy in its place"
            raise UnsafeFile(errno.EMLINK, rule, str(path))
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle


def fresh(path: str | Path, *, private: bool = False, **options: Any) -> IO[bytes]:
    """A new file, for writing bytes. What had its name goes: of a link the link. `private`: for nobody but this user."""
    for last in range(_TRIES):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_TRICKS, 0o600 if private else 0o666)
        except FileExistsError:
            if last == _TRIES - 1:
                raise
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            os.set_blocking(handle, True)
            return open(handle, "wb", **options)
    raise AssertionError


def replace(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a file whole or not at all, through to the disk. What had its name goes, and nothing that a link of that name led to."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    with fresh(temporary) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def reading(path: str | Path, **options: Any) -> IO[bytes]:
    """A regular file, for reading bytes. Raises UnsafeFile for a link, a pipe or a device."""
    refuse_special(path)
    with _explained(path):
        handle = os.open(path, os.O_RDONLY | _NO_TRICKS)
    try:
        _refuse(path, os.fstat(handle).st_mode)
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return open(handle, "rb", **options)


def read(path: str | Path, limit: int = -1) -> bytes:
    """Of such a file, `limit` bytes at most."""
    with reading(path) as file:
        return file.read(limit)


def folder(root: Path, *parts: str) -> Path:
    """A folder in `root`, made where it is not there. `root` and what is above it may be links; `parts` may not: UnsafeFile."""
    root.mkdir(parents=True, exist_ok=True)
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            rule = "is a symbolic link, and nothing is written through one: let the run directory itself be the link, or set run_dir"
            raise UnsafeFile(errno.ELOOP, rule, str(path))
        path.mkdir(exist_ok=True)
    return path


def remove_tree(path: Path) -> None:
    """A folder with all that is in it; of a link the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def refuse_special(path: str | Path, *, follow: bool = False) -> None:
    """Raises UnsafeFile where there is something at `path` that is no regular file. `follow`: a link to one is one."""
    with contextlib.suppress(FileNotFoundError):
        _refuse(path, (os.stat if follow else os.lstat)(path).st_mode)


def _refuse(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise UnsafeFile(errno.ELOOP if kind == "symbolic link" else errno.EINVAL, f"is a {kind}, where a file should be", str(path))


@contextlib.contextmanager
def _explained(path: str | Path):
    """A link or a pipe that came between the look and the open."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UnsafeFile(error.errno, "is a link or a pipe, where a file should be", str(path)) from None
        raise
