"""What a run of the bench found, as data: the JSON file, the rates that follow from it, and the aims that they are held against."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...train import metrics
from .peers import BLOCK_WISE, ROW_WISE, TRANSFORMERS


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A configuration of ours, or a peer. `seconds`: median, None where it was not timed or did not run; then `why`. `db`: against the
    exact result, None where it cannot be compared, or is equal."""

    name: str
    seconds: float | None = None
    db: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One op on one shape. Times in seconds of one call: median, and the two quartiles. `db` is None where every number is equal, and where
    there is an `error`. `configs`: the first is what a launch takes; without tuning there are none."""

    op: str
    shape: str
    passed: bool
    least_db: float | None
    db: float | None = None
    error: str = ""
    flops: int = 0
    bytes: int = 0
    ceiling: str = "copy"
    published: float | None = None  # TFLOP/s
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    configs: list[Timed] = field(default_factory=list)
    peers: list[Timed] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """FLOP/s; bytes/s of what only moves memory."""
        return None if self.seconds is None else (self.bytes if self.ceiling == "copy" else self.flops) / self.seconds

    def ratio(self, peer: str) -> float | None:
        """How many times as fast as the peer of this name."""
        theirs = next((p.seconds for p in self.peers if p.name == peer), None)
        return None if theirs is None or self.seconds is None else theirs / self.seconds

    @property
    def best(self) -> Timed | None:
        """The fastest configuration that is right."""
        known = [c for c in self.configs if c.seconds is not None]
        return min(known, key=lambda c: c.seconds, default=None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """`ceilings`: what this device was measured to do at best, in FLOP/s (fp8, bf16) and bytes/s (copy); empty without times."""

    device: str
    timed: bool
    command: str
    date: str
    seconds: float
    versions: dict[str, str]
    commit: str | None
    ceilings: dict[str, float]
    rows: list[Row]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def share(self, row: Row) -> float | None:
        """Of the ceiling."""
        top = self.ceilings.get(row.ceiling)
        return None if top is None or row.rate is None else row.rate / top


def write(path: Path, results: Results) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace_file(path, json.dumps(dataclasses.asdict(results), indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Results:
    """Raises ValueError that says what is wrong with the file, OSError where it cannot be opened."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(plain, dict) or not isinstance(plain.get("rows"), list):
        raise ValueError("no list of rows: not a result of `shoestring bench kernels`")
    return metrics.from_plain(Results, plain | {"rows": [_row(row) for row in plain["rows"]]})


def _row(plain: Any) -> Row:
    if not isinstance(plain, dict):
        raise ValueError(f"no row: {str(plain)[:60]}")
    timed = {name: [metrics.from_plain(Timed, t) for t in plain.get(name, ())] for name in ("configs", "peers")}
    return metrics.from_plain(Row, plain | timed)


# ---------------------------------------------------------------- aims


@dataclass(frozen=True, kw_only=True)
class Aim:
    """`value`: what was found, in the unit of `least`."""

    what: str
    least: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.least


def aims(results: Results) -> Iterator[Aim]:
    """On Hopper. Only those of which something was measured."""
    rows = [row for row in results.rows if row.seconds is not None]
    products = [row for row in rows if row.op.startswith("fp8 ") and row.op.endswith(("fprop", "dgrad"))]
    published = [row.rate / 1e12 / row.published for row in rows if row.published]
    wgrads = [row for row in rows if row.op.startswith("fp8 ") and row.op.endswith("wgrad")]
    layers = [row for row in rows if row.op.startswith("moe layer fp8")]
    groups = [
        ("FP8 fprop and dgrad: times torch's block-wise, worst", 1.0, [row.ratio(BLOCK_WISE) for row in products]),
        ("FP8 fprop and dgrad: times torch's row-wise, worst", 0.8, [row.ratio(ROW_WISE) for row in products]),
        ("FP8 fprop: share of DeepGEMM's published rates on an H800, worst", 0.65, published),
        ("FP8 wgrad: TFLOP/s, worst", 600.0, [row.rate / 1e12 for row in wgrads]),
        ("memory-bound: share of a large copy's rate, worst", 0.85, [results.share(row) for row in rows if row.ceiling == "copy"]),
        ("MoE layer in FP8: times transformers' grouped experts", 1.5, [row.ratio(TRANSFORMERS) for row in layers]),
    ]  # fmt: skip
    for what, least, values in groups:
        known = [value for value in values if value is not None]
        if known:
            yield Aim(what=what, least=least, value=min(known))
    if published:
        mean = math.exp(statistics.fmean(map(math.log, published)))
        yield Aim(what="FP8 fprop: share of DeepGEMM's published rates on an H800, geometric mean", least=0.8, value=mean)
