"""Bytes on their way to the disk and back: hashed as they are written, flushed, and read again from the disk itself."""

import hashlib
import io
import os
from pathlib import Path

from ...conf import files


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    sha = hashlib.sha256()
    with files.reading(path) as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


class HashedFile(io.RawIOBase):
    """A new file, for writing from its first byte to its last, that hashes what it is given on its way to the system.

    Its first error is kept, raised by `flush`, and ends the writing: torch's archive writer, which calls `write`, makes something else
    of what that raises.
    """

    def __init__(self, path: Path):
        self._file, self._sha, self._error = files.fresh(path, buffering=0), hashlib.sha256(), None
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self._sha.update(data)
        at = 0
        while at < len(data) and self._error is None:
            try:
                at += self._file.write(data[at:])
            except OSError as error:
                self._error = error
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        if self._error:
            raise self._error

    def fileno(self) -> int:
        self.flush()  # who asks is going to flush it to the disk, and DCP does not call the other first
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def write_durably(path: Path, text: str) -> None:
    with HashedFile(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """The folder's entries (names, renames) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_cache(path: Path) -> None:
    """Let a file, which was flushed, be read from the disk the next time, as far as the system does as it is asked."""
    if hasattr(os, "posix_fadvise"):
        with files.reading(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
