"""A training session as the papers' formulas read: ordinary torch and autograd in FP64, one process, the whole global batch at once.

What every layout is held against, so that mistakes that one process and many share are seen too. Nothing is used of the code under
proof but its configuration and its weights' names and shapes. Sections and equations are DeepSeek-V3's (arXiv 2412.19437) unless said.

N samples   S sequence length   W = S + 1 + prediction depth   T = N * S tokens   D model dim   H heads   R rotary dim   V vocabulary
E experts   K top-k   G groups   F hidden dim   w: weights of a block, by the rest of their names
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...conf.phases import num_steps
from ...conf.schema import Config, ModelConfig, OptimConfig, YarnConfig
from ...train.interop.hf_format import weight_shapes
from .evidence import Choose, Evidence, Step
from .plain_optimizer import Optimizer, learning_rate

Weights = Mapping[str, Tensor]
Select = Callable[[Tensor], Tensor]  # score_TE -> expert_TK

LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's epsilon: as in the released code


def train(config: Config, first: Weights, rows: Sequence[Tensor], choose: Choose | None = None) -> Evidence:
    """A session of one phase from its first step on; `first`: flat, "embed.master" ..., "layers.1.router.bias" ...; not changed.

    `rows[s]`: int64 (N, W), all tokens of step s, none of them ignored. `choose(step, layer, samples, select, score_TE) -> expert_TK`
    stands in for the model's own `select(score_TE)`; samples are numbered on from step to step.
    """
    m, o = config.model, config.optim
    state = _shaped(m, first)
    biases = {name: t for name, t in state.items() if name.endswith(".bias")}
    optimizer, steps, seen = Optimizer(m, o, {name: t for name, t in state.items() if name not in biases}), [], 0
    for number, rows_NW in enumerate(rows):
        samples = list(range(seen, seen + len(rows_NW)))
        seen += len(samples)
        routers = _Routers(m, choose and partial(_forced, choose, number, samples))
        weights = {name: t.requires_grad_() for name, t in optimizer.weights.items()}
        losses = _losses(m, weights | biases, rows_NW, config.data.seq_len, routers)
        balance, z = o.sequence_balance_coef * routers.total("balance"), o.z_loss_coef * routers.total("z")
        objective = losses[0] + o.mtp_weight * sum(losses[1:]) / max(1, m.mtp_depth) + balance + z  # equation 25
        grads = dict(zip(weights, torch.autograd.grad(objective, list(weights.values()))))
        lr = learning_rate(o, number, num_steps(config))
        norm, clip = optimizer.step(grads, lr)
        _move_biases(o, biases, routers)
        numbers = {"loss": losses[0], **{f"mtp_loss.{k}": loss for k, loss in enumerate(losses[1:])}, "balance_loss": balance, "z_loss": z}
        numbers |= {"router_entropy": routers.total("entropy") / max(1, len(routers.routed)), "bias_norm": _norm_of(biases.values())}
        numbers = {name: value.item() for name, value in numbers.items()} | {"grad_norm": norm, "clip_coef": clip, "lr": lr}
        tensors = {f"{name}.grad": g for name, g in grads.items()} | optimizer.state() | biases
        steps.append(routers.step(numbers, {name: t.detach().flatten().clone() for name, t in tensors.items()}, len(samples)))
    return Evidence(first={name: t.clone() for name, t in first.items()}, steps=steps)


def _forced(choose: Choose, step: int, samples: list[int], layer: int, own: Select, score_TE: Tensor) -> Tensor:
    return choose(step, layer, samples, own, score_TE)


def _move_biases(o: OptimConfig, biases: dict[str, Tensor], routers: "_Routers") -> None:
    """§2.1.2: up where an expert had less than the mean of the global batch, down where more."""
    for layer, load_E in routers.loads().items():
        biases[f"layers.{layer}.router.bias"] += o.bias_update_speed * torch.sign(load_E.double().mean() - load_E)


def _norm_of(tensors: Iterable[Tensor]) -> Tensor:
    return sum((t.square().sum() for t in tensors), torch.zeros(())).sqrt()


@torch.no_grad()
def logits(m: ModelConfig, masters: Weights, tokens_BS: Tensor) -> Tensor:
    """(B, S, V) of the next tokens, FP64. `masters`: flat, as `train`'s `first`; the routers' biases among them."""
    w = _shaped(m, masters)
    return _trunk(m, w, tokens_BS, _Routers(m)) @ _head(m, w).T


def _shaped(m: ModelConfig, flat: Weights) -> dict[str, Tensor]:
    key = lambda name: name if name.endswith(".bias") else f"{name}.master"
    return {name: flat[key(name)].detach().double().reshape(shape).clone() for name, shape in weight_shapes(m).items()}


# ---------------------------------------------------------------- model


def _losses(m: ModelConfig, w: Weights, rows_NW: Tensor, seq_len: int, routers: "_Routers") -> list[Tensor]:
    """Means over tokens: the next token's, then each prediction module's."""
    ahead = lambda places: rows_NW[:, places : places + seq_len]
    loss = lambda x_NSD, places: F.cross_entropy((x_NSD @ _head(m, w).T).flatten(0, 1), ahead(places).flatten())
    read_NSD = _trunk(m, w, ahead(0), routers)
    losses = [loss(read_NSD, 1)]
    for k in range(1, m.mtp_depth + 1):  # §2.2: module k sees what the head before it read, and the token that is k places ahead
        layer = m.num_layers + k - 1
        own = _below(w, f"layers.{layer}.")
        known_NSD = _norm(w["embed"][ahead(k)], own["embed_norm"], m.norm_eps)
        seen_NSD = _norm(read_NSD, own["hidden_norm"], m.norm_eps)
        x_NSD = torch.cat([known_NSD, seen_NSD], -1) @ own["merge"].T  # equation 21, its halves the other way round, as released
        read_NSD = _norm(_block(m, own, layer, x_NSD, routers), own["head_norm"], m.norm_eps)
        losses.append(loss(read_NSD, k + 1))
    return losses


def _trunk(m: ModelConfig, w: Weights, tokens_NS: Tensor, routers: "_Routers") -> Tensor:
    """(N, S, D): what the output head reads."""
    x_NSD = w["embed"][tokens_NS]
    for layer in range(m.num_layers):
        x_NSD = _block(m, _below(w, f"layers.{layer}."), layer, x_NSD, routers)
    return _norm(x_NSD, w["norm"], m.norm_eps)


def _head(m: ModelConfig, w: Weights) -> Tensor:
    return w["embed" if m.tie_embeddings else "head"]


def _below(w: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ down.T


def _block(m: ModelConfig, w: Weights, layer: int, x_NSD: Tensor, routers: "_Routers") -> Tensor:
    h_NSD = x_NSD + _attention(m, _below(w, "attn."), _norm(x_NSD, w["attn_norm"], m.norm_eps))
    u_NSD = _norm(h_NSD, w["mlp_norm"], m.norm_eps)
    if layer < m.num_dense_layers or m.num_dense_layers >= m.num_layers:  # a prediction module is like the last block
        return h_NSD + _swiglu(u_NSD, w["mlp.gate_up"], w["mlp.down"])
    routed = routers.route(layer, _below(w, "router."), u_NSD)
    return h_NSD + _mixture(m, w, u_NSD.flatten(0, 1), routed).view_as(h_NSD)


def _attention(m: ModelConfig, w: Weights, u_NSD: Tensor) -> Tensor:
    """Multi-head latent attention (§2.1.1), input normed."""
    heads = lambda x, *sizes: x.unflatten(-1, (m.num_heads, sum(sizes))).transpose(1, 2).split(sizes, -1)  # (N, H, S, size) each
    q_width = m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    q, latent_kv, k_rope_NSR = (u_NSD @ w["qkv_a"].T).split([m.q_lora_rank or q_width, m.kv_lora_rank, m.qk_rope_head_dim], -1)
    if m.q_lora_rank:
        q = _norm(q, w["q_norm"], LATENT_EPS) @ w["q_b"].T
    q_nope, q_rope = heads(q, m.qk_nope_head_dim, m.qk_rope_head_dim)
    k_nope, value = heads(_norm(latent_kv, w["kv_norm"], LATENT_EPS) @ w["kv_b"].T, m.qk_nope_head_dim, m.v_head_dim)
    cos_SP, sin_SP = _turns(m, u_NSD.shape[1])
    match = q_nope @ k_nope.mT + _rotated(q_rope, cos_SP, sin_SP) @ _rotated(k_rope_NSR, cos_SP, sin_SP)[:, None].mT  # one key, all heads
    future_SS = torch.ones(match.shape[-2:], dtype=torch.bool).triu(1)
    share_NHSS = (match * _softmax_scale(m)).masked_fill(future_SS, -torch.inf).softmax(-1)
    return (share_NHSS @ value).transpose(1, 2).flatten(2) @ w["out"].T


# ---------------------------------------------------------------- experts


@dataclass(frozen=True, kw_only=True)
class _Routed:
    expert_TK: Tensor
    weight_TK: Tensor
    margin_T: Tensor
    # means over tokens (balance: over sequences), without coefficients
    balance: Tensor
    z: Tensor
    entropy: Tensor


@dataclass
class _Routers:
    """All routers in one forward, and what each did, by layer. `forced(layer, own, score_TE)` decides in their stead."""

    m: ModelConfig
    forced: Callable[[int, Select, Tensor], Tensor] | None = None
    routed: dict[int, _Routed] = field(default_factory=dict)

    def route(self, layer: int, w: Weights, u_NSD: Tensor) -> _Routed:
        """Equations 12-20, and ST-MoE's z-loss (arXiv 2202.08906, equation 5)."""
        m, logits_NSE = self.m, u_NSD @ w["weight"].T
        score_NSE = logits_NSE.sigmoid() if m.score_func == "sigmoid" else logits_NSE.softmax(-1)
        score_TE = score_NSE.flatten(0, 1)
        own = lambda asked_TE: _choice(m, asked_TE + w["bias"])
        expert_TK, margin_T = own(score_TE.detach())
        if self.forced:
            expert_TK = self.forced(layer, lambda asked_TE: own(asked_TE)[0], score_TE.detach())
        weight_TK = score_TE.gather(1, expert_TK)
        if m.norm_topk:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        share_NSE = score_NSE / score_NSE.sum(-1, keepdim=True)
        chosen_NSE = F.one_hot(expert_TK, m.num_experts).sum(1).view_as(score_NSE)
        f_NE = chosen_NSE.double().mean(1) * m.num_experts / m.top_k
        self.routed[layer] = routed = _Routed(
            expert_TK=expert_TK,
            weight_TK=weight_TK * m.route_scale,
            margin_T=margin_T,
            balance=(f_NE * share_NSE.mean(1)).sum(1).mean(),
            z=logits_NSE.logsumexp(-1).square().mean(),
            entropy=torch.special.entr(share_NSE).sum(-1).mean(),
        )
        return routed

    def total(self, name: str) -> Tensor:
        """Of a loss, or of entropies, over layers."""
        return sum((getattr(r, name) for r in self.routed.values()), torch.zeros(()))

    def loads(self) -> dict[int, Tensor]:
        return {layer: torch.bincount(r.expert_TK.flatten(), minlength=self.m.num_experts) for layer, r in self.routed.items()}

    def step(self, numbers: dict[str, float], tensors: dict[str, Tensor], num_samples: int) -> Step:
        return Step(
            numbers=numbers,
            loads_LE=torch.stack([*self.loads().values()]) if self.routed else torch.zeros(0, self.m.num_experts, dtype=torch.int64),
            tensors=tensors,
            choices={layer: r.expert_TK.sort(1).values.unflatten(0, (num_samples, -1)) for layer, r in self.routed.items()},
            margins={layer: r.margin_T.unflatten(0, (num_samples, -1)) for layer, r in self.routed.items()},
        )


def _choice(m: ModelConfig, biased_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) experts and (T,) margins: the choice is the same while each score moves by less than half its token's margin.

    Of equals the first. A lower bound: groups may change and the experts not. A group's two best scores make its rating, which moves by
    twice as much.
    """
    best = lambda x, k: x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    margin_T = torch.full_like(biased_TE[:, 0], torch.inf)
    if m.num_limited_groups < m.num_groups:
        rating_TG = biased_TE.unflatten(1, (m.num_groups, -1)).topk(2).values.sum(-1)
        margin_T = _gap(rating_TG, m.num_limited_groups) / 2
        allowed_TG = F.one_hot(best(rating_TG, m.num_limited_groups), m.num_groups).sum(1) > 0
        biased_TE = biased_TE.masked_fill(~allowed_TG.repeat_interleave(m.num_experts // m.num_groups, 1), -torch.inf)
    return best(biased_TE, m.top_k), torch.minimum(margin_T, _gap(biased_TE, m.top_k))


def _gap(x: Tensor, k: int) -> Tensor:
    """Between the k-th and the next largest of each row; infinite where there is no next."""
    ranked = F.pad(x.sort(1, descending=True).values, (0, 1), value=-torch.inf)
    return ranked[:, k - 1] - ranked[:, k]


def _mixture(m: ModelConfig, w: Weights, u_TD: Tensor, r: _Routed) -> Tensor:
    """Shared experts, as one wider, and each token's routed ones."""
    y_TD = _swiglu(u_TD, w["shared.gate_up"], w["shared.down"]) if m.num_shared_experts else torch.zeros_like(u_TD)
    for e in range(m.num_experts):
        token, place = (r.expert_TK == e).nonzero(as_tuple=True)
        out = _swiglu(u_TD[token], w["experts.gate_up"][e], w["experts.down"][e])
        y_TD = y_TD.index_add(0, token, r.weight_TK[token, place, None] * out)
    return y_TD


# ---------------------------------------------------------------- positions


def _rotated(x: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """(..., S, R): neighbours are a pair."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos_SP - b * sin_SP, a * sin_SP + b * cos_SP], -1).flatten(-2)


def _turns(m: ModelConfig, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, P) of each pair at each position, times YaRN's factor.

    Frequencies are FP32 numbers, part of a released model as weights are; everything that is made of them is FP64. YaRN
    (arXiv 2309.00071 §3.2): pairs that turn often within the original length stay, slow ones turn `factor` times slower, a ramp between.
    """
    y, dim = m.yarn, m.qk_rope_head_dim
    frequency_P = 1.0 / m.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if y.factor > 1:
        pair_of = lambda turns: dim / 2 * math.log(y.original_max_seq_len / (2 * math.pi * turns)) / math.log(m.rope_theta)
        low, high = max(0, math.floor(pair_of(y.beta_fast))), min(dim - 1, math.ceil(pair_of(y.beta_slow)))
        slow_P = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(0.001, high - low)).clamp(0, 1)
        frequency_P = frequency_P / y.factor * slow_P + frequency_P * (1 - slow_P)
    angle_SP = torch.arange(seq_len).double()[:, None] * frequency_P.double()
    return angle_SP.cos() * _amplitude(y), angle_SP.sin() * _amplitude(y)


def _amplitude(y: YarnConfig) -> float:
    """Of rotated queries and keys: the paper's 0.1 ln(factor) + 1, or what DeepSeek's two settings make of it."""
    if y.mscale and y.mscale_all_dim:
        return _sharper(y, y.mscale) / _sharper(y, y.mscale_all_dim)
    return _sharper(y, 1.0)


def _softmax_scale(m: ModelConfig) -> float:
    return (m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5 * _sharper(m.yarn, m.yarn.mscale_all_dim) ** 2


def _sharper(y: YarnConfig, mscale: float) -> float:
    return 1.0 + 0.1 * mscale * math.log(y.factor)  # 1 without YaRN, and with mscale 0
