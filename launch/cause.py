"""Why a try ended: of all ranks' ends, errors and signs of life, the one that was the cause, in a sentence."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..parallel.flight import Missing, read_json
from . import exit_codes
from .heartbeats import Watcher, behind


@dataclass(frozen=True, kw_only=True)
class Ending:
    """`what`: one line with the rank and what became of it; "" where all ended as they should. `detail`: lines to be read above it."""

    code: int
    what: str = ""
    detail: str = ""
    logs: Path | None = None
    stepped: bool = True  # some rank had begun a step
    seen: float | None = None  # when, on the monotonic clock


def find(
    logs: Path,
    flight: Path,
    *,
    codes: Mapping[int, int],
    left: Sequence[int],
    hanging: Sequence[int],
    stopped: set[int],
    lacking: Sequence[Missing],
    watcher: Watcher,
    seen: float | None = None,
) -> Ending:
    """`codes`: of ranks that ended by themselves, in that order; `left`: those that the launcher had to end; of them `hanging` did not
    answer any more, and `stopped` had been stopped by a signal. `lacking`: collectives that some have waited in."""
    records = [record for path in logs.glob("failure-*.json") if (record := read_json(path))]
    # A rank whose peer has died, or has given up waiting, finds its connection closed: an error of another kind is the cause, else a wait
    # that was given up, else the earliest.
    records.sort(key=lambda r: (r["code"] == exit_codes.LOST, "imed out" not in r["message"], r["time"]))
    stepped = any(beat.step for beat in watcher.beats.values())
    if records and records[0]["code"] != exit_codes.LOST:
        return Ending(
            code=records[0]["code"], what=records[0]["message"], detail=records[0]["traceback"], logs=logs, stepped=stepped, seen=seen
        )
    told = {record["rank"] for record in records}
    died = [rank for rank in codes if rank not in told and codes[rank] not in exit_codes.AGREED]
    if died:
        what, detail = f"rank {died[0]} {_how(codes[died[0]])}{_at(watcher, died[0])}", _last_words(logs, died[0])
    elif stopped or hanging or (left and records):
        what, detail = _standing(left, hanging, stopped, watcher, lacking), _details(flight, records, lacking)
    elif records:
        what, detail = _absent(watcher, lacking) or records[0]["message"], _details(flight, records, lacking)
    else:
        what, detail = "a rank has ended, and said nothing", ""
    return Ending(code=exit_codes.LOST, what=what, detail=detail, logs=logs, stepped=stepped, seen=seen)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"ended with exit code {code} and said nothing"


def _at(watcher: Watcher, rank: int) -> str:
    beat = watcher.beats.get(rank)
    return f" in {beat}" if beat and beat.step else ""


def _absent(watcher: Watcher, lacking: Sequence[Missing]) -> str:
    """Who was waited for in vain, though it has ended by itself. One that leaves a collective out goes on to the next, and waits there for
    those that wait for it: the collective that was left out is where the ones that are less far wait."""
    if not lacking:
        return ""
    less_far = lambda m: min((watcher.beats[rank].place for rank in m.waiting if rank in watcher.beats), default=(0, 0))
    first = min(lacking, key=less_far)
    ranks = list(first.begun) or first.silent
    return f"rank {', '.join(map(str, ranks))} did not come to {first.what}: it was last{_at(watcher, ranks[0]) or ' starting'}"


def _standing(left: Sequence[int], hanging: Sequence[int], stopped: set[int], watcher: Watcher, lacking: Sequence[Missing]) -> str:
    """Who of those that did not end by themselves is the cause: those that were stopped, else those furthest back."""
    among = {rank: beat for rank, beat in watcher.beats.items() if rank in left}
    ranks = sorted(stopped) or behind(among) or list(hanging) or list(left)
    named = f"rank {', '.join(map(str, ranks))} {'does' if len(ranks) == 1 else 'do'} not answer"
    why = " (stopped by a signal, such as SIGSTOP)" if stopped else ""
    waited_in = next((f"; others wait for it in {m.what}" for m in lacking if set(ranks) & {*m.begun, *m.silent}), "")
    return f"{named} since {watcher.silence(ranks[0]):.1f} s{why}{_at(watcher, ranks[0])}{waited_in}"


def _details(flight: Path, records: Sequence[dict], lacking: Sequence[Missing]) -> str:
    lines = [f"  {record['message']}" for record in records[:1]] + [f"  {m}" for m in lacking]
    return "".join(f"{line}\n" for line in [*lines, f"  stacks: {flight}"])


def _last_words(logs: Path, rank: int) -> str:
    """The end of what a rank without the console wrote to stderr."""
    path = logs / f"rank_{rank}.stderr"
    text = path.read_text(errors="replace") if path.exists() else ""
    return "".join(f"  rank {rank} | {line}\n" for line in text.splitlines()[-8:])
