"""Logits and all gradients equal `transformers`' DeepseekV3ForCausalLM: FP32 as it comes, and FP64 with its FP32 islands lifted.

The weights go through `save_pretrained` and `load_pretrained`, the gradients through the executor with two micro-batches.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from shoestring.conf.schema import ParallelConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel.executor import Executor
from shoestring.parallel.groups import Mesh
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES
from shoestring.train.interop.hf import load_pretrained
from shoestring.train.interop.hf_format import pieces
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=8, beta_fast=4, beta_slow=1)
PLAIN = dict(rope_type="default", rope_theta=500.0)  # a small base, so that all pairs turn within the sequence

# DeepSeek-V3 in small. Sizes differ from each other so that no transposition goes unseen, and the blocks' norms have another epsilon
# than those of the latents. Each case says what it has that the base has not.
BASE = dict(
    vocab_size=67, hidden_size=32, intermediate_size=44, moe_intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5, kv_lora_rank=12, q_lora_rank=24,
    qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1,
    norm_topk_prob=True, max_position_embeddings=32, rope_parameters=PLAIN, pad_token_id=None, initializer_range=0.15, rms_norm_eps=1e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    changes: dict = field(default_factory=dict)
    bias: float = 0.1  # spread of the selection bias
    seed: int = 0  # moved on where a near-tie would decide


CASES = {
    "deepseek-v3 in small, odd vocabulary": Case(),
    "queries without a latent": Case(dict(q_lora_rank=None)),
    "two shared experts, no dense block": Case(dict(n_shared_experts=2, first_k_dense_replace=0)),
    "two dense blocks, tied embeddings": Case(dict(first_k_dense_replace=2, tie_word_embeddings=True)),
    "one group, as DeepSeek-V2-Lite": Case(dict(n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=None), seed=2),
    "all groups allowed": Case(dict(n_group=2, topk_group=2)),
    "YaRN with both mscales": Case(dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.0))),
    "YaRN without mscale": Case(dict(rope_parameters=YARN)),
    "YaRN with equal mscales, narrow values": Case(dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0), v_head_dim=8)),
    "values wider than keys": Case(dict(v_head_dim=28)),
    "weights not normalised, scale 1": Case(dict(norm_topk_prob=False, routed_scaling_factor=1.0)),
    "no selection bias, one expert each": Case(dict(num_experts_per_tok=1, n_group=1, topk_group=1), bias=0.0),
    "a strong bias starves experts of tokens": Case(dict(n_group=1, topk_group=1), bias=2.0),
    "only dense blocks": Case(dict(first_k_dense_replace=3)),
}
FP64 = list(CASES)[:9:2] + ["a strong bias starves experts of tokens"]

# Gradients are compared tensor by tensor, each error against that tensor's norm or, if that is smaller, against this share of the
# norm of all gradients together: rounding of FP32 sums is of the size of their terms, not of what remains when they cancel.
FLOOR = 1e-4
MARGIN = 2e-5  # between a chosen expert (or group) and the best one left out: far above FP32's rounding of scores


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_fp32(case, tmp_path):
    model, batches = make(case, torch.float32)
    check(model, batches, tmp_path, "fp32", logits_tol=1e-5, grad_tol=1e-4)


@pytest.mark.parametrize("name", FP64)
def test_fp64(name, tmp_path, monkeypatch):
    model, batches = make(CASES[name], torch.float64)
    lift_fp32_islands(model, monkeypatch)
    check(model, batches, tmp_path, "fp64", logits_tol=1e-12, grad_tol=1e-11)


def test_a_wrong_model_is_seen(tmp_path):
    """The oracle can fail: another selection bias, route scale or rotary base is far outside the tolerances."""
    model, batches = make(CASES["deepseek-v3 in small, odd vocabulary"], torch.float32)
    model.save_pretrained(tmp_path)
    reference = model(batches[0][:, :-1]).logits
    for change in (lambda m: m.stage.layers["1"].router.bias.mul_(-1), lambda m: m.stage.layers["2"].attn.kv_norm.data.mul_(1.001)):
        ours = load_pretrained(tmp_path)
        change(ours)
        assert relative(ours(batches[0][:, :-1]), reference) > 1e-4


# ---------------------------------------------------------------- the two sides


def make(case: Case, dtype: torch.dtype) -> tuple[DeepseekV3ForCausalLM, list[torch.Tensor]]:
    torch.manual_seed(case.seed)
    config = DeepseekV3Config(**(BASE | case.changes), num_mtp_layers=0, attn_implementation="eager", experts_implementation="eager")
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, case.bias)
    return model, [torch.randint(config.vocab_size, (2, 18)) for _ in range(2)]


def check(model, batches, folder, dtype: str, *, logits_tol: float, grad_tol: float) -> None:
    model.save_pretrained(folder)
    margins = watch_margins(model)
    logits = [model(b[:, :-1], use_cache=False).logits for b in batches]
    loss = sum(F.cross_entropy(x.flatten(0, 1), b[:, 1:].flatten(), reduction="sum") for x, b in zip(logits, batches))
    loss.backward()
    assert min(margins, default=1.0) > MARGIN

    ((our_logits, our_loss, our_grads),) = fork_ranks(1, step, folder, dtype, batches)
    for a, b in zip(our_logits, logits):
        assert a.dtype == b.dtype and relative(a, b) <= logits_tol
    assert abs(our_loss.item() / loss.item() - 1) <= logits_tol

    parameters = dict(model.named_parameters())
    floor = FLOOR * torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    m = load_pretrained(folder, dtype=dtype).m
    compared = [p for p in pieces(m, stacked=True) if not p.is_selection_bias]
    assert {p.name for p in compared} == parameters.keys()
    for p in compared:
        ours = our_grads[p.weight].flatten()[p.offset : p.offset + p.numel].view(p.shape)
        wanted = parameters[p.name].grad
        wanted = torch.zeros_like(ours) if wanted is None else wanted if p.index is None else wanted[p.index]  # expert by expert
        assert wanted.shape == ours.shape and (ours - wanted).norm() <= grad_tol * wanted.norm().clamp(min=floor), (p.name, p.index)


def step(folder, dtype: str, batches):
    """Ours: logits without gradients, then one executor step."""
    model = load_pretrained(folder, dtype=dtype)
    stage = model.stage
    logits = [model(b[:, :-1]) for b in batches]
    for param in stage.parameters():
        param.main_grad = torch.zeros_like(param, requires_grad=False)
    stage.prepare()
    executor = Executor(
        stages={0: stage.phases},
        mesh=Mesh.create(ParallelConfig(), 0),
        actions=lambda num: SCHEDULES["1f1b"].actions(1, 1, num)[0],
        store=stage.store,
        boundary=lambda num_tokens: torch.empty(num_tokens, model.m.dim),
        loss_weights=torch.ones(1),
    )
    loss = executor.step([MicroBatch(tokens_BS=b[:, :-1], targets_BN=b[:, 1:]) for b in batches])
    return logits, loss, {name: p.main_grad for name, p in stage.named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def watch_margins(model) -> list[float]:
    """Filled in each forward: how clearly the last chosen group and expert beat the first ones left out, the least over all tokens."""
    margins = []

    def look(gate, _, out):
        choice = out[0].detach().sigmoid() + gate.e_score_correction_bias
        grouped = choice.view(len(choice), gate.num_group, -1)
        best = grouped.topk(2, -1).values.sum(-1).sort(descending=True)
        if gate.topk_group < gate.num_group:
            margins.append((best.values[:, gate.topk_group - 1] - best.values[:, gate.topk_group]).min().item())
            for group in best.indices[:, gate.topk_group :].unbind(1):
                grouped[torch.arange(len(choice)), group] = -torch.inf
        ranked = grouped.flatten(1).sort(descending=True).values
        margins.append((ranked[:, gate.top_k - 1] - ranked[:, gate.top_k]).min().item())

    for module in model.modules():
        if isinstance(module, theirs.DeepseekV3TopkRouter):
            module.register_forward_hook(look)
    return margins


def lift_fp32_islands(model, monkeypatch) -> None:
    """Make `transformers` compute norms, gate, softmax and rotary angles in FP64 where it says FP32, whatever the model's dtype."""
    lifted = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("_")})
    lifted.float32 = torch.float64
    monkeypatch.setattr(theirs, "torch", lifted)
    rotary = model.model.rotary_emb

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * rotary.inv_freq
        both = torch.cat([angles, angles], -1)
        return both.cos() * rotary.attention_scaling, both.sin() * rotary.attention_scaling

    monkeypatch.setattr(rotary, "forward", forward)
