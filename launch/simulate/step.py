"""One optimizer step, projected: every action of every pipeline rank on a clock, then the reduction, the update and the weights' way back.

*Ideal* is calibrated kernels and links and nothing else. *Expected* adds what `config.stack.terms` names, each by simulating the step again
with it; terms are independent, so squares of their intervals add. What is left between expected and a published run is nobody's: no
constant here was fitted to one.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...conf.errors import ConfigError, most_like
from ...conf.schema import Config, TermConfig
from ...parallel.schedule import SCHEDULES
from ...parallel.schedule.ops import Lists
from ...parallel.timeline import Span, Timeline, simulate
from ...train import cost
from ...train.engine import stage_layers
from .actions import Cost, RankCosts
from .rates import Rates
from .stage import Load, micro_batch_tokens, stages

PARTS = ("compute", "recompute", "exposed communication", "bubble", "reduce", "optimizer")
OPTIMIZER_BYTES = {"adamw": 3, "muon": 2}  # tensors read and written for each element, beside the gradient that is read
SEEDS = 3  # of jitter


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
    imbalance: float = 1.0  # rows of the busiest rank's experts, of the mean
    pipeline_traffic: float = 1.0  # times a transfer's time
    jitter: float = 0.0  # standard deviation of an action's duration, of itself
    host_stalls: float = 0.0  # share of the step


def project_step(config: Config, *, terms: bool = True) -> StepEstimate:
    """Of a configuration that `validate` passes. `terms=False`: the ideal step alone. Raises ConfigError for a term that is none."""
    rates = Rates(cluster=config.cluster, linear=config.precision.products, plain=config.precision.compute)
    at = lambda **conditions: _simulate(config, rates, Conditions(**conditions))
    seconds, parts, timeline = at()
    found = {name: _term(config, name, term, at, seconds) for name, term in config.stack.terms.items()} if terms else {}
    return StepEstimate(
        ideal=seconds, expected=_sum(seconds, found), parts=parts, terms=found, timeline=timeline, tokens=config.train.global_batch_tokens
    )


def _term(config: Config, name: str, term: TermConfig, at, ideal: float) -> Interval:
    if name not in Conditions.__dataclass_fields__:
        known = tuple(Conditions.__dataclass_fields__)
        raise ConfigError(f"stack.terms.{name}", name, f"is no term: there are {', '.join(known)}", most_like(name, known))
    added = [at(**{name: value})[0] - ideal for value in (term.low, term.likely, term.high)]
    return Interval(low=min(added), likely=added[1], high=max(added))


def _sum(seconds: float, terms: Mapping[str, Interval]) -> Interval:
    likely = seconds + sum(t.likely for t in terms.values())
    below = math.sqrt(sum((t.likely - t.low) ** 2 for t in terms.values()))
    above = math.sqrt(sum((t.high - t.likely) ** 2 for t in terms.values()))
    return Interval(low=likely - below, likely=likely, high=likely + above)


# ---------------------------------------------------------------- one step under given conditions


def _simulate(config: Config, rates: Rates, conditions: Conditions) -> tuple[float, dict[str, float], Timeline]:
    """The median over seeds, where there is jitter."""
    p = config.parallel
    lists = SCHEDULES[p.schedule].actions(p.pp, p.chunks, config.num_micro_batches)
    costs = action_costs(config, rates, conditions, lists)
    seeds = range(SEEDS) if conditions.jitter else [None]
    steps = sorted((_one(config, rates, conditions, lists, costs, seed) for seed in seeds), key=lambda step: step[0])
    return steps[len(steps) // 2]


def action_costs(config: Config, rates: Rates, conditions: Conditions, lists: Lists) -> list[list[Cost]]:
    load = Load(rows=conditions.imbalance, compute=conditions.kernels, links=conditions.links)
    made, pairs = stages(config, rates, load), {}
    host = config.stack.host_us_per_layer * 1e-6 / 2  # a layer has two phases
    return [RankCosts(made, hidden=config.stack.hidden, host=host, pairs=pairs).of(actions) for actions in lists]


def _one(config: Config, rates: Rates, conditions: Conditions, lists: Lists, costs: list[list[Cost]], seed: int | None):
    noise = random.Random(seed)
    longer = lambda: 1.0 if seed is None else max(0.5, noise.gauss(1.0, conditions.jitter))
    seconds = {action: c.seconds * longer() for actions, of_rank in zip(lists, costs) for action, c in zip(actions, of_rank)}
    hop = _hop_seconds(config, rates) * conditions.pipeline_traffic
    timeline = simulate(lists, seconds.__getitem__, lambda sender, receiver: hop)
    tails = [_Tail.of(config, rates, spans) for spans in timeline.spans]
    reduced = max(timeline.makespan, *(tail.reduced for tail in tails))
    gather, update = max(tail.gather for tail in tails), max(tail.update for tail in tails)
    total = (reduced + gather + update) * (1 + conditions.host_stalls)
    mean = lambda name: sum(getattr(c, name) for of_rank in costs for c in of_rank) / len(costs)
    parts = {
        "compute": mean("compute") - mean("again"),
        "recompute": mean("again"),
        "exposed communication": mean("exposed"),
        "reduce": reduced - timeline.makespan + gather,
        "optimizer": update,
    }
    parts["bubble"] = total - sum(parts.values())  # what is left: ranks wait for others
    return total, {name: parts[name] for name in PARTS}, timeline


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
    def of(cls, config: Config, rates: Rates, spans: Sequence[Span]) -> "_Tail":
        c, p, layers = config, config.parallel, stage_layers(config)
        directions = len(SCHEDULES[p.schedule].place(p.pp, p.chunks))
        width, main = cost.ELEMENT_BYTES[c.precision.compute], max(4, cost.ELEMENT_BYTES[c.precision.compute])
        dense_in_node, experts_in_node = min(p.dp, c.cluster.gpus_per_node), max(1, min(p.edp, c.cluster.gpus_per_node // p.ep))
        done = {op.stage: span.end for span in spans for op in span.action}
        reduced = gather = held = owned = 0.0
        for stage in sorted(done, key=done.__getitem__):
            ends = {"embedding": stage == 0, "head": stage == len(layers) - 1}
            dense, experts = cost.rank_params(c.model, p, layers=layers[stage], **ends)
            groups = (dense, p.dp * directions, dense_in_node), (experts, p.edp * directions, experts_in_node)
            reduced = max(reduced, done[stage]) + sum(rates.ring_seconds(main * n, *group) for n, *group in groups)
            gather += sum(rates.ring_seconds(width * n, *group) for n, *group in groups)
            held, owned = held + dense + experts, owned + sum(n / replicas for n, replicas, _ in groups)
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
