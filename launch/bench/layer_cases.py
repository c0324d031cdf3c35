"""What is made of several kernels, forward and backward: attention, the head with its loss, and a whole MoE layer.

FLOPs are those that the mathematics needs, backward twice forward: what attention computes again does not count.

T tokens   H heads   S positions   D model dim   V vocabulary   O attention's output, all heads side by side
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...conf.schema import ModelConfig
from ...kernels.attention import causal_attention
from ...kernels.cross_entropy import linear_cross_entropy
from ...kernels.fp8_layers import Fp8Linears
from ...kernels.fp8_weights import WeightCache
from ...kernels.grouped import row_alignment
from ...kernels.ops import Ops
from ...kernels.weight_grad import WeightGradStore
from ...parallel.dispatch import make_dispatcher
from ...parallel.phases import ComputePhase, MicroBatch
from ...train.interop.hf_format import to_hf_config
from ...train.model.decoder import Stage
from ...train.model.moe import Balance
from .case import Case, Maker, Peer, Sizes
from .peers import TRANSFORMERS, plain_and_compiled

QK, VALUE = 192, 128  # MLA's heads
WEIGHT_SCALE = 0.02


def cases(sizes: Sizes) -> list[Case]:
    return [_attention(sizes), _head(sizes), _moe(sizes, fp8=True), _moe(sizes, fp8=False)]


# ---------------------------------------------------------------- attention


def _attention(sizes: Sizes) -> Case:
    H, S = sizes.heads, sizes.seq_len
    shown = min(H, 2)  # heads that are held against exact ones

    def both(attend: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, grad_SO: Tensor) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            with torch.enable_grad():
                out_SO = attend(*leaves)
            return [out_SO, *torch.autograd.grad(out_SO, leaves, grad_SO)]

        return run

    side_by_side = lambda out_BHSV: out_BHSV.transpose(1, 2).reshape(len(out_BHSV) * out_BHSV.shape[2], -1)
    ours = lambda q, k, v: causal_attention(q, k, v, QK**-0.5)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        after = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return side_by_side((q @ k.mT * QK**-0.5).masked_fill(after, -math.inf).softmax(-1) @ v)

    def by(backend: SDPBackend, padding: int = 0) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, padding)), is_causal=True, scale=QK**-0.5)
            return side_by_side(out[..., : v.shape[-1]])

        return both(attend)

    def read(out: list[Tensor]) -> list[Tensor]:
        return [out[0][:, : shown * VALUE], *(grad[:, :shown] for grad in out[1:])]

    def exact(q: Tensor, k: Tensor, v: Tensor, grad_SO: Tensor) -> list[Tensor]:
        return both(plain)(*(t[:, :shown].double() for t in (q, k, v)), grad_SO[:, : shown * VALUE].double())

    return Case(
        op="attention and backward",
        shape=f"{H} heads x{S}x{QK}/{VALUE}",
        make=lambda maker: (*(maker.normal(1, H, S, width) for width in (QK, QK, VALUE)), maker.normal(S, H * VALUE)),
        run=both(ours),
        exact=exact,
        read=read,
        least_db=35.0,
        flops=3 * H * (QK + VALUE) * S * (S + 1),
        bytes=2 * H * S * (2 * QK + 2 * VALUE),
        ceiling="bf16",
        peers=(
            Peer(name="SDPA by cuDNN", run=by(SDPBackend.CUDNN_ATTENTION), read=read),
            Peer(name="SDPA by flash, values padded", run=by(SDPBackend.FLASH_ATTENTION, QK - VALUE), read=read),
            Peer(name="SDPA, memory-efficient", run=by(SDPBackend.EFFICIENT_ATTENTION), read=read),
        ),
    )


# ---------------------------------------------------------------- head


def _head(sizes: Sizes) -> Case:
    T, D, V = sizes.tokens, sizes.dim, sizes.vocabulary

    def make(maker: Maker) -> tuple:
        weight = nn.Parameter(maker.normal(V, D, scale=WEIGHT_SCALE))
        weight.main_grad = torch.zeros(V, D, device=maker.device)
        targets = torch.arange(T, device=maker.device).mul_(7919 + maker.seed).remainder_(V)
        return maker.normal(T, D).requires_grad_(), weight, targets

    def run(x: Tensor, weight: nn.Parameter, targets: Tensor) -> list[Tensor]:
        store = WeightGradStore()
        with torch.enable_grad():
            loss = linear_cross_entropy(x, weight, targets, 1 / T, store, compiled=x.is_cuda)
        (grad,) = torch.autograd.grad(loss, x)
        for closure in store.take():
            closure()
        return [loss.detach(), grad]

    def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    def with_grads(loss: Callable) -> Callable:
        def run(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                value = loss(x, weight, targets)
            return [value.detach(), *torch.autograd.grad(value, (x, weight))[:1]]

        return run

    def exact(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
        """In FP32: in FP64 it would not fit beside the rest."""
        return with_grads(eager)(x.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), targets)

    plain, compiled = plain_and_compiled(eager, list)
    return Case(
        op="head, loss and backward",
        shape=f"{T}x{V}x{D}",
        make=make,
        run=run,
        exact=exact,
        read=list,
        least_db=35.0,
        flops=6 * T * V * D,
        bytes=2 * V * D,
        ceiling="bf16",
        peers=tuple(Peer(name=peer.name, run=with_grads(peer.run), read=list) for peer in (plain, compiled)),
    )


# ---------------------------------------------------------------- a whole MoE layer


def _model(sizes: Sizes) -> ModelConfig:
    """As much of it as a MoE layer needs; attention, which is built with it and not run, is small."""
    return ModelConfig(
        name="layer", num_layers=2, dim=sizes.dim, vocab_size=sizes.vocabulary, max_seq_len=sizes.seq_len, num_heads=1, kv_lora_rank=64,
        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, num_dense_layers=1, dense_hidden_dim=sizes.hidden,
        num_experts=sizes.layer_experts, top_k=sizes.top_k, expert_hidden_dim=sizes.hidden, num_groups=8, num_limited_groups=4,
        route_scale=2.5,
    )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Router, dispatch, experts, shared expert and combine of one block, on one device, as training runs them."""

    stage: Stage

    @classmethod
    def build(cls, m: ModelConfig, device: torch.device, *, fp8: bool) -> "Layer":
        store = WeightGradStore()
        with device:
            dispatcher = make_dispatcher(
                "local", num_experts=m.num_experts, align=row_alignment(torch.bfloat16, fp8=fp8), groups=None
            )  # fmt: skip
            stage = Stage(
                m, layers=range(1, 2), is_first=False, is_last=False, ep=1, dtype=torch.bfloat16, dispatcher=dispatcher,
                balance=Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0),
                ops=Ops(store=store, fp8=Fp8Linears(casts=WeightCache(), store=store) if fp8 else None, compiled=device.type == "cuda"),
            )  # fmt: skip
            generator = torch.Generator(device).manual_seed(0)
            for param in stage.parameters():
                param.data.normal_(0, WEIGHT_SCALE, generator=generator)
                param.main_grad = torch.zeros(param.shape, dtype=torch.float32)
        return cls(stage)

    @property
    def block(self) -> nn.Module:
        return self.stage.layers["1"]

    def step(self, u_TD: Tensor, grad_TD: Tensor) -> list[Tensor]:
        """-> output and input gradient; the weights' gradients are added to their `main_grad`."""
        stage, saved, values = self.stage, [], (u_TD,)
        route = lambda batch, u_TD: (torch.zeros_like(u_TD), u_TD, *self.block.router(u_TD, len(u_TD), stage.ops))
        first = ComputePhase("route", route, after=lambda h, u, weight, r: stage.dispatcher.start(r, None))
        tokens = torch.zeros(1, len(u_TD), dtype=torch.int64, device=u_TD.device)
        batch = MicroBatch(tokens_BS=tokens, targets_BN=tokens, counted=False)
        phases = [first, *stage.phases[1:]]
        arrived = lambda out: out if isinstance(out, tuple) else out.wait()
        for phase in phases:
            kept = []
            values = arrived(phase.forward(kept, batch, *values))
            saved.append(kept)
        out, grads = values[0], (grad_TD, *[None] * (len(values) - 1))
        for phase, kept in zip(reversed(phases), reversed(saved)):
            grads = arrived(phase.backward(kept, *grads))
        for closure in stage.store.take():
            closure()
        return [out, grads[0]]


def _moe(sizes: Sizes, *, fp8: bool) -> Case:
    m, T = _model(sizes), sizes.tokens

    def make(maker: Maker) -> tuple:
        return Layer.build(m, maker.device, fp8=fp8), maker.normal(T, m.dim), maker.normal(T, m.dim)

    def exact(layer: Layer, u: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = u.double().requires_grad_()
        with torch.enable_grad():
            out = _plain_moe(layer.block, leaf, m)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.double())]

    return Case(
        op=f"moe layer {'fp8' if fp8 else 'bf16'}, and backward",
        shape=f"{T}x{m.dim}, {m.num_experts} experts of {m.expert_hidden_dim}, top {m.top_k}",
        make=make,
        run=Layer.step,
        exact=exact,
        read=list,
        least_db=18.0 if fp8 else 35.0,
        flops=3 * 2 * T * m.dim * (3 * m.expert_hidden_dim * (m.top_k + m.num_shared_experts) + m.num_experts),
        bytes=6 * m.num_experts * m.dim * m.expert_hidden_dim,
        ceiling="fp8" if fp8 else "bf16",
        peers=(Peer(name=TRANSFORMERS, prepare=_for_transformers(m), run=_step_of_module, read=list),),
    )


def _plain_moe(block: nn.Module, u: Tensor, m: ModelConfig) -> Tensor:
    """Expert by expert, in the dtype of `u`."""
    wide = lambda weight: weight.detach().to(u.dtype)

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, wide(gate_up)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, wide(down))

    score = F.linear(u, wide(block.router.weight)).sigmoid()
    expert_TK = block.router.select(score.detach())
    weight_TK = score.gather(1, expert_TK)
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True) * m.route_scale
    out = mlp(u, block.shared.gate_up, block.shared.down)
    for e in range(m.num_experts):
        token, k = (expert_TK == e).nonzero(as_tuple=True)
        if len(token):
            own = mlp(u[token], block.experts.gate_up[e], block.experts.down[e]) * weight_TK[token, k, None]
            out = out.index_add(0, token, own)
    return out


def _for_transformers(m: ModelConfig) -> Callable[..., tuple]:
    def prepare(layer: Layer, u: Tensor, grad: Tensor) -> tuple:
        """transformers is imported here: it takes seconds, and need not be there."""
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        config = DeepseekV3Config(**to_hf_config(m, "bf16"))
        config._experts_implementation = "grouped_mm"
        with torch.device(u.device):
            module = DeepseekV3MoE(config).to(torch.bfloat16)
        block, gate_up = layer.block, layer.block.shared.gate_up.detach()
        ours = {
            "gate.weight": block.router.weight, "experts.gate_up_proj": block.experts.gate_up, "experts.down_proj": block.experts.down,
            "shared_experts.gate_proj.weight": gate_up.chunk(2)[0], "shared_experts.up_proj.weight": gate_up.chunk(2)[1],
            "shared_experts.down_proj.weight": block.shared.down,
        }  # fmt: skip
        module.load_state_dict({name: weight.detach() for name, weight in ours.items()}, strict=False)
        return module, u, grad

    return prepare


def _step_of_module(module: nn.Module, u: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = u.detach()[None].requires_grad_()
    with torch.enable_grad():
        out = module(leaf)
        out.backward(grad[None])
    return [out.detach()[0], leaf.grad[0]]
