"""Waterfalls of runs made by hand, where every number is known; and of directories that nobody should have made."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load, to_yaml
from shoestring.train import ledger, metrics, sessions
from shoestring.train.account import Account
from shoestring.train.sessions import Began, Ended
from shoestring.train.waterfall import NAMES, of, waterfall

from .sinks.made import record

ZERO = dict.fromkeys(NAMES.values(), 0.0)
HALF = {"compute": 0.5, "exchange": 0.25, "idle": 0.25}  # of a second


def step(number, seconds, **changes):
    """Ends when the run has been held for `seconds`; takes one second, and costs $2 in the first session."""
    fields = dict(step=number, tokens=100 * number, batch_tokens=100, step_seconds=1.0, seconds=float(seconds), dollars=2.0 * seconds,
                  gpu_hours=seconds / 3600)  # fmt: skip
    return record(**fields | changes)


def began(session, seconds, *, dollars=2.0, devices=4, layout="one", job="a"):
    return Began(session=session, job=job, time_unix=0.0, seconds=float(seconds), devices=devices, dollars=dollars, layout=layout)


def fed(events, kept, lost=()):
    account = Account()
    for event in events:
        account.note(event)
    for r in kept:
        account.take(r)
    for r in lost:
        account.take(r, lost=True)
    return account


def seconds(found):
    return {part.name: part.seconds for part in found.parts if part.seconds}


def test_two_sessions_at_two_prices():
    kept = [
        step(1, 4, data_seconds=0.25),  # after a start of three seconds
        step(2, 6.5, breakdown=HALF, eval_seconds=0.5, data_seconds=0.0),
        step(3, 24, session=1, data_seconds=0.5, checkpoint_seconds=0.125),
        step(4, 25, session=1, breakdown={"compute": 1.0, "idle": 0.0}, data_seconds=0.0),
    ]
    lost = [step(3, 8, data_seconds=0.0), step(4, 9, breakdown=HALF, eval_seconds=0.0625)]
    found = of(fed([began(0, 0), began(1, 20, dollars=10.0, devices=8), Ended(session=1, seconds=28.0, standing=1.0, time_unix=0.0)],
                   kept, lost))  # fmt: skip
    first = {  # until 9
        "compute": 0.75 * 0.5 + 0.5, "exposed all-to-all": 0.75 * 0.25 + 0.25, "data": 0.25, "evaluation": 0.5625, "start": 3.0,
        "lost work": 2.0, "idle": 0.75 * 0.25 + 0.25 + 9 - 3 - 4 - 0.5625,
    }  # fmt: skip
    second = {  # waited for from 9 to 20, and until 28; step 3 has the mean of steps 2's and 4's shares
        "restart": 11.0, "compute": 0.5 * 0.75 + 1, "exposed all-to-all": 0.5 * 0.125, "data": 0.5, "checkpoint": 1.125,
        "start": 2.875, "idle": 0.5 * 0.125 + 8 - 2 - 1.125 - 2.875,
    }  # fmt: skip
    both = lambda a, b: {name: first.get(name, 0) * a + second.get(name, 0) * b for name in NAMES.values()}
    assert {p.name: p.seconds for p in found.parts} == pytest.approx(both(1, 1), abs=1e-12)
    assert {p.name: p.dollars for p in found.parts} == pytest.approx(both(2, 10), abs=1e-12)
    assert {p.name: p.gpu_hours for p in found.parts} == pytest.approx(both(4 / 3600, 8 / 3600), abs=1e-12)
    assert (found.seconds, found.dollars, found.tokens, found.steps, found.traced) == (28.0, 9 * 2 + 19 * 10, 400, 4, 2)
    assert found.dollars_per_billion_tokens == pytest.approx(208 / 400 * 1e9) and found.notes == ()
    assert found["compute"].source == "from 2 traced steps" and found["data"].source == "measured in each step"


def test_shares_are_those_of_the_same_phase_and_layout():
    """Steps of another phase, or of a session of another layout, are not divided."""
    kept = [
        step(1, 1, breakdown=HALF), step(2, 2, data_seconds=0.5), step(3, 3, phase="long", data_seconds=0.25),
        step(4, 4, session=1, data_seconds=0.125), step(5, 5, session=2),
    ]  # fmt: skip
    found = of(fed([began(0, 0), began(1, 3, layout="two"), began(2, 4)], kept))
    assert seconds(found) == {
        "compute": 0.5 + 0.25 + 0.5, "exposed all-to-all": 0.25 + 0.125 + 0.25, "data": 0.875, "idle": 0.25 + 0.125 + 0.25,
        "steps, not divided": 0.75 + 0.875,
    }  # fmt: skip
    assert found.notes == ("steps of a phase or layout without a traced step are not divided",)


def test_without_a_traced_step_nothing_is_invented():
    found = of(fed([began(0, 0)], [step(1, 1, data_seconds=0.5), step(2, 2)]))
    assert seconds(found) == {"data": 0.5, "steps, not divided": 1.5} and found.notes == ()
    assert of(Account()).dollars == 0 and of(Account()).dollars_per_billion_tokens is None


def test_at_any_moment():
    """What is told early changes only by what comes later."""
    account = fed([began(0, 0)], [step(1, 1, data_seconds=0.0)])
    assert seconds(of(account)) == {"steps, not divided": 1.0} == seconds(of(account))
    account.take(step(2, 2, breakdown=HALF))
    assert seconds(of(account)) == {"compute": 1.0, "exposed all-to-all": 0.5, "idle": 0.5}
    account.take(step(3, 3, data_seconds=0.0))
    assert seconds(of(account)) == {"compute": 1.5, "exposed all-to-all": 0.75, "idle": 0.75}
    account.take(step(4, 4, breakdown={"compute": 1.0}))
    assert seconds(of(account)) == {"compute": 0.5 + 0.5 + 0.75 + 1, "exposed all-to-all": 0.625, "idle": 0.625}


def test_reading_is_each_step_s_own():
    """A traced step reads for half of itself; its other shares are for what other steps did not read in. Old records do not tell."""
    traced = {"compute": 0.25, "bubble": 0.25, "data": 0.5}
    found = of(fed([began(0, 0)], [step(1, 1, breakdown=traced, data_seconds=0.5), step(2, 2, data_seconds=0.25), step(3, 3)]))
    assert seconds(found) == {"compute": 0.25 + 0.375 + 0.25, "bubble": 0.25 + 0.375 + 0.25, "data": 0.5 + 0.25 + 0.5}


# ---------------------------------------------------------------- clocks, and what is no run

amounts = st.one_of(st.floats(0, 100), st.sampled_from([0.0, math.nan, math.inf, -1.0, 1e300, 1e-300, 3.3333333333333335]))


@given(
    st.lists(st.tuples(st.integers(0, 3), amounts, amounts), max_size=5),
    st.lists(st.tuples(st.integers(0, 4), amounts, amounts, st.none() | amounts, st.none() | amounts, st.none() | amounts, st.booleans()),
             max_size=12),
)  # fmt: skip
def test_parts_are_the_whole_whatever_is_told(begins, records):
    account = Account()
    for session, since, price in begins:
        account.note(dataclasses.replace(began(session, 0, dollars=price), seconds=since))
    for number, (session, until, took, data, evaluation, traced, lost) in enumerate(records):
        breakdown = None if traced is None else {"compute": traced, "bubble": 1.0, "data": 0.5}
        told = step(number, 0, session=session, step_seconds=took, data_seconds=data, eval_seconds=evaluation, breakdown=breakdown)
        account.take(dataclasses.replace(told, seconds=until), lost=lost)
    found = of(account)
    for unit in ("seconds", "dollars", "gpu_hours"):
        values = [getattr(part, unit) for part in found.parts]
        assert all(0 <= value < 1e13 for value in values), found
        assert math.fsum(values) == getattr(found, unit)
    held, _ = account.held()
    whole = math.fsum(math.fsum(h.seconds.values()) * h.dollars for h in held)
    assert found.dollars == pytest.approx(whole, rel=1e-12)
    sound = lambda value: 0 <= value < 1e10
    signs = [since for _, since, price in begins if sound(since) and sound(price)]
    signs += [until for _, until, took, _, evaluation, _, _ in records if all(map(sound, (until, took, evaluation or 0.0)))]
    assert found.seconds <= max(signs, default=0.0) * (1 + 1e-12), "a second was counted twice"


def test_parts_that_are_more_than_the_whole_are_made_to_fit():
    found = of(fed([began(0, 0), began(1, 1)], [step(1, 4, step_seconds=6.0, data_seconds=2.0), step(2, 5, session=1)]))
    assert found.seconds == 5.0 and seconds(found) == pytest.approx({"data": 4 * 2 / 6, "steps, not divided": 4 * 4 / 6 + 1})
    assert found.notes == (
        "session 0 tells of 6 s in 4 s: its parts are made to fit", "session 1 began 3 s before the last sign of life of the one before it",
    )  # fmt: skip


def test_a_directory_without_its_sessions(tmp_path):
    """Prices are those of the records; the start is not known."""
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for r in (step(1, 4, gpu_hours=4 * 4 / 3600), step(2, 6, gpu_hours=6 * 4 / 3600), step(3, 30, session=1, dollars=12 + 24.0)):
            file.write(metrics.to_line(r))
    found = waterfall(tmp_path)
    assert found.seconds == 30.0 and found["restart"].seconds == 3.0 + (29 - 6) and len(found.notes) == 2
    assert found["steps, not divided"].dollars == pytest.approx(2 * 2.0 + 1.0 * 36 / 30) and found["idle"].seconds == 1.0


def test_hostile_directories(tmp_path):
    assert waterfall(tmp_path / "nowhere").dollars == 0.0
    good = [metrics.to_line(step(1, 1, data_seconds=0.25)), metrics.to_line(step(2, 2))]
    bad = [
        "\n", "{", "[]", "5", '{"step":', "[" * 100_000, '{"nonfinite": [1]}', '{"nonfinite": {"seconds": 1' + "0" * 4000 + "}}",
        good[0].replace('"seconds":1.0', '"seconds":NaN'), good[0].replace('"seconds":1.0', '"seconds":-3'),
        good[0].replace('"step_seconds":1.0', '"step_seconds":1e400'), good[0].replace('"session":0', '"session":"0"'),
        good[0].replace('"seconds":1.0', '"seconds":1' + "0" * 400), good[0][:-30],
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, *good, *bad]), errors="surrogateescape")
    (tmp_path / "metrics_lost.jsonl").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "config.yaml").write_text("{[")
    lines = [dataclasses.asdict(began(0, 0)), {"standing": 1}, {"standing": []}, 7, dataclasses.asdict(began(0, 50)), {"session": 1}]
    odd = dataclasses.asdict(began(1, 0)) | {"dollars": math.nan}
    (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, [*lines, odd])) + '\n{"session": 3, "jo')
    found = waterfall(tmp_path)
    assert seconds(found) == {"data": 0.25, "steps, not divided": 1.75} and found.dollars == 4.0
    assert found.notes == ("8 lines with times or prices that no run has are left out",)
    assert ledger.account(tmp_path).total_dollars == 4.0
    (tmp_path / "sessions.jsonl").unlink()
    (tmp_path / "sessions.jsonl").mkdir()
    assert waterfall(tmp_path).dollars == 4.0  # by the records' own


def test_what_recompute_hides_is_noted(tmp_path):
    config = load(["model=micro", "data=synthetic", "data.seq_len=16", "train.recompute=[norm,experts,swiglu]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "metrics.jsonl").write_text(metrics.to_line(step(1, 1, breakdown=HALF)))
    sessions.note(tmp_path, began(0, 0))
    assert waterfall(tmp_path).notes == ("recompute of norm, swiglu happens inside kernels: it is in compute",)
