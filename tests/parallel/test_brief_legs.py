"""In a pair, the slow leg of every hierarchical exchange has the other op's compute beside it; the quick one, inside a node, is not waited
for by turns."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch, Pending
from shoestring.parallel.trace import Tracer
from shoestring.train.engine import Engine

WORDS = "model=micro model.num_layers=2 model.num_dense_layers=0 data=synthetic data.seq_len=8 train.global_batch_tokens=64 parallel.ep=2 "
WORDS += "parallel.schedule=dualpipev parallel.chunks=2 parallel.dispatcher=hierarchical cluster.gpus_per_node=1"


class Order(Tracer):
    """Of each pair, what came in turn: (op, "compute" | "slow" | "quick")."""

    def __init__(self):
        self.pairs = []

    def action(self, action):
        self.pairs.append([] if len(action) > 1 else None)
        return nullcontext()

    def note(self, op, what):
        if self.pairs[-1] is not None:
            self.pairs[-1].append((op, what))

    def compute(self, op, phase):
        self.note(op, "compute")
        return nullcontext()

    def issue(self, op, phase, pending):
        self.note(op, "quick" if pending.brief else "slow")
        return pending


def order():
    engine, rows = Engine(load(WORDS.split())), torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.executor.tracer = tracer = Order()
    engine.executor.step([MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * 4)
    return [pair for pair in tracer.pairs if pair]


def test_the_slow_leg_flies_under_the_others_compute():
    for pairs in fork_ranks(2, order):
        assert pairs
        for pair in pairs:
            assert [what for _, what in pair].count("slow") == [what for _, what in pair].count("quick") == 4
            for i, (op, what) in enumerate(pair):
                until = next((j for j in range(i + 1, len(pair)) if pair[j][0] == op), len(pair))
                if what == "slow":
                    assert "compute" in [w for _, w in pair[i + 1 : until]], f"nothing beside {op}, leg {i} of {pair}"
                elif what == "quick":
                    assert until == i + 1, "others had a turn before a leg that was over at once"


@pytest.mark.parametrize(
    "extend", [lambda p: p.then(lambda: ()), lambda p: p.then_issue(lambda: None), lambda p: p.then_issue(lambda: p).then(tuple)]
)
def test_a_leg_stays_brief_whatever_follows(extend):
    assert extend(Pending(work=None, finish=tuple, brief=True)).brief and not extend(Pending(work=None, finish=tuple)).brief
