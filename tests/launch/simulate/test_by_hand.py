"""Pieces of a projected step, each against the arithmetic that a reader would do by hand."""

import math

import pytest
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.launch.simulate import Interval, in_all, project_run, project_step
from shoestring.launch.simulate.rates import Rates
from shoestring.launch.simulate.run import checkpoint_seconds, effective_share
from shoestring.launch.simulate.stage import Compute, Exchange, Load, exchange_bytes, stages
from shoestring.launch.simulate.step import Conditions, Job, _farthest, _hop_seconds, _simulate, _sum, _Tail
from shoestring.train import cost

T, D, K, EXPERTS = 4096, 2048, 6, 64  # tokens of a micro-batch, model dim, top-k and experts of moonlight
BASE = "model=moonlight model.num_layers=4 model.max_seq_len=4096 cluster=h100 data=synthetic data.seq_len=4096 precision=bf16"
BATCH = "train.global_batch_tokens=524288"


def configured(*words):
    return load([*BASE.split(), BATCH, *" ".join(words).split()])


def rates_of(c):
    return Rates(cluster=c.cluster, linear=c.precision.products, plain=c.precision.compute)


def link(c, num_bytes, kind):
    r = c.cluster.rates
    gb_s, share, us = {
        "inter": (c.cluster.inter_node_gb_s, r.inter_node, r.inter_latency_us),
        "intra": (c.cluster.intra_node_gb_s, r.intra_node, r.intra_latency_us),
    }[kind]
    return num_bytes / (gb_s * 1e9 * share) + us * 1e-6


def test_squares_of_intervals_add():
    """3, 4, 5: each side of its own."""
    made = _sum(10.0, {"a": Interval(low=1.0, likely=4.0, high=8.0), "b": Interval(low=-1.0, likely=3.0, high=6.0)})
    assert (made.low, made.likely, made.high) == (12.0, 17.0, 22.0)


def test_one_term_is_the_interval():
    c = configured("parallel.ep=8")
    c = replaced(c, "stack.terms", {"imbalance": c.stack.terms["imbalance"]})
    step = project_step(c)
    term = step.terms["imbalance"]
    assert 0 < term.low < term.likely < term.high
    for end in ("low", "likely", "high"):
        assert getattr(step.expected, end) == pytest.approx(step.ideal + getattr(term, end))
    likely = c.stack.terms["imbalance"].likely
    assert step.ideal + term.likely == _simulate(Job.of(c), Conditions(imbalance=likely))[0]


@pytest.mark.parametrize("when", ["F", "B", "W"])
def test_experts_compute_what_they_get(when):
    """Twice the rows are nearly twice the experts' time (a shared expert and tokens' own work do not grow); attention stays as it is."""
    c = configured("parallel.ep=8", "model.num_shared_experts=0")
    even, twice = (stages(c, rates_of(c), Load(rows=rows), [range(1, 2), range(2, 4)])[0] for rows in (1.0, 2.0))
    for before, after in zip(even, twice):
        if isinstance(before, Compute):
            one, two = before.of(when, False).seconds, after.of(when, False).seconds
            assert 1.7 < two / one <= 2.0 if before.name == "experts" else two == one
        elif when != "W":
            latency = c.cluster.rates.intra_latency_us * 1e-6
            assert after.of(when, False) - latency == pytest.approx(2 * (before.of(when, False) - latency))


def test_what_an_exchange_sends_and_takes():
    """16 ranks on two nodes, a copy for each expert: 8 of 16 parts leave the node, 7 stay in it beside the own one; both kinds of link work
    at the same time. A row that goes out has its weight (FP32) beside it; what comes back has not."""
    c = configured("parallel.ep=16")
    for when, name, row in (("F", "dispatch", 2 * D + 4), ("F", "combine", 2 * D), ("B", "combine", 2 * D), ("B", "dispatch", 2 * D + 4)):
        inter, intra, after = exchange_bytes(c, when, name)
        assert (inter, intra, after) == (T * K * row * 8 / 16, T * K * row * 7 / 16, 0)
        (made,) = [s for s in stages(c, rates_of(c), Load(), [range(1, 2), range(2, 4)])[0] if isinstance(s, Exchange) and s.name == name]
        assert made.of(when, False) == pytest.approx(link(c, inter, "inter"))  # the slower of the two
        assert made.of(when, True) == pytest.approx(link(c, inter / c.cluster.rates.exchange_beside_compute, "inter"))


def test_by_nodes_the_second_leg_follows_the_first():
    """A token crosses to a node once, and there goes to one of eight ranks for each of its experts. DeepEP's legs run at the same time."""
    c = configured("parallel.ep=16", "parallel.dispatcher=hierarchical")
    inter, beside, after = exchange_bytes(c, "F", "combine")
    reached = 1 - math.comb(EXPERTS // 2, K) / math.comb(EXPERTS, K)
    assert inter == pytest.approx(T * reached * 2 * D) and beside == 0 and after == pytest.approx(T * K * 7 / 8 * 2 * D)
    seconds = lambda c: next(s for s in stages(c, rates_of(c), Load(), [range(1, 2), range(2, 4)])[0] if s.name == "combine").of("F", False)
    assert seconds(c) == pytest.approx(link(c, inter, "inter") + link(c, after, "intra"))
    c = replaced(c, "parallel.dispatcher", "deepep")
    inter, _, after = exchange_bytes(c, "F", "combine")
    assert seconds(c) == pytest.approx(max(link(c, inter, "inter"), link(c, after, "intra")))


@pytest.mark.parametrize("words, kind", [("parallel.pp=2 parallel.edp=4", "intra"), ("parallel.pp=2 parallel.edp=8", "inter")])
def test_a_transfer_between_stages(words, kind):
    c = configured(words)
    assert _hop_seconds(c, rates_of(c)) == pytest.approx(link(c, T * D * 2, kind))
    assert _hop_seconds(configured("parallel.edp=8"), rates_of(c)) == 0
    slow = _simulate(Job.of(c), Conditions(pipeline_traffic=50.0))[0] - _simulate(Job.of(c), Conditions())[0]
    assert slow > 49 * link(c, T * D * 2, kind)  # there and back, at least once


def test_reduction_update_and_the_way_back():
    """Eight replicas in one node: FP32 gradients by reduce-scatter, BF16 weights by all-gather, and of AdamW's eighth
    masters twice and gradients once (FP32), two moments twice (BF16), weights once (BF16); then all gradients are set to zero."""
    c = configured("parallel.edp=8")
    job, params = Job.of(c), cost.num_params(c.model).trained
    experts = sum(cost.block_params(c.model, layer).experts for layer in range(c.model.num_blocks))
    _, _, timeline = _simulate(job, Conditions())
    tail = _Tail.of(job, timeline.spans[0])
    parts = (params - experts, experts)
    assert tail.reduced - timeline.makespan == pytest.approx(sum(link(c, 4 * n * 7 / 8, "intra") for n in parts))
    assert tail.gather == pytest.approx(sum(link(c, 2 * n * 7 / 8, "intra") for n in parts))
    rate = c.cluster.memory_tb_s * 1e12 * c.cluster.rates.memory["other"]
    assert tail.update == pytest.approx((params / 8 * (4 * 2 + 4 + 2 * 2 * 2 + 2) + params * 4) / rate)


def test_who_owns_what_of_both_directions():
    """DualPipe on two ranks: each holds both stages, and so all parameters, of which 2 x 4 ranks own an eighth each."""
    job = Job.of(configured("parallel.pp=2 parallel.edp=4 parallel.schedule=dualpipe"))
    both, alone = (_Tail.of(j, _simulate(j, Conditions())[2].spans[0]) for j in (job, Job.of(configured("parallel.edp=8"))))
    assert both.update == pytest.approx(alone.update)


def test_weights_are_cast_once_a_step():
    """FP8: all that a rank holds, BF16 read and two casts of a byte written."""
    plain, fp8 = (_Tail.of(job, _simulate(job, Conditions())[2].spans[0]).update for job in map(Job.of, (
        configured("parallel.edp=8"), configured("parallel.edp=8", "precision=fp8"))))  # fmt: skip
    c = configured("parallel.edp=8")
    rate = c.cluster.memory_tb_s * 1e12 * c.cluster.rates.memory["quantise"]
    assert fp8 - plain == pytest.approx(cost.num_params(c.model).trained * 4 / rate)


def test_stages_are_reduced_from_their_last_action_on():
    """Two stages of one rank, interleaved: both reductions, the second after the first where that is still under way."""
    job = Job.of(configured("parallel.pp=2 parallel.edp=4 parallel.schedule=interleaved_1f1b parallel.chunks=2"))
    spans = _simulate(job, Conditions())[2].spans[0]
    at, later = (_Tail.of(job, [span._replace(start=span.start + wait, end=span.end + wait) for span in spans]) for wait in (0.0, 5.0))
    assert later.reduced == pytest.approx(at.reduced + 5.0) and at.reduced > max(span.end for span in spans)


@pytest.mark.parametrize("num, deviations", [(1, 0.0), (2, 0.564), (10, 1.539), (100, 2.508), (1000, 3.241)])
def test_the_slowest_of_many(num, deviations):
    """The expected largest of so many normal draws (tables of order statistics)."""
    assert _farthest(num) == pytest.approx(deviations, rel=0.05)


def test_jitter_and_stalls():
    c = configured("parallel.edp=8")
    job = Job.of(c)
    ideal, parts, _ = _simulate(job, Conditions())
    assert _simulate(job, Conditions(host_stalls=0.1))[0] == pytest.approx(1.1 * ideal)
    slower = _simulate(job, Conditions(jitter=0.01))[0] - ideal
    assert slower == pytest.approx(0.01 * _farthest(8) * (parts["compute"] + parts["recompute"]), rel=1e-6)
    assert _simulate(job, Conditions(kernels=2.0))[0] - ideal == pytest.approx(parts["compute"] + parts["recompute"])


def test_where_a_pipeline_waits():
    """1F1B on even stages: of each rank's time the bubble is what no action fills."""
    c = configured("parallel.pp=2 parallel.edp=4")
    _, parts, timeline = _simulate(Job.of(c), Conditions())
    busy = [sum(span.end - span.start for span in spans) for spans in timeline.spans]
    assert parts["bubble"] == pytest.approx(timeline.makespan - sum(busy) / 2)


# ---------------------------------------------------------------- runs


def test_a_run_by_hand():
    c = configured("parallel.edp=8", "checkpoint.interval=100")
    step = project_step(c)
    run = project_run(c, step, 1e12)
    seconds, mttf = step.expected.likely, c.cluster.mttf_gpu_hours * 3600 / 8
    effective = 1 - (100 * seconds / 2 + c.cluster.restart_minutes * 60) / mttf
    assert run.effective == pytest.approx(effective)
    hours = seconds * 1e12 / step.tokens / 3600 / effective
    assert run.days.likely == pytest.approx(hours / 24) and run.gpu_hours.likely == pytest.approx(8 * hours)
    assert run.dollars.likely == pytest.approx(8 * hours * c.cluster.price_per_gpu_hour)
    assert run.kwh.likely == pytest.approx(8 * hours * c.cluster.kw_per_gpu)
    assert run.tokens_per_second_per_gpu.likely == pytest.approx(step.tokens / seconds / 8)
    flops = cost.flops_per_token(c.model, T)
    assert run.mfu.likely * 989e12 == pytest.approx(run.tokens_per_second_per_gpu.likely * flops.total)
    # All of S x S, and not the S (S + 1) / 2 below the diagonal; in forward, and twice that in backward.
    more = run.mfu_full.likely / run.mfu.likely - 1
    assert more == pytest.approx(3 * flops.attention / flops.total * (2 * T / (T + 1) - 1))


def test_checkpoints_that_are_waited_for():
    """Masters (FP32) and two moments (BF16) of the devices' shares, at 2 GB/s each; of an asynchronous one nobody waits."""
    c = configured("parallel.edp=8", "checkpoint.async_save=false", "checkpoint.interval=10")
    waits = cost.num_params(c.model).trained * 8 / 8 / (c.cluster.checkpoint_gb_s * 1e9)
    assert checkpoint_seconds(c) == pytest.approx(waits) and checkpoint_seconds(replaced(c, "checkpoint.async_save", True)) == 0
    free = effective_share(replaced(c, "checkpoint.async_save", True), 2.0)
    assert effective_share(c, 2.0) == pytest.approx(free / (1 + waits / 20))


def test_where_failures_come_before_checkpoints():
    c = configured("parallel.edp=8", "checkpoint.interval=1000")
    with pytest.raises(
        ConfigError, match=r"checkpoint\.interval = 1000: 8 devices stop every .* hours.*nearest valid value: (\d+)"
    ) as found:
        effective_share(c, 1e5)
    assert 0.05 < effective_share(replaced(c, "checkpoint.interval", found.value.nearest), 1e5) < 0.6


def test_stretches_add_up():
    c = configured("parallel.edp=8")
    step = project_step(c)
    runs = [project_run(c, step, n) for n in (1e12, 3e12)]
    total, whole = in_all(runs, runs[1]), project_run(c, step, 4e12)
    assert total.tokens == 4e12 and total.gpus == 8 and total.effective == pytest.approx(whole.effective)
    for name in ("days", "dollars", "kwh", "gpu_hours"):
        for end in ("low", "likely", "high"):
            assert getattr(getattr(total, name), end) == pytest.approx(getattr(getattr(whole, name), end))
    doubled = project_run(c, step, 1e12, seconds=step.expected.map(lambda s: 2 * s * 1e12 / step.tokens))
    assert doubled.days.high == pytest.approx(2 * runs[0].days.high) and doubled.mfu == runs[0].mfu
