"""Token embedding whose gradient goes straight into the table's `main_grad`: no dense (V, D) gradient per micro-batch.

T tokens   V vocabulary   D model dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_grad import WeightGradStore


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD, tokens_T, store):
        ctx.weight, ctx.tokens, ctx.store = weight_VD, tokens_T, store
        return F.embedding(tokens_T, weight_VD)

    @staticmethod
    def backward(ctx, grad_TD):
        weight, tokens = ctx.weight, ctx.tokens

        def add():
            weight.main_grad.index_add_(0, tokens, grad_TD.to(weight.main_grad.dtype))

        ctx.store.append(add)
        return None, None, None


def embedding(tokens_T: Tensor, weight_VD: Tensor, store: WeightGradStore) -> Tensor:
    """int64 (T,) and (V, D) -> (T, D). Backward leaves the table's gradient to `store`."""
    return _Embedding.apply(weight_VD, tokens_T, store)
