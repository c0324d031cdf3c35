"""The DeepSeek-V3-shaped decoder, cut into pipeline stages, each a list of phases for the executor.

A block is four phases: attention (which ends with the router's choice), dispatch, experts, combine. A dense block has the same four,
with nothing to exchange. Parameters carry global names (`layers.3.attn.out`), the same under every layout.

T = B * S tokens   D model dim   V vocabulary   R rows after dispatch
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..conf.schema import ModelConfig
from ..kernels.grouped import row_alignment
from ..kernels.ops import Ops
from ..kernels.weight_grad import WeightGradStore, fold_into_main_grad
from ..parallel.dispatch import Combine, Dispatch, Dispatcher, Routing, make_dispatcher
from ..parallel.phases import ComputePhase, EmptyPhase, MicroBatch
from .attention import Attention
from .moe import MLP, Balance, Experts, Router, RouterStats
from .rope import rotations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Block(nn.Module):
    """One decoder block. `ep_rank` of `ep` holds an equal, contiguous share of the routed experts."""

    def __init__(self, m: ModelConfig, layer: int, *, ep: int, balance: Balance, dtype: torch.dtype):
        super().__init__()
        self.m, self.is_moe = m, layer >= m.num_dense_layers
        self.attn_norm, self.mlp_norm = (nn.Parameter(torch.empty(m.dim, dtype=dtype)) for _ in range(2))
        self.attn = Attention(m, dtype)
        if self.is_moe:
            self.router = Router(m, balance, dtype)
            self.experts = Experts(m.num_experts // ep, m.dim, m.expert_hidden_dim, dtype)
            if m.num_shared_experts:
                self.shared = MLP(m.dim, m.shared_hidden_dim, dtype)
        else:
            self.mlp = MLP(m.dim, m.dense_hidden_dim, dtype)

    def attend(self, x_TD: Tensor, turns_SP: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """-> residual stream h, and its norm u, the feed-forward's input."""
        h_TD = x_TD + self.attn(ops.rms_norm(x_TD, self.attn_norm, self.m.norm_eps), turns_SP, ops)
        return h_TD, ops.rms_norm(h_TD, self.mlp_norm, self.m.norm_eps)


class Stage(nn.Module):
    """Blocks `layers` of the model, with the embedding before them on the first stage and the head after them on the last."""

    def __init__(
        self,
        m: ModelConfig,
        *,
        layers: range,
        is_first: bool,
        is_last: bool,
        ep: int,
        balance: Balance,
        dtype: torch.dtype,
        dispatcher: Dispatcher,
        ops: Ops,
        shared_embed: nn.Parameter | None = None,
    ):
        """Parameters are allocated on the current default device (build under `torch.device("meta")`, then `materialise`).

        `shared_embed`: the embedding of a first stage on the same rank, for a tied head.
        """
        super().__init__()
        self.m, self.dtype, self.dispatcher, self.ops, self.balance = m, dtype, dispatcher, ops, balance
        self.is_first, self.is_last = is_first, is_last
        if is_first or (is_last and m.tie_embeddings):
            self.embed = shared_embed if shared_embed is not None else nn.Parameter(torch.empty(m.vocab_size, m.dim, dtype=dtype))
        self.layers = nn.ModuleDict({str(i): Block(m, i, ep=ep, balance=balance, dtype=dtype) for i in layers})
        if is_last:
            self.norm = nn.Parameter(torch.empty(m.dim, dtype=dtype))
            if not m.tie_embeddings:
                self.head = nn.Parameter(torch.empty(m.vocab_size, m.dim, dtype=dtype))
        self.stats: dict[int, RouterStats] = {}
        self._turns: Tensor | None = None
        self.phases = self._make_phases()

    def prepare(self) -> None:
        """Once parameters are real and have a `main_grad`: hooks for the gradients that autograd itself makes."""
        for param in self.parameters():
            if param.dim() == 1:
                param.register_post_accumulate_grad_hook(fold_into_main_grad)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, V) in the weights' dtype. Last stage only."""
        return self.ops.linear(self.ops.rms_norm(x_TD, self.norm, self.m.norm_eps), self.head_weight)

    @property
    def store(self) -> WeightGradStore:
        return self.ops.store

    @property
    def head_weight(self) -> nn.Parameter:
        return self.embed if self.m.tie_embeddings else self.head

    def _make_phases(self) -> list:
        phases = [ComputePhase("embed", self._embed)] if self.is_first else []
        for layer, block in self.layers.items():
            if block.is_moe:
                self.stats[int(layer)] = stats = RouterStats(load_E=torch.zeros(self.m.num_experts, dtype=torch.int64, device="cpu"))
                phases += [
                    ComputePhase("attention", self._attend_and_route(block)),
                    Dispatch(self.dispatcher, stats.observe),
                    ComputePhase("experts", self._experts(block)),
                    Combine(self.dispatcher),
                ]
            else:
                phases += [
                    ComputePhase("attention", self._attend(block)),
                    EmptyPhase("dispatch"),
                    ComputePhase("mlp", self._mlp(block)),
                    EmptyPhase("combine"),
                ]
        return [*phases, ComputePhase("head", self._loss)] if self.is_last else phases

    def _embed(self, batch: MicroBatch, tokens_BS: Tensor) -> tuple[Tensor]:
        return (self.ops.embedding(tokens_BS.flatten(), self.embed),)

    def _attend(self, block: Block):
        return lambda batch, x_TD: block.attend(x_TD, self.turns(batch), self.ops)

    def _attend_and_route(self, block: Block):
        def compute(batch: MicroBatch, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Routing]:
            h_TD, u_TD = block.attend(x_TD, self.turns(batch), self.ops)
            weight_TK, expert_TK, losses = block.router(u_TD, batch.tokens_BS.shape[1], self.ops)
            routing = self.dispatcher.route(expert_TK)
            routing.losses = losses
            return h_TD, u_TD, weight_TK, routing

        return compute

    def _experts(self, block: Block):
        def compute(batch: MicroBatch, h_TD, u_TD, rows_RD, weight_R, r) -> tuple[Tensor, Tensor, Routing]:
            y_TD = h_TD + block.shared(u_TD, self.ops) if self.m.num_shared_experts else h_TD
            return y_TD, block.experts(rows_RD, weight_R, r.groups, self.ops), r

        return compute

    def _mlp(self, block: Block):
        return lambda batch, h_TD, u_TD: (h_TD + block.mlp(u_TD, self.ops),)

    def _loss(self, batch: MicroBatch, x_TD: Tensor) -> tuple[Tensor]:
        """Summed token loss times `balance.token_weight`: gradients of a healthy size, whatever the global batch."""
        unit_TD = self.ops.rms_norm(x_TD, self.norm, self.m.norm_eps)
        return (self.ops.cross_entropy(unit_TD, self.head_weight, batch.targets_BS.flatten(), self.balance.token_weight),)

    def turns(self, batch: MicroBatch) -> Tensor:
        seq_len, device = batch.tokens_BS.shape[1], batch.tokens_BS.device
        if self._turns is None or len(self._turns) < seq_len or self._turns.device != device:
            self._turns = rotations(self.m, seq_len, self.dtype, device)
        return self._turns[:seq_len]


# ---------------------------------------------------------------- weights


def materialise(stage: Stage, *, seed: int, ep_rank: int = 0, device: torch.device | str = "cpu") -> None:
    """Give a stage built on meta its initial weights: normal with `init_std`, norms 1, biases 0.

    Each matrix (each expert's on its own) has a generator seeded by its global name, on the CPU, so that the weights of a seed are the
    same under every layout and on every device.
    """
    for name, param in stage.named_parameters():
        if param.is_meta:
            weight = initial_weight(name, param, stage.m, seed=seed, ep_rank=ep_rank).to(device)
            torch.utils.swap_tensors(param, nn.Parameter(weight))  # in place: a tied embedding stays one parameter
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.zeros_like(buffer, device=device))


def initial_weight(name: str, like: Tensor, m: ModelConfig, *, seed: int, ep_rank: int = 0) -> Tensor:
    """The weight called `name` (global name) in the shape and dtype of `like`; experts: the slab of `ep_rank`."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    if like.dim() == 3:
        first = ep_rank * len(like)
        return torch.stack([_normal(f"{name}.{first + e}", like.shape[1:], m.init_std, seed) for e in range(len(like))]).to(like.dtype)
    return _normal(name, like.shape, m.init_std, seed).to(like.dtype)


def _normal(name: str, shape, std: float, seed: int) -> Tensor:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key))


def is_expert(name: str) -> bool:
    return ".experts." in name


# ---------------------------------------------------------------- the whole model in one process


class CausalLM(nn.Module):
    """All stages in one, every expert local: evaluation, export, interop. Called with tokens (B, S) it returns logits (B, S, V)."""

    def __init__(self, m: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.m = m
        self.stage = Stage(
            m,
            layers=range(m.num_layers),
            is_first=True,
            is_last=True,
            ep=1,
            balance=Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0),
            dtype=dtype,
            dispatcher=make_dispatcher("local", num_experts=m.num_experts, align=row_alignment(dtype), groups=None),
            ops=Ops(),
        )

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor) -> Tensor:
        if tokens_BS.dim() != 2 or tokens_BS.shape[1] > self.m.max_seq_len:
            raise ValueError(f"tokens of shape {tuple(tokens_BS.shape)}: want (batch, length up to max_seq_len = {self.m.max_seq_len})")
        batch, values = MicroBatch(tokens_BS=tokens_BS, targets_BS=tokens_BS, counted=False), (tokens_BS,)
        for phase in self.stage.phases[:-1]:
            out = phase.forward(None, batch, *values)
            values = out if isinstance(phase, ComputePhase) else out.wait()
        return self.stage.logits(values[0]).view(*tokens_BS.shape, -1)


def named_weights(stages: dict[int, Stage]) -> Iterator[tuple[int, str, nn.Parameter]]:
    """(stage, global name, parameter), each parameter once, in an order that is the same on all ranks that hold the same stages."""
    seen = set()
    for index in sorted(stages):
        for name, param in stages[index].named_parameters():
            if id(param) not in seen:
                seen.add(id(param))
                yield index, name, param
