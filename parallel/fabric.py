"""A network for runs on one host: links of a given latency and bandwidth inside and between "nodes", and a count of what crosses them.

The bytes really travel (over gloo); a transfer is over when they have and its link's time has passed. Who waits, sleeps: no CPU time is
taken from ranks that compute, so that what is hidden under compute can be measured with few cores. `Pace` likewise gives compute
phases and exchanges a duration of their own, so that more ranks than cores can be measured.

    rank 0 ── port "intra" ──┐ node 0        Each rank has one port of each kind. A transfer occupies it for bytes / bandwidth, after those
           ── port "inter" ──┼──────┐        before it; what it carries arrives `latency` later.
    rank 1 ── port "intra" ──┘      │
           ── port "inter" ─────────┼── other nodes
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .phases import Pending
from .schedule.ops import Action, Op
from .trace import Tracer
from .transport import Transport, Work


@dataclass(frozen=True, kw_only=True)
class Link:
    latency: float = 0.0  # seconds
    bandwidth: float = float("inf")  # bytes per second, each way
    packet: int = 0  # bytes: a transfer of no more slips between the packets of larger ones, and waits for none


@dataclass(kw_only=True)
class Port:
    """A rank's end of its links of one kind. Times are of `time.monotonic`, which all processes of a host share."""

    link: Link
    sent_bytes: int = 0
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def occupy(self, num_bytes: float) -> float:
        """When the last of the bytes has left, if they queue up now."""
        with self.lock:
            seconds, now = num_bytes / self.link.bandwidth, time.monotonic()
            if num_bytes <= self.link.packet:
                return now + seconds
            self.free_at = max(self.free_at, now) + seconds
            return self.free_at


class Arrival:
    """A transfer that is over when `real()` has returned, not before the time that it gives. `ended`: that time, once waited for."""

    def __init__(self, real: Callable[[], float]):
        self.real = real
        self.ended: float | None = None

    def wait(self) -> None:
        if self.ended is None:
            self.ended = self.real()
            sleep_until(self.ended)

    def is_completed(self) -> bool:
        return self.ended is not None


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class Fabric(Transport):
    """`nodes[r]`: the node of global rank r; `intra`, `inter`: the links inside and between nodes. All ranks are on one host.

    `sent_bytes`: payload that this rank sent over each kind, exactly. What an all-to-all leaves on its rank crosses no link. An
    all-to-all begins when the last of its ranks has come, and takes its ports for whichever is more, what it sends or receives.
    """

    def __init__(self, rank: int, nodes: Sequence[int], *, intra: Link, inter: Link):
        self.rank, self.nodes = rank, nodes
        self.ports = {"intra": Port(link=intra), "inter": Port(link=inter)}

    @property
    def sent_bytes(self) -> dict[str, int]:
        return {kind: port.sent_bytes for kind, port in self.ports.items()}

    def kind(self, peer: int) -> str:
        return "intra" if self.nodes[peer] == self.nodes[self.rank] else "inter"

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        peers = dist.get_process_group_ranks(group)
        loads: dict[str, list[int]] = {}  # bytes out, bytes in
        for peer, num_out, num_in in zip(peers, _shares(rows, sent, len(peers)), _shares(out, received, len(peers))):
            if peer != self.rank:
                load = loads.setdefault(self.kind(peer), [0, 0])
                load[0] += num_out
                load[1] += num_in
        for kind, (num_out, _) in loads.items():
            self.ports[kind].sent_bytes += num_out

        def landed(future) -> float:  # in gloo's thread, when the real bytes are here
            future.value()  # or what went wrong
            ends = [port.occupy(max(load)) + port.link.latency for kind, load in loads.items() for port in [self.ports[kind]]]
            return max(ends, default=time.monotonic())

        return Arrival(super().all_to_all(out, rows, group, received=received, sent=sent).get_future().then(landed).wait)

    def isend(self, tensor, rank, group):
        """The time of arrival travels behind the bytes."""
        port = self.ports[self.kind(rank)]
        port.sent_bytes += tensor.nbytes
        left = port.occupy(tensor.nbytes)
        stamp = torch.tensor([left + port.link.latency], dtype=torch.float64)
        works = [super().isend(tensor, rank, group), dist.isend(stamp, rank, group=group, tag=1)]

        def real(keep=stamp) -> float:
            _wait_all(works)
            return left

        return Arrival(real)

    def irecv(self, tensor, rank, group):
        stamp = torch.empty(1, dtype=torch.float64)
        works = [super().irecv(tensor, rank, group), dist.irecv(stamp, rank, group=group, tag=1)]

        def real() -> float:
            _wait_all(works)
            return stamp.item()

        return Arrival(real)


def _shares(rows: Tensor, split: Sequence[int] | None, num: int) -> list[int]:
    """Bytes per peer."""
    if split is None:
        return [rows.nbytes // num] * num
    size = rows[0].nbytes if len(rows) else 0
    return [n * size for n in split]


def _wait_all(works: Sequence[Work]) -> None:
    for work in works:
        work.wait()


class Pace(Tracer):
    """Compute phases, weight gradients and exchanges that take `seconds[phase, "F" | "B" | "W"]`, around the real ones, which are assumed
    to be shorter; what is not named takes its own time. Exchanges of a rank queue on one port, from when the last rank has come.

    It stands between the executor and the `tracer` that records, which sees the durations given.
    """

    def __init__(self, tracer: Tracer, seconds: Mapping[tuple[str, str], float]):
        self.tracer, self.seconds = tracer, seconds
        self.port = Port(link=Link(bandwidth=1.0))  # a "byte" takes a second

    def action(self, action: Action) -> AbstractContextManager:
        return self.tracer.action(action)

    @contextmanager
    def compute(self, op: Op, phase: str) -> Iterator[None]:
        with self.tracer.compute(op, phase), self._lasting(phase, "F" if op.kind == "F" else "B"):
            yield

    @contextmanager
    def weights(self, op: Op, phase: str) -> Iterator[None]:
        with self.tracer.weights(op, phase), self._lasting(phase, "W"):
            yield

    def pack(self, op: Op, phase: str) -> AbstractContextManager:
        return self.tracer.pack(op, phase)

    @contextmanager
    def _lasting(self, phase: str, kind: str) -> Iterator[None]:
        end = time.monotonic() + self.seconds.get((phase, kind), 0.0)
        yield
        sleep_until(end)

    def issue(self, op: Op, phase: str, pending: Pending) -> Pending:
        seconds = self.seconds.get((phase, "F" if op.kind == "F" else "B"), 0.0)
        if pending.work is not None and seconds:

            def landed(future) -> float:
                future.value()
                return self.port.occupy(seconds)

            pending = replace(pending, work=Arrival(pending.work.get_future().then(landed).wait))
        return self.tracer.issue(op, phase, pending)

    def link(self, kind: str, op: Op, work: Work) -> Work:
        return self.tracer.link(kind, op, work)
