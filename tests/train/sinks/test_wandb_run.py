"""What reaches Weights & Biases, and what becomes of a run when it does not answer."""

import sys
import time

from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.sinks.wandb_run import WandbSink, wandb_values


def test_wandb_names_are_stable_and_skip_what_was_not_measured():
    values = wandb_values(record(3, max_vio=[0.5, 1.5], max_vio_mean=1.0, eval_loss=None))
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
        sink = WandbSink(load([]), tmp_path, mode="online", project="p", timeout_s=7)
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
    sink = WandbSink(load([]), tmp_path, mode="online", project="p")
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
    sink = WandbSink(load([]), tmp_path, mode="online", project="p")
    sink.write(record(1))
    sink.close()
    error = capsys.readouterr().err
    assert error.count("WandbSink stopped") == 1 and "launch.wandb=offline" in error


def test_disabled_wandb_is_never_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = WandbSink(load([]), tmp_path, mode="disabled", project="p")
    sink.write(record(1))
    sink.close()
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_real_offline_wandb_keeps_the_record(tmp_path):
    sink = WandbSink(load(["name=here"]), tmp_path, mode="offline", project="p")
    sink.write(record(1))
    sink.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert (tmp_path / "wandb_id.txt").read_text().strip() in log.name
    deadline = time.monotonic() + 60  # W&B's own process writes it
    while not all(words in log.read_bytes() for words in (b"loss/train", b"here")):
        assert time.monotonic() < deadline, log.read_bytes()
        time.sleep(0.1)
