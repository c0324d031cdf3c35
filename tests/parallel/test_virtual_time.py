"""The executor, with whole ranks, on a clock that moves only by what phases are said to take: each action ends exactly when
`parallel/timeline.py` says, and what is alive then is what the list's own arithmetic says.

Messages carry their sender's clock; who receives one goes on no earlier. All of a stage's time is in its experts, which a pair runs
backward first, between the arrivals of both its inputs and the departure of both its results.
"""

import random
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES, Held
from shoestring.parallel.timeline import simulate
from shoestring.parallel.trace import Tracer
from shoestring.parallel.transport import Transport
from shoestring.train.engine import Engine

LAYOUTS = {  # by pp: schedule, chunks, micro-batches
    2: [("1f1b", 1, 5), ("interleaved_1f1b", 2, 6), ("zbv", 2, 5), ("dualpipev", 2, 6), ("dualpipe", 1, 6)],
    4: [("1f1b", 1, 6), ("interleaved_1f1b", 2, 8), ("zbv", 2, 8), ("dualpipev", 2, 9), ("dualpipe", 1, 10)],
}
EQUAL = {"F": 1, "B": 2, "I": 1, "W": 1}


class Durations:
    """Whole numbers, which sum exactly. Seed 0: the unit times that published makespans are for, and links that take none."""

    def __init__(self, seed):
        self.seed = seed

    def draw(self, *key):
        return random.Random(f"{self.seed} {key}").randint(0, 20)

    def op(self, op):
        return self.draw(*op) if self.seed else EQUAL[op.kind]

    def action(self, action):
        return sum(map(self.op, action))

    def hop(self, sender, receiver):
        return self.draw(sender, receiver) if self.seed else 0


class VirtualTime(Transport, Tracer):
    """This rank's clock, and what it has seen."""

    def __init__(self, durations):
        self.rank, self.durations, self.now, self.ends = dist.get_rank(), durations, 0, []
        self.running = None
        self.graphs, self.closures = weakref.WeakSet(), weakref.WeakSet()
        self.alive, self.most = [], 0  # (stage, micro-batch) of graphs and of closures after each action; the most graphs at any time
        self.weights_run = []  # (its op, the action it ran in)

    @contextmanager
    def action(self, action):
        self.running = action
        yield
        if not action:  # before the first
            return
        self.ends.append(self.now)
        self.alive.append(({t.key for t in self.graphs}, {t.key for t in self.closures}))

    @contextmanager
    def compute(self, op, phase):
        self.key = op.stage, op.micro_batch
        if phase == "experts":
            self.now += self.durations.op(op)
        yield
        self.most = max(self.most, len({t.key for t in self.graphs}))

    @contextmanager
    def weights(self, op, phase):
        if op.kind == "W":
            self.weights_run.append((op, phase, self.running))
            self.now += self.durations.op(op) if phase == "experts" else 0
        yield

    def isend(self, tensor, rank, group):
        stamp = torch.tensor([self.now + self.durations.hop(self.rank, rank)])
        return Both(super().isend(tensor, rank, group), dist.isend(stamp, rank, group=group, tag=1), stamp)

    def irecv(self, tensor, rank, group):
        stamp = torch.zeros(1, dtype=torch.int64)

        def arrived():
            self.now = max(self.now, stamp.item())

        return Both(super().irecv(tensor, rank, group), dist.irecv(stamp, rank, group=group, tag=1), stamp, arrived)

    # ------------------------------------------------------------ what is alive

    def watch(self, engine):
        for stage in engine.stages.values():
            for phase in stage.phases:
                if phase.name == "experts":
                    phase.compute = self.marked(phase.compute)
        append = engine.ops.store.append

        def put(closure):
            token = Token(self.key)
            self.closures.add(token)
            append(lambda: (closure(), token))

        engine.ops.store.append = put

    def marked(self, compute):
        def with_a_token(batch, h_TD, u_TD, *others):
            token = Token(self.key)
            self.graphs.add(token)
            return compute(batch, h_TD, Mark.apply(u_TD, token), *others)

        return with_a_token


class Both:
    """A transfer and the clock behind it."""

    def __init__(self, work, clock, stamp, arrived=lambda: None):
        self.work, self.clock, self.stamp, self.arrived = work, clock, stamp, arrived

    def wait(self):
        self.work.wait()
        self.clock.wait()
        self.arrived()

    def is_completed(self):
        return False


class Token:
    def __init__(self, key):
        self.key = key


class Mark(torch.autograd.Function):
    """Lives, and its token with it, for as long as the graph does."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def job(layouts, seeds, ep):
    """[[of each layout and seed: what this rank has seen]]"""
    seen = []
    for name, pp, chunks, num in layouts:
        words = f"parallel.pp={pp} parallel.ep={ep} parallel.schedule={name} parallel.chunks={chunks} model.num_layers={pp * chunks}"
        words += f" model.num_dense_layers=0 data.seq_len=16 train.micro_batch_sequences=1 train.global_batch_tokens={16 * num * ep}"
        for seed in seeds:
            clock = VirtualTime(Durations(seed))
            precision = "fp32" if seed else "fp8"  # what is kept is not the same
            engine = Engine(load(["model=micro", "data=synthetic", f"precision={precision}", *words.split()]), transport=clock)
            engine.executor.tracer = clock
            clock.watch(engine)
            rows = torch.randint(engine.config.model.vocab_size, (1, 17), generator=torch.Generator().manual_seed(seed))
            engine.executor.step([MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * num)
            seen.append((clock.ends, clock.alive, clock.most, clock.weights_run))
    return seen


def what_lives(actions):
    """After each action: (stage, micro-batch) of forwards without their backward, of input gradients without their weights'."""
    graphs, closures = set(), set()
    for action in actions:
        for kind, *key in sorted(action, key=lambda op: "BIFW".index(op.kind)):
            key = tuple(key)
            if kind == "F":
                graphs.add(key)
            elif kind == "W":
                closures.remove(key)
            else:
                graphs.remove(key)
                closures |= {key} if kind == "I" else set()
        yield set(graphs), set(closures)


@pytest.mark.parametrize("pp, seeds", [(2, [0, 1]), (4, [1])])
def test_actions_end_when_the_timeline_says_and_hold_what_the_list_says(pp, seeds):
    layouts = [(name, pp, chunks, num) for name, chunks, num in LAYOUTS[pp]]
    ranks = iter(zip(*fork_ranks(pp, job, layouts, seeds, 1)))
    for name, _, chunks, num in layouts:
        lists, bounds = SCHEDULES[name].actions(pp, chunks, num), SCHEDULES[name].held(pp, chunks, num)
        for seed, seen in zip(seeds, ranks):
            durations = Durations(seed)
            timeline = simulate(lists, durations.action, durations.hop)
            for rank, (ends, alive, most, _) in enumerate(seen):
                assert ends == [span.end for span in timeline.spans[rank]], (name, seed, rank)
                assert alive == list(what_lives(lists[rank])), (name, seed, rank)
                assert most <= Held.by(lists[rank]).activations <= bounds[rank].activations, (name, seed, rank)
                assert max(len(closures) for _, closures in alive) <= bounds[rank].closures, (name, seed, rank)


def test_weight_gradients_that_wait_run_beside_the_exchanges_of_lone_actions():
    layout = name, pp, chunks, num = "zbv", 2, 2, 4
    for n, (seen,) in enumerate(fork_ranks(2 * pp, job, [layout], [0], 2)):
        _, alive, _, weights = seen
        actions = SCHEDULES[name].actions(pp, chunks, num)[n // 2]
        beside = {(action, op) for op, _, action in weights if op not in action}
        assert any(action[0][1:] == op[1:] for action, op in beside)  # of the same backward
        assert n < 2 or any(action[0][1:] != op[1:] for action, op in beside)  # left by one before: rank 0 never leaves any
        done = [(op.stage, op.micro_batch, phase) for op, phase, _ in weights]
        assert len(set(done)) == len(done) and {done[:2] for done in done} == {op[1:] for (op, *_) in actions if op.kind == "W"}
        for (graphs, closures), (held, waiting) in zip(alive, what_lives(actions), strict=True):
            assert graphs == held and closures <= waiting
