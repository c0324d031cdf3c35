"""The training part of the bench: which model fits, what is read from the records, and the whole of it with a small model."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch import exit_codes
from shoestring.launch.bench import command, page, step
from shoestring.train import metrics

SMALL = ["experiment=smoke", "parallel.ep=1", "launch.device=cpu"]


def record(number, **fields):
    usual = dict(step=number, tokens=number, samples=number, loss=3.0, lr=0.1, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0, seconds=1.0)
    money = dict(dollars=0.0, dollars_per_billion_tokens=0.0, time_unix=0.0, tokens_per_second=100.0, tokens_per_second_per_gpu=100.0)
    return metrics.StepRecord(**usual | money | fields)


@pytest.mark.parametrize("gigabytes", [80, 85, 141])
def test_the_deepest_that_fits(gigabytes):
    """And one more layer, or the next number of experts, does not."""
    words = step.fit(gigabytes * 1e9)
    config = load([*words, "precision=fp8", "train.steps=100"])
    m = config.model
    assert (m.dim, m.num_heads, m.expert_hidden_dim, m.num_groups, m.top_k) == (7168, 128, 2048, 8, 8) and m.num_moe_layers >= 2
    need = lambda **changed: step.state_bytes(dataclasses.replace(config, model=dataclasses.replace(m, **changed)))
    assert need() <= 0.7 * gigabytes * 1e9
    assert need(num_layers=m.num_layers + 1, num_experts=16) > 0.7 * gigabytes * 1e9
    assert m.num_experts == 64 or need(num_experts=2 * m.num_experts) > 0.7 * gigabytes * 1e9


def test_a_device_that_is_too_small():
    with pytest.raises(ConfigError, match="10 GB: the smallest cut of DeepSeek-V3 wants"):
        step.fit(10e9)


def test_of_records():
    """Medians without the first steps; the highest memory; losses of all."""
    records = [record(i, tokens_per_second=1.0 if i <= step.SLOW else 10.0 * i, mfu=0.1 * i, memory_gb=float(9 - i)) for i in range(1, 7)]
    run = step.of_records(records, "fp8", state=5 * 10**9)
    assert (run.tokens_per_second, run.mfu, run.memory_gb, run.state_gb) == (50.0, 0.5, 8.0, 5.0) and len(run.losses) == 6
    assert step.of_records([], "fp8", state=0).tokens_per_second is None


def test_ratio_and_page():
    runs = [step.StepRun(precision=p, tokens_per_second=v, state_gb=1.0, losses=[3.0, 2.0]) for p, v in (("bf16", 100.0), ("fp8", 150.0))]
    both = step.Steps(device="a GPU", date="today", words=["model=micro"], parameters=1000, runs=runs)
    assert both.ratio == 1.5
    html = page.step_page(both).split("<script>")[0]
    assert "fp8 over bf16" in html and "1.50" in html and "NaN" not in html
    runs[1] = step.StepRun(precision="fp8", losses=[], state_gb=1.0, error="ended with 1 after 0 steps: <boom>")
    assert both.ratio is None
    assert "&lt;boom&gt;" in page.step_page(both)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.train_step([]) == exit_codes.OK
    assert capsys.readouterr().out.startswith("torch sees no GPU here, and DeepSeek-V3 is not trained without one")
    with pytest.raises(ConfigError, match="--steps"):
        command.train_step(SMALL, steps=2)


def test_a_small_model_on_this_cpu(monkeypatch, tmp_path, capsys):
    """By the ordinary command, which is stopped when its records are there."""
    monkeypatch.setattr(step, "PRECISIONS", ("fp8",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = command.train_step(SMALL, steps=5, out=tmp_path, json_path=tmp_path / "s.json", limit_s=100)
    assert code == exit_codes.OK, capsys.readouterr().out
    kept = json.loads((tmp_path / "s.json").read_text())
    assert [(run["precision"], len(run["losses"]), run["error"]) for run in kept["runs"]] == [("fp8", 5, "")]
    assert kept["runs"][0]["tokens_per_second"] > 0 and 4 < kept["runs"][0]["losses"][0] < 8 and kept["ratio"] is None
    assert not list(tmp_path.glob("step-*/checkpoints/*"))


def test_a_run_that_fails_says_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho one\necho error: no such thing\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    run = step._train(SMALL, tmp_path, "bf16", 4, 60)
    assert run.tokens_per_second is None and run.losses == []
    assert run.error == "ended with 3 after 0 steps: error: no such thing"


def test_a_run_that_is_too_slow_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    run = step._train(SMALL, tmp_path, "bf16", 4, 0.5)
    assert run.error == "0 of 4 steps in 0 s"
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
