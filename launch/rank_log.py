"""What ranks without the console write: a file each, of bounded size.

    logs/TRY/rank_3.stdout, .stderr      of ranks that our launcher starts (a folder for each try)
    logs/SESSION/rank_3.log              of ranks that torchrun or a batch system starts (all tries of a session, one after another)

Standard output and error *are* the file: what a C++ library writes is in it, a write never waits for anybody, and the last words of a
rank that is killed are where they belong. (A pipe and a thread that reads it would hold a rank up once the thread does not run, and lose
what is in the pipe.) Once a second a thread looks at the size, folds lines that repeat, and takes out the middle of a file above its cap.
So a file may be larger for a second, or for as long as a library that writes keeps Python from running.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..conf import files
from . import environment, exit_codes, lease
from .environment import Place

CAP = 10_000_000  # bytes of a file
BATCH = 1_000_000  # bytes that are folded at once, when there are so many new ones
_LOOK_S = 1.0
_LONGEST = 4  # lines that repeat together: a warning has two
_ROUNDS = 100  # of copying what is written meanwhile

Tell = Callable[[str, int], None]


def take_over(*streams: tuple[Path, Any, int]) -> None:
    """From now on this process's streams write to files: each (path, Python's stream, descriptor). Two streams may have one path."""
    bounded = {}
    for path, stream, number in streams:
        stream.flush()
        with files.opened(path, "ab") as file:
            for target in {number, _descriptor(stream, number)}:
                os.dup2(file.fileno(), target)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # else the last words of a killed rank are still in its memory
        bounded[path] = bounded.get(path) or Bounded(path)
    threading.Thread(target=_tend, args=(list(bounded.values()),), name="rank log", daemon=True).start()


def _descriptor(stream: Any, otherwise: int) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return otherwise


def _tend(bounded: list["Bounded"]) -> None:
    while True:
        time.sleep(_LOOK_S)
        for file in bounded:
            with contextlib.suppress(OSError):
                file.tend()


# ---------------------------------------------------------------- ranks that somebody else has started


@contextlib.contextmanager
def heard(run_dir: Path, place: Place) -> Iterator[Tell | None]:
    """Within it a rank other than 0 writes to its file. `tell(message, exit code)` is one line on the console; of each node that is the
    first rank that lost a peer, and the first with any other error: thousands that lose one say so in their files. None on rank 0.

    Where the file cannot be written, the rank keeps the console, and the first of its node says why."""
    if place.rank == 0:
        yield None
        return
    folder, console = run_dir / "logs" / _session(), os.dup(2)
    path = folder / f"rank_{place.rank}.log"

    def tell(message: str, code: int) -> None:
        if _first_of_node(folder, "lost" if code == exit_codes.LOST else "error"):
            os.write(console, f"error: {message} (this rank's log: {path})\n".encode())

    try:
        files.folder(run_dir, "logs", folder.name)
        take_over((path, sys.stdout, 1), (path, sys.stderr, 2))
        print(f"---- rank {place.rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')} {environment.restart()}", flush=True)
    except OSError as error:
        if place.local_rank == 0:
            print(f"{folder} cannot be written ({error.strerror}): these ranks write to the console", file=sys.stderr, flush=True)
    try:
        yield tell
    except Exception as error:
        tell(f"rank {place.rank}: {exit_codes.sentence(error)}", exit_codes.of(error))
        raise


def _session() -> str:
    """A folder's name for all ranks of the job where it has a name, else for those of one machine: by who has started them."""
    if name := environment.session():
        return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"
    return f"torchrun-{os.getppid()}-{lease.born(os.getppid()) or 0}"


def _first_of_node(folder: Path, kind: str) -> bool:
    try:
        (folder / f".{socket.gethostname()}-{os.getppid()}-{environment.restart()}-{kind}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # a line too many is better than none
    return True


# ---------------------------------------------------------------- a file's size


class Bounded:
    """A file that others append to. Its owner calls `tend` from time to time; afterwards it has `cap` bytes at most, of which those up to
    the last `batch` are folded. What is written during the instant in which it is made shorter may be lost, nothing else."""

    def __init__(self, path: Path, *, cap: int = CAP, batch: int = BATCH):
        self._file = files.opened(path, "rb+", buffering=0)  # open as long as the process lives
        self._cap, self._batch, self._left_out = cap, batch, 0
        self._folded = self._head = 0  # bytes; of the head, once there is one

    def tend(self) -> None:
        size = self._size()
        self._folded = min(self._folded, size)  # somebody else may have cut it
        if size - self._folded >= self._batch:
            self._fold(size)
        if (size := self._size()) > self._cap:
            self._cut(size)

    def _fold(self, size: int) -> None:
        """What is new; of much more than is folded at once, the begin and the end."""
        start, new = self._folded, size - self._folded
        if new <= 2 * self._batch:
            parts = [self._read(start, new)]
        else:
            ends = self._read(start, self._batch), self._read(size - self._batch, self._batch)
            parts = [ends[0], b"\n[%d bytes left out]\n" % (new - 2 * self._batch), ends[1]]
        lines = [line for part in parts for line in fold(part.splitlines(keepends=True))]
        self._folded = self._replace(start, b"".join(lines), size)

    def _cut(self, size: int) -> None:
        """The middle goes: the first half of what there may be stays for good, and of the rest the last quarter."""
        if not self._head:
            begin = self._read(0, self._cap // 2)
            self._head = begin.rfind(b"\n") + 1 or len(begin)
        end = self._read(size - self._cap // 4, self._cap // 4)
        end = end[end.find(b"\n") + 1 :]
        self._left_out += size - self._head - len(end)
        self._folded = self._replace(self._head, b"[%d bytes left out]\n" % self._left_out + end, size)

    def _replace(self, start: int, text: bytes, size: int) -> int:
        """`text` in place of what is from `start` to `size`, shorter than that; what is written meanwhile follows it. Where `text` ends.

        The end of the file is its newest part at every moment, should this process be killed."""
        end = start + len(text)
        if end >= size:
            return size
        os.pwrite(self._file.fileno(), text, start)
        at = end
        for _ in range(_ROUNDS):
            if (now := self._size()) <= size:
                break
            at += os.pwrite(self._file.fileno(), self._read(size, now - size), at)
            size = now
        os.ftruncate(self._file.fileno(), at)
        return end

    def _read(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def fold(lines: list[bytes]) -> list[bytes]:
    """Where up to four lines come several times in a row, they are left once, and how often they came again."""
    kept, at = [], 0
    while at < len(lines):
        period = max(range(1, _LONGEST + 1), key=lambda p: (_repeats(lines, at, p), -p))
        times, block = _repeats(lines, at, period), lines[at : at + period]
        note = b"[repeated %d times]\n" % times if period == 1 else b"[the last %d lines repeated %d times]\n" % (period, times)
        if len(note) < times * sum(map(len, block)):
            kept += [*block, note]
            at += period * (times + 1)
        else:
            kept.append(lines[at])
            at += 1
    return kept


def _repeats(lines: list[bytes], at: int, period: int) -> int:
    """How often the lines that begin there come again right after."""
    count = 0
    while lines[at + (count + 1) * period : at + (count + 2) * period] == lines[at : at + period]:
        count += 1
    return count
