"""Gradients computed twice: one bit that is wrong is found, and whose it is; where none is, nothing is said, and the curve is the same."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ParallelConfig
from shoestring.launch import exit_codes
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.train import trainer
from shoestring.train.checksum import short
from shoestring.train.metrics import read_records
from shoestring.train.replay import Replay, WrongGradients
from shoestring.train.signals import Heard
from shoestring.train.step import Watch

BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=192", "train.micro_batch_sequences=1", "train.steps=3",
    "optim.warmup_steps=2", "optim.decay=none", "checkpoint.interval=0",
]  # fmt: skip
LAYOUTS = {
    # All ranks of a team; weight gradients late, an embedding at both ends, activations made again, products in BF16.
    "pp 2 x edp 2": [
        *("parallel.pp=2", "parallel.edp=2", "parallel.schedule=dualpipe", "parallel.chunks=1", "model.mtp_depth=1"),
        *("precision.compute=bf16", "train.recompute=[attention]"),
    ],
    "ep 2 x edp 2": ["parallel.ep=2", "parallel.edp=2", "parallel.placement_interval=1"],  # dense weights on four ranks; experts move
    "edp 3": ["parallel.edp=3"],  # who is wrong is in two pairs
    "edp 1": ["train.micro_batch_sequences=3"],  # nobody but itself
}
ON, OFF = "guard.replay_interval=1", "guard.replay_interval=0"


class Wrong(Watch):
    """Each (rank, step, passes): these passes over its micro-batches in that step are wrong, 1 is the first (a replay, if there are any).
    In the midst of backward an upper bit of the mantissa of a sum flips; or, `late`, the lowest one when backward has just ended."""

    def __init__(self, faults, late=False):
        self.faults, self.late, self.step, self.passes = faults, late, -1, 0

    def routing(self, step, samples):
        self.step, self.passes = step, self.passes if step == self.step else 0

    def begun(self, engine):
        compute, tick = engine.executor.step, engine.executor.tick

        def flip(bit):
            grads = [grad.view(-1) for grad in engine.optimizer.main_grad.values() if grad.any()]
            if grads:
                grads[0].view(torch.int32)[grads[0].abs().argmax()] ^= 1 << bit
            return bool(grads)

        def ticks():
            if self.due and not self.late:
                self.due = not flip(15)
            tick()

        def step(*args, **options):
            self.passes += 1
            self.due = (torch.distributed.get_rank(), self.step, self.passes) in self.faults
            losses = compute(*args, **options)
            if self.due:
                assert self.late and flip(0)
            return losses

        engine.executor.step, engine.executor.tick = step, ticks


def job(words, watch):
    said = []
    try:
        trainer.run(load(words), torch.device("cpu"), log=said.append, watch=watch)
    except WrongGradients as error:
        assert exit_codes.of(error) == exit_codes.LOST
        said.append(f"error: {error}")
    return [line for line in said if line.startswith(("step ", "error: "))]


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"

    def start(name, *words, watch=None):
        words = [*BASE, f"data.cache_dir={cache}", f"run_dir={tmp_path / name}", *words]
        said = fork_ranks(load(words).parallel.world_size, job, words, watch)
        return [(r.step, r.tokens, r.loss, r.grad_norm, r.expert_load) for r in read_records(tmp_path / name / "metrics.jsonl")], said

    return start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_bit(run, layout):
    """Of the last rank's own gradients in step 2, in the midst of backward; of its replay in step 3: told by both names, and the curve is
    that of a run without."""
    words = LAYOUTS[layout]
    p = load([*BASE, *words]).parallel
    rank, whole = p.world_size - 1, run("whole", *words, OFF)[0]
    curve, (said, *_) = run("struck", *words, ON, watch=Wrong([(rank, 1, 2), (rank, 2, 1)]))
    pairs = (rank - p.ep, rank), (rank, rank - (p.edp - 1) * p.ep)  # the team before replays its own; it replays the first team's
    found = [f"rank {one} found other gradients than rank {of} of the same samples" for one, of in pairs]
    if p.edp == 1:
        found = [f"rank {rank} found other gradients of the same samples the second time"] * 2
    assert said == [f"step {step}: {who}; computed again, they are alike: a passing fault" for step, who in zip((2, 3), found)]
    assert curve == whole


def test_the_lowest_bit_again_and_again(run):
    """Of one rank of three: ended before any weight has changed, on all ranks alike, and it is named."""
    always = [(1, step, number) for step in (1, 2) for number in range(1, 9)]
    curve, said = run("struck", *LAYOUTS["edp 3"], ON, "checkpoint.interval=1", watch=Wrong(always, late=True))
    assert len(curve) == 1 and said[0] == said[1] == said[2]
    again = run("struck", *LAYOUTS["edp 3"], ON, watch=Wrong(always, late=True))[1]  # from the checkpoint of step 1
    for (error,) in (said[0], again[0]):
        assert error.startswith("error: step 2: ") and ": rank 1 computes wrongly" in error and "Checkpoints after step 1, whose" in error


@pytest.mark.parametrize(("passes", "named"), [((2, 4, 6), "rank 1"), (range(9), "rank 0 or 1")])
def test_of_two(run, passes, named):
    """It does not agree with itself; or it is wrong in one way always, and nobody can tell."""
    _, said = run("struck", "parallel.edp=2", ON, watch=Wrong([(1, 1, number) for number in passes]))
    assert f": {named} computes wrongly" in said[0][0]


CASES = {
    "fp8, a traced step": [
        *("parallel.edp=2", "precision=fp8", "model.dense_hidden_dim=64", "model.expert_hidden_dim=32"),
        *("precision.sentinel_interval=1", "launch.trace_interval=2", "train.steps=2", "train.global_batch_tokens=64"),
    ],
    "deepspeed": ["parallel.edp=2", "optim.engine=deepspeed"],
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_wrong(run, tmp_path, case):
    """No alarm, and what is written of the run and of a step is what it is without, but for the time that it took."""
    if case == "deepspeed":
        deepspeed_zero.preload()
    (plain, _), (twice, (said, *_)) = run("plain", *CASES[case], OFF), run("twice", *CASES[case], ON)
    assert twice == plain and said == []
    names = [
        Counter((e["name"], e["pid"]) for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X")
        for name in ("plain", "twice")
        for path in sorted((tmp_path / name / "traces").glob("step_*.json"))
    ]
    assert len(names) == 2 * ("traced" in case)
    if names:
        assert names[1] == names[0] + Counter({("replay", rank): 1 for rank in range(2)})
    looks = [[r.fp8_sentinel for r in read_records(tmp_path / name / "metrics.jsonl")] for name in ("plain", "twice")]
    assert looks[0] == looks[1] and any(looks[0]) == ("fp8" in case)


class Soils(Watch):
    """After the first update, one bit of a gradient, where there is none yet."""

    def stepped(self, engine, result):
        if torch.distributed.get_rank() == 1 and engine.optimizer.steps == 1:
            list(engine.optimizer.main_grad.values())[-1].view(-1).view(torch.int32)[-1] ^= 1 << 30


def test_gradients_before_there_are_any(run):
    curve, (said, *_) = run("soiled", "parallel.edp=2", watch=Soils())
    assert said == ["step 2: gradients of rank 1 were not zero before the step began: they are made so"]
    assert curve == run("clean", "parallel.edp=2")[0]


# ---------------------------------------------------------------- parts


def tries(replay, p, wrong):
    """What a step comes to where `wrong(rank, pass)` says by how much a rank is wrong."""
    found, number = [], 0
    while True:
        ahead = replay.ahead(7, found)
        at = lambda rank: (rank // (p.edp * p.ep), rank // p.ep % p.edp, rank % p.ep)
        said = {"own": [], "replayed": []}
        for rank in range(p.world_size):
            stage, team, place = at(rank)
            said["replayed"].append(hash((stage, (team + ahead) % p.edp, place)) + wrong(rank, number))
            said["own"].append(hash((stage, team, place)) + wrong(rank, number + 1))
        found.append(replay.differ(ahead, Heard(sums={}, each=said)))
        once_more, told = replay.judge(7, found)
        number += 2
        if not once_more:
            return len(found), told


layouts = st.builds(ParallelConfig, pp=st.integers(1, 3), edp=st.integers(1, 5), ep=st.integers(1, 3))


@given(p=layouts, exact=st.booleans(), data=st.data())
def test_who_is_named(p, exact, data):
    rank = data.draw(st.integers(0, p.world_size - 1))
    replay = Replay(p, 7, exact=exact)
    assert replay.ahead(8, []) is None and Replay(p, 0, exact=exact).ahead(7, []) is None
    assert tries(replay, p, lambda r, n: 0) == (1, "")
    number = data.draw(st.integers(0, 1))
    assert "a passing fault" in tries(replay, p, lambda r, n: r == rank and n == number)[1]
    if p.world_size == 1 and not exact:
        return  # whether it is the device or its kernels, nobody can tell
    with pytest.raises(WrongGradients, match=rf": rank {rank} computes wrongly.*after step 7, whose"):
        tries(replay, p, lambda r, n: (r == rank) * (1 + n))  # each time another way
    if p.edp > 2:
        with pytest.raises(WrongGradients, match=rf": rank {rank} computes wrongly"):
            tries(replay, p, lambda r, n: r == rank)  # always in the same way
        with pytest.raises(WrongGradients, match=rf": rank {rank} computes wrongly"):
            tries(replay, p, lambda r, n: r == rank and n in (1, 3, 4, 5))  # with its own samples only: two others find other than it did


@given(p=layouts)
def test_kernels_that_are_not_exact(p):
    """Every rank differs from itself: that is no fault, and is not looked for again."""
    replay = Replay(p, 7, exact=False)
    assert "no step is replayed any more" in tries(replay, p, lambda r, n: 1 + 100 * r + n)[1]
    assert replay.ahead(7, []) is None


@given(st.integers(0, 2**64 - 1), st.integers(0, 63))
def test_every_bit_counts_in_short(total, bit):
    for change in (1 << bit, -(1 << bit)):
        assert 0 <= short(total) < 2**53 and short((total + change) % 2**64) != short(total)
