"""The arithmetic of AdamW and of Muon on what one rank owns. Nothing here talks to other ranks.

Muon (arXiv 2502.16982 §2.2): the update is the orthogonalised Nesterov momentum of a matrix, times 0.2 sqrt(max(rows, columns)), which
gives it AdamW's root mean square, so that AdamW's learning rate and weight decay serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import adamw

# Elements of narrow moments that are widened at a time: a CPU's cache, a GPU's small change. Tensors on meta stand for a GPU's.
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24, "meta": 1 << 24}
MATRICES = 1 << 25  # elements that are orthogonalised at a time: experts' small matrices together, large ones one by one
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5 on singular values, five times: what is above 1.5e-3 ends in 0.68 to 1.2
NEWTON_SCHULZ_STEPS = 5


def adamw_(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step, in place, on lists of (n,) tensors on one device; `step` is 1 at the first.

    Masters and gradients are FP32 or FP64. Moments may be narrower: they are widened a block at a time, and rounded to the nearest.
    """

    def fused(masters, grads, exp_avgs, exp_avg_sqs):
        # The kernel counts the step itself, once per tensor. Filled on the device: no copy from the host to wait for.
        steps = torch.full((len(masters),), step - 1.0, device=masters[0].device).unbind()
        adamw(
            masters, grads, exp_avgs, exp_avg_sqs, [], list(steps),
            fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip

    same = [m.dtype == a.dtype for m, a in zip(masters, exp_avgs)]
    rows = list(zip(masters, grads, exp_avgs, exp_avg_sqs))
    if wide := [row for row, s in zip(rows, same) if s]:
        fused(*(list(column) for column in zip(*wide)))
    for row in (row for row, s in zip(rows, same) if not s):
        for master, grad, *narrow in zip(*(t.split(BLOCK[t.device.type]) for t in row)):
            moments = [t.to(master.dtype) for t in narrow]
            fused([master], [grad], *([m] for m in moments))
            for t, moment in zip(narrow, moments):
                t.copy_(moment)


def muon_(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    matrices: Sequence[tuple[int, int]],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    device: torch.device,
) -> None:
    """One Muon step, in place, on (n,) tensors that hold whole units; `matrices`: (rows, columns) of each matrix in a unit.

    FP32 or FP64. The momentum is a mean, (1 - beta) of the new gradient, as AdamW's is. `device`: where to orthogonalise.
    """
    momentum.lerp_(grad, 1 - beta)
    master.mul_(1 - lr * weight_decay)
    start, unit = 0, sum(rows * columns for rows, columns in matrices)
    for rows, columns in matrices:
        parts = [t.view(-1, unit)[:, start : start + rows * columns].unflatten(1, (rows, columns)) for t in (master, grad, momentum)]
        for m, g, mean in zip(*(t.split(max(1, MATRICES // (rows * columns))) for t in parts)):
            step = orthogonal(g.lerp(mean, beta).to(device, torch.float64 if m.dtype == torch.float64 else torch.bfloat16))
            m.sub_(step.to(m.device, m.dtype), alpha=lr * 0.2 * max(rows, columns) ** 0.5)
        start += rows * columns


def orthogonal(x: Tensor) -> Tensor:
    """(n, rows, columns) -> the same with singular values near 1, by Newton-Schulz in the dtype of `x`.

    Zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-30)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonal_cost(matrices: Sequence[tuple[int, int]]) -> int:
    """What orthogonalising costs, in proportion to FLOPs."""
    return sum(rows * columns * min(rows, columns) for rows, columns in matrices)
