"""What is projected: exact where every step is like the last, zero where nothing is left, wide where steps were uneven."""

import dataclasses
import datetime
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.phases import num_steps
from shoestring.train import cost
from shoestring.train.account import Account
from shoestring.train.projection import most_failures, projection
from shoestring.train.sessions import Began

from .sinks.made import record

BASE = ["model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "optim.warmup_steps=2"]
NOW = 1.7e9
SECOND = 20.0  # dollars, of two devices


def config(*words):
    return load([*BASE, "parallel.ep=2", "launch.threads=1", "cluster.price_per_gpu_hour=36000", *words])


def ran(times, *, phase="main", batch=64, sessions=1, beside=0.0):
    """An account of steps that took so long, `beside` seconds apart."""
    account, held = Account(), 0.0
    account.note(Began(session=0, job="", time_unix=0.0, seconds=0.0, devices=2, dollars=SECOND))
    for number, took in enumerate(times, 1):
        held += took + beside * (number > 1)
        account.take(record(step=number, tokens=batch * number, batch_tokens=batch, step_seconds=took, seconds=held, phase=phase,
                            time_unix=NOW, session=0))  # fmt: skip
    return account


def every(value):
    return pytest.approx((value, value, value), rel=1e-9)


def three(found):
    return found.low, found.middle, found.high


@given(st.integers(1, 60), st.integers(0, 200), st.floats(1e-3, 1e4), st.sampled_from([0.0, 0.5]))
def test_constant_steps(done, left, took, beside):
    """The interval is the exact value; with nothing left it is zero."""
    c = config("train.steps=100")
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, steps=done + left))
    found = projection(c, ran([took] * done, beside=beside * took))
    per_step = took + beside * took * (done - 1) / done
    assert three(found.seconds) == every(left * per_step)
    assert three(found.dollars) == every(left * per_step * SECOND) and three(found.gpu_hours) == every(left * per_step * 2 / 3600)
    assert three(found.total_dollars) == every(left * per_step * SECOND + (done * took + (done - 1) * beside * took) * SECOND)
    assert three(found.ends_unix) == every(NOW + left * per_step)
    assert (found.step, found.steps, found.first, found.limits) == (done, done + left, "the end", ())


def test_limits_and_which_comes_first():
    """Ten steps of two seconds cost $400; ninety are left."""
    deadline = datetime.datetime.fromtimestamp(NOW + 150, datetime.UTC).isoformat()
    c = config("train.steps=100", "budget_usd=2010", "budget_gpu_hours=1", "max_tokens=6000", f"deadline='{deadline}'")
    found = projection(c, ran([2.0] * 10))
    limits = {limit.name: limit for limit in found.limits}
    assert three(limits["budget_usd"].step) == every(10 + 40) and three(limits["budget_usd"].time_unix) == every(NOW + 80.5)
    assert limits["budget_usd"].so_far == pytest.approx(400) and limits["budget_gpu_hours"].so_far == pytest.approx(40 / 3600)
    assert three(limits["budget_gpu_hours"].step) == (None, None, None), "3560 GPU-seconds are 890 steps"
    assert three(limits["max_tokens"].step) == every(10 + (6000 - 640) // 64)
    assert three(limits["deadline"].step) == every(10 + 75)
    assert found.first == "budget_usd"
    late = projection(config("train.steps=100", "budget_usd=300", "max_tokens=6000"), ran([2.0] * 10))
    assert three(late.limits[0].step) == every(10) and three(late.limits[0].time_unix) == every(NOW)


def test_uneven_steps():
    """Windows of 16: eight of them take 1 s a step, one 2 s. The slowest twentieth lies between the last two."""
    times = [1.0] * 64 + [2.0] * 16 + [1.0] * 64
    found = projection(config("train.steps=1144"), ran(times))
    assert found.seconds.low == found.seconds.middle == pytest.approx(1000.0)
    assert found.seconds.high == pytest.approx(1000 * (1 + 0.6)), "position 0.95 * 8 = 7.6 of nine in order"
    assert "144 steps, in windows of 16" in found.basis


def test_failures_widen():
    """One session of ten steps was followed by a wait of 5 s, a start of 1 s and two lost steps."""
    account = Account()
    for session, since in ((0, 0.0), (1, 20.0)):
        account.note(Began(session=session, job="", time_unix=0.0, seconds=since, devices=2, dollars=SECOND))
    at = itertools.count(4)  # after a first start of three seconds, which is no failure
    for number in range(1, 11):
        account.take(record(step=number, tokens=64 * number, batch_tokens=64, step_seconds=1.0, seconds=float(next(at)), time_unix=NOW))
    for number in (11, 12):
        account.take(record(step=number, batch_tokens=64, step_seconds=1.0, seconds=float(next(at))), lost=True)
    for number in range(11, 21):
        account.take(record(step=number, tokens=64 * number, batch_tokens=64, step_seconds=1.0, seconds=11.0 + number, time_unix=NOW,
                            session=1))  # fmt: skip
    found = projection(config("train.steps=120"), account)
    assert found.seconds.low == pytest.approx(100.0)
    assert found.seconds.middle == pytest.approx(100 * (1 + (5 + 1 + 2) / 20))
    assert found.seconds.high == pytest.approx(100 * (1 + most_failures(1) * (5 + 1 + 2) / 20))
    for count, exact in ((1, 4.744), (2, 6.296), (5, 10.513), (20, 29.062)):  # published tables of the Poisson distribution
        assert most_failures(count) == pytest.approx(exact, rel=4e-3)


def test_another_phase_is_projected_by_its_flops():
    words = ["+phases.short.train.steps=10", "+phases.long.train.steps=5", "+phases.long.data.seq_len=32",
             "+phases.long.train.global_batch_tokens=128"]  # fmt: skip
    c = config(*words)
    found = projection(c, ran([3.0] * 4, phase="short"))
    of = lambda seq, tokens: cost.flops_per_token(c.phases["short"].model, seq).total * tokens
    assert num_steps(c) == 15
    later = 3.0 * of(32, 128) / of(16, 64)
    assert three(found.seconds) == every(6 * 3.0 + 5 * later)
    limit = 12 + 18 + 2.5 * later  # seconds; half of the third of the long steps is paid for
    met = projection(dataclasses.replace(c, budget_usd=limit * SECOND), ran([3.0] * 4, phase="short")).limits[0]
    assert three(met.step) == every(12) and three(met.time_unix) == every(NOW + limit - 12)


def test_before_the_first_step():
    assert projection(config("train.steps=10"), Account()) is None
    odd = ran([1.0])
    odd.take(record(step=2, batch_tokens=None, step_seconds=0.0, seconds=1.0, phase="unheard of", time_unix=NOW))
    found = projection(config("train.steps=10"), odd)
    assert all(map(math.isfinite, three(found.seconds)))
