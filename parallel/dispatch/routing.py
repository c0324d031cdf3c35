"""What dispatchers know of one micro-batch, what they are asked for, and where copies that arrive go.

T tokens on this rank   K top-k   E experts, and slots   e experts on this rank   D model dim
S senders   M copies received   R rows for the experts, padding included
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.grouped import RowGroups
from ...kernels.row_maps import RowMaps, row_maps, rows_bound
from ..phases import Pending
from .counts import HostCounts


@dataclass(kw_only=True)
class Routing:
    """One micro-batch's choice of experts and, once its dispatcher knows them, its row maps. Backward uses the same maps again.

    row_of_TK     (T, K)  row in what comes back to this rank (local: row in R) that holds token t's k-th copy
    row_of_M      (M,)    row in R of each received copy
    copy_of_R     (R,)    the received copy (local: own copy t * K + k) in each row, -1 for padding
    """

    expert_TK: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)  # the router's losses and the like over tokens, detached: for the record
    load_E: Tensor | None = None  # this rank's copies per expert: for the record
    groups: RowGroups | None = None
    row_of_TK: Tensor | None = None
    row_of_M: Tensor | None = None
    copy_of_R: Tensor | None = None
    order_N: Tensor | None = None  # copies in expert order
    sent_rows: list[int] = field(default_factory=list)  # per peer
    received_rows: list[int] = field(default_factory=list)
    counts: HostCounts | None = None  # under way
    plan: Any = None  # what else its dispatcher keeps

    def slots(self, slot_of_E: Tensor | None) -> Tensor:
        """(T, K): where each copy is computed. None: expert i is in slot i."""
        return self.expert_TK if slot_of_E is None else slot_of_E[self.expert_TK]

    def record_load(self, counts_E: Tensor, slot_of_E: Tensor | None) -> None:
        """`counts_E`: this rank's copies per slot."""
        if self.load_E is None:
            self.load_E = counts_E if slot_of_E is None else counts_E[slot_of_E]

    def place(self, slot_of_E: Tensor | None, num_experts: int, align: int) -> RowMaps:
        """Look up slots, and give this rank's copies rows in their order."""
        maps = row_maps(self.slots(slot_of_E), num_experts, align)
        self.row_of_TK = maps.row_of_TK
        self.record_load(maps.counts_e, slot_of_E)
        return maps

    def place_received(self, counts_Se: Tensor, on_host_Se: Tensor, *, align: int, nodes: int = 1) -> None:
        """Give copies that arrive rows by expert, each expert's in the order of senders, without asking the device anything.

        They arrive by peer, then expert, then node of the sender: sender S = node * peers + peer. With one node, peers are the senders.
        """
        totals = on_host_Se.sum(0)
        padded = ((totals + align - 1) // align * align).tolist()
        num_copies, num_rows = int(totals.sum()), sum(padded)
        padded_e = (counts_Se.sum(0) + align - 1) // align * align
        ends_e = padded_e.cumsum(0)
        row_Se = ends_e - padded_e + counts_Se.cumsum(0) - counts_Se  # where a sender's copies for an expert begin
        counts_A, row_A = (t.unflatten(0, (nodes, -1)).permute(1, 2, 0).flatten() for t in (counts_Se, row_Se))  # as they arrive
        copies_M = torch.arange(num_copies, device=counts_Se.device)
        shift_A = row_A - (counts_A.cumsum(0) - counts_A)
        self.row_of_M = copies_M + shift_A.repeat_interleave(counts_A, output_size=num_copies)
        room = copies_M.new_full((rows_bound(num_copies, len(padded_e), align),), -1)
        self.copy_of_R = room[:num_rows].index_copy_(0, self.row_of_M, copies_M)
        self.groups = RowGroups(ends_e=ends_e.to(torch.int32), align=align, on_host=padded)


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
