"""The ablation of balancing (`tests/benchmarks/balance_ablation.py`): its figures, and which runs it takes for complete."""

import dataclasses
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from shoestring.train.metrics import StepRecord, to_line

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "balance_ablation.py"


@pytest.fixture
def ablation(monkeypatch):
    spec = importlib.util.spec_from_file_location("balance_ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_of(steps: int, *, end: float) -> list[StepRecord]:
    """Steps of 100 tokens; the last two average to a loss of `end`, a MaxVio of 2 and 2.5 dead experts, all before are higher."""
    common = dict(
        samples=1, lr=1.0, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0, tokens_per_second=1.0, tokens_per_second_per_gpu=1.0,
        seconds=1.0, dollars=1.0, dollars_per_billion_tokens=1.0, time_unix=1.0,
    )  # fmt: skip
    run = [
        StepRecord(step=s, tokens=100 * s, loss=end + 9, max_vio_mean=7.0, dead_experts=5, **common) for s in range(1, steps - 1)
    ] + [
        StepRecord(step=steps - 1, tokens=100 * steps - 100, loss=end - 1, max_vio_mean=3.0, dead_experts=4, eval_loss=99.0, **common),
        StepRecord(step=steps, tokens=100 * steps, loss=end + 1, max_vio_mean=1.0, dead_experts=1, eval_loss=end + 0.5, **common),
    ]  # fmt: skip
    return run


def test_a_run_ends_at_the_mean_of_its_last_tenth(ablation):
    found = ablation.final(run_of(20, end=2.0))
    assert dataclasses.asdict(found) == {"loss": 2.0, "held_out": 2.5, "max_vio": 2.0, "dead_experts": 2.5}


def test_the_table_pairs_seeds(ablation):
    """Seeds of one variant lie 2 apart, so their sample deviation is 2 ** 0.5; their differences to the other variant are equal."""
    finals = {
        "bias": [ablation.final(run_of(20, end=end)) for end in (2.0, 4.0)],
        "none": [ablation.final(run_of(20, end=end)) for end in (2.25, 4.25)],
    }
    _, bias, none = ablation.table(finals).splitlines()
    assert " ".join(bias.split()) == "bias 3.0000 ± 1.4142 3.5000 ± 1.4142 2.000 ± 0.000 2.50 ± 0.00"
    assert " ".join(none.split()) == "none 3.2500 ± 1.4142 3.7500 ± 1.4142 +0.2500 ± 0.0000 2.000 ± 0.000 2.50 ± 0.00"


def test_curves_are_means_of_as_many_steps_to_the_very_last(ablation):
    """One step more than twice the points: three steps to a point, and the one left over is the first."""
    points = ablation.curve(run_of(2 * ablation.POINTS + 1, end=0.0), "tokens")
    assert len(points) <= ablation.POINTS and points[-1] == 100 * (2 * ablation.POINTS + 1) - 100
    assert {b - a for a, b in pairwise(points)} == {300.0}
    assert ablation.curve(run_of(5, end=0.0), "tokens") == [100, 200, 300, 400, 500]


def test_only_a_run_with_its_last_step_is_complete(ablation, tmp_path):
    lines = [to_line(record) for record in run_of(20, end=2.0)]
    assert not ablation.is_complete(tmp_path, 20)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:19]) + lines[19][:50])  # killed while it wrote
    assert not ablation.is_complete(tmp_path, 20)
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert ablation.is_complete(tmp_path, 20)
