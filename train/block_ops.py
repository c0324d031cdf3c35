"""Which kernels one block calls for one micro-batch, and how many bytes and FLOPs that is: what a planner times, kernel by kernel.

Pure functions of the configuration, made of the `*_bytes` of `kernels/`. Every tensor of a call is counted as read or written once. Of
attention's core and the gate there is nothing here (`cost.py` has their FLOPs), nor of weights' casts, once a step.

T tokens   R rows that there is room for in the experts' buffers   D model dim   E experts
"""

from collections import defaultdict
from dataclasses import dataclass, field

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


@dataclass(kw_only=True)
class Calls:
    """Of one kernel, in all."""

    count: int = 0
    bytes: int = 0
    flops: int = 0  # of matrix products


@dataclass(frozen=True, kw_only=True)
class BlockOps:
    """By kernel: the operator's name, without `fp8_` before it, so that precisions can be compared. `permute` of codes is that of their
    scales, too."""

    forward: dict[str, Calls] = field(default_factory=lambda: defaultdict(Calls))
    backward: dict[str, Calls] = field(default_factory=lambda: defaultdict(Calls))


def block_ops(model: ModelConfig, layer: int, *, tokens: int, fp8: bool, rows: int | None = None) -> BlockOps:
    """Of block `layer` in BF16 or, with `fp8`, DeepSeek-V3's recipe, without recomputation, and with all experts on this rank.

    `rows`: of the buffer's, those that experts' products are made of (padding is, what is after the last expert is not); None: as many
    as even routing makes. A recomputed phase calls its forward's kernels once more.
    """
    block = _Block(m=model, tokens=tokens, fp8=fp8, rows=rows)
    return block.run(routed=cost.block_params(model, layer).router > 0)


@dataclass(frozen=True, kw_only=True)
class _Block:
    m: ModelConfig
    tokens: int
    fp8: bool
    rows: int | None
    ops: BlockOps = field(default_factory=BlockOps)

    def run(self, *, routed: bool) -> BlockOps:
        m = self.m
        self._attention()
        self._norm(m.dim)  # read by more than one: in BF16
        if not routed:
            self._mlp(m.dense_hidden_dim)
            return self.ops
        self._forward("route", route_bytes(self.tokens, m.num_experts, m.top_k))
        self._backward("route_backward", route_backward_bytes(self.tokens, m.num_experts, m.top_k))
        if m.num_shared_experts:
            self._mlp(m.shared_hidden_dim)
        self._experts()
        return self.ops

    def _attention(self) -> None:
        m, T = self.m, self.tokens
        queries, heads = m.num_heads * m.qk_head_dim, m.num_heads * m.v_head_dim
        self._norm_linear(m.dim, (m.q_lora_rank or queries) + m.kv_lora_rank + m.qk_rope_head_dim)
        if m.q_lora_rank:
            self._norm_linear(m.q_lora_rank, queries)
        self._norm_linear(m.kv_lora_rank, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim))
        if self.fp8:
            narrowed = 2 * T * heads + e5m6_bytes(T, heads)
            self._forward("pack_e5m6", narrowed)
            self._backward("unpack_e5m6", narrowed)  # for attention's own backward
            self._backward("unpack_e5m6", narrowed)  # for the projection's
        self._cast_again(T, heads)
        self._linear(T, heads, m.dim)

    def _mlp(self, hidden: int) -> None:
        T, D = self.tokens, self.m.dim
        self._cast_again(T, D)
        self._linear(T, D, 2 * hidden)
        self._swiglu(T, hidden, weighted=False)
        self._linear(T, hidden, D)

    def _experts(self) -> None:
        m, T, D, E = self.m, self.tokens, self.m.dim, self.m.num_experts
        align = row_alignment(torch.bfloat16, fp8=self.fp8)
        R = rows_bound(T * m.top_k, E, align)
        self._forward("row_maps", row_maps_bytes(T * m.top_k, E, align))
        for call in (self._forward, self._backward):  # to experts, and back; gradients likewise
            if self.fp8:
                call("quantise_rows", 2 * T * D + rows_bytes(T, D))
            call("permute", permute_bytes(R, D, 1 if self.fp8 else 2))
            call("sum_copies", sum_copies_bytes(T, m.top_k, D, 2))
        self._forward("permute", permute_bytes(R, 1, 4))  # the weights
        self._experts_linear(R, D, 2 * m.expert_hidden_dim)
        self._swiglu(R, m.expert_hidden_dim, weighted=True)
        self._experts_linear(R, m.expert_hidden_dim, D, grad_in_fp8=True)

    def _norm(self, dim: int) -> None:
        self._forward("rms_norm", rms_norm_bytes(self.tokens, dim))
        self._backward("rms_norm_backward", rms_norm_backward_bytes(self.tokens, dim))

    def _norm_linear(self, inner: int, outer: int) -> None:
        if self.fp8:
            self._forward("rms_norm_quantised", rms_norm_quantised_bytes(self.tokens, inner))
            self._backward("rms_norm_backward", rms_norm_backward_bytes(self.tokens, inner))
        else:
            self._norm(inner)
        self._linear(self.tokens, inner, outer)

    def _swiglu(self, rows: int, hidden: int, *, weighted: bool) -> None:
        if self.fp8:
            self._forward("quantise_rows", 4 * rows * hidden + rows_bytes(rows, 2 * hidden))
            self._forward("swiglu_quantised", swiglu_quantised_bytes(rows, hidden, from_fp8=False, weighted=weighted))
            self._backward("swiglu_quantised", swiglu_quantised_bytes(rows, hidden, from_fp8=True, weighted=weighted))
        else:
            self._forward("swiglu", swiglu_bytes(rows, hidden, weighted=weighted))
        self._backward("swiglu_backward", swiglu_backward_bytes(rows, hidden, from_fp8=self.fp8, weighted=weighted))

    def _cast_again(self, rows: int, inner: int) -> None:
        """A linear's input that somebody else keeps in BF16: cast in forward, and once more in backward."""
        if self.fp8:
            for call in (self._forward, self._backward):
                call("quantise_rows", 2 * rows * inner + rows_bytes(rows, inner))

    def _linear(self, rows: int, inner: int, outer: int) -> None:
        self._products("matmul", "add_outer", rows, inner, outer)
        self._casts(rows, inner, outer)

    def _experts_linear(self, rows: int, inner: int, outer: int, *, grad_in_fp8: bool = False) -> None:
        m, align = self.m, row_alignment(torch.bfloat16, fp8=self.fp8)
        even = m.num_experts * -(-self.tokens * m.top_k // (m.num_experts * align)) * align
        self._products("grouped_matmul", "add_grouped_outer", even if self.rows is None else self.rows, inner, outer, m.num_experts)
        self._casts(rows, inner, outer, grad_in_fp8=grad_in_fp8)

    def _products(self, matmul: str, add_outer: str, rows: int, inner: int, outer: int, matrices: int = 1) -> None:
        flops = 2 * rows * inner * outer
        read = rows_bytes if self.fp8 else lambda rows, columns: 2 * rows * columns
        matrix = blocks_bytes if self.fp8 else lambda rows, columns: 2 * rows * columns
        self._forward(matmul, read(rows, inner) + matrices * matrix(outer, inner) + 2 * rows * outer, flops)
        self._backward(matmul, read(rows, outer) + matrices * matrix(inner, outer) + 2 * rows * inner, flops)
        self._backward(add_outer, read(outer, rows) + read(inner, rows) + 8 * matrices * outer * inner, flops)

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

    def _forward(self, name: str, num_bytes: int, flops: int = 0) -> None:
        _add(self.ops.forward[name], num_bytes, flops)

    def _backward(self, name: str, num_bytes: int, flops: int = 0) -> None:
        _add(self.ops.backward[name], num_bytes, flops)


def _add(calls: Calls, num_bytes: int, flops: int) -> None:
    calls.count, calls.bytes, calls.flops = calls.count + 1, calls.bytes + num_bytes, calls.flops + flops
