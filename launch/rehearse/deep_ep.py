"""What stands for DeepEP's `Buffer` in a rehearsal: the same calls, on tensors without values, and a wire on which bytes are counted.

A token goes once to each node that has experts for it, to the rank of the sender's own place there, and from there once to each rank. With
it go its K experts and weights (4 bytes each), in forward; back comes one sum for each. Received tokens are tensors of torch's; the wire is
the buffer that DeepEP allocates once. What it keeps of a dispatch for the way back (`handle`) is as its source has it.

P ranks   K top-k   T tokens   H tokens received   D model dim
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.dispatch.deepep import buffer_bytes
from ...train.traffic import Rows
from .remember import META
from .routing import Routing


class Event:
    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """Of one rank, as `routing` says; `places`: ranks of the group in a node."""

    def __init__(self, group: dist.ProcessGroup, hidden_bytes: int, *, routing: Routing, places: int):
        self.group, self.routing, self.places = group, routing, places
        self.rows: Rows = routing.once(places)
        self.wire = torch.empty(sum(buffer_bytes(group.size(), hidden_bytes, places)), dtype=torch.uint8, device=META)

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple:
        count = lambda *shape: torch.empty(*shape, dtype=torch.int32, device=META)
        ranks = self.group.size()
        in_rank = torch.empty(len(topk_idx), ranks, dtype=torch.bool, device=META)
        return count(ranks), count(ranks // self.places), count(num_experts), in_rank, Event()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        expert_alignment: int = 1,
        **sizes: Any,
    ) -> tuple:
        parts = x if isinstance(x, tuple) else (x,)
        beside = 0 if topk_idx is None else 8 * topk_idx.shape[1]
        self._travel(sum(part[0].nbytes for part in parts) + beside, there=True)
        received = sum(self.rows.inside_received)
        came = tuple(part.new_empty(received, part.shape[1]) for part in parts)
        came = came if isinstance(x, tuple) else came[0]
        if handle is not None:
            return came, None, None, None, None, Event()
        top_k, across = topk_idx.shape[1], sum(self.rows.received)
        meta = torch.empty(received, 8, dtype=torch.uint8, device=META)
        heads = [
            torch.empty(*shape, dtype=torch.int32, device=META) for shape in ((len(topk_idx), len(self.rows.sent)), (across, self.places))
        ]
        experts, weights = topk_idx.new_empty(received, top_k), topk_weights.new_empty(received, top_k)
        handle = len(topk_idx), is_token_in_rank, meta, *heads
        return came, experts, weights, self.routing.own_rows(), handle, Event()

    def combine(self, x: Tensor, handle: Any, *, topk_weights: Tensor | None = None, **_: Any) -> tuple:
        num_tokens = handle[0]
        self._travel(x[0].nbytes + (0 if topk_weights is None else topk_weights[0].nbytes), there=False)
        weights = None if topk_weights is None else topk_weights.new_empty(num_tokens, topk_weights.shape[1])
        return x.new_empty(num_tokens, x.shape[1]), weights, Event()

    def _travel(self, row_bytes: int, *, there: bool) -> None:
        """Both legs, as exchanges over the whole group: rows of `row_bytes`, up to a multiple of 16."""
        wire, own, places = self.wire[: -(-row_bytes // 16) * 16], self.group.rank(), self.places
        r, first = self.rows, own - own % places
        across = {node * places + own % places: (r.sent[node], r.received[node]) for node in range(len(r.sent))}
        inside = {first + place: (r.inside_sent[place], r.inside_received[place]) for place in range(places)}
        for leg in (across, inside):
            out, back = ([leg.get(rank, (0, 0))[side] for rank in range(self.group.size())] for side in (0, 1))
            if not there:
                out, back = back, out
            rows = lambda counts: wire.expand(sum(counts), -1)
            dist.all_to_all_single(rows(back), rows(out), back, out, group=self.group, async_op=True)
