"""What reaches a file, and that no sink can stop a run."""

import os
import threading

import pytest
from shoestring.tests.train.sinks.made import record
from shoestring.train import metrics
from shoestring.train.sinks import beside as beside_module
from shoestring.train.sinks.beside import Beside
from shoestring.train.sinks.jsonl import JsonlSink
from shoestring.train.sinks.sink import Sink, Sinks


class Broken(Sink):
    """Fails at its second record."""

    def __init__(self):
        self.writes = 0

    def _write(self, record):
        self.writes += 1
        if self.writes == 2:
            raise OSError("No space left on device")


def test_a_failing_sink_says_so_once_and_the_others_go_on(tmp_path, capsys):
    broken, path = Broken(), tmp_path / "m.jsonl"
    both = Sinks([broken, JsonlSink(path)])
    for step in range(1, 5):
        both.write(record(step))
    both.close()
    both.close()
    assert len(metrics.read_records(path)) == 4
    assert broken.writes == 2
    assert capsys.readouterr().err == "Broken stopped: OSError: No space left on device. Training goes on without it.\n"


def test_each_record_is_in_the_file_before_write_returns(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "m.jsonl")
    for step in (1, 2):
        sink.write(record(step))
        assert [r.step for r in metrics.read_records(tmp_path / "deep" / "m.jsonl")] == list(range(1, step + 1))
    sink.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_does_not_stop_the_run(capsys):
    sink = JsonlSink("/dev/full")
    sink._file = open("/dev/full", "a")  # noqa: SIM115
    sink.write(record(1))
    sink.write(record(2))
    sink.close()
    assert capsys.readouterr().err.count("No space left") == 1


# ---------------------------------------------------------------- beside training


class Slow(Sink):
    """Each record takes until `go` is set."""

    def __init__(self):
        self.go, self.steps, self.closed = threading.Event(), [], False

    def _write(self, record):
        self.go.wait(20)
        self.steps.append(record.step)

    def _close(self):
        self.closed = True


def test_training_does_not_wait_for_what_is_beside_it():
    slow = Slow()
    beside = Beside([slow, Broken()])
    for step in range(1, 6):
        beside.write(record(step))
    assert slow.steps == []
    slow.go.set()
    beside.close()
    assert slow.steps == [1, 2, 3, 4, 5] and slow.closed


def test_what_never_keeps_up_is_given_up(monkeypatch, capfd):
    monkeypatch.setattr(beside_module, "MOST", 3)
    monkeypatch.setattr(beside_module, "CLOSE_S", 0.2)
    slow = Slow()
    beside = Beside([slow])
    for step in range(1, 9):
        beside.write(record(step))
    beside.close()
    assert capfd.readouterr().err.count("Beside stopped: TimeoutError: 3 records wait to be written. Training goes on without it.") == 1
    slow.go.set()


def test_an_end_that_is_not_waited_for_for_ever(monkeypatch, capfd):
    monkeypatch.setattr(beside_module, "CLOSE_S", 0.2)
    slow = Slow()
    beside = Beside([slow])
    beside.write(record(1))
    beside.write(record(2))
    beside.close()
    assert "records are not written after 0.2 s" in capfd.readouterr().err
    slow.go.set()
