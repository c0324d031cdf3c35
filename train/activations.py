"""What a block keeps of each token from forward until backward, and what each kind of recomputation saves and costs.

Pure functions of the configuration, like those in `cost.py`; tests hold them against what the allocator counts. Bytes are of the tensors
that this code keeps, at even routing, where rows pass an exchange: padding of rows to tiles is not in them. `moments.py` has the formulas.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ..conf.schema import ModelConfig
from . import cost
from .moments import Micro


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
    copies, routed = model.top_k, cost.block_params(model, layer).router > 0
    token = Micro(
        model=model, tokens=1, width=width, fp8=fp8, recompute=frozenset(recompute), padded_values=padded_values, ep=1, exchanged=True,
        across=None, rows=copies, received=copies, sent=copies, sent_on=copies, maps=5 * copies * 8,
    )  # fmt: skip
    attention, experts = token.attention(routed=routed), token.experts() if routed else token.mlp()
    return Kept(attention=round(attention.kept), experts=round(experts.kept), rows=round(experts.rows))


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
