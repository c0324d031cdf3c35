"""A run that traces some of its steps: the files, the records' figures, and that nothing else changes."""

import json

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.trace import read_trace
from shoestring.train import trainer
from shoestring.train.metrics import read_records

WORDS = [
    "data=synthetic", "data.seq_len=16", "model=micro", "model.num_layers=4", "train.global_batch_tokens=256", "train.steps=4",
    "train.micro_batch_sequences=2", "optim.warmup_steps=1", "checkpoint.interval=0", "parallel.pp=2", "parallel.ep=2",
    "parallel.schedule=dualpipev", "parallel.chunks=2",
]  # fmt: skip
FIGURES = ("bubble", "comm_seconds", "exposed_seconds", "hidden_share", "pair_hidden_share")


def job(overrides) -> None:
    trainer.run(load(overrides), torch.device("cpu"), stop=lambda: False, log=lambda line: None)


def test_traced_steps(tmp_path):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    for name, interval in (("plain", 0), ("traced", 2)):
        fork_ranks(4, job, [*WORDS, cache, f"run_dir={tmp_path / name}", f"launch.trace_interval={interval}"])
    plain, traced = (read_records(tmp_path / name / "metrics.jsonl") for name in ("plain", "traced"))
    assert [r.loss for r in plain] == [r.loss for r in traced], "tracing changed what is computed"
    assert not (tmp_path / "plain" / "traces").exists()
    assert [path.name for path in sorted((tmp_path / "traced" / "traces").iterdir())] == ["step_2.json", "step_4.json"]
    for r in [*plain, *traced[::2]]:
        assert [getattr(r, name) for name in FIGURES] == [None] * 5
    for r in traced[1::2]:
        spans, facts = read_trace(tmp_path / "traced" / "traces" / f"step_{r.step}.json")
        assert facts["step"] == r.step and facts["bubble"] == r.bubble and facts["seconds"] <= r.step_seconds
        assert sum(r.breakdown.values()) == pytest.approx(r.step_seconds, rel=1e-9) and min(r.breakdown.values()) >= 0
        assert r.breakdown["exchange"] <= r.exposed_seconds and r.breakdown["recompute"] == 0 < r.breakdown["update"]
        assert 0 <= r.bubble < 1 and 0 < r.exposed_seconds <= r.comm_seconds <= facts["seconds"]
        assert 0 <= r.hidden_share < 1 and 0 <= r.pair_hidden_share <= 1
        for rank in range(4):
            mine = [s for s in spans if s.rank == rank]
            assert {s.phase for s in mine if s.what == "section"} == {"data", "forward and backward", "reduce", "update"}
            count = lambda what, *kinds, mine=mine: sum(s.what == what and s.kind in kinds for s in mine)
            moe_stages = 1 if rank < 2 else 2  # block 0 is dense, and stages 0 and 3 are on the first pipeline rank
            exchanges = moe_stages * 4 * 2  # micro-batches; dispatch and combine
            assert count("exchange", "F") == count("exchange", "B", "I") == exchanges
            assert count("link", "recv") == count("link", "send")
            assert count("pair", "F&B") > 0 and count("compute", "W") > 0
            assert all(0 <= s.start <= s.end for s in mine)
            work = lambda s: (s.kind, s.stage, s.micro_batch, s.phase)
            packed = {work(s): s.end for s in reversed(mine) if s.what == "compute"}  # the first of each
            assert all(packed[work(s)] <= s.start for s in mine if s.what == "exchange"), "packing is a rank's own work"
    events = json.loads((tmp_path / "traced" / "traces" / "step_4.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1, 2, 3}
