"""Median device time of a call, on inputs that change from call to call.

All calls of a batch are queued behind other work, so that the device never waits for Python: what lies between two events is the device's
time alone. The clock is handed in, and tests have one of their own.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

BATCH, LEAST_CALLS, MOST_CALLS = 16, 10, 200


class Clock(Protocol):
    def ahead(self, seconds: float) -> None:
        """Give the device other work for at least so long."""

    def mark(self) -> Any:
        """A point in the device's time, after all that was called before."""

    def seconds(self, first: Any, second: Any) -> float:
        """Between two marks. Waits for the second."""

    def host(self) -> float:
        """The host's time in seconds."""


class DeviceClock:
    """Events of the current CUDA device."""

    def __init__(self):
        self._matrix = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")
        self._out = torch.empty_like(self._matrix)
        self._busy_seconds = 0.0
        for _ in range(3):
            first = self.mark()
            self._work(8)
            self._busy_seconds = self.seconds(first, self.mark()) / 8

    def _work(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._matrix, self._matrix, out=self._out)

    def ahead(self, seconds: float) -> None:
        self._work(1 + min(1000, int(seconds / self._busy_seconds)))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    def host(self) -> float:
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: the median, and the lower and upper quartile, of `calls`."""

    median: float
    low: float
    high: float
    calls: int


def measure(call: Callable[..., Any], inputs: Sequence[tuple], clock: Clock, *, seconds: float = 0.1) -> Timing:
    """Of `call(*args)` with each of `inputs` in turn, for about `seconds` of device time. First calls, which compile, do not count."""
    for args in (*inputs, inputs[0]):
        call(*args)
    began, first = clock.host(), clock.mark()
    call(*inputs[0])
    host, second = clock.host() - began, clock.mark()
    once = max(clock.seconds(first, second), 1e-7)
    wanted = max(LEAST_CALLS, min(MOST_CALLS, int(seconds / once)))
    taken = []
    while len(taken) < wanted:
        size = min(BATCH, wanted - len(taken))
        clock.ahead(1.5 * host * size)
        marks = []
        for i in range(size):
            before = clock.mark()
            call(*inputs[(len(taken) + i) % len(inputs)])
            marks.append((before, clock.mark()))
        taken += [clock.seconds(*pair) for pair in marks]
    low, median, high = statistics.quantiles(taken, n=4)
    return Timing(median=median, low=low, high=high, calls=len(taken))
