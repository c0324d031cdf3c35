"""Simulated times against closed forms and against longest paths found another way."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.parallel.schedule import SCHEDULES, Held, Op, proven
from shoestring.parallel.timeline import by_kind, simulate

LAYOUTS = [  # one of each, small: a straight pipeline, rounds, two Vs, two directions
    ("1f1b", 3, 1, 5), ("interleaved_1f1b", 2, 2, 4), ("zbv", 3, 2, 5), ("dualpipev", 2, 2, 5), ("dualpipe", 4, 1, 8),
]  # fmt: skip
LISTS = {layout: proven(*layout) for layout in LAYOUTS}


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 50), st.integers(1, 50))
def test_1f1b_takes_one_round_per_micro_batch_and_one_per_further_stage(pp, num, forward, backward):
    timeline = simulate(SCHEDULES["1f1b"].actions(pp, 1, num), by_kind(F=forward, B=backward))
    assert timeline.makespan == (num + pp - 1) * (forward + backward)
    assert timeline.idle == [(pp - 1) * (forward + backward)] * pp
    assert timeline.bubble == pytest.approx((pp - 1) / (num + pp - 1))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
def test_a_lone_micro_batch_pays_every_hop_once_each_way(pp, forward, hop):
    timeline = simulate(SCHEDULES["1f1b"].actions(pp, 1, 1), by_kind(F=forward, B=2 * forward), lambda sender, receiver: hop)
    assert timeline.makespan == 3 * pp * forward + 2 * (pp - 1) * hop


@settings(max_examples=60)
@given(st.sampled_from(LAYOUTS), st.randoms(use_true_random=False))
def test_starts_are_the_longest_paths_to_them(layout, rng):
    """Whatever actions and hops take. The oracle relaxes edges until nothing changes."""
    lists, (name, pp, chunks, num) = LISTS[layout], layout
    seconds = {action: rng.randint(1, 20) for actions in lists for action in actions}
    hop = {(a, b): rng.randint(0, 5) for a in range(pp) for b in range(pp)}
    timeline = simulate(lists, seconds.__getitem__, lambda a, b: hop[a, b])

    start, edges = dict.fromkeys(seconds, 0), list(edges_of(lists, SCHEDULES[name].place(pp, chunks), num))
    changed = True
    while changed:
        changed = False
        for before, after, ranks in edges:
            earliest = start[before] + seconds[before] + (hop[ranks] if ranks else 0)
            if earliest > start[after]:
                start[after], changed = earliest, True
    assert [[s.action for s in spans] for spans in timeline.spans] == [list(actions) for actions in lists]
    assert all((s.start, s.end) == (start[s.action], start[s.action] + seconds[s.action]) for spans in timeline.spans for s in spans)
    assert timeline.makespan == max(start[a] + seconds[a] for a in seconds)


def edges_of(lists, placements, num):
    """(action, action after it, (rank, rank) where a transfer lies between): who must wait for whom, stage by stage."""
    holds = {op: action for actions in lists for action in actions for op in action}
    backward = lambda s, i: holds.get(Op("B", s, i)) or holds[Op("I", s, i)]
    for actions in lists:
        yield from ((a, b, None) for a, b in pairwise(actions))
    for i in range(num):
        ranks = placements[len(placements) * i // num]
        for s in range(len(ranks)):
            yield holds[Op("F", s, i)], backward(s, i), None
            if Op("W", s, i) in holds:
                yield backward(s, i), holds[Op("W", s, i)], None
        for s, (a, b) in enumerate(pairwise(ranks)):
            yield holds[Op("F", s, i)], holds[Op("F", s + 1, i)], (a, b) if a != b else None
            yield backward(s + 1, i), backward(s, i), (b, a) if a != b else None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_what_is_held_is_what_lies_between_forward_and_backward_on_the_clock(layout):
    rng = random.Random(1)
    timeline = simulate(LISTS[layout], lambda action: rng.randint(1, 9))
    for spans, held in zip(timeline.spans, timeline.held, strict=True):
        at = {op: s for s in spans for op in s.action}
        last = lambda op, kinds, at=at: next(at[o] for o in (op._replace(kind=k) for k in kinds) if o in at)
        kept = [(at[op].start, last(op, "BI").end) for op in at if op.kind == "F"]
        waiting = [(at[op].end, last(op, "W").start) for op in at if op.kind == "I"]
        most = lambda intervals: max((sum(a <= t < b for a, b in intervals) for t, _ in intervals), default=0)
        assert held == Held(most(kept), most([(a, b + 0.5) for a, b in waiting]))


def test_durations_by_kind_and_pairs():
    forward, backward = Op("F", 1, 2), Op("B", 0, 1)
    assert by_kind(F=1, B=2)((forward, backward)) == 3 and by_kind(F=1, B=2, pair=2.5)((forward, backward)) == 2.5
    assert by_kind(F=1, B=2, pair=2.5)((backward,)) == 2


def test_nothing_takes_no_time_and_a_deadlock_has_none():
    assert simulate([[]], by_kind()).makespan == 0 and simulate([[]], by_kind()).bubble == 0
    with pytest.raises(ValueError, match=r"rank 0, action 0 \(0B0\) waits for 0F0"):
        simulate([[(Op("B", 0, 0),)]], by_kind(B=1))
