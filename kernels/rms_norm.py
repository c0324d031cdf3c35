"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, statistics in FP32 or wider.

R rows   D dim
"""

import torch
from torch import Tensor

from .fused import fused


def rms_norm_reference(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(x_RD.dtype)


@fused
def _forward(x_RD, weight_D, eps):
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    scale_R1 = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale_R1 * weight_D).to(x_RD.dtype), scale_R1


@fused
def _backward(grad_RD, x_RD, weight_D, scale_R1):
    unit_RD, wide = x_RD * scale_R1, grad_RD.to(scale_R1.dtype)
    grad_weight = (wide * unit_RD).flatten(0, -2).sum(0)
    wide = wide * weight_D
    along_R1 = (wide * unit_RD).mean(-1, keepdim=True)
    return ((wide - unit_RD * along_R1) * scale_R1).to(x_RD.dtype), grad_weight.to(weight_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weight_D, eps, compiled):
        out_RD, scale_R1 = _forward(x_RD, weight_D, eps, compiled=compiled)
        ctx.save_for_backward(x_RD, weight_D, scale_R1)
        ctx.compiled = compiled
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        return *_backward(grad_RD, *ctx.saved_tensors, compiled=ctx.compiled), None, None


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float, *, compiled: bool = False) -> Tensor:
    """(R, D), (D,) -> (R, D) in x's dtype. Differentiable in x and weight. Any leading dims."""
    return _RMSNorm.apply(x_RD, weight_D, eps, compiled)
