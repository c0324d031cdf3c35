"""Adapter to DeepEP's `Buffer` (github.com/deepseek-ai/DeepEP, docs/legacy.md): its kernels for NVLink and RDMA instead of NCCL. BF16.

A token goes once to each rank that has experts for it; here its copies are laid out by expert, and added up before they return.

T tokens on this rank   K top-k   E slots   e slots on this rank   D model dim   H tokens received   R rows for the experts
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.fp8_rows import Fp8Rows
from ...kernels.grouped import RowGroups
from ...kernels.permute import permute, permute_quantised, sum_copies
from ...kernels.quantise import Quantised
from ...kernels.row_maps import row_maps
from ..phases import Pending
from .routing import Routing
from .wire import quantised


def deep_ep_buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Any:
    """Collective. As large as tokens of that many bytes in BF16 want it. ImportError without DeepEP."""
    from deep_ep import Buffer

    ranks, nvl_bytes, rdma_bytes = group.size(), 0, 0
    for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
        nvl_bytes = max(nvl_bytes, config.get_nvl_buffer_size_hint(hidden_bytes, ranks))
        rdma_bytes = max(rdma_bytes, config.get_rdma_buffer_size_hint(hidden_bytes, ranks))
    return Buffer(group, nvl_bytes, rdma_bytes)


def buffer_bytes(ranks: int, hidden_bytes: int, places: int = 8) -> tuple[int, int]:
    """What DeepEP's own hints (`csrc/config.hpp`, its usual 20 SMs) make of tokens of that many bytes: for NVLink and for RDMA. Every
    channel has room for some hundred tokens from each peer of a node, and from each node twice 140; with a token 128 experts, their weights
    and 128 scales. `places`: ranks of a node."""
    nodes, peers, channels = max(1, ranks // places), min(ranks, places), 10
    chunk = next((tokens for most, tokens in ((8, 256), (64, 288), (96, 480), (128, 560)) if ranks <= most), 720)
    token = hidden_bytes + 8 + 128 * (8 + 4 + 4)
    nvl = channels * peers * (4 * (2 * nodes + 3) + chunk * token)
    rdma = channels * nodes * 2 * (4 * (2 * places + 2) + 140 * (token + 16)) + (1 << 20) if nodes > 1 else 0
    return nvl, rdma


@dataclass(frozen=True)
class Arrival:
    """An event of DeepEP's communication stream."""

    event: Any

    def wait(self) -> None:
        self.event.current_stream_wait()


@dataclass(kw_only=True)
class Sent:
    """`Routing.plan`. `row_of_HK`: row in R of the k-th copy of what came; where that is another rank's, any of its rows that is here."""

    slot_TK: Tensor
    handle: Any = None  # DeepEP's, from the first dispatch on
    here_HK: Tensor | None = None
    row_of_HK: Tensor | None = None


class DeepEpDispatcher:
    """`make_buffer(hidden_bytes)`: collective, called once, before the first dispatch."""

    def __init__(self, *, num_experts: int, align: int, ep: int, make_buffer: Callable[[int], Any], fp8: bool = False):
        self.num_experts, self.align, self.fp8, self.make_buffer = num_experts, align, fp8, make_buffer
        self.own, self.buffer = num_experts // ep, None

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        slot_TK = r.slots(slot_of_E)
        counts_E = slot_TK.new_zeros(self.num_experts).scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK).flatten())
        r.record_load(counts_E, slot_of_E)
        r.plan = Sent(slot_TK=slot_TK)

    def wait_counts(self, r: Routing) -> None:
        """DeepEP exchanges counts in the first dispatch, and waits for them there."""

    def to_experts(self, x_TD, weight_TK, r, direction):
        payload = x_TD
        if self.fp8:
            q = quantised(x_TD, direction)
            payload = q.codes, q.scales.t().contiguous()
        if r.plan.handle is not None:
            came, *_, event = self.buffer.dispatch(payload, handle=r.plan.handle, async_finish=True)
            return Pending(work=Arrival(event), finish=lambda keep=payload: (self._rows(came, r, x_TD.dtype), None))

        if self.buffer is None:
            self.buffer = self.make_buffer(x_TD.shape[1] * torch.bfloat16.itemsize)
        slot_TK = r.plan.slot_TK
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(slot_TK, self.num_experts)
        came, expert_HK, weight_HK, sizes, r.plan.handle, event = self.buffer.dispatch(
            payload,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=slot_TK,
            topk_weights=weight_TK,
            expert_alignment=self.align,
            async_finish=True,
        )

        def finish(keep=payload):
            self._place(r, expert_HK, sum(sizes))
            return self._rows(came, r, x_TD.dtype), permute(weight_HK.flatten(), r.copy_of_R)

        return Pending(work=Arrival(event), finish=finish)

    def _place(self, r: Routing, expert_HK: Tensor, num_rows: int) -> None:
        """`expert_HK`: of this rank's, -1 for another rank's: those get the last rows, which are cut off."""
        r.plan.here_HK = expert_HK >= 0
        maps = row_maps(expert_HK.long().masked_fill(~r.plan.here_HK, self.own), self.own + 1, self.align)
        r.copy_of_R, r.groups = maps.copy_of_R[:num_rows], RowGroups(ends_e=maps.ends_e[:-1], align=self.align)
        one_H1 = maps.row_of_TK.masked_fill(~r.plan.here_HK, -1).amax(1, keepdim=True)
        r.plan.row_of_HK = torch.where(r.plan.here_HK, maps.row_of_TK, one_H1)

    def _rows(self, came: Tensor | tuple[Tensor, Tensor], r: Routing, dtype: torch.dtype) -> Tensor | Fp8Rows:
        row_of_R = r.copy_of_R.div(r.expert_TK.shape[1], rounding_mode="floor")
        if isinstance(came, tuple):
            return Fp8Rows(permute_quantised(Quantised(came[0], came[1].t().contiguous()), row_of_R), dtype)
        return permute(came, row_of_R)

    def to_tokens(self, rows_RD, weight_R, r, direction):
        here_HK, row_of_HK = r.plan.here_HK, r.plan.row_of_HK
        sum_HD = sum_copies(rows_RD, row_of_HK, here_HK.float())
        weight_HK = None if weight_R is None else weight_R[row_of_HK] * here_HK
        x_TD, weight_TK, event = self.buffer.combine(sum_HD, r.plan.handle, topk_weights=weight_HK, async_finish=True)
        return Pending(work=Arrival(event), finish=lambda keep=(sum_HD, weight_HK): (x_TD, weight_TK))
