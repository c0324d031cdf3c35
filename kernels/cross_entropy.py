"""Summed cross-entropy of next tokens straight from hidden states: the logits exist one chunk of rows at a time.

The gradient of the logits is made in the same pass, while the chunk is in cache, and kept in the weights' dtype for backward: FP32
logits of all rows, their log-softmax and its gradient would be three times as much memory, and as many trips to it.

T tokens   D model dim   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import fused
from .weight_grad import WeightGradStore, add_outer

CHUNK_BYTES = 4 << 20  # of FP32 logits at once: about a core's cache


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float) -> Tensor:
    logits_TV = F.linear(x_TD, weight_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, target_T, reduction="sum", ignore_index=-100) * scale


@fused
def _log_probs(logits_tV, target_t1):
    """Log-softmax in FP32 or wider, and the chunk's summed loss."""
    log_probs_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32)).log_softmax(1)
    return log_probs_tV, -(log_probs_tV.gather(1, target_t1.clamp(min=0)) * (target_t1 >= 0)).sum()


@fused
def _grad(log_probs_tV, target_t1, scale):
    """scale * (softmax - one at the target), zero in rows that do not count."""
    vocabulary = torch.arange(log_probs_tV.shape[1], device=target_t1.device)
    return torch.where(target_t1 >= 0, (log_probs_tV.exp() - (vocabulary == target_t1).to(log_probs_tV.dtype)) * scale, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, target_T, scale, store, with_grad, compiled):
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        grad_TV = x_TD.new_empty(len(x_TD), len(weight_VD)) if with_grad else None
        rows = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
        for start in range(0, len(x_TD), rows):
            chunk = slice(start, start + rows)
            logits_tV, target_t1 = F.linear(x_TD[chunk], weight_VD), target_T[chunk, None]
            log_probs_tV, part = _log_probs(logits_tV, target_t1, compiled=compiled)
            loss += part
            if grad_TV is not None:
                grad_TV[chunk] = _grad(log_probs_tV, target_t1, scale, compiled=compiled)
        ctx.save_for_backward(x_TD, grad_TV)
        ctx.weight, ctx.store = weight_VD, store
        return loss * scale

    @staticmethod
    def backward(ctx, grad):
        (x_TD, grad_TV), weight = (t.detach() for t in ctx.saved_tensors), ctx.weight
        # `grad` is a scalar on the device: scaling the narrow factors costs little, and asks the host nothing.
        ctx.store.append(lambda: add_outer(weight.main_grad, grad_TV, (x_TD * grad).to(x_TD.dtype)))
        return torch.mm(grad_TV, weight).mul_(grad), None, None, None, None, None, None


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float, store: WeightGradStore, *, compiled: bool = False
) -> Tensor:
    """`scale` times the sum over tokens of -log softmax(x W^T)[target]: a scalar in FP32 or wider. Negative targets do not count.

    (T, D), (V, D), int64 (T,). Differentiable in x; the weight's gradient is left to `store`. Softmax in FP32 or wider.
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, target_T, scale, store, torch.is_grad_enabled(), compiled)
