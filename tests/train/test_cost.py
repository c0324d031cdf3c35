"""Cost formulas against published figures, a FLOP counter over an independent model, and arithmetic by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ClusterConfig, ModelConfig
from shoestring.kernels.ops import Ops
from shoestring.launch.local import fork_ranks
from shoestring.train import cost
from shoestring.train.engine import Engine
from shoestring.train.model.decoder import CausalLM, Stage, is_expert
from shoestring.train.model.moe import Balance
from torch.utils.flop_counter import FlopCounterMode

V3 = ["model=deepseek_v3", "cluster=h800", "precision=bf16", "parallel=deepseek_v3", "data.seq_len=4096",
      "train.global_batch_tokens=62914560", "train.eval_sequences=128"]  # fmt: skip

SHAPES = {
    "tiny's kind: q_lora, groups, one dense block": dict(),
    "queries without a latent, two shared experts": dict(q_lora_rank=0, num_shared_experts=2),
    "no dense block, no shared expert": dict(num_dense_layers=0, num_shared_experts=0),
    "only dense blocks": dict(num_dense_layers=3),
    "tied table, value heads wider than query heads": dict(tie_embeddings=True, v_head_dim=24),
}


def model(**changes) -> ModelConfig:
    fields = dict(
        name="m", num_layers=3, dim=16, vocab_size=50, max_seq_len=64, num_heads=2, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=7, num_dense_layers=1, dense_hidden_dim=20, num_experts=4, num_shared_experts=1, top_k=2,
        expert_hidden_dim=9,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


# ---------------------------------------------------------------- published figures


def test_deepseek_v3_has_the_published_parameters():
    config = load(V3).model
    params = cost.num_params(config)
    assert round(params.total / 1e9, 2) == 671.03
    assert round(params.active / 1e9, 1) == 36.6
    assert round(params.attention / config.num_layers / 1e6, 1) == 187.1
    assert round(params.blocks[3].experts / config.num_experts / 1e6, 2) == 44.04
    assert [b.experts == 0 for b in params.blocks[:4]] == [True, True, True, False]


@pytest.mark.parametrize(
    "preset, total, active",
    [
        ("tiny", 3_047_040, 1_212_032),
        ("small", 105_164_288, 29_339_136),
        ("v2_lite", 15_706_484_224, 2_451_435_008),  # DeepSeek-V2-Lite is published as 15.7 B, 2.4 B active
        ("deepseek_v3", 671_026_404_352, 36_625_603_584),  # 671,026,419,200 in the released files, which hold 58 x 256 selection biases
    ],
)
def test_presets(preset, total, active):
    params = cost.num_params(load([f"model={preset}", "optim.bias_update_speed=0"]).model)
    assert (params.total, params.active) == (total, active)


def test_selection_bias_is_all_that_the_released_count_adds():
    assert 671_026_419_200 - cost.num_params(load(V3).model).total == 58 * 256


def test_deepseek_v3_mfu_and_dollars_are_the_published_ones():
    """180 K H800-hours per trillion tokens at $2 are $360 per billion; arXiv 2505.09343 gives 38.94 % of BF16 peak, causal."""
    config = load(V3)
    speed = 1e12 / (180e3 * 3600)
    assert cost.dollars_per_billion_tokens(speed, config.cluster) == pytest.approx(360, rel=1e-12)
    assert cost.mfu(speed, config) == pytest.approx(0.3894, rel=0.01)
    assert cost.dollars(2664e3 * 3600 / 2048, 2048, config.cluster) == pytest.approx(5.328e6, rel=1e-12)
    assert 6 * 36.6e9 < cost.train_flops(config.model, 4096, 1) < 7 * 36.6e9


# ---------------------------------------------------------------- an independent model


class Attention(torch.nn.Module):
    """Multi-head latent attention, written from the paper's equations, full S x S scores."""

    def __init__(self, m):
        super().__init__()
        self.m, linear = m, lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.rank = m.q_lora_rank
        if self.rank:
            self.down_q, self.norm_q = linear(m.dim, m.q_lora_rank), torch.nn.RMSNorm(m.q_lora_rank)
        self.up_q = linear(m.q_lora_rank or m.dim, m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim))
        self.down_kv, self.norm_kv = linear(m.dim, m.kv_lora_rank), torch.nn.RMSNorm(m.kv_lora_rank)
        self.key_rope = linear(m.dim, m.qk_rope_head_dim)
        self.up_k = linear(m.kv_lora_rank, m.num_heads * m.qk_nope_head_dim)
        self.up_v = linear(m.kv_lora_rank, m.num_heads * m.v_head_dim)
        self.out = linear(m.num_heads * m.v_head_dim, m.dim)

    def forward(self, x):
        m, heads = self.m, lambda y: y.unflatten(-1, (self.m.num_heads, -1)).transpose(0, 1)
        q = heads(self.up_q(self.norm_q(self.down_q(x)) if self.rank else x))
        latent = self.norm_kv(self.down_kv(x))
        rope = self.key_rope(x).unsqueeze(0).expand(m.num_heads, -1, -1)
        k, v = torch.cat([heads(self.up_k(latent)), rope], -1), heads(self.up_v(latent))
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)
        return self.out(((q @ k.mT) + mask).softmax(-1).matmul(v).transpose(0, 1).flatten(1))


class GatedMLP(torch.nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(i, o, bias=False) for i, o in ((dim, hidden), (dim, hidden), (hidden, dim)))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.top_k, self.router = m.top_k, torch.nn.Linear(m.dim, m.num_experts, bias=False)
        self.experts = torch.nn.ModuleList(GatedMLP(m.dim, m.expert_hidden_dim) for _ in range(m.num_experts))
        self.shared = GatedMLP(m.dim, m.num_shared_experts * m.expert_hidden_dim) if m.num_shared_experts else None

    def forward(self, x):
        weights, chosen = self.router(x).sigmoid().topk(self.top_k)
        y = self.shared(x) if self.shared else torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Model(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.embed = torch.nn.Embedding(m.vocab_size, m.dim)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([
                torch.nn.RMSNorm(m.dim), Attention(m), torch.nn.RMSNorm(m.dim),
                GatedMLP(m.dim, m.dense_hidden_dim) if i < m.num_dense_layers else Experts(m),
            ])
            for i in range(m.num_layers)
        )  # fmt: skip
        self.norm, self.head = torch.nn.RMSNorm(m.dim), torch.nn.Linear(m.dim, m.vocab_size, bias=False)
        if m.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm1, attention, norm2, mlp in self.blocks:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_parameters_equal_an_independent_model(changes):
    m = model(**changes)
    params = cost.num_params(m)
    built = Model(m)
    assert params.total == sum(p.numel() for p in built.parameters())
    assert params.norms == sum(p.numel() for name, p in built.named_parameters() if "norm" in name or p.ndim == 1)
    for block, want in zip(built.blocks, params.blocks, strict=True):
        assert want.total == sum(p.numel() for p in block.parameters())
    kinds = (params.embedding, params.head, params.attention, params.dense_mlp, params.experts, params.shared, params.router, params.norms)
    assert sum(kinds) == params.total


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_flops_equal_a_counter_over_an_independent_model(changes):
    """The counter takes S keys per query where the causal mathematics needs (S + 1) / 2: the one difference, undone here."""
    m, seq_len = model(**changes), 12
    built, tokens = Model(m), torch.arange(seq_len)
    with FlopCounterMode(display=False) as forward:
        logits = built(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    flops = cost.flops_per_token(m, seq_len)
    full_attention = flops.attention * seq_len / ((seq_len + 1) / 2)
    assert forward.get_total_flops() == seq_len * (flops.matrices + full_attention)
    assert backward.get_total_flops() == seq_len * (flops.backward + 2 * (full_attention - flops.attention))


# ---------------------------------------------------------------- the real model


@pytest.mark.parametrize("preset", ["tiny", "small", "v2_lite", "deepseek_v3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_the_built_model(preset, tied):
    m = load([f"model={preset}", "optim.bias_update_speed=0", f"model.tie_embeddings={str(tied).lower()}"]).model
    params = cost.num_params(m)
    with torch.device("meta"):
        built = CausalLM(m)
    sizes = {name: p.numel() for name, p in built.stage.named_parameters()}
    assert params.total == sum(sizes.values())
    assert params.experts == sum(n for name, n in sizes.items() if is_expert(name))
    for layer, block in enumerate(params.blocks):
        assert block.total == sum(n for name, n in sizes.items() if name.startswith(f"layers.{layer}."))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first, last", [(True, False), (False, True), (False, False), (True, True)])
def test_a_rank_holds_what_its_stage_is_built_with(first, last, tied):
    config = load(["model=small", "parallel.ep=4", f"model.tie_embeddings={str(tied).lower()}"])
    m, layers = config.model, range(0, 3)
    with torch.device("meta"):
        stage = Stage(
            m, layers=layers, is_first=first, is_last=last, ep=4, balance=Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0),
            dtype=torch.float32, dispatcher=None, ops=Ops(),
        )  # fmt: skip
    sizes = {name: p.numel() for name, p in stage.named_parameters()}
    experts = sum(n for name, n in sizes.items() if is_expert(name))
    held = cost.rank_params(m, config.parallel, layers=layers, embedding=first, head=last)
    assert held == (sum(sizes.values()) - experts, experts)


# ---------------------------------------------------------------- relations


@settings(max_examples=50, deadline=None)
@given(
    layers=st.integers(1, 6), dense=st.integers(0, 6), experts=st.integers(1, 9), shared=st.integers(0, 3), rank=st.integers(0, 9),
    tied=st.booleans(), seq_len=st.integers(1, 5000), data=st.data(),
)  # fmt: skip
def test_parts_add_up(layers, dense, experts, shared, rank, tied, seq_len, data):
    top_k = data.draw(st.integers(1, experts))
    m = model(num_layers=layers, num_dense_layers=min(dense, layers), num_experts=experts, num_shared_experts=shared, q_lora_rank=rank,
              tie_embeddings=tied, top_k=top_k)  # fmt: skip
    params, flops = cost.num_params(m), cost.flops_per_token(m, seq_len)
    assert flops.total == 3 * flops.forward == pytest.approx(cost.train_flops(m, seq_len, 10) / 10, rel=1e-12)
    assert sum(cost.block_costs(m, seq_len)) + cost.embedding_cost(m) + cost.head_cost(m) == pytest.approx(flops.forward, rel=1e-12)
    assert flops.matrices == 2 * (params.active - params.norms)
    everything = m if top_k == experts else dataclasses.replace(m, top_k=experts)
    assert cost.num_params(everything).active == params.total - (0 if tied else params.embedding)


def test_state_bytes_of_the_published_layout():
    """A middle rank of DeepSeek-V3 at PP 16 x EP 64: 4 blocks, 4 experts of each; by hand from FACTS' per-layer figures."""
    state = cost.rank_state_bytes(load(V3), layers=range(4, 8), embedding=False, head=False)
    dense, experts = 4 * (187_105_280 + 256 * 7168 + 44_040_192 + 2 * 7168 + 1536 + 512), 4 * 4 * 44_040_192
    assert state.weights == 2 * (dense + experts)
    assert state.main_grads == 4 * (dense + experts)
    assert state.optimizer == pytest.approx(8 * (dense / 128 + experts / 2), rel=1e-6)
    assert state.total == state.weights + state.main_grads + state.optimizer


@pytest.mark.parametrize(
    "words",
    [
        "precision=fp32", "precision=bf16", "precision=bf16 optim.moments=fp32", "precision=fp64 optim.offload=true",
        "optim.engine=deepspeed", "precision=bf16 optim.algorithm=muon optim.ema_decay=0.9",
        "optim.algorithm=muon optim.offload=true optim.ema_decay=0.9", "precision=bf16 optim.offload=true",
    ],
)  # fmt: skip
def test_state_bytes_are_those_of_live_tensors(words):
    """Of one process, which owns everything; each storage counts once, and padding is below 1 %. Likewise what a checkpoint holds."""
    config = load(["data=synthetic", "model.mtp_depth=1", *words.split()])
    m = config.model
    state = cost.rank_state_bytes(config, layers=range(m.num_blocks), embedding=True, head=True)

    def live():
        engine = Engine(config)
        held = {id(p): p for p in engine.parameters().values()}
        storages = lambda tensors: {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        weights, grads = storages(held.values()), storages(engine.optimizer.main_grad.values())
        kept = storages(c.data for c in engine.optimizer.state().values())
        travelling = [t for p in getattr(engine.optimizer, "_pieces", ()) for t in (p.grad_there, p.weights_there) if t is not None]
        rest = {k: n for k, n in (kept | storages(travelling)).items() if k not in weights and k not in grads}
        saved = sum(chunk.data.nbytes for chunk in engine.chunks(saving=True).values())
        return [*(sum(part.values()) for part in (weights, grads, rest)), saved]

    ((weights, grads, rest, saved),) = fork_ranks(1, live)
    assert saved == pytest.approx(cost.checkpoint_bytes(config), rel=0.001)
    assert weights == pytest.approx(state.weights, rel=0.01) and grads == pytest.approx(state.main_grads, rel=0.01)
    assert rest == pytest.approx(state.optimizer + state.host, rel=0.01)
    if config.optim.offload:
        assert state.optimizer == 0
    elif not config.optim.ema_decay:
        assert state.host == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_ranks_of_a_layout_hold_the_whole_model(tied):
    config = load(["model=small", "parallel.pp=2", "parallel.ep=4", "parallel.edp=2", f"model.tie_embeddings={str(tied).lower()}"])
    first = cost.rank_params(config.model, config.parallel, layers=range(0, 3), embedding=True, head=False)
    last = cost.rank_params(config.model, config.parallel, layers=range(3, 8), embedding=False, head=True)
    params = cost.num_params(config.model)
    copies = params.embedding if tied else 0  # a tied table on two stages
    assert first[0] + last[0] + 4 * (first[1] + last[1]) == params.total + copies
    alone = cost.rank_params(config.model, load([]).parallel, layers=range(8), embedding=True, head=True)
    assert sum(alone) == params.total


# ---------------------------------------------------------------- money


def test_a_precision_without_a_peak_has_no_mfu():
    config = load(["cluster.peak_tflops={bf16: 1}", "precision=fp32"])
    assert cost.peak_flops(config.cluster, "bf16") == 1e12
    assert cost.mfu(1000.0, load(["precision=bf16"])) > 0
    without = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, peak_tflops={"bf16": 1.0}))
    assert cost.mfu(1000.0, without) is None


def test_dollars():
    cluster = ClusterConfig(name="c", device="G", price_per_gpu_hour=3.0, memory_gb=1, memory_tb_s=1, intra_node_gb_s=1, inter_node_gb_s=1)
    assert cost.dollars(1800, 8, cluster) == 12.0
    assert cost.dollars_per_billion_tokens(0.0, cluster) == float("inf")
    assert cost.dollars_per_billion_tokens(float("nan"), cluster) == float("inf")
    # A billion tokens at 1000 tokens/s on each of 8 devices.
    assert cost.dollars_per_billion_tokens(1000, cluster) == pytest.approx(cost.dollars(1e9 / 8000, 8, cluster))


def test_a_cpu_rank_of_two_threads_is_two_devices():
    assert cost.num_devices(load(["parallel.ep=2", "launch.threads=2"])) == 4
    assert cost.num_devices(load(["parallel.ep=2", "launch.threads=2", "cluster=h100"])) == 2


@pytest.mark.parametrize("name", ["cpu", "h800", "h100", "h200", "b200"])
def test_every_cluster_prices_every_precision(name):
    cluster = load([f"cluster={name}"]).cluster
    assert {"fp32", "bf16", "fp64"} <= set(cluster.peak_tflops)
    assert cluster.peak_tflops["bf16"] > cluster.peak_tflops["fp32"] >= cluster.peak_tflops["fp64"]
    assert cluster.price_per_gpu_hour > 0 and cluster.intra_node_gb_s >= cluster.inter_node_gb_s


def test_prediction_modules_are_counted_where_they_train():
    m = load(["model.mtp_depth=2"]).model
    with torch.device("meta"):
        built = CausalLM(m)
    params, flops = cost.num_params(m), cost.flops_per_token(m, 128)
    assert params.trained == sum(p.numel() for p in built.parameters()) and params.total == cost.num_params(load([]).model).total
    parts = sum(cost.block_costs(m, 128)) + cost.head_cost(m) + cost.prediction_cost(m, 128)
    assert flops.forward == pytest.approx(parts, rel=1e-12)
    # Each module is a block like the last one, a merge of 2 D x D, and one more use of the head.
    more = 2 * (cost.block_costs(m, 128)[-1] + 2 * 2 * m.dim * m.dim + cost.head_cost(m))
    assert cost.prediction_cost(m, 128) == pytest.approx(more, rel=1e-12)
