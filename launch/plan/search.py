"""From layouts to plans: a bound on each, then memory, rules and the simulation, the best bounds first, until none is below the best step.

What is compared is the ideal step. A bound is what the busiest pipeline rank computes, and the exchanges that its schedule cannot hide.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...conf.rules import check
from ...conf.schema import Config, ConfigError
from ...parallel.schedule import SCHEDULES
from ...train import memory
from ...train.rank_share import stage_layers
from ..simulate import StepEstimate, project_step
from ..simulate.rates import Rates
from ..simulate.stage import Compute, Exchange, Load, stages
from ..validate import validate
from .layouts import RECOMPUTE, Layout, candidates

MOST = 64  # layouts that are simulated


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A layout that fits, its ideal step, and the memory of its fullest rank."""

    layout: Layout
    config: Config
    step: StepEstimate
    memory: memory.Memory


@dataclass(kw_only=True)
class Search:
    """`best`: cheapest first. `smallest`: of the layouts that do not fit, that which is nearest to it, with its bytes."""

    best: list[Priced] = field(default_factory=list)
    tried: int = 0
    invalid: int = 0
    too_large: int = 0
    simulated: int = 0
    smallest: tuple[Layout, float] | None = None
    first_error: ConfigError | None = None


def search(
    config: Config, gpus: int, *, fixed: frozenset[str] = frozenset(), keep: int = 8, most: int = MOST, imbalance: float = 1.0
) -> Search:
    found = Search()
    bounds = _Bounds(config)
    queue = [(bounds.of(layout), i, layout) for i, layout in enumerate(candidates(config, gpus, fixed))]
    found.tried = len(queue)
    heapq.heapify(queue)
    while queue and found.simulated < most:
        bound, _, layout = heapq.heappop(queue)
        if len(found.best) >= keep and bound >= found.best[keep - 1].step.ideal:
            break
        priced = _priced(config, layout, found, recompute_fixed="train.recompute" in fixed, imbalance=imbalance)
        if priced:
            found.simulated += 1
            found.best = sorted([*found.best, priced], key=lambda p: p.step.ideal)
    return found


def _priced(config: Config, layout: Layout, found: Search, *, recompute_fixed: bool, imbalance: float) -> Priced | None:
    """With as little recomputation as fits."""
    capacity = config.cluster.memory_gb * 1e9
    choices = [layout.recompute] if recompute_fixed else list(RECOMPUTE)
    chosen = tried = fullest = None
    for recompute in [choices[-1], *choices[:-1]]:  # the smallest first: if that does not fit, nothing does
        chosen = replace(layout, recompute=recompute)
        tried = chosen.apply(config)
        fullest = fullest_rank(tried, imbalance, capacity)
        if recompute == choices[-1] and fullest.total > capacity:
            found.too_large += 1
            if found.smallest is None or fullest.total < found.smallest[1]:
                found.smallest = chosen, fullest.total
            return None
        if recompute != choices[-1] and fullest.total <= capacity:
            break
    else:
        chosen = replace(layout, recompute=choices[-1])
        tried = chosen.apply(config)
        fullest = fullest_rank(tried, imbalance)
    try:
        check_all(tried)
    except ConfigError as error:
        found.invalid += 1
        found.first_error = found.first_error or error
        return None
    return Priced(layout=chosen, config=tried, step=project_step(tried, terms=False), memory=fullest)


def check_all(config: Config) -> None:
    """As before a run, but that an optional package (a dispatcher's) need not be installed where a plan is made."""
    check(config)
    try:
        validate(config)
    except ConfigError as error:
        if error.field != "parallel.dispatcher" or "not installed" not in error.rule:
            raise


def fullest_rank(config: Config, imbalance: float, enough: float = math.inf) -> memory.Memory:
    """Of the ranks at both ends and in the middle of the pipeline: between them nothing has more. Or the first with more than `enough`."""
    pp, fullest = config.parallel.pp, None
    for rank in sorted({0, pp // 2, pp - 1}, reverse=True):
        found = memory.rank_memory(config, rank, imbalance=imbalance)
        if fullest is None or found.total > fullest.total:
            fullest = found
        if fullest.total > enough:
            break
    return fullest


# ---------------------------------------------------------------- bounds


@dataclass(frozen=True)
class _Layer:
    """Seconds of one micro-batch: computed, and exchanged where nothing runs beside it."""

    compute: float
    bare: float


class _Bounds:
    def __init__(self, config: Config):
        self.config = config
        self.kinds: dict[tuple, tuple[Sequence[_Layer], float, float]] = {}

    def of(self, layout: Layout) -> float:
        """Seconds that no step of this layout is shorter than."""
        config = layout.apply(self.config)
        layers, first, last = self._kind(layout, config)
        parts, num = stage_layers(config), config.num_micro_batches
        placements = SCHEDULES[layout.schedule].place(layout.pp, layout.chunks)
        hides = layout.schedule in ("dualpipe", "dualpipev")
        seconds = [sum(layers[i].compute + (0.0 if hides else layers[i].bare) for i in part) for part in parts]
        seconds[0] += first
        seconds[-1] += last
        held = [sum(seconds[s] for placement in placements for s, r in enumerate(placement) if r == rank) for rank in range(layout.pp)]
        return max(held) * num / len(placements)

    def _kind(self, layout: Layout, config: Config) -> tuple[Sequence[_Layer], float, float]:
        key = layout.ep, layout.dispatcher, layout.sequences, layout.recompute
        if key not in self.kinds:
            rates = Rates(cluster=config.cluster, linear=config.precision.products, plain=config.precision.compute)
            (steps,) = stages(config, rates, Load(), [range(config.model.num_blocks)])
            layers, ends = [], {"embed": 0.0, "head": 0.0, "predict": 0.0}
            for block in _blocks(steps):
                if isinstance(block, Compute):
                    ends[block.name] += _sum(block)
                else:
                    layers.append(_layer(block))
            self.kinds[key] = layers, ends["embed"], ends["head"] + ends["predict"]
        return self.kinds[key]


def _blocks(steps) -> Iterator:
    """Single phases at the ends, and blocks of four."""
    i = 0
    while i < len(steps):
        if steps[i].name in ("embed", "head", "predict"):
            yield steps[i]
            i += 1
        else:
            yield steps[i : i + 4]
            i += 4


def _sum(phase: Compute) -> float:
    return sum(phase.of(when, False).seconds for when in "FBW")


def _layer(block: Sequence[Compute | Exchange]) -> _Layer:
    """Weight gradients may run beside exchanges of backward, or wait and run beside any."""
    compute = [step for step in block if isinstance(step, Compute)]
    exchanged = sum(step.of(when, False) for step in block if isinstance(step, Exchange) for when in "FB")
    weights = sum(step.of("W", False).seconds for step in compute)
    return _Layer(compute=sum(map(_sum, compute)), bare=max(0.0, exchanged - weights))
