"""Row counts, exchanged and brought to the host while it does other things."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..host_reads import HostReads
from ..transport import Transport


class HostCounts:
    """One even exchange of counts: (P, C) int64, a row of C to each of the group's P ranks."""

    def __init__(self, sent_PC: Tensor, *, group: dist.ProcessGroup, transport: Transport, reads: HostReads):
        self.both_2PC = torch.stack([sent_PC, torch.empty_like(sent_PC)])
        self.work = transport.all_to_all(self.both_2PC[1], self.both_2PC[0], group)
        self.on_host = reads.begin(self.both_2PC, self.work)

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was received, on its device; on the host: what was sent, and what was received."""
        self.work.wait()
        return self.both_2PC[1], *self.on_host()
