"""The table of runs: every state a directory can be in, figures held against those the records were made of, and nothing that stops it."""

import csv
import dataclasses
import io
import json
import math
import os
import signal
import statistics
import time

import pytest
from shoestring.conf.compose import load, to_yaml
from shoestring.conf.errors import ConfigError
from shoestring.launch import cli, exit_codes, last_try, lease
from shoestring.launch.overview import read, table
from shoestring.launch.overview.read import Row
from shoestring.train import metrics
from shoestring.train.metrics import StepRecord

STEPS = 40


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=4096 * step, samples=16 * step, loss=8.0 / step, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0,
        tokens_per_second=1000.0 + step, tokens_per_second_per_gpu=250.0, mfu=0.01 * step, seconds=1.5 * step, dollars=0.001 * step,
        dollars_per_billion_tokens=5.0, time_unix=1.8e9 + step,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


@pytest.fixture(scope="module")
def config():
    return load(["experiment=tiny", f"train.steps={STEPS}"])


@pytest.fixture
def make(tmp_path, config):
    """A run directory of that many steps."""

    def make(name="a", steps=STEPS, *, summary=True, **changes):
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(to_yaml(config))
        records = [record(n, **changes) for n in range(1, steps + 1)]
        (path / "metrics.jsonl").write_text("".join(map(metrics.to_line, records)))
        if summary and records:
            metrics.summarize(config, records).write(path / "summary.json")
        return path

    return make


def test_a_row_is_what_the_records_say(make):
    row = read.read(make())
    last = range(STEPS - read.RECENT + 1, STEPS + 1)
    assert row == Row(
        path=row.path, name="tiny", state="complete", code=None, layout="pp 2 x edp 1 x ep 2, 1f1b", precision="fp32", step=STEPS,
        steps=STEPS, tokens=4096 * STEPS, loss=8.0 / STEPS, eval_loss=None, tokens_per_second=statistics.median(1000 + n for n in last),
        mfu=pytest.approx(statistics.median(0.01 * n for n in last)), dollars=0.001 * STEPS, updated=1.8e9 + STEPS,
    )  # fmt: skip


def test_only_the_end_of_a_long_file_is_read(make, monkeypatch):
    """Records of a large model: each as long as a block. The held-out loss is far back."""
    path = make(steps=0) / "metrics.jsonl"
    loads = [[7] * 256 for _ in range(58)]
    lines = [metrics.to_line(record(n, expert_load=loads, eval_loss=3.5 if n == 15 else None)) for n in range(1, STEPS + 1)]
    path.write_text("".join(lines))
    sizes = []
    tail = read._tail
    monkeypatch.setattr(read, "_tail", lambda path, size: sizes.append(size) or tail(path, size))
    row = read.read(path.parent)
    assert path.stat().st_size > 1 << 20 and sizes == [1 << 16, 1 << 20]
    assert (row.step, row.eval_loss, row.tokens_per_second) == (STEPS, 3.5, statistics.median(1000 + n for n in range(25, 41)))


def test_phases_and_lengths_in_tokens_count_as_training_does(tmp_path):
    for words, steps in ((["train.tokens=40961"], 11), (["phases.a.train.steps=3", "phases.b.train.steps=4"], 7)):
        words += ["optim.warmup_steps=1"] + ["phases.b.optim.warmup_steps=0"] * (steps == 7)
        (tmp_path / "config.yaml").write_text(to_yaml(load(["experiment=tiny", *words])))
        assert read.read(tmp_path).steps == steps


# ---------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("steps", "summary", "ended", "state"),
    [
        (STEPS, True, None, "complete"),
        (STEPS, True, exit_codes.OK, "complete"),
        (STEPS, False, None, "stopped"),  # killed between its last record and its end
        (12, True, exit_codes.OK, "stopped"),  # train.stop_after
        (12, True, exit_codes.PREEMPTED, "stopped"),
        (12, True, exit_codes.BUDGET, "stopped"),
        (12, False, None, "stopped"),  # killed
        (12, False, exit_codes.DIVERGED, "failed"),
        (STEPS, True, exit_codes.STORAGE, "failed"),  # after the last step
        (0, False, exit_codes.DATA, "failed"),
        (0, False, None, "half-written"),
    ],
)
def test_states_of_a_run_that_nobody_has(make, steps, summary, ended, state):
    path = make(steps=steps, summary=summary)
    if ended is not None:
        last_try.note(path, ended, "why")
    row = read.read(path)
    assert (row.state, row.code) == (state, ended)
    assert ("why" in table.as_text([row])) == (state == "failed")


def test_states_while_somebody_has_it(make):
    path = make(steps=12, summary=False)
    with lease.held(path, log=lambda line: None):
        assert read.read(path).state == "running" and str(os.getpid()) in read.read(path).note
        last_try.note(path, exit_codes.LOST, "rank 1 died", again=True)
        assert (read.read(path).state, read.read(path).code) == ("waiting to restart", exit_codes.LOST)
    assert read.read(path).state == "failed"


def test_an_owner_that_was_killed_has_it_no_longer(make):
    path = make(steps=12, summary=False)
    child = os.fork()
    if child == 0:
        with lease.held(path, log=lambda line: None):
            (path / "up").touch()
            time.sleep(60)
        os._exit(0)
    while not (path / "up").exists():
        time.sleep(0.01)
    assert read.read(path).state == "running"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert read.read(path).state == "stopped"


def test_another_machines_owner_lives_as_long_as_it_renews(make):
    path = make(steps=12, summary=False)
    owner = dataclasses.replace(lease.Owner.myself(""), host="elsewhere", boot="x")
    (path / lease.FILE).write_text(json.dumps(dataclasses.asdict(owner)))
    assert read.read(path).state == "running" and lease.owner(path) == owner
    os.utime(path / lease.FILE, (time.time() - lease.STALE_S - 1,) * 2)
    assert read.read(path).state == "stopped"


# ---------------------------------------------------------------- hostile


def _torn(path):
    with open(path / "metrics.jsonl", "a") as file:
        file.write(metrics.to_line(record(STEPS + 1))[:-40])


def _nan(path):
    (path / "metrics.jsonl").write_text(metrics.to_line(record(3, loss=math.nan, tokens_per_second=math.inf, dollars=math.nan)))


def _pipe(path):
    (path / "metrics.jsonl").unlink()
    os.mkfifo(path / "metrics.jsonl")


HOSTILE = {
    "a torn line": (_torn, "complete", STEPS),
    "no number": (_nan, "stopped", 3),
    "a pipe": (_pipe, "half-written", None),
    "other lines": (lambda p: (p / "metrics.jsonl").write_text('\n[1]\n{"step": "x"}\nnull\n' + "[" * 100_000), "half-written", None),
    "bytes": (lambda p: (p / "metrics.jsonl").write_bytes(os.urandom(5000)), "half-written", None),
    "no config": (lambda p: (p / "config.yaml").unlink(), "half-written", STEPS),
    "half a config": (lambda p: (p / "config.yaml").write_text((p / "config.yaml").read_text()[:700] + "\n  [a: {"), "half-written", STEPS),
    "another config": (lambda p: (p / "config.yaml").write_text("name: [1]\ntrain: 3\nparallel: {pp: x}\nprecision: {compute: 7}\n"),
                       "stopped", STEPS),
    "a config that is none": (lambda p: (p / "config.yaml").write_text("[" * 5000), "half-written", STEPS),
    "phases of another version": (lambda p: (p / "config.yaml").write_text("phases: {a: {b: 3}}\n"), "stopped", STEPS),
    "odd others": (
        lambda p: [(p / n).write_text(t) for n, t in (("summary.json", "{"), ("ledger.json", '{"dollars": {"a": "x"}}'),
                                                      ("ending.json", "[]"), ("lease.json", '{"pid": "../self"}'))],
        "stopped", STEPS,
    ),
    "an owner that is none": (
        lambda p: (p / "lease.json").write_text(json.dumps(dataclasses.asdict(lease.Owner.myself("")) | {"pid": "x", "born": None})),
        "complete", STEPS,
    ),
    "folders for files": (lambda p: [(p / n).unlink(missing_ok=True) or (p / n).mkdir() for n in read.MARKS], "empty", None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_directory_is_a_row(make, name, capsys):
    spoil, state, step = HOSTILE[name]
    path = make()
    spoil(path)
    row = read.read(path)
    assert (row.state, row.step) == (state, step)
    assert cli.main(["runs", str(path), "--json"]) == exit_codes.OK and json.loads(capsys.readouterr().out)[0]["state"] == state
    assert str(path) in table.as_text([row]) and len(list(csv.reader(io.StringIO(table.rows_as_csv([row]))))) == 2


def test_a_name_cannot_write_to_the_terminal(make):
    row = read.read(make("a\x1b[2J\n\udcffb"))
    for text in (table.as_text([row]), table.rows_as_csv([row])):
        assert "a?[2J??b" in text and "\x1b" not in text and text.encode()


# ---------------------------------------------------------------- many


def test_runs_are_found_below_each_other_and_nowhere_inside(make, tmp_path):
    names = ["b", "b/10_x", "b/2_x", "a/c/d"]
    for name in names:
        make(name)
    (tmp_path / "empty").mkdir()
    make("b/checkpoints/step_1")  # a run's own folder, whatever is in it
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in read.find([tmp_path, tmp_path / "b"])]
    assert found == ["a/c/d", "b", "b/2_x", "b/10_x", "empty"]
    with pytest.raises(ConfigError, match=r"DIR = .*: no such folder"):
        read.find([tmp_path / "none"])


def test_sorting_puts_the_unknown_last(make):
    losses = {"a": 3.0, "b": math.nan, "c": 1.0, "d": 2.0}
    rows = [read.read(make(name, 3, loss=value)) for name, value in losses.items()]
    order = lambda **options: "".join(row.path[-1] for row in table.ordered(rows, "loss", **options))
    assert (order(), order(reverse=True)) == ("cdab", "adcb")
    with pytest.raises(ConfigError, match=r"--sort = los: must be one of .*; nearest valid value: loss"):
        table.ordered(rows, "los")


def test_csv_and_json_have_every_number_in_full(make, tmp_path, capsys):
    path, out = make(), tmp_path / "out" / "runs.csv"
    (path / "ledger.json").write_text(json.dumps({"dollars": {"steps": 1.0 / 3, "other": 1.0}}))
    assert cli.main(["runs", str(path), "--csv", str(out)]) == exit_codes.OK
    assert "complete" in capsys.readouterr().out
    [row] = csv.DictReader(out.open())
    assert cli.main(["runs", str(path), "--csv", "-"]) == exit_codes.OK and capsys.readouterr().out == out.read_text()
    assert (float(row["dollars"]), int(row["step"]), row["eval_loss"]) == (4.0 / 3, STEPS, "")
    assert cli.main(["runs", str(path), "--json"]) == exit_codes.OK
    [plain] = json.loads(capsys.readouterr().out)
    assert {name: str(value) if value is not None else "" for name, value in plain.items()} == row


def test_a_folder_without_runs_and_options_that_are_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == exit_codes.OK and capsys.readouterr().out == "runs: no run there\n"
    assert cli.main(["runs", "--html", "x.html"]) == exit_codes.CONFIG
    assert cli.main(["runs", "nowhere"]) == exit_codes.CONFIG
    assert capsys.readouterr().err.splitlines()[1] == "error: DIR = nowhere: no such folder; nearest valid value: runs"
