"""Where each dollar of a run went: thirteen parts, and what cannot be divided, which add up to all that was spent.

compute .. data   of the steps that were kept, by what traced steps tell (`parallel/trace_divide.py` has each one's definition)
not divided       seconds of steps of a phase and layout in which no step was traced (launch.trace_interval)
evaluation        held-out losses                checkpoint   the loop stood still for a save
start             from a session's begin to its first step
restart           from a session's last sign of life (its last record) to the next one's begin, while both are one job's
lost work         steps that a restart, or going back, made undone
idle              what is left: between a step's parts, between steps, after the last one; it takes the rounding
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ..conf.compose import load_saved
from .account import Account

EACH = "measured in each step"
REST = "what is left"
NAMES = {
    "compute": "compute", "recompute": "recompute", "exchange": "exposed all-to-all", "bubble": "bubble", "imbalance": "imbalance",
    "update": "update", "data": "data", "not divided": "steps, not divided", "evaluation": "evaluation", "checkpoint": "checkpoint",
    "start": "start", "restart": "restart", "lost": "lost work", "idle": "idle",
}  # fmt: skip  # by key, in order
TRACED = ("compute", "recompute", "exchange", "bubble", "imbalance", "update")  # known from traced steps alone
INSIDE_KERNELS = ("norm", "mla_up", "swiglu")  # of train.recompute: no span of their own


@dataclass(frozen=True, kw_only=True)
class Part:
    """`source`: "measured in each step", "from N traced steps", or "what is left". Seconds of the whole job, not of one device."""

    name: str
    seconds: float
    dollars: float
    gpu_hours: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    """Of what is on disk: up to the last record, or the end. `parts` in the order of `NAMES`, always all; none is negative."""

    parts: tuple[Part, ...]
    tokens: int  # trained, each once
    steps: int  # kept
    traced: int  # of those
    notes: tuple[str, ...]

    @property
    def dollars(self) -> float:
        return math.fsum(part.dollars for part in self.parts)

    @property
    def seconds(self) -> float:
        return math.fsum(part.seconds for part in self.parts)

    @property
    def gpu_hours(self) -> float:
        return math.fsum(part.gpu_hours for part in self.parts)

    @property
    def dollars_per_billion_tokens(self) -> float | None:
        """Everything that was paid for, over the tokens that stayed; None without any. (Records have that of their step's speed.)"""
        return self.dollars / self.tokens * 1e9 if self.tokens > 0 else None

    def __getitem__(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)


def waterfall(run_dir: Path) -> Waterfall:
    """Of a run directory, as it is now: live, killed or half written. Reads all its records: a dashboard feeds an `Account` as it goes."""
    return of(Account.of(Path(run_dir)), recomputes(Path(run_dir)))


def of(account: Account, recompute: tuple[str, ...] = ()) -> Waterfall:
    """Of what the account has been fed so far. `recompute`: the run's `train.recompute`, for a note."""
    held, notes = account.held()
    amounts = {}
    for unit, worth in (("seconds", lambda h: 1.0), ("dollars", lambda h: h.dollars), ("gpu_hours", lambda h: h.devices / 3600)):
        of_part = {key: math.fsum(h.seconds[key] * worth(h) for h in held) for key in NAMES if key != "idle"}
        whole = math.fsum(math.fsum(h.seconds.values()) * worth(h) for h in held)
        amounts[unit] = of_part | {"idle": max(0.0, whole - math.fsum(of_part.values()))}
    parts = tuple(
        Part(name=name, source=_source(key, account), **{unit: amounts[unit][key] for unit in amounts}) for key, name in NAMES.items()
    )
    inside = [name for name in recompute if name in INSIDE_KERNELS]
    if inside and account.traced:
        notes = [*notes, f"recompute of {', '.join(inside)} happens inside kernels: it is in compute"]
    if account.traced and amounts["seconds"]["not divided"]:
        notes = [*notes, "steps of a phase or layout without a traced step are not divided"]
    return Waterfall(parts=parts, tokens=account.tokens, steps=account.steps, traced=account.traced, notes=tuple(notes))


def recomputes(run_dir: Path) -> tuple[str, ...]:
    """`train.recompute` of a run's saved settings, those of all its phases; none where they cannot be read."""
    try:
        config = load_saved(run_dir / "config.yaml")
        return tuple(sorted({name for c in (config.phases or {"": config}).values() for name in c.train.recompute}))
    except Exception:  # half a configuration, or another version's, fails in as many ways as there are
        return ()


def _source(key: str, account: Account) -> str:
    if key == "idle":
        return REST
    if key not in TRACED:
        return EACH
    return f"from {account.traced} traced step{'s' * (account.traced != 1)}"
