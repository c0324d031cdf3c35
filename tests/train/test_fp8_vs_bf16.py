"""The comparison of FP8 with BF16 (`tests/benchmarks/fp8_vs_bf16.py`): its statistics, its control, its page, and what it resumes."""

import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch import exit_codes
from shoestring.launch.local import fork_ranks
from shoestring.train import cost, trainer
from shoestring.train.engine import Engine
from shoestring.train.metrics import read_records

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fp8_vs_bf16.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fp8_vs_bf16", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def runs_of(fp8: list[float], control: list[float]) -> dict:
    """As many seeds as differences to BF16, per cent, at the end; before it, all arms are alike. BF16 ends at 2, 3, 4 ..."""
    ends = [2.0 + seed for seed in range(len(fp8))]
    curve = lambda end, per_cent: [(100, 5.0), (200, end * (1 + per_cent / 100))]
    arms = {"bf16": [0.0] * len(fp8), "control": control, "fp8": fp8}
    return {name: [curve(*pair) for pair in zip(ends, per_cent)] for name, per_cent in arms.items()}


# ---------------------------------------------------------------- statistics


def test_t_holds_its_share_of_samples(script):
    """By simulation: 95 % intervals of normal samples miss the true mean in 5 % of cases, whatever the number of seeds."""
    for n in (2, 3, 5, len(script.T_975) + 1):
        samples = torch.randn(100_000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        half = script.T_975[n - 2] * samples.std(1) / math.sqrt(n)
        missed = (samples.mean(1).abs() > half).double().mean().item()
        assert missed == pytest.approx(0.05, abs=0.003), n


def test_differences_are_taken_seed_by_seed_and_relative(script):
    """Losses of seeds lie 1 apart, differences 0.1 %: the interval is that of the differences, 12.706 * 0.1 / 2."""
    runs = runs_of(fp8=[0.1, 0.2], control=[0.0, 0.0])
    assert script.apart(runs["fp8"][1], runs["bf16"][1]) == pytest.approx([0.0, 0.2])
    found = script.interval(script.at_end(runs, "fp8"))
    assert (found.mean, found.half) == (pytest.approx(0.15), pytest.approx(12.706 * 0.05))
    assert script.table(runs).splitlines()[-1].split("  ")[-1].strip() == "+0.150 ± 0.635 %"


@pytest.mark.parametrize(
    ("fp8", "says"),
    [
        ([0.10, 0.11, 0.12], ["The aim is met", "Zero is outside"]),
        ([-0.30, -0.31, -0.32], ["The aim is missed", "Zero is outside"]),
        ([-0.30, 0.10, 0.40], ["these seeds do not decide", "Zero is inside"]),  # a small mean of wide spread
    ],
)
def test_the_verdict_says_when_the_interval_is_wider_than_the_aim(script, fp8, says):
    verdict = script.verdict(runs_of(fp8=fp8, control=[0.0, 0.1, 0.2]))
    assert all(words in verdict for words in says)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("width", [128, 256])
def test_the_model_is_what_was_promised(script, width):
    """At most 1 M active parameters; every FP8 linear sums over whole blocks of 128, forward."""
    m = load([*script.SETTINGS, *script.WIDTHS[width], "precision=fp8"]).model
    assert m.dim == width and cost.num_params(m).active <= 1_000_000
    summed = (m.dim, m.q_lora_rank, m.kv_lora_rank, m.num_heads * m.v_head_dim, m.dense_hidden_dim, m.expert_hidden_dim)
    assert not [width for width in summed if width % 128]


TINY = [
    "precision=bf16", "data=synthetic", "data.seq_len=32", "model.vocab_size=300", "model.dim=64", "model.num_layers=2",
    "train.global_batch_tokens=128", "train.micro_batch_sequences=2", "train.eval_sequences=4", "train.steps=4",
    "train.eval_interval=2", "checkpoint.interval=2", "optim.warmup_steps=1",
]  # fmt: skip


def moved(words, watch):
    """Weights and masters before and after the watch has begun, and after it has begun again at a later step."""
    engine = Engine(load(words))
    look = lambda: {name: weight.detach().clone() for name, weight in engine.parameters().items()}
    before = look()
    watch.begun(engine)
    masters = {name.removesuffix(".master"): c.data for name, c in engine.optimizer.state().items() if name.endswith(".master")}
    after, masters = look(), {name: data.clone() for name, data in masters.items()}
    engine.optimizer.steps = 1
    watch.begun(engine)
    return before, after, masters, look()


def test_the_control_moves_every_weight_by_one_step_of_bf16_once(script):
    """The oracle: the bits of neighbouring numbers differ by one."""
    ((before, after, masters, later),) = fork_ranks(1, moved, TINY, script.MoveByOneUlp(0))
    ups = 0
    for name, old in before.items():
        steps = after[name].view(torch.int16).int() - old.view(torch.int16).int()
        assert (steps.abs() == 1).all(), name
        ups += (steps > 0).double().mean().item() / len(before)
        assert torch.equal(masters[name], after[name].float().flatten()) and torch.equal(later[name], after[name])
    assert 0.4 < ups < 0.6


def train_in_rank(words, stop_after):
    return trainer.run(load([*words, f"train.stop_after={stop_after}"]), torch.device("cpu"), log=lambda line: None).step


def read_in_rank(run_dir, each):
    """What `read_here` finds, with each of these words."""
    import fp8_vs_bf16 as script  # the fixture's

    script.dist.init_process_group = lambda **_: None  # this rank has a world
    found = []
    for words in each:
        script.read_here(run_dir, words)
        found.append(json.loads((run_dir / script.READ_IN_FP8).read_text()))
    return found


def test_killed_and_called_again(script, tmp_path, monkeypatch):
    """A run that stopped half-way goes on; a complete one is only read. Trained in a forked rank here, instead of a new process."""
    monkeypatch.setattr(script, "SETTINGS", tuple(word for word in TINY if not word.startswith(("precision", "train.eval", "train.steps"))))
    monkeypatch.setattr(script, "EVALUATIONS", 2)
    options, started, stop_after = argparse.Namespace(out=tmp_path, width=128, steps=4, held_out=4), [], [2, 0]

    def run(command, **_):
        started.append(command)
        words = command[command.index("--") + 1 :]
        (step,) = fork_ranks(1, train_in_rank, [*words, f"data.cache_dir={tmp_path}"], stop_after.pop(0))
        return argparse.Namespace(returncode=0 if step == 4 else exit_codes.PREEMPTED)

    monkeypatch.setattr(script.subprocess, "run", run)
    with pytest.raises(SystemExit, match="incomplete"):
        script.train(options, "fp8", 0)
    curve = script.train(options, "fp8", 0)
    assert [tokens for tokens, _ in curve] == [256, 512] and script.train(options, "fp8", 0) == curve
    assert len(started) == 2 and started[0] == started[1] and "precision=fp8" in started[0]
    (run_dir,) = tmp_path.glob("fp8-0-*")
    assert [record.session for record in read_records(run_dir / "metrics.jsonl")] == [0, 0, 1, 1]


def test_weights_are_read_in_another_precision(script, tmp_path):
    """In the run's own, the loss of its last evaluation; in FP8 another one, near it."""
    words = [*[word for word in TINY if word != "precision=bf16"], f"data.cache_dir={tmp_path}", f"run_dir={tmp_path}"]
    fork_ranks(1, train_in_rank, [*words, "precision=bf16"], 0)
    found = fork_ranks(1, read_in_rank, tmp_path, [[*words, f"precision={name}"] for name in ("bf16", "fp8")])[0]
    trained = script.curve_of(tmp_path)[-1][1]
    assert found[0] == trained and 0 < abs(found[1] / trained - 1) < 0.01


def test_a_run_whose_program_is_gone_is_not_begun(script, tmp_path, monkeypatch):
    parents = iter([1000, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(script.worker, "run", lambda *_, **__: pytest.fail("trained"))
    assert script.train_here("bf16", [*TINY, f"run_dir={tmp_path}"]) == exit_codes.PREEMPTED


# ---------------------------------------------------------------- page


def test_the_page_keeps_what_is_around_the_result(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "plot", lambda runs, path: path.write_text("a picture"))  # drawn with the extra `bench`
    page, runs = tmp_path / "fp8.md", runs_of(fp8=[0.1, 0.2], control=[0.0, 0.1])
    options = argparse.Namespace(page=page, width=128, steps=4, seeds=2, held_out=4)
    page.write_text(f"above\n{script.BEGIN}\nfrom before\n{script.END}\nbelow\n")
    script.write_page(options, runs, [2.1, 3.1], "measured")
    once = page.read_text()
    script.write_page(options, runs, [2.1, 3.1], "measured")
    assert page.read_text() == once and once.startswith("above\n") and once.endswith("\nbelow\n")
    assert "measured" in once and "from before" not in once and "fp8_vs_bf16.svg" in once
    kept = json.loads((tmp_path / "fp8_vs_bf16.json").read_text())
    assert kept["at_end"]["fp8"]["per_cent"] == pytest.approx([0.1, 0.2]) and len(kept["runs"]["bf16"]) == 2
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for the result"):
        script.write_page(options, runs, [2.1, 3.1], "measured")
