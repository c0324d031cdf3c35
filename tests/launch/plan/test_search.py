"""What a search may rely on: bounds that are bounds, the least recomputation that fits, no layout twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.rules import replaced
from shoestring.launch.plan.layouts import RECOMPUTE, Layout, candidates
from shoestring.launch.plan.request import ask, parse
from shoestring.launch.plan.search import Bounds, fullest_rank, search
from shoestring.launch.simulate import project_step
from shoestring.launch.validate import validate
from shoestring.parallel.schedule import SCHEDULES
from shoestring.train.memory import rank_memory
from shoestring.train.rank_share import stage_layers

SMALL = "model=moonlight model.num_layers=8 data.seq_len=4096 train.global_batch_tokens=1048576"
# Experts over nodes and in one, FP8 and not, prediction modules, one dense model, slow and fast links.
RUNS = [
    f"{SMALL} cluster=h100 precision=bf16 gpus=32",
    f"{SMALL} cluster=h800 precision=fp8 gpus=16 model.mtp_depth=1 cluster.inter_node_gb_s=20",
    "model=small cluster=a100 precision=bf16 gpus=8 train.global_batch_tokens=262144",
    "model=llama3_405b model.num_layers=8 model.num_dense_layers=8 cluster=b200 precision=fp8 gpus=16 train.global_batch_tokens=1048576",
]


def configured(words):
    asked = ask(parse(words.split()))
    return asked.at(asked.request.gpus), asked.request.gpus


@pytest.fixture(scope="module", params=RUNS)
def made(request):
    config, gpus = configured(request.param)
    return config, Bounds(config), list(candidates(config, gpus, frozenset()))


@settings(max_examples=24, deadline=None)
@given(data=st.data())
def test_no_step_is_shorter_than_its_bound(made, data):
    config, bounds, layouts = made
    schedule = data.draw(st.sampled_from(sorted({layout.schedule for layout in layouts})))
    layout = data.draw(st.sampled_from([layout for layout in layouts if layout.schedule == schedule]))
    ideal = project_step(layout.apply(config), terms=False).ideal
    assert 0 < bounds.of(layout) <= ideal * (1 + 1e-9), layout


def test_bounds_are_near_where_little_is_lost():
    """One pipeline rank, nothing to exchange: the bound is the step, but for reduction and update."""
    config, _ = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=8")
    step = project_step(Layout(pp=1, edp=8, ep=1).apply(config), terms=False)
    assert Bounds(config).of(Layout(pp=1, edp=8, ep=1)) == pytest.approx(step.parts["compute"])


def test_what_is_found_fits_with_the_least_recomputation():
    size = lambda c: max(rank_memory(c, rank, imbalance=c.stack.terms["imbalance"].high).total for rank in range(c.parallel.pp))
    used = set()
    for gb in (30, 50, 80):
        config, gpus = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=8 cluster.memory_gb={gb}")
        found = search(config, gpus, keep=2, most=3)
        for priced in found.best:
            validate(priced.config)
            assert size(priced.config) <= gb * 1e9 and priced.memory.total == pytest.approx(size(priced.config))
            less = RECOMPUTE[: RECOMPUTE.index(priced.layout.recompute)]
            assert all(size(replaced(priced.config, "train.recompute", choice)) > gb * 1e9 for choice in less)
            used.add(priced.layout.recompute)
        assert found.best and (found.smallest is None or found.smallest[1] > gb * 1e9)
    assert len(used) > 1 and () in used


def test_what_is_said_not_to_fit_does_not():
    """Every layout is tried: those that are left out for their size are those that do not fit even where all is computed again."""
    config, gpus = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=8 cluster.memory_gb=30 parallel.pp=2")
    fixed = frozenset({"parallel.pp"})
    found = search(config, gpus, fixed=fixed, keep=10_000, most=10_000)
    sizes = [
        fullest_rank(replaced(layout.apply(config), "train.recompute", RECOMPUTE[-1]), config.stack.terms["imbalance"].high).total
        for layout in candidates(config, gpus, fixed)
    ]
    assert 0 < found.too_large == sum(size > 30e9 for size in sizes) < len(sizes) == found.tried and found.exhausted
    assert found.smallest[1] == min(size for size in sizes if size > 30e9)


def test_what_the_user_has_set_stays():
    config, gpus = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=32 train.recompute=[norm] parallel.ep=4 parallel.schedule=zbv")
    fixed = frozenset({"train.recompute", "parallel.ep", "parallel.schedule"})
    found = search(config, gpus, fixed=fixed, keep=3)
    assert found.best and {(p.layout.recompute, p.layout.ep, p.layout.schedule) for p in found.best} == {(("norm",), 4, "zbv")}


def test_no_layout_twice(made):
    config, _, layouts = made
    applied = [layout.apply(config) for layout in layouts]
    assert len({(c.parallel.pp, c.parallel.ep, c.parallel.schedule, c.parallel.chunks, c.parallel.dispatcher,
                 c.train.micro_batch_sequences, stage_layers(c)) for c in applied}) == len(layouts)  # fmt: skip
    for c in applied:
        p, num = c.parallel, c.num_micro_batches
        assert num * p.dp * c.train.micro_batch_sequences == c.sequences_per_step
        assert SCHEDULES[p.schedule].rule(p.pp, p.chunks, num) is None


def test_stages_as_the_user_has_them():
    config, gpus = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=16 parallel.stages=5|3")
    found = list(candidates(config, gpus, frozenset({"parallel.stages"})))
    assert found and {layout.stages for layout in found} == {"5|3"} and {layout.pp * layout.chunks for layout in found} == {2}


def test_the_fullest_rank_is_the_fullest():
    config, _ = configured(f"{SMALL} cluster=h100 precision=bf16 gpus=16")
    for words in ({"parallel.pp": 4}, {"parallel.pp": 4, "parallel.schedule": "dualpipe"}, {"parallel.pp": 8}):
        tried = config
        for key, value in words.items():
            tried = replaced(tried, key, value)
        every = [rank_memory(tried, rank, imbalance=1.2).total for rank in range(tried.parallel.pp)]
        assert fullest_rank(tried, 1.2).total == max(every)
        assert fullest_rank(tried, 1.2, enough=0).total == every[-1]
