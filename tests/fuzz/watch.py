"""What a case may not do: run a program, open the network, write outside its folder, take more memory or time than it is given."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

MEMORY = 1 << 30  # bytes beside what the process has already
SECONDS = 20.0

_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
_CONNECTS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
_folder: Path | None = None  # of the case that is running
_installed = False


class Escaped(BaseException):
    """A case did what no input may make us do."""


class Slow(BaseException):
    """A case took too long."""


def _audit(event: str, given: tuple) -> None:
    if _folder is None:
        return
    if event in _RUNS or event in _CONNECTS:
        raise Escaped(f"{event} {str(given)[:200]}")
    if event == "pickle.find_class" and not str(given[0]).startswith("torch"):
        raise Escaped(f"unpickles {given[0]}.{given[1]}")
    if event == "open" and isinstance(given[0], (str, bytes)) and _writes(given):
        path = os.path.abspath(os.fsdecode(given[0]))
        if not path.startswith((f"{_folder}/", "/dev/null", "/proc/self/")) and not path.endswith(".pyc"):
            raise Escaped(f"writes {path}")
    if event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate"):
        path = os.path.abspath(os.fsdecode(given[0])) if isinstance(given[0], (str, bytes)) else str(_folder)
        if not f"{path}/".startswith(f"{_folder}/") and "__pycache__" not in path:
            raise Escaped(f"{event} {path}")


def _writes(given: tuple) -> bool:
    mode, flags = given[1], given[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def limit_memory() -> None:
    """Of this process, for good."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """One case, on the main thread. Raises Escaped and Slow."""
    global _folder, _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True

    def late(*_):
        raise Slow(f"{SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _folder = folder.resolve()
    try:
        yield
    finally:
        _folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
