"""Experts moved between ranks in memory: weights, masters, moments, and whatever else an optimizer keeps of them.

A *slot* is an expert's place in the stacked weights: expert-parallel rank r holds slots r * e to (r + 1) * e. The dispatcher and the
stacked tensors know slots; everybody else (router, biases, loads, metrics) speaks of experts.

L MoE layers   E experts, and slots   e experts on a rank
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..conf.schema import Config
from .optimizer.zero import Chunk, ShardedOptimizer
from .placement import next_placement


class Placement:
    """The expert in each slot of every MoE layer, the same on all ranks, and the loads that decide about the next move.

    `slot_of[layer]`: (E,) int64 on the device, the slot of each expert; without a key where experts are in order and stay so.
    """

    def __init__(self, config: Config, device: torch.device):
        m = config.model
        self.config, self.device, self.first_layer = config, device, m.num_dense_layers
        self.expert_at = torch.arange(m.num_experts).repeat(m.num_moe_layers, 1)  # (L, E)
        self.loads = torch.zeros_like(self.expert_at)  # (L, E) by expert, since the last move
        self.slot_of: dict[int, Tensor] = {}
        if config.parallel.placement_interval:
            self._publish()

    def after_step(self, loads: Tensor, optimizer: ShardedOptimizer, group: dist.ProcessGroup) -> None:
        """Count the global batch's loads (L, E), and when `parallel.placement_interval` steps are full, move. Collective.

        `group`: the ranks that own this rank's experts among them.
        """
        interval = self.config.parallel.placement_interval
        if interval == 0:
            return
        self.loads += loads
        if optimizer.steps % interval == 0:
            p, m, c = self.config.parallel, self.config.model, self.config.cluster
            self.move(next_placement(self.loads, self.expert_at, p.ep, m.num_groups, c.gpus_per_node), optimizer, group)
            self.loads.zero_()

    def move(self, expert_at: Tensor, optimizer: ShardedOptimizer, group: dist.ProcessGroup) -> None:
        """To the placement `expert_at` (L, E), equal on all ranks of the world. Collective over it, unless nothing moves."""
        old_slot_of = self.expert_at.argsort(1)
        sources = {
            f"layers.{self.first_layer + row}.experts.": old_slot_of[row][expert_at[row]].tolist()
            for row in range(len(expert_at))
            if not torch.equal(expert_at[row], self.expert_at[row])
        }
        if sources:
            relocate(optimizer, sources, group)
            self.expert_at = expert_at
            self._publish()

    def _publish(self) -> None:
        slots = self.expert_at.argsort(1).to(self.device)
        self.slot_of.update({self.first_layer + row: slot_E for row, slot_E in enumerate(slots)})

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint: "placement", {layer: the expert in each slot}, and the loads so far; empty where nothing ever moves."""
        if not self.slot_of:
            return {}
        table = {str(self.first_layer + row): experts for row, experts in enumerate(self.expert_at.tolist())}
        return {"placement": table, "placement_loads": self.loads.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Of a checkpoint whose tensors were or will be loaded as they are. One without "placement" has experts in order."""
        if "placement" not in state:
            return
        layers = [str(self.first_layer + row) for row in range(len(self.expert_at))]
        table = [state["placement"].get(layer) for layer in layers]
        if wrong := [layer for layer, row in zip(layers, table) if sorted(row or []) != list(range(self.expert_at.shape[1]))]:
            raise ValueError(f"placement of layers {', '.join(wrong)}: does not name each of {self.expert_at.shape[1]} experts once")
        self.expert_at = torch.tensor(table)
        self.loads = torch.tensor(state["placement_loads"])
        self._publish()


# ---------------------------------------------------------------- the move


@dataclass(frozen=True)
class Segment:
    """`length` elements from `start` of a flattened tensor, which `rank` owns, that go to `to_start`, which `to_rank` owns."""

    rank: int
    start: int
    to_rank: int
    to_start: int
    length: int


@torch.no_grad()
def relocate(optimizer: ShardedOptimizer, sources: Mapping[str, Sequence[int]], group: dist.ProcessGroup) -> None:
    """Permute the experts in every tensor of `optimizer.state()`, and publish the weights.

    `sources`: {prefix of the tensors' names: the slot that each slot's expert comes from}, equal on all ranks of the world, of which
    this is a collective. The ranks of `group` own the tensors of theirs among them, cut anywhere. One tensor is under way at a time: a
    rank needs room for two copies of what it owns of it. RuntimeError where pieces are missing.
    """
    chunks = {key: c for key, c in optimizer.state().items() if _source_of(key, sources)}
    owned: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(owned, {key: (c.numel, c.offset, len(c.data), c.data.dtype) for key, c in chunks.items()}, group=group)
    device = next(iter(optimizer.specs.values())).param.device
    for key in sorted(set().union(*owned)):
        numel, dtype = next((of_rank[key][0], of_rank[key][3]) for of_rank in owned if key in of_rank)
        pieces = {rank: of_rank[key][1:3] for rank, of_rank in enumerate(owned) if key in of_rank}
        if sum(length for _, length in pieces.values()) != numel:
            ranks = dist.get_process_group_ranks(group)
            raise RuntimeError(f"{key}: of {numel} elements ranks {ranks} own {pieces} (offset, length): its experts cannot move")
        moves = segments(pieces, _source_of(key, sources), numel)
        _exchange(chunks.get(key) or Chunk(numel, 0, torch.empty(0, dtype=dtype)), moves, group, device)
    optimizer.load_state(optimizer.steps)


def _source_of(key: str, sources: Mapping[str, Sequence[int]]) -> Sequence[int] | None:
    return next((source for prefix, source in sources.items() if key.startswith(prefix)), None)


def segments(pieces: Mapping[int, tuple[int, int]], source: Sequence[int], numel: int) -> list[Segment]:
    """What goes where, by destination. `pieces`: (offset, length) of what each rank owns of a tensor of `numel` elements, all of it once.

    Slots that keep their expert are left out.
    """
    unit, left_over = divmod(numel, len(source))
    if left_over:
        raise RuntimeError(f"a tensor of {numel} elements is not made of {len(source)} experts")
    cuts = sorted((offset, offset + length, rank) for rank, (offset, length) in pieces.items() if length)
    starts = [low for low, _, _ in cuts]
    owner = lambda at: cuts[bisect_right(starts, at) - 1]
    found = []
    for slot, old in enumerate(source):
        done = 0
        while done < unit and slot != old:
            start, to_start = old * unit + done, slot * unit + done
            (_, end, rank), (_, to_end, to_rank) = owner(start), owner(to_start)
            length = min(end - start, to_end - to_start, unit - done)
            found.append(Segment(rank, start, to_rank, to_start, length))
            done += length
    return found


def _exchange(chunk: Chunk, moves: list[Segment], group: dist.ProcessGroup, device: torch.device) -> None:
    """One all-to-all; both ends know the order of segments between them. Everything is read before anything is written."""
    me, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    sent = [[s for s in moves if s.rank == me and s.to_rank == peer] for peer in ranks]
    received = [[s for s in moves if s.to_rank == me and s.rank == peer] for peer in ranks]
    lengths = lambda by_peer: [sum(s.length for s in part) for part in by_peer]
    out = [chunk.data[s.start - chunk.offset :][: s.length].to(device) for part in sent for s in part]
    outgoing = torch.cat([torch.empty(0, dtype=chunk.data.dtype, device=device), *out])
    incoming = outgoing.new_empty(sum(lengths(received)))
    dist.all_to_all_single(incoming, outgoing, lengths(received), lengths(sent), group=group)
    at = 0
    for s in (s for part in received for s in part):
        chunk.data[s.to_start - chunk.offset :][: s.length].copy_(incoming[at : at + s.length])
        at += s.length
