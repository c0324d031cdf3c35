"""`shoestring dollars`: the table and the JSON of a run made by hand, live, finished and half-written."""

import json

import pytest
from shoestring.conf.compose import load, to_yaml
from shoestring.launch import cli, exit_codes
from shoestring.train import metrics, sessions

from ..train.sinks.made import record

WORDS = ["model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "train.steps=20", "optim.warmup_steps=2",
         "budget_usd=50", "cluster.price_per_gpu_hour=3600"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Eight steps of a second, of which half was computed, after a start of two; $1 a second."""
    (tmp_path / "config.yaml").write_text(to_yaml(load(WORDS)))
    sessions.note(tmp_path, sessions.Began(session=0, job="", time_unix=0.0, seconds=0.0, devices=1, dollars=1.0))
    each = dict(step_seconds=1.0, batch_tokens=64, breakdown={"compute": 0.5, "bubble": 0.5}, time_unix=1.7e9)
    lines = [metrics.to_line(record(step=n, tokens=64 * n, seconds=2.0 + n, **each)) for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_table(run, capsys):
    assert cli.main(["dollars", str(run)]) == exit_codes.OK
    head, title, compute, bubble, start, whole, _, *ahead = capsys.readouterr().out.splitlines()
    assert head == f"{run}: $10.00 for 8 steps, 512 tokens, $19.5 M per billion tokens"
    assert title.split()[:3] == ["part", "dollars", "share"]
    assert compute.split()[:5] == ["compute", "$4.00", "40.0", "%", "█" * 12] and compute.endswith("from 8 traced steps")
    assert bubble.split()[:5] == ["bubble", "$4.00", "40.0", "%", "·" * 12 + "█" * 12]
    assert start.split()[:5] == ["start", "$2.00", "20.0", "%", "·" * 24 + "█" * 6] and whole.split()[:2] == ["all", "$10.00"]
    rows = {line.split("  ")[0]: line.split()[-3:] for line in ahead}
    assert ahead[0].startswith("projected")
    assert rows["dollars to go"] == ["$12.00"] * 3 and rows["dollars in all"] == ["$22.00"] * 3 and rows["time to go"] == ["0:12"] * 3
    assert ahead[-1] == "steps 8 to 20, projected from the last 8 steps, in windows of 1; beside steps 0.0 %; the end comes first"
    assert "not before the end" in next(line for line in ahead if line.startswith("budget_usd met at step"))


def test_json(run, capsys):
    assert cli.main(["dollars", str(run), "--json"]) == exit_codes.OK
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["dollars"] == 10.0 == sum(part["dollars"] for part in told["parts"]) and told["seconds"] == 10.0
    assert told["projected"]["dollars"] == pytest.approx({"low": 12.0, "middle": 12.0, "high": 12.0})


def test_half_a_run(run, capsys):
    (run / "config.yaml").write_text("{[")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "tok')
    assert cli.main(["dollars", str(run)]) == exit_codes.OK
    assert "projected" not in capsys.readouterr().out
    (run / "metrics.jsonl").unlink()
    assert cli.main(["dollars", str(run)]) == exit_codes.OK
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "$0.00", "100.0", "%", "0"]


def test_no_run(tmp_path, capsys):
    assert cli.main(["dollars", str(tmp_path)]) == exit_codes.CONFIG
    assert "no run was there" in capsys.readouterr().err
