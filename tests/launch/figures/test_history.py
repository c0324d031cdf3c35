"""Histories: every peak is kept where it was, in bounded memory, whatever the values are; held against the records themselves."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.launch.figures.history import AXES, MAX_FIELDS, History, numbers, parse


def made(i: int, **fields) -> dict:
    return {"step": i + 1, "tokens": 4096 * (i + 1), "seconds": 0.5 * (i + 1), "dollars": 0.25 * (i + 1), "loss": 1.0} | fields


def history(records, buckets=8) -> History:
    found = History(buckets)
    for i, record in enumerate(records):
        found.take(record, 100 * i)
    return found


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=700),
    buckets=st.sampled_from([2, 4, 16, 64]),
    asked=st.integers(0, 700),
)
def test_no_peak_is_lost(values, buckets, asked):
    """`asked`: curves may be asked for in between, and that changes nothing."""
    found = History(buckets)
    for i, value in enumerate(values):
        found.take(made(i, loss=value, grad_norm=float(i)))
        if i == asked:
            found.curve("loss")
    curve = found.curve("loss")
    known = {i: value for i, value in enumerate(values) if value is not None}
    if not known:
        assert not len(curve)
        return
    assert (curve.values.min(), curve.values.max()) == (min(known.values()), max(known.values()))
    assert len(curve) <= 2 * (buckets + 1)
    assert all(np.all(np.diff(curve.at[axis]) >= 0) for axis in AXES)
    # A point is where it was: its step's record has its value.
    for value, step, tokens in zip(curve.values, curve.at["step"], curve.at["tokens"]):
        assert known[int(step) - 1] == value and abs(tokens - 4096 * step) < 1e-6 * tokens
    for extreme in (min(known.values()), max(known.values())):
        first = min(i for i, value in known.items() if value == extreme)
        assert any(v == extreme and s - 1 >= first for v, s in zip(curve.values, curve.at["step"]))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 2048])
def test_fewer_records_than_buckets_are_there_as_they_were(count):
    found = history([made(i, loss=math.sin(i)) for i in range(count)], buckets=2048)
    curve = found.curve("loss")
    assert curve.values.tolist() == [math.sin(i) for i in range(count)]
    assert curve.at["seconds"].tolist() == [0.5 * (i + 1) for i in range(count)]


def test_memory_does_not_grow_with_the_records():
    found = history([made(i, loss=float(i % 97)) for i in range(20_000)], buckets=64)
    assert len(found.curve("loss")) <= 130 and len(found._low) <= 64 and found.count == 20_000
    assert found.last["step"] == 20_000 and found.first["step"] == 1 and len(found.recent) == 64


def test_fields_that_come_later_and_items_of_lists():
    records = [made(i) for i in range(40)] + [made(i, eval_loss=3.0 + i, max_vio=[0.1, 0.9], mtp_loss=[5.0]) for i in range(40, 50)]
    found = history(records)
    assert found.curve("eval_loss").at["step"].min() >= 41 and found.curve("eval_loss").values.max() == 52.0
    assert {"max_vio[0]", "max_vio[1]", "max_vio_worst", "mtp_loss[0]", "eval_loss"} <= set(found.fields)
    assert found.curve("max_vio_worst").values.tolist()[-1] == 0.9
    assert not len(found.curve("never"))


def test_a_stretch_without_a_number_is_a_gap():
    found = history([made(i, loss=None if 10 <= i < 20 else 1.0) for i in range(30)], buckets=64)
    curve = found.curve("loss", gaps=True)
    assert np.isnan(curve.values).sum() == 1 and int(np.flatnonzero(np.isnan(curve.values))[0]) == 10 and len(curve) == 21
    assert not np.isnan(found.curve("loss").values).any()
    rare = history([made(i, eval_loss=2.0 if i % 10 == 0 else None) for i in range(30)], buckets=64)
    assert not np.isnan(rare.curve("eval_loss", gaps=True).values).any(), "what is measured now and then has no gaps"


@pytest.mark.parametrize("step", [1, 2, 7, 500, 999, 1000])
def test_where_a_record_is_found_again(step):
    found = history([made(i) for i in range(1000)], buckets=16)
    place = found.place_before(step)
    assert place <= 100 * (step - 1) < place + 100 * 2 * 1000 // 16 + 100 * 256


def test_hostile_records_are_bounded():
    found = history([made(i, **{f"field{i}_{j}": 1.0 for j in range(50)}) for i in range(40)])
    assert len(found.fields) <= MAX_FIELDS
    many = numbers(
        {"max_vio": [1.0] * 10_000, "fp8_sentinel": {str(i): 1.0 for i in range(10_000)}, "loss": 10**400, "lr": True, "mfu": "1"}
    )
    assert len(many) <= 2 * 96 + 1 and not {"loss", "lr", "mfu"} & many.keys()


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "null", '"a"', "{}", '{"step": 1}', '{"step": "1", "tokens": 2, "loss": 1}',
     '{"step": NaN, "tokens": 2, "loss": 1}', '{"step": 1, "tokens": 1e999, "loss": 1}',
     '{"step": true, "tokens": 2, "loss": 1}', '{"step": 1, "tokens": 2}', "[" * 100_000,
     "\x00\xff"],
)  # fmt: skip
def test_what_is_no_record(line):
    assert parse(line.encode("latin-1")) is None


def test_a_record_without_a_number_for_its_loss_is_one():
    assert parse(json.dumps(made(3, loss=None)).encode())["step"] == 4
