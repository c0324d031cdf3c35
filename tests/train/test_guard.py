"""Steps that look wrong: what is computed again, left out, gone back from; and that what follows is what it should be, bit for bit."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.schema import GuardConfig
from shoestring.launch.local import fork_ranks
from shoestring.train import left_out, trainer
from shoestring.train.checksum import checksum
from shoestring.train.guard import FEW, Diverged, GoBack, Guard
from shoestring.train.metrics import read_records
from shoestring.train.step import Watch

BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=3", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=256", "train.micro_batch_sequences=2", "train.steps=6",
    "optim.warmup_steps=2", "optim.decay=none", "checkpoint.interval=2",
]  # fmt: skip
LAYOUTS = {"pp 2 x edp 2": ["parallel.pp=2", "parallel.edp=2"], "ep 2": ["parallel.ep=2"]}


class Faults(Watch):
    """Each (what, step, rank, times): at the begin of that rank's forward and backward of that step, in its first tries."""

    def __init__(self, faults):
        self.left = {(step, rank): (FAULTS[what], times) for what, step, rank, times in faults}
        self.engine, self.reads = None, 0

    def begun(self, engine):
        self.engine, self.reads = engine, 0

    def routing(self, step, samples):
        """Called as each micro-batch is read: nothing else is known of a step before it is computed."""
        what, times = self.left.get((step, torch.distributed.get_rank()), (None, 0))
        if times and self.reads % self.engine.config.num_micro_batches == 0:
            self.left[step, torch.distributed.get_rank()] = what, times - 1
            what(self.engine)
        self.reads += 1
        return None


def spoil(engine):
    """A gradient that is no number: one of a weight of the first block held here, before backward adds to it."""
    next(iter(engine.optimizer.main_grad.values())).view(-1)[3] = math.nan


def huge(engine):
    next(iter(engine.optimizer.main_grad.values())).view(-1)[3] = 1e6


def flip(engine):
    """A bit of a weight: the lowest of its mantissa."""
    bits = next(iter(engine.parameters().values())).detach().view(-1).view(torch.int32)
    bits[5] ^= 1


def flip_moment(engine):
    name = next(name for name in engine.chunks(saving=True) if name.endswith(".exp_avg_sq"))
    engine.chunks(saving=True)[name].data.view(torch.int32)[0] ^= 1 << 20


FAULTS = {"spoil": spoil, "huge": huge, "flip": flip, "flip moment": flip_moment}


def job(words, faults):
    said = []
    try:
        trainer.run(load(words), torch.device("cpu"), log=said.append, watch=Faults(faults))
    except Diverged as error:
        said.append(f"diverged: {error}")
    return said


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"

    def start(name, *words, faults=()):
        words = [*BASE, f"data.cache_dir={cache}", f"run_dir={tmp_path / name}", *words]
        said = fork_ranks(load(words).parallel.world_size, job, words, faults)[0]
        return [(r.step, r.tokens, r.loss, r.grad_norm, r.expert_load) for r in read_records(tmp_path / name / "metrics.jsonl")], said

    return start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passing_faults(run, layout):
    """Found before any weight has changed: computed again, or gone back from; the curve is that of a run without them."""
    whole, _ = run("whole", *LAYOUTS[layout])
    rank = load([*BASE, *LAYOUTS[layout]]).parallel.world_size - 1
    curve, said = run("struck", *LAYOUTS[layout], faults=[("spoil", 1, 0, 1), ("flip", 3, rank, 1), ("flip moment", 5, rank, 1)])
    assert curve == whole
    said = "\n".join(said)
    assert "a passing fault" in said and said.count(f"memory of rank {rank} changed between two updates") == 2
    assert "back to step_00000002" in said and "back to step_00000004" in said


def test_samples_that_cannot_be_trained_on(run, tmp_path):
    """As bad when it is computed again: its samples are left out, and it is the run that was told to leave them out; started again, too."""
    curve, said = run("bad", "parallel.edp=2", faults=[("spoil", 4, 1, 3)])
    assert any("samples 64 to 79 are left out" in line for line in said)
    assert any("rank 1: not finite: gradients of" in line for line in said)
    (entry,) = json.loads((tmp_path / "bad" / left_out.NAME).read_text())
    assert (entry["first"], entry["last"]) == (64, 79)
    again, _ = run("bad", "parallel.edp=2", "train.steps=8")
    assert again == run("told", "parallel.edp=2", "data.skip=[64-79]", "train.steps=8")[0] and curve == again[:6]


def test_back_without_the_samples_since(run):
    """Three steps in a row: back to step 4, without all samples since; then as if those had been left out from the first."""
    curve, said = run("bad", faults=[("spoil", 5, 0, 9)])
    assert any("3 steps in a row" in line and "back to step_00000004" in line for line in said)
    assert curve == run("told", "data.skip=[64-127]")[0]


def test_going_back_does_not_help(run):
    curve, said = run("bad", "guard.rollbacks=2", "guard.patience=2", faults=[("spoil", 3, 0, 1000)])
    assert "diverged" in said[-1] and "2 times and came no further" in said[-1] and len(curve) == 3


def test_a_spike(run):
    """Finite, and far above: left out as well."""
    words = ["train.steps=20", "guard.window=16", "checkpoint.interval=0"]
    curve, said = run("bad", *words, faults=[("huge", 18, 0, 2)])
    assert any("gradient norm" in line and "it is the same" in line for line in said)
    assert curve == run("told", *words, "data.skip=[288-303]")[0]


# ---------------------------------------------------------------- parts


def test_what_is_a_spike():
    guard = Guard(GuardConfig())
    for i in range(FEW - 1):
        assert guard.trouble(1e9 * (i + 1), 1e9) is None  # nothing to compare with yet
        guard.taken(2.0 + 0.01 * (i % 3), 1.0 + 0.1 * (i % 4))
    guard.taken(2.0, 1.0)
    assert guard.trouble(2.05, 3.9) is None and guard.trouble(1.0, 0.1) is None
    assert guard.trouble(3.0, 1.0).startswith("loss 3") and guard.trouble(2.0, 9.0).startswith("gradient norm 9")
    assert guard.trouble(math.nan, 1.0) and guard.trouble(2.0, math.inf)
    kept = Guard(GuardConfig())
    kept.load_state(json.loads(json.dumps(guard.state())))
    assert kept.losses == guard.losses and kept.norms == guard.norms


@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0, 0.3), tail=st.floats(0, 0.5))
def test_no_false_alarm(seed, noise, tail):
    """A falling curve with noise, gradient norms with heavy tails."""
    random, guard = np.random.default_rng(seed), Guard(GuardConfig())
    for step in range(300):
        loss = 2 + 4 * math.exp(-step / 50) + 0.1 * noise * random.standard_normal()
        norm = math.exp(tail * random.standard_normal() - step / 200)
        assert guard.trouble(loss, norm) is None
        guard.taken(loss, norm)


def test_too_often():
    guard = Guard(GuardConfig(patience=2, rollbacks=1))
    guard.left_out("x")
    with pytest.raises(GoBack):
        guard.left_out("x")
    guard.going_back("x", 5)
    guard.going_back("x", 6)  # further than before
    with pytest.raises(Diverged, match="1 times"):
        guard.going_back("x", 6)


windows = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(0, 20)), max_size=6)


@given(windows=windows, first=st.integers(0, 50), count=st.integers(1, 40))
def test_samples_that_are_taken(windows, first, count):
    made = [left_out.Window(stream=s, first=low, last=low + n) for s, low, n in windows]
    out = {i for s, low, n in windows if s == 0 for i in range(low, low + n + 1)}
    wanted = [i for i in range(first, first + 500) if i not in out][:count]
    assert left_out.take(made, 0, first, count).tolist() == wanted


def test_what_to_skip():
    assert [(w.first, w.last) for w in left_out.configured(["7", "128-143"], 0)] == [(7, 7), (128, 143)]
    for wrong in ("9-3", "a", "-4", "1-2-3"):
        with pytest.raises(ConfigError, match=r"data\.skip"):
            left_out.configured([wrong], 0)


@given(st.integers(0, 40), st.integers(0, 7), st.data())
def test_every_bit_counts(numel, offset, data):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        whole = torch.randn(numel + offset + 2).to(dtype)
        part = whole[offset + 1 :]
        before, bits = checksum([whole[:1], part]), part.view(torch.uint8)
        at = data.draw(st.integers(0, bits.numel() - 1))
        bits[at] ^= 1 << data.draw(st.integers(0, 7))
        assert checksum([whole[:1], part]) != before
    assert checksum([]) == 0
