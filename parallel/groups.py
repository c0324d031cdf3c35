"""Who talks to whom: the mesh of ranks and its process groups.

World = pp x edp x ep, pp outermost and ep contiguous inside: rank = (pp_rank * edp + edp_rank) * ep + ep_rank.

    pp 2, edp 2, ep 2           stage 0              stage 1
                                edp 0: [0 1]         edp 0: [4 5]        ep groups: the brackets
                                edp 1: [2 3]         edp 1: [6 7]        expert replicas: {0 2} {1 3} {4 6} {5 7}
                                                                         dense replicas: {0 1 2 3} {4 5 6 7}
Every group is created by every rank in the same order, as torch.distributed requires.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist

from ..conf.schema import ParallelConfig
from .schedule import SCHEDULES

Flow = tuple[str, int]  # ("F" or "B", leg)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One rank's place and its groups. `column`: the ranks of its pipeline, by pipeline rank."""

    parallel: ParallelConfig
    rank: int
    pp_rank: int
    edp_rank: int
    ep_rank: int
    placement: list[int]  # pipeline rank of each stage
    column: list[int]
    dense: dist.ProcessGroup  # replicas of dense weights: the dp ranks of this pipeline rank
    expert: dist.ProcessGroup  # replicas of this rank's experts
    ep: dict[str, dist.ProcessGroup]  # token exchange, one per direction; none where nobody exchanges
    flows: dict[Flow, dist.ProcessGroup]  # pipeline sends
    legs: list[int]  # of the boundary between stages s and s + 1
    embed: dist.ProcessGroup | None  # replicas of an embedding on both ends: dp ranks of the first and of the last stage

    @property
    def dp_rank(self) -> int:
        return self.edp_rank * self.parallel.ep + self.ep_rank

    @property
    def my_stages(self) -> list[int]:
        return [s for s, r in enumerate(self.placement) if r == self.pp_rank]

    def flow(self, kind: str, stage: int, other: int) -> tuple[int, dist.ProcessGroup]:
        """(global rank that holds `other`, group) of the link between two neighbouring stages."""
        return self.column[self.placement[other]], self.flows[kind, self.legs[min(stage, other)]]

    @classmethod
    def create(cls, parallel: ParallelConfig, rank: int, *, embeds_at_head: bool = False) -> "Mesh":
        """Collective: all ranks of an initialised torch.distributed world of size pp x edp x ep call it."""
        p = parallel
        assert dist.get_world_size() == p.world_size
        at = lambda s, d, e: (s * p.edp + d) * p.ep + e
        pp_rank, rest = divmod(rank, p.dp)
        edp_rank, ep_rank = divmod(rest, p.ep)
        placement = list(SCHEDULES[p.schedule].place(p.pp, p.chunks)[0])
        legs = boundary_legs(placement)

        def mine(groups: list[list[int]]) -> dist.ProcessGroup:
            """Create all the groups, return the one that holds this rank."""
            made = [(ranks, dist.new_group(ranks)) for ranks in groups]
            return next((group for ranks, group in made if rank in ranks), None)

        dp_ranks = [[at(s, d, e) for d in range(p.edp) for e in range(p.ep)] for s in range(p.pp)]
        columns = [[at(s, d, e) for s in range(p.pp)] for d in range(p.edp) for e in range(p.ep)]
        ep_ranks = [[at(s, d, e) for e in range(p.ep)] for s in range(p.pp) for d in range(p.edp)]
        first, last = placement[0], placement[-1]
        return cls(
            parallel=p,
            rank=rank,
            pp_rank=pp_rank,
            edp_rank=edp_rank,
            ep_rank=ep_rank,
            placement=placement,
            legs=legs,
            column=columns[edp_rank * p.ep + ep_rank],
            dense=mine(dp_ranks),
            expert=mine([[at(s, d, e) for d in range(p.edp)] for s in range(p.pp) for e in range(p.ep)]),
            ep={direction: mine(ep_ranks) for direction in "FB"} if p.ep > 1 or p.dispatcher == "alltoall" else {},
            flows={(kind, leg): mine(columns) for kind in "FB" for leg in sorted(set(legs))},
            embed=mine([dp_ranks[first] + dp_ranks[last]]) if embeds_at_head and first != last else None,
        )


def boundary_legs(placement: list[int]) -> list[int]:
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
