"""What the executor runs: a stage is a list of phases, and the executor owns every boundary between them.

A compute phase has autograd inside and none outside: values arrive detached, leave detached, and gradients are handed over by the
caller. A communication phase has no autograd at all: its forward and backward each issue a collective and return a `Pending`.
Values travel as tuples; whatever is not a floating-point tensor (routing, for one) passes through without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(kw_only=True)
class MicroBatch:
    """The tokens of one forward: inputs (B, S) and next tokens (B, S), both int64. `counted`: routing statistics are kept (training)."""

    tokens_BS: Tensor
    targets_BS: Tensor
    counted: bool = True

    @property
    def num_tokens(self) -> int:
        return self.tokens_BS.numel()


@dataclass(kw_only=True)
class Pending:
    """Something under way: `wait()` blocks until it has arrived and makes the phase's output. `work` is None or has `wait()`."""

    work: Any
    finish: Callable[[], tuple]

    def land(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def wait(self) -> tuple:
        self.land()
        return self.finish()

    def then(self, function: Callable[..., tuple]) -> "Pending":
        return Pending(work=self.work, finish=lambda: function(*self.finish()))


class CommunicationPhase(Protocol):
    """`saved` is a stack that forward pushes to and backward pops from; None in evaluation."""

    name: str

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> Pending: ...

    def backward(self, saved: list, *grads) -> Pending: ...


class ComputePhase:
    """`compute(batch, *values) -> tuple`, with gradients to every floating-point value."""

    def __init__(self, name: str, compute: Callable[..., tuple]):
        self.name, self.compute = name, compute

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> tuple:
        if saved is None:
            with torch.no_grad():
                return self.compute(batch, *values)
        leaves = tuple(v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in values)
        with torch.enable_grad():
            outputs = self.compute(batch, *leaves)
        saved.append((leaves, outputs))
        return tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)

    def backward(self, saved: list, *grads) -> tuple:
        leaves, outputs = saved.pop()
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        return tuple(leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves)


class EmptyPhase:
    """Holds a communication slot of a block that has nothing to exchange, so that the slots of different blocks stay aligned."""

    def __init__(self, name: str):
        self.name = name

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> Pending:
        return Pending(work=None, finish=lambda: values)

    def backward(self, saved: list, *grads) -> Pending:
        return Pending(work=None, finish=lambda: grads)
