"""One all-to-all each way over the expert-parallel group, uneven and possibly empty shares.

send buffer, by expert (so by peer)     received, by peer               rows, by expert, each padded
[to rank 0: e0 e0 e1 | to rank 1: e2] → [from 0: e0 e0 e1 | from 1: e0] → [e0 e0 e0 . | e1 . . .]

T tokens on this rank   K top-k   N = T * K copies   D model dim   C payload columns
M copies received   R rows for the experts, padding included
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.fp8_rows import Fp8Rows
from ...kernels.permute import permute, sum_copies
from ..host_reads import HostReads
from ..phases import Pending
from ..transport import DIRECT, Transport
from .counts import HostCounts
from .routing import Routing
from .wire import as_bytes, attach, detach, exchange, from_bytes, quantised


class AllToAllDispatcher:
    """`groups`: the expert-parallel group, once per direction ("F", "B")."""

    def __init__(
        self,
        *,
        num_experts: int,
        align: int,
        groups: dict[str, dist.ProcessGroup],
        fp8: bool = False,
        transport: Transport = DIRECT,
        reads: HostReads | None = None,
    ):
        self.num_experts, self.align, self.groups, self.fp8, self.transport = num_experts, align, groups, fp8, transport
        self.ep, self.reads = groups["F"].size(), reads or HostReads()

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        maps = r.place(slot_of_E, self.num_experts, 1)
        r.order_N = maps.copy_of_R
        sent_Pe = maps.counts_e.view(self.ep, -1)
        r.counts = HostCounts(sent_Pe, group=self.groups["F"], transport=self.transport, reads=self.reads)

    def wait_counts(self, r: Routing) -> None:
        """Only now does the host know the sizes."""
        received_Pe, sent_on_host, received_on_host = r.counts.wait()
        r.counts = None
        r.sent_rows, r.received_rows = sent_on_host.sum(1).tolist(), received_on_host.sum(1).tolist()
        r.place_received(received_Pe, received_on_host, align=self.align)

    def to_experts(self, x_TD, weight_TK, r, direction):
        wide = None if weight_TK is None else weight_TK.dtype
        payload_TC = x_TD
        if self.fp8:
            payload_TC = as_bytes(quantised(x_TD, direction), more=0 if wide is None else wide.itemsize)
        sent = payload_TC.index_select(0, r.order_N.div(r.expert_TK.shape[1], rounding_mode="floor"))
        if weight_TK is not None:
            sent = attach(sent, weight_TK.flatten().index_select(0, r.order_N)[:, None])
        finish = lambda received_MC: expert_rows(received_MC, r, x_TD, width=payload_TC.shape[1], weight=wide)
        return self._exchange(sent, r.received_rows, r.sent_rows, direction).then(finish)

    def to_tokens(self, rows_RD, weight_R, r, direction):
        kinds = kinds_of(rows_RD, weight_R)

        def finish(received_NC):
            rows_ND, *weight_N = detach(received_NC, *kinds)
            weight_TK = weight_N[0].flatten()[r.row_of_TK] if weight_N else None
            return sum_copies(rows_ND, r.row_of_TK), weight_TK

        return self._exchange(expert_outputs(rows_RD, weight_R, r), r.sent_rows, r.received_rows, direction).then(finish)

    def _exchange(self, rows: Tensor, out_rows: list[int], in_rows: list[int], direction: str) -> Pending:
        return exchange(rows, self.groups[direction], self.transport, received=out_rows, sent=in_rows)


def expert_rows(
    received_MC: Tensor, r: Routing, like_TD: Tensor, *, width: int, weight: torch.dtype | None
) -> tuple[Tensor | Fp8Rows, Tensor | None]:
    """What arrived (payload of `width` columns, perhaps a weight) -> rows_RD in expert order and weight_R. Payload of bytes is FP8."""
    kinds = [(width, received_MC.dtype)] + ([] if weight is None else [(1, weight)])
    rows_RC, *weight_R = detach(permute(received_MC, r.copy_of_R), *kinds)
    rows = Fp8Rows(from_bytes(rows_RC, like_TD.shape[1]), like_TD.dtype) if received_MC.dtype == torch.uint8 else rows_RC
    return rows, weight_R[0].flatten() if weight_R else None


def expert_outputs(rows_RD: Tensor, weight_R: Tensor | None, r: Routing) -> Tensor:
    """Rows without padding, as they came, with their weights: (M, C)."""
    sent = rows_RD.index_select(0, r.row_of_M)
    return sent if weight_R is None else attach(sent, weight_R.index_select(0, r.row_of_M)[:, None])


def kinds_of(rows_RD: Tensor, weight_R: Tensor | None, weights: int = 1) -> list[tuple[int, torch.dtype]]:
    """What `detach` finds in a row of that many weights."""
    return [(rows_RD.shape[1], rows_RD.dtype)] + ([] if weight_R is None else [(weights, weight_R.dtype)])
