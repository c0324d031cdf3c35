"""Step records, their file and its rewinding, summaries, and the numbers printed for people."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.train import metrics, units
from shoestring.train.metrics import StepRecord
from shoestring.train.sinks.jsonl import JsonlSink


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=100 * step, samples=10 * step, loss=5.0 / step, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=2.0,
        tokens_per_second=50.0, tokens_per_second_per_gpu=25.0, seconds=3.0 * step, dollars=0.5 * step, dollars_per_billion_tokens=7.0,
        time_unix=1e9 + step,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def write(path, records):
    sink = JsonlSink(path)
    for r in records:
        sink.write(r)
    sink.close()


def same(a, b) -> bool:
    """Equality under which NaN equals NaN."""
    return repr(a) == repr(b)


# ---------------------------------------------------------------- JSON

floats = st.floats(allow_nan=True, allow_infinity=True)
maybe = lambda strategy: st.none() | strategy


@settings(max_examples=100, deadline=None)
@given(
    loss=floats, grad_norm=floats, mfu=maybe(floats), eval_loss=maybe(floats), max_vio=maybe(st.lists(floats)), eta_seconds=maybe(floats),
    expert_load=maybe(st.lists(st.lists(st.integers(0, 10**12)))),
)  # fmt: skip
def test_a_record_survives_json_exactly(**changes):
    before = record(3, **changes)
    line = metrics.to_line(before)
    plain = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line.endswith("\n") and line.count("\n") == 1
    assert same(metrics.from_plain(StepRecord, plain), before)
    odd = [n for n, v in changes.items() if isinstance(v, float) and not math.isfinite(v)]
    assert set(odd) <= set(plain.get("nonfinite", {})) and all(plain[n] is None for n in odd)


def test_a_diverged_loss_is_null_and_named():
    plain = json.loads(metrics.to_line(record(1, loss=math.nan, grad_norm=math.inf, max_vio=[0.5, math.nan])))
    assert plain["loss"] is None and plain["max_vio"] == [0.5, None]
    assert plain["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "max_vio[1]": "nan"}


def test_keys_of_a_later_version_are_ignored(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(metrics.to_plain(record(1)) | {"novelty": {"a": 1}}) + "\n")
    assert metrics.read_records(tmp_path / "m.jsonl") == [record(1)]


@pytest.mark.parametrize(
    "broken, word",
    [
        ({"loss": None}, "loss"),  # null, and not named as non-finite
        ({"step": "7"}, "step"),
        ({"expert_load": [[1, 2.5]]}, "expert_load"),
        ({"loss": True}, "loss"),
    ],
)
def test_wrong_types_are_refused_by_name(broken, word):
    with pytest.raises(ValueError, match=word):
        metrics.from_plain(StepRecord, metrics.to_plain(record(1)) | broken)
    with pytest.raises(ValueError, match="lr"):
        metrics.from_plain(StepRecord, {k: v for k, v in metrics.to_plain(record(1)).items() if k != "lr"})


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_only_itself(tmp_path, recwarn, cut):
    path = tmp_path / "m.jsonl"
    write(path, map(record, (1, 2, 3)))
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2]  # only the newline gone: the record is whole
    assert [r.step for r in metrics.read_records(path)] == kept
    write(path, [record(3)])  # appending mends
    assert [r.step for r in metrics.read_records(path)] == [1, 2, 3]
    assert not recwarn.list


def test_a_bad_line_in_the_middle_is_told(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [metrics.to_line(record(s)) for s in (1, 2, 3)]
    path.write_text(lines[0] + "\x00\x00{\n" + lines[2])
    with pytest.warns(UserWarning, match=r"m\.jsonl:2"):
        assert [r.step for r in metrics.read_records(path)] == [1, 3]


def test_rewind_moves_what_a_restart_will_do_again(tmp_path):
    path, lost = tmp_path / "metrics.jsonl", tmp_path / metrics.LOST
    write(path, map(record, range(1, 8)))
    whole = path.read_text()
    path.write_text(whole + '{"step":8,"tok')  # killed while it wrote
    result = JsonlSink.rewind(path, 4)
    assert result == metrics.Rewound(session=1, seconds=21.0, dollars=3.5, step_seconds=2.0, kept=4, lost=3)
    assert path.read_text() + lost.read_text() == whole
    write(path, [record(5, session=1, dollars=4.0, seconds=24.0)])
    assert [r.step for r in metrics.read_records(path)] == [1, 2, 3, 4, 5]
    # A second restart before any step was recorded still knows what was spent.
    assert metrics.rewind(path, 4) == metrics.Rewound(session=2, seconds=24.0, dollars=4.0, step_seconds=2.0, kept=4, lost=1)
    assert metrics.rewind(path, 4) == metrics.Rewound(session=2, seconds=24.0, dollars=4.0, step_seconds=2.0, kept=4, lost=0)
    assert [r.step for r in metrics.read_records(lost)] == [5, 6, 7, 5]


def test_rewind_cut_short_between_its_two_files_can_be_done_again(tmp_path):
    path, lost = tmp_path / "metrics.jsonl", tmp_path / metrics.LOST
    write(path, map(record, range(1, 5)))
    before = path.read_bytes()
    metrics.rewind(path, 2)
    after = path.read_bytes(), lost.read_bytes()
    path.write_bytes(before)  # as if the second rename had not happened
    metrics.rewind(path, 2)
    assert (path.read_bytes(), lost.read_bytes()) == after


def test_rewind_of_nothing_is_a_new_run(tmp_path):
    assert metrics.rewind(tmp_path / "metrics.jsonl", 0) == metrics.Rewound(session=0, seconds=0.0, dollars=0.0, kept=0, lost=0)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- figures


def test_summary_has_what_a_run_directory_promises(tmp_path):
    config = load(["name=me", "parallel.pp=2", "parallel.ep=2", "cluster=h100", "precision=bf16"])
    records = [record(1, tokens_per_second=1.0), record(2, eval_loss=2.25), record(3, loss=math.nan)]
    summary = metrics.summarize(config, iter(records))
    assert summary.tokens_per_second == 300 / 6.0  # three steps of 100 tokens and 2 s
    assert (summary.steps, summary.tokens, summary.loss_first, summary.eval_loss, summary.dollars) == (3, 300, 5.0, 2.25, 1.5)
    assert (summary.world_size, summary.layout, summary.device) == (4, "pp 2 x edp 1 x ep 2, 1f1b", "H100")
    summary.write(tmp_path / "summary.json")
    plain = json.loads((tmp_path / "summary.json").read_text())
    promised = ["steps", "tokens", "loss_first", "loss_last", "eval_loss", "tokens_per_second", "mfu", "dollars"]
    promised += ["world_size", "layout", "device"]
    assert set(promised) <= set(plain) and plain["loss_last"] is None
    assert same(metrics.from_plain(metrics.Summary, plain), summary)
    assert [f.name for f in tmp_path.iterdir()] == ["summary.json"]
    assert metrics.summarize(config, []) is None


def test_summary_mfu_is_that_of_the_time():
    """Phases differ in FLOPs per token and in layout: each step counts by its seconds. One unknown step leaves the whole unknown."""
    slow, fast = record(1, mfu=0.1, step_seconds=3.0), record(2, mfu=0.5, step_seconds=1.0)
    assert metrics.summarize(load([]), [slow, fast]).mfu == pytest.approx(0.2)
    assert metrics.summarize(load([]), [slow, record(2)]).mfu is None


def test_layout_names():
    assert metrics.layout_name(load([]).parallel) == "pp 1 x edp 1 x ep 1"
    assert metrics.layout_name(load(["parallel.pp=2", "parallel.edp=2"]).parallel) == "pp 2 x edp 2 x ep 1, 1f1b"
    chunks = dataclasses.replace(load(["parallel.pp=2"]).parallel, chunks=2)
    assert metrics.layout_name(chunks) == "pp 2 x 2 chunks x edp 1 x ep 1, 1f1b"


def test_balance_figures():
    # Mean 2, worst 4; perfect; nothing routed.
    assert metrics.max_violation([[4, 2, 0], [5, 5, 5], [0, 0, 0]]) == [1.0, 0.0, 0.0]
    assert metrics.count_dead([[4, 2, 0], [5, 5, 5], [0, 0, 0]]) == 4


@pytest.mark.parametrize(
    "text, want",
    [
        (units.count(512), "512"), (units.count(10_312), "10.3 k"), (units.count(999_900), "1.00 M"), (units.count(671.03e9), "671 B"),
        (units.count(14.8e12), "14.8 T"), (units.count(0), "0"), (units.count(0.25), "0.250"), (units.count(None), "–"),
        (units.count(1e-9), "1.00e-09"), (units.count(math.nan), "nan"), (units.si(250e9), "250 G"),
        (units.money(0.0), "$0.00"), (units.money(0.0000612), "$0.000061"), (units.money(0.057), "$0.057"), (units.money(3.607), "$3.61"),
        (units.money(1234.4), "$1,234"), (units.money(5.328e6), "$5.33 M"), (units.money(math.inf), "∞"), (units.money(None), "–"),
        (units.duration(42.4), "0:42"), (units.duration(3723), "1:02:03"), (units.duration(59.7), "1:00"),
        (units.duration(3 * 86400 + 4 * 3600 + 300), "3 d 04:05"), (units.duration(math.inf), "∞"), (units.duration(None), "–"),
        (units.percent(0.3894), "38.9 %"), (units.percent(None), "–"),
    ],
)  # fmt: skip
def test_numbers_for_people(text, want):
    assert text == want
