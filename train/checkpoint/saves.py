"""When a run saves, what came of it, and how long its loop stood still for it.

A save that a file system has no room for, or fails in, is told, and training goes on with the older checkpoints; but not the one with which
a run, a session or a phase ends.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from ...conf.schema import CheckpointConfig
from ...parallel.optimizer.zero import Chunk
from .. import units
from .checkpointer import Checkpointer, NoRoomError, SaveError

State = tuple[dict[str, Chunk], dict[str, Any]]  # chunks and `extra` of a checkpoint

RETRY_S = 60.0  # after a failure, where no save has told yet what one costs


class Saves:
    """Of one session, on one rank. All ranks make the same calls; `log` tells on one of them.

    `mttf_s`: seconds between failures of anything that stops the job.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        *,
        mttf_s: float,
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.checkpointer, self.config, self.mttf_s, self.log, self.clock = checkpointer, config, mttf_s, log, clock
        self.every_s: float | None = None  # between saves, where their cost has been measured and is to choose
        self._last, self._tried = clock(), False
        self._under_way: int | None = None  # an asynchronous save's step
        self._costs: list[float] = []  # of saves that succeeded: seconds that the loop stood still
        self._stood = self._untold = 0.0  # seconds: for this save; since the last record
        self._news: list[str] = []

    # ------------------------------------------------------------ when

    def signals(self) -> dict[str, float]:
        """What this rank tells the others in a step: that its clock says it is time (the first rank's counts), and that its part of the
        asynchronous save is over."""
        over = self._under_way is not None and not self.checkpointer.under_way()
        return {"save": float(self.checkpointer.is_first and self._is_time()), "saved": float(over)}

    def due(self, step: int, sums: dict[str, float], world_size: int) -> bool:
        """Whether to save after `step`, by what all ranks have told in it. An asynchronous save that is over everywhere is done with."""
        if sums["saved"] == world_size:
            self.finish()
        return bool(self.config.interval and step % self.config.interval == 0) or sums["save"] > 0

    def _is_time(self) -> bool:
        every = self.config.interval_seconds or math.inf
        if self.config.optimal_interval:
            every = self.every_s if self.every_s is not None else RETRY_S * self._tried
        return self._under_way is None and self.clock() - self._last >= every

    # ------------------------------------------------------------ doing it

    def save(self, step: int, state: Callable[[], State]) -> None:
        """Now, or begin to."""
        self.finish()
        self._last, self._tried, self._under_way, self._stood = self.clock(), True, step, 0.0
        with self._standing(), self._told():
            self.checkpointer.save(step, *state())
        if not self.config.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the asynchronous save, if any, and keep what came of it for the next record."""
        if self._under_way is None:
            return
        with self._standing(), self._told():
            self.checkpointer.wait()
        if self._under_way is not None:
            self._costs.append(self._stood)
            self._news.append(f"saved step {self._under_way}")
            self._under_way = None
            self._choose()

    def save_last(self, step: int, state: Callable[[], State]) -> None:
        """And wait for it. Raises SaveError where it fails twice."""
        self.finish()
        for last_trial in (False, True):
            try:
                with self._standing():
                    self.checkpointer.save(step, *state())
                    self.checkpointer.wait()
                self._news.append(f"saved step {step}")
                return
            except SaveError as error:
                if last_trial:
                    raise
                self.log(f"{error}; trying once more")

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        began = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - began
            self._stood += seconds
            self._untold += seconds

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A save that fails is over."""
        try:
            yield
        except SaveError as error:
            how = "skipped" if isinstance(error, NoRoomError) else "failed"
            self._news.append(f"{how} step {self._under_way}: {error}")
            self.log(f"checkpoint of step {self._under_way} {how}: {error}; training goes on, and older checkpoints stay")
            self._under_way = None

    # ------------------------------------------------------------ what it costs

    def _choose(self) -> None:
        """Young 1974: with C the cost of a save and M the time between failures, the least is lost with one every sqrt(2 C M). (Daly 2006
        has terms of higher order, which vanish where C is far below M.) But not sooner than the last one took."""
        if not self.config.optimal_interval:
            return
        cost, before = sum(self._costs) / len(self._costs), self.every_s
        self.every_s = max(math.sqrt(2 * cost * self.mttf_s), self.clock() - self._last)
        if before is None or abs(self.every_s / before - 1) > 0.2:
            self.log(
                f"a checkpoint costs {cost:.3g} s, and something stops this job every {units.duration(self.mttf_s)} on average: "
                f"saving every {units.duration(self.every_s)} from here on loses the least"
            )

    def news(self) -> dict[str, Any]:
        """Fields of a step's record: what came of saves since the last one, and how long the loop stood still for them."""
        told = {"checkpoint": "; ".join(self._news) or None, "checkpoint_seconds": self._untold or None}
        self._news, self._untold = [], 0.0
        return told
