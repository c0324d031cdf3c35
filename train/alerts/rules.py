"""What is looked at after every step. A rule says what is wrong, or "" where all is well, or None where it cannot tell (yet).

loss       a loss or gradient norm that is not finite, or far above the last ones
balance    MaxVio of the worst layer, median of the last steps, above a limit
speed      MFU, median of the last steps and at least a minute, far below the run's own median
budget     a share of a limit is spent
disk       there is room for few further checkpoints

Each ends later than it begins, so that what hovers at a limit is told once.
"""

import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from ...conf.schema import AlertsConfig, Config, GuardConfig
from .. import units
from ..budget import seconds_until
from ..checkpoint.folder import find_latest
from ..guard import Guard
from ..metrics import StepRecord

LEAST_S = 60.0  # over which a speed is told
CALM = 0.8  # of a limit, below which an episode is over
DISK_EVERY_S = 30.0


class Rule:
    """`kind`: of its episodes."""

    kind: str

    def look(self, record: StepRecord, firing: bool) -> str | None:
        """After each step. `firing`: an episode has begun, and the answer "" ends it."""
        raise NotImplementedError


class Loss(Rule):
    """What the run's own guard would not have taken; it looks with this rule's threshold."""

    kind = "loss"

    def __init__(self, alerts: AlertsConfig):
        self._guard = Guard(GuardConfig(spike=alerts.loss_spike, window=alerts.window))
        self._strange = 0

    def look(self, record, firing):
        trouble = self._guard.trouble(record.loss, record.grad_norm)
        self._strange = self._strange + 1 if trouble else 0
        if self._strange > self._guard.config.window:  # that is how it is now
            self._guard.begin()
        if not trouble:
            self._guard.taken(record.loss, record.grad_norm)
        return trouble or ""


class Balance(Rule):
    kind = "balance"

    def __init__(self, alerts: AlertsConfig):
        self._limit, self._last = alerts.max_vio, deque(maxlen=alerts.window)

    def look(self, record, firing):
        if not record.max_vio:
            return None
        self._last.append(max(record.max_vio))
        if len(self._last) < self._last.maxlen:
            return None
        median, layer = statistics.median(self._last), record.max_vio.index(max(record.max_vio))
        if median <= self._limit * (CALM if firing else 1.0):
            return ""
        return (f"MaxVio of the worst layer is {median:.3g}, median of {len(self._last)} steps; the limit is {self._limit:g}. "
                f"Now it is MoE layer {layer}: its busiest expert has {1 + max(record.max_vio):.3g} times the mean load")  # fmt: skip


class Speed(Rule):
    """Against the run itself, since it was started, at this sequence length."""

    kind = "speed"

    def __init__(self, alerts: AlertsConfig):
        self._drop, self._window = alerts.mfu_drop, alerts.window
        self._of: tuple | None = None

    def look(self, record, firing):
        if record.mfu is None:
            return None
        if self._of != (of := (record.session, record.phase, record.seq_len)):
            self._of, self._recent, self._before = of, deque(), deque(maxlen=1024)
        self._recent.append((record.step_seconds, record.mfu))
        seconds = sum(step for step, _ in self._recent)
        while len(self._recent) > self._window and seconds - self._recent[0][0] >= LEAST_S:
            took, mfu = self._recent.popleft()
            seconds -= took
            if not firing:
                self._before.append(mfu)
        if len(self._before) < self._window:
            return None
        now, usual = statistics.median(mfu for _, mfu in self._recent), statistics.median(self._before)
        if now >= usual * (1 - self._drop * (CALM if firing else 1.0)):
            return ""
        return f"MFU is {units.percent(now)}, median of the last {units.duration(seconds)}; it was {units.percent(usual)}"


class Spent(Rule):
    """A share of one limit. Of several, the highest that is reached is told."""

    def __init__(self, name: str, share: float, upto: float, used: Callable[[StepRecord], float], amount: Callable[[StepRecord], str]):
        self.kind, self._name, self._shares, self._used, self._amount = f"{name} {share:.0%}", name, (share, upto), used, amount

    def look(self, record, firing):
        used = self._used(record)
        if used >= self._shares[1]:
            return None
        return f"{100 * self._shares[0]:g} % of {self._name} is spent: {self._amount(record)}" if used >= self._shares[0] else ""


class Disk(Rule):
    """Free room against the size of the newest checkpoint."""

    kind = "disk"

    def __init__(self, alerts: AlertsConfig, run_dir: Path, clock: Callable[[], float] = time.monotonic):
        self._least, self._run_dir, self._clock = alerts.disk_checkpoints, run_dir, clock
        self._looked = -DISK_EVERY_S
        self._sizes: dict[Path, int] = {}

    def look(self, record, firing):
        if self._clock() - self._looked < DISK_EVERY_S:
            return None
        self._looked = self._clock()
        newest = find_latest(self._run_dir / "checkpoints")
        if newest is None:
            return None
        if newest not in self._sizes:
            self._sizes = {newest: sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())}
        size, free = self._sizes[newest], shutil.disk_usage(self._run_dir).free
        if free >= size * self._least / (CALM if firing else 1.0):
            return ""
        return f"{free / 1e9:.3g} GB are free in {self._run_dir}: room for {free / max(1, size):.1f} checkpoints of {size / 1e9:.3g} GB"


def rules(config: Config, run_dir: Path) -> list[Rule]:
    """Those that are asked for."""
    alerts = config.launch.alerts
    made = (alerts.loss_spike and Loss(alerts), alerts.max_vio and Balance(alerts), alerts.mfu_drop and Speed(alerts),
            alerts.disk_checkpoints and Disk(alerts, run_dir))  # fmt: skip
    return [rule for rule in made if rule] + list(_budget(config))


def _budget(c: Config) -> Iterable[Rule]:
    limits = []
    if c.budget_usd:
        limits.append(("budget_usd", lambda r: r.dollars / c.budget_usd,
                       lambda r: f"{units.money(r.dollars)} of {units.money(c.budget_usd)}"))  # fmt: skip
    if c.budget_gpu_hours:
        limits.append(("budget_gpu_hours", lambda r: (r.gpu_hours or 0.0) / c.budget_gpu_hours,
                       lambda r: f"{r.gpu_hours:,.4g} GPU-hours of {c.budget_gpu_hours:,.4g}"))  # fmt: skip
    if c.max_tokens:
        limits.append(("max_tokens", lambda r: r.tokens / c.max_tokens,
                       lambda r: f"{units.count(r.tokens)} tokens of {units.count(c.max_tokens)}"))  # fmt: skip
    if c.deadline:
        limits.append(("deadline", *_deadline(c.deadline)))
    for name, used, amount in limits:
        shares = sorted(c.launch.alerts.budget)
        for share, upto in zip(shares, [*shares[1:], float("inf")]):
            yield Spent(name, share, upto, used, amount)


def _deadline(deadline: str, clock: Callable[[], float] = time.monotonic):
    """Of this session's time until then; its wall clock is read once."""
    began, whole = clock(), max(1e-9, seconds_until(deadline, time.time()))
    gone = lambda: clock() - began
    return lambda record: gone() / whole, lambda record: f"{units.duration(max(0.0, whole - gone()))} are left"
