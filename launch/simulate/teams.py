"""What other software has and this has not, to price runs that others published: GPUs that share a rank's matrices and sequences, weights
that are gathered for each block, FP8 with a scale for each tensor. `config.stack` asks for it; no run of ours starts with it.

A team of GPUs is one rank of the layout, and one device with all that its members have. What they send each other is bare: the outputs of
attention and of a dense feed-forward, gathered before and scattered after (sequence parallelism); keys and values of shared sequences are
taken to travel under attention. Gathers of weights run beside the phase before, and are bare where they take longer.
"""

from dataclasses import replace

from ...conf.rules import replaced
from ...conf.schema import Config
from ...train import cost
from .rates import Rates


def as_teams(config: Config) -> Config:
    """With a cluster whose devices are teams; and with FP8 weight gradients as fast as the rest, where scales are those of tensors."""
    size, c, r = config.stack.team, config.cluster, config.cluster.rates
    if size == 1 and config.stack.block_scales:
        return config
    alike = lambda table: {name: x for name, x in table.items() if config.stack.block_scales or name != "fp8_wgrad"}
    rates = replace(
        r, sms=r.sms * size, exchange_sms=r.exchange_sms * size, products=alike(r.products), products_half=alike(r.products_half)
    )  # fmt: skip
    cluster = replace(
        c, peak_tflops={name: peak * size for name, peak in c.peak_tflops.items()}, memory_tb_s=c.memory_tb_s * size,
        gpus_per_node=max(1, c.gpus_per_node // size), intra_node_gb_s=c.intra_node_gb_s * size, inter_node_gb_s=c.inter_node_gb_s * size,
        rates=rates,
    )  # fmt: skip
    return replaced(config, "cluster", cluster)


def team_seconds(config: Config, rates: Rates, name: str) -> dict[str, float]:
    """Of what a team's members send each other in one phase, by pass."""
    stack, t = config.stack, config.train
    times = {"attention": 2, "mlp": 2, "embed": 1, "head": 1, "predict": 3}.get(name, 0)
    if stack.tensor == 1 or not times:
        return {}
    rows = t.micro_batch_sequences * config.data.seq_len / stack.context
    sent = rows * config.model.dim * cost.ELEMENT_BYTES[config.precision.compute] * (stack.tensor - 1) / stack.tensor
    seconds = times * rates.link_seconds(0, sent * stack.team)  # all members at once, over the links of all
    again = {"attention": "attention", "mlp": "experts"}.get(name) in t.recompute
    return {"F": seconds, "B": seconds * (1 + again)}


def gather_seconds(config: Config, rates: Rates, *, dense: int, experts: int) -> dict[str, float]:
    """Of one phase's parameters on a rank, gathered in each pass, and of their gradients, scattered; by pass."""
    p, in_node = config.parallel, config.cluster.gpus_per_node
    if not config.stack.sharded_weights:
        return {}
    groups = (dense, p.dp, min(p.dp, in_node)), (experts / p.ep, p.edp, max(1, min(p.edp, in_node // p.ep)))
    of = lambda width: sum(rates.ring_seconds(width * n, ranks, inside) for n, ranks, inside in groups if n)
    width = cost.ELEMENT_BYTES[config.precision.compute]
    return {"F": of(width), "B": of(width) + of(max(4, width))}


def beside_gathers(alone: float, beside: float, gathered: float) -> float:
    """Seconds that gathers add to a phase's compute, which takes `alone`, or `beside` them throughout."""
    if not gathered:
        return 0.0
    if gathered >= beside:
        return gathered - alone
    return gathered * (1 - alone / beside)  # of so much compute, less is done meanwhile
