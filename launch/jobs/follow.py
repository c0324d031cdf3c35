"""A Slurm job as it goes: its state, where its logs are, and what they say, until it is over. Ctrl-C leaves it running.

Only `squeue` and `scontrol` are asked, every few seconds: a controller serves many.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import exit_codes
from .slurm import Sent

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
_BYTES_AT_ONCE = 1 << 20  # of a log; what is more is left out, and said


@dataclass(frozen=True, kw_only=True)
class State:
    """Of a job, or of one task of an array. `code`: of its batch script, once it has ended."""

    id: str
    state: str
    reason: str
    nodes: str
    restarts: int
    code: int

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes and self.state == "RUNNING" else ""
        why = f" ({self.reason})" if self.reason not in ("None", "") and self.state in ("PENDING", "FAILED", "CANCELLED") else ""
        again = f", requeued {self.restarts} time{'s' * (self.restarts > 1)}" if self.restarts else ""
        return f"job {self.id}: {self.state}{where}{why}{again}"


def states(job: str) -> list[State] | None:
    """Of a job or all tasks of an array; None where Slurm does not know it (any more)."""
    found = subprocess.run(["scontrol", "show", "--oneliner", "job", job], capture_output=True, text=True)
    if found.returncode:
        return None
    return [_state(dict(re.findall(r"(\w+)=(\S*)", line))) for line in found.stdout.splitlines() if "JobState=" in line]


def _state(fields: dict[str, str]) -> State:
    of_array = "ArrayTaskId" in fields
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    return State(
        id=f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if of_array else fields["JobId"],
        state=fields["JobState"],
        reason=fields.get("Reason", ""),
        nodes="" if fields.get("NodeList") == "(null)" else fields.get("NodeList", ""),
        restarts=int(fields.get("Restarts", "0")),
        code=128 + int(number) if int(number or 0) else int(code),
    )


def live(sent: Sent | None) -> bool:
    """Whether Slurm has it still: waiting, running, or about to be requeued."""
    return bool(sent) and any(state.state not in _ENDED for state in states(sent.id) or [])


def follow(sent: Sent, folder: Path, *, say: Callable[[str], None] = print, tick_s: float = 2.0) -> int:
    """Until the job is over; its exit code, of a sweep the first that is not 0. `folder`: of its logs. What it sends is followed too."""
    told: dict[str, str] = {}
    tails = Tails(folder, new=False)
    unknown = ended = 0
    while True:
        now = states(sent.id)
        unknown = unknown + 1 if now is None else 0
        ended = ended + 1 if now and all(state.state in _ENDED for state in now) else 0
        for state in now or []:
            if told.get(state.id) != str(state):
                told[state.id] = str(state)
                say(str(state))
        for line in tails.lines():
            say(line)
        if unknown > 5:
            say(f"job {sent.id}: Slurm does not know it (any more)")
            return exit_codes.LOST
        if ended > 1:  # a requeue looks like an end for a moment
            following = Sent.read(folder)
            if following is None or following.id == sent.id:
                if any(state.state == "TIMEOUT" for state in now):
                    say("its ranks had not saved when the limit came: raise launch.slurm.signal_s; the same command goes on")
                return next((code for state in now if (code := _code(state))), exit_codes.OK)
            sent, ended = following, 0
            continue
        time.sleep(tick_s)


def _code(state: State) -> int:
    if state.state == "COMPLETED" or state.code:
        return state.code
    return exit_codes.LOST  # Slurm ended it, and no process said why


@dataclass
class Tails:
    """What has been added to a folder's logs. Where lines of another one follow, its name stands before them."""

    folder: Path
    new: bool = True  # all that is there, not only what is added from now on
    _read: dict[Path, int] = field(default_factory=dict)
    _last: Path | None = None

    def __post_init__(self):
        if not self.new:
            self._read = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> Iterable[Path]:
        return sorted(self.folder.glob("job_*.log"))

    def lines(self) -> Iterator[str]:
        for path in self._files():
            size, at = path.stat().st_size, self._read.get(path, 0)
            if size <= at:
                continue
            with open(path, "rb") as file:
                file.seek(max(at, size - _BYTES_AT_ONCE))
                text = file.read(size - file.tell())
            whole = text.rfind(b"\n") + 1
            if not whole:
                continue
            self._read[path] = size - len(text) + whole
            if size - at > _BYTES_AT_ONCE:
                yield f"... {path.name}: {size - at - _BYTES_AT_ONCE:,} bytes left out here"
            if path != self._last:
                yield f"--- {path.name}"
            self._last = path
            yield from text[:whole].decode(errors="replace").splitlines()
