"""Causal attention whose query/key heads are wider than its value heads (MLA: 192 and 128), and which of torch's kernels computes it.

B sequences   H heads   S positions   Q query/key head dim   V value head dim
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from .recompute import recomputed

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """What `causal_attention` runs for heads of these shapes: it follows this, so it is no guess.

    `padding`: columns of zeros added to values. `extra_work`: share of multiply-adds that they add.
    """

    backend: SDPBackend
    padding: int
    extra_work: float

    def __str__(self) -> str:
        unfused = ": no fused kernel takes these heads, and the S x S matrix is built" if self.backend == SDPBackend.MATH else ""
        padded = f", values padded by {self.padding} columns: {self.extra_work:.0%} more work" if self.padding else ""
        return f"attention by {self.backend.name.removesuffix('_ATTENTION').lower()}{unfused}{padded}"


def attention_kernel(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor) -> AttentionKernel:
    """GPU: the first of cuDNN, flash, flash with padded values, memory-efficient that takes these heads. CPU: torch's fused kernel, which
    wants equal widths, so narrower values are padded. Else `MATH`."""
    pad = max(0, q_BHSQ.shape[-1] - v_BHSV.shape[-1])
    if q_BHSQ.is_cuda:
        return _on_gpu(q_BHSQ, k_BHSQ, v_BHSV, pad)
    fused = v_BHSV.shape[-1] <= q_BHSQ.shape[-1]
    return _kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH, q_BHSQ, v_BHSV, pad if q_BHSQ.device.type == "cpu" else 0)


def _on_gpu(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, pad: int) -> AttentionKernel:
    tries = [
        (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention, 0),
        (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention, 0),
        (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention, pad),
        (SDPBackend.EFFICIENT_ATTENTION, cuda.can_use_efficient_attention, 0),
    ]
    for backend, takes, padding in tries:
        values = v_BHSV.new_empty(*v_BHSV.shape[:-1], v_BHSV.shape[-1] + padding) if padding else v_BHSV
        if takes(cuda.SDPAParams(q_BHSQ, k_BHSQ, values, None, 0.0, True, False), False):
            return _kernel(backend, q_BHSQ, v_BHSV, padding)
    return _kernel(SDPBackend.MATH, q_BHSQ, v_BHSV, 0)


def _kernel(backend: SDPBackend, q_BHSQ: Tensor, v_BHSV: Tensor, padding: int) -> AttentionKernel:
    return AttentionKernel(backend=backend, padding=padding, extra_work=padding / (q_BHSQ.shape[-1] + v_BHSV.shape[-1]))


def causal_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, *, again: Callable[[], Heads] | None = None) -> Tensor:
    """softmax(scale q k^T, causal) v -> (B, H, S, V). Differentiable. `again`: makes q, k and v for backward, which are then not kept.

    By the kernel that `attention_kernel` names for these heads.
    """
    kernel, value_dim = attention_kernel(q_BHSQ, k_BHSQ, v_BHSV), v_BHSV.shape[-1]
    heads = _padded(q_BHSQ, k_BHSQ, v_BHSV, kernel.padding)
    with contextlib.ExitStack() as stack:
        if q_BHSQ.is_cuda:  # on CPU there is only one fused kernel
            stack.enter_context(sdpa_kernel(kernel.backend))
        if again:
            stack.enter_context(recomputed(heads, lambda: _padded(*again(), kernel.padding)))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)
    return out[..., :value_dim]


def _padded(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, padding: int) -> Heads:
    return q_BHSQ, k_BHSQ, F.pad(v_BHSV, (0, padding)) if padding else v_BHSV
