"""What the executor runs: a stage is a list of phases, and the executor owns every boundary between them.

A compute phase has autograd inside and none outside: values arrive detached, leave detached, and gradients are handed over by the
caller. A communication phase has no autograd at all: its forward and backward each issue a collective and return a `Pending`.
Values travel as tuples; whatever is not a floating-point tensor (routing, for one) passes through without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

IGNORED = -100  # a target that has no loss


@dataclass(kw_only=True)
class MicroBatch:
    """The tokens of one forward, int64: inputs (B, S), and what follows each (B, S) or, for multi-token prediction, (B, S + depth).

    `counted`: routing statistics are kept (training). `choose(layer, select, score_TE) -> expert_TK`, (T, K) int64: stands in for the
    routers' own `select(score_TE)`; a recomputed block asks it twice.
    """

    tokens_BS: Tensor
    targets_BN: Tensor
    counted: bool = True
    choose: Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_BS.numel()

    def ahead(self, places: int) -> Tensor:
        """(B, S): the token that many places after each input, 1 being the next; IGNORED where the batch does not reach."""
        seq_len = self.tokens_BS.shape[1]
        part = self.targets_BN[:, places - 1 : places - 1 + seq_len]
        return torch.nn.functional.pad(part, (0, seq_len - part.shape[1]), value=IGNORED)

    @property
    def num_targets(self) -> Tensor:
        """Next tokens that count: a scalar, where the tokens are."""
        return (self.ahead(1) != IGNORED).sum()


@dataclass(kw_only=True)
class Pending:
    """Something under way: `wait()` blocks until it has arrived and makes the phase's output. `work` is None or has `wait()`.

    `onward`: what arrived has another way to go, and this sends it: whoever waits does, or, while there is more to do, calls `advance`.
    `brief`: it is over sooner than anybody's next turn to compute would be, so it is waited for at once.
    """

    work: Any
    finish: Callable[[], tuple]
    onward: "Callable[..., Pending] | None" = None
    brief: bool = False

    def land(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def advance(self) -> "Pending":
        """Block until it has arrived, and send it on."""
        self.land()
        return self.onward(*self.finish())

    def wait(self) -> tuple:
        if self.onward is not None:
            return self.advance().wait()
        self.land()
        return self.finish()

    def then(self, function: Callable[..., tuple]) -> "Pending":
        if self.onward is not None:
            return replace(self, onward=lambda *arrived: self.onward(*arrived).then(function))
        return replace(self, finish=lambda: function(*self.finish()))

    def then_issue(self, send: "Callable[..., Pending]") -> "Pending":
        """`send(*arrived)` issues the next leg."""
        assert self.onward is None, "one leg at a time: the next leg's Pending says what follows it"
        return replace(self, onward=send)


class CommunicationPhase(Protocol):
    """`saved` is a stack that forward pushes to and backward pops from; None in evaluation."""

    name: str

    def settle(self, *values) -> None:
        """Before forward: wait for what must be known of peers before anything can be sent."""

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> Pending: ...

    def backward(self, saved: list, *grads) -> Pending: ...


class ComputePhase:
    """`compute(batch, *values) -> tuple`, with gradients to every floating-point value. It may run twice: it has no side effects.

    `recompute`: only the inputs are kept, and backward computes again. `after(*outputs)`: once per forward, whatever is recomputed.
    """

    def __init__(
        self, name: str, compute: Callable[..., tuple], *, recompute: bool = False, after: Callable[..., None] = lambda *outputs: None
    ):
        self.name, self.compute, self.recompute, self.after = name, compute, recompute, after

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> tuple:
        leaves = tuple(v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in values)
        with torch.set_grad_enabled(saved is not None and not self.recompute):
            outputs = self.compute(batch, *leaves)
        if saved is not None:
            saved.append((batch, leaves, None if self.recompute else _edges(outputs)))
        outputs = tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs)
        self.after(*outputs)
        return outputs

    def again(self, saved: list) -> None:
        """Forward once more, just before `backward`, of a phase with `recompute`."""
        batch, leaves, _ = saved.pop()
        with torch.enable_grad():
            saved.append((batch, leaves, _edges(self.compute(batch, *leaves))))

    def backward(self, saved: list, *grads) -> tuple:
        if saved[-1][2] is None:
            self.again(saved)
        _, leaves, edges = saved.pop()
        pairs = [(edge, grad) for edge, grad in zip(edges, grads) if edge is not None and grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        return tuple(leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves)


def _edges(outputs: tuple) -> list:
    """Where backward enters for each output. The outputs themselves belong to whom they were handed on: here they would be kept alive."""
    return [get_gradient_edge(o) if isinstance(o, Tensor) and o.requires_grad else None for o in outputs]


class EmptyPhase:
    """Holds a communication slot of a block that has nothing to exchange, so that the slots of different blocks stay aligned."""

    def __init__(self, name: str):
        self.name = name

    def settle(self, *values) -> None: ...

    def forward(self, saved: list | None, batch: MicroBatch, *values) -> Pending:
        return Pending(work=None, finish=lambda: values)

    def backward(self, saved: list, *grads) -> Pending:
        return Pending(work=None, finish=lambda: grads)
