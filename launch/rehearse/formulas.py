"""What the planner's formulas say of a rank, as a rehearsal measures it: to be shown side by side."""

from dataclasses import dataclass

from ...conf.schema import Config
from ...train import cost
from ...train.block_ops import block_calls, end_calls
from ...train.memory import rank_memory
from ...train.rank_share import Share, is_routed, rank_share
from ...train.traffic import Rows, rank_traffic
from .routing import Routing


@dataclass(frozen=True, kw_only=True)
class Formulas:
    """As in `rank.Rehearsal`. `peak_bytes`: what tensors take, without the allowance for fragmentation."""

    params: dict[str, int]
    flops: int
    peak_bytes: int
    by_category: dict[str, int]
    peak_at: str
    sent: dict[tuple[str, str], float]


def formulas(config: Config, rank: int, *, imbalance: float = 1.0) -> Formulas:
    p = config.parallel
    pp_rank, edp_rank, ep_rank = rank // p.dp, rank // p.ep % p.edp, rank % p.ep
    share, routing = rank_share(config, pp_rank), Routing(config, ep_rank, imbalance)
    dense, experts = cost.rank_params(config.model, p, layers=share.layers, embedding=share.has_first, head=share.has_last)
    memory = rank_memory(config, pp_rank, place=(edp_rank, ep_rank), imbalance=imbalance)
    parts = ("weights", "main_grads", "optimizer", "casts", "activations", "working", "exchange", "pipeline")
    sent = rank_traffic(config, pp_rank, edp_rank=edp_rank, ep_rank=ep_rank, rows=_rows(config, routing, share))
    return Formulas(
        params={"dense": dense, "expert": experts},
        flops=_flops(config, share, routing),
        peak_bytes=memory.allocated,
        by_category={part: getattr(memory, part) for part in parts},
        peak_at=memory.peak_at,
        sent=dict(sent),
    )


def _flops(config: Config, share: Share, routing: Routing) -> int:
    """Of products and attention in all micro-batches, what is recomputed too; the optimizer's are not in it."""
    m, p, last = config.model, config.parallel, share.num_stages - 1
    how = {"tokens": routing.tokens, "width": cost.ELEMENT_BYTES[config.precision.compute]}
    block = dict(how, seq_len=config.data.seq_len, fp8=config.precision.linear == "fp8", ep=p.ep, recompute=config.train.recompute)
    rows = sum(routing.own_rows()) if m.num_moe_layers else None
    flops = 0
    for (stage, layers), (_, num) in zip(share.stages.items(), _passes(config, share)):
        calls = [call for layer in layers for call in block_calls(m, layer, rows=rows, **block)]
        calls += end_calls(m, embed=stage == 0, head=stage == last, **how)
        flops += num * sum(call.flops for call in calls)
    return flops


def _rows(config: Config, routing: Routing, share: Share) -> Rows | None:
    """That the exchanges of a step move, in all."""
    p, m = config.parallel, config.model
    if p.ep == 1 or not m.num_moe_layers:
        return None
    places = min(p.ep, config.cluster.gpus_per_node)
    if p.dispatcher == "deepep":
        rows = routing.once(places)
    elif p.dispatcher == "hierarchical":
        place, own = routing.ep_rank % places, routing.own
        sent, received = (counts.unflatten(0, (-1, places)) for counts in routing.to_nodes(p.ep // places))
        inside = received[:, place, own + 1 :].sum(0).tolist(), received[:, :, :own].sum((0, 2)).tolist()
        rows = Rows(
            sent=sent[:, 0, own].tolist(), received=received[:, place, own].tolist(), inside_sent=inside[0], inside_received=inside[1]
        )
    else:
        sent, received = routing.to_ranks().sum(2).tolist()
        rows = Rows(sent=sent, received=received)
    exchanges = sum(num * sum(is_routed(m, layer) for layer in layers) for layers, num in _passes(config, share))
    return rows.times(exchanges)


def _passes(config: Config, share: Share) -> list[tuple[range, int]]:
    """The blocks of each stage, and how many of a step's micro-batches go through them here."""
    num, ways = config.num_micro_batches, range(len(share.placements))
    return [(layers, sum(share.micro_batches(stage, num, way) for way in ways)) for stage, layers in share.stages.items()]
