"""Where each dollar of a run went that was killed twice: against the raw files, and the clock of whoever looks on."""

import json

import pytest
from shoestring.conf.compose import load
from shoestring.launch import dollars
from shoestring.train import ledger
from shoestring.train.waterfall import NAMES, waterfall

from ..faults.processes import Fault
from ..faults.runs import launch
from . import raw_dollars

PRICE, RANKS = 36_000.0, 4  # $10 for a second of a device: a cent is a millisecond
WORDS = [
    "model=micro", "model.num_layers=2", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=128", "train.steps=11",
    "train.micro_batch_sequences=2", "train.eval_interval=5", "train.recompute=[experts]", "optim.warmup_steps=2",
    "checkpoint.interval=4", "checkpoint.async_save=false", "launch.log_interval=100", "launch.trace_interval=3", "parallel.pp=2",
    "parallel.ep=2", f"cluster.price_per_gpu_hour={PRICE:g}",
]  # fmt: skip


def test_two_kills(tmp_path):
    run = tmp_path / "run"
    slow = Fault(kind="slow", rank=3, step=2, seconds=0.3, phase="data")
    kills = [Fault(kind="sigkill", rank=1, step=7), Fault(kind="sigkill", rank=2, step=10)]
    ran = launch(load([*WORDS, f"run_dir={run}", f"data.cache_dir={tmp_path / 'cache'}"]), slow, *kills)
    assert ran.code == 0 and len(ran.restarts) == 2, ran.text
    found, second = waterfall(run), PRICE * RANKS / 3600
    kept, lost = (raw_dollars.lines(run / name) for name in ("metrics.jsonl", "metrics_lost.jsonl"))
    assert [r["step"] for r in kept] == list(range(1, 12)) and len(lost) >= 3 and found.notes == ()

    # To the cent, from the raw lines and traces.
    want = raw_dollars.parts(run, PRICE, RANKS, dp=2, ep=2)
    got = {part.name: part.dollars for part in found.parts}
    cents = lambda of: {name: round(100 * value) for name, value in of.items()}
    assert cents(got) == cents(dict.fromkeys(NAMES.values(), 0.0) | want)
    spent = max(e["seconds"] for e in raw_dollars.lines(run / "sessions.jsonl")) * second
    assert round(100 * found.dollars) == round(100 * spent) > 5000
    assert found.dollars_per_billion_tokens == pytest.approx(spent / (11 * 128) * 1e9, rel=1e-9)
    for r in kept:  # at that step's speed, beside everything that was paid for
        assert r["dollars_per_billion_tokens"] == pytest.approx(r["step_seconds"] * second / 128 * 1e9)

    # The parts are the whole, exactly; and the ledger's.
    assert sum(sorted(got.values())) == pytest.approx(found.dollars, rel=1e-15) and min(got.values()) >= 0
    books = ledger.account(run)
    assert books.total_dollars == pytest.approx(found.dollars, rel=1e-12)
    assert json.loads((run / "ledger.json").read_text())["dollars"] == pytest.approx(books.dollars)
    assert {part.source for part in found.parts} == {"measured in each step", "from 3 traced steps", "what is left"}
    positive = set(NAMES.values()) - {"steps, not divided"}
    assert {name for name, value in got.items() if value > 0} == positive

    # What was done to the run is where it should be: a rank read for 0.3 s, of a step of all four.
    assert got["data"] > 0.3 * second / RANKS and 0.3 / RANKS < kept[1]["data_seconds"] < 0.6 / RANKS
    # From outside: the launcher held the devices from its start to its end, but for what it took itself before the first session.
    outside, begins = (ran.ended - ran.began) * second, [e for e in raw_dollars.lines(run / "sessions.jsonl") if "job" in e]
    before = (begins[0]["monotonic"] - ran.began) * second
    assert 0 < outside - before - found.dollars < 2.0 * second
    # By wall-clock stamps, which nothing else here reads: over both kills, seconds held are seconds that passed.
    origins = [r["time_unix"] - r["seconds"] for r in [*kept, *lost]]
    assert max(origins) - min(origins) < 0.1
    ended = next(e for e in raw_dollars.lines(run / "sessions.jsonl") if "standing" in e)
    assert (ended["time_unix"] - origins[0]) * second == pytest.approx(found.dollars, abs=0.1 * second)
    # A restart costs from the last sign of life to the next begin, so at least from the kill to the ranks' new start.
    least = sum(restart["again"] - ran.injected[kill.name] for restart, kill in zip(ran.restarts, kills))
    assert got["restart"] > least * second

    text = dollars.show(run)
    assert "lost work" in text and f"${found.dollars:,.0f}" in text and "nothing is left to do" in text
