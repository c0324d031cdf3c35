"""What a run may cost: told at fractions, stopped before it is overspent, saved; and not begun again without more."""

import datetime
import json

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.local import fork_ranks
from shoestring.train import trainer
from shoestring.train.budget import Budget, seconds_until
from shoestring.train.metrics import read_records

WORDS = [
    "model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "train.steps=400", "optim.warmup_steps=2",
    "checkpoint.interval=0", "launch.log_interval=100",
]  # fmt: skip


def job(words):
    said = []
    return trainer.run(load(words), torch.device("cpu"), log=said.append), said


@pytest.fixture
def session(tmp_path):
    def start(*words):
        words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", *words]
        (outcome, said), *_ = fork_ranks(load(words).parallel.world_size, job, words)
        return outcome, said, read_records(tmp_path / "run" / "metrics.jsonl")

    return start


def test_dollars_across_sessions(session, tmp_path):
    """A dollar a second, for two ranks: eight seconds' worth; then nothing is trained until there is more."""
    price = ("parallel.ep=2", "cluster.price_per_gpu_hour=1800")
    outcome, _, records = session(*price, "budget_usd=8", "launch.alerts.budget=[0.01]")
    assert outcome.stopped and outcome.spent.startswith("budget_usd=8") and 0 < outcome.step < 400
    assert records[-1].dollars < 8 and records[-1].gpu_hours == pytest.approx(records[-1].dollars / 1800)
    told = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert told and all(alert["kind"].startswith("budget_usd") and "% of budget_usd is spent: $" in alert["text"] for alert in told)
    again, _, same = session(*price, "budget_usd=8")
    assert again.step == outcome.step and again.spent and len(same) == len(records)
    more, _, grown = session(*price, "budget_usd=8", "max_tokens=100000", "budget_gpu_hours=0.005")
    assert more.step == outcome.step and more.spent
    further, _, grown = session(*price, "budget_usd=100", "train.stop_after=2")
    assert further.step == outcome.step + 2 and grown[-1].session == 3
    assert outcome.step and records[-1].dollars + 0.2 < grown[-1].dollars < 100, "sessions that trained nothing were for nothing"


def test_tokens(session):
    outcome, _, records = session("max_tokens=700")
    assert outcome.step == 10 and records[-1].tokens == 640 and outcome.spent.startswith("max_tokens=700")
    assert session("max_tokens=700", "train.steps=10")[0].spent == ""  # that is the run's end


def test_deadline(session):
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=6)
    outcome, _, records = session(f"deadline='{soon.isoformat()}'")
    assert outcome.spent.startswith("deadline") and records[-1].time_unix < soon.timestamp()


def test_parts(monkeypatch):
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc).timestamp()
    assert seconds_until("2026-01-01T02:00+01:00", now) == 3600
    with pytest.raises(ConfigError, match=r"deadline.*ISO 8601.*nearest.*2026|deadline = tomorrow"):
        seconds_until("tomorrow", now)
    budget = Budget(load([*WORDS, "budget_gpu_hours=1"]))
    assert budget.spent(budget_usd=0, budget_gpu_hours=0.82) is None
    budget.step_took(360)
    assert budget.spent(budget_usd=0, budget_gpu_hours=0.79) is None  # two more such steps fit
    assert budget.spent(budget_usd=0, budget_gpu_hours=0.81).startswith("budget_gpu_hours=1: 0.81")
