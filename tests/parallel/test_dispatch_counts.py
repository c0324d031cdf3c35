"""Counts are asked for right after the routing, and the host waits for them only where it needs them."""

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.schema import ParallelConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel.dispatch import Routing, make_dispatcher
from shoestring.parallel.dispatch.counts import HostCounts
from shoestring.parallel.groups import Mesh
from shoestring.parallel.host_reads import HostReads
from shoestring.parallel.transport import Transport


class Exchange:
    """An exchange, and a copy to the host, whose values come only when they are waited for."""

    def __init__(self, seen):
        self.seen = seen

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        self.seen.append("exchange begun")
        self.arrived = lambda: out.copy_(rows + 10)
        return self

    def wait(self):
        self.seen.append("exchange waited for")
        self.arrived()

    def begin(self, tensor, work):
        assert work is self
        self.seen.append("copy begun")
        return lambda: (self.seen.append("copy waited for"), tensor.clone())[1]


def test_the_order_of_things():
    seen = []
    exchange = Exchange(seen)
    sent_PC = torch.arange(6).view(2, 3)
    counts = HostCounts(sent_PC, group=None, transport=exchange, reads=exchange)
    assert seen == ["exchange begun", "copy begun"], "nobody has waited"
    received, sent_on_host, received_on_host = counts.wait()
    assert seen[2:] == ["exchange waited for", "copy waited for"], "of the host's waits this is the only one"
    assert torch.equal(sent_on_host, sent_PC) and torch.equal(received_on_host, sent_PC + 10) and torch.equal(received, sent_PC + 10)


def test_on_the_host_nothing_is_copied():
    exchange = Exchange(seen := [])
    counts = HostCounts(torch.ones(2, 3, dtype=torch.int64), group=None, transport=exchange, reads=HostReads())
    received, _, received_on_host = counts.wait()
    assert received.data_ptr() == received_on_host.data_ptr() and "copy begun" not in seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants pinned memory, streams and events")
def test_on_a_gpu_the_copy_waits_for_the_exchange_and_the_host_for_neither():
    class Slow(Exchange):
        def all_to_all(self, out, rows, group, *, received=None, sent=None):
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(10**8)
                out.copy_(rows + 10)
                self.over = self.stream.record_event()
            return self

        def wait(self):
            torch.cuda.current_stream().wait_event(self.over)

    exchange = Slow([])
    sent_PC = torch.arange(6, device="cuda").view(2, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = HostCounts(sent_PC, group=None, transport=exchange, reads=HostReads())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not exchange.over.query(), "the host did not wait"
    received, sent_on_host, received_on_host = counts.wait()
    assert not received_on_host.is_cuda and torch.equal(received_on_host, sent_PC.cpu() + 10) and torch.equal(sent_on_host, sent_PC.cpu())
    assert torch.equal(received, sent_PC + 10)


def host_reads(name):
    """How often each part of a dispatcher asks the host to wait."""
    ranks, seen = dist.get_world_size(), []

    class Watching(Transport):
        def all_to_all(self, *args, **kwargs):
            seen.append("begun")
            work, outer = super().all_to_all(*args, **kwargs), seen
            return type("Work", (), {"wait": lambda self: (outer.append("waited"), work.wait())})()

    groups = Mesh.create(ParallelConfig(ep=ranks, dispatcher=name), dist.get_rank(), gpus_per_node=2).ep
    dispatcher = make_dispatcher(name, num_experts=2 * ranks, align=8, groups=groups, transport=Watching())
    begin, steps = dispatcher.reads.begin, []
    dispatcher.reads.begin = lambda tensor, work: (seen.append("copy"), begin(tensor, work))[1]
    r = Routing(expert_TK=torch.rand(10, 2 * ranks).topk(2).indices)
    for step in (
        lambda: dispatcher.start(r),
        lambda: dispatcher.wait_counts(r),
        lambda: dispatcher.to_experts(torch.ones(10, 8), None, r, "F"),
    ):
        step()
        steps.append(seen.copy())
        seen.clear()
    return steps


@pytest.mark.parametrize("name", ["alltoall", "hierarchical"])
def test_each_dispatcher_asks_early_and_once(name):
    for start, wait, send in fork_ranks(4, host_reads, name):
        assert start == ["begun", "copy"] and set(wait) == {"waited"} and send == ["begun"], (
            "one exchange of counts, no wait before it is due"
        )
