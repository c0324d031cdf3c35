"""Lists of every schedule against what is published, against each other, and on a machine of blocking links; wrong lists are refused."""

import functools
import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.parallel.schedule import SCHEDULES, Held, Op, direction_of, proven, validate
from shoestring.parallel.schedule.ops import text
from shoestring.parallel.timeline import by_kind, simulate

lists_of = functools.cache(proven)
NAMES = st.sampled_from(list(SCHEDULES))


@st.composite
def layouts(draw, largest=8):
    """(schedule, pp, chunks, M) that fit each other: where the drawn ones do not, the nearest that do, as a user would be told."""
    name = draw(NAMES)
    pp, chunks, num = draw(st.integers(1, largest)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    while broken := SCHEDULES[name].rule(pp, chunks, num):
        field, _, nearest = broken
        given_up = (pp, chunks, num)
        pp, chunks, num = (
            nearest if field == f else v for f, v in (("parallel.pp", pp), ("parallel.chunks", chunks), ("micro_batches", num))
        )
        assert (pp, chunks, num) != given_up, "the nearest valid value is not valid"
    return name, pp, chunks, num


# ---------------------------------------------------------------- right lists


@settings(max_examples=60)
@given(layouts())
def test_lists_are_complete_and_hold_no_more_than_their_bound_and_idle_as_the_formula_says(layout):
    name, pp, chunks, num = layout
    schedule, lists = SCHEDULES[name], lists_of(*layout)
    placements = schedule.place(pp, chunks)
    ran = Counter(
        (rank, op.stage, op.micro_batch, "B" if op.kind == "I" else op.kind) for rank, ops in enumerate(flat(lists)) for op in ops
    )
    split = {(op.stage, op.micro_batch) for ops in flat(lists) for op in ops if op.kind == "I"}
    want = Counter()
    for i in range(num):
        through = placements[0] if len(placements) == 1 or i < num // 2 else placements[1]
        for stage, rank in enumerate(through):
            want.update((rank, stage, i, kind) for kind in ("FBW" if (stage, i) in split else "FB"))
    assert ran == want
    timeline = simulate(lists, by_kind(F=1, B=2, I=1, W=1, pair=3))
    assert timeline.bubble == pytest.approx(schedule.bubble(pp, chunks, num), abs=1e-12)
    assert run_machine(lists, placements, num, random.Random(0)) == "ends"
    bound = schedule.held(pp, chunks, num)
    if num >= 2 * pp:  # with fewer micro-batches some bounds are not reached
        assert timeline.held == bound


def test_dualpipe_is_the_published_list():
    """FACTS: `F0 x6, F0 F1, (Bz1 W F1) x3, (FB01 FB10) x3, (B1 FB10) x3, B1 Bz0, (W Bz0) x3, W` for P = 8, M = 20, rank 0."""
    words = "F0 " * 6 + "F0 F1 " + "I1 W F1 " * 3 + "F0B1 F1B0 " * 3 + "B1 F1B0 " * 3 + "B1 I0 " + "W I0 " * 3 + "W"
    direction = {0: "0", 7: "1"}
    lists = lists_of("dualpipe", 8, 1, 20)
    said = [" ".join("".join(op.kind + direction[op.stage] * (op.kind != "W") for op in action) for action in lists[0])]
    assert said == [words]
    mirrored = [tuple(Op(op.kind, op.stage, (op.micro_batch + 10) % 20) for op in action) for action in lists[7]]
    assert mirrored == lists[0], "both ends run the same, each for its own half of the micro-batches"
    middle = [text(action) for action in lists[3]]
    assert "3F4" in middle and "4B10" in middle, "the middle rank's first pair runs apart"


@pytest.mark.parametrize(("pp", "num", "makespan", "idle"), [(8, 20, 66, 6), (16, 120, 374, 14)])
def test_dualpipe_takes_the_published_time(pp, num, makespan, idle):
    timeline = simulate(lists_of("dualpipe", pp, 1, num), by_kind(F=1, B=2, I=1, W=1, pair=3))
    assert timeline.makespan == makespan and timeline.idle == [idle] * pp
    assert {held.activations for held in timeline.held} == {pp + 1}


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(0, 6))
def test_torchs_dualpipev_is_half_of_our_dualpipe(pp, more):
    """The V is DualPipe folded: the second chunk of a rank does what direction 1 did on it."""
    num = 2 * pp + more
    unfold = lambda op: Op(op.kind, op.stage, op.micro_batch + num * (op.stage >= pp))
    folded = [[tuple(map(unfold, action)) for action in actions] for actions in lists_of("dualpipev", pp, 2, num)]
    assert folded == lists_of("dualpipe", 2 * pp, 1, 2 * num)[:pp]


def test_directions_are_halves_and_losses_land_at_both_ends():
    assert [direction_of(i, 6, 2) for i in range(6)] == [0, 0, 0, 1, 1, 1] and {direction_of(i, 7, 1) for i in range(7)} == {0}
    lists = flat(lists_of("dualpipe", 4, 1, 8))
    at_head = {op.micro_batch: rank for rank, ops in enumerate(lists) for op in ops if op.kind == "F" and op.stage == 3}
    assert [at_head[i] for i in range(8)] == [3] * 4 + [0] * 4


# ---------------------------------------------------------------- a machine of blocking links


def flat(lists):
    return [[op for action in actions for op in action] for actions in lists]


class Swapped(Exception):
    """A rank received another micro-batch than it expected."""


class Missing(Exception):
    """A rank needs what it should have made itself, earlier."""


def run_machine(lists, placements, num, rng):
    """ "ends", "stuck", "swapped" or "missing": the ranks as processes that take turns at random. On a link the n-th send meets the n-th
    receive, in the order in which each side posts them. Receives are posted one action ahead; nothing else is waited for."""
    last, sent, received, progress = len(placements[0]) - 1, defaultdict(list), defaultdict(list), [0]

    def link(op, source, target):
        """A name: F or B, direction, stages. None inside a rank and beyond the ends."""
        direction = int(len(placements) == 2 and op.micro_batch * 2 >= num)
        ranks = placements[direction]
        outside = op.kind == "W" or not (0 <= source <= last and 0 <= target <= last)
        return None if outside or ranks[source] == ranks[target] else (direction, source, target)

    def process(actions):
        made, receives = set(), {}
        for action, upcoming in zip([(), *actions], [*actions, ()], strict=True):
            for op in upcoming:
                if name := link(op, op.stage + (-1 if op.kind == "F" else 1), op.stage):
                    receives[op] = name, len(received[name])
                    received[name].append(op.micro_batch)
            for kind, s, i in action:
                local = {"F": [("F", s - 1)], "W": [("B", s)]}.get(kind, [("F", s), ("B", s + 1)])
                if (kind, s, i) in receives:
                    local = local[:-1]
                    name, n = receives.pop((kind, s, i))
                    while len(sent[name]) <= n:
                        yield
                    if sent[name][n] != i:
                        raise Swapped
                if not all((what, stage, i) in made for what, stage in local if 0 <= stage <= last):
                    raise Missing
            for op in action:
                made.add(("B" if op.kind == "I" else op.kind, op.stage, op.micro_batch))
                if name := link(op, op.stage, op.stage + (1 if op.kind == "F" else -1)):
                    sent[name].append(op.micro_batch)
            progress[0] += 1

    running, before = [process(actions) for actions in lists], -1
    while running and progress[0] > before:
        before = progress[0]
        for rank in rng.sample(running, len(running)):
            try:
                next(rank)
            except StopIteration:
                running.remove(rank)
            except (Swapped, Missing) as error:
                return type(error).__name__.lower()
    assert running or sent == received
    return "stuck" if running else "ends"


@settings(max_examples=150)
@given(layouts(largest=4), st.data())
def test_a_shuffled_list_is_refused_exactly_if_the_machine_cannot_run_it(layout, data):
    name, pp, chunks, num = layout
    lists, placements = [list(actions) for actions in lists_of(*layout)], SCHEDULES[name].place(pp, chunks)
    for _ in range(data.draw(st.integers(1, 3))):
        actions = lists[data.draw(st.integers(0, pp - 1))]
        at, by = data.draw(st.integers(0, len(actions) - 1)), data.draw(st.sampled_from([1, 1, 2, 3, len(actions) // 2]))
        actions.insert(min(at + by, len(actions) - 1), actions.pop(at))
    machine = run_machine(lists, placements, num, random.Random(data.draw(st.integers(0, 99))))
    try:
        validate(lists, placements, num)
    except ValueError:
        assert machine != "ends"
    else:
        assert machine == "ends"


# ---------------------------------------------------------------- wrong lists


@settings(max_examples=60)
@given(layouts(largest=4), st.data())
def test_whatever_is_left_out_or_runs_twice_is_refused(layout, data):
    """A whole action, pairs among them, or one op of a pair."""
    name, pp, chunks, num = layout
    lists, placements = [list(actions) for actions in lists_of(*layout)], SCHEDULES[name].place(pp, chunks)
    actions = data.draw(st.sampled_from(lists))
    at = data.draw(st.integers(0, len(actions) - 1))
    op = data.draw(st.sampled_from(actions[at]))
    if data.draw(st.booleans()):
        actions.insert(data.draw(st.integers(0, len(actions))), (op,))
        said = f"{op} runs already in action"
    else:
        left = tuple(other for other in actions[at] if other != op and data.draw(st.booleans()))
        actions[at : at + 1] = [left] * bool(left)
        said = "want F and B, or F, I and W"
    with pytest.raises(ValueError, match=said):
        validate(lists, placements, num)


def listed(*ranks):
    """Actions from words: "0F0 0F1+0B0"."""
    op = lambda stage, kind, micro_batch: Op(kind, int(stage), int(micro_batch))
    return [[tuple(op(*re.fullmatch(r"(\d+)(\D)(\d+)", o).groups()) for o in a.split("+")) for a in words.split()] for words in ranks]


TWO = ((0, 1),)  # two ranks, a stage each
WRONG = {
    "an action is missing": (TWO, 2, ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1"], "rank 1 has F for stage 1, micro-batch 1: want F and B"),
    "a micro-batch is missing": (TWO, 2, ["0F0 0B0", "1F0 1B0"], "rank 0 has nothing for stage 0, micro-batch 1"),
    "a stage runs on a rank that does not hold it": (TWO, 1, ["0F0 0B0 1F0", "1B0"], r"rank 0, action 2 \(1F0\): 1F0 is for rank 1"),
    "a direction runs on the other's rank": (((0, 1), (1, 0)), 2, ["0F0 0F1", ""], r"rank 0, action 1 \(0F1\): 0F1 is for rank 1"),
    "no such stage": (TWO, 1, ["0F0 2F0", ""], r"rank 0, action 1 \(2F0\): there are stages 0 to 1 and micro-batches 0 to 0, not 2F0"),
    "no such micro-batch": (TWO, 1, ["0F0 0F1 0B0 0B1", "1F0 1B0"], r"action 1 \(0F1\): .*micro-batches 0 to 0"),
    "no such kind": (TWO, 1, ["0F0 0X0", ""], r"rank 0, action 1 \(0X0\): an action is one of"),
    "W runs twice": (TWO, 1, ["0F0 0I0 0W0 0W0", "1F0 1B0"], r"rank 0, action 3 \(0W0\): 0W0 runs already in action 2"),
    "W runs before I": (TWO, 1, ["0F0 0W0 0I0", "1F0 1B0"], "rank 0, action 1: 0W0 needs 0I0, of action 2"),
    "B runs before F": (TWO, 1, ["0F0 0B0", "1B0 1F0"], "rank 1, action 0: 1B0 needs 1F0, of action 1"),
    "a pair of one micro-batch": (TWO, 1, ["0F0 0B0", "1F0+1B0"], "rank 1, action 0: 1B0 needs 1F0, of action 0"),
    "W after B": (TWO, 1, ["0F0 0B0 0W0", "1F0 1B0"], "rank 0 has FBW for stage 0, micro-batch 0"),
    "two forwards at once": (TWO, 2, ["0F0+0F1 0B0 0B1", "1F0 1B0 1F1 1B1"], r"rank 0, action 0 \(0F0\+0F1\): an action is one of"),
    "backward first in a pair": (TWO, 2, ["0F0 0B0+0F1 0B1", "1F0 1B0 1F1 1B1"], r"rank 0, action 1 \(0B0\+0F1\): an action is one of"),
    "sends are swapped": (TWO, 2, ["0F1 0F0 0B0 0B1", "1F0 1B0 1F1 1B1"],
                          "rank 0, action 0 sends 0F1 to rank 1 as number 0 of that link, where action 0 receives for 1F0"),
    "a message goes the other way": (((0, 1), (1, 0)), 2, ["0F0 1F1 0B0 0F1 1B1 0B1", "1F0 1B0"],
                                     r"rank 0, action 3 \(0F1\): 0F1 is for rank 1, which holds the stage"),
    "gradients are swapped": (TWO, 2, ["0F0 0F1 0B0 0B1", "1F0 1F1 1I1 1B0 1W1"], "rank 1, action 2 sends 1I1 to rank 0 as number 0"),
    "each waits for the other": (TWO, 2, ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
                                 r"rank 0, action 1 \(0B0\) waits for 1B0; rank 1, action 1 \(1F1\) waits for 0F1"),
    "a pair waits for itself": (TWO, 2, ["0F0 0B0 0F1 0B1", "1F0 1F1+1B0 1B1"],
                                r"rank 0, action 1 \(0B0\) waits for 1B0; rank 1, action 1 \(1F1\+1B0\) waits for 0F1"),
    "a list too few": (TWO, 1, ["0F0 0B0"], "there are 1 lists for 2 pipeline ranks"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_refused(case):
    placements, num, ranks, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        validate(listed(*ranks), placements, num)


def test_more_activations_or_closures_than_promised_are_refused():
    everything_forward = listed("0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")
    assert validate(everything_forward, TWO, 3) == [Held(3, 0), Held(1, 0)]
    with pytest.raises(ValueError, match="rank 0 holds 3 activations at a time, and its schedule promises 2"):
        validate(everything_forward, TWO, 3, SCHEDULES["1f1b"].held(2, 1, 3))
    late_weights = listed("0F0 0I0 0F1 0I1 0W0 0W1", "1F0 1B0 1F1 1B1")
    with pytest.raises(ValueError, match="rank 0 holds 2 closures at a time, and its schedule promises 1"):
        validate(late_weights, TWO, 2, [Held(1, 1), Held(1, 0)])


def test_a_pair_holds_both_micro_batches():
    assert Held.by(listed("0F0 0F1+0B0 0B1")[0]) == Held(2, 0)
