"""What a run cost, after three kills, a step gone back from, and a rest: against a count of the raw logs by hand."""

import json
import os
import time
from itertools import pairwise

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.train import ledger, trainer

from .test_guard import Faults

WORDS = [
    "model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "train.steps=14", "optim.warmup_steps=2",
    "checkpoint.interval=4", "train.eval_interval=5", "launch.log_interval=100", "cluster.price_per_gpu_hour=7.2", "parallel.ep=2",
]  # fmt: skip


def job(words, die_at, name, faults=()):
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == die_at:
            time.sleep(0.3)
            os._exit(9)
        return False

    trainer.run(load(words), torch.device("cpu"), stop=stop, log=lambda line: None, job=name, watch=Faults(faults))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_after_three_kills(tmp_path):
    words, run = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"], tmp_path / "run"
    for die_at, name in ((3, "monday"), (6, "monday"), (3, "monday")):
        with pytest.raises(RankFailed):
            fork_ranks(2, job, words, die_at, name)
        time.sleep(0.2)
    time.sleep(1.0)  # nobody's: the devices were given back
    fork_ranks(2, job, words, None, "tuesday", [("flip", 11, 0, 1)])
    found = ledger.account(run)

    kept, lost, sessions = (lines(run / name) for name in ("metrics.jsonl", "metrics_lost.jsonl", "sessions.jsonl"))
    assert [r["step"] for r in kept] == list(range(1, 15)) and found.tokens == 14 * 64
    assert found.lost_tokens == 64 * len(lost) and len(lost) >= 4
    assert found.seconds["steps"] == pytest.approx(sum(r["step_seconds"] for r in kept))
    assert found.seconds["lost steps"] == pytest.approx(sum(r["step_seconds"] for r in lost))
    assert (
        found.seconds["evaluation"] == pytest.approx(sum(r.get("eval_seconds") or 0 for r in kept + lost))
        and found.seconds["evaluation"] > 0
    )
    began = [s for s in sessions if "job" in s]
    assert [s["job"] for s in began] == ["monday"] * 3 + ["tuesday"] * 2  # the last one went back
    # A wait for a restart is from the last record of a session to the next one's begin, of one job.
    of = lambda session: [r["time_unix"] for r in kept + lost if r["session"] == session["session"]]
    signs = {s["session"]: max([s["time_unix"], *of(s)]) for s in began}
    gap = sum(after["time_unix"] - signs[before["session"]] for before, after in pairwise(began[:3]))
    assert 0.8 < found.seconds["restarts"] <= gap + 0.05 and all(value > -0.05 for value in found.seconds.values())
    total = max(s["seconds"] for s in sessions)
    assert sum(found.seconds.values()) == pytest.approx(total)
    assert found.total_dollars == pytest.approx(total * 2 * 7.2 / 3600) and found.gpu_hours == pytest.approx(total * 2 / 3600)
    assert total >= kept[-1]["seconds"] and kept[-1]["dollars"] == pytest.approx(kept[-1]["seconds"] * 2 * 7.2 / 3600)


def test_a_torn_line_and_no_run(tmp_path):
    assert ledger.account(tmp_path).total_dollars == 0.0
    ledger.note(tmp_path, ledger.Began(session=0, job="a", time_unix=100.0, seconds=0.0, devices=1, dollars=1.0))
    with open(tmp_path / ledger.NAME, "a") as file:
        file.write('{"session": 1, "jo')
    assert len(ledger.events(tmp_path)[0]) == 1
    assert ledger.waited(tmp_path, "a", 107.0) == 7.0 and ledger.waited(tmp_path, "b", 107.0) == 0.0
    assert ledger.waited(tmp_path, "a", 50.0) == 0.0  # the clock was set back
