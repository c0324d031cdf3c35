"""Two runs beside each other: what differs in their settings, their losses at equal tokens, and what each paid to come as far.

Nothing is interpolated: beside a record of the first run stands the record of the second that is nearest to it in tokens.
"""

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...conf.compose import read_saved
from ...conf.errors import ConfigError
from ...train import metrics
from ...train.metrics import StepRecord

POINTS = 12
SMOOTH = 9  # records that a loss is the median of, where one has to be reached
ABSENT = "(not set)"
_CURVE = ("tokens", "loss", "eval_loss", "tokens_per_second", "dollars", "seconds")  # in CSV


@dataclass(frozen=True, kw_only=True)
class Side:
    """A run that is compared. `settings`: by dotted name; None where it has none that can be read."""

    path: str
    settings: dict[str, Any] | None
    records: list[StepRecord]

    @property
    def tokens_per_second(self) -> float | None:
        known = [r.tokens_per_second for r in self.records if math.isfinite(r.tokens_per_second)]
        return statistics.median(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run's loss had come down to a target."""

    step: int
    tokens: int
    dollars: float
    seconds: float


def read(run_dir: str | Path) -> Side:
    """Raises ConfigError where there is no such folder, or nothing of a run in it. Records are without their expert loads."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError("RUN", str(run_dir), "no such folder")
    try:
        settings = flat(read_saved(run_dir / "config.yaml"))
    except ConfigError:
        settings = None
    path, records = run_dir / "metrics.jsonl", []
    if path.is_file():
        records = [_light(record) for record in metrics.scan_records(path, lambda *bad: None)]
    if settings is None and not records:
        raise ConfigError("RUN", str(run_dir), "holds neither settings nor records of a run")
    return Side(path=str(run_dir), settings=settings, records=records)


def _light(record: StepRecord) -> StepRecord:
    return dataclasses.replace(record, expert_load=None)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; an empty section is a value."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def differing(a: Side, b: Side) -> list[tuple[str, str, str]]:
    """(dotted name, the first's value, the second's) where they are not the same, in the order of the settings."""
    left, right = a.settings or {}, b.settings or {}
    names = dict.fromkeys([*left, *right])
    shown = lambda settings, name: str(settings[name]) if name in settings else ABSENT
    return [(n, shown(left, n), shown(right, n)) for n in names if n not in left or n not in right or not _same(left[n], right[n])]


def _same(a: Any, b: Any) -> bool:
    """1 and 1.0 are; 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def at_equal_tokens(a: Side, b: Side, points: int = POINTS) -> list[tuple[StepRecord, StepRecord]]:
    """Records of both, at most `points` pairs, spread evenly over the first's steps that both runs have come to."""
    if not a.records or not b.records:
        return []
    tokens = [r.tokens for r in b.records]
    low, high = max(a.records[0].tokens, tokens[0]), min(a.records[-1].tokens, tokens[-1])
    shared = [r for r in a.records if low <= r.tokens <= high] or [min(a.records, key=lambda r: abs(r.tokens - high))]
    last = len(shared) - 1
    chosen = sorted({round(i * last / (points - 1)) for i in range(points)}) if last else [0]
    return [(shared[i], b.records[_nearest(tokens, shared[i].tokens)]) for i in chosen]


def _nearest(ascending: Sequence[int], value: int) -> int:
    """Index of the number nearest to `value`, the smaller of two."""
    i = bisect.bisect_left(ascending, value)
    return min((j for j in (i - 1, i) if 0 <= j < len(ascending)), key=lambda j: (abs(ascending[j] - value), j))


def target(a: Side, b: Side) -> float | None:
    """The lowest loss (`SMOOTH`ed) that both runs have come down to; None where one has none."""
    lowest = [min(known, default=None) for known in ([v for _, v in smooth(side.records)] for side in (a, b))]
    return None if None in lowest else max(lowest)


def reached(side: Side, loss: float) -> Reached | None:
    """The first record at which the smoothed loss is not above `loss`."""
    for r, value in smooth(side.records):
        if value <= loss:
            return Reached(step=r.step, tokens=r.tokens, dollars=r.dollars, seconds=r.seconds)
    return None


def smooth(records: Sequence[StepRecord]) -> list[tuple[StepRecord, float]]:
    """Each record with the median loss of the last `SMOOTH` up to it (of fewer in a shorter run); what is no number is left out."""
    known = [r for r in records if math.isfinite(r.loss)]
    width = max(1, min(SMOOTH, len(known) // 3))
    return [(known[i], statistics.median(r.loss for r in known[i - width + 1 : i + 1])) for i in range(width - 1, len(known))]


def joined(a: Side, b: Side) -> tuple[list[str], list[list]]:
    """Header and rows of both curves, joined on the step; None where a run has not taken it. A loss that is no number stays so."""
    sides = [{r.step: r for r in side.records} for side in (a, b)]
    header = ["step", *(f"{name}_{letter}" for letter in "ab" for name in _CURVE)]
    value = lambda record, name: getattr(record, name) if record else None
    steps = sorted({*sides[0], *sides[1]})
    return header, [[step, *(value(side.get(step), name) for side in sides for name in _CURVE)] for step in steps]
