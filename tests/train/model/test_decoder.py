"""The parts of the model, each against its definition written plainly; the whole is compared in test_equals_transformers.py."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ModelConfig, YarnConfig
from shoestring.kernels.grouped import RowGroups, row_alignment
from shoestring.kernels.ops import Ops
from shoestring.kernels.rotary import rotate
from shoestring.kernels.weight_grad import WeightGradStore
from shoestring.parallel.dispatch import make_dispatcher
from shoestring.train.model.decoder import CausalLM, Stage, materialise, named_weights
from shoestring.train.model.moe import Balance, Experts, Router, entropy, sequence_balance_loss
from shoestring.train.model.rope import rotations, softmax_scale
from torch._subclasses import FakeTensorMode
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs


def small(**changes) -> ModelConfig:
    fields = dict(
        name="m", num_layers=4, dim=16, vocab_size=41, max_seq_len=64, num_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, num_dense_layers=1, dense_hidden_dim=24, num_experts=8, num_shared_experts=1, top_k=3,
        expert_hidden_dim=8, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.1,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def router(m: ModelConfig, *, balance: float = 0.0, z: float = 0.0, token_weight: float = 1.0, seed: int = 0) -> Router:
    made = Router(m, Balance(sequence_coef=balance, z_coef=z, token_weight=token_weight), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.normal_(0.0, 0.5, generator=generator)
        made.bias.normal_(0.0, 0.3, generator=generator)
    made.weight.main_grad = torch.zeros_like(made.weight, requires_grad=False)
    return made


# ---------------------------------------------------------------- the router's choice


@st.composite
def routers(draw):
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(2, 4))
    limited = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, limited * per_group))
    return small(num_experts=groups * per_group, num_groups=groups, num_limited_groups=limited, top_k=top_k), draw(st.integers(0, 2**31))


@given(routers())
def test_selection_is_the_best_of_all_allowed_choices(case):
    """Brute force: of all sets of groups, the one with the greatest sum of two best each; in it, of all sets of experts."""
    m, seed = case
    made = router(m, seed=seed)
    score_TE = torch.rand(5, m.num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    per_group = m.num_experts // m.num_groups
    for score_E, found in zip(score_TE, made.select(score_TE).tolist()):
        choice = (score_E + made.bias).tolist()
        worth = [sum(sorted(choice[g * per_group : (g + 1) * per_group])[-2:]) for g in range(m.num_groups)]
        open_groups = max(itertools.combinations(range(m.num_groups), m.num_limited_groups), key=lambda gs: sum(worth[g] for g in gs))
        allowed = [e for e in range(m.num_experts) if e // per_group in open_groups]
        best = max(itertools.combinations(allowed, m.top_k), key=lambda es: sum(choice[e] for e in es))
        assert sorted(found) == sorted(best)


def test_a_strong_negative_bias_does_not_open_closed_groups():
    """Biases may push every score below 0: experts of closed groups must still lose (masked with 0 they would win)."""
    m = small(top_k=4)
    made = router(m)
    made.bias.fill_(-5.0)
    chosen = made.select(torch.rand(50, m.num_experts, dtype=torch.float64)) // 2
    assert all(len(row.unique()) == m.num_limited_groups for row in chosen)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_weights_come_from_scores_without_the_bias(norm_topk):
    m = small(norm_topk=norm_topk)
    made = router(m)
    made.bias.mul_(10)
    u = torch.randn(6, m.dim, dtype=torch.float64)
    weight_TK, routing = made(u, 3, Ops())
    expert_TK = routing.expert_TK
    score = torch.sigmoid(u @ made.weight.T).gather(1, expert_TK)
    if norm_topk:
        score = score / score.sum(1, keepdim=True)
    torch.testing.assert_close(weight_TK, 2.5 * score, rtol=1e-12, atol=0)


def test_the_gate_is_wide_in_bf16():
    """Scores of a BF16 model are FP32: weights that differ in the ninth bit stay apart."""
    m = small(num_groups=1, num_limited_groups=1)
    made = Router(m, Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0), torch.bfloat16)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    u = torch.randn(6, m.dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight_TK, routing = made(u, 6, Ops())
    expert_TK = routing.expert_TK
    score = torch.sigmoid(u.double() @ made.weight.double().T).gather(1, expert_TK)
    assert weight_TK.dtype == torch.float32 and made.bias.dtype == torch.float32
    torch.testing.assert_close(weight_TK.double(), 2.5 * score / score.sum(1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_the_host_is_never_asked(score_func):
    """Fake tensors have no values: whatever asks for one (`.item()`, a boolean index, bincount) raises."""
    m = small(score_func=score_func, num_limited_groups=4)
    with FakeTensorMode():
        made, ops = Router(m, Balance(sequence_coef=0.1, z_coef=0.1, token_weight=1.0), torch.bfloat16), Ops()
        u = torch.empty(6, m.dim, dtype=torch.bfloat16, requires_grad=True)
        weight_TK, routing = made(u, 3, ops)
        weight_TK.sum().backward()
        assert u.grad.shape == u.shape and routing.load_E.shape == (m.num_experts,) and routing.load_E.dtype == torch.int64


def test_counts_of_the_choice():
    m = small()
    _, routing = router(m)(torch.randn(6, m.dim, dtype=torch.float64), 3, Ops())
    assert routing.load_E.tolist() == [(routing.expert_TK == e).sum() for e in range(m.num_experts)]


# ---------------------------------------------------------------- its losses


def plain_balance_loss(score_TE, expert_TK, seq_len: int) -> torch.Tensor:
    """DeepSeek-V3 §2.1.2, equations 17-20 without alpha, in their own sums; added over sequences."""
    num_experts, top_k, total = score_TE.shape[1], expert_TK.shape[1], 0.0
    for start in range(0, len(score_TE), seq_len):
        for i in range(num_experts):
            chosen = sum(1 for t in range(start, start + seq_len) for e in expert_TK[t].tolist() if e == i)
            f = num_experts / (top_k * seq_len) * chosen
            p = sum(score_TE[t, i] / sum(score_TE[t, j] for j in range(num_experts)) for t in range(start, start + seq_len)) / seq_len
            total = total + f * p
    return total


def test_balance_loss_is_the_papers():
    m = small()
    made = router(m)
    score = torch.rand(8, m.num_experts, dtype=torch.float64, requires_grad=True)
    expert = made.select(score.detach())
    found, wanted = sequence_balance_loss(score, expert, 4), plain_balance_loss(score, expert, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, score)[0] for loss in (found, wanted)), rtol=1e-10, atol=1e-14)


def test_balance_loss_ends_of_its_scale():
    """1 for each sequence with even use, E / K where the same K experts take everything."""
    even = sequence_balance_loss(torch.full((4, 4), 0.5), torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]]), 4)
    score = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4, 1)
    assert even.item() == pytest.approx(1) and sequence_balance_loss(score, torch.tensor([[0, 1]] * 4), 4).item() == pytest.approx(2)


@pytest.mark.parametrize("balance, z", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_attached_losses_have_the_gradient_of_a_sum(balance, z):
    """Against autograd over language loss + token_weight * S * (alpha * balance) + token_weight * z, for input and weight."""
    m, seq_len, num_tokens = small(), 4, 8
    made = router(m, balance=balance, z=z, token_weight=1 / num_tokens)
    generator = torch.Generator().manual_seed(5)
    u, away = (torch.randn(num_tokens, n, dtype=torch.float64, generator=generator) for n in (m.dim, m.top_k))
    ours, store = u.clone().requires_grad_(), WeightGradStore()
    weight_TK, routing = made(ours, seq_len, Ops(store=store))
    expert_TK, sums = routing.expert_TK, routing.sums
    (weight_TK * away).sum().backward()
    with torch.no_grad():
        (closure,) = store.take()
        closure()

    plain, weight = u.clone().requires_grad_(), made.weight.detach().clone().requires_grad_()
    logits = plain @ weight.T
    score = logits.sigmoid()
    chosen = score.gather(1, expert_TK)
    balance_loss = plain_balance_loss(score, expert_TK, seq_len)  # the sum over two sequences
    z_loss = logits.exp().sum(1).log().square().mean()
    total = (2.5 * chosen / chosen.sum(1, keepdim=True) * away).sum() + balance * balance_loss / 2 + z * z_loss
    total.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(made.weight.main_grad, weight.grad, rtol=1e-10, atol=1e-14)
    # What is recorded: sums over tokens, so that a division by the step's tokens gives the means above.
    assert sums["balance"].item() / num_tokens == pytest.approx(balance_loss.item() / 2)
    assert sums["z"].item() / num_tokens == pytest.approx(z_loss.item())


def test_no_loss_is_attached_in_evaluation():
    made = router(small(), balance=1.0)
    with torch.no_grad():
        weight_TK, _ = made(torch.randn(4, 16, dtype=torch.float64), 4, Ops())
    assert not weight_TK.requires_grad


# ---------------------------------------------------------------- rotary embedding


def hf_rotary(m: ModelConfig):
    rope = dict(rope_type="default", rope_theta=m.rope_theta)
    if m.yarn.factor > 1:
        y = m.yarn
        rope = dict(
            rope_type="yarn", rope_theta=m.rope_theta, factor=y.factor, original_max_position_embeddings=y.original_max_seq_len,
            beta_fast=y.beta_fast, beta_slow=y.beta_slow, mscale=y.mscale, mscale_all_dim=y.mscale_all_dim,
        )  # fmt: skip
    config = DeepseekV3Config(
        qk_rope_head_dim=m.qk_rope_head_dim, qk_nope_head_dim=m.qk_nope_head_dim, rope_parameters=rope, max_position_embeddings=4096,
        hidden_size=8, num_attention_heads=1, num_key_value_heads=1, q_lora_rank=4, kv_lora_rank=4, v_head_dim=4,
    )  # fmt: skip
    return theirs.DeepseekV3RotaryEmbedding(config), theirs.DeepseekV3Attention(config, 0)


YARNS = st.builds(
    YarnConfig, factor=st.floats(1.25, 64), original_max_seq_len=st.integers(64, 8192), beta_fast=st.floats(2, 64),
    beta_slow=st.floats(0.25, 1.5), mscale=st.sampled_from([0.0, 0.7, 1.0]), mscale_all_dim=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip


@given(dim=st.integers(1, 32).map(lambda n: 2 * n), theta=st.sampled_from([100.0, 1e4, 1e6]), yarn=st.just(YarnConfig()) | YARNS)
def test_frequencies_and_factors_are_those_of_transformers(dim, theta, yarn):
    m = small(qk_rope_head_dim=dim, rope_theta=theta, yarn=yarn)
    rotary, attention = hf_rotary(m)
    turns = rotations(m, 2, torch.float64)
    torch.testing.assert_close(turns[1].angle(), rotary.inv_freq.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(turns.abs(), torch.full_like(turns.abs(), rotary.attention_scaling), rtol=1e-12, atol=0)
    assert softmax_scale(m) == pytest.approx(attention.scaling, rel=1e-12)


def test_rotated_pairs_are_those_of_transformers():
    """Theirs come out with the pairs taken apart: [first of each | second of each]."""
    m = small(qk_rope_head_dim=8, yarn=YarnConfig(factor=4.0, original_max_seq_len=16, beta_fast=4.0, mscale=0.7))
    rotary, _ = hf_rotary(m)
    x = torch.randn(2, 40, 3, 8)
    cos, sin = rotary(x, torch.arange(40)[None])
    wanted, _ = theirs.apply_rotary_pos_emb_interleave(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    found = rotate(x, rotations(m, 40, torch.float32))
    apart = torch.cat([found[..., 0::2], found[..., 1::2]], -1).transpose(1, 2)
    torch.testing.assert_close(apart, wanted, rtol=1e-5, atol=2e-6)


def test_far_positions_keep_their_angle():
    """At position 160 000 an FP32 angle is off by 0.01: ours are made in FP64 and stay within FP32's rounding of the result."""
    m = small(qk_rope_head_dim=8)
    turns, at = rotations(m, 160_001, torch.float32), 160_000
    frequencies = rotations(m, 2, torch.float64)[1].angle().tolist()
    wanted = [complex(math.cos(at * f), math.sin(at * f)) for f in frequencies]
    torch.testing.assert_close(turns[at], torch.tensor(wanted, dtype=torch.complex64), rtol=0, atol=1e-6)
    assert turns.dtype == torch.complex64 and rotations(m, 2, torch.bfloat16).dtype == torch.complex64


def test_scores_depend_on_distance_only():
    m = small(qk_rope_head_dim=8)
    turns = rotations(m, 32, torch.float64)
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 32, 1, 8) for _ in range(2))
    scores = (rotate(q, turns)[0, :, 0] @ rotate(k, turns)[0, :, 0].T).diagonal(-5)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- weights


def stage(m: ModelConfig, layers: range, *, ep: int = 1, ep_rank: int = 0, seed: int = 0, dtype=torch.float32) -> Stage:
    with torch.device("meta"):
        made = Stage(
            m,
            layers=layers,
            is_first=layers.start == 0,
            is_last=layers.stop == m.num_layers,
            ep=ep,
            balance=Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0),
            dtype=dtype,
            dispatcher=make_dispatcher("local", num_experts=m.num_experts, align=row_alignment(dtype), groups=None),
            ops=Ops(),
        )
    materialise(made, seed=seed, ep_rank=ep_rank)
    return made


@pytest.mark.parametrize("cuts, ep", [([4], 2), ([4], 4), ([1, 4], 1), ([2, 3, 4], 8)])
def test_a_seed_gives_the_same_weights_under_every_layout(cuts, ep):
    m = small()
    whole = dict(stage(m, range(4)).named_parameters())
    found = {}
    for low, high in zip([0, *cuts], cuts):
        ranks = [dict(stage(m, range(low, high), ep=ep, ep_rank=r).named_parameters()) for r in range(ep)]
        for name in ranks[0]:
            shares = [rank[name] for rank in ranks]
            if ".experts." not in name:
                assert all(torch.equal(shares[0], other) for other in shares)
            found[name] = torch.cat(shares) if ".experts." in name else shares[0]
    assert found.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(found[name], weight), name


def test_initial_weights():
    """Right size and spread; no two matrices or experts alike; another seed, other weights; rounding is all that BF16 changes."""
    m = small(dim=64, vocab_size=500, init_std=0.02)
    weights, other = (dict(stage(m, range(4), seed=s).named_parameters()) for s in (0, 1))
    rounded = dict(stage(m, range(4), dtype=torch.bfloat16).named_parameters())
    firsts = set()
    for name, w in weights.items():
        assert torch.equal(rounded[name], w.bfloat16())
        if w.dim() == 1:
            assert (w == 1).all()
            continue
        assert not torch.equal(w, other[name])
        assert w.mean().abs() < 5 * 0.02 / math.sqrt(w.numel()) and w.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(w.numel()))
        firsts |= {matrix[0, 0].item() for matrix in w.view(-1, *w.shape[-2:])}
    assert len(firsts) == sum(w.shape[0] if w.dim() == 3 else w.dim() == 2 for w in weights.values())


def test_a_tied_table_is_one_parameter():
    m = small(tie_embeddings=True)
    names = [name for _, name, _ in named_weights({0: stage(m, range(4))})]
    assert names.count("embed") == 1 and "head" not in names
    first = stage(m, range(0, 2))
    with torch.device("meta"):
        last = Stage(
            m, layers=range(2, 4), is_first=False, is_last=True, ep=1, balance=first.balance, dtype=torch.float32,
            dispatcher=first.dispatcher, ops=first.ops, shared_embed=first.embed,
        )  # fmt: skip
    assert [name for _, name, _ in named_weights({0: first, 1: last})].count("embed") == 1
    assert torch.equal(stage(m, range(2, 4)).embed, first.embed)  # elsewhere: its own copy, the same weights


# ---------------------------------------------------------------- experts and the whole


@pytest.mark.parametrize("sizes", [[0, 16, 0], [0, 0, 0]], ids=["experts without tokens", "a rank without tokens"])
def test_experts_without_rows_break_nothing(sizes):
    experts, store, num_rows = Experts(3, 8, 4, torch.float32), WeightGradStore(), sum(sizes)
    for param in experts.parameters():
        torch.nn.init.normal_(param)
        param.main_grad = torch.zeros_like(param, requires_grad=False)
    rows, weight = torch.randn(num_rows, 8, requires_grad=True), torch.rand(num_rows, requires_grad=True)
    out = experts(rows, weight, RowGroups.of(sizes), Ops(store=store))
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        for closure in store.take():
            closure()
    assert rows.grad.shape == (num_rows, 8) and weight.grad.shape == (num_rows,)
    for param in experts.parameters():
        assert [bool(param.main_grad[e].any()) for e in range(3)] == [n > 0 for n in sizes]


def causal_lm(**changes) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(small(**changes))
    materialise(model.stage, seed=0)
    return model


def test_logits_see_the_past_of_their_own_sequence_only():
    model = causal_lm()
    tokens = torch.randint(41, (2, 12), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 41
    after = model(changed)
    torch.testing.assert_close(after[0, :7], before[0, :7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[0, 7:], before[0, 7:], rtol=1e-3)


@pytest.mark.parametrize("shape", [(12,), (1, 65), (1, 2, 3)])
def test_tokens_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="max_seq_len = 64"):
        causal_lm()(torch.zeros(shape, dtype=torch.int64))


def test_evaluation_counts_no_load():
    model = causal_lm()
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert all(not stats.load_E.any() for stats in model.stage.stats.values()) and model.stage.stats.keys() == {1, 2, 3}


def test_bf16_follows_fp32():
    """30 dB: of a dense model, where no choice of experts can flip."""
    wide = causal_lm(num_dense_layers=4)
    with torch.device("meta"):
        narrow = CausalLM(wide.m, torch.bfloat16)
    materialise(narrow.stage, seed=0)
    tokens = torch.randint(41, (2, 32), generator=torch.Generator().manual_seed(0))
    reference = wide(tokens)
    assert 20 * torch.log10(reference.norm() / (narrow(tokens).float() - reference).norm()) > 30


def test_presets_are_built_on_meta():
    """Names of every preset's parameters and their shapes, 671 B included, without allocating any."""
    with torch.device("meta"):
        model = CausalLM(load(["model=deepseek_v3"]).model)
    shapes = {name: tuple(p.shape) for name, p in model.stage.named_parameters()}
    assert shapes["layers.60.experts.gate_up"] == (256, 4096, 7168) and shapes["layers.0.attn.qkv_a"] == (1536 + 512 + 64, 7168)


def test_entropy_of_scores():
    score = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score[0] = 0.3  # all equal: log 8
    score[1] = torch.eye(8, dtype=torch.float64)[2]  # one has all: 0
    found = entropy(score)
    assert torch.allclose(found, torch.distributions.Categorical(probs=score).entropy(), atol=1e-12)
    assert found[0].item() == pytest.approx(math.log(8)) and found[1].item() == 0
