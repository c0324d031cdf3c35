"""The clock is a made-up one: what is asked of it, and what becomes of its answers."""

import pytest
from shoestring.launch.bench.timing import BATCH, LEAST_CALLS, MOST_CALLS, measure


class FakeClock:
    """`device` is the device's time: calls move it. Every `ahead` costs the device a second, which no measurement may contain."""

    def __init__(self):
        self.device, self.host_time, self.aheads = 0.0, 0.0, []

    def ahead(self, seconds):
        self.aheads.append(seconds)
        self.device += 1.0

    def mark(self):
        return self.device

    def seconds(self, first, second):
        return second - first

    def host(self):
        self.host_time += 0.25e-3
        return self.host_time


def op(clock, durations):
    """A call that takes the next of `durations`, the last one for ever; and what it was called with."""
    seen, left = [], list(durations)

    def call(name):
        seen.append(name)
        clock.device += left.pop(0) if len(left) > 1 else left[0]

    return call, seen


def test_the_median_of_calls_alone():
    clock = FakeClock()
    call, _ = op(clock, [50.0, 50.0, 50.0, *[1e-3, 3e-3, 2e-3] * 100])  # two inputs and one more to warm up: slow, and not counted
    timing = measure(call, [("a",), ("b",)], clock, seconds=0.1)
    assert (timing.low, timing.median, timing.high) == pytest.approx((1e-3, 2e-3, 3e-3))


def test_inputs_take_turns_and_the_device_is_kept_busy():
    clock = FakeClock()
    call, seen = op(clock, [1e-3])
    timing = measure(call, [("a",), ("b",), ("c",)], clock, seconds=0.05)
    counted = seen[-timing.calls :]
    assert set(seen[: -timing.calls - 1]) == {"a", "b", "c"}  # each shape and layout has been compiled before
    assert counted == [("abc"[i % 3]) for i in range(timing.calls)]
    assert len(clock.aheads) == -(-timing.calls // BATCH)
    assert clock.aheads[0] == pytest.approx(1.5 * 0.25e-3 * BATCH)  # what the host takes to queue a batch, and half as much again


@pytest.mark.parametrize(("duration", "calls"), [(10.0, LEAST_CALLS), (1e-9, MOST_CALLS), (5e-3, 20)])  # long, short, between
def test_how_many_calls(duration, calls):
    clock = FakeClock()
    assert measure(op(clock, [duration])[0], [("a",)], clock, seconds=0.1).calls == calls
