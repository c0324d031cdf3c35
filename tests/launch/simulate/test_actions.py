"""How long actions take by `actions.py`, against the real executor on a clock that only the phases and exchanges it is told of move."""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.launch.simulate.actions import RankCosts
from shoestring.launch.simulate.stage import Busy, Compute, Exchange
from shoestring.parallel.phases import ComputePhase, MicroBatch
from shoestring.parallel.schedule import SCHEDULES
from shoestring.parallel.trace import Tracer
from shoestring.train.engine import Engine

# pp, schedule, chunks, micro-batches; experts are on two ranks
LAYOUTS = [(1, "1f1b", 1, 2), (1, "dualpipev", 2, 3), (2, "1f1b", 1, 3), (2, "zbv", 2, 4), (2, "dualpipev", 2, 5), (2, "dualpipe", 1, 6)]


def seconds(*key):
    """A whole number for each stage, phase and pass: sums are exact."""
    return random.Random(str(key)).randint(0, 30)


class Clock(Tracer):
    """Tells what each action took, whatever its inputs were waited for."""

    def __init__(self):
        self.now, self.port, self.took = 0, 0, []

    @contextmanager
    def action(self, action):
        self.now = self.port = 0
        yield
        if action:
            self.took.append(self.now)

    @contextmanager
    def compute(self, op, phase):
        self.now += seconds(op.stage, phase, "F" if op.kind == "F" else "B")
        yield

    @contextmanager
    def weights(self, op, phase):
        self.now += seconds(op.stage, phase, "W")
        yield

    def issue(self, op, phase, pending):
        if pending.work is None:
            return pending
        self.port = max(self.port, self.now) + seconds(op.stage, phase, "F" if op.kind == "F" else "B")
        return replace(pending, work=Arrival(self, self.port, pending.work))


class Arrival:
    def __init__(self, clock, at, work):
        self.clock, self.at, self.work = clock, at, work

    def wait(self):
        self.work.wait()
        self.clock.now = max(self.clock.now, self.at)


def steps(engine):
    """{stage: what `stage.py` would make of it}"""
    made = {}
    for index, stage in engine.stages.items():
        made[index] = []
        for phase in stage.phases:
            if isinstance(phase, ComputePhase):
                passes = "FB" if phase.name == "losses" else "FBW"  # has no weights
                by_pass = {when: Busy(seconds=seconds(index, phase.name, when)) for when in passes}
                made[index].append(Compute(name=phase.name, alone=by_pass, beside=by_pass))
            else:
                exchanged = type(phase).__name__ != "EmptyPhase"
                by_pass = {when: seconds(index, phase.name, when) for when in "FB"} if exchanged else {}
                made[index].append(Exchange(name=phase.name, alone=by_pass, beside=by_pass))
    return made


def job(layouts):
    """[[took, steps], ...] of this rank."""
    seen = []
    for pp, name, chunks, num in layouts:
        words = f"parallel.pp={pp} parallel.ep=2 parallel.schedule={name} parallel.chunks={chunks} model.num_layers={2 * pp * chunks + 1}"
        words += f" model.num_dense_layers=2 data.seq_len=16 train.micro_batch_sequences=1 train.global_batch_tokens={32 * num}"
        engine = Engine(load(["model=micro", "data=synthetic", *words.split()]))
        engine.executor.tracer = clock = Clock()
        rows = torch.randint(engine.config.model.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0))
        engine.executor.step([MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * num)
        seen.append((clock.took, steps(engine)))
    return seen


@pytest.mark.parametrize("pp", [1, 2])
def test_actions_take_what_the_executor_takes(pp):
    layouts = [layout for layout in LAYOUTS if layout[0] == pp]
    for (_, name, chunks, num), *ranks in zip(layouts, *fork_ranks(2 * pp, job, layouts)):
        lists = SCHEDULES[name].actions(pp, chunks, num)
        every = {stage: tuple(made) for _, of_rank in ranks for stage, made in of_rank.items()}
        for n, (took, _) in enumerate(ranks):
            costs = RankCosts(every, hidden=1.0).of(lists[n // 2])
            assert [cost.seconds for cost in costs] == took, (name, n)
            assert any(took) and all(cost.seconds == pytest.approx(cost.compute + cost.exposed) for cost in costs)


def test_what_software_leaves_bare():
    """A pair whose exchanges all fit under its compute, and one whose do not."""
    phase = lambda f, b, w: (lambda by: Compute(name="x", alone=by, beside=by))({k: Busy(seconds=v) for k, v in zip("FBW", (f, b, w))})
    exchange = lambda n: Exchange(name="y", alone={"F": n, "B": n}, beside={"F": n, "B": n})
    (pair,) = [a for a in SCHEDULES["dualpipev"].actions(1, 2, 2)[0] if len(a) > 1][:1]
    for length, hidden in ((1.0, 0.9), (30.0, 0.9)):
        stages = [(phase(10, 10, 10), exchange(length), phase(10, 10, 10), exchange(length))] * 2
        full, part = (RankCosts(stages, hidden=share)._pair(pair) for share in (1.0, hidden))
        assert part.seconds == max(full.seconds, 60 + (1 - hidden) * 4 * length) and part.compute == 60
