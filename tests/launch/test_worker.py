"""One rank: what the trainer is given, what its outcome or its error becomes, and how a signal reaches it."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import device, exit_codes, pinning, worker
from shoestring.launch.environment import Place
from shoestring.train.checkpoint.checkpointer import CheckpointError
from shoestring.train.data.corpus import DataError
from shoestring.train.trainer import Outcome

CONFIG = load(["experiment=smoke", "parallel.ep=1"])


def _in_a_child(function, *args) -> int:
    """A rank's signal handlers and process group are its own: run it in a forked process; the exit code."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(function(*args)))
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def _run(train, config=CONFIG, **kwargs) -> int:
    return _in_a_child(lambda: worker.run(config, Place(), ["shoestring", "train"], train=train, **kwargs))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_trainer_finds_a_process_group_and_its_device(here, capfd, monkeypatch):
    def train(config, on, *, stop, log, beat, job, webhook, hide):
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert on == torch.device("cpu") and torch.get_num_threads() == config.launch.threads == 2 and not stop()
        assert webhook == "http://127.0.0.1/canary"
        log("training")
        return Outcome(summary=None, step=0, stopped=False)

    monkeypatch.setenv("ALERTS", "http://127.0.0.1/canary")
    words = ["experiment=smoke", "parallel.ep=1", "launch.threads=2", "launch.alerts.webhook=env:ALERTS"]
    assert _run(train, load(words)) == exit_codes.OK
    assert capfd.readouterr().out.startswith("training\n")


def test_rank_0_says_what_ranks_were_told(here, capfd, monkeypatch):
    monkeypatch.setenv("NCCL_IB_TC", "106")
    done = lambda *_, **__: Outcome(summary=None, step=0, stopped=False)
    assert _run(done, load(["experiment=smoke", "parallel.ep=1", "cluster.env.NCCL_IB_TC=106", "cluster.pin=cores"])) == exit_codes.OK
    cpus = pinning.spell(os.sched_getaffinity(0))
    assert capfd.readouterr().out.startswith(f"rank 0 runs with NCCL_IB_TC=106; CPUs {cpus} (cores); the others likewise\n")


def test_a_stopped_run_is_to_be_continued(here):
    assert _run(lambda *_, **__: Outcome(summary=None, step=3, stopped=True)) == exit_codes.PREEMPTED


def test_a_phase_of_another_size_is_told(here):
    assert _run(lambda *_, **__: Outcome(summary=None, step=3, stopped=False, wants=4)) == exit_codes.OTHER_SIZE


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("data source a: no such folder b"), exit_codes.DATA, "error: data source a: no such folder b\n"),
        (CheckpointError("step 3: a file was changed"), exit_codes.STORAGE, "error: step 3: a file was changed\n"),
        (FloatingPointError("loss is nan at step 4"), exit_codes.DIVERGED, "error: loss is nan at step 4\n"),
        (OSError(28, "No space left on device", "runs/x"), exit_codes.STORAGE, "error: [Errno 28] No space left on device: 'runs/x'\n"),
    ],
)
def test_an_expected_error_is_one_line_and_a_code(error, code, line, capfd):
    def train(*_, **__):
        raise error

    assert _run(train) == code
    assert capfd.readouterr().err == line


def test_an_unexpected_error_shows_where(capfd):
    def train(*_, **__):
        raise ZeroDivisionError("by what?")

    assert _run(train) == exit_codes.FAILED
    err = capfd.readouterr().err
    assert "test_worker.py" in err and err.endswith("error: ZeroDivisionError: by what?\n")


def test_a_rank_without_the_console_has_its_error_told(tmp_path, capfd):
    def train(*_, **__):
        raise DataError("empty")

    assert _run(train, tell=lambda message, code: (tmp_path / "told").write_text(f"{message} {code}")) == exit_codes.DATA
    assert (tmp_path / "told").read_text() == f"empty {exit_codes.DATA}" and capfd.readouterr().err == "error: empty\n"


def test_under_a_launcher_an_error_is_left_in_a_file(tmp_path, capfd):
    def train(*_, **__):
        raise DataError("empty")

    assert _run(train, failures=tmp_path) == exit_codes.DATA
    record = json.loads((tmp_path / "failure-0.json").read_text())
    assert (record["rank"], record["code"], record["message"], record["traceback"]) == (0, exit_codes.DATA, "empty", "")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_trainer_to_stop(here, number):
    def train(config, on, *, stop, log, beat, job, webhook, hide):
        os.kill(os.getpid(), number)
        return Outcome(summary=None, step=1, stopped=stop())

    assert _run(train) == exit_codes.PREEMPTED


def test_the_second_signal_ends_a_process_that_is_its_own_launcher(capfd):
    def train(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert _run(train) == exit_codes.INTERRUPTED


def test_a_rank_among_others_takes_any_number_of_signals_as_one():
    def several():
        stop = worker.Stop(alone=False).install()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return 0 if stop() else 1

    assert _in_a_child(several) == 0


def test_a_rank_asks_its_gpu(monkeypatch):
    """A machine of two A100s, as torch tells of it."""
    answers = {"is_available": True, "device_count": 2, "set_device": None, "get_device_capability": (8, 0)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert device.start(load(["precision=bf16"]), Place(rank=1, local_rank=1, world_size=2)) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"precision\.linear = fp8: .* 8\.0, .* precision=bf16"):
        device.start(load(["precision=fp8"]), Place(rank=1, local_rank=1, world_size=2))


def test_cuda_that_is_not_there_is_a_wrong_setting():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"launch\.device = cuda: .* nearest valid value: cpu"):
        device.choose_type(load(["launch.device=cuda"]))
    assert device.choose_type(load(["launch.device=auto"])) == "cpu"
