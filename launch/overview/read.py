"""What a run directory says about its run, in one row: of metrics.jsonl only the end is read, so that hundreds of runs take a second.

Nothing in such a directory is trusted to be whole: what is missing, torn or no number is a gap in the row, and `note` says which.
"""

import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...conf.compose import load_saved, read_saved
from ...conf.errors import ConfigError
from ...conf.outside import parse_json
from ...conf.phases import num_steps
from ...conf.schema import ParallelConfig, PrecisionConfig
from ...train import metrics
from ...train.metrics import StepRecord, Summary
from .. import exit_codes, last_try, lease

MARKS = ("config.yaml", "metrics.jsonl", "summary.json", "sessions.jsonl", "ledger.json", last_try.FILE, lease.FILE)
RECENT = 16  # records that speed and MFU are the median of
_INSIDE = {"checkpoints", "logs", "flight", "traces", "heartbeats", "wandb"}  # folders of a run, where no run is
_DEEPEST = 8
_TAIL, _LONG_TAIL = 1 << 16, 1 << 20  # bytes; a record of a large model takes 60 kB
_SMALL = 1 << 22  # bytes of a JSON file that is read
_PAUSES = (exit_codes.OK, exit_codes.BUDGET, exit_codes.PREEMPTED, exit_codes.OTHER_SIZE, exit_codes.INTERRUPTED)
_EVALUATED = re.compile(rb'"eval_loss":(-?\d[\d.eE+-]*)')


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. None and "" are what cannot be told. Losses in nats per token; `mfu` 0 to 1; `updated` in seconds since 1970."""

    path: str
    name: str
    state: str  # running | waiting to restart | stopped | complete | failed | half-written | empty
    code: int | None  # of the last try, where that has ended by itself
    layout: str
    precision: str
    step: int | None
    steps: int | None
    tokens: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    dollars: float | None
    updated: float | None
    note: str = ""


def find(roots: Sequence[str | Path]) -> list[Path]:
    """Run directories in and below these folders, in order of their paths; a run may have others below it.

    Raises ConfigError for a folder that is not there. Links are not followed.
    """
    found = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise ConfigError("DIR", str(root), "no such folder", "runs" if Path("runs").is_dir() else None)
        found += _below(root, _DEEPEST)
    return sorted(dict.fromkeys(found), key=_natural)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it may not be read: a row says so
        entries = []
    is_run = not entries or any(entry.name in MARKS for entry in entries)
    if is_run:
        yield folder
    for entry in entries if depth else ():
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and not (is_run and entry.name in _INSIDE):
            yield from _below(Path(entry.path), depth - 1)


def _natural(path: Path) -> list:
    """2_x before 10_x."""
    return [(part.isdigit() and len(part), part) for part in re.split(r"(\d+)", str(path))]


def read(run_dir: Path) -> Row:
    """Whatever is there; raises nothing."""
    notes: list[str] = []
    tree = _config(run_dir / "config.yaml", notes)
    recent, evaluated = _recent(run_dir / "metrics.jsonl", notes)
    summary, last = _summary(run_dir), recent[-1] if recent else None
    if summary and last and summary.steps < last.step:
        summary = None  # an earlier session's
    steps, ended = _steps(run_dir, tree), last_try.read(run_dir) if _is_file(run_dir / last_try.FILE) else None
    owner = lease.owner(run_dir) if _is_file(run_dir / lease.FILE) else None
    complete = bool(summary and steps and last and last.step >= steps)
    state = state_of(owner is not None, ended, complete, tree is not None, last is not None)
    if ended and state == "failed":
        notes.insert(0, ended.what)
    elif owner and state == "running":
        notes.insert(0, str(owner))
    return Row(
        path=str(run_dir), name=_name(tree, run_dir), state=state, code=ended.code if ended and state != "running" else None,
        layout=_layout(tree), precision=_precision(tree), step=last.step if last else None, steps=steps,
        tokens=last.tokens if last else None, loss=last.loss if last else None,
        eval_loss=summary.eval_loss if summary and summary.eval_loss is not None else evaluated,
        tokens_per_second=_median([r.tokens_per_second for r in recent]), mfu=_median([r.mfu for r in recent]),
        dollars=_dollars(run_dir, last), updated=_updated(run_dir, [ended, last]), note="; ".join(notes),
    )  # fmt: skip


def state_of(held: bool, ended: "last_try.Ended | None", complete: bool, has_config: bool, has_records: bool) -> str:
    """`Row.state`, from who has the lease, how the last try ended, and what the directory holds."""
    if held:
        return "waiting to restart" if ended and ended.again else "running"
    if ended and ended.code not in _PAUSES:
        return "failed"
    if complete:
        return "complete"
    if not has_config and not has_records:
        return "empty"
    return "stopped" if has_config and has_records else "half-written"


# ---------------------------------------------------------------- files


def _is_file(path: Path) -> bool:
    """Not a pipe, which would never end."""
    try:
        return path.is_file()
    except OSError:
        return False


def _json(path: Path) -> Any:
    """None where there is nothing that can be read."""
    try:
        return parse_json(path.read_bytes()) if _is_file(path) and path.stat().st_size <= _SMALL else None
    except (OSError, ValueError, RecursionError):
        return None


def _config(path: Path, notes: list[str]) -> dict | None:
    if not _is_file(path):
        notes.append("no config.yaml")
        return None
    try:
        return read_saved(path)
    except ConfigError:
        notes.append("config.yaml cannot be read")
        return None


def _summary(run_dir: Path) -> Summary | None:
    try:
        return metrics.from_plain(Summary, _json(run_dir / "summary.json"))
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def _recent(path: Path, notes: list[str]) -> tuple[list[StepRecord], float | None]:
    """The last records, and the last held-out loss, as far as the file's end tells."""
    if not _is_file(path):
        notes.append("no metrics.jsonl")
        return [], None
    records, text = [], b""
    for size in (_TAIL, _LONG_TAIL):
        text, whole = _tail(path, size)
        records = _records(text)
        if whole or (len(records) == RECENT and _EVALUATED.search(text)):
            break
    if not records:
        notes.append("metrics.jsonl has no record that can be read")
    found = _EVALUATED.findall(text)
    return records, _number(found[-1]) if found else None


def _tail(path: Path, size: int) -> tuple[bytes, bool]:
    """The file's last whole lines, of about `size` bytes, and whether that is all of it."""
    try:
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            text = file.read(size)
    except OSError:
        return b"", True
    return (text, True) if length <= size else (text.partition(b"\n")[2], False)


def _records(text: bytes) -> list[StepRecord]:
    """The last `RECENT`, oldest first; lines that are none are passed over."""
    records: list[StepRecord] = []
    for line in reversed(text.splitlines()):
        if len(records) == RECENT:
            break
        try:
            records.append(metrics.from_plain(StepRecord, parse_json(line)))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            continue
    return records[::-1]


# ---------------------------------------------------------------- fields


def _name(tree: dict | None, run_dir: Path) -> str:
    name = (tree or {}).get("name")
    return name if isinstance(name, str) and name else run_dir.resolve().name


def _section(tree: dict | None, name: str) -> dict:
    section = (tree or {}).get(name)
    return section if isinstance(section, dict) else {}


def _steps(run_dir: Path, tree: dict | None) -> int | None:
    """Of the whole run."""
    if tree is None:
        return None
    train = _section(tree, "train")
    if not tree.get("phases") and not train.get("tokens"):
        return train.get("steps") if isinstance(train.get("steps"), int) else None
    try:
        return num_steps(load_saved(run_dir / "config.yaml"))
    except Exception:  # half a configuration, or another version's, fails in as many ways as there are
        return None


def _layout(tree: dict | None) -> str:
    found = {name: _section(tree, "parallel").get(name) for name in ("pp", "edp", "ep", "chunks", "schedule")}
    if not all(isinstance(found[name], int) for name in ("pp", "edp", "ep")):
        return ""
    chunks = found["chunks"] if isinstance(found["chunks"], int) else 1
    return metrics.layout_name(ParallelConfig(**{**found, "chunks": chunks, "schedule": str(found["schedule"])}))


def _precision(tree: dict | None) -> str:
    section = _section(tree, "precision")
    compute, linear = section.get("compute"), section.get("linear", "compute")
    return PrecisionConfig(compute=compute, linear=linear).products if isinstance(compute, str) and isinstance(linear, str) else ""


def _dollars(run_dir: Path, last: StepRecord | None) -> float | None:
    """The ledger is written when a session ends, records tell of the one that goes on: what is more is newer."""
    parts = _json(run_dir / "ledger.json")
    parts = parts.get("dollars") if isinstance(parts, dict) else None
    told = [_number(part) for part in parts.values()] if isinstance(parts, dict) else []
    sums = ([sum(told)] if told and None not in told else []) + ([last.dollars] if last and math.isfinite(last.dollars) else [])
    return max(sums, default=None)


def _updated(run_dir: Path, signs: Sequence[Any]) -> float | None:
    times = [sign.time_unix for sign in signs if sign and 0 < sign.time_unix < 1e11]
    if times:
        return max(times)
    for path in (*(run_dir / name for name in MARKS), run_dir):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
