"""The logic of `tests/benchmarks/gpu_overlap.py`, without a GPU: what it times is the same work, and which gaps are the host's."""

import importlib
from pathlib import Path

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.train.engine import Engine

WORDS = ["model=micro", "model.num_layers=2", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=32", "model.mtp_depth=1"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu_overlap")


def both_ways(script):
    found = []
    for work in (lambda engine, mine: engine.executor.step(mine), script.plain_step):
        engine = Engine(load([*WORDS, "precision=fp32"]))
        work(engine, script.batches(engine, 2))
        found.append([spec.param.main_grad for spec in engine._specs()])
    return found


def test_the_plain_loop_does_the_executors_work(script):
    executor, plain = fork_ranks(1, both_ways, script)[0]
    assert len(plain) > 10 and all(torch.equal(a, b) for a, b in zip(executor, plain)) and any(grad.any() for grad in plain)


def small_loopback(script):
    script.RUNS = 1
    return script.loopback([*WORDS, "precision=fp32"], "cpu", 4)


def test_a_loopback_of_a_small_model(script):
    found = fork_ranks(1, small_loopback, script)[0]
    assert list(found["runs"]) == ["no link", "overlap", "no overlap"] and found["gb_per_s"] > 0
    assert found["runs"]["overlap"][0]["in_pairs"] > 0
    assert found["runs"]["no overlap"][0]["hidden"] == pytest.approx(0, abs=1e-3)


def test_gaps_that_the_host_made(script):
    """Kernels 1 to 5. Before 3 the GPU is idle for 30 us, and 3 was asked for in that time; before 4 for 50, but 4 was asked for early
    (it waits for an exchange); before 5 for 10."""
    asked = {1: 0, 2: 1, 3: 125, 4: 60, 5: 321}
    kernels = {1: (10, 100), 2: (20, 120), 3: (150, 200), 4: (250, 320), 5: (330, 340)}
    events = [{"name": f"kernel {i}", "start": a, "end": b, "id": i, "gpu": True} for i, (a, b) in kernels.items()]
    events += [{"name": "cudaLaunchKernel", "start": a, "end": a + 3, "id": i, "gpu": False} for i, a in asked.items()]
    assert script.host_gaps(events[::-1]) == [{"us": 30, "after": "kernel 2", "before": "kernel 3"}]
    assert [gap["us"] for gap in script.host_gaps(events, at_least=5)] == [30, 10]
