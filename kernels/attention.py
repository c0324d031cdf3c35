"""Causal attention whose query/key heads are wider than its value heads (MLA: 192 and 128), and which of torch's kernels computes it.

B sequences   H heads   S positions   T = B * S tokens   Q query/key head dim   V value head dim   O = H * V
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._torch import cudnn_attention
from .e5m6 import Packed, pack_e5m6, unpack_e5m6
from .recompute import Output, recomputed

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
    wants equal widths, so narrower values are padded. Else `MATH`. Tensors on meta stand for those of a GPU with cuDNN."""
    pad = max(0, q_BHSQ.shape[-1] - v_BHSV.shape[-1])
    if q_BHSQ.is_cuda:
        return _on_gpu(q_BHSQ, k_BHSQ, v_BHSV, pad)
    if q_BHSQ.is_meta:
        return _kernel(SDPBackend.CUDNN_ATTENTION, q_BHSQ, v_BHSV, 0)
    fused = v_BHSV.shape[-1] <= q_BHSQ.shape[-1]
    return _kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH, q_BHSQ, v_BHSV, pad)


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


def _on_meta(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """What cuDNN keeps and makes; torch itself would choose the S x S matrix there."""
    keeps = torch.is_grad_enabled() and q_BHSQ.requires_grad
    return cudnn_attention(q_BHSQ, k_BHSQ, v_BHSV, None, keeps, 0.0, is_causal, False, scale=scale)[0]


def _kernel(backend: SDPBackend, q_BHSQ: Tensor, v_BHSV: Tensor, padding: int) -> AttentionKernel:
    return AttentionKernel(backend=backend, padding=padding, extra_work=padding / (q_BHSQ.shape[-1] + v_BHSV.shape[-1]))


def causal_attention(
    q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, *, again: Callable[[], Heads] | None = None, narrow: bool = False
) -> tuple[Tensor, Callable[[], Tensor]]:
    """softmax(scale q k^T, causal) v, a token's heads side by side: (T, O), differentiable. By the kernel that `attention_kernel` names.

    Second: what makes these rows in backward from what attention keeps itself. `narrow`: that is 12 bits of each (`e5m6.py`), for its own
    backward too. `again`: makes q, k and v for backward, which are then not kept.
    """
    kernel, (batch, heads, seq_len, value_dim) = attention_kernel(q_BHSQ, k_BHSQ, v_BHSV), v_BHSV.shape
    narrow = narrow and torch.is_grad_enabled()
    given = _padded(q_BHSQ, k_BHSQ, v_BHSV, kernel.padding)
    made_again = again and (lambda: _padded(*again(), kernel.padding))
    packed: list[Packed] = []  # once it is there

    def unpacked() -> Tensor:
        out_BSHV = unpack_e5m6(*packed).view(batch, seq_len, heads, value_dim)
        return F.pad(out_BSHV, (0, kernel.padding)).transpose(1, 2)

    output = Output(shape=given[2].shape, by=unpacked) if narrow and kernel.backend != SDPBackend.MATH else None  # which keeps none
    with contextlib.ExitStack() as stack:
        if q_BHSQ.is_cuda:  # on CPU there is only one fused kernel
            stack.enter_context(sdpa_kernel(kernel.backend))
        if made_again or output:
            stack.enter_context(recomputed(given, by=made_again, output=output))
        attend = _on_meta if q_BHSQ.is_meta else F.scaled_dot_product_attention
        out_BHSV = attend(*given, is_causal=True, scale=scale)[..., :value_dim]
    rows_TO = _rows(out_BHSV)
    if not narrow:
        kept = out_BHSV.detach()
        return rows_TO, lambda: _rows(kept)
    packed.append(pack_e5m6(rows_TO.detach()))
    return rows_TO, lambda: unpack_e5m6(*packed)


def _rows(out_BHSV: Tensor) -> Tensor:
    return out_BHSV.transpose(1, 2).flatten(2).flatten(0, 1)


def _padded(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, padding: int) -> Heads:
    return q_BHSQ, k_BHSQ, F.pad(v_BHSV, (0, padding)) if padding else v_BHSV
