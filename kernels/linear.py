"""y = x W^T, with the weight's gradient left to a `WeightGradStore`.

R rows   I input dim   O output dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_grad import WeightGradStore, add_outer


class _Linear(torch.autograd.Function):
    """The store is an argument, not a context variable: on CUDA, autograd runs backward in another thread."""

    @staticmethod
    def forward(ctx, rows_RI, weight_OI, store):
        ctx.save_for_backward(rows_RI)
        ctx.weight, ctx.store = weight_OI, store
        return F.linear(rows_RI, weight_OI)

    @staticmethod
    def backward(ctx, grad_RO):
        (rows_RI,), weight = ctx.saved_tensors, ctx.weight
        grad_RO = grad_RO.contiguous()  # also where it arrives expanded
        ctx.store.append(lambda: add_outer(weight.main_grad, grad_RO, rows_RI))
        return torch.mm(grad_RO, weight) if ctx.needs_input_grad[0] else None, None, None


def linear(rows_RI: Tensor, weight_OI: Tensor, store: WeightGradStore) -> Tensor:
    """(R, I) x (O, I) -> (R, O), in the rows' dtype. Backward appends one closure to `store`, which adds into `weight.main_grad`."""
    return _Linear.apply(rows_RI, weight_OI, store)
