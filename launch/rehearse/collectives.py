"""Names, links and bytes of the collectives that a rank takes part in, as torch dispatches them: those of `train/traffic.py`.

Of a ring (sums of gradients, gathering of weights, what a step counts) each rank passes on all but its own share, once or twice; of that
the same share crosses between nodes for every rank: see there.
"""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...parallel._torch import group_of, instant_work
from ...parallel.transport import Transport

Sent = Counter[tuple[str, str]]


class Collectives:
    """Of `rank`, on nodes of `gpus_per_node` ranks each."""

    def __init__(self, rank: int, gpus_per_node: int):
        self.rank, self.gpus_per_node = rank, gpus_per_node

    def count(self, operator: str, args: tuple, packing: tuple[str, str] | None, sent: Sent) -> tuple[Tensor, ...]:
        """Add what this rank sends; gives the tensors that a token exchange sends and fills. KeyError for one that no step makes.

        `packing`: the exchange's phase and "F" or "B"; None: of counts.
        """
        return getattr(self, _KINDS[operator])(operator, args, packing, sent)

    def _exchange(self, operator: str, args: tuple, packing: tuple[str, str] | None, sent: Sent) -> tuple[Tensor, ...]:
        out, rows, handle, _, split = args[:5]
        ranks = dist.get_process_group_ranks(group_of(handle))
        row = rows[0].nbytes if len(rows) else 0
        for peer, num in zip(ranks, split or [len(rows) // len(ranks)] * len(ranks), strict=True):
            self._to(sent, " ".join(packing) if packing else "counts", peer, num * row)
        return (out, rows) if packing else ()

    def _send(self, operator: str, args: tuple, packing: object, sent: Sent) -> tuple[()]:
        (tensor,), handle, peer = args[:3]
        self._to(sent, "pipeline", dist.get_process_group_ranks(group_of(handle))[peer], tensor.nbytes)
        return ()

    def _receive(self, operator: str, args: tuple, packing: object, sent: Sent) -> tuple[()]:
        return ()

    def _ring(self, operator: str, args: tuple, packing: object, sent: Sent) -> tuple[()]:
        name, whole, trips = _RINGS[operator]
        tensor = args[whole][0] if isinstance(args[whole], list) else args[whole]
        handle = next(arg for arg in args[1:] if not isinstance(arg, (Tensor, list)))
        ranks = dist.get_process_group_ranks(group_of(handle))
        nodes = len({rank // self.gpus_per_node for rank in ranks})
        passed = trips * tensor.nbytes * Fraction(len(ranks) - 1, len(ranks))
        across = passed * Fraction(nodes, len(ranks)) if nodes > 1 else Fraction(0)
        for link, num_bytes in (("inter", across), ("intra", passed - across)):
            if num_bytes:
                sent[name, link] += num_bytes
        return ()

    def _to(self, sent: Sent, name: str, peer: int, num_bytes: int) -> None:
        if peer != self.rank and num_bytes:
            sent[name, "intra" if peer // self.gpus_per_node == self.rank // self.gpus_per_node else "inter"] += num_bytes


_RINGS = {  # name, the argument that holds the whole buffer, times around
    "c10d._reduce_scatter_base_": ("reduce", 1, 1),
    "c10d.reduce_": ("reduce", 0, 1),  # of one owner's share: all owners' together are the same ring
    "c10d._allgather_base_": ("gather", 0, 1),
    "c10d.broadcast_": ("gather", 0, 1),
    "c10d.allreduce_": ("scalars", 0, 2),
}
_KINDS = {"c10d.alltoall_base_": "_exchange", "c10d.send": "_send", "c10d.recv_": "_receive", **dict.fromkeys(_RINGS, "_ring")}

# What `torch.ops.c10d` operators return where nobody else is there.
ANSWERS: dict[str, Callable[..., Any]] = {
    "c10d.alltoall_base_": lambda *args: instant_work(),
    "c10d.send": lambda *args: instant_work(),
    "c10d.recv_": lambda *args: instant_work(),
    "c10d._reduce_scatter_base_": lambda out, *args: (out, instant_work()),
    "c10d._allgather_base_": lambda out, *args: (out, instant_work()),
    "c10d.allreduce_": lambda tensors, *args: (tensors, instant_work()),
}


class Alone(Transport):
    """Transfers that are over when they have begun, and say so where `told`; gloo says nothing of what was sent."""

    def __init__(self, *, told: bool = True):
        self.told = told

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        super().all_to_all(out, rows, group, received=received, sent=sent)
        return _Over()

    def isend(self, tensor, rank, group):
        super().isend(tensor, rank, group)
        return _Over(self.told)

    def irecv(self, tensor, rank, group):
        super().irecv(tensor, rank, group)
        return _Over()


class _Over:
    def __init__(self, told: bool = True):
        self.told = told

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return self.told
