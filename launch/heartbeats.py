"""Signs of life: where in its step each rank is, in a small file that its launcher looks at.

    heartbeats/rank_3    one record, written over in place: process id, number of beats, step, phase

A beat is one short write that waits for no disk. Who reads goes by *change*, on its own monotonic clock: no clock of another process is
compared with, and a wall clock may jump.
"""

import contextlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..conf import files

FOLDER = "heartbeats"
_RECORD = struct.Struct("<qqq32s")
_ORDER = ("start", "data", "replay", "forward and backward", "reduce", "update", "evaluation", "checkpoint", "end")
_UNWATCHED = ("start", "end")  # data are made ready, a report is written: as long as it takes
_SAVING_S = 1800.0  # a checkpoint may take longer than a step: as long as torch waits for a rank in it


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's last one. `step`: the one that it is in, 1 is the run's first; 0 before any."""

    rank: int
    pid: int
    count: int
    step: int
    phase: str

    @property
    def place(self) -> tuple[int, int]:
        """By which the beats of ranks that do the same can be put in order."""
        return self.step, _ORDER.index(self.phase) if self.phase in _ORDER else 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


class Heartbeat:
    """One rank's file. Calling it is a beat: the phase that begins ("": the same goes on), and its step (None: the same)."""

    def __init__(self, run_dir: Path, rank: int):
        path = _path(run_dir, rank)
        files.folder(run_dir, FOLDER)
        self._file, self._count, self._step = files.descriptor(path, os.O_WRONLY | os.O_CREAT, 0o644), 0, 0
        self._phase = ""
        self("start")

    def __call__(self, phase: str, step: int | None = None) -> None:
        self._count += 1
        self._step = self._step if step is None else step
        self._phase = phase or self._phase
        with contextlib.suppress(OSError):  # a rank that cannot say that it lives, lives
            os.pwrite(self._file, _RECORD.pack(os.getpid(), self._count, self._step, self._phase.encode()[:32]), 0)


class Watcher:
    """Of the ranks of one world: `look` from time to time, and it knows who has been silent for how long."""

    def __init__(self, run_dir: Path, world_size: int, *, clock: Callable[[], float] = time.monotonic):
        self._run_dir, self._world_size, self._clock = run_dir, world_size, clock
        self.beats: dict[int, Beat] = {}
        self._since: dict[int, float] = {}

    def look(self) -> None:
        for rank in range(self._world_size):
            beat = read(self._run_dir, rank)
            if beat is not None and beat != self.beats.get(rank):
                self.beats[rank], self._since[rank] = beat, self._clock()

    def silence(self, rank: int) -> float:
        """Seconds since this rank was last seen to do something; 0 before it has begun."""
        return self._clock() - self._since[rank] if rank in self._since else 0.0

    def hanging(self, patience_s: float) -> list[int]:
        """Ranks that have been silent for longer, in a phase that does not take so long."""
        limit = {"checkpoint": max(patience_s, _SAVING_S)}
        watched = [rank for rank, beat in self.beats.items() if beat.phase not in _UNWATCHED]
        return [rank for rank in watched if self.silence(rank) > limit.get(self.beats[rank].phase, patience_s)]


def read(run_dir: Path, rank: int) -> Beat | None:
    """A rank's last beat; None where it has none yet."""
    try:
        pid, count, step, phase = _RECORD.unpack(files.read(_path(run_dir, rank), _RECORD.size + 1))
    except (OSError, struct.error):
        return None
    return Beat(rank=rank, pid=pid, count=count, step=step, phase=phase.rstrip(b"\0").decode(errors="replace"))


def forget(run_dir: Path) -> None:
    """Those of an earlier world go."""
    for path in files.folder(run_dir, FOLDER).glob("rank_*"):
        path.unlink(missing_ok=True)


def behind(beats: dict[int, Beat]) -> list[int]:
    """The ranks that are furthest back, where not all are equally far."""
    if not beats:
        return []
    last = min(beat.place for beat in beats.values())
    found = sorted(rank for rank, beat in beats.items() if beat.place == last)
    return found if len(found) < len(beats) else []


def _path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank_{rank}"
