"""The closing lines of a run."""

import pytest
from shoestring.conf.compose import load
from shoestring.launch import finish
from shoestring.train import metrics
from shoestring.train.metrics import StepRecord
from shoestring.train.trainer import Outcome


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a chart")])
def test_a_run_does_not_fail_for_want_of_a_page(tmp_path, monkeypatch, error):
    config = load(["experiment=tiny", f"run_dir={tmp_path}"])
    record = StepRecord(
        step=150, tokens=4096, samples=16, loss=6.0, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0, tokens_per_second=4096.0,
        tokens_per_second_per_gpu=1024.0, seconds=2.0, dollars=0.5, dollars_per_billion_tokens=5.0, time_unix=1.7e9,
    )  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(metrics.to_line(record))

    def fail(run_dir):
        raise error

    monkeypatch.setattr(finish, "write_report", fail)
    outcome = Outcome(summary=metrics.summarize(config, [record]), step=150, stopped=False)
    said = finish.conclude(config, outcome, ["shoestring", "train"])
    assert f"report    not written ({type(error).__name__}: {error}); to try again: shoestring report {tmp_path}" in said
    assert "complete" in said
