"""What a rank had begun when it lost the others: a file per rank, and from all of them who is missing where.

    flight/rank_3.json   error         what ended this rank, with the lines that led there
                         groups        of each that it is in: name, ranks, how many collectives it has begun, and the last one's name
                         collectives   the last ones begun, oldest first
                         stacks        of every thread
    flight/rank_3.txt    the stacks of a rank that was asked for them from outside, as it did not answer

Torch's flight recorder counts collectives. Of a pipeline's sends over gloo it knows nothing: those are named in the error alone.
"""

import contextlib
import faulthandler
import json
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from ._torch import flight_entries, own_groups
from .world import title

KEPT = 200  # collectives
ASKED = signal.SIGUSR2  # a process that gets it writes its stacks, whatever it is doing


def write_flight(folder: Path, error: BaseException | None = None) -> Path:
    """This rank's file. To be called before the world is left or aborted."""
    rank = dist.get_rank()
    entries = flight_entries()
    document = {
        "rank": rank,
        "time": time.time(),
        "error": traceback.format_exception(error) if error else [],
        "groups": [_group(name, group, entries) for name, group in own_groups()],
        "collectives": [_collective(e) for e in entries[-KEPT:]],
        "stacks": _stacks(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def answer_when_asked(folder: Path, rank: int) -> None:
    """From now on this process writes the stacks of its threads when it gets the signal `ASKED`, even where Python has no say: in a
    collective, in a kernel, in a lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(asked_file(folder, rank), "w")  # noqa: SIM115  open as long as the process lives
    faulthandler.register(ASKED, file=file, all_threads=True)


def tidy(folder: Path, *ranks: int) -> None:
    """Files of ranks that nobody has asked for their stacks go, and a folder that holds nothing else."""
    for rank in ranks:
        file = asked_file(folder, rank)
        if file.exists() and not file.stat().st_size:
            file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


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
    }


def _collective(e: dict) -> dict:
    return {"group": e["process_group"][1], "what": e["profiling_name"], "number": e["collective_seq_id"], "sizes": e["input_sizes"]}


def _stacks() -> dict[str, list[str]]:
    names = {t.ident: t.name for t in threading.enumerate()}
    return {names.get(ident, str(ident)): traceback.format_stack(frame) for ident, frame in sys._current_frames().items()}


def who_is_missing(folder: Path) -> list[str]:
    """By a folder's files: a line for each group whose ranks have not all begun as many collectives, and one for ranks without a file."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank_*.json"))]
    groups: dict[tuple, dict[int, dict]] = {}
    for file in files:
        for g in file["groups"]:
            groups.setdefault((g["name"], *g["ranks"]), {})[file["rank"]] = g
    lines = [_behind(name, ranks, seen) for (name, *ranks), seen in groups.items()]
    silent = sorted({rank for _, *ranks in groups for rank in ranks} - {file["rank"] for file in files})
    return [line for line in lines if line] + ([f"no word from ranks {' '.join(map(str, silent))}"] if silent else [])


def _behind(name: str, ranks: list[int], seen: dict[int, dict]) -> str:
    ahead = max(seen.values(), key=lambda g: g["begun"])
    behind = [f"rank {rank} has begun {g['begun']}" for rank, g in sorted(seen.items()) if g["begun"] < ahead["begun"]]
    of = f'"{name}" (ranks {" ".join(map(str, ranks))}): collective {ahead["begun"]}, {ahead["last"]}'
    return f"{of}: {', '.join(behind)}" if behind else ""
