"""When a run saves, what it goes on from, and that neither a failed save nor a damaged checkpoint ends it, or starts it from scratch."""

import contextlib
import errno
import itertools
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.schema import CheckpointConfig, ConfigError
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.train import trainer
from shoestring.train.checkpoint import storage as storage_module
from shoestring.train.checkpoint.checkpointer import CheckpointError, NoRoomError, SaveError
from shoestring.train.checkpoint.manifest import DamagedError
from shoestring.train.checkpoint.saves import Saves
from shoestring.train.metrics import read_records
from shoestring.train.resume import steps_done

# ---------------------------------------------------------------- without a run


class Clock:
    """Time as the test tells it."""

    now = 1000.0

    def __call__(self):
        return self.now


class FakeCheckpointer:
    """Stands still for `seconds` in each save; fails as told."""

    is_first = True

    def __init__(self, clock, seconds=1.0):
        self.clock, self.seconds, self.saved, self.errors, self.busy = clock, seconds, [], [], False

    def save(self, step, chunks, extra):
        self.clock.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        self.saved.append(step)

    def under_way(self):
        return self.busy

    def wait(self):
        if self.busy:
            self.clock.now += 10
        self.busy = False


def saves(mttf_s=math.inf, async_save=False, seconds=1.0, **config):
    clock, lines = Clock(), []
    fake = FakeCheckpointer(clock, seconds)
    config = CheckpointConfig(async_save=async_save, **config)
    return Saves(fake, config, mttf_s=mttf_s, log=lines.append, clock=clock), fake, clock, lines


def steps(saver, clock, count, seconds=5.0):
    """The loop of one rank; news of each step."""
    news = []
    for step in range(1, count + 1):
        signals = saver.signals()
        clock.now += seconds
        news.append(saver.news())
        if saver.due(step, signals, 1):
            saver.save(step, lambda: ({}, {}))
    return news


def test_by_steps_and_by_seconds():
    saver, fake, clock, _ = saves(interval=4)
    steps(saver, clock, 9)
    assert fake.saved == [4, 8]
    saver, fake, clock, _ = saves(interval=0, interval_seconds=12.0)
    steps(saver, clock, 12)
    assert fake.saved == [4, 8, 12]  # with steps of 5 s and saves of 1 s: step 4 is the first that begins after 12 s
    saver, fake, clock, _ = saves(interval=0)
    steps(saver, clock, 9)
    assert fake.saved == []


def test_only_the_first_ranks_clock_counts():
    saver, fake, clock, _ = saves(interval=0, interval_seconds=1.0)
    fake.is_first = False
    steps(saver, clock, 5)
    assert fake.saved == []


def test_the_optimal_interval():
    """Of a save that costs 2 s where something fails every 10,000 s: 200 s."""
    saver, fake, clock, lines = saves(interval=0, optimal_interval=True, mttf_s=10_000.0, seconds=2.0)
    steps(saver, clock, 100)
    assert saver.every_s == pytest.approx(math.sqrt(2 * 2 * 10_000)) == 200.0
    assert fake.saved[0] == 1 and {b - a for a, b in itertools.pairwise(fake.saved)} <= {39, 40, 41}
    assert len(lines) == 1 and "costs 2 s" in lines[0] and "every 3:20" in lines[0]


def test_time_lost_is_least_at_the_optimal_interval():
    """Brute force: saving every t costs 2 / t of the time, and half of t with each failure."""
    lost = {t: 2 / t + t / 2 / 10_000 for t in range(1, 2000)}
    assert min(lost, key=lost.get) == 200


def test_failures_are_told_and_do_not_come_at_every_step():
    saver, fake, clock, lines = saves(interval=0, optimal_interval=True, mttf_s=1e9)
    fake.errors = [SaveError("no"), NoRoomError("needs 5 GB, has 3 GB")]
    news = steps(saver, clock, 40)
    told = [n["checkpoint"] for n in news if n["checkpoint"]]
    assert told == ["failed step 1: no", "skipped step 14: needs 5 GB, has 3 GB", "saved step 27"]
    assert [bool(re.search("training goes on, and older checkpoints stay", line)) for line in lines] == [True, True, False]
    assert sum(n["checkpoint_seconds"] or 0 for n in news) == 3.0


def test_the_last_save_may_not_fail_twice():
    saver, fake, _, lines = saves()
    fake.errors = [SaveError("first")]
    saver.save_last(7, lambda: ({}, {}))
    assert fake.saved == [7] and lines == ["first; trying once more"]
    fake.errors = [SaveError("first"), NoRoomError("second")]
    with pytest.raises(NoRoomError, match="second"):
        saver.save_last(8, lambda: ({}, {}))


def test_an_asynchronous_save_is_waited_for_by_the_next_one_only():
    saver, fake, _, _ = saves(async_save=True, interval=2)
    saver.save(2, lambda: ({}, {}))
    fake.busy = True
    assert saver.signals() == {"save": 0.0, "saved": 0.0} and saver.news() == {"checkpoint": None, "checkpoint_seconds": 1.0}
    assert not saver.due(3, {"save": 0, "saved": 1}, 2)  # over on one of two ranks
    assert saver.news() == {"checkpoint": None, "checkpoint_seconds": None}
    saver.save(4, lambda: ({}, {}))
    assert saver.news() == {"checkpoint": "saved step 2", "checkpoint_seconds": 11.0}
    fake.busy = False
    assert saver.signals()["saved"] == 1.0
    saver.due(5, {"save": 0, "saved": 2}, 2)
    assert saver.news()["checkpoint"] == "saved step 4"


def test_settings_that_contradict_each_other():
    for word, rest in (("checkpoint.interval=100", ""), ("checkpoint.interval_seconds=60", "checkpoint.interval=0")):
        with pytest.raises(ConfigError, match=r"must be 0 where checkpoint\.optimal_interval=true.*nearest valid value: 0"):
            load(["experiment=tiny", "checkpoint.optimal_interval=true", word, *rest.split()])


# ---------------------------------------------------------------- in a run

BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=64", "train.micro_batch_sequences=1", "train.steps=6",
    "train.eval_sequences=4", "optim.warmup_steps=2", "checkpoint.interval=2", "checkpoint.keep_last=9", "parallel.edp=2",
]  # fmt: skip


@pytest.fixture
def words(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda name, *more: [*BASE, f"data.cache_dir={cache}", f"run_dir={tmp_path / name}", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of a run that nothing happens to."""
    run = [*BASE, f"data.cache_dir={tmp_path_factory.getbasetemp() / 'cache'}", f"run_dir={tmp_path_factory.mktemp('whole')}"]
    session(run)
    return curve(run)


def session(overrides, around=contextlib.nullcontext, world_size=2):
    """The first rank's log. `around()`: what holds on all ranks while they run."""
    config = load(overrides)

    def body():
        lines = []
        with around():
            trainer.run(config, torch.device("cpu"), log=lines.append)
        return lines

    return fork_ranks(world_size, body, timeout_s=60)[0]


def folder_of(overrides):
    return Path(load(overrides).run_dir) / "checkpoints"


def left(overrides):
    return sorted(p.name for p in folder_of(overrides).iterdir())


def records(overrides):
    return read_records(Path(load(overrides).run_dir) / "metrics.jsonl")


def curve(overrides):
    return [(r.step, r.tokens, r.loss, r.grad_norm) for r in records(overrides)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "manifest.json"])
def test_damaged_ones_are_set_aside_and_the_next_is_taken(words, whole, file):
    run = words("hurt")
    session([*run, "train.stop_after=5"])
    assert left(run) == ["latest", "step_00000002", "step_00000004", "step_00000005"]
    flip(folder_of(run) / "step_00000005" / file)
    (folder_of(run) / "step_00000004" / "__0_0.distcp").unlink()
    assert steps_done(load(run)) == (5 if file != "manifest.json" else 4)  # for our launcher: what manifests say
    lines = session(run)
    assert (
        f"{file} is damaged" in lines[0] and "step_00000005.damaged, which nothing here uses or removes; next is step_00000004" in lines[0]
    )
    assert "__0_0.distcp is missing" in lines[1] and "next is step_00000002" in lines[1]
    assert any(line.startswith("resumed at step 2 from") for line in lines)
    assert curve(run) == whole
    assert left(run) == [
        "latest", "step_00000002", "step_00000004", "step_00000004.damaged", "step_00000005.damaged", "step_00000006",
    ]  # fmt: skip


def test_what_is_whole_may_be_of_a_phase_on_more_ranks(words):
    """As much as a phase that ends: the launcher, or who started the ranks, starts as many as it wants."""
    phases = [
        "optim.warmup_steps=1",
        "phases.a.train.steps=2",
        "phases.b.train.steps=3",
        "phases.b.parallel.edp=1",
        "checkpoint.interval=1",
    ]
    run = words("phases", *phases)
    session(run)
    session([*run, "train.stop_after=1"], world_size=1)
    assert left(run) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    flip(folder_of(run) / "step_00000003" / "__0_0.distcp"), flip(folder_of(run) / "step_00000002" / "__1_0.distcp")

    def body():
        outcome = trainer.run(load(run), torch.device("cpu"), log=lambda line: None)
        return outcome.step, outcome.wants

    assert fork_ranks(1, body, timeout_s=60) == [(1, 2)]
    assert any(line.startswith("resumed at step 1 from") for line in session(run))


def test_never_from_scratch_where_there_were_checkpoints(words):
    run = words("lost")
    session([*run, "train.stop_after=3"])
    before = records(run)
    for path in folder_of(run).glob("step_*"):
        flip(path / "__1_0.distcp")
    for _ in range(2):  # asked again, it is the same
        with pytest.raises(RankFailed, match=r"CheckpointError: .*only step_00000002\.damaged, step_00000003\.damaged: no checkpoint"):
            session(run)
        with pytest.raises(CheckpointError, match="is not begun anew unasked"):
            steps_done(load(run))
    assert records(run) == before
    shutil.rmtree(folder_of(run))
    assert not any("resumed" in line for line in session([*run, "train.stop_after=1"]))


def test_a_save_that_was_cut_short_alone_is_a_fresh_start(words):
    run = words("torn")
    (folder_of(run) / ".step_00000002.partial").mkdir(parents=True)
    lines = session([*run, "train.stop_after=2"])
    assert ".step_00000002.partial is a save that was cut short, and no checkpoint was ever complete: this run begins anew" in lines[0]
    assert left(run) == ["latest", "step_00000002"]


def test_a_checkpoint_that_was_asked_for_by_name_is_not_replaced(words):
    first, run = words("first"), words("second", "train.stop_after=1")
    session([*first, "train.stop_after=4"])
    named = folder_of(first) / "step_00000004"
    flip(named / "__0_0.distcp")
    with pytest.raises(RankFailed, match=r"DamagedError: .*__0_0\.distcp is damaged.*; nearest valid one: \S*step_00000002"):
        session([*run, f"checkpoint.resume={named}"])
    assert left(first) == ["latest", "step_00000002", "step_00000004"] and not folder_of(run).exists()


def test_another_models_is_not_damaged(words):
    """Even where it is damaged as well: another rank has found the other thing."""
    run = words("other")
    session([*run, "train.stop_after=2"])
    before = left(run)
    flip(folder_of(run) / "step_00000002" / "__1_0.distcp")
    with pytest.raises(RankFailed, match=r"CheckpointError: .*was it written by another model"):
        session([*run, "model.num_layers=3"])
    assert left(run) == before


def test_a_rank_that_reads_other_bytes_than_the_first_is_blamed_itself(words):
    run = words("mount")
    session([*run, "train.stop_after=2"])
    before = left(run)

    def misread(folder, file, manifest):
        if file.endswith(".distcp"):
            raise DamagedError(folder, file, "is damaged")

    def around():
        if dist.get_rank() == 1:
            storage_module.verify = misread
        return contextlib.nullcontext()

    with pytest.raises(RankFailed, match="but rank 0 reads it as it was written: look at the host and the mount"):
        session(run, around)
    assert left(run) == before


@contextlib.contextmanager
def failing(name, at, *, rank=1, code=errno.EIO):
    """The calls `at` of os.`name` on one rank fail."""
    plain, count = getattr(os, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(count) in at:
            raise OSError(code, os.strerror(code))
        return plain(*args, **kwargs)

    if dist.get_rank() == rank:
        setattr(os, name, call)
    yield
    setattr(os, name, plain)


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_a_save_that_fails_does_not_end_training(words, whole, async_save):
    """Rank 1 flushes one file in each save; its second and third fail."""
    run = words("failing", f"checkpoint.async_save={async_save}", "checkpoint.interval=1")
    lines = session(run, lambda: failing("fsync", (2, 3)))
    told = [line for line in lines if line.startswith("checkpoint of step")]
    assert len(told) == 2 and all("failed: the checkpoint of step" in line and "rank 1: OSError: [Errno 5]" in line for line in told)
    assert left(run) == ["latest", "step_00000001", "step_00000004", "step_00000005", "step_00000006"]
    assert curve(run) == whole
    said = "; ".join(r.checkpoint for r in records(run) if r.checkpoint)
    assert re.findall(r"(saved|failed) step (\d)", said)[:4] == [("saved", "1"), ("failed", "2"), ("failed", "3"), ("saved", "4")]
    assert sum(r.checkpoint_seconds or 0 for r in records(run)) > 0


def test_the_save_at_the_end_is_tried_twice_and_then_an_error(words):
    run = words("end", "checkpoint.interval=0", "train.stop_after=2")
    assert any("trying once more" in line for line in session(run, lambda: failing("fsync", (1,))))
    with pytest.raises(RankFailed, match=r"SaveError: the checkpoint of step 4 was not written.*rank 1: OSError"):
        session(run, lambda: failing("fsync", (1, 2)))
    assert left(run) == ["latest", "step_00000002"]
    session(run)
    assert left(run) == ["latest", "step_00000002", "step_00000004"]


def test_a_run_saves_by_its_clock(words, whole):
    run = words("often", "checkpoint.interval=0", "checkpoint.interval_seconds=1e-9")
    session(run)
    assert curve(run) == whole and {"step_00000001", "step_00000006"} < set(left(run))
    run = words("optimal", "checkpoint.interval=0", "checkpoint.optimal_interval=true")
    lines = session(run)
    assert curve(run) == whole and {"step_00000001", "step_00000006"} <= set(left(run))
    assert any(re.match(r"a checkpoint costs \S+ s, and something stops this job every 1056 d 06:00 on average", line) for line in lines)
