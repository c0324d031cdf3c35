"""Sums and normalisers of a global batch of 15,360 sequences of 4,096 tokens, and of a run of 14.8 T: no count is lost, no scale is off.

Oracles: Python's integers, exact fractions, and FP64 sums rounded once (`math.fsum`).
"""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.phases import phases
from shoestring.launch.local import fork_ranks
from shoestring.parallel.dispatch import Routing
from shoestring.parallel.executor import Executor
from shoestring.parallel.host_reads import HostReads
from shoestring.parallel.phases import ComputePhase, MicroBatch
from shoestring.parallel.placement import rank_overload
from shoestring.parallel.schedule import Op
from shoestring.train import cost, metrics
from shoestring.train.engine import ROUTER_SUMS, Engine, learning_rate
from shoestring.train.model.moe import RouterStats
from shoestring.train.resume import Progress

SEQUENCES, SEQ_LEN, TOP_K = 15_360, 4096, 8
TOKENS = SEQUENCES * SEQ_LEN  # 62,914,560
COPIES = TOKENS * TOP_K  # 503,316,480: past the 2^24 up to which FP32 counts


@pytest.fixture(scope="module")
def recipe():
    return load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus]"])


# ---------------------------------------------------------------- one step


def _step_of_many(replicas):
    """A real step of one process, whose sums over ranks come back as if `replicas` ranks had done just the same."""
    config = load(["data=synthetic", "data.seq_len=32", "model.vocab_size=300", "train.global_batch_tokens=64", "optim.z_loss_coef=1e-3"])
    engine, batches = Engine(config), []
    for i in range(2):
        rows = torch.randint(300, (1, 33), generator=torch.Generator().manual_seed(i))
        rows[:, 20 + i :] = torch.where(torch.arange(33 - 20 - i) > 5, -100, rows[:, 20 + i :])  # fewer targets than nominal_tokens
        batches.append(MicroBatch(tokens_BS=rows[:, :-1].clamp(min=0), targets_BN=rows[:, 1:]))
    all_reduce, reduce, norm, scales = dist.all_reduce, dist.reduce, engine.optimizer.norm, []
    engine.optimizer.norm = lambda scale: [scales.append(scale), norm(scale)][1]
    # What is 1-D is summed over the world; the scalar is the squared norm over owned pieces, which stays one rank's.
    dist.all_reduce = lambda t, *args, **kwargs: t.mul_(replicas) if t.dim() else all_reduce(t, *args, **kwargs)
    dist.reduce = lambda t, *args, **kwargs: [t.mul_(replicas), reduce(t, *args, **kwargs)][1]
    try:
        result = engine.train_step(batches, lr=1e-3)
    finally:
        dist.all_reduce, dist.reduce = all_reduce, reduce
    weights = {name: p.detach().clone() for name, p in engine.parameters().items()}
    return result, weights, sum(int((b.targets_BN >= 0).sum()) for b in batches), scales


def test_a_step_of_63_m_tokens_is_the_step_of_its_mean():
    """A million replicas of one rank's 51 tokens change every sum, and neither loss, norm, clip, weights nor biases."""
    ((one, weights, tokens, scale), (many, weights_of_many, _, scale_of_many)) = fork_ranks(1, _both)[0]
    replicas = 1 << 20
    assert tokens * replicas == many.tokens > TOKENS / 2 and one.tokens == tokens
    # Backward divided by a micro-batch's 32 tokens: what is left to do makes it the mean over all.
    assert scale == [32 / tokens] and scale_of_many == [32 / (tokens * replicas)]
    assert torch.equal(many.loads, one.loads * replicas) and many.loads.dtype == torch.int64
    for name in ("loss", "grad_norm", "clip_coef", "balance_loss", "z_loss", "router_entropy", "bias_norm"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-6), name
    assert many.rank_overload == one.rank_overload
    for name, weight in weights.items():
        torch.testing.assert_close(weights_of_many[name], weight, rtol=1e-5, atol=1e-7)


def _both():
    return _step_of_many(1), _step_of_many(1 << 20)


def test_counts_of_the_global_batch_are_whole_numbers(recipe, monkeypatch):
    """128 pipelines of 120 micro-batches, one target of each ignored; one expert has one copy more on each. The world's sum is Python's."""
    load_E, losses = torch.full((256,), 120 * SEQ_LEN * TOP_K // 256), torch.tensor([120 * 2.5, 120 * 3.5], dtype=torch.float64)
    load_E[7] += 1
    sums = {name: torch.tensor(0.5, dtype=torch.float64) for name in ROUTER_SUMS}
    stages = {0: SimpleNamespace(stats={3: SimpleNamespace(take=lambda: (load_E, sums))})}
    rank = SimpleNamespace(
        config=recipe, nominal_tokens=SEQ_LEN, device="cpu", reads=HostReads(), _heads=lambda batches: batches, stages=stages
    )

    def all_reduce(packed):
        assert packed.dtype == torch.float64
        packed.copy_(torch.tensor([float(128 * Fraction(value)) for value in packed.tolist()], dtype=torch.float64))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    batches = [SimpleNamespace(num_targets=torch.tensor(SEQ_LEN - 1)) for _ in range(120)]
    totals = Engine._reduce_counts(rank, losses, batches, torch.tensor([2.0**40 + 1], dtype=torch.float64))
    assert totals.tokens == SEQUENCES * (SEQ_LEN - 1) == 62_899_200
    assert totals.losses == [2.5 * TOKENS, 3.5 * TOKENS] and totals.router_sums == [64.0] * 3
    assert totals.loads.dtype == torch.int64 and totals.loads.shape == (59, 256)
    assert int(totals.loads[0].sum()) == COPIES + 128 and int(totals.loads[0, 7]) == COPIES // 256 + 128
    assert not totals.loads[1:].any() and int(totals.flags) == 128 * (2**40 + 1)


def test_losses_of_15360_micro_batches_are_summed_in_fp64():
    """One process reads the whole batch: FP32 would be off by more than a thousand times what is allowed here."""
    values = torch.rand(SEQUENCES, generator=torch.Generator().manual_seed(0)) + 11
    batches = [MicroBatch(tokens_BS=v.view(1, 1), targets_BN=v.view(1, 1)) for v in values]
    actions = [(Op("F", 0, i),) for i in range(SEQUENCES)]
    executor = Executor(
        stages={0: [ComputePhase("loss", lambda batch, v: (torch.stack([v.sum(), 2 * v.sum()]),))]},
        mesh=SimpleNamespace(placements=((0,),), num_stages=1, pp_rank=0), actions=lambda num: actions, store=[],
        boundary=None, loss_weights=torch.ones(2, dtype=torch.float64),
    )  # fmt: skip
    exact, narrow = math.fsum(values.tolist()), np.float32(0)
    for v in values.numpy():
        narrow += v
    assert executor.evaluate(batches).tolist() == pytest.approx([exact, 2 * exact], rel=1e-12)
    assert abs(float(narrow) - exact) > 1e-9 * exact, "the oracle cannot tell FP32 from FP64"


def test_router_sums_of_15360_micro_batches():
    """Counts of copies past int32 when one expert takes all of five batches; sums over tokens that FP32 would let drift."""
    stats, value = RouterStats(load_E=torch.zeros(2, dtype=torch.int64)), torch.tensor(5.543 * SEQ_LEN)
    for _ in range(SEQUENCES):
        stats.observe(Routing(expert_TK=None, load_E=torch.tensor([SEQ_LEN * TOP_K * 5, 0]), sums={"entropy": value}))
    load_E, sums = stats.take()
    assert load_E.tolist() == [5 * COPIES, 0] and 5 * COPIES > 1 << 31
    assert float(sums["entropy"]) == pytest.approx(SEQUENCES * float(value), rel=1e-9)


@pytest.mark.parametrize("num_experts", [256, 160, 72])  # powers of two divide exactly; the others do not
def test_bias_moves_by_one_copy_in_half_a_billion(recipe, num_experts):
    total = COPIES - COPIES % num_experts
    mean, speed = total // num_experts, recipe.optim.bias_update_speed
    rows = torch.full((4, num_experts), mean)
    rows[1, 0], rows[1, 1] = mean + 1, mean - 1  # a copy too many, one too few
    rows[2] = 0
    rows[2, 5] = total  # all to one expert
    rows[3, 0] += 1  # the mean is no whole number
    biases = torch.zeros(4, num_experts)
    Engine._update_biases(SimpleNamespace(biases=biases, config=recipe, device="cpu"), rows)
    sign = lambda n: (n > 0) - (n < 0)
    wanted = [[speed * sign(sum(row) - load * num_experts) for load in row] for row in rows.tolist()]
    torch.testing.assert_close(biases, torch.tensor(wanted))
    assert not biases[0].any(), "an even layer moved"


def test_imbalance_of_half_a_billion_copies():
    even, odd = [COPIES // 256] * 256, [COPIES // 256] * 256
    odd[3], odd[200] = odd[3] + 1, odd[200] - 1
    assert metrics.max_violation([even, odd]) == [0.0, pytest.approx(256 / COPIES, rel=1e-9)]
    overload = rank_overload(torch.tensor([even, odd]), 64)
    assert overload == [1.0, pytest.approx(1 + 64 / COPIES, abs=1e-15)]


# ---------------------------------------------------------------- the run


def ramp_by_hand(tokens, start, increment, full):
    """Step by step: the batch has grown by as many increments as parts of the ramp are behind it."""
    done, sizes, parts = 0, [], (full - start) // increment
    while done < tokens:
        sizes.append(start + done * parts // tokens * increment)
        done += sizes[-1]
    return sizes


def test_ramp_and_phases_of_the_recipe(recipe):
    """3,072 to 15,360 sequences in 96 increments over 469 B tokens; then as many full batches as reach each phase's tokens."""
    run = phases(recipe)
    sizes = ramp_by_hand(469_000_000_000, 3072 * SEQ_LEN, 128 * SEQ_LEN, TOKENS)
    ramp = run[0]
    assert [ramp.batch_tokens(step) for step in range(len(sizes))] == sizes and ramp.num_steps == len(sizes)
    assert ramp.num_tokens == sum(sizes) and sizes[-1] == TOKENS - 128 * SEQ_LEN and len(ramp.levels) == 96
    lengths = {
        "constant": 9_531_000_000_000,
        "cosine": 4_300_000_000_000,
        "constant_low": 333_000_000_000,
        "constant_lowest": 167_000_000_000,
    }
    for phase in run[1:5]:
        assert phase.num_steps == math.ceil(Fraction(lengths[phase.name], TOKENS))
        assert phase.num_tokens == phase.num_steps * TOKENS
    assert [phase.num_steps for phase in run[5:]] == [1000, 1000]
    assert [phase.num_tokens for phase in run[5:]] == [1000 * 1920 * 32_768, 1000 * 480 * 131_072]
    assert 0 <= sum(phase.num_tokens for phase in run[:5]) - 14_800_000_000_000 < 5 * TOKENS


def test_learning_rate_of_every_phase(recipe):
    """At the recipe's own step numbers, tens of thousands to a phase."""
    by_name = {phase.name: phase for phase in phases(recipe)}
    rate = lambda name, step: learning_rate(by_name[name].config.optim, step, by_name[name].num_steps)
    assert rate("ramp", 0) == pytest.approx(2.2e-4 / 2000) and rate("ramp", 1999) == 2.2e-4 == rate("ramp", by_name["ramp"].num_steps - 1)
    cosine = by_name["cosine"].num_steps
    assert rate("cosine", 0) == 2.2e-4 and rate("cosine", cosine - 1) == pytest.approx(2.2e-5, rel=1e-12)
    assert rate("cosine", cosine) == pytest.approx(2.2e-5, rel=1e-12)
    rates = [rate("cosine", step) for step in range(0, cosine, 1000)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    for step in (1, cosine // 3, cosine // 2):
        left = (1 + math.cos(math.pi * float(Fraction(step, cosine - 1)))) / 2
        assert rate("cosine", step) == pytest.approx(2.2e-5 + (2.2e-4 - 2.2e-5) * left, rel=1e-12)


def test_tokens_and_dollars_of_the_run(recipe):
    """14.8 T tokens in a checkpoint's progress, in a sum over ranks and in the cost."""
    p = Progress()
    for phase in phases(recipe):
        for level in phase.levels:
            p.step += level.num_steps
            p.tokens += level.num_steps * level.batch_tokens
            p.samples += level.num_steps * (level.batch_tokens // phase.config.data.seq_len)
    p.tokens += 1  # odd, so that it is no float's rounding
    assert Progress(**json.loads(json.dumps(vars(p)))) == p and p.tokens > 14_800_000_000_000 and p.samples > 3_600_000_000
    assert int(torch.tensor([p.tokens], dtype=torch.float64).item()) == p.tokens
    per_token = cost.flops_per_token(recipe.model, SEQ_LEN)
    exact = p.tokens * (Fraction(per_token.matrices) + Fraction(per_token.attention)) * 3
    assert cost.train_flops(recipe.model, SEQ_LEN, p.tokens) == pytest.approx(float(exact), rel=1e-14)
    # The published bill: 2,664 K GPU-hours at two dollars are 1,540 tokens a second and GPU.
    assert cost.dollars(2664e3 * 3600 / 2048, 2048, recipe.cluster) == pytest.approx(5.328e6, rel=1e-12)
    assert cost.dollars_per_billion_tokens(14.8e12 / 2664e3 / 3600, recipe.cluster) * 14_800 == pytest.approx(5.328e6, rel=1e-12)


def test_a_record_of_step_240000(tmp_path):
    loads = [[COPIES // 256] * 255 + [2**53 + 1]] * 58
    record = replace(_record(), step=240_000, tokens=14_800_000_000_001, samples=3_613_281_251, expert_load=loads, batch_tokens=TOKENS)
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics.to_line(record) + metrics.to_line(replace(record, step=240_001, tokens=record.tokens + TOKENS)))
    assert metrics.read_records(path)[0] == record
    assert metrics.rewind(path, 240_000).lost == 1 and metrics.read_records(path) == [record]
    summary = metrics.summarize(load(["data=synthetic"]), [record])
    assert (summary.steps, summary.tokens) == (240_000, 14_800_000_000_001)


def _record():
    return metrics.StepRecord(
        step=1, tokens=1, samples=1, loss=2.0, lr=1e-4, grad_norm=1.0, clip_coef=1.0, step_seconds=20.0, tokens_per_second=3e6,
        tokens_per_second_per_gpu=1540.0, seconds=4.7e6, dollars=5.3e6, dollars_per_billion_tokens=360.0, time_unix=2e9,
    )  # fmt: skip
