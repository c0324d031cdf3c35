"""Causal attention whose query/key heads are wider than its value heads (MLA: 192 and 128).

B sequences   H heads   S positions   Q query/key head dim   V value head dim
"""

import contextlib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .recompute import recomputed

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values


def causal_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, *, again: Callable[[], Heads] | None = None) -> Tensor:
    """softmax(scale q k^T, causal) v -> (B, H, S, V). Differentiable. `again`: makes q, k and v for backward, which are then not kept.

    On CPU the values are padded to the keys' width: torch's fused kernel wants equal widths, and its fall-back builds the S x S matrix.
    """
    heads, value_dim = _padded(q_BHSQ, k_BHSQ, v_BHSV), v_BHSV.shape[-1]
    with recomputed(heads, lambda: _padded(*again())) if again else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)
    return out[..., :value_dim]


def _padded(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor) -> Heads:
    pad = q_BHSQ.shape[-1] - v_BHSV.shape[-1]
    return q_BHSQ, k_BHSQ, F.pad(v_BHSV, (0, pad)) if q_BHSQ.device.type == "cpu" and pad > 0 else v_BHSV
