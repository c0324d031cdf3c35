"""What every rank tells all others in each step, beside what is counted: numbers in places of their own, in the step's one all-reduce."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Over ranks: how many were asked to stop; whether it is time to save, and whether the budget is spent (the first rank says); how many are
# done with the last save.
SUMS = ("stop", "save", "saved", "spent")
# Of each rank: its peak, bytes; whether its memory changed between two updates; whether it could not read its samples; what its dense
# weights, and its experts', add up to; its gradients, and those of another rank's micro-batches that it replayed; whether something had
# changed gradients before there were any; how long it was busy itself, seconds.
EACH = (
    "memory", "changed", "unreadable", "dense", "experts", "own", "replayed", "unclean", "busy_data", "busy_compute", "busy_update",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Alike on all ranks. `each[name][r]`: what rank r said."""

    sums: dict[str, float]
    each: dict[str, list[float]]


def size(world_size: int) -> int:
    """Numbers in all."""
    return len(SUMS) + len(EACH) * world_size


def pack(rank: int, world_size: int, **values: float) -> Tensor:
    """(size,) FP64 to be added over ranks: exact for whole numbers up to 2 ** 53."""
    flags = torch.zeros(size(world_size), dtype=torch.float64)
    for i, name in enumerate(SUMS):
        flags[i] = float(values.pop(name, 0))
    for i, name in enumerate(EACH):
        flags[len(SUMS) + i * world_size + rank] = float(values.pop(name, 0))
    assert not values, f"no place for {', '.join(values)}"
    return flags


def unpack(flags: Tensor) -> Heard:
    world_size = (len(flags) - len(SUMS)) // len(EACH)
    each = flags[len(SUMS) :].view(len(EACH), world_size).tolist()
    return Heard(sums=dict(zip(SUMS, flags.tolist())), each=dict(zip(EACH, each)))
