"""Where a traced step's time went: against a question asked of every moment, and a step whose answer is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.parallel.trace import Span
from shoestring.parallel.trace_divide import PARTS, divide

from .moments import divided

KINDS = [
    ("compute", "F"), ("compute", "B"), ("exchange", "F"), ("exchange", "B"), ("exchange", "I"), ("link", "recv"), ("link", "send"),
    ("pair", "F&B"), ("recompute", "B"), ("reduce", ""), ("section", "data"), ("section", "update"), ("section", "reduce"),
    ("section", "replay"),
]  # fmt: skip


def span(rank, kind, times, micro_batch=0) -> Span:
    what, kind = kind
    phase = kind if what == "section" else "experts"
    return Span(rank, what, "" if what == "section" else kind, rank // 2, micro_batch, phase, *map(float, times))


times = st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted)  # empty ones among them
spans = st.lists(st.builds(span, st.integers(0, 3), st.sampled_from(KINDS), times, st.integers(0, 1)), max_size=20)


@given(spans, st.sampled_from([(2, 2), (2, 1), (4, 2), (4, 4), (1, 1)]), st.floats(0, 40))
def test_every_moment_has_one_part(found, layout, more):
    dp, ep = layout
    found = [*found, span(0, ("compute", "F"), (1, 2))]
    seconds = 24.0 + more
    parts = divide(found, dp=dp, ep=ep, seconds=seconds)
    want = divided([s._asdict() for s in found], dp=dp, ep=ep)
    assert tuple(parts) == PARTS
    assert {name: parts[name] for name in want} == pytest.approx(want, abs=1e-9)
    assert sum(parts.values()) == pytest.approx(seconds) and min(parts.values()) >= 0


def test_a_step_of_two_stages():
    """Ranks 0 and 1 hold stage 0, ranks 2 and 3 stage 1. Exchange x, waits: i imbalance, b bubble.

              0         1         2
              012345678901234567890
    rank 0    dcciixxcc--bbbbbrcuu-
    rank 1    dddccxxcc--bbbbcciuu-
    rank 2    d--bbbbbbbcciibbbbuu-
    rank 3    d--bbbbbbbccccbbbbuu-
    """
    at = lambda rank, kind, *when: [span(rank, kind, t) for t in when]
    step = [
        *at(0, ("section", "data"), (0, 1)), *at(0, ("compute", "F"), (1, 3), (7, 9)), *at(0, ("exchange", "F"), (3, 7)),
        *at(0, ("link", "recv"), (11, 16)), *at(0, ("compute", "B"), (16, 18)), *at(0, ("recompute", "B"), (16, 17)),
        *at(1, ("section", "data"), (0, 3)), *at(1, ("compute", "F"), (3, 5), (7, 9)), *at(1, ("exchange", "F"), (5, 7)),
        *at(1, ("link", "recv"), (11, 15)), *at(1, ("compute", "B"), (15, 17)),
        *at(2, ("section", "data"), (0, 1)), *at(2, ("link", "recv"), (3, 10)), *at(2, ("compute", "F"), (10, 12)),
        *at(3, ("section", "data"), (0, 1)), *at(3, ("link", "recv"), (3, 10)), *at(3, ("compute", "F"), (10, 14)),
        *(s for rank in range(4) for s in at(rank, ("section", "reduce"), (17, 19))),
        *(s for rank in range(4) for s in at(rank, ("section", "update"), (19, 20))),
    ]  # fmt: skip
    parts = divide(step, dp=2, ep=2, seconds=21.0)
    assert parts == pytest.approx({
        "compute": (4 + 1 + 6 + 2 + 4) / 4,
        "recompute": 1 / 4,
        "exchange": (2 + 2) / 4,  # from 5 on, when rank 1 has come
        "bubble": (5 + 4 + 7 + 7 + 4 + 4) / 4,  # receives; ranks 2 and 3 from 14 until the pipeline is drained, at 18
        "imbalance": (2 + 1 + 2) / 4,  # rank 0 waits in the exchange, rank 1 for rank 0 from 17 to 18, rank 2 for rank 3 from 12 to 14
        "update": 4 * 2 / 4,
        "data": (1 + 3 + 1 + 1) / 4,
        "idle": (2 + 2 + 2 + 2 + 4 * 1) / 4,  # 9 to 11; 1 to 3; the step goes on until 21
    })  # fmt: skip


def test_clocks_that_say_more_than_the_step():
    parts = divide([span(0, ("compute", "F"), (0, 4)), span(0, ("section", "data"), (4, 5))], dp=1, ep=1, seconds=2.5)
    assert parts["compute"] == 2.0 and parts["data"] == 0.5 and sum(parts.values()) == 2.5
    with pytest.raises(ValueError, match="no step was recorded"):
        divide([span(0, ("section", "data"), (4, 5))], dp=1, ep=1, seconds=2.5)
