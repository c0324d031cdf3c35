"""The sentinel over a run: whose turn it is, what it records, a block that leaves FP8 for good and says so."""

import re

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch
from shoestring.train import trainer
from shoestring.train.engine import Engine
from shoestring.train.metrics import read_records
from torch.utils._python_dispatch import TorchDispatchMode

BASE = [
    "data=synthetic", "data.seq_len=32", "model.vocab_size=300", "model.dim=64", "model.num_layers=3", "model.dense_hidden_dim=96",
    "model.expert_hidden_dim=48", "model.num_experts=4", "model.top_k=2", "model.num_groups=2", "model.num_limited_groups=1",
    "train.global_batch_tokens=256", "train.micro_batch_sequences=2", "train.steps=6", "optim.warmup_steps=2", "optim.lr=3e-3",
    "precision=fp8",
]  # fmt: skip


def batches(config, step, dp_rank):
    rows = torch.randint(0, 40, (config.sequences_per_step, 33), generator=torch.Generator().manual_seed(step))
    mine = rows.view(-1, config.parallel.dp, config.train.micro_batch_sequences, 33)[:, dp_rank]
    return [MicroBatch(tokens_BS=r[:, :-1], targets_BN=r[:, 1:]) for r in mine]


class Products(TorchDispatchMode):
    """FP8 products of a step, forward and dgrad."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket.__name__ in ("fp8_matmul", "fp8_grouped_matmul")
        return func(*args, **(kwargs or {}))


def steps(words):
    """Of each: the look, the blocks left out after it, the number of FP8 products, the loss."""
    engine, out = Engine(load([*BASE, *words])), []
    for step in range(5):
        engine.sentinel.wake(step)
        with Products() as products:
            result = engine.train_step(batches(engine.config, step, engine.mesh.dp_rank), 3e-3)
        look = engine.sentinel.report(step)
        out.append((look, list(engine.sentinel.left_out), products.count, result.loss))
    return out


def test_blocks_take_turns():
    (found,) = fork_ranks(1, steps, ["precision.sentinel_interval=1"])
    assert [set(look.worst["forward.error"]) for look, *_ in found] == [{0}, {1}, {2}, {0}, {1}]
    assert all(
        0.02 < error < 0.06 for look, *_ in found for m, error in look.over_blocks().items() if m in ("forward.error", "wgrad.error")
    )
    assert all(not left_out for _, left_out, *_ in found) and len({count for *_, count, _ in found}) == 1
    (every_other,) = fork_ranks(1, steps, ["precision.sentinel_interval=2"])
    assert [look and set(look.worst["forward.error"]) for look, *_ in every_other] == [{0}, None, {1}, None, {2}]
    assert [loss for *_, loss in every_other] == [loss for *_, loss in found], "looking changes nothing"


@pytest.mark.parametrize("recompute", ["[norm,mla_up,swiglu]", "[attention,experts]"])
def test_what_is_made_again_is_seen_as_well(recompute):
    (kept,), (again,) = (fork_ranks(1, steps, ["precision.sentinel_interval=1", *more]) for more in ([], [f"train.recompute={recompute}"]))
    assert [look for look, *_ in again] == [look for look, *_ in kept]


def test_a_block_leaves_fp8():
    """By a limit that every block breaks: from the next step on its products are BF16's, those of others still FP8's."""
    words = ["precision.sentinel_interval=1", "precision.sentinel_max_error=0.01"]
    (found,) = fork_ranks(1, steps, words)
    assert [left_out for _, left_out, *_ in found] == [[0], [0, 2], [0, 2, 1], [0, 2, 1], [0, 2, 1]]
    products = [count for *_, count, _ in found]
    micro_batches, attention, moe = 4, 4, 4  # qkv_a, q_b, kv_b, out; gate_up and down of experts and shared experts
    assert products[0] - products[1] == 2 * micro_batches * (attention + 2)  # block 0 is dense
    assert products[1] - products[2] == 2 * micro_batches * (attention + moe) and products[3] == 0
    (bf16,) = fork_ranks(1, bf16_losses, [])
    assert [loss for *_, loss in found] == pytest.approx(bf16, rel=0.02)


def bf16_losses(words):
    engine = Engine(load([*BASE[:-1], "precision=bf16"]))
    return [engine.train_step(batches(engine.config, step, 0), 3e-3).loss for step in range(5)]


@pytest.mark.parametrize("layout", [["parallel.pp=2"], ["parallel.ep=2"]], ids=["pp 2", "ep 2"])
def test_ranks_agree(layout):
    words = ["precision.sentinel_interval=1", "precision.sentinel_max_error=0.01", *layout]
    first, second = fork_ranks(2, steps, words)
    assert [f[:2] for f in first] == [s[:2] for s in second]
    assert set(first[-1][1]) == {0, 1, 2}
    if layout == ["parallel.pp=2"]:
        assert len(first[0][0].worst["forward.error"]) == 2, "each stage has a block looked at"


def session(words):
    lines = []
    trainer.run(load(words), torch.device("cpu"), log=lines.append)
    return lines


def test_recorded_said_and_resumed(tmp_path):
    words = [*BASE, f"data.cache_dir={tmp_path}", f"run_dir={tmp_path / 'run'}", "train.eval_sequences=4", "checkpoint.interval=2"]
    words += ["precision.sentinel_interval=3", "precision.sentinel_max_error=0.01"]
    (lines,) = fork_ranks(1, session, [*words, "train.stop_after=2"])
    said = [line for line in lines if "bf16 from here on" in line]
    assert len(said) == 1 and re.match(
        r"block 0 is computed in bf16 from here on: relative error of its \w+ in fp8 0\.0\d+, limit 0\.01", said[0]
    )
    (lines,) = fork_ranks(1, session, words)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r.fp8_left_out for r in records] == [[0]] * 3 + [[0, 2]] * 3 or [r.fp8_left_out for r in records] == [[0]] * 3 + [[0, 1]] * 3
    assert [r.fp8_sentinel is not None for r in records] == [True, False, False, True, False, False]
    assert 0.01 < records[0].fp8_sentinel["forward.error"] < 0.06
