"""What a run cost, after three kills, a step gone back from, and a rest: against a count of the raw logs by hand."""

import datetime
import json
import os
import time
from itertools import pairwise

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.train import ledger, sessions, trainer

from ..faults.processes import Fault
from ..faults.runs import launch
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


def test_after_a_session_that_ended_of_itself(tmp_path):
    """What it held after its last step (a save, an evaluation) is not forgotten by the next one, and one that trained nothing counts."""
    words, run = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"], tmp_path / "run"
    fork_ranks(2, job, [*words, "train.stop_after=3"], None, "monday")
    fork_ranks(2, job, [*words, "max_tokens=192"], None, "nothing")
    fork_ranks(2, job, words, None, "tuesday")
    _, first, second = (s for s in lines(run / "sessions.jsonl") if "standing" in s)
    (begun,) = (s for s in lines(run / "sessions.jsonl") if s.get("job") == "tuesday")
    assert (begun["seconds"], begun["seconds"] > lines(run / "metrics.jsonl")[2]["seconds"]) == (first["seconds"], True)
    found = ledger.account(run)
    assert found.seconds["restarts"] == 0.0 and sum(found.seconds.values()) == pytest.approx(second["seconds"])
    assert found.total_dollars == pytest.approx(second["dollars"]) and found.gpu_hours == pytest.approx(second["gpu_hours"])


def test_a_wall_clock_that_jumps(tmp_path):
    """An hour ahead, and a rank is killed; an hour behind, and again: waits are those of the monotonic clock, and no limit is near."""
    soon = (datetime.datetime.now() + datetime.timedelta(minutes=40)).isoformat(timespec="seconds")
    limits = ["budget_gpu_hours=0.9", "budget_usd=6.4", f"deadline='{soon}'", "checkpoint.interval=1", "checkpoint.async_save=false"]
    words = [*WORDS, "train.steps=7", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", *limits]
    jumps = [Fault(kind="clock", rank=0, step=2, seconds=3600), Fault(kind="clock", rank=0, step=5, seconds=-3600)]
    kills = [Fault(kind="sigkill", rank=0, step=4), Fault(kind="sigkill", rank=1, step=6)]
    ran = launch(load(words), *jumps, *kills)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert ran.code == 0 and len(records) == 7 and len(ran.restarts) == 2, ran.text
    assert "is spent" not in ran.text
    assert max(r["time_unix"] for r in records) > time.time() + 3000 and min(r["time_unix"] for r in records) < time.time() - 3000

    # By the launcher's and the faults' own notes: from the kill, or the step before it, to the ranks' start, or their next step.
    killed, restarts = [ran.injected[kill.name] for kill in kills], ran.restarts
    least = sum(restart["again"] - at for restart, at in zip(restarts, killed))
    most = sum(ran.again[kill.name] - at for kill, at in zip(kills, killed)) + 2 * max(r["step_seconds"] for r in records)
    found = ledger.account(tmp_path / "run")
    assert least < found.seconds["restarts"] < most
    assert sum(found.seconds.values()) < ran.ended - ran.began
    assert found.total_dollars == pytest.approx(sum(found.seconds.values()) * 2 * 7.2 / 3600)


def test_a_torn_line_and_what_is_no_wait(tmp_path, monkeypatch):
    assert ledger.account(tmp_path).total_dollars == 0.0
    began = dict(session=0, job="a", time_unix=100.0, seconds=20.0, devices=1, dollars=1.0)
    sessions.note(tmp_path, sessions.Began(**began, boot="monday", monotonic=5000.0))
    with open(tmp_path / sessions.NAME, "a") as file:
        file.write('{"session": 1, "jo')
    assert len(sessions.events(tmp_path)[0]) == 1
    now = {"wall": 107.0, "monotonic": 5009.0}
    monkeypatch.setattr(sessions.time, "time", lambda: now["wall"])
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now["monotonic"])
    waited = lambda job="a", boot="monday", at=5009.0: sessions.waited(tmp_path, job, at, boot)
    assert (waited(), waited("b"), waited(at=5007.0)) == (9, 0, 7)
    assert (waited(boot="tuesday"), waited(boot="tuesday", at=5006.0)) == (7, 4), "the wall clock, three seconds before now"
    sessions.note(tmp_path, sessions.Ended(session=0, seconds=24.0, standing=0.0, time_unix=103.0))
    assert (waited(), waited(boot="tuesday")) == (5, 4), "for four seconds, it ran"
    now["wall"] = 50.0  # set back
    assert (waited(), waited(boot="tuesday")) == (5, 0)
    sessions.note(tmp_path, sessions.Began(**began | {"job": "no name"}))
    assert sessions.waited(tmp_path, "no name", 5009.0, "") == 0, "no name for a boot is no boot"
