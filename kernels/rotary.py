"""Turns the interleaved pairs of rotary positions: pair (a, b) at position s becomes (a + ib) * turn[s].

B sequences   S positions   H heads   P pairs
"""

import torch
from torch import Tensor

from .fused import fused


def rotate_reference(x_BSH2P: Tensor, turns_SP: Tensor) -> Tensor:
    wide = x_BSH2P.to(turns_SP.real.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_SP[:, None, :]).flatten(-2).to(x_BSH2P.dtype)


@fused
def _rotate(x_BSH2P, cos_SP, sin_SP):
    cos, sin = cos_SP[:, None, :], sin_SP[:, None, :]
    a, b = x_BSH2P.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x_BSH2P.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSH2P, turns_SP, compiled):
        ctx.turns, ctx.compiled = turns_SP, compiled
        if compiled:
            return _rotate(x_BSH2P, turns_SP.real, turns_SP.imag, compiled=True)
        return rotate_reference(x_BSH2P, turns_SP)  # uncompiled, complex numbers are the fewest passes over memory

    @staticmethod
    def backward(ctx, grad):
        if ctx.compiled:
            return _rotate(grad, ctx.turns.real, -ctx.turns.imag, compiled=True), None, None
        return rotate_reference(grad, ctx.turns.conj()), None, None


def rotate(x_BSH2P: Tensor, turns_SP: Tensor, *, compiled: bool = False) -> Tensor:
    """(B, S, H, 2P), complex (S, P) -> the same shape and dtype, computed in FP32 or wider. Differentiable in x."""
    return _Rotate.apply(x_BSH2P, turns_SP, compiled)
