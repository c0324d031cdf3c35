"""The DeepSeek-V3-shaped decoder, cut into pipeline stages, each a list of phases for the executor.

A block is four phases: attention (which ends with the router's choice), dispatch, experts, combine. A dense block has the same four,
with nothing to exchange. The head is a phase too; after it come the modules of multi-token prediction (DeepSeek-V3 §2.2), each a block
between two more phases. Parameters carry global names (`layers.3.attn.out`), the same under every layout.

T = B * S tokens   D model dim   V vocabulary   R rows after dispatch   L losses: the next token's, then each prediction module's
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...conf.schema import ModelConfig
from ...kernels.grouped import row_alignment
from ...kernels.ops import Ops
from ...kernels.weight_grad import WeightGradStore, fold_into_main_grad
from ...parallel.dispatch import Combine, Dispatch, Dispatcher, make_dispatcher
from ...parallel.phases import ComputePhase, EmptyPhase, MicroBatch
from .attention import Attention
from .moe import MLP, Balance, Experts, Router, RouterStats
from .rope import rotations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Block(nn.Module):
    """One decoder block. `ep_rank` of `ep` holds an equal, contiguous share of the routed experts."""

    def __init__(self, m: ModelConfig, layer: int, *, ep: int, balance: Balance, dtype: torch.dtype):
        super().__init__()
        self.m, self.is_moe = m, m.num_moe_layers > 0 and layer >= m.num_dense_layers
        self.attn_norm, self.mlp_norm = (nn.Parameter(torch.empty(m.dim, dtype=dtype)) for _ in range(2))
        self.attn = Attention(m, dtype)
        if self.is_moe:
            self.router = Router(m, balance, dtype)
            self.experts = Experts(m.num_experts // ep, m.dim, m.expert_hidden_dim, dtype)
            self.shared = MLP(m.dim, m.shared_hidden_dim, dtype) if m.num_shared_experts else None
        else:
            self.mlp = MLP(m.dim, m.dense_hidden_dim, dtype)

    def attend(self, x_TD: Tensor, turns_SP: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """-> residual stream h, and its norm u, the feed-forward's input."""
        h_TD = x_TD + self.attn(x_TD, self.attn_norm, turns_SP, ops)
        return h_TD, self.unit(h_TD, ops)

    def unit(self, h_TD: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(h_TD, self.mlp_norm, self.m.norm_eps)

    def feed_forward(self, h_TD: Tensor, u_TD: Tensor, mlp: MLP | None, ops: Ops) -> Tensor:
        """h + mlp(u). Under recompute "norm" nobody keeps u = norm(h): this is the last to read it."""
        again = ops.again("norm", lambda: self.unit(h_TD.detach(), ops)) or u_TD.detach
        y_TD = h_TD + mlp(u_TD, ops, again=again) if mlp else h_TD
        ops.discard("norm", u_TD)
        return y_TD


class PredictionBlock(Block):
    """Module k of multi-token prediction, block `num_layers + k`: sees what the head before it read, and the token that was to be told.

    Embedding and output head are the model's. `merge` has the embedding's half first, as released.
    """

    def __init__(self, m: ModelConfig, layer: int, *, ep: int, balance: Balance, dtype: torch.dtype):
        super().__init__(m, layer, ep=ep, balance=balance, dtype=dtype)
        self.depth = layer - m.num_layers + 1  # tokens further ahead than the main head's
        self.embed_norm, self.hidden_norm, self.head_norm = (nn.Parameter(torch.empty(m.dim, dtype=dtype)) for _ in range(3))
        self.merge = nn.Parameter(torch.empty(m.dim, 2 * m.dim, dtype=dtype))

    def enter(self, unit_TD: Tensor, known_TD: Tensor, ops: Ops) -> Tensor:
        """The head's input and the next token's embedding, each normed, into the block's input."""
        known, seen = ops.rms_norm(known_TD, self.embed_norm, self.m.norm_eps), ops.rms_norm(unit_TD, self.hidden_norm, self.m.norm_eps)
        return ops.plain_linear(torch.cat([known, seen], 1), self.merge)  # the released FP8 weights leave it out, too


class Stage(nn.Module):
    """Blocks `layers` of the model, with the embedding before them on the first stage and the head after them on the last.

    The last stage also has the modules of multi-token prediction, and then a copy of the embedding.
    """

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
        slot_of: Mapping[int, Tensor] | None = None,
    ):
        """Parameters are allocated on the current default device (build under `torch.device("meta")`, then `materialise`).

        `shared_embed`: the embedding of a first stage on the same rank, for a last stage that needs it.
        `slot_of`: where the experts of each layer are (`Placement.slot_of`), looked up in each forward.
        """
        super().__init__()
        self.m, self.dtype, self.dispatcher, self.ops, self.balance = m, dtype, dispatcher, ops, balance
        self.is_first, self.is_last = is_first, is_last
        self.slot_of = {} if slot_of is None else slot_of
        if is_first or (is_last and m.embeds_at_head):
            self.embed = shared_embed if shared_embed is not None else nn.Parameter(torch.empty(m.vocab_size, m.dim, dtype=dtype))
        kind = lambda i: Block if i < m.num_layers else PredictionBlock
        self.layers = nn.ModuleDict({str(i): kind(i)(m, i, ep=ep, balance=balance, dtype=dtype) for i in layers})
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
        return self.ops.plain_linear(self.ops.rms_norm(x_TD, self.norm, self.m.norm_eps), self.head_weight)

    @property
    def store(self) -> WeightGradStore:
        return self.ops.store

    @property
    def head_weight(self) -> nn.Parameter:
        return self.embed if self.m.tie_embeddings else self.head

    def _make_phases(self) -> list:
        phases = [ComputePhase("embed", self._embed)] if self.is_first else []
        for layer, block in self.layers.items():
            if int(layer) < self.m.num_layers:
                phases += self._block(int(layer), block)
        self.num_trunk_phases = len(phases)
        if self.is_last:
            phases.append(ComputePhase("head", self._head))
            for block in (b for b in self.layers.values() if isinstance(b, PredictionBlock)):
                phases += [
                    ComputePhase("predict", self._enter(block)),
                    *self._block(self.m.num_layers + block.depth - 1, block),
                    ComputePhase("head", self._prediction_head(block)),
                ]
            phases.append(ComputePhase("losses", lambda batch, unit_TD, loss_L: (loss_L,)))
        return phases

    def _block(self, layer: int, block: Block) -> list:
        attention, experts = (name in self.ops.recompute for name in ("attention", "experts"))
        if not block.is_moe:
            return [
                ComputePhase("attention", self._attend(block), recompute=attention),
                EmptyPhase("dispatch"),
                ComputePhase("mlp", self._mlp(block), recompute=experts),
                EmptyPhase("combine"),
            ]
        self.stats[layer] = stats = RouterStats(load_E=torch.zeros((), dtype=torch.int64, device="cpu"))
        start = lambda h_TD, u_TD, weight_TK, r, *carried: self.dispatcher.start(r, self.slot_of.get(layer))
        return [
            ComputePhase("attention", self._attend_and_route(layer, block), recompute=attention, after=start),
            Dispatch(self.dispatcher, stats.observe),
            ComputePhase("experts", self._experts(block), recompute=experts),
            Combine(self.dispatcher),
        ]

    def _embed(self, batch: MicroBatch, tokens_BS: Tensor) -> tuple[Tensor]:
        return (self.ops.embedding(tokens_BS.flatten(), self.embed),)

    def _attend(self, block: Block):
        return lambda batch, x_TD, *carried: (*block.attend(x_TD, self.turns(batch), self.ops), *carried)

    def _attend_and_route(self, layer: int, block: Block):
        def compute(batch: MicroBatch, x_TD: Tensor, *carried: Tensor) -> tuple:
            h_TD, u_TD = block.attend(x_TD, self.turns(batch), self.ops)
            again = (lambda: block.unit(h_TD.detach(), self.ops)) if "norm" in self.ops.recompute else None
            select = partial(batch.choose, layer, block.router.select) if batch.choose else None
            return h_TD, u_TD, *block.router(u_TD, batch.tokens_BS.shape[1], self.ops, again=again, select=select), *carried

        return compute

    def _experts(self, block: Block):
        def compute(batch: MicroBatch, h_TD, u_TD, rows_RD, weight_R, r, *carried) -> tuple:
            y_TD = block.feed_forward(h_TD, u_TD, block.shared, self.ops)
            return y_TD, block.experts(rows_RD, weight_R, r.groups, self.ops), r, *carried

        return compute

    def _mlp(self, block: Block):
        return lambda batch, h_TD, u_TD, *carried: (block.feed_forward(h_TD, u_TD, block.mlp, self.ops), *carried)

    def _head(self, batch: MicroBatch, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """-> what the head reads (T, D), and its loss (1,)."""
        unit_TD = self.ops.rms_norm(x_TD, self.norm, self.m.norm_eps)
        return unit_TD, self._loss(unit_TD, batch.ahead(1))

    def _enter(self, block: PredictionBlock):
        def compute(batch: MicroBatch, unit_TD: Tensor, loss_L: Tensor) -> tuple[Tensor, Tensor]:
            known_TD = self.ops.embedding(batch.ahead(block.depth).clamp(min=0).flatten(), self.embed)  # IGNORED is no token
            return block.enter(unit_TD, known_TD, self.ops), loss_L

        return compute

    def _prediction_head(self, block: PredictionBlock):
        def compute(batch: MicroBatch, x_TD: Tensor, loss_L: Tensor) -> tuple[Tensor, Tensor]:
            unit_TD = self.ops.rms_norm(x_TD, block.head_norm, self.m.norm_eps)
            return unit_TD, torch.cat([loss_L, self._loss(unit_TD, batch.ahead(1 + block.depth))])

        return compute

    def _loss(self, unit_TD: Tensor, target_BS: Tensor) -> Tensor:
        """(1,): summed token loss times `balance.token_weight`: gradients of a healthy size, whatever the global batch."""
        return self.ops.cross_entropy(unit_TD, self.head_weight, target_BS.flatten(), self.balance.token_weight)[None]

    def turns(self, batch: MicroBatch) -> Tensor:
        seq_len, device = batch.tokens_BS.shape[1], batch.tokens_BS.device
        if self._turns is None or len(self._turns) < seq_len or self._turns.device != device:
            self._turns = rotations(self.m, seq_len, self.dtype, device)
        return self._turns[:seq_len]


# ---------------------------------------------------------------- weights


def materialise(stage: Stage, *, seed: int, ep_rank: int = 0, device: torch.device | str = "cpu") -> None:
    """Give a stage built on meta its initial weights: normal with `init_std`, norms 1, biases 0.

    Each matrix (each expert's on its own) has a generator seeded by its global name, on the CPU, so that the weights of a seed are the
    same under every layout and on every device. On meta there are none: nothing is done.
    """
    if torch.device(device).type == "meta":
        return
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
            layers=range(m.num_blocks),
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
        batch, values = MicroBatch(tokens_BS=tokens_BS, targets_BN=tokens_BS, counted=False), (tokens_BS,)
        for phase in self.stage.phases[: self.stage.num_trunk_phases]:
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
