"""Exchanges of one rank with itself: a step is as without a link, every byte takes its time and is counted."""

import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.parallel.fabric import Link
from shoestring.parallel.loopback import Loopback
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.trace import Recorder
from shoestring.parallel.transport import DIRECT
from shoestring.train.engine import Engine

WORDS = ["model=micro", "model.num_layers=2", "model.num_dense_layers=0", "data=synthetic", "data.seq_len=16", "precision=fp32"]
LAYOUT = ["parallel.schedule=dualpipev", "parallel.chunks=2", "train.global_batch_tokens=32"]


def step(dispatcher, transport):
    """Loss sums, main gradients and spans of two micro-batches in one rank."""
    config = load([*WORDS, *LAYOUT, f"parallel.dispatcher={dispatcher}"])
    engine, tracer = Engine(config, transport=transport), Recorder(0)
    rows = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(1))
    engine.executor.tracer = tracer
    tracer.begin()
    losses = engine.executor.step([MicroBatch(tokens_BS=row[None, :-1], targets_BN=row[None, 1:]) for row in rows])
    return losses, {spec.name: spec.param.main_grad.clone() for spec in engine._specs()}, tracer.finish()


def two_links():
    return [step("alltoall", DIRECT), step("alltoall", Loopback(Link(latency=0.001, bandwidth=2e6, packet=1024)))]


def test_a_step_is_the_same_and_takes_its_time():
    (losses, grads, _), (found_losses, found_grads, spans) = fork_ranks(1, two_links)[0]
    assert torch.equal(losses, found_losses) and all(torch.equal(grads[name], found_grads[name]) for name in grads)
    exchanges = [s for s in spans if s.what == "exchange"]
    assert len(exchanges) == 2 * 2 * 2 * 2  # blocks, micro-batches, there and back, forward and backward
    size = 16 * 4 * 32 * 4  # tokens, copies, columns, bytes; some carry weights too
    ends = sorted(s.end for s in exchanges)
    assert all(b - a >= size / 2e6 - 1e-9 for a, b in pairwise(ends)), "two of them on the link at once"


def one_exchange():
    link = Link(latency=0.05, bandwidth=1e4)
    loopback, rows, out = Loopback(link), torch.arange(100.0).view(50, 2), torch.empty(50, 2)
    begun = time.monotonic()
    works = [loopback.all_to_all(t, rows, dist.group.WORLD, received=[50], sent=[50]) for t in (out, torch.empty(50, 2))]
    assert not works[0].is_completed()
    for work in works:
        work.wait()
    loopback.link = Link()
    loopback.all_to_all(out, rows, dist.group.WORLD).wait()
    return torch.equal(out, rows), [work.ended - begun for work in works], loopback.sent_bytes, works[0].is_completed()


def test_exchanges_queue_on_the_link():
    same, ends, sent, over = fork_ranks(1, one_exchange)[0]
    assert same and over and sent == 3 * 400
    assert ends[0] >= 0.09 and ends[1] >= 0.13 and ends[1] - ends[0] >= 0.04 - 1e-9


def two_ranks():
    Loopback(Link()).all_to_all(torch.empty(2), torch.empty(2), dist.group.WORLD)


def test_it_takes_one_rank():
    with pytest.raises(RankFailed, match="ValueError: an exchange of 2 ranks"):
        fork_ranks(2, two_ranks)
