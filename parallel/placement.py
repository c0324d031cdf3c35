"""Which experts share a GPU: balanced packing and replication from measured loads (EPLB, DeepSeek's open-sourced balancer).

Plain functions of numbers. A placement is, per MoE layer, the expert in each *slot*; GPU g has the slots from g * R / num_gpus on.
`parallel/relocate.py` moves weights and optimizer state to where a placement wants them.

L MoE layers   E experts   R slots, E of them without replicas   C most replicas of one expert
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conf.schema import Config, ConfigError

Packs = list[list[int]]  # what each GPU holds


def check(config: Config) -> None:
    """Raises ConfigError where experts should move between ranks, and there are no other ranks, or no experts."""
    interval, p = config.parallel.placement_interval, config.parallel
    if interval and (p.ep == 1 or config.model.num_moe_layers == 0):
        missing = f"ranks: parallel.ep = {p.ep}" if p.ep == 1 else "experts: the model has no MoE layer"
        raise ConfigError("parallel.placement_interval", interval, f"there are no {missing} to even out loads over", 0)


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """All int64. A replica's number counts the slots that hold its expert, in slot order."""

    physical_to_logical: Tensor  # (L, R): the expert in each slot
    logical_to_physical: Tensor  # (L, E, C): the slots of each expert, -1 where it has fewer
    counts: Tensor  # (L, E): how many


def rebalance(loads: Tensor | Sequence[Sequence[float]], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Replicas:
    """Slots for experts with the given loads (L, E), finite and not negative, of which each replica will carry an equal share.

    Where `num_nodes` divides `num_groups`, groups of experts stay whole on a node (hierarchical: groups to nodes, replicas inside a
    node, those to its GPUs); elsewhere nodes and groups are ignored (global). Packing is greedy, and may lose against no balancing at
    all: never worse than the un-replicated placements (experts in order, and balanced) is promised where `num_gpus` divides E, by
    taking the best of the three. ValueError for sizes that do not divide.
    """
    loads = torch.as_tensor(loads, dtype=torch.float64)
    _check_sizes(loads, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    slots = [_place(row, num_replicas, num_groups, num_nodes, num_gpus) for row in loads.tolist()]
    physical = torch.tensor(slots, dtype=torch.int64).view(len(loads), num_replicas)
    counts = torch.zeros(loads.shape, dtype=torch.int64).scatter_add_(1, physical, torch.ones_like(physical))
    logical = torch.full((*loads.shape, int(counts.max()) if len(loads) else 1), -1, dtype=torch.int64)
    for layer, row in enumerate(slots):
        seen = [0] * loads.shape[1]
        for slot, expert in enumerate(row):
            logical[layer, expert, seen[expert]] = slot
            seen[expert] += 1
    return Replicas(physical_to_logical=physical, logical_to_physical=logical, counts=counts)


def rank_overload(loads: Tensor | Sequence[Sequence[float]], ep: int, placement: Tensor | None = None) -> list[float]:
    """Largest load of a rank over the ranks' mean, of each layer: 1 is perfect balance, and what a layer without load has.

    `loads` (L, E) by expert; `placement` (L, E): the expert in each slot, None where experts are in order. A rank is all replicas of an
    expert-parallel rank together. `ep` divides E.
    """
    loads = torch.as_tensor(loads, dtype=torch.float64)
    if not len(loads):
        return []
    by_slot = loads if placement is None else loads.gather(1, torch.as_tensor(placement))
    ranks = by_slot.view(len(loads), ep, loads.shape[1] // ep).sum(2)
    overload = ranks.max(1).values / ranks.mean(1)
    return torch.where(ranks.sum(1) > 0, overload, 1.0).tolist()


def next_placement(loads: Tensor, current: Tensor, ep: int, num_groups: int, gpus_per_node: int) -> Tensor:
    """The expert in each slot, (L, E) int64, that evens out `loads` (L, E, by expert) over `ep` ranks; without replicas.

    Where expert parallelism spans whole nodes, and their number divides `num_groups`, groups stay on a node: node-limited routing
    counts on it. Elsewhere groups are ignored. A layer that would not gain keeps its row of `current`.
    """
    nodes = ep // gpus_per_node if ep % gpus_per_node == 0 else 1
    wanted = rebalance(loads, loads.shape[1], num_groups, nodes, ep).physical_to_logical
    gains = torch.tensor(rank_overload(loads, ep, wanted)) < torch.tensor(rank_overload(loads, ep, current))
    return torch.where(gains[:, None], wanted, current)


# ---------------------------------------------------------------- one layer


def _place(loads: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[int]:
    """The expert in each slot. The first of the candidates stands unless another's heaviest GPU is lighter."""
    candidates = [_hierarchical(loads, num_replicas, num_groups, num_nodes, num_gpus)]
    if len(loads) % num_gpus == 0:
        share = len(loads) // num_gpus
        balanced = _hierarchical(loads, len(loads), num_groups, num_nodes, num_gpus)
        in_order = [list(range(g * share, (g + 1) * share)) for g in range(num_gpus)]
        # Slots to spare hold second copies of the GPU's own experts: its load stays what it is.
        candidates += [[[pack[i % share] for i in range(num_replicas // num_gpus)] for pack in packs] for packs in (balanced, in_order)]
    best = min(candidates, key=lambda packs: _heaviest(loads, packs))
    return [expert for pack in best for expert in pack]


def _hierarchical(loads: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Packs:
    """Groups to nodes, then for each node on its own: replicas of its experts, and those to its GPUs."""
    size = len(loads) // num_groups
    packs = []
    for groups in balanced_packs([sum(loads[g * size :][:size]) for g in range(num_groups)], num_nodes):
        experts = [g * size + i for g in groups for i in range(size)]
        replicas, counts = _replicate([loads[e] for e in experts], num_replicas // num_nodes)
        shares = [loads[experts[i]] / counts[i] for i in replicas]
        packs += [[experts[replicas[i]] for i in pack] for pack in balanced_packs(shares, num_gpus // num_nodes)]
    return packs


def balanced_packs(loads: Sequence[float], num_packs: int) -> Packs:
    """Indices of `loads` in packs of equal number: the heaviest first, always into the lightest pack that is not full. Stable on ties."""
    size = len(loads) // num_packs
    if size == 1:
        return [[i] for i in range(num_packs)]
    packs, open_packs = [[] for _ in range(num_packs)], [(0.0, p) for p in range(num_packs)]
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        load, p = heapq.heappop(open_packs)
        packs[p].append(i)
        if len(packs[p]) < size:
            heapq.heappush(open_packs, (load + loads[i], p))
    return packs


def _replicate(loads: list[float], num_replicas: int) -> tuple[list[int], list[int]]:
    """The expert of each replica, and how many each expert has: one, then again and again one more of what is heaviest per replica."""
    replicas, counts = list(range(len(loads))), [1] * len(loads)
    heap = [(-load, i) for i, load in enumerate(loads)]
    heapq.heapify(heap)
    while len(replicas) < num_replicas:
        i = heap[0][1]
        replicas.append(i)
        counts[i] += 1
        heapq.heapreplace(heap, (-loads[i] / counts[i], i))
    return replicas, counts


def _heaviest(loads: list[float], packs: Packs) -> float:
    counts = [0] * len(loads)
    for expert in (e for pack in packs for e in pack):
        counts[expert] += 1
    return max(sum(loads[e] / counts[e] for e in pack) for pack in packs)


def _check_sizes(loads: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if loads.dim() != 2 or not torch.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"loads must be (layers, experts), finite and not negative; shape is {tuple(loads.shape)}")
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    if bad := [f"{name} = {n}" for name, n in sizes.items() if n < 1]:
        raise ValueError(f"{', '.join(bad)}: must be at least 1")
    experts = loads.shape[1]
    if num_replicas < experts:
        raise ValueError(f"num_replicas = {num_replicas}: must be at least the number of experts, {experts}, each needs a slot")
    wholes = (("num_groups", "experts", experts), ("num_nodes", "num_gpus", num_gpus), ("num_gpus", "num_replicas", num_replicas))
    for name, what, whole in wholes:
        if whole % sizes[name]:
            raise ValueError(f"{name} = {sizes[name]}: must divide {what} = {whole}")
