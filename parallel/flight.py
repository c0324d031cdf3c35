"""What a rank had begun when it lost the others: a file per rank, and from all of them who is missing where.

    flight/rank_3.json   error         what ended this rank, with the lines that led there
                         groups        of each that it is in: name, ranks, how many collectives it has begun, the last one's name and age
                         collectives   the last ones begun, oldest first
                         stacks        of every thread
    flight/rank_3.txt    the stacks of a rank that was asked for them from outside, as it did not answer

Torch's flight recorder counts collectives. Of a pipeline's sends over gloo it knows nothing: those are named in the error alone. Its
times are the wall clock's, and so are ages: they only put in order what is missing in several groups.
"""

import contextlib
import faulthandler
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ..conf import files
from ._torch import flight_entries, own_groups
from .world import title

FOLDER = "flight"  # of a run directory; in it a folder for each try, where there are several
KEPT = 200  # collectives
ASKED = signal.SIGUSR2  # a process that gets it writes its stacks, whatever it is doing


def write_flight(folder: Path, error: BaseException | None = None, *, hide: Callable[[str], str] = str) -> Path:
    """This rank's file. To be called before the world is left or aborted. `hide`: takes secrets out of what an error says."""
    rank = dist.get_rank()
    entries = flight_entries()
    document = {
        "rank": rank,
        "time": time.time(),
        "error": [hide(line) for line in traceback.format_exception(error)] if error else [],
        "groups": [_group(name, group, entries) for name, group in own_groups()],
        "collectives": [_collective(e) for e in entries[-KEPT:]],
        "stacks": _stacks(),
    }
    _made(folder)
    path = folder / f"rank_{rank}.json"
    files.replace(path, json.dumps(document, indent=1) + "\n")
    return path


def answer_when_asked(folder: Path, rank: int) -> None:
    """From now on this process writes the stacks of its threads when it gets the signal `ASKED`, even where Python has no say: in a
    collective, in a kernel, in a lock."""
    _made(folder)
    file = files.opened(asked_file(folder, rank), "wb")  # open as long as the process lives
    faulthandler.register(ASKED, file=file, all_threads=True)


def _made(folder: Path) -> None:
    """FOLDER of a run directory, or a folder in that."""
    parts = (folder.name,) if folder.name == FOLDER else (folder.parent.name, folder.name)
    files.folder(folder.parents[len(parts) - 1], *parts)


def tidy(folder: Path, *ranks: int) -> None:
    """Files of ranks that nobody has asked for their stacks go, and folders that hold nothing else."""
    for rank in ranks:
        file = asked_file(folder, rank)
        if file.exists() and not file.stat().st_size:
            file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
        if folder.parent.name == FOLDER:
            folder.parent.rmdir()


def asked_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def last_begun() -> str:
    """The collective that this rank began last, in words; of a call that waits for its own end, the one that failed."""
    entries, groups = flight_entries(), dict(own_groups())
    if not entries or entries[-1]["process_group"][0] not in groups:
        return "nothing that torch has recorded"
    return f"{entries[-1]['profiling_name']} over {title(groups[entries[-1]['process_group'][0]])}"


def _group(name: str, group: dist.ProcessGroup, entries: list[dict]) -> dict:
    of_group = [e for e in entries if e["process_group"][0] == name and not e.get("is_p2p")]
    of_group = [e for e in of_group if e["pg_id"] == of_group[-1]["pg_id"]]  # not those of an earlier world, whose names come again
    last = of_group[-1] if of_group else None
    return {
        "name": group.group_desc,
        "ranks": dist.get_process_group_ranks(group),
        "begun": last["collective_seq_id"] if last else 0,
        "last": last["profiling_name"] if last else None,
        "age_s": (time.time_ns() - last["time_created_ns"]) / 1e9 if last else 0.0,
    }


def _collective(e: dict) -> dict:
    return {"group": e["process_group"][1], "what": e["profiling_name"], "number": e["collective_seq_id"], "sizes": e["input_sizes"]}


def _stacks() -> dict[str, list[str]]:
    names = {t.ident: t.name for t in threading.enumerate()}
    return {names.get(ident, str(ident)): traceback.format_stack(frame) for ident, frame in sys._current_frames().items()}


def read_json(path: Path) -> dict | None:
    """None for the file of a rank that was ended while it wrote."""
    try:
        return json.loads(files.read(path))
    except (ValueError, files.UnsafeFile):
        return None


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A collective that some ranks have begun and others have not, or may not have: those have left no word."""

    what: str  # "gloo:all_reduce, number 6 over "dense" (ranks 0 1)"
    begun: dict[int, int]  # by rank behind: how many of the group's collectives it has begun
    silent: list[int]
    waiting: list[int]  # those that have begun it
    age_s: float  # of the first that is in it, when it gave up

    def __str__(self) -> str:
        parts = [f"rank {rank} has begun {count}" for rank, count in self.begun.items()] + [f"no word from rank {r}" for r in self.silent]
        return f"{self.what}: {', '.join(parts)}"


def missing(folder: Path) -> list[Missing]:
    """By a folder's files: the collectives that were waited in, first the one that was first."""
    told = [file for path in sorted(folder.glob("rank_*.json")) if (file := read_json(path))]
    groups: dict[tuple, dict[int, dict]] = {}
    for file in told:
        for g in file["groups"]:
            groups.setdefault((g["name"], *g["ranks"]), {})[file["rank"]] = g
    last = {file["rank"]: min((g["age_s"] for g in file["groups"] if g["begun"]), default=0.0) for file in told}
    found = [_missing(name, ranks, seen, last) for (name, *ranks), seen in groups.items()]
    return sorted((m for m in found if m), key=lambda m: -m.age_s)


def _missing(name: str, ranks: list[int], seen: dict[int, dict], last: dict[int, float]) -> Missing | None:
    most = max(g["begun"] for g in seen.values())
    ahead = [rank for rank, g in seen.items() if g["begun"] == most]
    begun = {rank: g["begun"] for rank, g in sorted(seen.items()) if g["begun"] < most}
    # Of a rank without a file it is not known what it has begun: it may be missing where the others were at last.
    waiting = [rank for rank in ahead if most and seen[rank]["age_s"] == last[rank]]
    silent = [rank for rank in ranks if rank not in seen] if waiting else []
    if not begun and not silent:
        return None
    first = seen[waiting[0] if waiting else ahead[0]]
    what = f'{first["last"]}, number {most} over "{name}" (ranks {" ".join(map(str, ranks))})'
    return Missing(what=what, begun=begun, silent=silent, waiting=waiting or ahead, age_s=max(seen[rank]["age_s"] for rank in ahead))
