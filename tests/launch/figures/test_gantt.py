"""The picture of a traced step: bars where spans are, rows and colours by rank and kind, and what is said of it."""

import pytest
from shoestring.launch.figures.gantt import MAX_HOVERS, MAX_RANKS, make_gantt
from shoestring.parallel.trace import Span, write_trace


def span(rank, what, kind, start, end, phase="experts"):
    return Span(rank, what, kind, 1, 5, phase, start, end)


STEP = [
    span(3, "compute", "F", 10.0, 10.2),
    span(3, "exchange", "F", 10.1, 10.5, "combine"),
    span(3, "exchange", "I", 10.2, 10.4, "dispatch"),
    span(3, "pair", "F&B", 10.0, 11.0, ""),
    span(7, "link", "recv", 10.0, 11.0, ""),
    span(7, "compute", "I", 10.25, 10.5),
    span(7, "compute", "B", 10.5, 10.75),
    span(7, "compute", "W", 10.75, 11.0),
]


def boxes(trace) -> list[tuple[float, ...]]:
    """(left, right, top, bottom) of each bar."""
    corners = list(zip(trace["x"], trace["y"]))
    assert len(corners) % 6 == 0 and all(point == (None, None) for point in corners[5::6])
    made = [corners[i : i + 5] for i in range(0, len(corners), 6)]
    assert all(bar[0] == bar[4] for bar in made)
    return [(bar[0][0], bar[1][0], bar[0][1], bar[2][1]) for bar in made]


@pytest.fixture
def draw(tmp_path):
    def made(spans, **facts):
        notes = []
        write_trace(tmp_path / "traces" / "step_9.json", spans, **facts)
        chart = make_gantt(tmp_path / "traces", notes)
        assert notes == []
        return chart, {trace["name"]: boxes(trace) for trace in chart.data if "name" in trace}

    return made


def test_bars_lie_where_spans_do(draw):
    chart, bars = draw(STEP, step=9, bubble=0.25, hidden_share=0.5, pair_hidden_share=None)
    assert set(bars) == {"forward", "backward", "weight gradients", "exchange"}
    at = lambda kind: [(left, right, int(top), int(bottom)) for left, right, top, bottom in bars[kind]]
    assert at("forward") == [(0, 200, 0, 0)]
    assert at("backward") == [(250, 750, 1, 1)], "I and B that touch are one bar; the row is the second rank's"
    assert at("weight gradients") == [(750, 1000, 1, 1)]
    assert sorted(at("exchange")) == [(100, 500, 0, 0), (200, 400, 0, 0)]
    (up_top, up_bottom), (low_top, low_bottom) = sorted(bar[2:] for bar in bars["exchange"])
    assert bars["forward"][0][3] < up_top < up_bottom < low_top < low_bottom < 1, "lanes overlap"
    assert chart.layout["yaxis"]["ticktext"] == ["rank 3 ", "rank 7 "] and chart.layout["xaxis"]["range"] == [0, 1000]
    assert "step 9" in chart.subtitle and "bubble 25.0 %" in chart.subtitle and "50.0 % of exchange time under compute ·" in chart.subtitle
    (hovers,) = [trace for trace in chart.data if "customdata" in trace]
    assert ["rank 7: weight gradients of stage 1, micro-batch 5", "experts", "250 ms"] in hovers["customdata"]
    assert hovers["x"][0] == 100


def test_of_many_ranks_the_first_are_drawn(draw):
    chart, bars = draw([span(rank, "compute", "F", rank, rank + 1) for rank in range(MAX_RANKS + 5)], step=9)
    assert len(bars["forward"]) == MAX_RANKS and f"{MAX_RANKS} of {MAX_RANKS + 5} ranks" in chart.subtitle


def test_many_spans_are_few_paths_and_have_no_hovers(draw):
    chart, bars = draw([span(0, "compute", "FB"[i % 2], i, i + 0.9) for i in range(MAX_HOVERS + 2)], step=9)
    assert len(chart.data) == 2 and len(bars["forward"]) == len(bars["backward"]) == MAX_HOVERS // 2 + 1


def test_the_last_traced_step_is_drawn(tmp_path):
    for step in (9, 100):
        write_trace(tmp_path / f"step_{step}.json", STEP, step=step)
    assert "step 100" in make_gantt(tmp_path, []).subtitle


def test_no_trace_and_a_damaged_one(tmp_path):
    notes = []
    assert make_gantt(tmp_path / "none", notes) is None and notes == []
    (tmp_path / "step_1.json").write_text('{"traceEvents": [{"ph": "X"}], "otherData": {"format": "shoestring trace 1"}}')
    assert make_gantt(tmp_path, notes) is None and "step_1.json cannot be drawn" in notes[0]
    (tmp_path / "step_2.json").write_text('{"torn')
    assert make_gantt(tmp_path, notes) is None and "step_2.json cannot be drawn" in notes[1]
