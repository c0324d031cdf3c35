"""One job in a run directory at a time: who has it, and what becomes of a job that is gone.

    lease.json    host, boot and pid of the owner, when its process began, its session, and a count that it raises every two seconds

On one machine a lock of the kernel's says whether the owner lives: it belongs to the owner and to the ranks that it has forked, and is gone
with the last of them. From another machine the count says so: who asks watches it for a while, on a clock of its own.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..conf import files
from ..conf.errors import ConfigError
from ..conf.outside import parse_json
from ..train.metrics import BAD_LINE, from_plain

FILE = "lease.json"
REFRESH_S = 2.0
STALE_S = 60.0  # without a refresh, seen from another machine
_SIZE = 1024  # bytes of the file: it is written over in place, in one piece


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that has a run directory. `born`: when it began, in the kernel's ticks, as process ids come again."""

    host: str
    boot: str
    pid: int
    born: int
    session: str = ""
    count: int = 0

    @classmethod
    def myself(cls, session: str) -> "Owner":
        boot = Path("/proc/sys/kernel/random/boot_id")
        return cls(
            host=os.uname().nodename,
            boot=boot.read_text().strip() if boot.exists() else "",
            pid=os.getpid(),
            born=born(os.getpid()) or 0,
            session=session,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (session {self.session})" if self.session else "")


@contextlib.contextmanager
def held(
    run_dir: Path, *, session: str = "", log: Callable[[str], None] = print, refresh_s: float = REFRESH_S, stale_s: float = STALE_S
) -> Iterator[None]:
    """Have the run directory meanwhile. Raises ConfigError at once where another job has it.

    `session`: a name that the parts and restarts of one job share; "": it has none.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = files.descriptor(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        me = Owner.myself(session)
        _claim(file, run_dir, me, log, stale_s)
        _write(file, me)
        over = threading.Event()
        thread = threading.Thread(target=_refresh, args=(file, me, over, refresh_s), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)  # and with it the lock, unless a rank is still there


def owner(run_dir: Path, *, stale_s: float = STALE_S) -> Owner | None:
    """Who has the run directory, without asking for it: None where nobody has, or its process is gone. Of one on another machine, whether
    it has renewed its lease in the last `stale_s`, as far as both clocks agree."""
    found, me = _read(run_dir), Owner.myself("")
    if found is None:
        return None
    if (found.host, found.boot) == (me.host, me.boot):
        return found if found.born and born(found.pid) == found.born else None
    with contextlib.suppress(OSError):
        return found if time.time() - (run_dir / FILE).stat().st_mtime < stale_s else None
    return None


def _claim(file: int, run_dir: Path, me: Owner, log: Callable[[str], None], stale_s: float) -> None:
    locks = _lock(file, run_dir, me, log, stale_s)
    owner = _read(run_dir)
    if owner is None:
        return
    if (owner.host, owner.boot) == (me.host, me.boot):
        if not locks and born(owner.pid) == owner.born:
            raise _refusal(run_dir, owner, me)
    elif not (owner.session and owner.session == me.session):
        _watch(run_dir, owner, me, log, stale_s)
    log(f"{run_dir} was left by {owner}, which is gone: taken over")


def _lock(file: int, run_dir: Path, me: Owner, log: Callable[[str], None], patience_s: float) -> bool:
    """Whether there are locks at all on this file system. An owner whose ranks are about to end is waited for."""
    until, told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(run_dir)
            ends = owner and (owner.host, owner.boot) == (me.host, me.boot) and born(owner.pid) != owner.born
            if not ends or time.monotonic() > until:
                raise _refusal(run_dir, owner, me) from None
            if not told:
                log(f"{run_dir} was left by {owner}, whose ranks are ending: waiting up to {patience_s:g} s for them")
            told = True
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True


def _watch(run_dir: Path, owner: Owner, me: Owner, log: Callable[[str], None], patience_s: float) -> None:
    """Raises ConfigError as soon as the owner, on another machine, is seen to live."""
    log(f"{run_dir} belongs to {owner}: waiting up to {patience_s:g} s for a sign of life")
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        time.sleep(min(0.5, patience_s / 10))
        now = _read(run_dir)
        if now is None:  # it has ended as it should
            return
        if now != owner:
            raise _refusal(run_dir, now, me)


def _refusal(run_dir: Path, owner: Owner | None, me: Owner) -> ConfigError:
    who = str(owner) if owner else "a process that has not said its name yet"
    end = f"kill {owner.pid}" + (f" on {owner.host}" if owner.host != me.host else "") if owner else "see `fuser`"
    rule = (
        f"another job trains there: {who}. Choose another `name` or `run_dir`, or end that job ({end}: it saves first); "
        "once its processes are gone, the next start takes over by itself"
    )
    return ConfigError("run_dir", str(run_dir), rule)


def born(pid: int) -> int | None:
    """When a process began, in ticks since the kernel did; None where there is none (or no /proc)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _refresh(file: int, me: Owner, over: threading.Event, refresh_s: float) -> None:
    count = 0
    while not over.wait(refresh_s):
        count += 1
        with contextlib.suppress(OSError):  # a disk that is full or away for a while: the lock holds
            _write(file, Owner(**{**asdict(me), "count": count}))


def _write(file: int, owner: Owner) -> None:
    os.pwrite(file, json.dumps(asdict(owner)).encode().ljust(_SIZE - 1) + b"\n", 0)


def _read(run_dir: Path) -> Owner | None:
    """None where nobody has it. (Opened each time: what a network's file system has cached is asked for again then.)"""
    try:
        return from_plain(Owner, parse_json(files.read(run_dir / FILE, _SIZE)))
    except (OSError, *BAD_LINE):
        return None
