"""Who talks to whom: the mesh of ranks and its process groups.

World = pp x edp x ep, pp outermost and ep contiguous inside: rank = (pp_rank * edp + edp_rank) * ep + ep_rank.

    pp 2, edp 2, ep 2           stage 0              stage 1
                                edp 0: [0 1]         edp 0: [4 5]        ep groups: the brackets
                                edp 1: [2 3]         edp 1: [6 7]        expert replicas: {0 2} {1 3} {4 6} {5 7}
                                                                         dense replicas: {0 1 2 3} {4 5 6 7}

Where a schedule runs micro-batches both ways through the pipeline, pipeline ranks that hold the same stages are replicas of one another:
at pp 2 all of the above are one dense group, and the expert replicas are {0 2 4 6} {1 3 5 7}.
`partitions` says which groups there are, by name; each name parts the ranks of the world, so that a rank is in one of its groups at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist

from ..conf.schema import ParallelConfig
from . import world
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
    def create(
        cls, parallel: ParallelConfig, rank: int, *, embeds_at_head: bool = False, gpus_per_node: int = 1, timeout_s: float | None = None
    ) -> "Mesh":
        """Collective: all ranks of a world of pp x edp x ep that has been joined call it, and later `close`."""
        p = parallel
        assert dist.get_world_size() == p.world_size
        pp_rank, rest = divmod(rank, p.dp)
        edp_rank, ep_rank = divmod(rest, p.ep)
        placements = SCHEDULES[p.schedule].place(p.pp, p.chunks)
        parts = partitions(p, embeds_at_head=embeds_at_head, gpus_per_node=gpus_per_node)
        most = {name: p.comm_sms if name.startswith("ep ") else 0 for name in parts}
        groups = {name: world.part(name, ranks, timeout_s=timeout_s, max_ctas=most[name]) for name, ranks in parts.items()}
        return cls(
            parallel=p,
            rank=rank,
            pp_rank=pp_rank,
            edp_rank=edp_rank,
            ep_rank=ep_rank,
            placements=placements,
            legs=[boundary_legs(placement) for placement in placements],
            column=[(s * p.edp + edp_rank) * p.ep + ep_rank for s in range(p.pp)],
            dense=groups["dense"],
            expert=groups["expert"],
            ep={name.removeprefix("ep "): group for name, group in groups.items() if name.startswith("ep ")},
            flows={flow: groups[_name(flow)] for flow in _flows(placements) if _name(flow) in groups},
            embed=groups.get("embedding"),
        )

    def close(self) -> None:
        """Give the groups back. Collective, once all ranks have come from `create`: some might still be connecting to this one."""
        for group in (self.dense, self.expert, *self.ep.values(), *self.flows.values(), self.embed):
            if group is not None:
                dist.destroy_process_group(group)


def partitions(p: ParallelConfig, *, embeds_at_head: bool = False, gpus_per_node: int = 1) -> dict[str, list[list[int]]]:
    """Every group of the world, by name, as lists of ranks in order. Under a name, no rank is in two of them.

    None is made for what never leaves a rank; but weights always have groups, of one rank perhaps: their owners are found by them.
    """
    at = lambda s, d, e: (s * p.edp + d) * p.ep + e
    stages, replicas, experts = range(p.pp), range(p.edp), range(p.ep)
    placements = SCHEDULES[p.schedule].place(p.pp, p.chunks)
    held = [held_stages(placements, s) for s in stages]
    alike = [[s for s in stages if held[s] == mine] for mine in held]  # by pipeline rank: those that hold the same stages
    dp_ranks = [[at(s, d, e) for s in like for d in replicas for e in experts] for like in alike]
    ep_ranks = [[at(s, d, e) for e in experts] for s in stages for d in replicas]
    parts = {
        "dense": _distinct(dp_ranks),
        "expert": _distinct([[at(s, d, e) for s in like for d in replicas] for like in alike for e in experts]),
    }
    parts |= {f"ep {name}": groups for name, groups in exchange_groups(p, ep_ranks, gpus_per_node).items()}
    if p.pp > 1:
        columns = [[at(s, d, e) for s in stages] for d in replicas for e in experts]
        parts |= {_name(flow): columns for flow in _flows(placements)}
    ends = sorted({rank for placement in placements for rank in (placement[0], placement[-1])})
    apart = not any({0, len(placements[0]) - 1} <= set(held[s]) for s in ends)  # nobody has both
    if embeds_at_head and apart:
        parts["embedding"] = [[rank for s in ends for rank in dp_ranks[s]]]
    return parts


def _flows(placements: Sequence[Sequence[int]]) -> list[Flow]:
    return [(kind, way, leg) for kind in "FB" for way, own in enumerate(placements) for leg in sorted(set(boundary_legs(own)))]


def _name(flow: Flow) -> str:
    kind, direction, leg = flow
    return f"pp {kind}{direction} leg {leg}"


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
