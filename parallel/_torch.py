"""The private and version-dependent names of torch that this folder uses, in one place.

torch 2.11 knows `reduce_scatter_tensor` and `all_gather_into_tensor` only; 2.13 deprecates them for the `*_single` names. There,
`split_group` would split gloo's half of a world along with NCCL's.
"""

import inspect
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group, _world
from torch.optim.adamw import adamw
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
abort_process_group = _abort_process_group
SPLITS_BY_BACKEND = "backend" in inspect.signature(dist.split_group).parameters


def instant_work() -> torch.ScriptObject:
    """What an operator of `torch.ops.c10d` returns for a collective that is over."""
    return torch._C._distributed_c10d.FakeWork().boxed()


def group_of(handle: torch.ScriptObject) -> dist.ProcessGroup:
    """Of an argument of such an operator."""
    return dist.ProcessGroup.unbox(handle)


def join_alone(world_size: int, rank: int) -> None:
    """As a rank of a world of which nobody else is there: groups can be made, and nothing can be sent."""
    dist.init_process_group("fake", world_size=world_size, rank=rank, store=FakeStore())


def get_schedule_ops(schedule: str, pp: int, num_micro_batches: int, num_stages_per_rank: int):
    """Torch's lists of actions of a schedule, one for each rank. The module is imported when they are asked for: ranks of other schedules
    need not pay for it."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops as torchs

    return torchs(schedule, pp, num_micro_batches, num_stages_per_rank=num_stages_per_rank)


def nccl_options(max_ctas: int):
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = max_ctas
    return options


def own_groups() -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Torch's name of each group that this rank is in, and the group."""
    return ((name, group) for group, name in _world.pg_names.items())


def flight_entries() -> list[dict]:
    """The last collectives that torch has begun in this process, oldest first; of gloo from 2.13 on. gloo's sends are not among them."""
    c10d, entries = torch._C._distributed_c10d, []
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(c10d, dump):
            entries += json.loads(getattr(c10d, dump)()).get("entries", [])
    return sorted(entries, key=lambda e: e["time_created_ns"])


__all__ = [
    "SPLITS_BY_BACKEND",
    "TorchDispatchMode",
    "abort_process_group",
    "adamw",
    "all_gather",
    "flight_entries",
    "foreach_mul_",
    "foreach_norm",
    "get_schedule_ops",
    "group_of",
    "instant_work",
    "join_alone",
    "nccl_options",
    "own_groups",
    "reduce_scatter",
]
