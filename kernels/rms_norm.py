"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, statistics in FP32 or wider.

R rows   D dim
"""

import torch
from torch import Tensor


def rms_norm_reference(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(x_RD.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weight_D, eps):
        wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
        scale_R1 = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x_RD, weight_D, scale_R1)
        return (wide * scale_R1).mul_(weight_D).to(x_RD.dtype)

    @staticmethod
    def backward(ctx, grad_RD):
        x_RD, weight_D, scale_R1 = ctx.saved_tensors
        unit_RD, wide = x_RD * scale_R1, grad_RD.to(scale_R1.dtype)
        grad_weight = (wide * unit_RD).sum(tuple(range(grad_RD.dim() - 1)))
        wide = wide * weight_D
        along_R1 = (wide * unit_RD).mean(-1, keepdim=True)
        return (wide - unit_RD * along_R1).mul_(scale_R1).to(x_RD.dtype), grad_weight.to(weight_D.dtype), None


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """(R, D), (D,) -> (R, D) in x's dtype. Differentiable in x and weight. Any leading dims."""
    return _RMSNorm.apply(x_RD, weight_D, eps)
