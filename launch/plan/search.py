"""From layouts to plans: a bound on each, then memory, rules and the simulation, the best bounds first, until none is below the best step.

What is compared is the ideal step. A bound is what one pipeline rank computes, the exchanges that its schedule cannot hide, and how long it
waits for its first micro-batch, and others for its last.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ...conf.rules import check
from ...conf.schema import Config, ConfigError
from ...parallel.schedule import SCHEDULES
from ...train import cost, memory
from ...train.rank_share import rank_share, stage_layers
from ..simulate import StepEstimate, project_step
from ..simulate.rates import Rates
from ..simulate.stage import Compute, Exchange, Load, stages
from ..validate import validate
from .layouts import RECOMPUTE, Layout, candidates

MOST = 32  # layouts that are simulated
ENDS = ("embed", "head", "predict")


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
    exhausted: bool = False  # what was not simulated has bounds above the best
    first_error: ConfigError | None = None


def search(config: Config, gpus: int, *, fixed: frozenset[str] = frozenset(), keep: int = 8, most: int = MOST) -> Search:
    """`fixed`: keys whose values stay as they are."""
    found = Search()
    bounds = Bounds(config)
    queue = [(bounds.of(layout), i, layout) for i, layout in enumerate(candidates(config, gpus, fixed))]
    found.tried = len(queue)
    heapq.heapify(queue)
    while queue and found.simulated < most:
        bound, _, layout = heapq.heappop(queue)
        if len(found.best) >= keep and bound >= found.best[keep - 1].step.ideal:
            found.exhausted = True
            break
        priced = _priced(config, layout, found, recompute_fixed="train.recompute" in fixed)
        if priced:
            found.simulated += 1
            found.best = sorted([*found.best, priced], key=lambda p: p.step.ideal)
    found.exhausted |= not queue
    return found


def _priced(config: Config, layout: Layout, found: Search, *, recompute_fixed: bool) -> Priced | None:
    """With as little recomputation as fits."""
    capacity, imbalance = config.cluster.memory_gb * 1e9, must_fit(config)
    choices = [layout.recompute] if recompute_fixed else list(RECOMPUTE)
    if found.smallest and _state(layout.apply(config)) > max(capacity, found.smallest[1]):
        found.too_large += 1
        return None
    chosen = tried = fullest = None
    for recompute in [choices[-1], *choices[:-1]]:  # the smallest first: if that does not fit, nothing does
        chosen = replace(layout, recompute=recompute)
        tried = chosen.apply(config)
        fullest = fullest_rank(tried, imbalance, capacity)
        if recompute == choices[-1] and fullest.total > capacity:
            found.too_large += 1
            if found.smallest is None or fullest.total < found.smallest[1]:
                whole = fullest_rank(tried, imbalance).total  # of the ranks that were not looked at, too
                if found.smallest is None or whole < found.smallest[1]:
                    found.smallest = chosen, whole
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


def _state(config: Config) -> float:
    """Bytes of weights, gradients and optimizer on the fullest rank: what memory takes at least, and soon told."""
    shares = [rank_share(config, rank) for rank in _telling(config)]
    return max(
        cost.rank_state_bytes(
            config, layers=s.layers, embedding=s.has_first, head=s.has_last, copies=len(s.alike), end_copies=len(s.ends)
        ).total
        for s in shares
    )


def _telling(config: Config) -> list[int]:
    """Ranks at both ends and in the middle of the pipeline: between them nothing has more."""
    pp = config.parallel.pp
    return sorted({0, pp // 2, pp - 1}, reverse=True)


def check_all(config: Config) -> None:
    """As before a run, but that an optional package (a dispatcher's) need not be installed where a plan is made."""
    check(config)
    try:
        validate(config)
    except ConfigError as error:
        if error.field != "parallel.dispatcher" or "not installed" not in error.rule:
            raise


def must_fit(config: Config) -> float:
    """The imbalance at which a layout must fit: the worst that its term allows."""
    term = config.stack.terms.get("imbalance")
    return max(1.0, term.high) if term else 1.0


def fullest_rank(config: Config, imbalance: float, enough: float = math.inf) -> memory.Memory:
    """Of all ranks, or the first found with more than `enough`."""
    fullest = None
    for rank in _telling(config):
        found = memory.rank_memory(config, rank, imbalance=imbalance)
        if fullest is None or found.total > fullest.total:
            fullest = found
        if fullest.total > enough:
            break
    return fullest


# ---------------------------------------------------------------- bounds


class _Part(NamedTuple):
    """Seconds of one micro-batch in a block, or in what is at an end: forward, backward with weight gradients; exchanged where no other
    micro-batch runs beside it; and how much longer all that compute takes beside one."""

    forward: float
    backward: float
    bare: float
    slower: float

    @classmethod
    def of(cls, steps: Sequence[Compute | Exchange]) -> "_Part":
        """Weight gradients may run beside exchanges of backward, or wait and run beside any."""
        seconds = lambda when, beside=False: sum(step.of(when, beside).seconds for step in steps if isinstance(step, Compute))
        alone, beside = sum(map(seconds, "FBW")), sum(seconds(when, True) for when in "FBW")
        exchanged = sum(step.of(when, False) for step in steps if isinstance(step, Exchange) for when in "FB")
        return cls(seconds("F"), seconds("B") + seconds("W"), max(0.0, exchanged - seconds("W")), beside - alone)


class Bounds:
    def __init__(self, config: Config):
        self.config = config
        self.made: dict[tuple, list[_Part]] = {}

    def of(self, layout: Layout) -> float:
        """Seconds that no step of this layout is shorter than: for some rank, what goes before its first forward, all of its own, and what
        comes after its last backward (nothing, where weight gradients wait: they may be a rank's last)."""
        config = layout.apply(self.config)
        schedule, num = SCHEDULES[layout.schedule], config.num_micro_batches
        placements = schedule.place(layout.pp, layout.chunks)
        hides = layout.schedule in ("dualpipe", "dualpipev")
        pairs = max(0.0, 1 - 2 * layout.pp / num) * (layout.ep > 1)  # of their ops: all but those that fill and empty the pipeline
        waits = any(held.closures for held in schedule.held(layout.pp, layout.chunks, num))
        stages = self._stages(layout, config)
        before, after, busy = [], [], [0.0] * layout.pp
        for s, part in enumerate(stages):
            before.append(sum(p.forward for p in stages[:s]))
            after.append(0.0 if waits else sum(p.backward for p in stages[:s]))
            for placement in placements:
                seconds = part.forward + part.backward + (pairs * part.slower if hides else part.bare)
                busy[placement[s]] += seconds * num / len(placements)
        first = [min(placement.index(rank) for placement in placements) for rank in range(layout.pp)]
        return max(before[s] + own + after[s] for s, own in zip(first, busy))

    def _stages(self, layout: Layout, config: Config) -> list[_Part]:
        *blocks, embed, ends = self._parts(layout, config)
        made = [[blocks[i] for i in layers] for layers in stage_layers(config)]
        made[0].append(embed)
        made[-1].append(ends)
        return [_Part(*map(sum, zip(*parts))) for parts in made]

    def _parts(self, layout: Layout, config: Config) -> list[_Part]:
        """Blocks; the embedding; heads, and entries of multi-token prediction."""
        key = layout.ep, layout.dispatcher, layout.sequences, layout.recompute
        if key not in self.made:
            rates = Rates(cluster=config.cluster, linear=config.precision.products, plain=config.precision.compute)
            (steps,) = stages(config, rates, Load(), [range(config.model.num_blocks)])
            ends = [step for step in steps if step.name in ENDS]
            blocks = [step for step in steps if step.name not in ENDS]
            every = [blocks[i : i + 4] for i in range(0, len(blocks), 4)]
            self.made[key] = [_Part.of(steps) for steps in (*every, ends[:1], ends[1:])]
        return self.made[key]
