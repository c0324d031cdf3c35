"""What a run cost, and what for: every second that its devices were held, in one place, and every token once.

Made of what is on disk, so that no kill can make it wrong: records kept (metrics.jsonl) and lost (metrics_lost.jsonl), and

    sessions.jsonl    a line for each begin of a session, with what a second of it costs; another for each that ended of itself

What passes between a session's last sign of life and the next one's begin is the job's while both are one job's: it waited to go on.
How long that was is told by the machine's monotonic clock, which all sessions since it was booted share. Between machines, and over a boot,
there is the wall clock alone: if that is set meanwhile, a wait is booked as so much longer or shorter.
"""

import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from . import metrics
from .metrics import StepRecord

NAME = "sessions.jsonl"
FILES = ("metrics.jsonl", metrics.LOST)  # of records kept, and lost
# Where seconds go: to steps that were kept, and to those that a restart did again; to evaluation; to the loop that stood still for a save;
# to a session's begin, up to its first step; to waiting for a restart; and what is left.
PARTS = ("steps", "lost steps", "evaluation", "checkpoints", "starts", "restarts", "other")


@dataclass(frozen=True, kw_only=True)
class Began:
    """`seconds`: that the run had been held for when the session began, with the wait before it. `dollars`: of a second.

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


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Of itself: `seconds`, `dollars`, `gpu_hours` as in records; `standing`: of the last seconds, for saves that no record has told of."""

    session: int
    seconds: float
    standing: float
    time_unix: float
    dollars: float = 0.0
    gpu_hours: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """`seconds`, `dollars`: by `PARTS`."""

    tokens: int  # trained, each once
    lost_tokens: int  # trained, and done again
    seconds: dict[str, float]
    dollars: dict[str, float]
    gpu_hours: float

    @property
    def total_dollars(self) -> float:
        return sum(self.dollars.values())


def note(run_dir: Path, event: Began | Ended) -> None:
    """Append, through to the disk; a torn line before it stays one of its own."""
    with open(run_dir / NAME, "ab+") as file:
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(asdict(event)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def events(run_dir: Path) -> tuple[list[Began], dict[int, Ended]]:
    """Sessions in the order in which they began, and the ends of those that ended of themselves. A torn line is passed over."""
    began, ended = [], {}
    for line in (run_dir / NAME).read_text(encoding="utf-8", errors="replace").splitlines() if (run_dir / NAME).exists() else ():
        try:
            fields = json.loads(line)
            if "standing" in fields:
                ended[fields["session"]] = Ended(**fields)
            else:
                began.append(Began(**fields))
        except (ValueError, TypeError):
            continue
    return began, ended


def waited(run_dir: Path, job: str, monotonic: float, boot: str) -> float:
    """Seconds from the last sign of life of a session of the same job until that moment of this machine's monotonic clock, since this boot;
    0 after another job's, and where another machine's clock is ahead."""
    began, ended = events(run_dir)
    if not began or began[-1].job != job:
        return 0.0
    last = began[-1]
    signs = [last, *(end for end in [ended.get(last.session)] if end)]
    signs += [r for name in FILES for r in _records(run_dir / name) if r.session == last.session]
    if boot and boot == last.boot:
        return max(0.0, monotonic - last.monotonic - (max(sign.seconds for sign in signs) - last.seconds))
    now = time.time() - (time.monotonic() - monotonic)
    return max(0.0, now - max(sign.time_unix for sign in signs))


def this_boot() -> str:
    """Of this machine; "" where the system has no name for it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def account(run_dir: Path) -> Ledger:
    """Of a run directory, as it is now."""
    kept, lost = (_records(run_dir / name) for name in FILES)
    of_session: dict[int, list[tuple[StepRecord, bool]]] = defaultdict(list)
    for record, stays in [*((r, True) for r in kept), *((r, False) for r in lost)]:
        of_session[record.session].append((record, stays))
    began, ended = events(run_dir)
    seconds, dollars, gpu_seconds = (defaultdict(float, dict.fromkeys(PARTS, 0.0)) for _ in range(3))
    before = 0.0  # held when the last session's last sign came
    for session in began:
        parts = {"restarts": session.seconds - before}
        mine = sorted(of_session[session.session], key=lambda found: found[0].seconds)
        end = ended.get(session.session)
        parts["steps"] = sum(r.step_seconds for r, stays in mine if stays)
        parts["lost steps"] = sum(r.step_seconds for r, stays in mine if not stays)
        parts["evaluation"] = sum(r.eval_seconds or 0.0 for r, _ in mine)
        parts["checkpoints"] = sum(r.checkpoint_seconds or 0.0 for r, _ in mine) + (end.standing if end else 0.0)
        if mine:
            first = mine[0][0]
            parts["starts"] = (
                first.seconds - session.seconds - first.step_seconds - (first.eval_seconds or 0.0) - (first.checkpoint_seconds or 0.0)
            )
        before = end.seconds if end else mine[-1][0].seconds if mine else session.seconds
        parts["other"] = before - session.seconds - sum(value for name, value in parts.items() if name != "restarts")
        for name, value in parts.items():
            seconds[name] += value
            dollars[name] += value * session.dollars
            gpu_seconds[name] += value * session.devices
    return Ledger(
        tokens=kept[-1].tokens if kept else 0, lost_tokens=sum(r.batch_tokens or 0 for r in lost), seconds=dict(seconds),
        dollars=dict(dollars), gpu_hours=sum(gpu_seconds.values()) / 3600,
    )  # fmt: skip


def _records(path: Path) -> list[StepRecord]:
    return list(metrics.scan_records(path, lambda *bad: None)) if path.exists() else []
