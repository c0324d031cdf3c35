"""Blocks of each stage: as written, with what is said of mistakes, and shared out by cost, against every split there is."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.schema import ParallelConfig
from shoestring.parallel.schedule import check, parse_stages, share_layers, split_layers

COSTS = st.lists(st.integers(1, 9), min_size=1, max_size=9)
ENDS = st.integers(0, 12)


def sizes(stages):
    assert [block for stage in stages for block in stage] == list(range(stages[-1].stop)), "every block once and in order"
    return [len(stage) for stage in stages]


# ---------------------------------------------------------------- as written


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6))
def test_what_is_written_is_what_is_read(runs):
    counts = [n for n, times in runs for _ in range(times)]
    text = "|".join(f"{n}*{times}" if times > 1 else f" {n}" for n, times in runs)
    assert sizes(parse_stages(text, sum(counts), len(counts))) == counts


def test_ends_may_be_without_a_block():
    """The embedding alone, the head alone."""
    assert parse_stages("0|3*2|0", 6, 4) == [range(0, 0), range(0, 3), range(3, 6), range(6, 6)]


@pytest.mark.parametrize(("text", "layers", "stages", "rule", "nearest"), [
    ("5|4*6|3", 61, 8, "shares out 32 blocks, and model.num_layers is 61", "8*5|7*3"),
    ("9|1*3", 11, 4, "shares out 12 blocks, and model.num_layers is 11", "8|1*3"),
    ("4|4", 8, 3, "names 2 stages, and parallel.pp x parallel.chunks are 3", "3|4|1"),
    ("2*4", 6, 3, "names 4 stages", "2*3"),
    ("3|0|3", 6, 3, r"stage 1 has no block: only a first stage \(embedding\)", "2|1|3"),
    ("0", 4, 1, "stage 0 has no block", "4"),
    ("4,4", 8, 2, "want blocks of each stage, such as", "4*2"),
    ("4|-4", 8, 2, "want blocks of each stage", "4*2"),
    ("4*", 8, 2, "want blocks of each stage", "4*2"),
    ("4|", 8, 2, "want blocks of each stage", "4*2"),
    ("2*2*2", 8, 2, "want blocks of each stage", "4*2"),
])  # fmt: skip
def test_mistakes_are_told_with_the_nearest_split(text, layers, stages, rule, nearest):
    with pytest.raises(ConfigError, match=rule) as caught:
        parse_stages(text, layers, stages)
    assert caught.value.field == "parallel.stages" and caught.value.nearest == nearest
    assert len(parse_stages(nearest, layers, stages)) == stages


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 20))
def test_the_nearest_split_is_valid(counts, stages, more):
    try:
        parse_stages("|".join(map(str, counts)), stages + more, stages)
    except ConfigError as error:
        parse_stages(error.nearest, stages + more, stages)


def test_a_configuration_is_checked():
    config = load(["model.num_layers=6", "parallel.pp=2", "parallel.stages=3|2"])
    with pytest.raises(ConfigError, match=r"parallel\.stages = 3\|2: shares out 5 blocks, and model\.num_layers is 6; .*: 3\*2"):
        check(config)
    check(load(["model.num_layers=6", "parallel.pp=2", "parallel.stages=4|2"]))


# ---------------------------------------------------------------- by cost


def splits(n, parts):
    """Every way to cut n layers into parts of at least one."""
    for inner in itertools.combinations(range(1, n), parts - 1):
        yield [range(a, b) for a, b in itertools.pairwise((0, *inner, n))]


def stage_costs(stages, costs, first, last):
    dear = [sum(costs[i] for i in stage) for stage in stages]
    dear[0] += first
    dear[-1] += last
    return dear


@given(COSTS, st.integers(1, 9), ENDS, ENDS)
def test_the_dearest_stage_is_as_cheap_as_can_be(costs, parts, first, last):
    parts = min(parts, len(costs))
    got = split_layers(costs, parts, first=first, last=last)
    assert min(sizes(got)) >= 1
    assert max(stage_costs(got, costs, first, last)) == min(max(stage_costs(s, costs, first, last)) for s in splits(len(costs), parts))


@settings(max_examples=150)
@given(COSTS.filter(lambda costs: len(costs) > 1), st.integers(1, 4), ENDS, ENDS)
def test_of_those_splits_a_v_takes_the_one_whose_dearest_rank_is_cheapest(costs, ranks, first, last):
    parts = 2 * min(ranks, len(costs) // 2)

    def price(stages):
        dear = stage_costs(stages, costs, first, last)
        return max(dear), max(dear[s] + dear[-1 - s] for s in range(parts // 2))

    got = split_layers(costs, parts, first=first, last=last, mirrored=True)
    assert len(sizes(got)) == parts
    assert price(got) == min(map(price, splits(len(costs), parts)))


@pytest.mark.parametrize(("schedule", "pp", "chunks", "mirrored"), [
    ("1f1b", 4, 1, False), ("interleaved_1f1b", 2, 2, False), ("zbv", 2, 2, True), ("dualpipev", 2, 2, True), ("dualpipe", 4, 1, True),
    ("interleaved_1f1b", 1, 3, False),  # every stage on the one rank, and an odd number of them
])  # fmt: skip
def test_a_layout_is_balanced_as_its_stages_lie(schedule, pp, chunks, mirrored):
    costs, parallel = [1, 1, 1, 1, 1, 1, 3], ParallelConfig(pp=pp, chunks=chunks, schedule=schedule)
    assert split_layers(costs, 4, mirrored=True) != split_layers(costs, 4), "an example that tells the two apart"
    assert share_layers(parallel, costs, first=0, last=0) == split_layers(costs, pp * chunks, mirrored=mirrored)
    written = replace(parallel, stages="2*2|1|2") if pp * chunks == 4 else replace(parallel, stages="2*2|3")
    assert sizes(share_layers(written, costs, first=0, last=0)) == ([2, 2, 1, 2] if pp * chunks == 4 else [2, 2, 3])
