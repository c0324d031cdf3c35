"""One run's directory, followed: its records as curves, its configuration, state, events and account, as far as they are there.

Nothing in it is trusted to be whole, or to be what it should: what is missing or no number is a gap, and `notes` says which. Files are read
again when they have changed; `look` is called by one thread, everything else by any, under `lock`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from ...conf.compose import load_saved
from ...conf.errors import ConfigError
from ...conf.outside import parse_json
from ...conf.phases import num_steps, num_tokens
from ...conf.schema import Config
from ...train import metrics, projection, sessions, waterfall
from ...train.account import Account
from ...train.metrics import Summary
from ...train.projection import Projection
from ...train.sessions import Began, Ended, Told
from ...train.waterfall import Waterfall
from .. import last_try, lease
from ..overview.read import state_of
from .history import AXES, LARGEST, History
from .reading import Follower

MOST_EVENTS = 400
_SMALL = 8 << 20  # bytes of a file that is read whole


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: restart, not a number, alert, checkpoint. `at`: by axis."""

    kind: str
    text: str
    at: dict[str, float | None]
    time_unix: float | None = None


class Run:
    """`label`: its name, made different from those beside it by whoever shows several. `share`: of samples that one alone has."""

    def __init__(self, path: Path, label: str = "", share: float = 1.0):
        self.path = Path(path)
        self._label = label
        self._follower = _Recorder(self.path / "metrics.jsonl", self._take, share)
        self._seen: dict[str, tuple | None] = {}
        self._alerts: list[Event] = []
        self._sessions: list[Began | Ended] = []
        self.lost: list[dict[str, Any]] = []
        self._clear()
        self.config: Config | None = None
        self.config_text = self.config_note = ""
        self.summary: Summary | None = None
        self.ended: last_try.Ended | None = None
        self.owner: str = ""
        self.traces: list[int] = []  # steps

    def _clear(self) -> None:
        self._account = Account()
        for event in self._sessions:
            self._account.note(event)
        for record in self.lost:
            self._account.take(_told(record), lost=True)
        self._events: list[Event] = []
        self._before: dict[str, Any] | None = None
        self._finite = True
        self.num_not_numbers, self.first_not_number = 0, ""  # steps whose loss is none

    # ------------------------------------------------------------ looking

    def look(self, seconds: float = 0.2) -> bool:
        """Read what has changed; whether there is more to read at once."""
        self._small_files()
        return self._follower.read_on(seconds)

    def look_at_all(self) -> "Run":
        self._small_files()
        self._follower.read_all()
        return self

    def _small_files(self) -> None:
        self._if_changed("config.yaml", self._read_config)
        self._if_changed("summary.json", self._read_summary)
        self._if_changed(sessions.NAME, self._read_sessions)
        self._if_changed(last_try.FILE, lambda path: setattr(self, "ended", last_try.read(self.path) if _stamp(path) else None))
        self._if_changed("alerts.jsonl", self._read_alerts)
        self._if_changed(metrics.LOST, self._read_lost)
        self._if_changed("traces", self._read_traces)
        owner = lease.owner(self.path) if _stamp(self.path / lease.FILE) else None
        self.owner = str(owner) if owner else ""

    def _if_changed(self, name: str, read: Callable[[Path], None]) -> None:
        path = self.path / name
        stamp = _stamp(path)
        if stamp != self._seen.get(name, ""):
            self._seen[name] = stamp
            with self.lock:
                read(path)

    def _read_config(self, path: Path) -> None:
        self.config, self.config_text, self.config_note = None, "", ""
        if (raw := _bytes(path)) is None:
            self.config_note = "There is no config.yaml: parameters, layout and device are unknown."
            return
        self.config_text = raw.decode(errors="replace")
        try:
            self.config = load_saved(path)
        except ConfigError as error:
            self.config_note = f"config.yaml cannot be used ({error}): parameters, layout and device are unknown."
        except Exception as error:  # half a YAML file fails in as many ways as there are halves
            self.config_note = f"config.yaml cannot be read ({type(error).__name__}): parameters, layout and device are unknown."

    def _read_summary(self, path: Path) -> None:
        self.summary, self.summary_note = None, ""
        try:
            if (raw := _bytes(path)) is not None:
                self.summary = metrics.from_plain(Summary, parse_json(raw))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            self.summary_note = f"summary.json cannot be read: {error}."

    def _read_alerts(self, path: Path) -> None:
        found = [line for line in map(_object, (_bytes(path) or b"").splitlines()) if line]
        self._alerts = [
            Event(kind="alert over" if line.get("firing") is False else "alert",
                  text=_words(line.get("text") or line.get("title") or line.get("name")), time_unix=_number(line.get("time_unix")),
                  at={axis: _number(line.get(axis)) for axis in AXES})
            for line in found[-MOST_EVENTS:]
        ]  # fmt: skip

    def _read_lost(self, path: Path) -> None:
        """What grows it replaces metrics.jsonl, too: then the account is made anew, with these."""
        self.lost = [line for line in map(_object, (_bytes(path) or b"").splitlines()) if line]

    def _read_sessions(self, path: Path) -> None:
        """Each line once: it is only appended to."""
        before, self._sessions = (
            len(self._sessions),
            [e for e in map(sessions.parse, (_bytes(path) or b"").decode(errors="replace").splitlines()) if e],
        )
        for event in self._sessions[before:]:
            self._account.note(event)

    def _read_traces(self, path: Path) -> None:
        names = [entry.name for entry in os.scandir(path)] if path.is_dir() else []
        steps = [name[5:-5] for name in names if name.startswith("step_") and name.endswith(".json")]
        self.traces = sorted(int(step) for step in steps if step.isascii() and step.isdigit() and len(step) < 16)

    # ------------------------------------------------------------ events, as records come

    def _take(self, record: dict[str, Any] | None) -> None:
        if record is None:  # the file is read from its beginning again
            self._clear()
            return
        self._account.take(_told(record))
        before, self._before = self._before, record
        at = {axis: _number(record.get(axis)) for axis in AXES}
        tell = lambda kind, words: self._events.append(Event(kind=kind, text=words, at=at, time_unix=_number(record.get("time_unix"))))
        if len(self._events) >= MOST_EVENTS:
            del self._events[: MOST_EVENTS // 2]
        step = _step_of(record)
        session = record.get("session")
        if before is not None and session != before.get("session") and type(session) is int:
            tell("restart", f"started again (session {session + 1}), from step {step}")
        finite = _number(record.get("loss")) is not None
        if not finite:
            self.num_not_numbers += 1
            self.first_not_number = self.first_not_number or step
        if not finite and self._finite:
            tell("not a number", f"the loss is not a number at step {step}")
        self._finite = finite
        saved = record.get("checkpoint")
        if isinstance(saved, str) and not saved.startswith("saved"):
            tell("checkpoint", f"step {step}: {_words(saved)}")

    # ------------------------------------------------------------ asked

    @property
    def lock(self):
        return self._follower.lock

    @property
    def history(self) -> History:
        return self._follower.history

    @property
    def progress(self) -> float:
        return self._follower.progress

    @property
    def version(self) -> tuple:
        return (self._follower.version, tuple(sorted(self._seen.items(), key=str)), self.owner)

    @property
    def events(self) -> list[Event]:
        return self._events + self._alerts

    @property
    def name(self) -> str:
        return _words(self.config.name if self.config else self.summary.name if self.summary else self.path.resolve().name)

    @property
    def label(self) -> str:
        return self._label or self.name

    @property
    def last(self) -> dict[str, Any]:
        return self.history.last or {}

    def number(self, name: str) -> float | None:
        """Of the last record."""
        return _number(self.last.get(name))

    @property
    def seconds(self) -> float | None:
        return self.number("seconds")

    @property
    def steps(self) -> int | None:
        """Of the whole run."""
        try:
            return num_steps(self.config) if self.config else None
        except Exception:
            return None

    @property
    def tokens_planned(self) -> int | None:
        try:
            return num_tokens(self.config) if self.config else None
        except Exception:
            return None

    @property
    def state(self) -> str:
        step, steps = self.number("step"), self.steps
        complete = bool(steps and step is not None and step >= steps and self.summary)
        return state_of(bool(self.owner), self.ended, complete, bool(self.config), bool(self.last))

    def recent(self, name: str) -> float | None:
        """The median of the last records that have it."""
        known = sorted(v for v in (_number(record.get(name)) for record in list(self.history.recent)[-16:]) if v is not None)
        return known[len(known) // 2] if known else None

    def latest(self, name: str) -> float | None:
        """The last that was recorded, however long ago."""
        curve = self.history.curve(name)
        return float(curve.values[-1]) if len(curve) else None

    def expert_load(self, step: int | None = None) -> tuple[float, list[list[int]]] | None:
        """A step, and tokens of each expert of each MoE layer in it; where they can be read. None: the last step that has them."""
        step, loads = self._follower.expert_load(step) or (0, None)
        whole = isinstance(loads, list) and loads and all(isinstance(layer, list) and layer for layer in loads)
        if not whole or any(_number(n) is None or n < 0 for layer in loads for n in layer):
            return None
        return step, loads

    def waterfall(self) -> Waterfall | None:
        """Where each dollar went, of all that has been read; None until that is all, and where nothing is known."""
        if self.progress < 1 or not (self._account.began or self._account.last):
            return None
        return waterfall.of(self._account, waterfall.recomputes(self.path) if self._account.traced else ())

    def projection(self) -> Projection | None:
        """Of what is still to come; None as for `waterfall`, and without a configuration."""
        if self.progress < 1 or self.config is None:
            return None
        try:
            return projection.projection(self.config, self._account)
        except (ArithmeticError, ValueError, LookupError):  # of records that no run writes
            return None

    def notes(self) -> list[str]:
        """What is missing or unusual, in sentences."""
        notes = [self.config_note] if self.config_note else []
        if not self.last:
            there = (self.path / "metrics.jsonl").exists()
            notes.append(
                "metrics.jsonl holds no complete record yet." if there else "There is no metrics.jsonl: no step has been recorded."
            )
        if getattr(self, "summary_note", ""):
            notes.append(self.summary_note)
        if self._follower.num_bad:
            notes.append(
                f"{self._follower.num_bad:,} line(s) of metrics.jsonl are no records and left out, "
                f"the first at line {self._follower.first_bad:,}."
            )
        if self.progress < 1:
            notes.append(f"The file is long: {100 * self.progress:.0f} % of it is read, curves are samples until it is whole.")
        if self.state == "failed" and self.ended:
            notes.append(f"The run failed: {_words(self.ended.what)}")
        return notes


def _step_of(record: dict[str, Any]) -> str:
    step = _number(record.get("step"))
    return f"{step:,.0f}" if step is not None else "?"


class _Recorder(Follower):
    """Tells of each record, and with None when it begins anew."""

    def __init__(self, path: Path, tell: Callable[[dict | None], None], share: float):
        self._tell: Callable[[dict | None], None] = lambda record: None
        super().__init__(path, share)
        self._tell = tell

    def _forget(self) -> None:
        super()._forget()
        self._tell(None)

    def on_record(self, record: dict) -> None:
        self._tell(record)


def _told(record: dict[str, Any]) -> Told:
    """What accounts need of a record, who look at the numbers themselves."""
    get, session = record.get, record.get("session", 0)
    return Told(
        step=get("step", 0), tokens=get("tokens", 0), phase=str(get("phase", "main")), batch_tokens=_whole(get("batch_tokens")),
        step_seconds=get("step_seconds"), seconds=get("seconds"), dollars=get("dollars"), gpu_hours=_number(get("gpu_hours")),
        eval_seconds=get("eval_seconds"), checkpoint_seconds=get("checkpoint_seconds"), data_seconds=_number(get("data_seconds")),
        breakdown=parts if isinstance(parts := get("breakdown"), dict) else None, time_unix=_number(get("time_unix")) or 0.0,
        session=session if type(session) is int else 0,
    )  # fmt: skip


def _stamp(path: Path) -> tuple | None:
    """Of a file or folder; None of what is not there, or would not end, such as a pipe."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    if not S_ISREG(stat.st_mode) and not S_ISDIR(stat.st_mode):
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _SMALL else None
    except OSError:
        return None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def _words(value: Any, most: int = 300) -> str:
    return str(value if value is not None else "")[:most]
