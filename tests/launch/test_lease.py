"""One job in a run directory: who is refused, who takes over, and that no wall clock decides it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from shoestring.conf.errors import ConfigError
from shoestring.launch import lease
from shoestring.launch.lease import Owner, held


def in_a_child(body) -> int:
    """Forked; its process id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(1)
    return child


def until(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def holder(run_dir, forks=False):
    """A job that has the directory, and perhaps a rank of it, until they are killed."""

    def body():
        with held(run_dir):
            rank = in_a_child(lambda: time.sleep(60)) if forks else 0
            (run_dir / "rank").write_text(str(rank))
            os.rename(run_dir / "rank", run_dir / "up")
            time.sleep(60)

    child = in_a_child(body)
    until(run_dir / "up")
    return child


def end(*children):
    for child in children:
        os.kill(child, signal.SIGKILL)
    os.waitpid(children[0], 0)


def test_the_second_is_refused_at_once_and_told_whom_to_ask(tmp_path):
    child = holder(tmp_path)
    try:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"process {child} on {os.uname().nodename}\..* \(kill {child}:"), held(tmp_path):
            raise AssertionError("two jobs in one directory")
        assert time.monotonic() - began < 5  # it does not wait to see whether the other lives
    finally:
        end(child)


def test_what_a_killed_job_left_is_taken_over_and_told(tmp_path):
    child = holder(tmp_path)
    end(child)
    lines = []
    with held(tmp_path, log=lines.append):
        assert lines == [f"{tmp_path} was left by process {child} on {os.uname().nodename}, which is gone: taken over"]


def test_not_before_the_last_rank_is_gone(tmp_path):
    """The launcher was killed alone: its ranks still save."""
    child = holder(tmp_path, forks=True)
    rank = int((tmp_path / "up").read_text())
    end(child)
    lines = []
    with pytest.raises(ConfigError, match="another job"), held(tmp_path, log=lines.append, stale_s=0.3):
        raise AssertionError("a rank of the last job is still there")
    assert "whose ranks are ending" in lines[0]
    os.kill(rank, signal.SIGKILL)
    with held(tmp_path, log=lines.append):
        assert "taken over" in lines[-1]


def test_a_job_that_ended_leaves_nothing_to_take_over(tmp_path):
    lines = []
    for _ in range(2):
        with held(tmp_path, log=lines.append), pytest.raises(ConfigError), held(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), held(tmp_path, log=lines.append):
        raise ZeroDivisionError
    with held(tmp_path, log=lines.append):
        assert lines == []


def elsewhere(**changes):
    owner = {**asdict(Owner.myself("")), "host": "node7", "boot": "another", "pid": 4242, **changes}
    return json.dumps(owner)


def test_from_another_machine_one_looks_for_a_sign_of_life(tmp_path):
    """`elsewhere` writes as the job on the other machine would; locks do not reach there."""
    (tmp_path / lease.FILE).write_text(elsewhere())
    lines = []
    with held(tmp_path, log=lines.append, stale_s=0.3):
        assert "process 4242 on node7" in lines[0] and "taken over" in lines[1]
    (tmp_path / lease.FILE).write_text(elsewhere())
    script = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write(sys.argv[2])"
    lives = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / lease.FILE), elsewhere(count=8)])
    with pytest.raises(ConfigError, match=r"process 4242 on node7\..* \(kill 4242 on node7:"), held(tmp_path, log=lines.append, stale_s=20):
        raise AssertionError("it lives")
    lives.wait()


def test_a_restart_of_the_same_job_on_another_machine_goes_on_at_once(tmp_path):
    (tmp_path / lease.FILE).write_text(elsewhere(session="job 7"))
    lines = []
    with held(tmp_path, session="job 7", log=lines.append, stale_s=60):
        assert len(lines) == 1


def test_it_is_refreshed_and_the_wall_clock_is_not_asked(tmp_path, monkeypatch):
    counts = []
    with held(tmp_path, refresh_s=0.02):
        for jump in (-3600, 0, 3600):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
            counts.append(json.loads((tmp_path / lease.FILE).read_text())["count"])
            time.sleep(0.2)
        assert counts == sorted(set(counts))


def test_without_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    """A file system that has none: whether the owner's process is still the one that it was."""

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", no_locks)
    with held(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} "), held(tmp_path):
            raise AssertionError("two jobs")
        mine = json.loads((tmp_path / lease.FILE).read_text())
        (tmp_path / lease.FILE).write_text(json.dumps({**mine, "born": mine["born"] + 1}))  # the number was given to a new process
        with held(tmp_path):
            pass
