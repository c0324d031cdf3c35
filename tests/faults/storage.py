"""Faults of storage, on purpose: what time does to files, what a kill or a power cut leaves of a save, and a disk that is full or fails.

Everything is decided by a seed. What is patched is patched in this process, for as long as a `with` lasts: in a rank, or in a fork.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shoestring.conf import files
from shoestring.train.checkpoint.manifest import MANIFEST

# ---------------------------------------------------------------- damage to a checkpoint that is there


def flip_bit(checkpoint: Path, seed: int) -> str:
    """One bit of one of its files, each as likely; the file's name."""
    path = random.Random(seed).choice(sorted(checkpoint.iterdir()))
    flip_bit_of(path, seed)
    return path.name


def flip_bit_of(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(checkpoint: Path, seed: int) -> str:
    rng = random.Random(seed)
    path = rng.choice(sorted(checkpoint.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path.name


def remove_file(checkpoint: Path, seed: int) -> str:
    path = random.Random(seed).choice(sorted(checkpoint.iterdir()))
    path.unlink()
    return path.name


def fill_with_zeros(checkpoint: Path, seed: int) -> str:
    """What a file system that has lost blocks gives back: the right size, and nothing in it from somewhere on."""
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in checkpoint.iterdir() if p.name != MANIFEST))
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size // 2))
    os.truncate(path, size)
    return path.name


def swap_files(checkpoint: Path, seed: int) -> str:
    one, two = random.Random(seed).sample(sorted(checkpoint.glob("*.distcp")), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)
    return f"{one.name} and {two.name}"


DAMAGES: dict[str, Callable[[Path, int], str]] = {
    "a flipped bit": flip_bit,
    "a truncated file": truncate,
    "a missing file": remove_file,
    "lost blocks": fill_with_zeros,
    "files swapped": swap_files,  # wants two ranks'
}


# ---------------------------------------------------------------- every touch of the disk in a save


@dataclass(frozen=True, kw_only=True)
class Touch:
    """`path` is about to be written to, flushed, renamed to `to`, made or removed. The first touch of a `touching` is number 0."""

    number: int
    kind: str  # write, fsync, rename, replace, mkdir, unlink, rmdir
    path: str
    to: str = ""
    data: memoryview | None = None  # of a write


class _Written:
    """A file that is written to, with every write told before."""

    def __init__(self, file, tell: Callable[..., int | None]):
        self._file, self._tell = file, tell

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data) -> int:
        short = self._tell("write", self._file.name, data=data)
        return self._file.write(data if short is None else data[:short])


@contextlib.contextmanager
def touching(act: Callable[[Touch], int | None]) -> Iterator[None]:
    """Call `act` before each touch of the disk by a save in this process. It may raise, or end the process; of a write it may return how
    many bytes are written at most."""
    count, plain = 0, {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")}

    def tell(kind: str, path, to="", data=None) -> int | None:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        touch = Touch(number=count, kind=kind, path=path, to=os.fspath(to), data=data)
        count += 1
        return act(touch)

    def told(kind: str) -> Callable:
        def call(path, *more, **named):
            tell(kind, path, *(more[:1] if kind in ("rename", "replace") else ()))
            return plain[kind](path, *more, **named)

        return call

    def opened(path, mode="r", *more, **named):
        file = open(path, mode, *more, **named)  # noqa: SIM115
        return _Written(file, tell) if mode == "wb" else file

    try:
        for kind in plain:
            setattr(os, kind, told(kind))
        files.open = opened
        yield
    finally:
        for kind, call in plain.items():
            setattr(os, kind, call)
        del files.open


def touches(save: Callable[[], None]) -> list[Touch]:
    """All of a save, which takes place."""
    found: list[Touch] = []
    with touching(found.append):
        save()
    return found


def chosen(found: list[Touch], writes: int = 12, seed: int = 0) -> list[int]:
    """Numbers of all touches but writes, of which there are many alike, and of some of those."""
    some = random.Random(seed).sample([t.number for t in found if t.kind == "write"], writes)
    return sorted([*some, *(t.number for t in found if t.kind != "write")])


def kill_at(number: int, seed: int = 0) -> Callable[[Touch], None]:
    """SIGKILL this process at a touch; at a write, after some of its bytes."""

    def act(touch: Touch) -> None:
        if touch.number == number:
            if touch.kind == "write":
                with open(touch.path, "ab") as file:
                    file.write(touch.data[: random.Random(seed).randrange(len(touch.data) + 1)])
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail_at(number: int, code: int) -> Callable[[Touch], None]:
    """One touch fails with OSError `code`."""

    def act(touch: Touch) -> None:
        if touch.number == number:
            raise OSError(code, os.strerror(code), touch.path)

    return act


def full_after(num_bytes: int) -> Callable[[Touch], int | None]:
    """A disk with room for so many bytes more."""
    left = num_bytes

    def act(touch: Touch) -> int | None:
        nonlocal left
        if touch.kind != "write":
            return None
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), touch.path)
        taken = min(left, len(touch.data))
        left -= taken
        return taken

    return act


_Usage = namedtuple("_Usage", "total used free")


@contextlib.contextmanager
def free_space(num_bytes: int) -> Iterator[None]:
    """What this process is told of any disk."""
    plain = shutil.disk_usage
    shutil.disk_usage = lambda path: _Usage(num_bytes, 0, num_bytes)
    try:
        yield
    finally:
        shutil.disk_usage = plain


@dataclass
class PowerCut:
    """The machine stops at touch `number`: of what was not flushed by then, files keep a part of their bytes, and renames may be undone.

    A file system may do that; most do less.
    """

    number: int
    seed: int
    unflushed: set[str] = field(default_factory=set)  # files
    renames: list[tuple[str, str, bytes | None]] = field(default_factory=list)  # from, to, what stood there

    def __call__(self, touch: Touch) -> None:
        if touch.number == self.number:
            self._cut()
        if touch.kind == "write":
            self.unflushed.add(touch.path)
        elif touch.kind == "fsync":
            self.unflushed.discard(touch.path)
            self.renames = [r for r in self.renames if os.path.dirname(r[1]) != touch.path]
        elif touch.kind in ("rename", "replace"):
            there = Path(touch.to).read_bytes() if os.path.isfile(touch.to) else None
            self.renames.append((touch.path, touch.to, there))
            self.unflushed = {touch.to if p == touch.path else p.replace(touch.path + "/", touch.to + "/") for p in self.unflushed}

    def _cut(self) -> None:
        rng = random.Random(self.seed)
        for path in sorted(self.unflushed):
            if os.path.exists(path):
                os.truncate(path, rng.randrange(os.path.getsize(path) + 1))
        for path, to, there in reversed(self.renames):
            if rng.random() < 0.5 and os.path.exists(to) and not os.path.exists(path):
                os.rename(to, path)
                if there is not None:
                    Path(to).write_bytes(there)
        os.kill(os.getpid(), signal.SIGKILL)


def in_fork(body: Callable[[], None]) -> int:
    """Run in a process of its own; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
