"""A projected step: parts that add up, published makespans, better hardware that is never slower, terms that go away with their flag."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import get, replaced
from shoestring.launch.simulate import project_run, project_step
from shoestring.parallel.schedule import SCHEDULES
from shoestring.parallel.timeline import by_kind, simulate

LAYOUTS = [
    "parallel.ep=8",
    "parallel.pp=2 parallel.ep=16 parallel.dispatcher=hierarchical",
    "parallel.pp=4 parallel.schedule=zbv parallel.chunks=2",
    "parallel.pp=2 parallel.edp=2 parallel.ep=8 parallel.schedule=dualpipe",
    "parallel.ep=16 parallel.schedule=dualpipev parallel.chunks=2",
    "parallel.pp=2 parallel.schedule=interleaved_1f1b parallel.chunks=2 train.recompute=[attention,experts]",
    "parallel.edp=8",
]
BASE = "model=moonlight model.num_layers=8 model.max_seq_len=4096 cluster=h100 data=synthetic data.seq_len=4096"
BATCH = "train.global_batch_tokens=524288"
BETTER = ["memory_tb_s", "intra_node_gb_s", "inter_node_gb_s", "peak_tflops"]


def configured(layout, *more):
    return load([*BASE.split(), BATCH, *layout.split(), *more])


def improved(config, name, factor):
    value = get(config, f"cluster.{name}")
    better = {k: v * factor for k, v in value.items()} if isinstance(value, dict) else value * factor
    return replaced(config, f"cluster.{name}", better)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_parts_add_up(layout, precision):
    step = project_step(configured(layout, f"precision={precision}"))
    assert sum(step.parts.values()) == pytest.approx(step.ideal) and min(step.parts.values()) >= 0
    assert sum(step.breakdown.values()) == pytest.approx(step.expected.likely)
    assert step.expected.low <= step.expected.likely <= step.expected.high and step.ideal < step.expected.likely
    assert (step.parts["recompute"] > 0) == ("recompute" in layout)


@settings(max_examples=12, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), name=st.sampled_from(BETTER), factor=st.floats(1.0, 8.0))
def test_better_hardware_is_never_slower(layout, name, factor):
    config = configured(layout, "precision=fp8")
    before, after = (project_step(c, terms=False).ideal for c in (config, improved(config, name, factor)))
    assert after <= before * (1 + 1e-12)


@pytest.mark.parametrize("pp, num, makespan, idle", [(8, 20, 66, 6), (16, 120, 374, 14)])
def test_published_makespans(pp, num, makespan, idle):
    """DualPipe with F, B, W and a pair of 1, 2, 1 and 3, and no communication."""
    timeline = simulate(SCHEDULES["dualpipe"].actions(pp, 1, num), by_kind(F=1, B=2, I=1, W=1, pair=3))
    assert timeline.makespan == makespan and timeline.idle == [idle] * pp


def test_terms_go_with_their_flag():
    config = configured(LAYOUTS[1])
    for name in config.stack.terms:
        step = project_step(configured(LAYOUTS[1], f"~stack.terms.{name}"))
        assert name not in step.terms and step.expected.likely <= project_step(config).expected.likely + 1e-12
    bare = project_step(replaced(config, "stack.terms", {}))
    assert bare.terms == {} and bare.expected.low == bare.expected.high == bare.ideal
    with pytest.raises(ConfigError, match="is no term"):
        project_step(configured(LAYOUTS[0], "++stack.terms.jiter={low: 0, likely: 0, high: 0}"))


def test_time_and_dollars_scale_with_tokens():
    config = configured(LAYOUTS[0])
    step = project_step(config)
    one, ten = (project_run(config, step, n * 1e12) for n in (1, 10))
    assert ten.days.likely == pytest.approx(10 * one.days.likely) and ten.dollars.high == pytest.approx(10 * one.dollars.high)
    hours = step.expected.likely / step.tokens * 1e12 / 3600 * 8
    assert one.gpu_hours_per_trillion_tokens.likely == pytest.approx(hours)
    assert one.dollars.likely == pytest.approx(hours * config.cluster.price_per_gpu_hour / one.effective)


def test_imbalance_costs_experts_and_exchanges_alone():
    terms = {"imbalance": replaced(configured(LAYOUTS[0]).stack.terms["imbalance"], "high", 2.0)}
    dense, routed = (replaced(configured(words), "stack.terms", terms) for words in ("parallel.edp=8 model.num_dense_layers=8", LAYOUTS[0]))
    assert project_step(dense).terms["imbalance"].high == 0
    step = project_step(routed)
    assert 0 < step.terms["imbalance"].likely < step.terms["imbalance"].high < step.ideal
