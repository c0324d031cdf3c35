"""What a run may cost: dollars, GPU-hours, tokens, a deadline. It saves and stops, before more is spent.

It stops as soon as a further step, with its evaluation and its save, might not be paid for: at what the dearest of the last ones cost.
`train/alerts/rules.py` tells of it before, at fractions.
"""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..conf.errors import ConfigError
from ..conf.schema import Config
from . import cost, units


def seconds_until(deadline: str, now: float) -> float:
    """`deadline`: ISO 8601, such as 2026-12-24T18:00+01:00, local time where it has no offset; `now`: seconds since 1970."""
    try:
        moment = datetime.datetime.fromisoformat(deadline)
    except ValueError:
        example = datetime.datetime.fromtimestamp(now + 86400).astimezone().isoformat(timespec="minutes")
        raise ConfigError("deadline", deadline, "is no date and time of ISO 8601", example) from None
    return moment.astimezone().timestamp() - now


@dataclass(frozen=True, kw_only=True)
class Limit:
    """`show` tells an amount; `per_second`: what holding the devices for a second adds."""

    name: str
    limit: float
    per_second: float
    show: Callable[[float], str]


class Budget:
    """Of one session, on the rank that decides. The wall clock is read once, at its start, for how far the deadline is; from then on the
    monotonic clock counts: a wall clock that is set changes nothing until the next session, which believes it anew."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic):
        self._clock, self._began = clock, clock()
        devices, price = cost.num_devices(config), cost.dollars(1.0, cost.num_devices(config), config.cluster)
        hours = lambda value: f"{value:,.4g} GPU-hours"
        limits = (
            Limit(name="budget_usd", limit=config.budget_usd, per_second=price, show=units.money),
            Limit(name="budget_gpu_hours", limit=config.budget_gpu_hours, per_second=devices / 3600, show=hours),
        )
        self._limits = [limit for limit in limits if limit.limit]
        self._left_s = seconds_until(config.deadline, time.time()) if config.deadline else None
        self._steps: list[float] = []

    def step_took(self, seconds: float) -> None:
        """With all that belongs to it: evaluation, a save."""
        self._steps = [*self._steps[-15:], seconds]

    def spent(self, **so_far: float) -> str | None:
        """Why no step can be paid for after the next; None where one can. `so_far`: of each limit's name what the run has spent."""
        ahead = 2 * max(self._steps, default=0.0)
        for limit in self._limits:
            spent = so_far[limit.name]
            if spent + ahead * limit.per_second > limit.limit:
                return f"{limit.name}={limit.limit:g}: {limit.show(spent)} are spent"
        if self._left_s is not None and self._clock() - self._began + ahead > self._left_s:
            return "deadline: the step after the next would end too late"
        return None
