"""Tokens to the ranks that hold their experts, and back.

A dispatcher answers three questions about one micro-batch's choice of experts: `start` begins to find out how many rows go where,
`to_experts` sends copies of the tokens, `to_tokens` brings rows back and adds each token's copies. Each of the two exchanges is the
backward of the other. `Dispatch` and `Combine` are the executor's phases over them.

An expert is computed in a *slot*: those of a rank are consecutive. Slot and expert are one number, unless experts have been moved
(`relocate.py`): then `start` is told where they are, and from there on the dispatcher speaks of slots.

T tokens on this rank   K top-k   N = T * K copies   D model dim   C payload columns: D and the routing weight
E experts, and slots   e experts on this rank   M copies received   R rows for the experts, padding included
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..conf.schema import Config, ConfigError, choose
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.grouped import RowGroups
from ..kernels.permute import permute, permute_quantised, sum_copies
from ..kernels.quantise import ACTIVATION_FLOOR, BLOCK, GRADIENT_FLOOR, Quantised, quantise_rows
from ..kernels.row_maps import RowMaps, row_maps
from .phases import MicroBatch, Pending
from .transport import DIRECT, Transport

DISPATCHERS = ("local", "alltoall")


def check(config: Config) -> None:
    """Raises ConfigError for a dispatcher that does not exist or does not fit `parallel.ep`."""
    choose("parallel.dispatcher", config.parallel.dispatcher, ("auto", *DISPATCHERS))
    if config.parallel.dispatcher == "local" and config.parallel.ep > 1:
        rule = f"reaches only this rank's experts, and parallel.ep = {config.parallel.ep}"
        raise ConfigError("parallel.dispatcher", "local", rule, "alltoall")


@dataclass(kw_only=True)
class Routing:
    """One micro-batch's choice of experts and, once its dispatcher knows them, its row maps. Backward uses the same maps again.

    row_of_TK     (T, K)  row in the send buffer (alltoall) or in R (local) that holds token t's k-th copy
    row_of_M      (M,)    row in R of each received copy, which comes sorted by sender, then expert
    copy_of_R     (R,)    the received copy (alltoall) or own copy t * K + k (local) in each row, -1 for padding
    """

    expert_TK: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)  # the router's losses and the like over tokens, detached: for the record
    load_E: Tensor | None = None  # this rank's copies per expert: for the record
    sent_E: Tensor | None = None  # this rank's copies per slot
    groups: RowGroups | None = None
    row_of_TK: Tensor | None = None
    row_of_M: Tensor | None = None
    copy_of_R: Tensor | None = None
    order_N: Tensor | None = None  # copies in expert order
    received_E: Tensor | None = None  # per sender and own expert
    sent_rows: list[int] = field(default_factory=list)  # per peer
    received_rows: list[int] = field(default_factory=list)
    counts_work: Any = None

    def place(self, slot_of_E: Tensor | None, num_experts: int, align: int) -> RowMaps:
        """Look up slots (None: expert i is in slot i), and give this rank's copies rows in the order of slots."""
        maps = row_maps(self.expert_TK if slot_of_E is None else slot_of_E[self.expert_TK], num_experts, align)
        self.row_of_TK = maps.row_of_TK
        if self.load_E is None:
            self.load_E = maps.counts_e if slot_of_E is None else maps.counts_e[slot_of_E]
        return maps


class Dispatcher(Protocol):
    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        """Count, and begin to exchange the counts. `slot_of_E`: (E,) int64, the slot of each expert, None where they are in order."""
        ...

    def wait_counts(self, r: Routing) -> None: ...

    def to_experts(self, x_TD: Tensor, weight_TK: Tensor | None, r: Routing, direction: str) -> Pending:
        """-> rows_RD in expert order, zero where padding, and weight_R (FP32 or wider, None if no weight was given). Rows are `Fp8Rows`
        where the dispatcher is told to."""
        ...

    def to_tokens(self, rows_RD: Tensor, weight_R: Tensor | None, r: Routing, direction: str) -> Pending:
        """-> each token's rows added (T, D), and weight_TK (or None)."""
        ...


def make_dispatcher(
    name: str,
    *,
    num_experts: int,
    align: int,
    groups: dict[str, dist.ProcessGroup] | None,
    fp8: bool = False,
    transport: Transport = DIRECT,
) -> Dispatcher:
    """`groups`: the expert-parallel group once per direction ("F", "B"), so that both can be in flight. `align`: rows per expert.

    `fp8`: what goes to experts is quantised before it goes, activations and their gradients; what comes back is not.
    """
    if name == "local":
        return LocalDispatcher(num_experts=num_experts, align=align, fp8=fp8)
    assert groups is not None
    return AllToAllDispatcher(num_experts=num_experts, align=align, groups=groups, fp8=fp8, transport=transport)


def _quantised(x_TD: Tensor, direction: str) -> Quantised:
    return quantise_rows(x_TD.contiguous(), power_of_two=True, floor=ACTIVATION_FLOOR if direction == "F" else GRADIENT_FLOOR)


class LocalDispatcher:
    """Every expert is on this rank: rows are gathered straight into expert order. The host learns no count, and waits for nothing."""

    def __init__(self, *, num_experts: int, align: int, fp8: bool = False):
        self.num_experts, self.align, self.fp8 = num_experts, align, fp8

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        maps = r.place(slot_of_E, self.num_experts, self.align)
        r.copy_of_R, r.groups = maps.copy_of_R, RowGroups(ends_e=maps.ends_e, align=self.align)

    def wait_counts(self, r: Routing) -> None:
        pass

    def to_experts(self, x_TD, weight_TK, r, direction):
        token_R = r.copy_of_R.div(r.expert_TK.shape[1], rounding_mode="floor")  # floor: -1 stays -1
        if self.fp8:
            rows_RD = Fp8Rows(permute_quantised(_quantised(x_TD, direction), token_R), x_TD.dtype)
        else:
            rows_RD = permute(x_TD, token_R)
        weight_R = None if weight_TK is None else permute(weight_TK.flatten(), r.copy_of_R)
        return Pending(work=None, finish=lambda: (rows_RD, weight_R))

    def to_tokens(self, rows_RD, weight_R, r, direction):
        x_TD = sum_copies(rows_RD, r.row_of_TK)
        weight_TK = None if weight_R is None else weight_R[r.row_of_TK]
        return Pending(work=None, finish=lambda: (x_TD, weight_TK))


class AllToAllDispatcher:
    """One all-to-all each way over the expert-parallel group, uneven and possibly empty shares.

    send buffer, by expert (so by peer)     received, by peer               rows, by expert, each padded
    [to rank 0: e0 e0 e1 | to rank 1: e2] → [from 0: e0 e0 e1 | from 1: e0] → [e0 e0 e0 . | e1 . . .]

    Routing weights ride in the same buffer as raw bits of extra columns: one message, and no rounding of FP32 weights to BF16. A row in
    FP8 is bytes: codes, scales, zeros up to a multiple of 16 bytes in all, weight.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        align: int,
        groups: dict[str, dist.ProcessGroup],
        fp8: bool = False,
        transport: Transport = DIRECT,
    ):
        self.num_experts, self.align, self.groups, self.fp8, self.transport = num_experts, align, groups, fp8, transport
        self.ep = groups["F"].size()

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        maps = r.place(slot_of_E, self.num_experts, 1)
        r.sent_E, r.order_N = maps.counts_e, maps.copy_of_R
        r.received_E = torch.empty_like(r.sent_E)
        r.counts_work = self.transport.all_to_all(r.received_E, r.sent_E, self.groups["F"])

    def wait_counts(self, r: Routing) -> None:
        """Only now does the host know the sizes."""
        r.counts_work.wait()
        r.counts_work = None
        sent, received = torch.stack([r.sent_E, r.received_E]).cpu().view(2, self.ep, -1)  # (peer, own expert); one wait for both
        r.sent_rows, r.received_rows = sent.sum(1).tolist(), received.sum(1).tolist()
        own = received.shape[1]
        expert_E = torch.arange(own, device=r.received_E.device).repeat(self.ep)
        expert_M = expert_E.repeat_interleave(r.received_E, output_size=sum(r.received_rows))
        maps = row_maps(expert_M[:, None], own, self.align)
        num_rows = sum(-(-size // self.align) * self.align for size in received.sum(0).tolist())
        r.row_of_M, r.copy_of_R = maps.row_of_TK.flatten(), maps.copy_of_R[:num_rows]
        r.groups = RowGroups(ends_e=maps.ends_e, align=self.align)

    def to_experts(self, x_TD, weight_TK, r, direction):
        wide, dim = None if weight_TK is None else weight_TK.dtype, x_TD.shape[1]
        payload_TC = x_TD
        if self.fp8:
            payload_TC = _as_bytes(_quantised(x_TD, direction), more=0 if wide is None else wide.itemsize)
        width = payload_TC.shape[1]
        sent = payload_TC.index_select(0, r.order_N.div(r.expert_TK.shape[1], rounding_mode="floor"))
        if weight_TK is not None:
            sent = _attach(sent, weight_TK.flatten().index_select(0, r.order_N))

        def finish(received_MC):
            rows_RC, weight_R = _detach(permute(received_MC, r.copy_of_R), width, wide)
            return Fp8Rows(_from_bytes(rows_RC, dim), x_TD.dtype) if self.fp8 else rows_RC, weight_R

        return self._exchange(sent, r.received_rows, r.sent_rows, direction).then(finish)

    def to_tokens(self, rows_RD, weight_R, r, direction):
        sent = rows_RD.index_select(0, r.row_of_M)
        if weight_R is not None:
            sent = _attach(sent, weight_R.index_select(0, r.row_of_M))
        width, wide = rows_RD.shape[1], None if weight_R is None else weight_R.dtype

        def finish(received_NC):
            rows_ND, weight_N = _detach(received_NC, width, wide)
            weight_TK = None if weight_N is None else weight_N[r.row_of_TK]
            return sum_copies(rows_ND, r.row_of_TK), weight_TK

        return self._exchange(sent, r.sent_rows, r.received_rows, direction).then(finish)

    def _exchange(self, rows: Tensor, out_rows: list[int], in_rows: list[int], direction: str) -> Pending:
        out = rows.new_empty(sum(out_rows), rows.shape[1])
        work = self.transport.all_to_all(out, rows, self.groups[direction], received=out_rows, sent=in_rows)
        return Pending(work=work, finish=lambda keep=rows: (out,))  # `rows` must live until the exchange is over


def _attach(rows_ND: Tensor, weight_N: Tensor) -> Tensor:
    return torch.cat([rows_ND, weight_N[:, None].contiguous().view(rows_ND.dtype)], 1)


def _detach(rows_NC: Tensor, width: int, weight_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    if weight_dtype is None:
        return rows_NC, None
    return rows_NC[:, :width].contiguous(), rows_NC[:, width:].contiguous().view(weight_dtype).view(-1)


def _as_bytes(q: Quantised, *, more: int) -> Tensor:
    """Codes (T, D) and scales (B, T) -> uint8 (T, C): with `more` bytes beside it, a row is a multiple of 16."""
    parts = [q.codes.view(torch.uint8), q.scales.t().contiguous().view(torch.uint8)]
    width = sum(part.shape[1] for part in parts)
    return F.pad(torch.cat(parts, 1), (0, -(width + more) % 16))


def _from_bytes(rows_RC: Tensor, dim: int) -> Quantised:
    """A row of zeros has the scale 0, and so reads back as zeros."""
    scales = rows_RC[:, dim : dim + 4 * -(-dim // BLOCK)].contiguous().view(torch.float32)
    return Quantised(rows_RC[:, :dim].contiguous().view(torch.float8_e4m3fn), scales.t().contiguous())


class Dispatch:
    """h, u, weight_TK, r -> h, u, rows_RD, weight_R, r. `u` also goes as it is to the shared expert: its two gradients meet here.
    `carried` values (losses so far) pass by.

    `observe(routing)` is called once per counted micro-batch: here, and not in the router, so that recompute cannot count twice.
    """

    name = "dispatch"

    def __init__(self, dispatcher: Dispatcher, observe: Callable[[Routing], None]):
        self.dispatcher, self.observe = dispatcher, observe

    def forward(self, saved: list | None, batch: MicroBatch, h_TD, u_TD, weight_TK, r, *carried) -> Pending:
        if batch.counted:
            self.observe(r)
        if saved is not None:
            saved.append(r)
        self.dispatcher.wait_counts(r)
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

    def forward(self, saved: list | None, batch: MicroBatch, y_TD, rows_RD, r, *carried) -> Pending:
        if saved is not None:
            saved.append(r)
        return self.dispatcher.to_tokens(rows_RD, None, r, "F").then(lambda x_TD, _: (y_TD + x_TD, *carried))

    def backward(self, saved: list, grad_TD, *carried) -> Pending:
        return self.dispatcher.to_experts(grad_TD, None, saved.pop(), "B").then(lambda rows_RD, _: (grad_TD, rows_RD, None, *carried))
