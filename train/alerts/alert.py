"""An alert, and the file that keeps a run's: `alerts.jsonl`, a line where an episode begins and another where it is over."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ...conf import files
from ...conf.outside import parse_json
from .. import metrics

NAME = "alerts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """`kind` names what is watched, such as "stall" or "budget_usd 80 %": of each kind there is one episode at a time.

    `step` and what follows it: where the run was, as in its last record.
    """

    run: str
    kind: str
    firing: bool  # False: the episode is over
    text: str  # one sentence or two, for a person
    time_unix: float
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dollars: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.run}: {self.kind}" + ("" if self.firing else " is over")


def keep(run_dir: Path, alert: Alert) -> None:
    """Append. A torn line before it stays one of its own."""
    with files.opened(run_dir / NAME, "ab+") as file:
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(asdict(alert)).encode() + b"\n")


def begun(run_dir: Path) -> dict[str, Alert]:
    """By kind, the episodes that are not over: a run that goes on does not tell of them again."""
    path, found = run_dir / NAME, {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            alert = metrics.from_plain(Alert, parse_json(line))
        except metrics.BAD_LINE:
            continue
        found.pop(alert.kind, None)
        if alert.firing:
            found[alert.kind] = alert
    return found
