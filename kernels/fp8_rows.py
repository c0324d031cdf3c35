"""Rows that exist as FP8 codes and scales only, in places where autograd and the pipeline expect a BF16 tensor.

An FP8 tensor must not be an input or output of an autograd Function: its gradient would be cast to FP8, silently. `Fp8Rows` says it is
BF16 (or whatever dtype its values have when read), so a gradient of that dtype belongs to it, or it may itself be a gradient; what it holds
is a `Quantised`. Dispatched tokens are such rows, and so are the gradients that are dispatched in backward. Only what knows of them can
read them: an ordinary operator raises RuntimeError.

R rows   D dim
"""

import torch
from torch import Tensor

from .quantise import Quantised, dequantise_rows, quantise_rows


class Fp8Rows(Tensor):
    """(R, D). `quantised`: by `quantise_rows`."""

    quantised: Quantised

    @staticmethod
    def __new__(cls, quantised: Quantised, dtype: torch.dtype):
        rows = quantised.codes.new_empty(1, dtype=dtype).expand(quantised.codes.shape).as_subclass(cls)  # one element stands for all
        rows.quantised = quantised
        return rows

    def wide(self) -> Tensor:
        """The values, (R, D) in this tensor's dtype."""
        return dequantise_rows(self.quantised, self.dtype)

    def __repr__(self) -> str:
        return f"Fp8Rows{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].quantised, args[0].dtype)
        raise RuntimeError(f"{function} of rows that are in FP8: read `.quantised`, or `.wide()`")


def fp8_rows(x_RD: Tensor, *, power_of_two: bool = False, floor: float) -> Fp8Rows:
    """(R, D) cast, and said to be in the dtype that it had."""
    return Fp8Rows(quantise_rows(x_RD.contiguous(), power_of_two=power_of_two, floor=floor), x_RD.dtype)


def widened(rows: Tensor) -> Tensor:
    """What `rows` stand for, if they are `Fp8Rows`; else themselves."""
    return rows.wide() if isinstance(rows, Fp8Rows) else rows


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows.wide() if isinstance(rows, Fp8Rows) else rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        return widened(grad)


def wide_both_ways(rows: Tensor) -> Tensor:
    """`widened`, differentiable, and so is the gradient: for what can read neither in FP8."""
    return _Wide.apply(rows)
