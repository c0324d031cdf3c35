"""Row counts, exchanged and brought to the host while it does other things.

A GPU's host learns how many rows are to come by a copy on a stream of its own that waits for the exchange; nobody waits for that copy
before the sizes are needed. On the host's own memory (gloo) there is nothing to copy.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ..transport import Transport, Work


class HostCopies:
    """Begins copies to the host of what an exchange under way brings."""

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def begin(self, tensor: Tensor, work: Work) -> Callable[[], Tensor]:
        """Returns at once. What it returns waits, and gives the copy. The caller keeps `tensor` until then."""
        if not tensor.is_cuda:
            return lambda: (work.wait(), tensor)[1]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            work.wait()  # the stream, not the host
            host.copy_(tensor, non_blocking=True)
            copied = self.stream.record_event()
        return lambda: (copied.synchronize(), host)[1]


class HostCounts:
    """One even exchange of counts: (P, C) int64, a row of C to each of the group's P ranks."""

    def __init__(self, sent_PC: Tensor, *, group: dist.ProcessGroup, transport: Transport, copies: HostCopies):
        self.both_2PC = torch.stack([sent_PC, torch.empty_like(sent_PC)])
        self.work = transport.all_to_all(self.both_2PC[1], self.both_2PC[0], group)
        self.on_host = copies.begin(self.both_2PC, self.work)

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was received, on its device; on the host: what was sent, and what was received."""
        self.work.wait()
        return self.both_2PC[1], *self.on_host()
