"""How bytes leave a rank: the calls that dispatchers and the executor make. Reductions do not pass here."""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    def wait(self) -> object: ...

    def is_completed(self) -> bool:
        """Not before it is over; perhaps not until it has been waited for."""
        ...


class Transport:
    """torch.distributed, as it is. Every call returns at once; its buffers belong to it until `wait()` has returned."""

    def all_to_all(
        self,
        out: Tensor,
        rows: Tensor,
        group: dist.ProcessGroup,
        *,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> Work:
        """Shares of `rows` to each rank of the group, of each into `out`; `received`, `sent`: rows per peer, None for equal shares."""
        return dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)

    def isend(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> Work:
        """To a global rank. `tensor` is contiguous."""
        return dist.isend(tensor, rank, group=group)

    def irecv(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> Work:
        return dist.irecv(tensor, rank, group=group)


DIRECT = Transport()  # has no state
