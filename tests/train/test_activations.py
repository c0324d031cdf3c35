"""What recomputation keeps and does not change: bytes against the allocator's own count, losses and gradients bit for bit, FLOPs against
torch's counter."""

import itertools
import os

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import ComputePhase, MicroBatch
from shoestring.train import activations, cost
from shoestring.train.engine import Engine
from torch.utils.flop_counter import FlopCounterMode

# Sizes that tell one another apart; rows per expert are many, so that their padding is little.
BASE = [
    "data=synthetic", "data.seq_len=64", "model.vocab_size=300", "train.global_batch_tokens=1024", "train.micro_batch_sequences=16",
    "model.num_layers=2", "model.num_experts=8", "model.top_k=2", "model.num_groups=2", "model.num_limited_groups=1",
    "model.dense_hidden_dim=320",
]  # fmt: skip
LEVERS = ["[]", "[norm]", "[mla_up]", "[swiglu]", "[norm,mla_up,swiglu]", "[attention]", "[experts]", "[norm,attention,experts]",
          "[norm,mla_up,swiglu,attention,experts]"]  # fmt: skip
ONE_EXPERT = ["model.num_experts=1", "model.top_k=1", "model.num_groups=1", "model.num_limited_groups=1"]  # rows need no room for padding
MODELS = {"usual": [], "without": ["model.q_lora_rank=0", "model.num_shared_experts=0"]}  # a latent of queries, a shared expert


def batches(config):
    rows = torch.randint(300, (config.sequences_per_step, 66), generator=torch.Generator().manual_seed(0))
    return [MicroBatch(tokens_BS=r[:, :64], targets_BN=r[:, 1:]) for r in rows.split(config.train.micro_batch_sequences)]


def kept_by_phase(words):
    """Bytes allocated in each compute phase's forward that are still held when the whole forward is over, by block and phase."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # the profiler prints a line each time it starts and stops
    config = load([*BASE, *words])
    engine = Engine(config)
    (batch,), saved, kept, values = batches(config), [], [], None
    engine.executor.evaluate([batch])  # FP8 weights are made, which are no activations
    values = (batch.tokens_BS,)
    with torch.no_grad():
        for phase in engine.stages[0].phases[: engine.stages[0].num_trunk_phases]:
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                out = phase.forward(saved, batch, *values)
                values = out if isinstance(phase, ComputePhase) else out.wait()
                del out
            kept.append((phase.name, sum(event.self_cpu_memory_usage for event in profile.function_events)))
    return kept


ALL = ["fp32", "bf16", "fp8"]
# What the other model lacks is seen by these levers, and FP32 has no formula of its own: only twice the width.
SOME = ["[]", "[mla_up]", "[norm,mla_up,swiglu]", "[norm,attention,experts]", LEVERS[-1]]
CASES = [*itertools.product(LEVERS, ALL, ["usual"]), *itertools.product(SOME, ["bf16", "fp8"], ["without"])]


@pytest.mark.parametrize("recompute, precision, model", CASES)
def test_bytes(recompute, precision, model):
    words = [f"train.recompute={recompute}", f"precision={precision}", *MODELS[model], *(ONE_EXPERT if precision != "fp32" else [])]
    ((_, *kept),) = fork_ranks(1, kept_by_phase, words)
    config, tokens = load([*BASE, *words]), 1024
    how = {"width": cost.ELEMENT_BYTES[config.precision.compute], "fp8": precision == "fp8", "recompute": config.train.recompute}
    for layer in range(2):
        measured = sum(count for _, count in kept[4 * layer : 4 * layer + 4])
        expected = activations.kept_bytes(config.model, layer, padded_values=True, **how)
        # A block's input is its predecessor's output: as many bytes. Its own output is counted there, and its input's allocation not.
        assert measured / tokens == pytest.approx(expected.total, rel=0.04), (layer, kept, expected)


def two_steps(words):
    config = load([*BASE, "model.mtp_depth=1", "optim.sequence_balance_coef=0.01", *words])
    engine = Engine(config)
    results = [engine.train_step(batches(config), 1e-2) for _ in range(2)]
    weights = {name: chunk.data.clone() for name, chunk in engine.optimizer.state().items()}
    return [(r.loss, r.mtp_losses, r.grad_norm, r.balance_loss, r.router_entropy, r.loads.tolist()) for r in results], weights


@pytest.mark.parametrize("compute, levers", [("fp32", LEVERS[1:]), ("bf16", LEVERS[-2:])])
def test_nothing_else_changes(compute, levers):
    words = [f"precision={compute}", "train.global_batch_tokens=256", "train.micro_batch_sequences=4"]
    ((records, state),) = fork_ranks(1, two_steps, words)
    for recompute in levers:
        ((others, other_state),) = fork_ranks(1, two_steps, [*words, f"train.recompute={recompute}"])
        assert others == records, recompute
        assert all(torch.equal(state[name], other_state[name]) for name in state), recompute


def test_nothing_else_changes_on_four_ranks():
    layout = ["parallel.pp=2", "parallel.ep=2", "train.global_batch_tokens=1024", "train.micro_batch_sequences=4"]
    plain = fork_ranks(4, two_steps, layout)
    again = fork_ranks(4, two_steps, [*layout, "train.recompute=[norm,mla_up,swiglu,attention,experts]"])
    for (records, state), (others, other_state) in zip(plain, again):
        assert others == records and all(torch.equal(state[name], other_state[name]) for name in state)


def flops_of_a_step(words):
    engine = Engine(load([*BASE, *words]))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter:
        engine.executor.step(batches(engine.config))
    return counter.get_total_flops()


def _grouped_flops(a_shape, b_shape, *_, **__):
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


@pytest.mark.parametrize("recompute", ["[mla_up]", "[attention]", "[experts]"])
def test_flops(recompute):
    ((plain,), (more,)) = (fork_ranks(1, flops_of_a_step, [*ONE_EXPERT, *extra]) for extra in ([], [f"train.recompute={recompute}"]))
    config = load([*BASE, *ONE_EXPERT])
    expected = sum(activations.recompute_flops(config.model, layer, 64, [recompute[1:-1]]) for layer in range(2))
    if recompute == "[attention]":
        expected -= 2 * cost.attention_flops(config.model, 64)  # the counter does not know the CPU's attention
    assert (more - plain) / 1024 == pytest.approx(expected, rel=1e-3)
