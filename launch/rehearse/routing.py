"""How many rows a rehearsed rank sends and receives: what it would have read of exchanges of counts.

Even: of each rank's T K copies every expert gets as many as whole numbers allow, what is left over going to other experts from each
sender. `imbalance`: the rehearsed rank's experts get that many times the mean, of every sender. By nodes, a token is sent to as many
as it is in the mean where groups and experts are drawn evenly (`traffic.reached`).

P ranks of the expert-parallel group   E experts   e experts of a rank   T tokens   K top-k
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...conf.schema import Config, ConfigError
from ...kernels.grouped import row_alignment
from ...parallel.host_reads import HostReads
from ...parallel.transport import Work
from ...train.model.decoder import DTYPES
from ...train.traffic import Rows, reached


class Routing:
    """Of the rank at place `ep_rank` of its expert-parallel group, alike in every layer and micro-batch. Raises ConfigError for an
    imbalance that no routing has."""

    def __init__(self, config: Config, ep_rank: int, imbalance: float = 1.0):
        m, p = config.model, config.parallel
        self.config, self.ep_rank = config, ep_rank
        self.tokens = config.train.micro_batch_sequences * config.data.seq_len
        self.copies, self.experts = self.tokens * m.top_k, m.num_experts
        self.own = m.num_experts // p.ep if m.num_moe_layers else 0
        most = min(p.ep, m.num_experts / m.top_k) if m.num_moe_layers else 1.0
        if not 1.0 <= imbalance <= max(1.0, most):
            rule = f"must be from 1 (even) to {most:g}: a token's {m.top_k} experts are different ones of {m.num_experts}, on {p.ep} ranks"
            raise ConfigError("imbalance", imbalance, rule, max(1.0, min(imbalance, most)))
        self.imbalance = imbalance

    def sent(self, sender: int) -> Tensor:
        """(E,) int64: copies from that rank of the group to each expert."""
        if self.imbalance == 1.0:
            return _spread(self.copies, self.experts, sender)
        first = self.ep_rank * self.own
        busy = min(self.tokens * self.own, round(self.imbalance * self.copies * self.own / self.experts))
        others = _spread(self.copies - busy, self.experts - self.own, sender)
        return torch.cat([others[:first], _spread(busy, self.own, sender), others[first:]])

    def own_rows(self) -> list[int]:
        """Of one micro-batch in products, of each of this rank's experts, padded to whole tiles."""
        align = row_alignment(DTYPES[self.config.precision.compute], fp8=self.config.precision.linear == "fp8")
        mine = slice(self.ep_rank * self.own, (self.ep_rank + 1) * self.own)
        received = torch.stack([self.sent(sender)[mine] for sender in range(self.config.parallel.ep)]).sum(0)
        return ((received + align - 1) // align * align).tolist()

    def to_ranks(self) -> Tensor:
        """(2, P, e): to each rank's experts, and from each rank to this one's."""
        p, mine = self.config.parallel.ep, slice(self.ep_rank * self.own, (self.ep_rank + 1) * self.own)
        return torch.stack([self.sent(self.ep_rank).view(p, -1), torch.stack([self.sent(sender)[mine] for sender in range(p)])])

    def to_nodes(self, nodes: int) -> Tensor:
        """(2, P, e + 1 + n): the same; tokens for the peer's node; copies for each rank there. See `dispatch/hierarchical.py`."""
        ranks = self.config.parallel.ep
        sides = [self._row(self.ep_rank, peer, nodes) for peer in range(ranks)]
        return torch.stack([torch.stack(sides), torch.stack([self._row(sender, self.ep_rank, nodes) for sender in range(ranks)])])

    def _row(self, sender: int, to: int, nodes: int) -> Tensor:
        by_node = self.sent(sender).view(nodes, -1)
        copies_n = by_node[to // (self.config.parallel.ep // nodes)].view(-1, self.own).sum(1)
        tokens = self._tokens(int(copies_n.sum()), nodes)
        return torch.cat([self.sent(sender).view(self.config.parallel.ep, -1)[to], torch.tensor([tokens]), copies_n])

    def once(self, places: int) -> Rows:
        """Of one exchange that takes a token once to each node, and once to each of its `places` ranks."""
        ranks = self.config.parallel.ep
        place, nodes = self.ep_rank % places, ranks // places
        first, across = self.ep_rank - place, [node * places + place for node in range(nodes)]
        to_rank = lambda sender, rank: self._tokens(int(self.sent(sender).view(ranks, -1)[rank].sum()), ranks)
        to_node = lambda sender, node: self._tokens(int(self.sent(sender).view(nodes, -1)[node].sum()), nodes)
        return Rows(
            sent=[to_node(self.ep_rank, node) for node in range(nodes)],
            received=[to_node(sender, self.ep_rank // places) for sender in across],
            inside_sent=[sum(to_rank(sender, first + other) for sender in across) for other in range(places)],
            inside_received=[sum(to_rank(node * places + other, self.ep_rank) for node in range(nodes)) for other in range(places)],
        )

    def _tokens(self, copies: int, parts: int) -> int:
        """Of one sender, those that have any of `copies`, which go to one of `parts` equal shares of the experts."""
        m = self.config.model
        share = reached(m.num_experts, m.num_experts // parts, m.top_k, m.num_groups, m.num_limited_groups)
        load = copies * parts / self.copies  # over the mean
        wanted = round(self.tokens * (1 - (1 - share) ** load))
        return max(min(wanted, copies, self.tokens), -(-copies // m.top_k))


def _spread(total: int, num: int, turn: int) -> Tensor:
    """(num,) int64 that add up to `total`, as even as can be; what is left over begins at another place each `turn`."""
    each, over = divmod(total, num)
    counts = torch.full((num,), each)
    counts[(torch.arange(over) + turn * over) % num] += 1
    return counts


class MadeUp(HostReads):
    """For tensors on meta: counts as `routing` has them, and ones wherever else the step reads a value."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self.counts: dict[tuple[int, ...], Tensor] = {}

    def wait(self, tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def begin(self, tensor: Tensor, work: Work) -> Callable[[], Tensor]:
        r, shape = self.routing, tuple(tensor.shape)
        if shape not in self.counts:
            nodes = r.config.parallel.ep // (shape[2] - r.own - 1) if shape[2] > r.own else 0
            self.counts[shape] = r.to_nodes(nodes) if nodes else r.to_ranks()
            assert self.counts[shape].shape == shape
        return lambda: self.counts[shape]
