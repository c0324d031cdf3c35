"""The world of ranks: joined, parted into groups, left or torn down, and joined again. Process groups are made here and nowhere else.

A group has a name ("ep F", "pp F0 leg 1"), which errors and flight records use. Every group has the world's backend on the device that
ranks compute on, and a timeout: torch gives one that is made without it half an hour, whatever the world's is.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ._torch import SPLITS_BY_BACKEND, abort_process_group, nccl_options, own_groups

Parts = Sequence[Sequence[int]]  # disjoint lists of global ranks, in order


def join(device: torch.device | str = "cpu", *, timeout_s: float, **meeting: Any) -> None:
    """Collective of the world. gloo, and on a GPU NCCL beside it, connected at once: a wrong network shows here, not in the first step.

    `meeting`: `store` or `init_method`, with `rank` and `world_size`, as torch takes them; nothing where its environment variables say.
    """
    device = torch.device(device)
    kind: Mapping[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        kind = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    dist.init_process_group(timeout=datetime.timedelta(seconds=timeout_s), **kind, **meeting)


def part(name: str, parts: Parts, *, timeout_s: float | None = None, max_ctas: int = 0) -> dist.ProcessGroup | None:
    """The group of `parts` that holds this rank, None if there is none. Collective of the world.

    With NCCL it is one call for all of them (`split_group`), and what is on the host cannot be sent over it; that path has not been run
    on a GPU yet. gloo is asked for group after group, and makes nothing for those of others. `max_ctas`: thread blocks that NCCL may take
    for it, 0: its own choice.
    """
    timeout = datetime.timedelta(seconds=timeout_s) if timeout_s else None
    options = nccl_options(max_ctas) if max_ctas and _on_gpu() else None
    if _on_gpu() and SPLITS_BY_BACKEND:
        return dist.split_group(
            split_ranks=[list(ranks) for ranks in parts], timeout=timeout, group_desc=name, pg_options=options, backend="cuda:nccl"
        )
    rank, mine = dist.get_rank(), None
    for ranks in parts:
        group = dist.new_group(list(ranks), timeout=timeout, group_desc=name, pg_options=options)
        mine = group if rank in ranks else mine
    return mine


def on_hosts(name: str, *, timeout_s: float | None = None) -> dist.ProcessGroup:
    """A gloo group of all ranks for what is on the host, beside whatever computes. Collective. With no timeout: torch's half hour."""
    timeout = datetime.timedelta(seconds=timeout_s) if timeout_s else None
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=name)


def leave() -> None:
    """Collective: every group is closed, the world too."""
    dist.destroy_process_group()


def abort() -> list[dist.ProcessGroup]:
    """Drop every group at once, whatever is under way in them, without asking other ranks; then another world can be joined.

    Returns the dropped groups, to be kept: gloo's last reference to one waits for what is under way in it, as long as its timeout. What
    was under way is lost. (Under NCCL, whose watchdog may end the process first, this has not been run.)
    """
    dropped = [group for _, group in own_groups()]
    if dropped:
        abort_process_group()
    return dropped


def title(group: dist.ProcessGroup | None) -> str:
    """A group in a message: '"ep F" (ranks 0 1)'."""
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    some = " ".join(map(str, ranks if len(ranks) <= 16 else ranks[:8])) + (f" ... {ranks[-1]}: {len(ranks)}" if len(ranks) > 16 else "")
    return f'"{group.group_desc}" (ranks {some})'


def _on_gpu() -> bool:
    return dist.group.WORLD.bound_device_id is not None
