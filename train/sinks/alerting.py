"""Alerts: a thread looks at each step's record by the rules, sends what they say, and watches for steps that do not come."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ...conf.schema import Config
from .. import units
from ..alerts.alert import Alert, begun
from ..alerts.channels import Channel
from ..alerts.rules import rules
from ..metrics import StepRecord
from .sink import Sink

CLOSE_S = 10.0  # that the end of a run waits for alerts to go out
STEPS = 16  # of which the longest counts


class AlertSink(Sink):
    """Of each kind, an episode is told when it begins and when it is over, however often the run is started again meanwhile."""

    hint = "launch.alerts has what it watches and where it tells."

    def __init__(self, config: Config, run_dir: Path, channels: Sequence[Channel], *, clock: Callable[[], float] = time.monotonic):
        self._name, self._stall_s, self._channels, self._clock = config.name, config.launch.alerts.stall_s, list(channels), clock
        self._rules = rules(config, run_dir)
        self._episodes = set(begun(run_dir))
        self._last: StepRecord | None = None
        self._came, self._gaps = clock(), deque(maxlen=STEPS)  # when the last record did, and how long the ones before took
        self._heard: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
        self._thread.start()

    def _write(self, record):
        self._heard.put((self._look, record, self._clock()))

    def _trouble(self, kind, text):
        self._heard.put((self._now, kind, text, ""))

    def _close(self):
        """With what is under way, if it goes out soon."""
        self._heard.put(None)
        self._thread.join(CLOSE_S)

    # ------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while True:
            try:
                heard = self._heard.get(timeout=self._until_stall())
            except queue.Empty:
                self._look_for_stall()
                continue
            if heard is None:
                return
            act, *what = heard
            self._guard(act, *what)

    def _look(self, record: StepRecord, now: float) -> None:
        took = now - self._came
        if self._last is not None:  # the first one waits for the start
            self._gaps.append(took)
        self._came, self._last = now, record
        self._now("stall", "", f"step {record.step} has come, after {units.duration(took)}")
        for kind in ("failure", "rollback"):
            self._now(kind, "", f"the run goes on: step {record.step}")
        for rule in self._rules:
            found = rule.look(record, rule.kind in self._episodes)
            if found is not None:
                self._now(rule.kind, found and f"step {record.step}: {found}", f"step {record.step}: {rule.kind} is as it should be")

    def _until_stall(self) -> float:
        """At most a minute: the wait is by another clock than this one."""
        return min(60.0, max(0.05, self._came + self._patience - self._clock())) if self._stall_s else 60.0

    @property
    def _patience(self) -> float:
        return max(self._stall_s, 5 * max(self._gaps, default=0.0))

    def _look_for_stall(self) -> None:
        quiet = self._clock() - self._came
        if self._stall_s and quiet >= self._patience:
            last = f"since step {self._last.step}" if self._last else "since the session began"
            self._now("stall", f"no step for {units.duration(quiet)}, {last}", "")

    def _now(self, kind: str, trouble: str, over: str) -> None:
        """An episode begins, ends or goes on."""
        if bool(trouble) == (kind in self._episodes):
            return
        self._episodes ^= {kind}
        r = self._last
        where = dict(step=r.step, tokens=r.tokens, seconds=r.seconds, dollars=r.dollars) if r else {}
        alert = Alert(run=self._name, kind=kind, firing=bool(trouble), text=trouble or over, time_unix=time.time(), **where)
        for channel in self._channels:
            channel.send(alert)
