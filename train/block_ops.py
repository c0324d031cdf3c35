"""What a block, the embedding and the head call for one micro-batch on one rank, kernel by kernel, with bytes and FLOPs: what a plan times.

Pure functions of the configuration, made of the `*_bytes` of `kernels/`. Every tensor of a call is counted as read or written once.
Weights' casts, once a step, are not here.

T tokens   R rows of this rank's experts   D model dim   E experts   e experts of this rank   K top-k   V vocabulary
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..conf.schema import ModelConfig
from ..kernels.e5m6 import e5m6_bytes
from ..kernels.grouped import row_alignment
from ..kernels.permute import permute_bytes, sum_copies_bytes
from ..kernels.quantise import blocks_bytes, rows_bytes
from ..kernels.rms_norm import rms_norm_backward_bytes, rms_norm_bytes, rms_norm_quantised_bytes
from ..kernels.router import route_backward_bytes, route_bytes
from ..kernels.row_maps import row_maps_bytes, rows_bound
from ..kernels.swiglu import swiglu_backward_bytes, swiglu_bytes, swiglu_quantised_bytes
from . import cost

PLAIN = ("elementwise", "attention", "attention_backward", "gate", "add_gate", "plain_matmul", "add_plain", "lookup")  # not of `kernels/`
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class Call(NamedTuple):
    """Of one kernel: the operator's name, without `fp8_` before it, so that precisions can be compared. `permute` of codes is that of
    their scales, too."""

    phase: str  # attention | experts (a dense block's feed-forward; and what ranks do for exchanges) | embed | head | predict
    when: str  # F, B, or W: weight gradients
    kernel: str
    bytes: int
    flops: int = 0  # of matrix products and of attention
    rows: int = 0  # of products: (rows, inner) x (inner, outer), `matrices` of them with the rows shared out
    inner: int = 0  # of attention: the sequence's length
    outer: int = 0
    matrices: int = 1
    again: bool = False  # recomputed


@dataclass(kw_only=True)
class Total:
    """Of one kernel, in all."""

    count: int = 0
    bytes: int = 0
    flops: int = 0


def totals(calls: Sequence[Call]) -> dict[str, Total]:
    """By kernel, of those in `kernels/`."""
    found: dict[str, Total] = defaultdict(Total)
    for call in calls:
        if call.kernel not in PLAIN:
            total = found[call.kernel]
            total.count, total.bytes, total.flops = total.count + 1, total.bytes + call.bytes, total.flops + call.flops
    return found


def block_calls(
    model: ModelConfig, layer: int, *, tokens: int, seq_len: int, fp8: bool, width: int = 2, ep: int = 1, recompute: Collection[str] = (),
    sent: float = 0.0, rows: float | None = None,
) -> list[Call]:  # fmt: skip
    """Of block `layer`, with activations of `width` bytes or, with `fp8`, DeepSeek-V3's recipe in BF16.

    `rows`: of this rank's experts' buffer, those that products are made of (padding is, what is after the last expert is not); None: as
    many as even routing makes. `sent`: rows that the rank gathers to send, of each exchange to experts, and gets back; 0: whoever sends
    gathers them, or nobody does.
    """
    block = _Block(
        m=model, tokens=tokens, seq_len=seq_len, fp8=fp8, width=width, ep=ep, sent=sent, rows=rows, recompute=frozenset(recompute)
    )
    return block.run(routed=cost.block_params(model, layer).router > 0)


def end_calls(model: ModelConfig, *, tokens: int, width: int = 2, embed: bool = False, head: bool = False) -> list[Call]:
    """Of the embedding, of the head, and of each prediction module's own entry and head (its block is a block)."""
    ends = _Ends(m=model, tokens=tokens, width=width)
    if embed:
        ends.embed("embed")
    if head:
        ends.head("head")
        for _ in range(model.mtp_depth):
            ends.predict()
    return ends.calls


@dataclass(frozen=True, kw_only=True)
class _Ends:
    m: ModelConfig
    tokens: int
    width: int
    calls: list[Call] = field(default_factory=list)

    def embed(self, phase: str) -> None:
        row_bytes = self.tokens * self.m.dim * self.width
        self.calls.append(Call(phase, "F", "lookup", 2 * row_bytes))
        self.calls.append(Call(phase, "W", "lookup", row_bytes + 2 * 4 * self.tokens * self.m.dim))

    def head(self, phase: str) -> None:
        """Logits, their loss and its gradient; the gradient stays until backward."""
        T, D, V = self.tokens, self.m.dim, self.m.vocab_size
        self.norm(phase)
        self.product(phase, D, V)
        self.calls.append(Call(phase, "F", "elementwise", 3 * T * V * self.width))

    def predict(self) -> None:
        self.embed("predict")
        for _ in range(2):
            self.norm("predict")
        self.product("predict", 2 * self.m.dim, self.m.dim)
        self.head("predict")

    def norm(self, phase: str) -> None:
        wider = self.width / 2
        self.calls.append(Call(phase, "F", "rms_norm", int(wider * rms_norm_bytes(self.tokens, self.m.dim))))
        self.calls.append(Call(phase, "B", "rms_norm_backward", int(wider * rms_norm_backward_bytes(self.tokens, self.m.dim))))

    def product(self, phase: str, inner: int, outer: int) -> None:
        T, w, flops = self.tokens, self.width, 2 * self.tokens * inner * outer
        moved = w * (T * inner + inner * outer + T * outer)
        self.calls.append(Call(phase, "F", "plain_matmul", moved, flops, T, inner, outer))
        self.calls.append(Call(phase, "B", "plain_matmul", moved, flops, T, outer, inner))
        self.calls.append(Call(phase, "W", "add_plain", w * T * (inner + outer) + 8 * inner * outer, flops, outer, T, inner))


@dataclass(kw_only=True)
class _Block:
    m: ModelConfig
    tokens: int
    seq_len: int
    fp8: bool
    width: int
    ep: int
    sent: float
    rows: float | None
    recompute: frozenset[str]
    calls: list[Call] = field(default_factory=list)
    phase: str = "attention"  # that calls are of now

    def run(self, *, routed: bool) -> list[Call]:
        m = self.m
        self._attention()
        self._norm(m.dim)  # read by more than one: in BF16
        if routed:
            self._gate()
        if "attention" in self.recompute:
            self._all_again()
        self.phase = "experts"
        if routed and m.num_shared_experts:
            self._mlp(m.shared_hidden_dim)
        if routed:
            self._experts()
        else:
            self._mlp(m.dense_hidden_dim)
        self._both("elementwise", 3 * self.width * self.tokens * m.dim)  # into the residual stream
        if "experts" in self.recompute:
            self._all_again()
        return self.calls

    def _attention(self) -> None:
        m, T, w = self.m, self.tokens, self.width
        queries, heads = m.num_heads * m.qk_head_dim, m.num_heads * m.v_head_dim
        self._norm_linear(m.dim, (m.q_lora_rank or queries) + m.kv_lora_rank + m.qk_rope_head_dim)
        before = len(self.calls)
        if m.q_lora_rank:
            self._norm_linear(m.q_lora_rank, queries)
        self._norm_linear(m.kv_lora_rank, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim))
        self._both("elementwise", 2 * w * T * m.num_heads * (2 * m.qk_head_dim + m.qk_rope_head_dim))  # rotations; heads' parts together
        if "mla_up" in self.recompute:
            self._again(self.calls[before:])
        flops = int(T * cost.attention_flops(m, self.seq_len))
        moved = w * T * (2 * queries + 2 * heads)
        self._forward("attention", moved, flops, T, self.seq_len)
        # Five products for forward's two: scores again, and the gradients of probabilities, values, queries and keys.
        flops = flops * (3 * m.qk_head_dim + 2 * m.v_head_dim) // (m.qk_head_dim + m.v_head_dim)
        self._backward("attention_backward", 2 * moved, flops, T, self.seq_len)
        if self.fp8:
            narrowed = 2 * T * heads + e5m6_bytes(T, heads)
            self._forward("pack_e5m6", narrowed)
            self._backward("unpack_e5m6", narrowed)  # for attention's own backward
            self._backward("unpack_e5m6", narrowed)  # for the projection's
        self._cast_again(T, heads)
        self._linear(T, heads, m.dim)
        self._both("elementwise", 3 * w * T * m.dim)

    def _gate(self) -> None:
        """In FP32, of a wide copy of the tokens."""
        m, T = self.m, self.tokens
        flops, moved = 2 * T * m.dim * m.num_experts, (self.width + 8) * T * m.dim
        self._forward("gate", moved, flops, T, m.dim, m.num_experts)
        self._forward("route", route_bytes(T, m.num_experts, m.top_k))
        self._backward("route_backward", route_backward_bytes(T, m.num_experts, m.top_k))
        self._backward("gate", moved, flops, T, m.num_experts, m.dim)
        self._weights("add_gate", moved, flops, m.num_experts, T, m.dim)

    def _mlp(self, hidden: int) -> None:
        T, D = self.tokens, self.m.dim
        self._cast_again(T, D)
        self._linear(T, D, 2 * hidden)
        self._swiglu(T, hidden, weighted=False)
        self._linear(T, hidden, D)

    def _experts(self) -> None:
        m, T, D, E = self.m, self.tokens, self.m.dim, self.m.num_experts // self.ep
        align = row_alignment(DTYPES[self.width], fp8=self.fp8)
        R = rows_bound(T * m.top_k, E, align) if self.ep == 1 else self._rows(align)
        narrow = 1 if self.fp8 else self.width
        self._forward("row_maps", row_maps_bytes(T * m.top_k, E, align))
        for call in (self._forward, self._backward):  # to experts, and back; gradients likewise
            if self.fp8:
                call("quantise_rows", 2 * T * D + rows_bytes(T, D))
            if self.sent:
                call("permute", permute_bytes(int(self.sent), D, narrow))
                call("permute", permute_bytes(int(self.sent), D, self.width))
            call("permute", permute_bytes(R, D, narrow))
            call("sum_copies", sum_copies_bytes(T, m.top_k, D, self.width))
        self._forward("permute", permute_bytes(R, 1, 4))  # the weights
        self._experts_linear(R, D, 2 * m.expert_hidden_dim)
        self._swiglu(R, m.expert_hidden_dim, weighted=True)
        self._experts_linear(R, m.expert_hidden_dim, D, grad_in_fp8=True)

    def _rows(self, align: int) -> int:
        """Of products: each expert's rows up to whole tiles."""
        E = self.m.num_experts // self.ep
        even = self.tokens * self.m.top_k if self.rows is None else self.rows
        return E * -(-int(even) // (E * align)) * align

    def _norm(self, dim: int) -> None:
        wider = self.width / 2
        self._forward("rms_norm", int(wider * rms_norm_bytes(self.tokens, dim)))
        if "norm" in self.recompute:
            self._again(self.calls[-1:])
        self._backward("rms_norm_backward", int(wider * rms_norm_backward_bytes(self.tokens, dim)))

    def _norm_linear(self, inner: int, outer: int) -> None:
        if self.fp8:
            self._forward("rms_norm_quantised", rms_norm_quantised_bytes(self.tokens, inner))
            if "norm" in self.recompute:
                self._again(self.calls[-1:])
            self._backward("rms_norm_backward", rms_norm_backward_bytes(self.tokens, inner))
        else:
            self._norm(inner)
        self._linear(self.tokens, inner, outer)

    def _swiglu(self, rows: int, hidden: int, *, weighted: bool) -> None:
        if self.fp8:
            self._forward("quantise_rows", 4 * rows * hidden + rows_bytes(rows, 2 * hidden))
            self._forward("swiglu_quantised", swiglu_quantised_bytes(rows, hidden, from_fp8=False, weighted=weighted))
            self._backward("swiglu_quantised", swiglu_quantised_bytes(rows, hidden, from_fp8=True, weighted=weighted))
            self._backward("swiglu_backward", swiglu_backward_bytes(rows, hidden, from_fp8=True, weighted=weighted))
            return
        wider = self.width / 2
        self._forward("swiglu", int(wider * swiglu_bytes(rows, hidden, weighted=weighted)))
        if "swiglu" in self.recompute:
            self._again(self.calls[-1:])
        self._backward("swiglu_backward", int(wider * swiglu_backward_bytes(rows, hidden, from_fp8=False, weighted=weighted)))

    def _cast_again(self, rows: int, inner: int) -> None:
        """A linear's input that somebody else keeps in BF16: cast in forward, and once more in backward."""
        if self.fp8:
            for call in (self._forward, self._backward):
                call("quantise_rows", 2 * rows * inner + rows_bytes(rows, inner))

    def _linear(self, rows: int, inner: int, outer: int) -> None:
        self._products("matmul", "add_outer", rows, inner, outer)
        self._casts(rows, inner, outer)

    def _experts_linear(self, rows: int, inner: int, outer: int, *, grad_in_fp8: bool = False) -> None:
        E, align = self.m.num_experts // self.ep, row_alignment(DTYPES[self.width], fp8=self.fp8)
        used = int(self.rows) if self.ep == 1 and self.rows is not None else self._rows(align)
        self._products("grouped_matmul", "add_grouped_outer", used, inner, outer, E)
        self._casts(rows, inner, outer, grad_in_fp8=grad_in_fp8)

    def _products(self, matmul: str, add_outer: str, rows: int, inner: int, outer: int, matrices: int = 1) -> None:
        flops = 2 * rows * inner * outer
        read = rows_bytes if self.fp8 else lambda rows, columns: self.width * rows * columns
        matrix = blocks_bytes if self.fp8 else lambda rows, columns: self.width * rows * columns
        written = self.width * rows
        self._forward(matmul, read(rows, inner) + matrices * matrix(outer, inner) + written * outer, flops, rows, inner, outer, matrices)
        self._backward(matmul, read(rows, outer) + matrices * matrix(inner, outer) + written * inner, flops, rows, outer, inner, matrices)
        moved = read(outer, rows) + read(inner, rows) + 8 * matrices * outer * inner
        self._weights(add_outer, moved, flops, outer, rows, inner, matrices)

    def _casts(self, rows: int, inner: int, outer: int, *, grad_in_fp8: bool = False) -> None:
        """Of the gradient for both products of backward, and of both factors' columns for the weight's."""
        if not self.fp8:
            return
        if grad_in_fp8:
            self._backward("quantise_columns", rows_bytes(rows, outer) + rows_bytes(outer, rows))
        else:
            self._backward("quantise_rows", 2 * rows * outer + rows_bytes(rows, outer))
            self._backward("quantise_columns", 2 * rows * outer + rows_bytes(outer, rows))
        self._backward("quantise_columns", rows_bytes(rows, inner) + rows_bytes(inner, rows))

    # ------------------------------------------------------------ recomputed

    def _again(self, calls: Sequence[Call]) -> None:
        self.calls.extend(call._replace(when="B", again=True) for call in calls if call.when == "F")

    def _all_again(self) -> None:
        """The whole phase. What of it is recomputed alone is so once more: the phase's backward, made again, keeps as little."""
        self._again([call for call in self.calls if call.phase == self.phase and not call.again])

    def _both(self, name: str, num_bytes: int) -> None:
        self._forward(name, num_bytes)
        self._backward(name, num_bytes)

    def _forward(self, name: str, num_bytes: int, *product: int) -> None:
        self.calls.append(Call(self.phase, "F", name, num_bytes, *product))

    def _backward(self, name: str, num_bytes: int, *product: int) -> None:
        self.calls.append(Call(self.phase, "B", name, num_bytes, *product))

    def _weights(self, name: str, num_bytes: int, *product: int) -> None:
        self.calls.append(Call(self.phase, "W", name, num_bytes, *product))
