"""One optimizer step, projected: every action of every pipeline rank on a clock, then the reduction, the update and the weights' way back.

*Ideal* is calibrated kernels and links and nothing else. *Expected* adds what `config.stack.terms` names, each by simulating the step again
with it; terms are independent, so squares of their intervals add. What is left between expected and a published run is nobody's: no
constant here was fitted to one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from ...conf.errors import ConfigError, most_like
from ...conf.schema import Config
from ...parallel.schedule import SCHEDULES
from ...parallel.schedule.ops import Lists
from ...parallel.timeline import Order, Span, Timeline, order, simulate
from ...train import cost
from ...train.rank_share import all_actions, stage_layers
from .actions import Cost, RankCosts
from .rates import Rates
from .recorded import Recorded
from .stage import Load, micro_batch_tokens, stages
from .teams import as_teams

PARTS = ("compute", "recompute", "exposed communication", "bubble", "reduce", "optimizer")
OPTIMIZER_BYTES = {"adamw": 3, "muon": 2}  # tensors read and written for each element, beside the gradient that is read


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float
    likely: float
    high: float

    def map(self, function) -> "Interval":
        """Of a quantity that grows or falls with this one."""
        values = sorted(map(function, (self.low, self.high)))
        return Interval(low=values[0], likely=function(self.likely), high=values[1])


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds. `parts`: of the ideal step, by `PARTS`, mean over pipeline ranks; they add up to `ideal`. `terms`: what each adds to it."""

    ideal: float
    expected: Interval
    parts: Mapping[str, float]
    terms: Mapping[str, Interval]
    timeline: Timeline
    tokens: int  # of a step

    @property
    def breakdown(self) -> dict[str, float]:
        """Parts and terms: they add up to the expected step."""
        return {**self.parts, **{name: term.likely for name, term in self.terms.items()}}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a step may have beside calibrated kernels and links; these are none."""

    kernels: float = 1.0  # times what compute takes
    links: float = 1.0  # times what exchanges take
    imbalance: float | tuple[float, ...] = 1.0  # rows of the busiest rank's experts, of the mean; in all MoE layers, or in each
    pipeline_traffic: float = 1.0  # times a transfer's time
    jitter: float = 0.0  # standard deviation of devices' speed, of itself: every exchange and every reduction waits for the slowest
    host_stalls: float = 0.0  # share of the step


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not change with conditions. `layers`: of each stage."""

    config: Config
    rates: Rates
    layers: list[range]
    lists: Lists
    order: Order
    directions: int  # of the schedule: with two, every stage is on two ranks

    @classmethod
    def of(cls, config: Config) -> "Job":
        config = as_teams(config)
        p, schedule = config.parallel, SCHEDULES[config.parallel.schedule]
        which = p.schedule, p.pp, p.chunks, config.num_micro_batches
        return cls(
            config=config,
            rates=Rates(cluster=config.cluster, linear=config.precision.products, plain=config.precision.compute),
            layers=list(stage_layers(config)),
            lists=all_actions(*which),
            order=_order(*which),
            directions=len(schedule.place(p.pp, p.chunks)),
        )


@lru_cache(maxsize=256)
def _order(schedule: str, pp: int, chunks: int, num: int) -> Order:
    return order(all_actions(schedule, pp, chunks, num))


def project_step(config: Config, *, terms: bool = True, recorded: Recorded | None = None) -> StepEstimate:
    """Of a configuration that `validate` passes. `terms=False`: the ideal step alone. `recorded`: routing, in place of the term imbalance.
    Raises ConfigError for a term that is none."""
    job = Job.of(config)
    seconds, parts, timeline = _simulate(job, Conditions())
    values = {name: (term.low, term.likely, term.high) for name, term in config.stack.terms.items()} if terms else {}
    if recorded and "imbalance" in values:
        values["imbalance"] = recorded.spread(config)
    found = {name: _term(job, name, ends, seconds) for name, ends in values.items()}
    return StepEstimate(
        ideal=seconds, expected=_sum(seconds, found), parts=parts, terms=found, timeline=timeline, tokens=config.train.global_batch_tokens
    )


def _term(job: Job, name: str, ends: tuple, ideal: float) -> Interval:
    """`ends`: what the condition is at least, likely, and at most."""
    known = tuple(Conditions.__dataclass_fields__)
    if name not in known:
        raise ConfigError(f"stack.terms.{name}", name, f"is no term: there are {', '.join(known)}", most_like(name, known))
    at = {value: _simulate(job, Conditions(**{name: value}))[0] - ideal for value in set(ends)}
    return Interval(low=min(at.values()), likely=at[ends[1]], high=max(at.values()))


def _sum(seconds: float, terms: Mapping[str, Interval]) -> Interval:
    likely = seconds + sum(t.likely for t in terms.values())
    below = math.sqrt(sum((t.likely - t.low) ** 2 for t in terms.values()))
    above = math.sqrt(sum((t.high - t.likely) ** 2 for t in terms.values()))
    return Interval(low=likely - below, likely=likely, high=likely + above)


# ---------------------------------------------------------------- one step under given conditions


def _simulate(job: Job, conditions: Conditions) -> tuple[float, dict[str, float], Timeline]:
    costs = action_costs(job, conditions)
    hop = _hop_seconds(job.config, job.rates) * conditions.pipeline_traffic
    timeline = _timeline(job, costs, hop)
    if (crowd := _crowd(job.config, costs, timeline)) > 1:
        costs = [[c.times(crowd) for c in of_rank] for of_rank in costs]
        timeline = _timeline(job, costs, crowd * hop)
    tails = [_Tail.of(job, spans) for spans in timeline.spans]
    turns = processes_per_core(job.config)  # in which all take part
    reduced = timeline.makespan + turns * (max(timeline.makespan, *(tail.reduced for tail in tails)) - timeline.makespan)
    gather = turns * max(tail.gather for tail in tails)
    update = turns * (max(tail.update for tail in tails) + job.config.stack.host_us_per_step * 1e-6)
    total = (reduced + gather + update) * (1 + conditions.host_stalls)
    mean = lambda name: sum(getattr(c, name) for of_rank in costs for c in of_rank) / len(costs)
    parts = {
        "compute": mean("compute") - mean("again"),
        "recompute": mean("again"),
        "exposed communication": mean("exposed"),
        "reduce": reduced - timeline.makespan + gather,
        "optimizer": update,
    }
    parts["bubble"] = max(0.0, total - sum(parts.values()))  # what is left: ranks wait for others
    return total, {name: parts[name] for name in PARTS}, timeline


def action_costs(job: Job, conditions: Conditions) -> list[list[Cost]]:
    slowest = 1 + conditions.jitter * _farthest(job.config.parallel.world_size)
    load = Load(rows=conditions.imbalance, compute=conditions.kernels * slowest, links=conditions.links)
    made, pairs, stack = stages(job.config, job.rates, load, job.layers), {}, job.config.stack
    return [RankCosts(made, hidden=stack.hidden, peer_wait=stack.peer_wait, pairs=pairs).of(actions) for actions in job.lists]


def _timeline(job: Job, costs: Sequence[Sequence[Cost]], hop: float) -> Timeline:
    seconds = {action: c.seconds for actions, of_rank in zip(job.lists, costs) for action, c in zip(actions, of_rank)}
    return simulate(job.lists, seconds.__getitem__, lambda sender, receiver: hop, job.order)


def _crowd(config: Config, costs: Sequence[Sequence[Cost]], timeline: Timeline) -> float:
    """Where devices are cores of one machine, and processes more than cores: how many times slower all is. Moving bytes is the cores' work,
    too; who has no action leaves its core to others: so many processes as have one, on average, share the cores."""
    busy = sum(c.seconds for of_rank in costs for c in of_rank) / (len(costs) * timeline.makespan)
    return busy * processes_per_core(config)


def processes_per_core(config: Config) -> float:
    """At least 1; 1 of GPUs."""
    on_cpu = config.cluster.device.startswith("CPU")
    return max(1.0, config.parallel.world_size * config.launch.threads / config.cluster.gpus_per_node) if on_cpu else 1.0


def _farthest(num: int) -> float:
    """Of so many draws from a normal distribution, the largest to be expected, in standard deviations (Blom 1958)."""
    return NormalDist().inv_cdf((num - 0.375) / (num + 0.25)) if num > 1 else 0.0


def _hop_seconds(config: Config, rates: Rates) -> float:
    """From one pipeline rank to the next: a micro-batch's activations."""
    p, width = config.parallel, cost.ELEMENT_BYTES[config.precision.compute]
    if p.pp == 1:
        return 0.0
    num_bytes = micro_batch_tokens(config) * config.model.dim * width
    return rates.link_seconds(0, num_bytes) if p.world_size <= config.cluster.gpus_per_node else rates.link_seconds(num_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class _Tail:
    """Of one rank: when its gradients are reduced, a stage's from the end of its last action on; seconds of the update; and of the weights'
    way back to all replicas."""

    reduced: float
    update: float
    gather: float

    @classmethod
    def of(cls, job: Job, spans: Sequence[Span]) -> "_Tail":
        c, p, rates = job.config, job.config.parallel, job.rates
        width, main = cost.ELEMENT_BYTES[c.precision.compute], max(4, cost.ELEMENT_BYTES[c.precision.compute])
        dense_in_node, experts_in_node = min(p.dp, c.cluster.gpus_per_node), max(1, min(p.edp, c.cluster.gpus_per_node // p.ep))
        last = {op.stage: span for span in spans for op in span.action}
        first = {op.stage: span for span in reversed(spans) for op in span.action}
        done = {stage: span.end for stage, span in last.items()}
        reduced = gather = held = owned = 0.0
        for stage in sorted(done, key=done.__getitem__):
            ends = {"embedding": stage == 0, "head": stage == len(job.layers) - 1}
            dense, experts = cost.rank_params(c.model, p, layers=job.layers[stage], **ends)
            groups = (dense, p.dp * job.directions, dense_in_node), (experts, p.edp * job.directions, experts_in_node)
            mine = sum(n / replicas for n, replicas, _ in groups)
            if c.stack.sharded_weights:  # both travel with every block
                reduced, held, owned = max(reduced, done[stage]), held + mine, owned + mine
                continue
            scatter, back = (sum(rates.ring_seconds(w * n, *group) for n, *group in groups) for w in (main, width))
            if c.stack.overlap_reduce:
                reduced = max(done[stage], max(reduced, last[stage].start) + scatter)
                gather += max(0.0, back - (first[stage].end - first[stage].start))
            else:
                reduced, gather = max(reduced, done[stage]) + scatter, gather + back
            held, owned = held + dense + experts, owned + mine
        return cls(reduced=reduced, update=_update_seconds(c, rates, owned, held), gather=gather)


def _update_seconds(config: Config, rates: Rates, owned: float, held: float) -> float:
    """Masters and moments read and written, gradients read; then weights are cast to FP8, once a step."""
    o, compute = config.optim, config.precision.compute
    main, moment = max(4, cost.ELEMENT_BYTES[compute]), cost.ELEMENT_BYTES[o.moment_precision(compute)]
    per_element = 2 * main + main + 2 * moment * (OPTIMIZER_BYTES[o.algorithm] - 1) + cost.ELEMENT_BYTES[compute]
    seconds = rates.memory_seconds(owned * per_element, "other")
    if config.precision.linear == "fp8":
        seconds += rates.memory_seconds(held * (2 + 2), "quantise")
    return seconds + rates.memory_seconds(held * main, "other")  # gradients set to zero
