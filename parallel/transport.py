"""How bytes leave a rank: the calls that dispatchers and the executor make. Reductions do not pass here."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from . import world


class Work(Protocol):
    def wait(self) -> object: ...

    def is_completed(self) -> bool:
        """Not before it is over; perhaps not until it has been waited for."""
        ...


class CollectiveLost(RuntimeError):
    """Others did not take part in time, or are gone. The message says in what."""


UNHEARD = nullcontext()  # where nobody wants to know of waits


class Named:
    """A work of torch's that says, if it fails, what it was. torch's own error says how long it waited, and no more.

    `waiting` is entered while the host waits for it.
    """

    def __init__(self, work: dist.Work, what: str, group: dist.ProcessGroup | None, waiting: AbstractContextManager = UNHEARD):
        self.work, self.what, self.group, self.waiting = work, what, group, waiting

    def wait(self) -> Any:
        try:
            with self.waiting:
                return self.work.wait()
        except RuntimeError as error:
            raise CollectiveLost(f"{self.what} over {world.title(self.group)}: {error}") from error

    def is_completed(self) -> bool:
        return self.work.is_completed()

    def get_future(self) -> Any:
        return self.work.get_future()


class Transport:
    """torch.distributed, as it is. Every call returns at once; its buffers belong to it until `wait()` has returned.

    `waiting` is entered while the host waits for others: an `OwnTime`, where somebody wants to know how long.
    """

    waiting: AbstractContextManager = UNHEARD

    def __init__(self, waiting: AbstractContextManager = UNHEARD):
        self.waiting = waiting

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
        work = dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)
        return Named(work, "all-to-all", group, self.waiting)

    def isend(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> Work:
        """To a global rank. `tensor` is contiguous."""
        return Named(dist.isend(tensor, rank, group=group), f"send to rank {rank}", group, self.waiting)

    def irecv(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> Work:
        return Named(dist.irecv(tensor, rank, group=group), f"receive from rank {rank}", group, self.waiting)


DIRECT = Transport()  # has no state
