"""y = x W^T, with the weight's gradient left to a `WeightGradStore`.

R rows   I input dim   O output dim
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_grad import WeightGradStore, add_outer


class _Linear(torch.autograd.Function):
    """The store is an argument, not a context variable: on CUDA, autograd runs backward in another thread."""

    @staticmethod
    def forward(ctx, rows_RI, weight_OI, store, compute_dtype, again):
        if again is None:
            ctx.save_for_backward(rows_RI)
        ctx.weight, ctx.store, ctx.compute_dtype, ctx.again = weight_OI, store, compute_dtype, again
        return F.linear(rows_RI, weight_OI.to(compute_dtype))

    @staticmethod
    def backward(ctx, grad_RO):
        (rows_RI,), weight = (ctx.again(),) if ctx.again else ctx.saved_tensors, ctx.weight
        rows_RI, grad_RO = rows_RI.detach(), grad_RO.contiguous()  # also where it arrives expanded
        ctx.store.append(lambda: add_outer(weight.main_grad, grad_RO, rows_RI))
        grad_RI = torch.mm(grad_RO, weight.to(ctx.compute_dtype)) if ctx.needs_input_grad[0] else None
        return grad_RI, None, None, None, None


def linear(
    rows_RI: Tensor,
    weight_OI: Tensor,
    store: WeightGradStore,
    compute_dtype: torch.dtype | None = None,
    *,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """(R, I) x (O, I) -> (R, O), in the rows' dtype. Backward appends one closure to `store`, which adds into `weight.main_grad`.

    `compute_dtype`: a BF16 weight is widened to it on the fly (the router's gate); the rows must have it already.
    `again`: makes the rows for backward, which are then not kept.
    """
    return _Linear.apply(rows_RI, weight_OI, store, compute_dtype or weight_OI.dtype, again)
