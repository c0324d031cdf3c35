"""Multi-head latent attention (DeepSeek-V2 §2.1): keys and values of all heads come from one small latent, position from a shared key.

T = B * S tokens   D model dim   H heads   Q = nope + rope query/key head dim   V value head dim   L latent ranks
"""

import torch
from torch import Tensor, nn

from ...conf.schema import ModelConfig
from ...kernels.attention import AttentionKernel, Heads, attention_kernel
from ...kernels.ops import Ops
from .rope import softmax_scale

LATENT_NORM_EPS = 1e-6  # of the norms on the latents, whatever the model's norm_eps: as released


def kernel_of(m: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """That computes attention in training, asked with one sequence's heads as `Attention` lays them out."""
    new = lambda width: torch.empty(1, seq_len, m.num_heads, width, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
    keys, up = new(m.qk_head_dim), new(m.qk_nope_head_dim + m.v_head_dim)
    return attention_kernel(keys, keys, up[..., m.qk_nope_head_dim :])


class Attention(nn.Module):
    """The three projections that read the block's input are one matrix, `qkv_a`: [q or its latent | kv latent | shared rotary key]."""

    def __init__(self, m: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.m, self.scale = m, softmax_scale(m)
        new = lambda *shape: nn.Parameter(torch.empty(*shape, dtype=dtype))
        q_width = m.num_heads * m.qk_head_dim
        self.qkv_a = new((m.q_lora_rank or q_width) + m.kv_lora_rank + m.qk_rope_head_dim, m.dim)
        if m.q_lora_rank:
            self.q_norm, self.q_b = new(m.q_lora_rank), new(q_width, m.q_lora_rank)
        self.kv_norm = new(m.kv_lora_rank)
        self.kv_b = new(m.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
        self.out = new(m.dim, m.num_heads * m.v_head_dim)

    def forward(self, x_TD: Tensor, norm_D: Tensor, turns_SP: Tensor, ops: Ops) -> Tensor:
        """(T, D) whole sequences of S = len(turns), normed here by `norm_D` -> (T, D)."""
        m = self.m
        parts = ops.norm_linear(x_TD, norm_D, m.norm_eps, self.qkv_a)
        parts = parts.split([m.q_lora_rank or self.q_width, m.kv_lora_rank, m.qk_rope_head_dim], 1)
        again = (lambda: self._heads(*(part.detach() for part in parts), turns_SP, ops)) if "mla_up" in ops.recompute else None
        rows_TO, kept = ops.attention(self._heads(*parts, turns_SP, ops), self.scale, again=again)
        return ops.linear(rows_TO, self.out, power_of_two=True, again=kept)

    def _heads(self, q: Tensor, kv: Tensor, k_rope: Tensor, turns_SP: Tensor, ops: Ops) -> Heads:
        """Queries, keys and values of all heads, (B, H, S, .), from the three parts of `qkv_a`'s output."""
        m, seq_len = self.m, len(turns_SP)
        if m.q_lora_rank:
            q = ops.norm_linear(q, self.q_norm, LATENT_NORM_EPS, self.q_b)
        kv = ops.norm_linear(kv, self.kv_norm, LATENT_NORM_EPS, self.kv_b)

        q_nope, q_rope = q.view(-1, seq_len, m.num_heads, m.qk_head_dim).split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
        k_nope, v = kv.view(-1, seq_len, m.num_heads, m.qk_nope_head_dim + m.v_head_dim).split([m.qk_nope_head_dim, m.v_head_dim], -1)
        k_rope = ops.rotate(k_rope.view(-1, seq_len, 1, m.qk_rope_head_dim), turns_SP).expand(-1, -1, m.num_heads, -1)
        q = torch.cat([q_nope, ops.rotate(q_rope, turns_SP)], -1).transpose(1, 2)
        k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)
        return q, k, v.transpose(1, 2)

    @property
    def q_width(self) -> int:
        return self.m.num_heads * self.m.qk_head_dim
