"""Who keeps the others waiting: named by rank and phase, once and then less and less often; and nobody where nobody does."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ParallelConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel import own_time
from shoestring.parallel.own_time import OwnTime
from shoestring.parallel.trace import Span
from shoestring.train.step import silent
from shoestring.train.stragglers import TITLES, Busy, Stragglers

from ..faults.processes import Fault, Faulty

# (pp, edp, ep): several in a stage; two in each; one in each, where stages differ as they do; one stage.
LAYOUTS = st.sampled_from([(2, 2, 2), (2, 2, 1), (4, 1, 1), (2, 1, 1), (1, 1, 3), (1, 2, 4)])
PHASES = range(len(TITLES))


def quiet(layout, seed, steps):
    """(steps, phases, ranks): a run that nothing happens to. Stages differ up to threefold; each number scatters by 5 %, and in a tenth of
    the steps a rank is up to twice as slow."""
    (pp, edp, ep), rng = layout, np.random.default_rng(seed)
    usual = np.array([0.01, 1.0, 0.1])[:, None] * np.ones(pp * edp * ep)
    usual[1:] *= rng.uniform(1, 3, (2, pp)).repeat(edp * ep, axis=1)
    busy = usual * rng.lognormal(0, 0.05, (steps, *usual.shape))
    for step in range(steps):
        if rng.random() < 0.1:
            busy[step, :, rng.integers(usual.shape[1])] *= rng.uniform(1, 2)
    return busy


def told(layout, busy, more=0.0):
    """By step. A step takes as long as the slowest in each phase."""
    pp, edp, ep = layout
    heard = Stragglers(ParallelConfig(pp=pp, edp=edp, ep=ep), 0.2)
    seconds = busy.max(axis=2).sum(axis=1) + more
    return {i: found for i, b in enumerate(busy) if (found := heard.hear(i, dict(zip(TITLES, b.tolist())), seconds[i]))}


@settings(deadline=None, max_examples=20)
@given(layout=LAYOUTS, seed=st.integers(0, 10**6))
def test_nobody(layout, seed):
    assert told(layout, quiet(layout, seed, 150)) == {}


@settings(deadline=None, max_examples=40)
@given(layout=LAYOUTS, seed=st.integers(0, 10**6), phase=st.sampled_from(PHASES), data=st.data(), begin=st.integers(25, 60))
def test_a_slow_rank_is_named(layout, seed, phase, data, begin):
    busy = quiet(layout, seed, 110)
    rank, typical = data.draw(st.integers(0, busy.shape[2] - 1)), busy.max(axis=2).sum(axis=1).mean()
    busy[begin:, phase, rank] += typical
    found = told(layout, busy)
    assert begin + 5 <= min(found) <= begin + 9, "in eight of the last ten steps, of which one or two may have been late by themselves"
    sentences = [sentence for of_step in found.values() for sentence in of_step]
    title = list(TITLES.values())[phase]
    assert all(sentence.startswith(f"rank {rank} is slow: {title} takes it ") for sentence in sentences), sentences
    assert [b - a for a, b in zip(found, list(found)[1:])] == [10, 20, 40][: len(found) - 1], "less and less often"
    takes, peers, percent = map(float, re.search(r"takes it (\S+) s .* (\S+) s \(.*: (\d+) % of the step", sentences[-1]).groups())
    assert takes - peers == pytest.approx(typical, rel=0.35) and 25 < percent < 85


@settings(deadline=None, max_examples=40)
@given(layout=LAYOUTS, seed=st.integers(0, 10**6), phase=st.sampled_from(PHASES), data=st.data(), at=st.integers(30, 60))
def test_one_step(layout, seed, phase, data, at):
    """One rank is busy; or all are, as with a file system that stalls; or nobody."""
    busy, ranks = quiet(layout, seed, 70), layout[0] * layout[1] * layout[2]
    late = data.draw(st.sampled_from([[0], [ranks - 1], list(range(ranks)), []]))
    busy[at, phase, late] += 40
    found = told(layout, busy, more=40.0 * (np.arange(70) == at) * (not late))
    assert list(found) == [at] and len(found[at]) == 1
    assert re.match(rf"step {at} took 4\d s \(median \S+ s\): ", found[at][0])
    title = list(TITLES.values())[phase]
    was = "was" if len(late) == 1 else "were"
    assert found[at][0].endswith(f": rank {', '.join(map(str, late))} {was} busy for {busy[at, phase, late].max():.2g} s in {title}"
                                 if late else "no rank was busy: the network, or another job on these machines")  # fmt: skip


def test_what_is_not_told():
    """A step that something else came between, a few slow steps, a rank that is late by little, and a share of 0."""
    usual, late = np.ones((3, 2)), np.array([[1, 50], [1, 1], [1, 1]])
    for share, steps in (
        (0.2, [(usual, 3.0)] * 40 + [(late, 0.0)] * 20),  # not to be looked at
        (0.2, [(late, 52.0)] * 7 + [(usual, 3.0)] * 40),  # where nothing is known of others
        (0.2, [(usual / 300, 0.01)] * 40 + [(late / 1500, 0.035)] * 20),  # 33 ms, most of the step
        (0.0, [(usual, 3.0)] * 40 + [(late, 52.0)] * 20),  # switched off
    ):
        heard = Stragglers(ParallelConfig(edp=2), share)
        assert [s for i, (b, seconds) in enumerate(steps) for s in heard.hear(i, dict(zip(TITLES, b.tolist())), seconds)] == []


def test_slow_devices_in_traces():
    """Twice in a row; beside the ranks of the same stage: the other one has twice as much to do."""
    heard, told = Stragglers(ParallelConfig(pp=2, edp=2), 0.2), []
    for step, slow in ((100, 1.6), (200, 1.0), (300, 1.6), (400, 1.5), (500, 1.0)):
        busy = [1.0, slow, 2.0, 2.0]
        spans = [Span(rank, "compute", "F", 0, 0, "", i, i + seconds / 2) for rank, seconds in enumerate(busy) for i in range(2)]
        told += heard.look(step, [*spans, Span(0, "exchange", "F", 0, 0, "", 0.0, 1.9)])
    sentence = "rank 1 is slow: in traced step 400 it computes for 1.5 s, its peers for 1 s: 25 % of the step is spent waiting for it"
    assert told == [sentence]


# ---------------------------------------------------------------- the clock


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, and those for which the thread stood in line."""
    now = {"now": 100.0, "queued": 0.0}
    monkeypatch.setattr("time.monotonic", lambda: now["now"])
    monkeypatch.setattr(own_time.os, "pread", lambda *a: f"7 {round(now['queued'] * 1e9)} 3\n".encode())
    return now


def test_waiting_and_standing_in_line_are_not_ones_own_time(clock):
    own = OwnTime()
    begin = own()
    clock["now"] += 3
    with own:
        clock["now"] += 10
        clock["queued"] += 2  # once what was waited for had come
    clock["now"] += 4
    clock["queued"] += 1
    assert own() - begin == pytest.approx(3 + 3)
    begin, clock["queued"] = (alone := OwnTime(shared_cores=False))(), 50.0
    clock["now"] += 4
    assert alone() - begin == pytest.approx(4)


def test_what_a_rank_says_of_a_step(clock):
    beats, parts = [], {"data": 1, "forward and backward": 2, "reduce": 4, "update": 8}
    busy = Busy(lambda phase, step=None: beats.append((phase, step)))
    busy("start")
    clock["now"] += 500

    def step(number, between=0.0):
        for phase, seconds in parts.items():
            busy(phase, number if phase == "data" else None)
            if phase == "reduce":
                said.append(busy.take())
            clock["now"] += seconds / 2
            busy("")  # a sign of life
            with busy.own:
                clock["now"] += seconds / 2
        busy.rest()
        busy("checkpoint")
        clock["now"] += between

    said = []
    for number, between in ((1, 0), (2, 0.01), (3, 60), (4, 0), (5, 0), (5, 0), (6, 0)):
        step(number, between)
    own = [tuple(signals.values()) for signals, _ in said]
    assert own == [pytest.approx(v) for v in ((0.5, 1, 0), *[(0.5, 1, 4)] * 6)] and list(said[0][0]) == list(TITLES)
    assert [seconds for _, seconds in said] == pytest.approx([0, 15, 15, 0, 15, 0, 15]), "not the first; not after a save; not one again"
    assert beats[:3] == [("start", None), ("data", 1), ("", None)]
    assert list(Busy(silent, on_gpu=True).take()[0]) == ["busy_data"], "a GPU's compute is not its host's"


# ---------------------------------------------------------------- real runs

WORDS = [
    "model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "optim.warmup_steps=2", "checkpoint.interval=0",
]  # fmt: skip


def words_of(folder, *words):
    return [*WORDS, f"run_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}", *words]


def job(words, faults):
    said = []
    Faulty(*faults)(load(words), torch.device("cpu"), beat=silent, log=said.append)
    return [line for line in said if " is slow: " in line or " took " in line]


def slow(rank, phase, seconds, steps):
    return [Fault(kind="slow", rank=rank, step=step, phase=phase, seconds=seconds) for step in steps]


def test_in_a_run_of_replicas(tmp_path):
    """Data late step after step; then the update once: the other rank waits for the weights."""
    words = words_of(tmp_path, "parallel.edp=2", "train.steps=18")
    faults = [*slow(1, "data", 0.3, range(5, 13)), *slow(0, "update", 6.0, [17])]
    (lasting, once), _ = fork_ranks(2, job, words, faults)
    assert re.match(
        r"rank 1 is slow: data takes it 0\.3\d* s of each step, its peers 0\.0\d+ s \(the last \d+ steps to \d+\): \d+ %", lasting
    )
    assert re.match(r"step 18 took \S+ s \(median \S+ s\): rank 0 was busy for 6\S* s in update$", once)


def test_in_a_run_of_stages(tmp_path):
    """Three others wait in exchanges, transfers and sums: none of them is named."""
    words = words_of(tmp_path, "parallel.pp=2", "parallel.ep=2", "train.steps=14")
    said, *others = fork_ranks(4, job, words, slow(2, "forward and backward", 0.5, range(5, 14)))
    assert [line[:35] for line in said] == ["rank 2 is slow: forward and backwar"] and others == [[], [], []]
