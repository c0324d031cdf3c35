"""The fabric: what it counts, what it delivers, and when, as its links say; paced phases."""

import time

import pytest
import torch
import torch.distributed as dist
from shoestring.launch.local import fork_ranks
from shoestring.parallel.fabric import Fabric, Link, Pace, Port
from shoestring.parallel.phases import Pending
from shoestring.parallel.schedule.ops import Op
from shoestring.parallel.trace import Recorder, Tracer

NODES = [0, 0, 1, 1]
ROWS = [[0, 3, 1, 2], [5, 0, 0, 4], [2, 2, 7, 0], [0, 0, 0, 0]]  # from rank (down) to rank: uneven, nothing, own share, a silent rank
WIDTH = 3  # int64 columns: 24 bytes a row


@pytest.fixture
def clock(monkeypatch):
    """A `time` that stands still unless slept."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_transfers_queue_on_a_port(clock):
    port = Port(link=Link(bandwidth=10.0))
    assert [port.occupy(20), port.occupy(5)] == [102.0, 102.5]  # the second waits for the first
    clock[0] = 110.0
    assert port.occupy(10) == 111.0  # idle since: begins now


def test_a_packet_waits_for_nobody(clock):
    port = Port(link=Link(bandwidth=10.0, packet=5))
    assert [port.occupy(20), port.occupy(5), port.occupy(6)] == [102.0, 100.5, pytest.approx(102.6)]


def exchange():
    rank, world = dist.get_rank(), dist.group.WORLD
    fabric = Fabric(rank, NODES, intra=Link(latency=0.001, bandwidth=1e6), inter=Link(latency=0.002, bandwidth=1e5))
    value = lambda sender, receiver: 100 * sender + 10 * receiver
    sent, received = ROWS[rank], [row[rank] for row in ROWS]
    rows = torch.cat([torch.full((n, WIDTH), value(rank, peer)) for peer, n in enumerate(sent)])
    out = torch.empty(sum(received), WIDTH, dtype=torch.int64)
    fabric.all_to_all(out, rows, world, received=received, sent=sent).wait()
    right = torch.cat([torch.full((n, WIDTH), value(peer, rank)) for peer, n in enumerate(received)])
    uneven = fabric.sent_bytes

    even = torch.empty(4, dtype=torch.int64)
    fabric.all_to_all(even, torch.arange(4) + 10 * rank, world).wait()
    assert even.tolist() == [10 * peer + rank for peer in range(4)]

    beside, across, got = rank ^ 1, (rank + 2) % 4, []
    incoming = [torch.empty(5), torch.empty(6), torch.empty(7)]
    works = [fabric.irecv(t, peer, world) for t, peer in zip(incoming, (beside, across, across))]
    for size, peer in ((5, beside), (6, across), (7, across)):
        works.append(fabric.isend(torch.full((size,), float(rank)), peer, world))
    for work in works:
        work.wait()
        got.append((work.ended, time.monotonic()))
    arrived = [t.unique().tolist() for t in incoming]
    return torch.equal(out, right), uneven, fabric.sent_bytes, arrived, [beside, across], got


def test_bytes_arrive_and_are_counted_by_link():
    for rank, (right, uneven, total, arrived, (beside, across), times) in enumerate(fork_ranks(4, exchange)):
        assert right
        inside = sum(n for peer, n in enumerate(ROWS[rank]) if peer != rank and NODES[peer] == NODES[rank]) * WIDTH * 8
        outside = sum(n for peer, n in enumerate(ROWS[rank]) if NODES[peer] != NODES[rank]) * WIDTH * 8
        assert uneven == {"intra": inside, "inter": outside}
        assert total == {"intra": inside + 8 + 5 * 4, "inter": outside + 2 * 8 + (6 + 7) * 4}
        assert arrived == [[beside], [across], [across]]
        assert all(moment >= ended for ended, moment in times), "a wait returned before its link's time had passed"
        assert times[2][0] > times[1][0], "messages to one peer queue on the link"


def slow():
    """Ends of two exchanges and of a message, in seconds after they were issued, and the CPU seconds of the exchanges."""
    rank, world = dist.get_rank(), dist.group.WORLD
    fabric = Fabric(rank, [0, 1], intra=Link(), inter=Link(latency=0.1, bandwidth=1e4))
    sent, received = ([0, 500], [0, 1000]) if rank == 0 else ([1000, 0], [500, 0])
    rows = torch.zeros(sum(sent), dtype=torch.uint8)
    outs = [torch.empty(sum(received), dtype=torch.uint8) for _ in range(2)]
    dist.barrier()
    cpu, begun = time.process_time(), time.monotonic()
    works = [fabric.all_to_all(out, rows, world, received=received, sent=sent) for out in outs]
    for work in works:
        work.wait()
    ends, cpu = sorted(work.ended - begun for work in works), time.process_time() - cpu
    begun, message = time.monotonic(), torch.zeros(1000, dtype=torch.uint8)
    work = fabric.isend(message, 1, world) if rank == 0 else fabric.irecv(message, 0, world)
    work.wait()
    return ends, work.ended - begun, cpu


def test_no_transfer_is_faster_than_its_link():
    """An exchange takes the larger direction, here 1000 bytes at 1e4 a second, and two queue: 0.1 and 0.2 s, then 0.1 s of latency."""
    for rank, (ends, message, cpu) in enumerate(fork_ranks(2, slow)):
        assert ends[0] >= 0.2 and ends[1] >= 0.3
        assert ends[1] - ends[0] >= 0.1 - 1e-9, "not one after the other on the link"
        assert rank == 1 or message >= 0.1  # it has left; its latency is the receiver's
        assert cpu < 0.5 * ends[1], "waiting takes CPU time"


class Told(Tracer):
    """Which calls came, in order."""

    def __init__(self):
        self.calls = []

    def issue(self, op, phase, pending):
        self.calls.append(("issue", phase))
        return pending

    def link(self, kind, op, work):
        self.calls.append(("link", kind))
        return work


def test_phases_last_as_long_as_told(clock):
    told = Told()
    pace = Pace(told, {("experts", "F"): 2.0, ("experts", "B"): 4.0, ("experts", "W"): 1.0})
    for kind, seconds in (("F", 2.0), ("B", 4.0), ("I", 4.0)):
        begun = clock[0]
        with pace.compute(Op(kind, 0, 0), "experts"):
            clock[0] += 0.5  # the real work
        assert clock[0] == begun + seconds
    with pace.weights(Op("B", 0, 0), "experts"):
        clock[0] += 3.0  # longer than told: not cut short
    assert clock[0] == begun + seconds + 3.0
    with pace.compute(Op("F", 0, 0), "head"):
        pass
    assert clock[0] == begun + seconds + 3.0
    local = Pending(work=None, finish=tuple)
    assert pace.issue(Op("F", 0, 0), "dispatch", local) is local
    assert pace.link("send", Op("F", 0, 0), local) is local
    assert told.calls == [("issue", "dispatch"), ("link", "send")]


def paced_exchanges():
    rank, op = dist.get_rank(), Op("F", 0, 0)
    recorder = Recorder(rank)
    pace = Pace(recorder, {("dispatch", "F"): 0.1})
    recorder.begin()
    outs = [torch.empty(2) for _ in range(2)]
    works = [dist.all_to_all_single(out, torch.full((2,), float(rank)), async_op=True) for out in outs]
    for pending in [pace.issue(op, "dispatch", Pending(work=w, finish=lambda o=o: (o,))) for w, o in zip(works, outs)]:
        assert pending.wait()[0].tolist() == [0, 1]
    return recorder.finish()


def test_paced_exchanges_queue():
    spans, _ = fork_ranks(2, paced_exchanges)
    for rank in range(2):
        first, second = sorted((s for s in spans if s.rank == rank and s.what == "exchange"), key=lambda s: s.end)
        assert first.end >= 0.1 - 1e-9  # since the recorder began: an exchange may land before its issue is recorded
        assert second.end - first.end >= 0.1 - 1e-9
