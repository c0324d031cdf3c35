"""What one pipeline rank has of a job: its stages, the blocks in them, the micro-batches that run through each, and its list of actions.

Pure functions of the configuration, for formulas of memory and traffic. Splits and lists are kept: a planner asks for the same ones again
and again.
"""

import functools
from dataclasses import dataclass

from ..conf.schema import Config, ModelConfig, ParallelConfig
from ..parallel.groups import held_stages
from ..parallel.schedule import SCHEDULES, Action, Placements, proven, share_layers
from . import cost


@dataclass(frozen=True, kw_only=True)
class Share:
    """`stages`: the blocks of each stage held here, those of multi-token prediction with the last stage. `alike`: the pipeline ranks
    that hold these same stages, this one among them."""

    pp_rank: int
    stages: dict[int, range]
    placements: Placements
    alike: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.placements[0])

    @property
    def has_first(self) -> bool:
        return 0 in self.stages

    @property
    def has_last(self) -> bool:
        return self.num_stages - 1 in self.stages

    @property
    def layers(self) -> list[int]:
        return [layer for layers in self.stages.values() for layer in layers]

    @property
    def ends(self) -> tuple[int, ...]:
        """The pipeline ranks that have an embedding which both ends need; none where a rank has both ends, or this one has neither."""
        ranks = sorted({placement[stage] for placement in self.placements for stage in (0, -1)})
        both = {0, self.num_stages - 1}
        apart = not any(both <= set(held_stages(self.placements, rank)) for rank in ranks)
        return tuple(ranks) if apart and self.pp_rank in ranks else ()

    def replicas(self, config: Config, ep_rank: int) -> dict[str, list[int]]:
        """Ranks of the job that hold the same dense weights; the same experts, as the rank at that place; an embedding of both ends."""
        p = config.parallel
        every = lambda places: [self.rank(config, pp, edp, ep) for pp in places for edp in range(p.edp) for ep in range(p.ep)]
        experts = [self.rank(config, pp, edp, ep_rank) for pp in self.alike for edp in range(p.edp)]
        return {"dense": every(self.alike), "expert": experts, "embedding": every(self.ends)}

    @staticmethod
    def rank(config: Config, pp_rank: int, edp_rank: int, ep_rank: int) -> int:
        p = config.parallel
        return (pp_rank * p.edp + edp_rank) * p.ep + ep_rank

    def micro_batches(self, stage: int, num: int, way: int) -> int:
        """Of a step's `num`, those that run through `stage` here in direction `way`, as `direction_of` deals them out."""
        ways = len(self.placements)
        return (-(-num * (way + 1) // ways) + (num * way // -ways)) * (self.placements[way][stage] == self.pp_rank)


def rank_share(config: Config, pp_rank: int) -> Share:
    p = config.parallel
    placements, held, alike = _held(p.schedule, p.pp, p.chunks, pp_rank)
    layers = stage_layers(config)
    return Share(pp_rank=pp_rank, stages={s: layers[s] for s in held}, placements=placements, alike=alike)


def stage_layers(config: Config) -> tuple[range, ...]:
    """The blocks of each pipeline stage, as `parallel.stages` says or shared out by cost; those of multi-token prediction are on the last,
    with the head."""
    m, p, seq_len = config.model, config.parallel, config.data.seq_len
    blocks = tuple(cost.block_costs(m, seq_len))
    last = cost.head_cost(m) + cost.prediction_cost(m, seq_len)
    return _layers(p.schedule, p.pp, p.chunks, p.stages, blocks, cost.embedding_cost(m), last, m.num_blocks)


def rank_actions(config: Config, pp_rank: int, num: int) -> tuple[Action, ...]:
    """This rank's list for a step of `num` micro-batches."""
    p = config.parallel
    return all_actions(p.schedule, p.pp, p.chunks, num)[pp_rank]


def is_routed(m: ModelConfig, layer: int) -> bool:
    return m.num_moe_layers > 0 and layer >= m.num_dense_layers


@functools.lru_cache(maxsize=4096)
def _layers(
    schedule: str, pp: int, chunks: int, stages: str, costs: tuple[float, ...], first: float, last: float, num_blocks: int
) -> tuple[range, ...]:
    p = ParallelConfig(schedule=schedule, pp=pp, chunks=chunks, stages=stages)
    *before, end = share_layers(p, costs, first=first, last=last)
    return *before, range(end.start, num_blocks)


@functools.lru_cache(maxsize=4096)
def _held(schedule: str, pp: int, chunks: int, pp_rank: int) -> tuple[Placements, tuple[int, ...], tuple[int, ...]]:
    placements = SCHEDULES[schedule].place(pp, chunks)
    held = [held_stages(placements, rank) for rank in range(pp)]
    return placements, tuple(held[pp_rank]), tuple(rank for rank in range(pp) if held[rank] == held[pp_rank])


@functools.lru_cache(maxsize=256)
def all_actions(schedule: str, pp: int, chunks: int, num: int) -> tuple[tuple[Action, ...], ...]:
    """Of every rank."""
    return tuple(map(tuple, proven(schedule, pp, chunks, num)))
