"""Causal attention whose query/key heads are wider than its value heads (MLA: 192 and 128).

B sequences   H heads   S positions   Q query/key head dim   V value head dim
"""

import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v -> (B, H, S, V). Differentiable.

    On CPU the values are padded to the keys' width: torch's fused kernel wants equal widths, and its fall-back builds the S x S matrix.
    """
    value_dim, pad = v_BHSV.shape[-1], q_BHSQ.shape[-1] - v_BHSV.shape[-1]
    if q_BHSQ.device.type == "cpu" and pad > 0:
        v_BHSV = F.pad(v_BHSV, (0, pad))
    out = F.scaled_dot_product_attention(q_BHSQ, k_BHSQ, v_BHSV, is_causal=True, scale=scale)
    return out[..., :value_dim]
