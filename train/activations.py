"""What a block keeps of each token from forward until backward, and what each kind of recomputation saves and costs.

Pure functions of the configuration, like those in `cost.py`; tests hold them against what the allocator counts. Bytes are of the tensors
that this code keeps, at even routing: padding of rows to tiles, and the few integers per micro-batch, are not in them.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ..conf.schema import ModelConfig
from ..kernels.e5m6 import e5m6_bytes
from ..kernels.quantise import rows_bytes
from . import cost


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes per token of one block. `attention` and `experts` are the block's two compute phases, their inputs included."""

    attention: int
    experts: int  # or the dense feed-forward
    rows: int  # of `experts`, what grows with the load of this rank's experts

    @property
    def total(self) -> int:
        return self.attention + self.experts


def kept_bytes(
    model: ModelConfig, layer: int, *, width: int, fp8: bool = False, recompute: Collection[str] = (), padded_values: bool = False
) -> Kept:
    """Of block `layer`, with activations of `width` bytes. `fp8`: inputs of linears, or of SwiGLU before one, are kept in FP8, with an FP32
    scale for each 128, and attention's output in 12 bits.

    `padded_values`: as on CPU, where values, and with them a BF16 output, are widened to the keys' width.
    """
    m, wide, block = model, max(4, width), cost.block_params(model, layer)
    linear = lambda dim: rows_bytes(1, dim) if fp8 else dim * width
    value_dim = m.qk_head_dim if padded_values else m.v_head_dim
    mixed = e5m6_bytes(1, m.num_heads * m.v_head_dim) if fp8 else m.num_heads * value_dim * width
    attention = m.dim * width  # the block's input
    if "attention" not in recompute:
        norms = 0 if "norm" in recompute else linear(m.dim) + linear(m.q_lora_rank) + linear(m.kv_lora_rank)
        heads = 0 if "mla_up" in recompute else m.num_heads * (2 * m.qk_head_dim + value_dim)
        latents = (m.q_lora_rank or m.num_heads * m.qk_head_dim) + m.kv_lora_rank + m.qk_rope_head_dim
        attention += norms + (heads + latents) * width + mixed
        attention += (3 + bool(m.q_lora_rank) + m.num_heads) * wide  # of the norms their scales, of the softmax its sums
        if block.router:
            attention += (2 * m.num_experts + 2) * wide + m.top_k * 8  # logits and scores, a sum of each; chosen experts
    residual = m.dim * width
    unit = 0 if "norm" in recompute and "experts" not in recompute else m.dim * width
    rows = shared = 0
    activation = lambda hidden: linear(2 * hidden) + (0 if fp8 or "swiglu" in recompute else linear(hidden))
    per_row = lambda hidden: 0 if "experts" in recompute else activation(hidden)
    if block.router:
        routed = linear(m.dim)  # in FP8 as they were dispatched; else the phase's input is what the linear keeps
        rows = m.top_k * (routed + wide + per_row(m.expert_hidden_dim)) + 4 * m.top_k * 8  # and maps of rows; on one rank, two
        shared = per_row(m.shared_hidden_dim)
    else:
        shared = per_row(m.dense_hidden_dim)
    return Kept(attention=attention, experts=residual + unit + shared + rows, rows=rows)


def recompute_flops(model: ModelConfig, layer: int, seq_len: int, recompute: Collection[str]) -> float:
    """Forward FLOPs per token of block `layer` that backward does again. Norms and activations have no matrix products: 0."""
    m, block = model, cost.block_params(model, layer)
    feed_forward = block.dense_mlp + block.active_experts + block.shared
    up = m.q_lora_rank * m.num_heads * m.qk_head_dim + m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
    flops = 2.0 * feed_forward if "experts" in recompute else 0.0
    flops += 2.0 * up if "mla_up" in recompute else 0.0  # again inside a recomputed attention: its backward unpacks what it kept
    if "attention" in recompute:
        flops += 2.0 * (block.attention + block.router) + cost.attention_flops(m, seq_len)
    return flops
