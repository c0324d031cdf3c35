"""When a run's sessions began and ended, and what a second of each costs: a file that no kill can make wrong.

    sessions.jsonl    a line for each begin of a session, with what a second of it costs; another for each that ended of itself

What passes between a session's last sign of life and the next one's begin is the job's while both are one job's: it waited to go on.
How long that was is told by the machine's monotonic clock, which all sessions since it was booted share. Between machines, and over a boot,
there is the wall clock alone: if that is set meanwhile, a wait is booked as so much longer or shorter.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..conf import files
from ..conf.outside import parse_json
from . import metrics

NAME = "sessions.jsonl"
FILES = ("metrics.jsonl", metrics.LOST)  # of records kept, and lost


@dataclass(frozen=True, kw_only=True)
class Began:
    """`seconds`: that the run had been held for when the session began, with the wait before it. `dollars`: of a second.

    `layout`: such as `metrics.layout_name` gives, of the phase that it began in ("": not known).
    `boot`, `monotonic`: which boot of which machine ("": not known), and its monotonic clock when the session began.
    """

    session: int
    job: str
    time_unix: float
    boot: str = ""
    monotonic: float = 0.0
    seconds: float
    devices: int
    dollars: float
    layout: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Of itself: `seconds`, `dollars`, `gpu_hours` as in records; `standing`: of the last seconds, for saves that no record has told of."""

    session: int
    seconds: float
    standing: float
    time_unix: float
    dollars: float = 0.0
    gpu_hours: float = 0.0


def note(run_dir: Path, event: Began | Ended) -> None:
    """Append, through to the disk; a torn line before it stays one of its own."""
    with files.opened(run_dir / NAME, "ab+") as file:
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(asdict(event)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def parse(line: str) -> Began | Ended | None:
    """Of a line of the file; None where it is torn, or no such line."""
    try:
        fields = parse_json(line)
        return metrics.from_plain(Ended if "standing" in fields else Began, fields)
    except metrics.BAD_LINE:
        return None


def events(run_dir: Path) -> tuple[list[Began], dict[int, Ended]]:
    """Sessions in the order in which they began, and the ends of those that ended of themselves. A torn line is passed over."""
    path = run_dir / NAME
    found = [parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()] if path.is_file() else []
    return [e for e in found if isinstance(e, Began)], {e.session: e for e in found if isinstance(e, Ended)}


def waited(run_dir: Path, job: str, monotonic: float, boot: str) -> float:
    """Seconds from the last sign of life of a session of the same job until that moment of this machine's monotonic clock, since this boot;
    0 after another job's, and where another machine's clock is ahead."""
    began, ended = events(run_dir)
    if not began or began[-1].job != job:
        return 0.0
    last, end = began[-1], ended.get(began[-1].session)
    held, seen = max(last.seconds, end.seconds if end else 0.0), max(last.time_unix, end.time_unix if end else 0.0)
    for record in records(run_dir / FILES[0], run_dir / FILES[1]):
        if record.session == last.session:
            held, seen = max(held, record.seconds), max(seen, record.time_unix)
    if boot and boot == last.boot:
        return max(0.0, monotonic - last.monotonic - (held - last.seconds))
    now = time.time() - (time.monotonic() - monotonic)
    return max(0.0, now - seen)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What accounts need of a `StepRecord`: it is read in a fifth of the time."""

    step: int
    tokens: int
    phase: str = "main"
    batch_tokens: int | None = None
    step_seconds: float
    seconds: float
    dollars: float
    gpu_hours: float | None = None
    eval_seconds: float | None = None
    checkpoint_seconds: float | None = None
    data_seconds: float | None = None
    breakdown: dict[str, float] | None = None
    time_unix: float
    session: int = 0


def records(*paths: Path) -> Iterator[Told]:
    """Of those files that are there, one after the other; lines that are none are passed over."""
    for path in paths:
        if path.is_file():
            yield from metrics.scan_records(path, lambda *bad: None, Told)


def this_boot() -> str:
    """Of this machine; "" where the system has no name for it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
