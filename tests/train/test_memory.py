"""Predicted memory of a rank against the storage that is alive in real steps of small configurations, and against published estimates."""

import time
import weakref

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine
from shoestring.train.memory import FRAGMENTATION, fits, rank_memory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Widths that tell tensors apart, and more activations than weights, as in large models.
BASE = [
    "model=tiny", "data=synthetic", "data.seq_len=64", "model.vocab_size=500", "model.dim=256", "model.num_heads=4", "model.num_layers=4",
    "model.qk_nope_head_dim=64", "model.qk_rope_head_dim=32", "model.v_head_dim=64", "model.kv_lora_rank=48", "model.dense_hidden_dim=352",
    "model.expert_hidden_dim=80", "train.micro_batch_sequences=8", "train.global_batch_tokens=2048", "train.eval_sequences=16",
    "cluster.gpus_per_node=2", "precision=bf16",
]  # fmt: skip
FOUR = ["train.global_batch_tokens=4096"]
ALL = "train.recompute=[norm,mla_up,swiglu]"
CASES = {
    "one rank": [],
    "one rank, fp32": ["precision=fp32", "train.recompute=[swiglu]"],
    "whole phases again": ["train.recompute=[attention,experts]", "model.mtp_depth=1"],
    "1f1b": ["parallel.pp=2", "parallel.ep=2", ALL, "model.mtp_depth=1", *FOUR],
    "by nodes": ["parallel.ep=4", "parallel.dispatcher=hierarchical", *FOUR],
    "fp8": ["parallel.ep=2", "precision=fp8", ALL, "model.num_layers=2"],
    "dualpipe": ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", *FOUR],
    "dualpipev, tied": [
        "parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.chunks=2", "model.tie_embeddings=true", *FOUR,
    ],
}  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of storage that operators made and that somebody still has; `resize_` of one is followed."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, resize = {}, 0, 0, torch.UntypedStorage.resize_

        def resized(storage, size):
            resize(storage, size)
            self._count(storage._cdata, size) if storage._cdata in self.sizes else None

        torch.UntypedStorage.resize_ = resized

    def _count(self, key, size):
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def add(self, tensor):
        if hasattr(tensor, "quantised"):  # says it is what it stands for
            return [self.add(part) for part in (tensor.quantised.codes, tensor.quantised.scales)]
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self._count(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def evenly(layer, select, score_TE):
    """Every choice as likely as any other; asked twice, the same."""
    return select(torch.rand(score_TE.shape, generator=torch.Generator().manual_seed(layer)).to(score_TE))


def peak_bytes(words):
    config = load([*BASE, *words])
    engine, live = Engine(config), Live()
    engine.executor.enqueues = True  # turns are taken as on a GPU, for which plans are
    for param in engine.parameters().values():
        live.add(param), live.add(param.main_grad)
    for chunk in engine.optimizer.state().values():
        live.add(chunk.data)
    S, n = config.data.seq_len, config.train.micro_batch_sequences
    rows = torch.randint(500, (config.num_micro_batches * n, S + 1 + config.model.mtp_depth), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(tokens_BS=r[:, :S].clone(), targets_BN=r[:, 1:].clone(), choose=evenly) for r in rows.split(n)]
    for batch in batches:
        live.add(batch.tokens_BS), live.add(batch.targets_BN)
    state = live.now
    with live:
        engine.executor.step(batches)
    dist.barrier()
    return live.peak - state


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_peak_is_that_of_live_storage(words):
    config = load([*BASE, *words])
    p = config.parallel
    for rank, measured in enumerate(fork_ranks(p.world_size, peak_bytes, words)):
        memory = rank_memory(config, rank // p.dp, padded_values=True, sends_stay=p.pp > 1)
        state = memory.weights + memory.main_grads + memory.optimizer  # `test_cost.py` holds them against live tensors
        assert memory.allocated - state == pytest.approx(measured + 16 * config.num_micro_batches * 512, rel=0.05), (rank, memory)


# ---------------------------------------------------------------- DeepSeek-V3

V3 = [
    "model=deepseek_v3", "cluster=h800", "parallel=deepseek_v3", "data=synthetic", "data.seq_len=4096", "model.mtp_depth=1",
    "train.global_batch_tokens=62914560", "train.eval_sequences=128", "parallel.dispatcher=alltoall", "precision=bf16",
]  # fmt: skip
PUBLISHED_STYLE = ["precision=fp8", ALL]
V = ["parallel.schedule=dualpipev", "parallel.chunks=2"]

# GB of a middle rank (DualPipe: 7 of 16) with the allowance for fragmentation; beside it an estimate made before this code was written.
# It took values for a tensor of their own: they are a view of what was lifted from the latent, keys' halves included, so that without
# mla_up 9 GB more are kept here. It kept nothing of routers, of maps and of the residual stream.
ESTIMATES = {"[]": (168, 142), "[norm]": (159, 137), "[norm,mla_up]": (111, 99), "[norm,mla_up,swiglu]": (101, 93)}


@pytest.mark.parametrize("recompute", ESTIMATES)
def test_deepseek_v3_beside_an_estimate(recompute):
    ours, estimate = ESTIMATES[recompute]
    memory = rank_memory(load([*V3, f"train.recompute={recompute}"]), 7)
    assert memory.total / 1e9 == pytest.approx(ours, rel=0.01)
    assert estimate < ours < 1.2 * estimate


def test_the_published_recipe_fits_where_bf16_does_not():
    fp8, bf16 = load([*V3, *PUBLISHED_STYLE]), load([*V3, ALL])
    assert all(fits(rank_memory(fp8, rank), fp8.cluster) for rank in range(16))
    assert not fits(rank_memory(bf16, 7), bf16.cluster)


def test_more_rows_take_more_and_state_stays():
    config = load([*V3, *PUBLISHED_STYLE])
    memories = [rank_memory(config, 7, imbalance=x) for x in (1.0, 1.5, 2.0)]
    assert memories[0].activations < memories[1].activations < memories[2].activations
    assert memories[0].exchange < memories[1].exchange < memories[2].exchange
    assert len({(m.weights, m.main_grads, m.optimizer, m.casts) for m in memories}) == 1


def test_a_v_holds_half_the_weights_of_two_directions():
    two, v = (rank_memory(load([*V3, *PUBLISHED_STYLE, *words]), 7) for words in ([], V))
    assert v.weights < 0.7 * two.weights and v.main_grads < 0.7 * two.main_grads
    assert v.optimizer > two.optimizer, "mirrored ranks share optimizer state"


def test_choices_count():
    """Each moves what it should, and nothing up that it should not."""
    base = [*V3, ALL]
    plain = rank_memory(load(base), 0)
    offload, muon, ema = (
        rank_memory(load([*base, words]), 0) for words in ("optim.offload=true", "optim.algorithm=muon", "optim.ema_decay=0.999")
    )
    assert offload.optimizer == 0 and offload.host > plain.host == 0 and offload.activations == plain.activations
    assert muon.optimizer == plain.optimizer, "one FP32 moment is as much as two in BF16"
    assert ema.host > 0 and ema.total == plain.total
    tied = rank_memory(load([*base, "model.tie_embeddings=true"]), 0)
    assert plain.weights - tied.weights == 129280 * 7168 * 2


def test_parts_are_the_sum_and_calls_are_quick():
    config = load([*V3, *PUBLISHED_STYLE])
    memory = rank_memory(config, 7)
    assert memory.fragmentation == pytest.approx(FRAGMENTATION * memory.allocated, abs=1)
    assert memory.total == memory.allocated + memory.fragmentation
    begun = time.process_time()
    for _ in range(10):
        rank_memory(config, 7)
    print(f"{100 * (time.process_time() - begun):.1f} ms a call")
