"""Routing and experts of a mixture-of-experts block (DeepSeek-V3 §2.1.2).

T tokens   D model dim   F expert hidden dim   E experts   e experts on this rank   K top-k   G groups   R rows after dispatch
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...conf.schema import ModelConfig
from ...kernels.grouped import RowGroups
from ...kernels.ops import Ops
from ...kernels.router import Routes, route
from ...kernels.router import select as select_experts
from ...parallel.dispatch import Routing


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What keeps experts equally used, beside the selection bias: coefficients of the sequence-wise balance loss and the z-loss.

    `token_weight` is what one token's loss is multiplied by in backward (1 / the micro-batch's nominal number of tokens), so that the
    router's losses, means over tokens, stand to the language loss as they should.
    """

    sequence_coef: float
    z_coef: float
    token_weight: float


class _AttachLoss(torch.autograd.Function):
    """Identity on the first argument whose backward also asks for the gradient of `loss`."""

    @staticmethod
    def forward(ctx, value, loss):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones(())


class Router(nn.Module):
    """Scores (sigmoid, or DeepSeek-V2's softmax); selection by score + bias inside each token's best groups; weights from scores alone.

    DeepSeek-V2 rates a group by its best expert, not by its best two as V3: softmax scores with a limit on groups are a ValueError.
    """

    def __init__(self, m: ModelConfig, balance: Balance, dtype: torch.dtype):
        super().__init__()
        if m.score_func not in ("sigmoid", "softmax") or (m.score_func == "softmax" and m.num_limited_groups < m.num_groups):
            groups = f"{m.num_limited_groups} of {m.num_groups} groups"
            raise ValueError(f"model.score_func = {m.score_func} with {groups}: want sigmoid, or softmax with all groups")
        self.balance = balance
        self.routes = Routes(
            top_k=m.top_k,
            num_groups=m.num_groups,
            num_limited_groups=m.num_limited_groups,
            softmax=m.score_func == "softmax",
            norm_topk=m.norm_topk,
            route_scale=m.route_scale,
        )
        self.weight = nn.Parameter(torch.empty(m.num_experts, m.dim, dtype=dtype))
        self.register_buffer("bias", torch.zeros(m.num_experts, dtype=torch.promote_types(dtype, torch.float32)))

    def forward(
        self,
        u_TD: Tensor,
        seq_len: int,
        ops: Ops,
        *,
        again: Callable[[], Tensor] | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Routing]:
        """(T, D) -> weight_TK (FP32 or wider, differentiable), and the choice of experts with its sums over tokens, for the record.

        `again`: makes `u_TD` for backward, where nobody keeps it. `select`: another choice than `self.select`.
        """
        logits_TE = _gate(u_TD, self.weight, ops, again or u_TD.detach)
        weight_TK, score_TE, expert_TK, load_E = route(logits_TE, self.bias, self.routes, choose=select)
        balance = sequence_balance_loss(score_TE, expert_TK, seq_len)
        z = logits_TE.logsumexp(1).square().sum()
        b = self.balance
        if torch.is_grad_enabled() and (b.sequence_coef or b.z_coef):
            weight_TK = _AttachLoss.apply(weight_TK, b.token_weight * (b.sequence_coef * balance * seq_len + b.z_coef * z))
        sums = {"balance": balance.detach() * seq_len, "z": z.detach(), "entropy": entropy(score_TE.detach()).sum()}
        return weight_TK, Routing(expert_TK=expert_TK, sums=sums, load_E=load_E)

    def select(self, score_TE: Tensor) -> Tensor:
        """(T, K), as `forward` chooses."""
        return select_experts(score_TE, self.bias, self.routes)


def _gate(u_TD: Tensor, weight_ED: Tensor, ops: Ops, again: Callable[[], Tensor]) -> Tensor:
    """Logits in FP32 or wider, whatever the dtype of tokens and weight. A wide copy of the tokens is not kept."""
    wide = torch.promote_types(u_TD.dtype, torch.float32)
    return ops.plain_linear(u_TD.to(wide), weight_ED, wide, again=lambda: again().to(wide))


def sequence_balance_loss(score_TE: Tensor, expert_TK: Tensor, seq_len: int) -> Tensor:
    """Sum over the sequences of sum_i f_i P_i (equations 17-20, without alpha): 1 where use is even, E / K where one set takes all.

    f_i: share of expert i in the sequence's choices, times E / K; P_i: mean normalised score. f has no gradient.
    """
    num_experts, top_k = score_TE.shape[1], expert_TK.shape[1]
    share_BE = (score_TE / score_TE.sum(1, keepdim=True)).view(-1, seq_len, num_experts).mean(1)
    chosen_BE = torch.zeros_like(share_BE).scatter_add_(
        1, expert_TK.view(len(share_BE), -1), torch.ones_like(expert_TK, dtype=share_BE.dtype).view(len(share_BE), -1)
    )
    return (chosen_BE * (num_experts / (top_k * seq_len)) * share_BE).sum()


def entropy(score_TE: Tensor) -> Tensor:
    """(T,) of the normalised scores, nats: 0 where one expert has all, log E where they are equal."""
    share_TE = score_TE / score_TE.sum(1, keepdim=True)
    return -torch.xlogy(share_TE, share_TE).sum(1)


class MLP(nn.Module):
    """SwiGLU feed-forward: a dense block's, or the shared experts' (which are one wider MLP)."""

    def __init__(self, dim: int, hidden_dim: int, dtype: torch.dtype):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden_dim, dim, dtype=dtype))
        self.down = nn.Parameter(torch.empty(dim, hidden_dim, dtype=dtype))

    def forward(self, u_TD: Tensor, ops: Ops, *, again: Callable[[], Tensor] | None = None) -> Tensor:
        """`again`: makes `u_TD` for backward, where nobody keeps it."""
        return ops.swiglu_linear(ops.linear(u_TD, self.gate_up, again=again), self.down)


class Experts(nn.Module):
    """This rank's routed experts, stacked. The routing weight is applied before the down-projection, so combine only adds."""

    def __init__(self, num_local: int, dim: int, hidden_dim: int, dtype: torch.dtype):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_local, 2 * hidden_dim, dim, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_local, dim, hidden_dim, dtype=dtype))

    def forward(self, rows_RD: Tensor, weight_R: Tensor, groups: RowGroups, ops: Ops) -> Tensor:
        gate_up = ops.linear(rows_RD, self.gate_up, groups)
        return ops.swiglu_linear(gate_up, self.down, groups, weight_R=weight_R)


@dataclass(kw_only=True)
class RouterStats:
    """What one MoE layer's router did since the last `take`: copies per expert on this rank, and sums over tokens (`Routing.sums`)."""

    load_E: Tensor  # int64; a scalar zero before the first: it adds to counts on any device, and the host does not wait
    sums: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, r: Routing) -> None:
        self.load_E = self.load_E + r.load_E
        for name, value in r.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()  # of thousands of micro-batches: FP32 would drift

    def take(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(load_E, sums) since the last call, which start anew."""
        taken = self.load_E, self.sums
        self.load_E, self.sums = torch.zeros_like(self.load_E), {}
        return taken
