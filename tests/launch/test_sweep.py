"""A sweep's jobs one after the other: what is trained, what is not trained again, whom a signal reaches, what a crash ends, the exit code.

One sweep trains, in processes forked from this one, which has the imports; in the others a shell script stands in for the job's Python, and
says what it was started with.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shoestring.conf.compose import load
from shoestring.launch import cli, exit_codes, lease
from shoestring.launch.overview import read
from shoestring.train.metrics import read_records

TINY = [
    "model=micro", "model.num_layers=1", "model.num_dense_layers=0", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64",
    "optim.warmup_steps=1", "train.eval_interval=0",
]  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    """`job(body)`: every job that is started is this shell script; the words of each so far are in the list it returns."""

    def write(body: str):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nshift 2\necho "$*" >> {tmp_path}/started\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return lambda: (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []

    monkeypatch.chdir(tmp_path)
    return write


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


class _Forked:
    """As `subprocess.Popen`, of `python -m shoestring.train WORDS`."""

    def __init__(self, command, **_):
        assert command[:3] == [sys.executable, "-m", "shoestring.train"]
        sys.stdout.flush(), sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            code = 99
            try:
                code = cli.main(["train", *command[3:]])
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_two_jobs(tmp_path, job, capfd, monkeypatch):
    """The first is refused, as somebody has its directory, and the second is trained all the same. Again, with nobody there: only the first
    is started."""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", _Forked)
    words = ["train", "--multirun", *TINY, f"run_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}", "train.steps=2,3"]
    first, second = tmp_path / "runs" / "0_train.steps=2", tmp_path / "runs" / "1_train.steps=3"
    with lease.held(first):
        assert cli.main(words) == exit_codes.CONFIG
    out, err = capfd.readouterr()
    assert f"run_dir = {first}: another job trains there" in err and not (first / "metrics.jsonl").exists()
    records = read_records(second / "metrics.jsonl")
    assert [r.step for r in records] == [1, 2, 3] and read.read(second).state == "complete"
    table = [line.split() for line in out.splitlines()[-3:]]
    assert table[0][:2] == ["job", "settings"] and table[1] == ["0", "train.steps=2", "0/–", "–", "–", "–", "–", "2"]
    assert table[2][:4] == ["1", "train.steps=3", "3/3", f"{records[-1].loss:.4f}"] and table[2][-1] == "0"
    started = job("exit 0")
    monkeypatch.setattr(subprocess, "Popen", popen)
    assert cli.main(words) == exit_codes.OK
    assert len(started()) == 1 and load(started()[0].split()).run_dir == str(first)
    assert f"job 1 (train.steps=3): {second} is complete" in capfd.readouterr().out


def test_a_crash_does_not_end_the_others_and_the_first_code_counts(job, capfd):
    started = job('case "$*" in *steps=31*) kill -9 $$;; *steps=32*) exit 7;; esac')
    assert cli.main(["train", "--multirun", "train.steps=range(30,34)"]) == exit_codes.LOST
    assert [line.split()[0] for line in started()] == [f"train.steps={n}" for n in range(30, 34)]
    assert [line.split()[-1] for line in capfd.readouterr().out.splitlines()[-4:]] == ["0", "5", "7", "0"]


def test_all_are_checked_before_the_first_starts(job, capfd):
    """By the rules of the settings, and by those of whoever runs them (a schedule's)."""
    started = job("exit 0")
    words = ["experiment=smoke", "optim.lr=1,-1", "parallel.pp=2", "parallel.schedule=1f1b,dualpipev", "train.global_batch_tokens=256"]
    assert cli.main(["train", "--multirun", *words]) == exit_codes.CONFIG
    lines = capfd.readouterr().err.splitlines()
    assert started() == [] and [line.split(" (")[0] for line in lines] == ["error: job 1", "error: job 2", "error: job 3"]
    assert "optim.lr = -1.0: must be positive" in lines[1] and "optim.lr" not in lines[0].partition("): ")[2]


def _in_a_child(words) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = cli.main(["train", "--multirun", *words])
        finally:
            os._exit(code)
    return child


SAVES = """said=0
trap 'said=$((said + 1)); echo $said > told$said; [ $said = %d ] && exit 75' TERM
touch up; i=0
while [ $i -lt 400 ]; do sleep 0.05; i=$((i + 1)); done"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_running_job_once_and_ends_the_sweep(job, tmp_path, number, capfd):
    started = job(SAVES % 1)
    child = _in_a_child(["train.steps=30,31"])
    _wait_for(tmp_path / "up")
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == exit_codes.PREEMPTED
    assert len(started()) == 1 and (tmp_path / "told1").exists()
    assert [line.split()[-1] for line in capfd.readouterr().out.splitlines()[-3:-1]] == ["75", "–"]


def test_a_second_signal_reaches_it_too(job, tmp_path):
    job(SAVES % 2)
    child = _in_a_child(["train.steps=30"])
    _wait_for(tmp_path / "up")
    for n in (1, 2):
        os.kill(child, signal.SIGTERM)
        _wait_for(tmp_path / f"told{n}")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == exit_codes.PREEMPTED


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_sweep_that_is_killed_leaves_no_job_behind(job, tmp_path):
    job(SAVES % 1)
    child = _in_a_child(["train.steps=30,31"])
    _wait_for(tmp_path / "up")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _wait_for(tmp_path / "told1")


# ---------------------------------------------------------------- words


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr("shoestring.launch.commands.command.call", lambda target, *args: made.append((target, *args)) or exit_codes.OK)
    return made


def test_one_job_of_an_array(calls, tmp_path, capsys):
    words = ["train", "-m", "experiment=smoke", "optim.lr=0.1,0.2", "--config-dir", str(tmp_path), "--job"]
    assert cli.main([*words, "1"]) == exit_codes.OK
    [(target, config, command)] = calls
    assert target == "shoestring.launch.launcher:train" and (config.optim.lr, config.run_dir) == (0.2, "runs/smoke/1_optim.lr=0.2")
    assert load(command[2:-2], command[-1]) == config and command[-2:] == ["--config-dir", str(tmp_path)]
    assert cli.main([*words, "2"]) == cli.main([*words, "-1"]) == exit_codes.CONFIG and len(calls) == 1
    assert "there are jobs 0 to 1; nearest valid value: 1" in capsys.readouterr().err


def test_one_job_does_not_depend_on_the_others_being_right(calls, capsys):
    words = ["train", "-m", "optim.lr=-1,0.2", "--job"]
    assert (cli.main([*words, "0"]), cli.main([*words, "1"])) == (exit_codes.CONFIG, exit_codes.OK)
    assert capsys.readouterr().err.startswith("error: optim.lr = -1.0: must be positive") and len(calls) == 1


def test_cfg_prints_every_job_and_runs_none(calls, capsys):
    assert cli.main(["train", "-m", "optim.lr=0.1,-1", "--cfg", "job"]) == exit_codes.CONFIG
    first, second, _ = capsys.readouterr().out.split("\n---\n")
    assert first.startswith("# job 0 (optim.lr=0.1)\nname: run/0_") and second.startswith("# job 1 (optim.lr=-1)\n# error: ") and not calls


def test_a_sweep_is_not_started_by_torchrun_and_a_job_only_of_a_sweep(calls, monkeypatch, capsys):
    assert cli.main(["train", "optim.lr=1", "--job", "0"]) == exit_codes.CONFIG
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "-m", "optim.lr=1,2"]) == exit_codes.CONFIG and calls == []
    assert cli.main(["train", "-m", "optim.lr=1,2", "--job", "0"]) == exit_codes.OK and len(calls) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
