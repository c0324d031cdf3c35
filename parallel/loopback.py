"""All-to-alls of one rank with itself, at the speed of a link: what hiding communication needs, and costs, can be measured on one GPU.

`parallel.dispatcher=alltoall` makes a rank exchange even where `parallel.ep` is 1; an engine that is given this transport then sends every
row over a link that is none: right bytes, right time, and programs that hold as many SMs as an exchange would.
"""

import torch
import torch.distributed as dist

from ..kernels.paced_copy import paced_copy
from .fabric import Arrival, Link, Port
from .transport import Transport


class Loopback(Transport):
    """`link`: what all exchanges queue on, of all groups. Each group has a stream of its own, as NCCL's communicators do.

    `programs`: at most as many thread blocks make an exchange; 20 SMs do in DeepSeek-V3 (arXiv 2412.19437, section 3.2.2).
    `sent_bytes`: payload so far. `link` may be changed between steps.
    """

    def __init__(self, link: Link, *, programs: int = 20):
        self.port, self.programs, self.sent_bytes = Port(link=link), programs, 0
        self.streams: dict[dist.ProcessGroup, torch.cuda.Stream] = {}
        self.queue: torch.Tensor | None = None  # the port, where a GPU sees it

    @property
    def link(self) -> Link:
        return self.port.link

    @link.setter
    def link(self, link: Link) -> None:
        self.port.link = link

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        """Raises ValueError for a group of several ranks."""
        if (ranks := dist.get_world_size(group)) != 1:
            raise ValueError(f"an exchange of {ranks} ranks, and a loopback has one: set parallel.ep=1, or use the ordinary transport")
        self.sent_bytes += rows.nbytes
        if rows.is_cuda:
            return self._on_device(out, rows, group)
        paced_copy(out, rows, port=None, nanoseconds=0, latency=0, programs=1)
        arrival = self.port.occupy(rows.nbytes) + self.link.latency
        return Arrival(lambda: arrival)

    def _on_device(self, out: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup) -> "_OnStream":
        if group not in self.streams:
            self.streams[group] = torch.cuda.Stream(rows.device, priority=-1)  # else it waits for the end of all compute that is queued
        if self.queue is None:
            self.queue = torch.zeros(1, dtype=torch.int64, device=rows.device)
        stream = self.streams[group]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            port = torch.zeros_like(self.queue) if rows.nbytes <= self.link.packet else self.queue
            nanoseconds, latency = round(1e9 * rows.nbytes / self.link.bandwidth), round(1e9 * self.link.latency)
            paced_copy(out, rows, port=port, nanoseconds=nanoseconds, latency=latency, programs=self.programs)
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
        return _OnStream(ended)


class _OnStream:
    """A transfer that is over when its stream has come to `ended`. Nobody's host waits for that."""

    def __init__(self, ended: torch.cuda.Event):
        self.ended = ended

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.ended)

    def is_completed(self) -> bool:
        return self.ended.query()
