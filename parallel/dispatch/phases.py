"""The executor's two phases over a dispatcher."""

from collections.abc import Callable

from ..phases import MicroBatch, Pending
from .routing import Dispatcher, Routing


class Dispatch:
    """h, u, weight_TK, r -> h, u, rows_RD, weight_R, r. `u` also goes as it is to the shared expert: its two gradients meet here.
    `carried` values (losses so far) pass by.

    `observe(routing)` is called once per counted micro-batch: here, and not in the router, so that recompute cannot count twice.
    """

    name = "dispatch"

    def __init__(self, dispatcher: Dispatcher, observe: Callable[[Routing], None]):
        self.dispatcher, self.observe = dispatcher, observe

    def settle(self, h_TD, u_TD, weight_TK, r, *carried) -> None:
        self.dispatcher.wait_counts(r)

    def forward(self, saved: list | None, batch: MicroBatch, h_TD, u_TD, weight_TK, r, *carried) -> Pending:
        if batch.counted:
            self.observe(r)
        if saved is not None:
            saved.append(r)
        return self.dispatcher.to_experts(u_TD, weight_TK, r, "F").then(lambda rows, weight: (h_TD, u_TD, rows, weight, r, *carried))

    def backward(self, saved: list, grad_h, grad_u, grad_RD, grad_R, _, *carried) -> Pending:
        return self.dispatcher.to_tokens(grad_RD, grad_R, saved.pop(), "B").then(
            lambda grad_TD, grad_TK: (grad_h, grad_TD if grad_u is None else grad_u + grad_TD, grad_TK, None, *carried)
        )


class Combine:
    """y_TD, rows_RD, r -> y_TD + each token's rows."""

    name = "combine"

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher

    def settle(self, *values) -> None: ...

    def forward(self, saved: list | None, batch: MicroBatch, y_TD, rows_RD, r, *carried) -> Pending:
        if saved is not None:
            saved.append(r)
        return self.dispatcher.to_tokens(rows_RD, None, r, "F").then(lambda x_TD, _: (y_TD + x_TD, *carried))

    def backward(self, saved: list, grad_TD, *carried) -> Pending:
        return self.dispatcher.to_experts(grad_TD, None, saved.pop(), "B").then(lambda rows_RD, _: (grad_TD, rows_RD, None, *carried))
