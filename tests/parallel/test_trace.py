"""Traces: what is recorded, the file, and what is measured, against a raster of the step."""

import itertools
import json
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import Pending
from shoestring.parallel.schedule.ops import Op
from shoestring.parallel.trace import Recorder, Span, Tracer, read_trace, write_trace
from shoestring.parallel.trace_measure import intersect, length, measure, subtract, union

TICKS = 40
interval = st.tuples(st.integers(0, TICKS), st.integers(0, TICKS)).map(sorted).map(tuple)  # empty ones among them
spans = st.lists(
    st.builds(
        lambda rank, what, times: Span(rank, what, "F", 0, 0, "experts", *map(float, times)),
        st.integers(0, 2),
        st.sampled_from(["compute", "exchange", "link", "pair"]),
        interval,
    ),
    min_size=1,
    max_size=24,
)


def raster(intervals) -> set[int]:
    """The unit ticks inside them."""
    return {t for start, end in intervals for t in range(int(start), int(end))}


@given(st.lists(interval, max_size=12), st.lists(interval, max_size=12))
def test_sets_of_times(a, b):
    for made, want in (
        (union(a), raster(a)),
        (intersect(union(a), union(b)), raster(a) & raster(b)),
        (subtract(union(a), union(b)), raster(a) - raster(b)),
    ):
        assert raster(made) == want
        assert length(made) == len(want)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(made)), "neither disjoint nor in order"


@given(spans)
def test_measures_are_those_of_a_raster(recorded):
    got, ranks = measure(recorded), {s.rank for s in recorded}
    first, last = min(s.start for s in recorded), max(s.end for s in recorded)
    ticks = {(r, what): raster((s.start, s.end) for s in recorded if s.rank == r and s.what == what)
             for r in ranks for what in ("compute", "exchange", "pair")}  # fmt: skip
    idle = sum(len(set(range(int(first), int(last))) - ticks[r, "compute"] - ticks[r, "exchange"]) for r in ranks)
    comm = sum(len(ticks[r, "exchange"]) for r in ranks)
    hidden = sum(len(ticks[r, "exchange"] & ticks[r, "compute"]) for r in ranks)
    inside = sum(len(ticks[r, "exchange"] & ticks[r, "pair"]) for r in ranks)
    inside_hidden = sum(len(ticks[r, "exchange"] & ticks[r, "pair"] & ticks[r, "compute"]) for r in ranks)
    assert got.seconds == last - first
    assert got.bubble == (pytest.approx(idle / len(ranks) / (last - first)) if last > first else 0)
    assert got.comm_seconds == pytest.approx(comm / len(ranks))
    assert got.exposed_seconds == pytest.approx((comm - hidden) / len(ranks))
    assert got.hidden_share == (pytest.approx(hidden / comm) if comm else None)
    assert got.pair_hidden_share == (pytest.approx(inside_hidden / inside) if inside else None)


@given(spans)
def test_a_file_gives_back_its_spans(tmp_path_factory, recorded):
    path = tmp_path_factory.mktemp("trace") / "traces" / "step_3.json"
    write_trace(path, recorded, step=3)
    assert read_trace(path) == (recorded, {"step": 3})


def test_a_file_is_what_perfetto_reads(tmp_path):
    """Complete events in microseconds, of a process per rank and a thread per lane that have names, and times that nest."""
    write_trace(tmp_path / "t.json", [Span(1, "exchange", "B", 3, 7, "combine", 0.5, 0.75)])
    *named, event = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (event["ph"], event["pid"], event["ts"], event["dur"], event["name"]) == ("X", 1, 5e5, 2.5e5, "3B7 combine")
    lanes = {e["tid"]: e["args"]["name"] for e in named if e["name"] == "thread_name"}
    assert lanes[event["tid"]] == "exchange B"
    assert {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "rank 1"}} in named


def test_another_file_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"traceEvents": []}')
    with pytest.raises(ValueError, match="is not a trace of ours"):
        read_trace(tmp_path / "t.json")
    with pytest.raises(ValueError, match="no step was recorded"):
        measure([])


def test_the_default_tracer_changes_nothing():
    tracer, op = Tracer(), Op("F", 0, 0)
    pending, work = Pending(work=None, finish=tuple), object()
    assert tracer.issue(op, "dispatch", pending) is pending
    assert tracer.link("send", op, work) is work
    assert tracer.compute(op, "a") is tracer.weights(op, "b") is tracer.action((op, op))


def waited_for_late() -> list[Span] | None:
    """Both ranks compute on while an all-to-all ends; then rank 1 sends to rank 0."""
    rank, op = dist.get_rank(), Op("B", 1, 2)
    recorder = Recorder(rank)
    recorder.begin()
    out = torch.empty(2)
    work = dist.all_to_all_single(out, torch.full((2,), float(rank)), async_op=True)
    pending = recorder.issue(op, "combine", Pending(work=work, finish=lambda: (out.sum(),)))
    with recorder.action((op, op)), recorder.compute(op, "experts"):
        while not work.is_completed():
            time.sleep(0.001)
        time.sleep(0.05)
    assert pending.wait()[0].item() == 1
    transfer = dist.isend(out, 0) if rank else dist.irecv(out, 1)
    recorder.link("send" if rank else "recv", op, transfer).wait()
    with recorder.weights(op, "experts"):
        pass
    return recorder.finish()


def test_an_exchange_ends_when_it_is_over_not_when_it_is_waited_for():
    recorded, nobody = fork_ranks(2, waited_for_late)
    assert nobody is None
    for rank in range(2):
        mine = [s for s in recorded if s.rank == rank]
        assert [s.start for s in mine] == sorted(s.start for s in mine)
        exchange, pair, experts, outcome, link, weights = mine
        assert {(s.stage, s.micro_batch) for s in mine} == {(1, 2)}
        assert (exchange.what, exchange.kind, exchange.phase) == ("exchange", "B", "combine")
        assert 0 <= exchange.start < exchange.end < experts.end
        assert (pair.what, experts.what) == ("pair", "compute") and pair.start <= experts.start < experts.end <= pair.end
        assert (outcome.what, outcome.kind, outcome.phase) == ("compute", "B", "combine") and outcome.start >= experts.end
        assert (link.what, link.kind) == ("link", ("recv", "send")[rank])
        assert (link.start == link.end) == (rank == 1), "on gloo nobody tells when a send is over"
        assert (weights.what, weights.kind, weights.phase) == ("compute", "W", "experts")
