"""Weight gradients as closures: a linear's backward returns the input gradient at once and leaves the weight's for later.

Who runs them, and when, is a scheduling decision (beside an all-to-all, or in a pipeline bubble); what they add to is always
`weight.main_grad`, FP32 or wider, which the optimizer allocates.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class WeightGradStore:
    """Closures of one backward pass, in the order they came. Whoever ran that pass takes them and decides when they run.

    They run outside grad mode: `main_grad` is written in place. What they keep is detached: else it would keep the whole graph behind it.
    """

    def __init__(self):
        self._waiting: list[Callable[[], None]] = []

    def append(self, closure: Callable[[], None]) -> None:
        self._waiting.append(closure)

    def take(self) -> list[Callable[[], None]]:
        taken, self._waiting = self._waiting, []
        return taken

    def __len__(self) -> int:
        return len(self._waiting)


def add_outer(main_OI: Tensor, grad_RO: Tensor, rows_RI: Tensor) -> None:
    """main += grad^T rows. Low-precision operands: the product is rounded once to their dtype, then summed in main's."""
    if grad_RO.dtype == main_OI.dtype:
        main_OI.addmm_(grad_RO.t(), rows_RI)
    else:
        main_OI.add_(torch.mm(grad_RO.t(), rows_RI))


def fold_into_main_grad(param: torch.nn.Parameter) -> None:
    """Hook for parameters whose gradient autograd itself makes (norm weights): moves `grad` into `main_grad` each time it is complete.

    It also fires, with no gradient, for weights whose Function returned None: nothing to do then.
    """
    if param.grad is not None:
        param.main_grad.add_(param.grad)
        param.grad = None
