"""Sinks: what reaches a file, a terminal and W&B, and that none of them can stop a run."""

import io
import math
import os
import sys
import time

import pytest
from rich.console import Console
from shoestring.conf.compose import load
from shoestring.train import metrics, sinks
from shoestring.train.metrics import StepRecord


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=8192 * step, samples=32 * step, loss=5.25, lr=1.9e-3, grad_norm=0.845, clip_coef=1.0, step_seconds=0.8,
        tokens_per_second=10_312.0, tokens_per_second_per_gpu=2578.0, mfu=0.123, seconds=1.0 * step, dollars=0.0012,
        dollars_per_billion_tokens=10.81, eta_seconds=42.0, time_unix=1e9,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


class Broken(sinks.Sink):
    """Fails at its second record."""

    def __init__(self):
        self.writes = 0

    def _write(self, record):
        self.writes += 1
        if self.writes == 2:
            raise OSError("No space left on device")


def test_a_failing_sink_says_so_once_and_the_others_go_on(tmp_path, capsys):
    broken, path = Broken(), tmp_path / "m.jsonl"
    both = sinks.Sinks([broken, sinks.JsonlSink(path)])
    for step in range(1, 5):
        both.write(record(step))
    both.close()
    both.close()
    assert len(metrics.read_records(path)) == 4
    assert broken.writes == 2
    assert capsys.readouterr().err == "Broken stopped: OSError: No space left on device. Training goes on without it.\n"


def test_each_record_is_in_the_file_before_write_returns(tmp_path):
    sink = sinks.JsonlSink(tmp_path / "deep" / "m.jsonl")
    for step in (1, 2):
        sink.write(record(step))
        assert [r.step for r in metrics.read_records(tmp_path / "deep" / "m.jsonl")] == list(range(1, step + 1))
    sink.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_does_not_stop_the_run(capsys):
    sink = sinks.JsonlSink("/dev/full")
    sink._file = open("/dev/full", "a")  # noqa: SIM115
    sink.write(record(1))
    sink.write(record(2))
    sink.close()
    assert capsys.readouterr().err.count("No space left") == 1


# ---------------------------------------------------------------- terminal


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def test_plain_lines_where_there_is_no_terminal():
    out = console(terminal=False)
    sink = sinks.ConsoleSink(10, log_interval=4, console=out)
    for step in range(1, 11):
        sink.write(record(step, eval_loss=5.4321 if step == 6 else None))
    sink.close()
    lines = out.file.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  1", "step  4", "step  6", "step  8", "step 10"]
    for part in ["step  6/10", "loss 5.2500", "eval 5.4321", "10.3 k tokens/s", "MFU 12.3 %", "$0.0012 ($10.81/B tokens)", "ETA 0:42"]:
        assert part in lines[2]
    assert "eval" not in lines[0]


def test_a_live_line_fits_a_narrow_terminal():
    out = console(terminal=True)
    sink = sinks.ConsoleSink(120, console=out)
    sink.write(record(40))
    sink._bar.refresh()
    sink.write(record(41, eval_loss=5.4321))
    sink.write(record(42, loss=math.nan))
    sink.close()
    text = out.file.getvalue()
    assert "loss 5.250  10.3 k tokens/s  MFU 12.3 %  $0.0012  ETA 0:42" in text
    assert "eval 5.4321" in text and "loss nan" in text  # these stay above the bar


# ---------------------------------------------------------------- W&B


def test_wandb_names_are_stable_and_skip_what_was_not_measured():
    values = sinks.wandb_values(record(3, max_vio=[0.5, 1.5], max_vio_mean=1.0, eval_loss=None))
    assert values["loss/train"] == 5.25 and values["cost/dollars"] == 0.0012 and values["speed/mfu"] == 0.123
    assert (values["router/max_vio_worst"], values["router/max_vio_mean"]) == (1.5, 1.0)
    assert "loss/eval" not in values and not any(isinstance(v, list) for v in values.values())


class FakeWandb:
    """As much of the module as the sink touches."""

    def __init__(self):
        self.inits, self.logged, self.metrics, self.finished = [], [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def Settings(self, **settings):
        return settings

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1

    def teardown(self):
        self.torn_down = True


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        sink = sinks.WandbSink(load([]), tmp_path, mode="online", project="p", timeout_s=7)
        sink.write(record(step))
        sink.close()
    first, second = fake.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first["resume"] == "allow" and first["settings"]["init_timeout"] == first["settings"]["finish_timeout"] == 7
    assert [v["step"] for v in fake.logged] == [1, 2] and fake.metrics[0] == ("*", "step") and fake.finished == 2


def test_a_server_that_does_not_answer_is_done_without(tmp_path, monkeypatch, capsys):
    """Said once; the session is kept for `wandb sync`."""

    class Unreachable(FakeWandb):
        def init(self, **options):
            super().init(**options)
            if options["mode"] == "online":
                raise RuntimeError("run initialization has timed out after 20.0 sec.\nand more")
            return self

    monkeypatch.setitem(sys.modules, "wandb", fake := Unreachable())
    sink = sinks.WandbSink(load([]), tmp_path, mode="online", project="p")
    sink.write(record(1))
    sink.write(record(2))
    sink.close()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "timed out after 20.0 sec.)" in error and "wandb sync" in error
    assert [options["mode"] for options in fake.inits] == ["online", "offline"] and len({o["id"] for o in fake.inits}) == 1
    assert [v["step"] for v in fake.logged] == [1, 2] and fake.finished == 1
    assert fake.torn_down


def test_a_wandb_that_cannot_start_is_not_fatal(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    sink = sinks.WandbSink(load([]), tmp_path, mode="online", project="p")
    sink.write(record(1))
    sink.close()
    error = capsys.readouterr().err
    assert error.count("WandbSink stopped") == 1 and "launch.wandb=offline" in error


def test_disabled_wandb_is_never_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = sinks.WandbSink(load([]), tmp_path, mode="disabled", project="p")
    sink.write(record(1))
    sink.close()
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_real_offline_wandb_keeps_the_record(tmp_path):
    sink = sinks.WandbSink(load(["name=here"]), tmp_path, mode="offline", project="p")
    sink.write(record(1))
    sink.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert (tmp_path / "wandb_id.txt").read_text().strip() in log.name
    deadline = time.monotonic() + 60  # W&B's own process writes it
    while not all(words in log.read_bytes() for words in (b"loss/train", b"here")):
        assert time.monotonic() < deadline, log.read_bytes()
        time.sleep(0.1)
