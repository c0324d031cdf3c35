"""The sums that a run's costs are told from: fed its sessions and its records as they are read, it holds one small row per session.

A record's step is one number of seconds. What it went for is known of traced steps (`breakdown`). Steps between two of those take the mean
of the two's shares, those before the first and after the last that one's, where phase and layout are the same. No others are divided.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..parallel import trace_divide
from . import sessions
from .metrics import StepRecord
from .sessions import Began, Ended, Told

Record = StepRecord | Told

DIVIDED = (*trace_divide.PARTS, "not divided")  # of steps that were kept
PARTS = (*DIVIDED, "evaluation", "checkpoint", "start", "restart", "lost", "rest")
RECENT = 512  # steps whose times are remembered
_MOST = 1e10  # seconds, dollars a second: what is more is no number of this world


class Pace(NamedTuple):
    """Of a step that was kept."""

    step: int
    phase: str
    batch_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Held:
    """One session, the wait before it included: `seconds` by `PARTS`, none negative; `dollars` and `devices` of a second."""

    session: int
    dollars: float
    devices: float
    seconds: dict[str, float]


@dataclass
class _Row:
    """Sums of a session's records, and its first and last by the run's clock."""

    divided: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DIVIDED, 0.0))
    lost: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    first: Record | None = None
    last: Record | None = None


@dataclass
class _Stretch:
    """Of one phase and layout: the last traced step's shares, and what came after it, by session: seconds without data, and with."""

    shares: dict[str, float] | None = None
    waiting: dict[int, list[float]] = field(default_factory=dict)


class Account:
    """`note` and `take` in the order of the files, sessions before the records of theirs. A run that goes back makes its file shorter:
    then begin a new one. What it is fed may be anything: what is no number of this world is left out, and counted in `notes`."""

    def __init__(self) -> None:
        self.began: dict[int, Began] = {}
        self.ended: dict[int, Ended] = {}
        self.tokens = self.lost_tokens = self.steps = self.traced = self.left_out = 0
        self.unread: list[str] = []
        self.recent: deque[Pace] = deque(maxlen=RECENT)
        self.last: Record | None = None  # of those kept
        self._rows: dict[int, _Row] = {}
        self._stretches: dict[tuple[str, str], _Stretch] = {}

    @classmethod
    def of(cls, run_dir: Path) -> "Account":
        """Of everything in a directory, as it is now."""
        account = cls()
        for name in (sessions.NAME, *sessions.FILES):
            try:
                account._read(run_dir / name)
            except OSError as error:
                account.unread.append(f"{name} cannot be read: {error.strerror}")
        return account

    def _read(self, path: Path) -> None:
        if path.name == sessions.NAME:
            began, ended = sessions.events(path.parent)
            for event in [*began, *ended.values()]:
                self.note(event)
        else:
            for record in sessions.records(path):
                self.take(record, lost=path.name != sessions.FILES[0])

    def note(self, event: Began | Ended) -> None:
        """A line of `sessions.jsonl`. The second begin of one session is left out."""
        numbers = (event.seconds, event.dollars, *((event.devices,) if isinstance(event, Began) else (event.standing,)))
        if not all(map(_sound, numbers)) or (isinstance(event, Began) and event.session in self.began):
            self.left_out += 1
        elif isinstance(event, Began):
            self.began[event.session] = event
        else:
            self.ended[event.session] = event

    def take(self, record: Record, lost: bool = False) -> None:
        """`lost`: of `metrics_lost.jsonl`."""
        extra = (record.eval_seconds or 0.0, record.checkpoint_seconds or 0.0)
        if not all(map(_sound, (record.seconds, record.step_seconds, *extra))):
            self.left_out += 1
            return
        row = self._rows.setdefault(record.session, _Row())
        row.evaluation += extra[0]
        row.checkpoint += extra[1]
        row.first = record if row.first is None or record.seconds < row.first.seconds else row.first
        row.last = record if row.last is None or record.seconds > row.last.seconds else row.last
        if lost:
            row.lost += record.step_seconds
            self.lost_tokens += record.batch_tokens or 0
            return
        self.tokens, self.last, self.steps = record.tokens, record, self.steps + 1
        self.recent.append(Pace(record.step, record.phase, record.batch_tokens or 0, record.step_seconds))
        self._divide(record, row)

    # ------------------------------------------------------------ steps

    def _divide(self, record: Record, row: _Row) -> None:
        began = self.began.get(record.session)
        stretch = self._stretches.setdefault((record.phase, began.layout if began else ""), _Stretch())
        shares = _shares(record)
        if shares is not None:
            before = stretch.shares or shares
            both = {part: (before[part] + shares[part]) / 2 for part in shares}
            for session, waiting in stretch.waiting.items():
                _spread(self._rows[session].divided, waiting, both)
            _spread(row.divided, [0.0, record.step_seconds], shares)
            stretch.shares, stretch.waiting = shares, {}
            self.traced += 1
            return
        waiting = stretch.waiting.setdefault(record.session, [0.0, 0.0])
        if _sound(record.data_seconds):
            data = min(record.data_seconds, record.step_seconds)
            row.divided["data"] += data
            waiting[0] += record.step_seconds - data
        else:
            waiting[1] += record.step_seconds

    def _divided(self) -> dict[int, dict[str, float]]:
        """By session, with what waits for the next traced step."""
        found = {session: dict(row.divided) for session, row in self._rows.items()}
        for stretch in self._stretches.values():
            for session, waiting in stretch.waiting.items():
                if stretch.shares is None:
                    found[session]["not divided"] += sum(waiting)
                else:
                    _spread(found[session], waiting, stretch.shares)
        return found

    # ------------------------------------------------------------ sessions

    def held(self) -> tuple[list[Held], list[str]]:
        """Sessions in order, and sentences about what could not be told."""
        notes = [*self.unread, *[f"{self.left_out} lines with times or prices that no run has are left out"] * bool(self.left_out)]
        divided, before, found = self._divided(), 0.0, []
        for session in sorted({*self.began, *self._rows}):
            row, end = self._rows.get(session, _Row()), self.ended.get(session)
            began = self.began.get(session)
            if began is None:
                began = _guess(session, row)
                notes.append(f"session {session} has no begin in {sessions.NAME}: its price is that of its records")
            since = max(before, began.seconds)
            until = max([since, *(r.seconds for r in [row.last, end] if r)])
            parts = divided.get(session, dict.fromkeys(DIVIDED, 0.0)) | {
                "evaluation": row.evaluation, "checkpoint": row.checkpoint + (end.standing if end else 0.0), "lost": row.lost,
                "start": max(0.0, row.first.seconds - since - _own(row.first)) if row.first else 0.0,
            }  # fmt: skip
            whole = until - since
            told = math.fsum(parts.values())
            if told > whole + max(0.01, 1e-6 * whole):
                notes.append(f"session {session} tells of {told:.6g} s in {whole:.6g} s: its parts are made to fit")
            fit = whole / told if told > whole else 1.0
            parts = {name: value * fit for name, value in parts.items()}
            parts["rest"] = max(0.0, whole - math.fsum(parts.values()))
            parts["restart"] = since - before
            if began.seconds < before - 0.01:
                notes.append(f"session {session} began {before - began.seconds:.6g} s before the last sign of life of the one before it")
            seconds = {name: parts[name] for name in PARTS}
            found.append(Held(session=session, dollars=began.dollars, devices=began.devices, seconds=seconds))
            before = until
        return found, notes


def _sound(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MOST


def _own(record: Record) -> float:
    """Seconds that the record itself tells of."""
    return record.step_seconds + (record.eval_seconds or 0.0) + (record.checkpoint_seconds or 0.0)


def _shares(record: Record) -> dict[str, float] | None:
    """Of a traced step; None where it was not traced, or its parts are no numbers."""
    told = record.breakdown or {}
    parts = {name: told.get(name, 0.0) for name in trace_divide.PARTS}
    whole = sum(parts.values()) if all(map(_sound, parts.values())) else 0.0
    return {name: value / whole for name, value in parts.items()} if whole > 0 else None


def _spread(parts: dict[str, float], waiting: list[float], shares: dict[str, float]) -> None:
    """`waiting`: seconds without data's, and with."""
    others = 1.0 - shares["data"]
    for name, share in shares.items():
        parts[name] += waiting[1] * share
        if name != "data" and others > 1e-9:
            parts[name] += waiting[0] * share / others
    if others <= 1e-9:
        parts["not divided"] += waiting[0]


def _guess(session: int, row: _Row) -> Began:
    """The begin of a session that only records tell of: with its first step, at what the run's seconds have cost between them."""
    first, last = row.first, row.last
    amount = lambda value: value if _sound(value) else 0.0
    per_second = lambda name: _rate(*(amount(getattr(r, name)) for r in (first, last)), first.seconds, last.seconds)
    return Began(
        session=session, job="", time_unix=0.0, seconds=max(0.0, first.seconds - _own(first)), dollars=per_second("dollars"),
        devices=round(3600 * per_second("gpu_hours")),
    )  # fmt: skip


def _rate(first: float, last: float, since: float, until: float) -> float:
    rate = (last - first) / (until - since) if until > since else last / until if until else 0.0
    return rate if _sound(rate) else 0.0
