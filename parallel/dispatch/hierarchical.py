"""A token goes once to each node that has experts for it, and from there to them; its copies are added up in the node before they return.

Ranks of one place in their nodes exchange "across" nodes, ranks of one node "inside" it. From rank (node 0, place 0), a token whose
experts are on both ranks of node 1, and on its own rank:

    to_experts      (0, 0) ──── across: once ────▶ (1, 0) ── inside: a copy per expert ─▶ (1, 0), (1, 1)
                    (0, 0) ──── across: itself ──▶ (0, 0) ── inside ────────────────────▶ (0, 0)
    to_tokens       the same ways back; (1, 0) adds, in FP32, in the order of K, and sends one row; (0, 0) adds up nodes, in their order

With the token go its slots and weights. One exchange of counts gives the sizes of both legs.

T tokens on this rank   K top-k   G nodes   n ranks of a node   E slots   e slots on this rank   D model dim   C payload columns
P rows sent across   H rows that came across, to be sent on   Q copies sent on inside   M copies received   R rows for the experts
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.permute import sum_copies
from ...kernels.row_maps import row_maps
from ..host_reads import HostReads
from ..phases import Pending
from ..transport import DIRECT, Transport
from .alltoall import expert_outputs, expert_rows, kinds_of
from .counts import HostCounts
from .routing import Routing
from .wire import as_bytes, attach, detach, exchange, quantised


@dataclass(kw_only=True)
class Hops:
    """`Routing.plan`: sizes per peer of both legs, and who sends what on. Rows that return are numbered from 1: row 0 is zero.

    row_of_TG    (T, G)  of token t in what returns across from node g, 0 if it has no expert there; `Routing.row_of_TK`: of its k-th copy
    token_of_P   (P,)    what is sent across, by node
    row_of_HK    (H, K)  of the k-th copy of what was sent on, in what returns inside; 0 if it is not for this node
    copy_of_Q    (Q,)    h * K + k of what is sent on inside, by slot
    """

    slot_TK: Tensor | None  # until they have been sent
    row_of_TG: Tensor
    token_of_P: Tensor | None = None
    row_of_HK: Tensor | None = None
    copy_of_Q: Tensor | None = None
    across_sent: list[int]  # P in all; here and below, in the direction of the experts
    across_received: list[int]  # H
    inside_sent: list[int]  # Q
    inside_received: list[int]  # M


class HierarchicalDispatcher:
    """`groups`: "counts", the expert-parallel group, and of each direction ("F", "B") "F across", in the order of nodes, and "F inside".
    Ranks of the expert-parallel group are in the order of nodes."""

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
        self.nodes, self.places = groups["F across"].size(), groups["F inside"].size()
        self.node, self.place = groups["F across"].rank(), groups["F inside"].rank()
        self.reads, self.node_slots = reads or HostReads(), num_experts // self.nodes

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        slot_TK = r.slots(slot_of_E)
        counts_E = slot_TK.new_zeros(self.num_experts).scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK).flatten())
        r.record_load(counts_E, slot_of_E)
        node_TK = slot_TK.div(self.node_slots, rounding_mode="floor")
        wanted_GT = slot_TK.new_zeros(self.nodes, len(slot_TK)).scatter_(0, node_TK.t(), 1)
        row_of_TG = (wanted_GT.flatten().cumsum(0).view_as(wanted_GT) * wanted_GT).t().contiguous()
        r.row_of_TK = row_of_TG.gather(1, node_TK)
        r.plan = Hops(slot_TK=slot_TK, row_of_TG=row_of_TG, across_sent=[], across_received=[], inside_sent=[], inside_received=[])

        # To each peer: copies for its experts; and, of use to the one of this place: rows for its node, copies for each rank there.
        counts_Gne = counts_E.view(self.nodes, self.places, -1)
        rows_Gn1 = wanted_GT.sum(1)[:, None, None].expand(-1, self.places, 1)
        copies_Gnn = counts_Gne.sum(2)[:, None].expand(-1, self.places, -1)
        sent_PC = torch.cat([counts_Gne, rows_Gn1, copies_Gnn], 2).flatten(0, 1)
        r.counts = HostCounts(sent_PC, group=self.groups["counts"], transport=self.transport, reads=self.reads)

    def wait_counts(self, r: Routing) -> None:
        """Only now does the host know the sizes, of both legs."""
        received_PC, *on_host = r.counts.wait()
        r.counts = None
        sent_GnC, received_GnC = (counts_PC.unflatten(0, (self.nodes, -1)) for counts_PC in on_host)
        own, hops = self.node_slots // self.places, r.plan
        hops.across_sent, hops.across_received = sent_GnC[:, 0, own].tolist(), received_GnC[:, self.place, own].tolist()
        hops.inside_sent = received_GnC[:, self.place, own + 1 :].sum(0).tolist()
        hops.inside_received = received_GnC[:, :, :own].sum((0, 2)).tolist()
        r.place_received(received_PC[:, :own], on_host[1][:, :own], align=self.align, nodes=self.nodes)

        row_of_TG, tokens_T = hops.row_of_TG, torch.arange(len(hops.row_of_TG), device=hops.row_of_TG.device)
        token_of_row = row_of_TG.new_empty(1 + sum(hops.across_sent))  # the first stays whatever it becomes
        hops.token_of_P = token_of_row.scatter_(0, row_of_TG.flatten(), tokens_T.repeat_interleave(self.nodes))[1:]

    def to_experts(self, x_TD, weight_TK, r, direction):
        hops, top_k = r.plan, r.expert_TK.shape[1]
        columns = [] if weight_TK is None else [weight_TK]
        if hops.slot_TK is not None:
            columns.append(hops.slot_TK.to(torch.int64 if x_TD.itemsize == 8 else torch.int32))
            hops.slot_TK = None
        payload_TC = x_TD
        if self.fp8:
            payload_TC = as_bytes(quantised(x_TD, direction), more=sum(top_k * c.itemsize for c in columns))
        kinds = [(payload_TC.shape[1], payload_TC.dtype), *((top_k, c.dtype) for c in columns)]

        def send_on(received_HC: Tensor) -> Pending:
            rows_HC, *arrived = detach(received_HC, *kinds)
            if hops.row_of_HK is None:
                self._plan_copies(hops, arrived.pop())
            sent = rows_HC.index_select(0, hops.copy_of_Q.div(top_k, rounding_mode="floor"))
            if arrived:
                sent = attach(sent, arrived.pop().flatten().index_select(0, hops.copy_of_Q)[:, None])
            weight = None if weight_TK is None else weight_TK.dtype
            finish = lambda received_MC: expert_rows(received_MC, r, x_TD, width=rows_HC.shape[1], weight=weight)
            return self._exchange(sent, f"{direction} inside", hops.inside_received, hops.inside_sent).then(finish)

        sent = attach(payload_TC, *columns).index_select(0, hops.token_of_P)
        return self._exchange(sent, f"{direction} across", hops.across_received, hops.across_sent).then_issue(send_on)

    def _plan_copies(self, hops: Hops, slot_HK: Tensor) -> None:
        """Who gets copies of the rows that came across. Slots of other nodes come last, and are cut off."""
        slot_HK = slot_HK.long() - self.node * self.node_slots
        here_HK = (slot_HK >= 0) & (slot_HK < self.node_slots)
        maps = row_maps(slot_HK.masked_fill(~here_HK, self.node_slots), self.node_slots + 1, 1)
        hops.row_of_HK = (maps.row_of_TK + 1) * here_HK
        hops.copy_of_Q = maps.copy_of_R[: sum(hops.inside_sent)]

    def to_tokens(self, rows_RD, weight_R, r, direction):
        hops, top_k = r.plan, r.expert_TK.shape[1]

        def send_back(received_QC: Tensor) -> Pending:
            rows_QD, *weight_Q = detach(received_QC, *kinds_of(rows_RD, weight_R))
            sent = attach(sum_copies(rows_QD, hops.row_of_HK), *(weight[:, 0][hops.row_of_HK] for weight in weight_Q))
            return self._exchange(sent, f"{direction} across", hops.across_sent, hops.across_received, first=1).then(finish)

        def finish(received_PC: Tensor) -> tuple:
            rows_PD, *weight_PK = detach(received_PC, *kinds_of(rows_RD, weight_R, top_k))
            copies_K = torch.arange(top_k, device=rows_PD.device)
            weight_TK = weight_PK[0][r.row_of_TK, copies_K] if weight_PK else None
            return sum_copies(rows_PD, hops.row_of_TG), weight_TK

        sent = expert_outputs(rows_RD, weight_R, r)
        return self._exchange(sent, f"{direction} inside", hops.inside_sent, hops.inside_received, first=1).then_issue(send_back)

    def _exchange(self, rows: Tensor, group: str, received: list[int], sent: list[int], first: int = 0) -> Pending:
        pending = exchange(rows, self.groups[group], self.transport, received=received, sent=sent, first=first)
        return replace(pending, brief=group.endswith("inside"))
