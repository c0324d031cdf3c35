"""Alerts: each step's record goes by the rules; a thread sends what they say, and watches for steps that do not come."""

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
        self._lock = threading.Lock()
        self._since, self._gaps = clock(), deque(maxlen=STEPS)
        self._out: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_and_watch, name="alerts", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ told by training

    def _write(self, record):
        with self._lock:
            now = self._clock()
            if self._last is not None:
                self._gaps.append(now - self._since)
            quiet, self._since, self._last = now - self._since, now, record
            self._now("stall", "", f"step {record.step} has come, after {units.duration(quiet)}")
            for kind in ("failure", "rollback"):
                self._now(kind, "", f"the run goes on: step {record.step}")
            for rule in self._rules:
                found = rule.look(record, rule.kind in self._episodes)
                if found is not None:
                    self._now(rule.kind, found and f"step {record.step}: {found}", f"step {record.step}: {rule.kind} is as it should be")

    def _trouble(self, kind, text):
        with self._lock:
            self._now(kind, text, "")

    def _now(self, kind: str, trouble: str, over: str) -> None:
        """An episode begins, ends or goes on."""
        if bool(trouble) == (kind in self._episodes):
            return
        self._episodes ^= {kind}
        r = self._last
        where = dict(step=r.step, tokens=r.tokens, seconds=r.seconds, dollars=r.dollars) if r else {}
        self._out.put(Alert(run=self._name, kind=kind, firing=bool(trouble), text=trouble or over, time_unix=time.time(), **where))

    # ------------------------------------------------------------ the thread

    def _send_and_watch(self) -> None:
        while True:
            try:
                alert = self._out.get(timeout=self._until_stall())
            except queue.Empty:
                self._look_for_stall()
                continue
            if alert is None:
                return
            for channel in self._channels:
                channel.send(alert)

    @property
    def _patience(self) -> float:
        return max(self._stall_s, 5 * max(self._gaps, default=0.0))

    def _until_stall(self) -> float:
        """At least a little, at most a minute: the clock may be set while this waits."""
        with self._lock:
            return min(60.0, max(0.05, self._since + self._patience - self._clock())) if self._stall_s else 60.0

    def _look_for_stall(self) -> None:
        with self._lock:
            quiet = self._clock() - self._since
            if self._stall_s and quiet >= self._patience:
                last = f"since step {self._last.step}" if self._last else "since the session began"
                self._now("stall", f"no step for {units.duration(quiet)}, {last}", "")

    def _close(self):
        """With what is under way, if it goes out soon."""
        self._out.put(None)
        self._thread.join(CLOSE_S)
