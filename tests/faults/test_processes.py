"""Ranks that are killed, stopped, too slow or wrong: the run says which, goes on from its checkpoint, and its curve is the same."""

import json
import re
from pathlib import Path

import pytest
from shoestring.conf.compose import load
from shoestring.launch import exit_codes
from shoestring.train.metrics import read_records

from .processes import KINDS, Fault, twice
from .runs import launch

STEPS = 6
BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=128", "train.micro_batch_sequences=2", f"train.steps={STEPS}",
    "train.eval_sequences=8", "optim.warmup_steps=2", "checkpoint.interval=2", "parallel.ep=2", "launch.timeout_s=60",
    "checkpoint.async_save=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return lambda name, *words: load([*BASE, f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / name}", *words])


def curve(config):
    records = read_records(Path(config.run_dir) / "metrics.jsonl")
    return [(r.step, r.tokens, r.loss, r.grad_norm, r.lr, r.eval_loss, r.expert_load) for r in records]


@pytest.fixture(scope="module")
def clean(runs):
    """A run that nothing happens to."""
    ran = launch(config := runs("clean"))
    assert (ran.code, ran.restarts) == (exit_codes.OK, []), ran.text
    assert not (Path(config.run_dir) / "flight").exists(), "nobody was lost"
    return curve(config)


def test_killed_and_raised(runs, clean):
    """Two faults in one run: each is named, with its step, and what follows is bit for bit as if nothing had been."""
    kill, error = Fault(kind="sigkill", rank=1, step=3, phase="reduce"), Fault(kind="exception", rank=0, step=6)
    ran = launch(config := runs("killed"), kill, error)
    assert ran.code == exit_codes.OK, ran.text
    assert curve(config) == clean
    assert [(r["step"], r["in_a_row"], r["code"]) for r in ran.restarts] == [(2, 0, exit_codes.LOST), (4, 0, exit_codes.FAILED)]
    assert "rank 1 was killed by SIGKILL (out of memory?) in step 3, reduce: all ranks start again from step 2" in ran.text
    assert "rank 0: RuntimeError: injected into the forward pass of step 6: all ranks start again from step 4" in ran.text
    for fault, restart in zip((kill, error), ran.restarts):
        assert ran.injected[fault.name] < restart["seen"] < restart["again"] < ran.again[fault.name]


def test_stopped_and_out_of_step(runs, clean):
    """A rank that SIGSTOP has stopped, then one that leaves a collective out: nobody would ever hear from them."""
    stop, skip = Fault(kind="sigstop", rank=1, step=3), Fault(kind="skipped_collective", rank=0, step=5)
    ran = launch(config := runs("stopped", "launch.timeout_s=5", "launch.hang_s=60"), stop, skip)
    assert ran.code == exit_codes.OK, ran.text
    assert curve(config) == clean
    assert (
        "rank 1 does not answer since" in ran.text
        and "(stopped by a signal, such as SIGSTOP) in step 3, data; others wait for it in gloo:" in ran.text
    )
    flights = sorted((Path(config.run_dir) / "flight").iterdir())
    assert len(flights) == len(ran.restarts) == 2
    assert "most recent call first" in (flights[0] / "rank_1.txt").read_text()  # of the stopped one, from outside
    assert json.loads((flights[0] / "rank_0.json").read_text())["stacks"]
    assert re.match(
        r'rank 0 did not come to gloo:all_reduce, number \d+ over "default_pg" \(ranks 0 1\): it was last in step 5, update',
        ran.restarts[1]["what"],
    )


def test_what_no_restart_betters(runs):
    """It ends at once, with its own code, and does not start again."""
    told = launch(config := runs("asked"), Fault(kind="sigterm", rank=1, step=2))
    assert (told.code, told.restarts, len(curve(config)) < 4) == (exit_codes.PREEMPTED, [], True), told.text
    gone = launch(runs("gone"), Fault(kind="data_gone", rank=1, step=2))
    assert (gone.code, gone.restarts) == (exit_codes.DATA, []), gone.text
    assert "train.bin cannot be read" in gone.text and "Input/output error" in gone.text


def test_no_progress_is_not_tried_for_ever(runs):
    ran = launch(runs("again", "launch.max_restarts=1"), Fault(kind="sigkill", rank=0, step=1, always=True))
    assert (ran.code, [r["in_a_row"] for r in ran.restarts]) == (exit_codes.LOST, [1]), ran.text
    assert "error: rank 0 was killed by SIGKILL" in ran.text


def test_a_seed_is_a_place():
    for kind in KINDS:
        first, second = twice(kind, 7, world_size=4, steps=20)
        assert [first, second] == twice(kind, 7, world_size=4, steps=20) and 2 <= first.step < second.step <= 20
    assert len({tuple(twice("sigkill", seed, world_size=4, steps=20)) for seed in range(20)}) > 10
