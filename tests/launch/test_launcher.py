"""Ranks that our launcher starts: the console, the exit code, and whose error is told when several ranks fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import cli, exit_codes, launcher
from shoestring.launch.environment import Place
from shoestring.train.metrics import read_records


@pytest.fixture
def config(tmp_path):
    return load(["experiment=tiny", f"run_dir={tmp_path}"])


def _fail(failures: Path, code: int, message: str, after: float = 0.0, traceback: str = "") -> None:
    time.sleep(after)
    record = {"time": time.time(), "rank": Place.from_environment().rank, "code": code, "message": message, "traceback": traceback}
    (failures / f"failure-{record['rank']}.json").write_text(json.dumps(record))
    os._exit(code)


def _add_up(config, failures, word):
    place = Place.from_environment()
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    print(f"rank {place.rank} of {place.world_size}: {word} {total.item():g}", flush=True)
    return exit_codes.PREEMPTED


def test_ranks_meet_and_only_rank_0_has_the_console(config, capfd):
    assert launcher.start(config, "cpu", _add_up, "sum", world_size=config.parallel.world_size) == exit_codes.PREEMPTED
    out, err = capfd.readouterr()
    assert out == "rank 0 of 4: sum 4\n" and err == ""
    written = sorted(path.read_text() for path in Path(config.run_dir).glob("logs/*/rank_*.stdout"))
    assert written == [f"rank {r} of 4: sum 4\n" for r in (1, 2, 3)]


def _one_has_bad_data(config, failures):
    rank = Place.from_environment().rank
    if rank == 2:
        _fail(failures, exit_codes.DATA, "rank 2: no text in corpus/")
    _fail(failures, exit_codes.LOST, f"rank {rank}: Connection closed by peer", after=0.2)


def test_the_cause_is_told_and_not_its_consequences(config, capfd):
    assert launcher.start(config, "cpu", _one_has_bad_data, world_size=config.parallel.world_size) == exit_codes.DATA
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "error: rank 2: no text in corpus/"
    assert err[1].startswith("what the other ranks wrote: ") and len(err) == 2


def _the_last_is_the_cause(config, failures):
    rank = Place.from_environment().rank
    if rank == 3:
        _fail(failures, exit_codes.FAILED, "rank 3: KeyError: 7", after=0.3, traceback="Traceback ...\n")
    _fail(failures, exit_codes.LOST, f"rank {rank}: timed out")


def test_an_error_of_its_own_outranks_an_earlier_lost_connection(config, capfd):
    signal_ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank's own handler does: it lives until it has said its error
    try:
        code = launcher.start(config, "cpu", _ignoring_sigterm, _the_last_is_the_cause, world_size=config.parallel.world_size)
    finally:
        signal.signal(signal.SIGTERM, signal_ignored)
    assert code == exit_codes.FAILED
    assert capfd.readouterr().err.startswith("Traceback ...\nerror: rank 3: KeyError: 7\n")


def _ignoring_sigterm(config, failures, then):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    then(config, failures)


def _one_is_killed(config, failures):
    rank = Place.from_environment().rank
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.init_process_group("gloo")
    if rank == 2:
        print("allocating", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        _fail(failures, exit_codes.of(error), exit_codes.sentence(error))


def test_a_killed_rank_is_named_with_its_last_words(config, capfd):
    assert launcher.start(config, "cpu", _one_is_killed, world_size=config.parallel.world_size) == exit_codes.LOST
    err = capfd.readouterr().err
    assert "  rank 2 | allocating\n" in err and "error: rank 2 " in err and "out of memory" in err
    assert "Traceback" not in err and "rank 0" not in err


def _until_told(config, failures, polite):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1) if polite else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (failures / f"up-{os.getpid()}").touch()
    while not told:
        time.sleep(0.02)
    (failures / f"saved-{Place.from_environment().rank}").touch()
    return exit_codes.PREEMPTED


def _in_a_process_of_its_own(config, polite: bool) -> int:
    """Launch in a forked child, as a shell would start it; its process id."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = launcher.start(config, "cpu", _until_told, polite, world_size=config.parallel.world_size)
        finally:
            os._exit(code)
    return child


def _wait_for(config, name: str, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(Path(config.run_dir).glob(f"logs/*/{name}-*"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _end(config, child: int, patience_s: float = 30.0) -> int:
    """The launcher's exit code; whoever is still there after a while is killed, and fails the test."""
    deadline = time.monotonic() + patience_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            for pid in [child, *(int(path.name.removeprefix("up-")) for path in Path(config.run_dir).glob("logs/*/up-*"))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_its_answer_is_the_exit_code(config, number):
    child = _in_a_process_of_its_own(config, True)
    try:
        _wait_for(config, "up", 4)
        os.kill(child, number)
        _wait_for(config, "saved", 4)
    finally:
        code = _end(config, child)
    assert code == exit_codes.PREEMPTED


def test_a_second_signal_ends_at_once(config):
    child = _in_a_process_of_its_own(config, False)
    try:
        _wait_for(config, "up", 4)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.3)  # one and the same signal, pending twice, is delivered once
        os.kill(child, signal.SIGTERM)
    finally:
        code = _end(config, child)
    assert code == exit_codes.INTERRUPTED
    assert not list(Path(config.run_dir).glob("logs/*/saved-*"))


def _train(words, said: Path) -> int:
    """Exit code of `shoestring train ...` in a process forked from this one, which has the imports; what it says goes to `said`."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(said, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)  # of its ranks
                code = cli.main(["train", *words])
        finally:
            os._exit(code)
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGTERM)  # which ends its ranks
            deadline += 60
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def test_phases_of_other_sizes_follow_one_another(tmp_path):
    """Two ranks, then this process alone, then two again: one command, one curve, and `train.stop_after` counts over all of them; a run
    begun anew (`checkpoint.resume=never`) goes on with itself."""
    words = [
        "experiment=smoke", "optim.warmup_steps=1", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.seq_len=16", "model.dim=32", "train.eval_interval=0",
        *(f"phases.{name}.train.steps=2" for name in ("one", "two", "three")), "phases.two.parallel.ep=1", "phases.three.parallel.edp=2",
        "phases.three.parallel.ep=1",
    ]  # fmt: skip
    code, said = _train([*words, "train.stop_after=3", "checkpoint.resume=never"], tmp_path / "paused"), (tmp_path / "paused").read_text()
    assert code == exit_codes.OK, said
    assert "phase two goes on from step 2 of 6 with 1 process\n" in said and "paused at step 3 of 6" in said
    code, said = _train(words, tmp_path / "done"), (tmp_path / "done").read_text()
    assert code == exit_codes.OK and "phase three goes on from step 4 of 6 with 2 processes" in said, said
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r.step, r.phase) for r in records] == list(enumerate(["one"] * 2 + ["two"] * 2 + ["three"] * 2, 1))


def test_torchrun_cannot_change_its_number(tmp_path):
    """Ranks that somebody else started end with a code and a sentence where the next phase wants others."""
    words = [
        "experiment=smoke", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=16", "model.dim=32",
        "optim.warmup_steps=1", "parallel.ep=1", "phases.one.train.steps=2", "phases.two.train.steps=2", "phases.two.parallel.ep=2",
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    rank = subprocess.run(
        [sys.executable, "-m", "shoestring.train", *words], env=os.environ | place, capture_output=True, text=True, timeout=120
    )
    assert rank.returncode == exit_codes.OTHER_SIZE, rank.stderr
    assert "phase two goes on from step 2 of 4 with 2 processes" in rank.stdout
