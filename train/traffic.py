"""Bytes that one rank sends in one optimizer step, by collective and by link, as the code sends them: what a planner times, and what a
rehearsal counts.

    dispatch F, combine F, dispatch B, combine B    payload of token exchanges, padding of rows to 16 bytes included; phases as in
                                                    `parallel/dispatch/phases.py`: combine B takes gradients to experts
    counts                                          of rows, which go before a dispatch F
    pipeline                                        activations to the next stage, gradients to the one before
    reduce, gather                                  gradients, FP32, to owners; weights from owners, as a ring sends them
    scalars                                         what the step counts, and its norm

Links: "intra" inside a node, "inter" between nodes; what stays on its rank crosses none. A ring goes node by node and, as NCCL makes it, as
often as a node has ranks in it, each time entering at another: of each rank's bytes the same share crosses.

T tokens of a micro-batch   K top-k   E experts   D model dim
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..conf.schema import Config
from ..kernels.quantise import rows_bytes
from ..parallel.optimizer.whole import even_cuts
from . import cost
from .rank_share import Share, is_routed, rank_share

Sent = Counter[tuple[str, str]]  # (collective, link) -> bytes
ROUTER_SUMS = 3  # of each step's record, see `engine.ROUTER_SUMS`


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of token exchanges on their way to experts, of one rank. Back they go the other way.

    Without nodes: `sent` and `received` by rank of the expert-parallel group, and nothing inside. By nodes: those across, by node (the own
    one too), and the copies sent on inside it, by place in the node.
    """

    sent: Sequence[float]
    received: Sequence[float]
    inside_sent: Sequence[float] = ()
    inside_received: Sequence[float] = ()

    def times(self, n: float) -> "Rows":
        scale = lambda rows: [r * n for r in rows]
        return Rows(
            sent=scale(self.sent),
            received=scale(self.received),
            inside_sent=scale(self.inside_sent),
            inside_received=scale(self.inside_received),
        )


def rank_traffic(
    config: Config, pp_rank: int, *, edp_rank: int = 0, ep_rank: int = 0, rows: Rows | None = None, num: int | None = None, flags: int = 0
) -> Sent:
    """Of the rank in that place, in a step of `num` micro-batches (None: of the full batch).

    `rows`: those that its exchanges really moved, summed over layers and micro-batches; None: the expectation where each token's groups
    and experts are drawn evenly. `flags`: numbers that the caller of `train_step` adds to what is counted. With optim.engine=deepspeed
    gradients are summed by all-reduce; with Muon, which parts no matrix, a rank is taken to own the mean.
    """
    share, place = rank_share(config, pp_rank), _Place(config, pp_rank, edp_rank, ep_rank)
    num = config.num_micro_batches if num is None else num
    sent: Sent = Counter()
    exchanges = sum(
        share.micro_batches(stage, num, way) * sum(is_routed(config.model, layer) for layer in layers)
        for stage, layers in share.stages.items()
        for way in range(len(share.placements))
    )
    if exchanges and config.parallel.ep > 1:
        _add_exchanges(sent, config, place, rows or even_rows(config).times(exchanges), exchanges)
    _add_pipeline(sent, config, share, place, num)
    _add_gradients(sent, config, share, place)
    m = config.model
    counted = 1 + m.mtp_depth + 1 + ROUTER_SUMS + flags + m.num_moe_layers * m.num_experts
    world = range(config.parallel.world_size)
    place.ring(sent, "scalars", 8, world, trips=2)
    place.ring(sent, "scalars", 8 * counted, world, trips=2)
    return +sent  # links that nothing crosses are left out


@dataclass(frozen=True)
class _Place:
    config: Config
    pp_rank: int
    edp_rank: int
    ep_rank: int

    def at(self, pp_rank: int, edp_rank: int, ep_rank: int) -> int:
        return Share.rank(self.config, pp_rank, edp_rank, ep_rank)

    @property
    def own(self) -> int:
        return self.at(self.pp_rank, self.edp_rank, self.ep_rank)

    def beside(self, ep_rank: int) -> int:
        """In the expert-parallel group."""
        return self.at(self.pp_rank, self.edp_rank, ep_rank)

    def link(self, peer: int) -> str:
        gpus = self.config.cluster.gpus_per_node
        return "intra" if peer // gpus == self.own // gpus else "inter"

    def to(self, sent: Sent, name: str, peer: int, num_bytes: float) -> None:
        if peer != self.own:
            sent[name, self.link(peer)] += num_bytes

    def ring(self, sent: Sent, name: str, num_bytes: float, ranks: Sequence[int], *, trips: int = 1) -> None:
        """Each rank passes on all but its own share, once for a reduce-scatter or an all-gather, twice for an all-reduce."""
        passed = trips * num_bytes * (len(ranks) - 1) / len(ranks)
        nodes = len({rank // self.config.cluster.gpus_per_node for rank in ranks})
        across = passed * nodes / len(ranks) if nodes > 1 else 0
        sent[name, "inter"] += across
        sent[name, "intra"] += passed - across


# ---------------------------------------------------------------- token exchanges


def _add_exchanges(sent: Sent, config: Config, place: _Place, rows: Rows, exchanges: int) -> None:
    m, p, row = config.model, config.parallel, row_bytes(config)
    own_experts = m.num_experts // p.ep
    if rows.inside_sent:
        nodes, places = _nodes(config)
        first = place.ep_rank - place.ep_rank % places
        across = [place.beside(node * places + place.ep_rank % places) for node in range(nodes)]
        inside = [place.beside(first + other) for other in range(places)]
        counts = own_experts + 1 + places
        legs = [(across, rows.sent, rows.received, ""), (inside, rows.inside_sent, rows.inside_received, " inside")]
    else:
        across = [place.beside(other) for other in range(p.ep)]
        counts, legs = own_experts, [(across, rows.sent, rows.received, "")]
    for peers, out, back, leg in legs:
        for peer, num_out, num_back in zip(peers, out, back, strict=True):
            for name, num in (("dispatch F", num_out), ("combine B", num_out), ("combine F", num_back), ("dispatch B", num_back)):
                place.to(sent, name, peer, num * row[name + leg])
    if p.dispatcher != "deepep":  # which has its own way
        for other in range(p.ep):
            place.to(sent, "counts", place.beside(other), 8 * counts * exchanges)


def row_bytes(config: Config) -> dict[str, int]:
    """Of a row on the wire, by collective and leg."""
    m, width = config.model, cost.ELEMENT_BYTES[config.precision.compute]
    fp8, wide, K = config.precision.linear == "fp8", max(4, width), config.model.top_k
    by_nodes = config.parallel.dispatcher in ("hierarchical", "deepep")
    whole = lambda num_bytes: -(-num_bytes // 16) * 16 if fp8 else num_bytes  # rows of bytes are multiples of 16
    payload = rows_bytes(1, m.dim) if fp8 else m.dim * width
    slot = 8 if width == 8 else 4
    beside = K * (wide + slot) if by_nodes else wide
    if config.parallel.dispatcher == "deepep":  # one row for both legs, up to a multiple of 16 bytes
        forth, back = payload, m.dim * width
        rows = {"dispatch F": forth + beside, "combine B": forth, "combine F": back, "dispatch B": back + K * wide}
        return {name + leg: -(-num_bytes // 16) * 16 for name, num_bytes in rows.items() for leg in ("", " inside")}
    bare = whole(payload + beside) - beside  # the payload with what fills it up, before what goes beside it
    return {
        "dispatch F": bare + beside,
        "dispatch F inside": whole(bare + wide),
        "combine B": whole(payload),
        "combine B inside": whole(payload),
        "combine F": m.dim * width,
        "combine F inside": m.dim * width,
        "dispatch B": m.dim * width + (K * wide if by_nodes else wide),
        "dispatch B inside": m.dim * width + wide,
    }


def even_rows(config: Config) -> Rows:
    """Of one exchange in the mean, where every choice of `num_limited_groups` groups, and of `top_k` different experts in them, is as
    likely as any other, and biases do not matter. DeepEP sends a token once to each node, and there once to each rank."""
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch_sequences * config.data.seq_len
    copies = tokens * m.top_k
    if p.dispatcher not in ("hierarchical", "deepep"):
        return Rows(sent=[copies / p.ep] * p.ep, received=[copies / p.ep] * p.ep)
    nodes, places = _nodes(config)
    across = [tokens * reached(m.num_experts, m.num_experts // nodes, m.top_k, m.num_groups, m.num_limited_groups)] * nodes
    on = [copies / places] * places
    if p.dispatcher == "deepep":
        on = [nodes * tokens * reached(m.num_experts, m.num_experts // p.ep, m.top_k, m.num_groups, m.num_limited_groups)] * places
    return Rows(sent=across, received=across, inside_sent=on, inside_received=on)


def _nodes(config: Config) -> tuple[int, int]:
    """Nodes of an expert-parallel group, ranks of it in each."""
    places = min(config.parallel.ep, config.cluster.gpus_per_node)
    return config.parallel.ep // places, places


@functools.cache
def reached(num_experts: int, part: int, top_k: int, num_groups: int, num_limited: int) -> float:
    """The probability that a token has at least one of its `top_k` experts among the first `part` of them (or any other run of `part` that
    lies as this one does to the groups), where `num_limited` groups, and experts in them, are drawn evenly without replacement.

    Exact: hypergeometric, over how many of the run's experts are in the groups drawn.
    """
    size = num_experts // num_groups
    overlaps = [max(0, min(part, (g + 1) * size) - g * size) for g in range(num_groups)]
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (groups drawn, experts of the run in them) -> choices
    for overlap in overlaps:
        ways += Counter({(n + 1, inside + overlap): count for (n, inside), count in ways.items() if n < num_limited})
    none = sum(count * math.comb(num_limited * size - inside, top_k) for (n, inside), count in ways.items() if n == num_limited)
    return 1 - none / (math.comb(num_groups, num_limited) * math.comb(num_limited * size, top_k))


# ---------------------------------------------------------------- the rest


def _add_pipeline(sent: Sent, config: Config, share: Share, place: _Place, num: int) -> None:
    tokens = config.train.micro_batch_sequences * config.data.seq_len
    boundary = tokens * config.model.dim * cost.ELEMENT_BYTES[config.precision.compute]
    for way, placement in enumerate(share.placements):
        for stage in share.stages:
            for other in (stage + 1, stage - 1):
                if 0 <= other < share.num_stages and placement[other] != share.pp_rank:
                    place.to(
                        sent,
                        "pipeline",
                        place.at(placement[other], place.edp_rank, place.ep_rank),
                        boundary * share.micro_batches(stage, num, way),
                    )


def _add_gradients(sent: Sent, config: Config, share: Share, place: _Place) -> None:
    width = cost.ELEMENT_BYTES[config.precision.compute]
    summing = 2 if config.optim.engine == "deepspeed" else 1
    groups = share.replicas(config, place.ep_rank)
    for group, numel, even in _buffers(config, share):
        ranks = groups[group]
        padded = even_cuts(numel, len(ranks))[-1] if even else numel
        place.ring(sent, "reduce", max(4, width) * padded, ranks, trips=summing)
        place.ring(sent, "gather", width * padded, ranks)


def _buffers(config: Config, share: Share) -> Iterator[tuple[str, int, bool]]:
    """Replica group, elements, and whether all owners' ranges are equally long, of each of `WholeOptimizer`'s buffers."""
    m, by_muon = config.model, config.optim.algorithm == "muon"
    table, last = m.vocab_size * m.dim, share.num_stages - 1
    for stage, layers in share.stages.items():
        dense, experts = cost.rank_params(m, config.parallel, layers=layers, embedding=stage == 0, head=stage == last)
        if m.embeds_at_head and stage in (0, last):
            if share.ends:
                yield "embedding", table, True
                dense -= table
            elif stage == last and stage and share.has_first:  # one embedding, which is the first stage's
                dense -= table
        blocks = [cost.block_params(m, layer) for layer in layers] if by_muon else []
        whole = sum(b.dense - b.router - b.norms for b in blocks)
        yield from (
            buffer for buffer in (("dense", dense - whole, True), ("dense", whole, False), ("expert", experts, not by_muon)) if buffer[1]
        )
