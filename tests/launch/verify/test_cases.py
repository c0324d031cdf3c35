"""Layouts as they are written, every one of a number of ranks, and options that meet: against brute force."""

import itertools
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.errors import ConfigError
from shoestring.launch.verify import command
from shoestring.launch.verify.cases import OPTIONS, Case, checked, covering, layout_words, layouts
from shoestring.parallel.dispatch import DISPATCHERS
from shoestring.parallel.schedule import SCHEDULES

SIZE = st.integers(1, 12)


@given(pp=SIZE, edp=SIZE, ep=SIZE, schedule=st.sampled_from([None, *SCHEDULES]), dispatcher=st.sampled_from([None, *DISPATCHERS]))
def test_a_layout_says_what_it_is(pp, edp, ep, schedule, dispatcher):
    """Sizes of one may be written or not."""
    written = "/".join(filter(None, [f"pp{pp}edp{edp}ep{ep}", schedule, dispatcher]))
    words = dict(word.split("=") for word in layout_words(written))
    assert [words[f"parallel.{axis}"] for axis in ("pp", "edp", "ep")] == [str(pp), str(edp), str(ep)]
    assert words.get("parallel.schedule") == schedule and words.get("parallel.dispatcher") == dispatcher
    if short := "".join(f"{axis}{n}" for axis, n in (("pp", pp), ("edp", edp), ("ep", ep)) if n > 1):
        assert layout_words("/".join([short, *written.split("/")[1:]])) == layout_words(written)


@pytest.mark.parametrize("wrong", ["", "pp", "ep2pp2", "pp2pp2", "tp2", "pp2 ep2", "pp-1", "/1f1b", "2", "PP2"])
def test_what_is_no_layout(wrong):
    with pytest.raises(ConfigError, match="is no layout: write all, smoke"):
        layout_words(wrong)


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match=r"interleaved is no schedule and no dispatcher: .*nearest valid value: interleaved_1f1b"):
        layout_words("pp2ep2/interleaved")
    with pytest.raises(ConfigError, match="nearest valid value: alltoall"):
        layout_words("ep2/all2all")


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12])
def test_every_layout_of_that_many_ranks_once(world):
    found = list(layouts(world))
    assert len(set(found)) == len(found)
    seen = set()
    for layout in found:
        words = dict(word.split("=") for word in layout_words(layout))
        sizes = tuple(int(words[f"parallel.{axis}"]) for axis in ("pp", "edp", "ep"))
        usual = "local" if sizes[2] == 1 else "alltoall"
        seen.add((*sizes, words.get("parallel.schedule", "1f1b"), words.get("parallel.dispatcher", usual)))
    meshes = [m for m in itertools.product(range(1, world + 1), repeat=3) if m[0] * m[1] * m[2] == world]
    assert seen == {(*mesh, s, d) for mesh, s, d in itertools.product(meshes, SCHEDULES, DISPATCHERS)}


# ---------------------------------------------------------------- pairs


@st.composite
def tables(draw):
    """A few options of a few values, values that do not go together, and some (up to three) that are to."""
    names = "abcde"[: draw(st.integers(2, 5))]
    options = {name: tuple(str(i) for i in range(draw(st.integers(1, 4)))) for name in names}
    pairs = [
        {(a, x), (b, y)} for a, b in itertools.combinations(names, 2) for x, y in itertools.product(options[a], options[b])
    ]  # fmt: skip
    parts = st.fixed_dictionaries({name: st.sampled_from(options[name]) for name in names[:3]})
    return options, draw(st.lists(st.sampled_from(pairs), max_size=4)), draw(st.lists(parts, max_size=2))


@settings(max_examples=150, deadline=None)
@given(table=tables(), seed=st.integers(0, 3))
def test_every_pair_that_can_meet_meets(table, seed):
    """Can: in a row of which at most four values are not the first ones, two of them the pair's own."""
    options, apart, also = table
    possible = lambda row: not any(pair <= set(row.items()) for pair in apart)
    rows = covering(options, possible, also, seed=seed)
    assert all(row.keys() == options.keys() and possible(row) for row in rows)
    every = [dict(zip(options, values)) for values in itertools.product(*options.values())]
    usual = {name: values[0] for name, values in options.items()}
    near = lambda row, pair: sum(row[name] != usual[name] for name in row if name not in dict(pair)) <= 2
    asked = {frozenset(part.items()) for part in also}
    pairs = lambda row: {frozenset(pair) for pair in itertools.combinations(row.items(), 2)} | {a for a in asked if a <= row.items()}
    wanted = {pair for row in every if possible(row) for pair in pairs(row) if near(row, pair)}
    met = set().union(*map(pairs, rows)) if rows else set()
    assert wanted <= met
    most = sorted(map(len, options.values()))[-2:]
    assert len(rows) <= len(wanted) and (apart or also or len(rows) <= 2 * most[0] * most[1])  # the product of the longest two is the least


@pytest.fixture(scope="module")
def all_of_eight():
    request = command.parse(["layouts=all"])
    return checked(list(command.choose_cases(request, command.base_words(request))))


def test_every_schedule_meets_every_dispatcher_in_fp64_and_fp8_and_every_routing(all_of_eight):
    proved = [(case.config(), case.routing) for case in all_of_eight[0]]
    named = lambda p: p.dispatcher if p.dispatcher != "auto" else "alltoall" if p.ep > 1 else "local"
    exchanges = {(c.parallel.schedule, named(c.parallel), c.precision.name) for c, _ in proved}
    assert exchanges >= set(itertools.product(SCHEDULES, DISPATCHERS, ("fp64", "fp8")))
    by_nodes = {
        (s.schedule, c.precision.name) for c, _ in proved if (s := c.parallel).ep > c.cluster.gpus_per_node and "hier" in s.dispatcher
    }
    assert by_nodes >= set(itertools.product(SCHEDULES, ("fp64", "fp8"))), "over several nodes"
    assert {(c.parallel.schedule, routing) for c, routing in proved} == set(itertools.product(SCHEDULES, OPTIONS["routing"]))


def test_every_mesh_meets_every_schedule_and_every_dispatcher_in_fp64(all_of_eight):
    valid, invalid = all_of_eight
    parts = lambda layout: [word.partition("=")[2] for word in layout_words(layout)]
    plain = [case for case in valid if not case.options and case.routing == "natural"]
    proved = {tuple(parts(case.layout)[:3]) + (case.config().parallel.schedule,) for case in plain}
    by = {tuple(parts(case.layout)[:3]) + (case.config().parallel.dispatcher,) for case in plain}
    refused = {case.name for case in invalid}
    for layout in set(layouts(8)) - refused:
        mesh, p = tuple(parts(layout)[:3]), Case(layout=layout, base=plain[0].base).config().parallel
        assert (*mesh, p.schedule) in proved and (*mesh, p.dispatcher) in by, layout
    assert [name for name in refused if "deepep" in name] == ["ep8/deepep"], "said once"


def test_every_value_and_the_pairs_that_bite_are_proved(all_of_eight):
    """Of the real options, where FP64 has no DeepSpeed."""
    valid = all_of_eight[0]
    cases = [case for case in valid if case.options or case.routing != "natural"]
    assert len(cases) <= 50 and len(set(valid)) == len(valid) <= 90, "ten minutes"
    words = lambda c: {f"mesh={c.parallel.pp, c.parallel.edp, c.parallel.ep}", f"schedule={c.parallel.schedule}"}
    met = [{f"routing={case.routing}", *case.options, *words(case.config())} for case in cases]
    together = lambda *words: any(set(words) <= row for row in met)
    seen = {word for row in met for word in row if word.startswith(("mesh=", "schedule="))}
    assert len(seen) == 4 + len(SCHEDULES)
    never = {("parallel.placement_interval=1", "mesh=(2, 4, 1)")}  # experts have nowhere to move to
    never |= {("train.micro_batch_sequences=2", f"schedule={name}") for name in ("dualpipe", "dualpipev")}  # too few micro-batches are left
    wanted = [f"{name}={value}" for name, values in OPTIONS.items() for value in values[1:] if name != "precision"]
    missing = {(word, how) for word, how in itertools.product(wanted, seen) if not together(word, how)}
    assert missing == never
    for one, other in itertools.combinations(("precision=fp32", "train.micro_batch_sequences=2", "optim.engine=deepspeed"), 2):
        assert together(one, other)
    assert not any("optim.engine=deepspeed" in row and not any(word.startswith("precision=") for word in row) for row in met)


def test_what_the_user_has_said_is_left_alone():
    asked = command.parse(["layouts=all", "world=2", "model.mtp_depth=1", "routing=ties"])
    cases = list(command.choose_cases(asked, command.base_words(asked)))
    assert {case.routing for case in cases} == {"ties"}
    assert not any("mtp_depth" in case.name for case in cases) and any("recompute" in case.name for case in cases)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "words",
    [
        ["layouts=all", "world=4"],
        ["layouts=smoke", "model.mtp_depth=1", "optim.lr=1e-3", "seed=7", "steps=2"],
        [
            "layouts=pp2ep2,ep4",
            "experiment=tiny",
            "model=micro",
            "optim.warmup_steps=1",
            "data.seq_len=8",
            "world=4",
            "train.recompute=[attention,experts]",
        ],
        ["layouts=pp2ep2", "precision=fp32", "optim.engine=deepspeed", "data.seq_len=16"],
    ],
    ids=["options", "settings", "experiment", "engine"],
)
def test_a_cases_command_proves_the_same_case(words):
    request = command.parse(words)
    base = command.base_words(request)
    for case in checked(list(command.choose_cases(request, base)))[0][-12:]:
        program, verb, *again = shlex.split(case.command)
        assert (program, verb) == ("shoestring", "verify")
        other = command.parse(again)
        (same,) = command.choose_cases(other, command.base_words(other))
        assert same.routing == case.routing and same.config() == case.config(), case.command


def test_a_trace_of_another_model_makes_a_case_invalid(tmp_path):
    case = Case(layout="pp1", routing=f"trace:{tmp_path / 'no'}", base=command.base_words(command.parse([])))
    valid, (invalid,) = checked([case])
    assert valid == [] and "cannot be read" in invalid.why
