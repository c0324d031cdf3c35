"""Faults of data, on purpose: token files that a file system refuses to read, or gives back other than they were written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from unittest import mock

from shoestring.train.data import patience, token_cache


@contextlib.contextmanager
def away(times: float) -> Iterator[None]:
    """So many reads of token files in this process fail. Pauses between tries are short meanwhile."""
    left = times

    def refused(path, *args, **kwargs):
        nonlocal left
        if left and str(path).endswith(".bin"):
            left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, *args, **kwargs)

    with _opened_by(refused), mock.patch.object(patience, "PAUSES_S", (0.05, 0.1, 0.2, 0.4)):
        yield


@contextlib.contextmanager
def garbled() -> Iterator[None]:
    """What is read of token files in this process is no token: all bits of it are set."""

    def other(path, *args, **kwargs):
        file = open(path, *args, **kwargs)  # noqa: SIM115
        if not str(path).endswith(".bin"):
            return file
        with file:
            size = os.fstat(file.fileno()).st_size
        file = os.fdopen(os.memfd_create("garbled"), "w+b", buffering=0)
        file.write(b"\xff" * size)
        return file

    with _opened_by(other):
        yield


def _opened_by(opened) -> contextlib.AbstractContextManager:
    return mock.patch.object(token_cache, "open", opened, create=True)
