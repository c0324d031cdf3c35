"""What is still to come, projected: seconds, dollars and date to the run's end, and where each limit is met, from what an account has seen.

    a step        its tokens x a token's FLOPs of its phase / its devices, at the pace (seconds per FLOP) of the last steps of the last
                  phase: the median of windows of 16 steps, and their 5th and 95th percentile
    beside steps  evaluation, saves and idling at what they have cost per second of steps, over the whole run; lost work, restarts and
                  starts after the first likewise: at the low end there are no more of them, at the high end as many as the 95 % limit of
                  a Poisson process that brought that number

Everything here is a projection, and is to be called so wherever it is shown.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from ..conf.phases import Phase, num_steps, phases
from ..conf.schema import Config
from . import cost, waterfall
from .account import Account, Held
from .budget import seconds_until

WINDOW = 16  # steps
THE_END = "the end"


@dataclass(frozen=True, kw_only=True)
class Range:
    """5th percentile, median, 95th. None: not before the run's end."""

    low: float | None
    middle: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Met:
    """A limit of the run: at which step, and when (seconds since 1970), it is reached. Training stops a step or two before."""

    name: str
    limit: float  # dollars, GPU-hours, tokens; seconds since 1970
    so_far: float
    step: Range
    time_unix: Range


@dataclass(frozen=True, kw_only=True)
class Projection:
    """From `step` on. What is left to the end; `total_dollars` with what is spent. `first`: what comes first, a limit's name or the end."""

    step: int
    steps: int
    basis: str
    seconds: Range
    dollars: Range
    gpu_hours: Range
    total_dollars: Range
    ends_unix: Range
    limits: tuple[Met, ...]
    first: str


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Steps that are alike. `work`: FLOPs of a step and device; dollars and devices of a second."""

    num_steps: int
    batch_tokens: int
    work: float
    dollars: float
    devices: int


def projection(config: Config, account: Account) -> Projection | None:
    """`config`: the run's, all phases. None as long as no step was kept."""
    if account.last is None:
        return None
    now, step, last_step = account.last.time_unix, account.last.step, num_steps(config)
    ahead, spent, held = _ahead(config, step), waterfall.of(account), account.held()[0]
    paces, basis = _paces(config, account, held)
    total = lambda worth: [math.fsum(s.num_steps * s.work * pace * worth(s) for s in ahead) for pace in paces]
    seconds, dollars = total(lambda s: 1.0), total(lambda s: s.dollars)
    limits = []
    for name, limit, so_far, worth in (
        ("budget_usd", config.budget_usd, spent.dollars, lambda s, pace: s.work * pace * s.dollars),
        ("budget_gpu_hours", config.budget_gpu_hours, spent.gpu_hours, lambda s, pace: s.work * pace * s.devices / 3600),
        ("max_tokens", config.max_tokens, account.tokens, lambda s, pace: s.batch_tokens),
        ("deadline", now + seconds_until(config.deadline, now) if config.deadline else 0.0, now, lambda s, pace: s.work * pace),
    ):
        if limit:
            reached = [_reach(ahead, limit - so_far, worth, pace) for pace in paces]
            at, when = ([None if r is None else begin + r[i] for r in reached] for i, begin in ((0, step), (1, now)))
            limits.append(Met(name=name, limit=limit, so_far=so_far, step=_range(at), time_unix=_range(when)))
    met = [(m.time_unix.middle, m.name) for m in limits if m.time_unix.middle is not None]
    return Projection(
        step=step, steps=last_step, basis=basis, seconds=_range(seconds), dollars=_range(dollars),
        gpu_hours=_range(total(lambda s: s.devices / 3600)), total_dollars=_range([spent.dollars + d for d in dollars]),
        ends_unix=_range([now + s for s in seconds]), limits=tuple(limits), first=min(met)[1] if met else THE_END,
    )  # fmt: skip


def _ahead(config: Config, step: int) -> list[_Stretch]:
    """What is left after `step` steps."""
    found = []
    for phase in phases(config):
        for level in phase.levels:
            end = phase.first_step + level.first_step + level.num_steps
            if (left := min(level.num_steps, end - step)) > 0:
                c, devices = phase.config, cost.num_devices(phase.config)
                found.append(_Stretch(
                    num_steps=left, batch_tokens=level.batch_tokens, work=_work(phase, level.batch_tokens), devices=devices,
                    dollars=cost.dollars(1.0, devices, c.cluster),
                ))  # fmt: skip
    return found


def _work(phase: Phase, batch_tokens: int) -> float:
    c = phase.config
    return cost.train_flops(c.model, c.data.seq_len, batch_tokens) / cost.num_devices(c)


def _paces(config: Config, account: Account, held: Sequence[Held]) -> tuple[list[float], str]:
    """Seconds per FLOP of a device, with all that comes beside steps: low, middle, high; and what they are from."""
    made = {phase.name: phase for phase in phases(config)}
    phase = made.get(account.last.phase, next(iter(made.values())))
    recent = [p for p in account.recent if p.phase == account.last.phase and p.batch_tokens > 0]
    of_step = [p.seconds / _work(phase, p.batch_tokens) for p in recent]
    size = max(1, min(WINDOW, len(of_step) // 8))
    each = iter(of_step[len(of_step) % size :])
    windows = sorted(statistics.fmean(part) for part in iter(lambda: list(islice(each, size)), [])) or [0.0]
    beside = _beside(held)
    paces = [_quantile(windows, q) * share for q, share in zip((0.05, 0.5, 0.95), beside)]
    return paces, f"projected from the last {len(of_step)} steps, in windows of {size}; beside steps {100 * (beside[1] - 1):.1f} %"


def _beside(held: Sequence[Held]) -> tuple[float, float, float]:
    """What a second of steps takes of the run's: as scheduled; with failures as they came; with as many as there may be."""
    total = lambda *names: math.fsum(h.seconds[name] for h in held for name in names)
    steps = total(*waterfall.TRACED, "data", "not divided", "idle")
    if steps <= 0:
        return 1.0, 1.0, 1.0
    scheduled = 1 + total("evaluation", "checkpoint", "rest") / steps
    failures = (total("restart", "lost") + math.fsum(h.seconds["start"] for h in held[1:])) / steps
    count = len(held) - 1
    return scheduled, scheduled + failures, scheduled + (failures * most_failures(count) / count if count else 0.0)


def most_failures(count: int) -> float:
    """The upper 95 % limit of the mean of a Poisson process that brought `count`: half of chi-square's quantile at 2 (count + 1) degrees of
    freedom, as Wilson and Hilferty (1931) have it."""
    n = count + 1
    return n * (1 - 1 / (9 * n) + 1.6449 / (3 * math.sqrt(n))) ** 3


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _reach(ahead: Sequence[_Stretch], left: float, worth: Callable[[_Stretch, float], float], pace: float) -> tuple[float, float] | None:
    """(steps, seconds) until `left` is used up at `worth` a step; None where the run is over before."""
    steps = seconds = 0.0
    if left <= 0:
        return steps, seconds
    for s in ahead:
        each = worth(s, pace)
        if each > 0 and left <= each * s.num_steps:
            whole = math.floor(left / each)
            return steps + whole, seconds + left / each * s.work * pace
        left -= each * s.num_steps
        steps, seconds = steps + s.num_steps, seconds + s.num_steps * s.work * pace
    return None


def _range(values: Sequence[float | None]) -> Range:
    low, middle, high = sorted(values, key=lambda value: math.inf if value is None else value)
    return Range(low=low, middle=middle, high=high)
