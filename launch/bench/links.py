"""Links between ranks: messages from one to one, and among all, by size; and what compute and an exchange leave each other.

Every function here is called by all ranks of a world that has been joined. Bytes are those that leave a rank; its share for itself does
not.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ...parallel import world

SIZES = [1 << power for power in range(10, 25, 2)]  # bytes from a rank to each of the others
REPEATS = 7

Times = list[tuple[float, float]]  # bytes, seconds


@dataclass(frozen=True, kw_only=True)
class Links:
    """Of one kind, such as those inside a node. Empty where there is none of them."""

    to_one: Times = field(default_factory=list)
    among_all: Times = field(default_factory=list)
    ranks: int = 0


def measure(device: torch.device, hosts: Sequence[str], sizes: Sequence[int] = SIZES) -> dict[str, Links]:
    """Links inside a node and between nodes. `hosts`: each rank's machine."""
    nodes = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
    inside = list(nodes.values())
    across = [[ranks[place] for ranks in inside if len(ranks) > place] for place in range(max(map(len, inside)))]
    return {"intra": _measure(device, "bench intra", inside, sizes), "inter": _measure(device, "bench inter", across, sizes)}


def _measure(device: torch.device, name: str, parts: list[list[int]], sizes: Sequence[int]) -> Links:
    """All groups exchange at once, as in training; the first of them also in pairs."""
    if len(parts[0]) < 2 or len({len(ranks) for ranks in parts}) > 1:
        return Links()
    group, ranks = world.part(name, parts), parts[0]
    among_all = [((len(ranks) - 1) * size, _exchange(group, size, device)) for size in sizes]
    to_one = [(size, seconds) for size in sizes if (seconds := echo(ranks[:2], size, device)) is not None]
    found: list[Times] = [to_one]
    dist.broadcast_object_list(found, src=ranks[0])
    dist.destroy_process_group(group)
    return Links(to_one=found[0], among_all=among_all, ranks=len(ranks))


def _exchange(group: dist.ProcessGroup, size: int, device: torch.device) -> float:
    sent = torch.zeros(group.size() * size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return median(lambda: dist.all_to_all_single(received, sent, group=group), device, group)


def echo(pair: Sequence[int], size: int, device: torch.device) -> float | None:
    """Half of the time to the other and back; None on ranks that look on."""
    if (rank := dist.get_rank()) not in pair:
        return None
    first, other = rank == pair[0], pair[0] if rank == pair[1] else pair[1]
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)

    def there_and_back():
        for send in (first, not first):
            (dist.send if send else dist.recv)(buffer, other)

    return median(there_and_back, device) / 2


def median(call: Callable[[], object], device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Of seconds; those of the slowest rank where a group takes part."""
    taken = []
    for _ in range(REPEATS + 1):
        if group is not None:
            dist.barrier(group)
        _sync(device)
        began = time.perf_counter()
        call()
        _sync(device)
        taken.append(time.perf_counter() - began)
    found = torch.tensor([statistics.median(taken[1:])], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found.item()


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def beside(device: torch.device, *, size: int = 1 << 22, dim: int | None = None) -> tuple[float, float]:
    """(of compute, of an exchange among all ranks): the share of its own speed that each has beside the other, at most 1.

    Products are made for about as long as the exchange takes alone.
    """
    dim = dim or (4096 if device.type == "cuda" else 256)
    a = torch.ones(dim, dim, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    sent = torch.zeros(dist.get_world_size() * size, dtype=torch.uint8, device=device)
    received, everybody = torch.empty_like(sent), dist.group.WORLD
    one = median(lambda: torch.mm(a, a), device, everybody)
    exchange = median(lambda: dist.all_to_all_single(received, sent), device, everybody)
    times = max(1, round(exchange / one))
    ends: list[tuple[float, float]] = []

    def both():
        began = time.perf_counter()
        work = dist.all_to_all_single(received, sent, async_op=True)
        for _ in range(times):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        computed = time.perf_counter() - began
        work.wait()
        _sync(device)
        ends.append((computed, time.perf_counter() - began))

    median(both, device, everybody)
    computed, exchanged = (statistics.median(column) for column in zip(*ends[1:]))
    return min(1.0, times * one / computed), min(1.0, exchange / exchanged)
