"""silu(gate) * up, times the routing weight of the row where there is one. Only the input is kept: backward computes the rest again.

R rows   F hidden dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import fused


def swiglu_reference(gate_up: Tensor, weight_R: Tensor | None = None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if weight_R is None else (hidden * weight_R[:, None]).to(gate_up.dtype)


@fused
def _forward(gate_up, weight_R):
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate).mul_(up)
    return hidden if weight_R is None else hidden.mul_(weight_R[:, None])


@fused
def _backward(grad, gate_up, weight_R):
    gate, up = gate_up.chunk(2, -1)
    act, grad_weight = F.silu(gate), None
    if weight_R is not None:
        grad_weight = (grad * act).mul_(up).sum(-1, dtype=weight_R.dtype)
        grad = grad * weight_R[:, None].to(grad.dtype)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * act], -1), grad_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight_R, compiled):
        ctx.save_for_backward(gate_up, weight_R)
        ctx.compiled = compiled
        return _forward(gate_up, weight_R, compiled=compiled)

    @staticmethod
    def backward(ctx, grad):
        grad_gate_up, grad_weight = _backward(grad, *ctx.saved_tensors, compiled=ctx.compiled)
        return grad_gate_up, grad_weight, None


def swiglu(gate_up_R2F: Tensor, weight_R: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """(R, 2F) holding [gate | up], optional FP32 (R,) -> (R, F) in the input's dtype. Differentiable in both."""
    return _SwiGLU.apply(gate_up_R2F, weight_R, compiled)
