"""Who talks to whom: the mesh of ranks and its process groups.

World = pp x edp x ep, pp outermost and ep contiguous inside: rank = (pp_rank * edp + edp_rank) * ep + ep_rank.

    pp 2, edp 2, ep 2           stage 0              stage 1
                                edp 0: [0 1]         edp 0: [4 5]        ep groups: the brackets
                                edp 1: [2 3]         edp 1: [6 7]        expert replicas: {0 2} {1 3} {4 6} {5 7}
                                                                         dense replicas: {0 1 2 3} {4 5 6 7}

Where a schedule runs micro-batches both ways through the pipeline, pipeline ranks that hold the same stages are replicas of one another:
at pp 2 all of the above are one dense group, and the expert replicas are {0 2 4 6} {1 3 5 7}.
Every group is created by every rank in the same order, as torch.distributed requires.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist

from ..conf.schema import ParallelConfig
from .schedule import SCHEDULES

Flow = tuple[str, int, int]  # ("F" or "B", direction, leg)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One rank's place and its groups. `column`: the ranks of its pipeline, by pipeline rank."""

    parallel: ParallelConfig
    rank: int
    pp_rank: int
    edp_rank: int
    ep_rank: int
    placements: tuple[tuple[int, ...], ...]  # for each direction, the pipeline rank of each stage
    column: list[int]
    dense: dist.ProcessGroup  # replicas of dense weights: the dp ranks of this pipeline rank, and of one that holds the same stages
    expert: dist.ProcessGroup  # replicas of this rank's experts
    ep: dict[str, dist.ProcessGroup]  # token exchange, see `exchange_groups`
    flows: dict[Flow, dist.ProcessGroup]  # pipeline sends
    legs: list[list[int]]  # for each direction, of the boundary between stages s and s + 1
    embed: dist.ProcessGroup | None  # replicas of an embedding on both ends: dp ranks of the first and of the last stage

    @property
    def dp_rank(self) -> int:
        return self.edp_rank * self.parallel.ep + self.ep_rank

    @property
    def my_stages(self) -> list[int]:
        return held_stages(self.placements, self.pp_rank)

    @property
    def num_stages(self) -> int:
        return len(self.placements[0])

    def holder(self, stage: int, direction: int) -> int:
        """The pipeline rank that runs this stage of the micro-batches of one direction."""
        return self.placements[direction][stage]

    def flow(self, kind: str, stage: int, other: int, direction: int) -> tuple[int, dist.ProcessGroup]:
        """(global rank that holds `other`, group) of the link between two neighbouring stages."""
        return self.column[self.holder(other, direction)], self.flows[kind, direction, self.legs[direction][min(stage, other)]]

    @classmethod
    def create(cls, parallel: ParallelConfig, rank: int, *, embeds_at_head: bool = False, gpus_per_node: int = 1) -> "Mesh":
        """Collective: all ranks of an initialised torch.distributed world of size pp x edp x ep call it."""
        p = parallel
        assert dist.get_world_size() == p.world_size
        at = lambda s, d, e: (s * p.edp + d) * p.ep + e
        pp_rank, rest = divmod(rank, p.dp)
        edp_rank, ep_rank = divmod(rest, p.ep)
        placements = SCHEDULES[p.schedule].place(p.pp, p.chunks)
        legs = [boundary_legs(placement) for placement in placements]
        held = [held_stages(placements, s) for s in range(p.pp)]
        alike = [[s for s in range(p.pp) if held[s] == mine] for mine in held]  # by pipeline rank: those that hold the same stages

        def mine(groups: list[list[int]]) -> dist.ProcessGroup:
            """Create all the groups, return the one that holds this rank."""
            made = [(ranks, dist.new_group(ranks)) for ranks in groups]
            return next((group for ranks, group in made if rank in ranks), None)

        dp_ranks = [[at(s, d, e) for s in like for d in range(p.edp) for e in range(p.ep)] for like in alike]
        experts = [[at(s, d, e) for s in like for d in range(p.edp)] for like in alike for e in range(p.ep)]
        columns = [[at(s, d, e) for s in range(p.pp)] for d in range(p.edp) for e in range(p.ep)]
        ep_ranks = [[at(s, d, e) for e in range(p.ep)] for s in range(p.pp) for d in range(p.edp)]
        ends = sorted({rank for placement in placements for rank in (placement[0], placement[-1])})
        apart = not any({0, len(placements[0]) - 1} <= set(held[s]) for s in ends)  # nobody has both
        return cls(
            parallel=p,
            rank=rank,
            pp_rank=pp_rank,
            edp_rank=edp_rank,
            ep_rank=ep_rank,
            placements=placements,
            legs=legs,
            column=columns[edp_rank * p.ep + ep_rank],
            dense=mine(_distinct(dp_ranks)),
            expert=mine(_distinct(experts)),
            ep={name: mine(groups) for name, groups in exchange_groups(p, ep_ranks, gpus_per_node).items()},
            flows={(kind, way, leg): mine(columns) for kind in "FB" for way, own in enumerate(legs) for leg in sorted(set(own))},
            embed=mine([[rank for s in ends for rank in dp_ranks[s]]]) if embeds_at_head and apart else None,
        )


def held_stages(placements: Sequence[Sequence[int]], pp_rank: int) -> list[int]:
    """The stages of a pipeline rank, whichever direction they are for."""
    return sorted({s for placement in placements for s, r in enumerate(placement) if r == pp_rank})


def exchange_groups(p: ParallelConfig, ep_ranks: list[list[int]], gpus_per_node: int) -> dict[str, list[list[int]]]:
    """What tokens are exchanged over: the expert-parallel group once per direction, so that both can be in flight. Or, where they go by
    nodes, ranks of the same place "across" nodes and ranks "inside" each, and the whole group for counts. Nothing, if nobody exchanges."""
    if p.dispatcher == "hierarchical":
        node = min(p.ep, gpus_per_node)
        across = [ranks[place::node] for ranks in ep_ranks for place in range(node)]
        inside = [ranks[first : first + node] for ranks in ep_ranks for first in range(0, p.ep, node)]
        return {"counts": ep_ranks} | {f"{d} across": across for d in "FB"} | {f"{d} inside": inside for d in "FB"}
    return dict.fromkeys("FB", ep_ranks) if p.ep > 1 or p.dispatcher == "alltoall" else {}


def _distinct(groups: list[list[int]]) -> list[list[int]]:
    return list(map(list, dict.fromkeys(map(tuple, groups))))


def boundary_legs(placement: Sequence[int]) -> list[int]:
    """A number per stage boundary such that, within one number, no pair of ranks is linked twice.

    Each (direction, leg) has its own communicator; in it two ranks send one way only and in micro-batch order, so that no common order
    of sends and receives, no tags and no batching are needed. Boundaries inside one rank get 0 and use none.
    """
    legs, used = [], set()
    for a, b in pairwise(placement):
        leg = next(n for n in range(len(placement)) if (n, frozenset((a, b))) not in used)
        if a != b:
            used.add((leg, frozenset((a, b))))
        legs.append(leg if a != b else 0)
    return legs
