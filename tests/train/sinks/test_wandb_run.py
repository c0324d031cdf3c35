"""What reaches Weights & Biases, and what becomes of a run when it does not answer."""

import json
import socket
import struct
import sys
import time
from collections.abc import Iterator

from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.sinks.wandb_run import WandbSink, wandb_values
from wandb.proto.wandb_internal_pb2 import Record


def test_wandb_names_are_stable_and_skip_what_was_not_measured():
    values = wandb_values(record(3, max_vio=[0.5, 1.5], max_vio_mean=1.0, eval_loss=None))
    assert values["loss/train"] == 5.25 and values["cost/dollars"] == 0.0012 and values["speed/mfu"] == 0.123
    assert (values["router/max_vio_worst"], values["router/max_vio_mean"]) == (1.5, 1.0)
    assert "loss/eval" not in values and not any(isinstance(v, list) for v in values.values())


class FakeArtifact:
    def __init__(self):
        self.references = {}

    def add_reference(self, uri, name, checksum):
        assert uri.startswith("file:///") and not checksum
        self.references[name] = uri


class FakeWandb:
    """As much of the module as the sink touches."""

    def __init__(self):
        self.inits, self.logged, self.metrics, self.artifacts, self.alerts, self.finished = [], [], [], [], [], 0
        self.id = "x"

    def init(self, **options):
        self.inits.append(options)
        return self

    def Settings(self, **settings):
        return settings

    def define_metric(self, name, step_metric, summary=None):
        self.metrics.append((name, step_metric))

    def Artifact(self, name, **about):
        self.artifact = FakeArtifact()
        return self.artifact

    def log_artifact(self, artifact):
        self.artifacts.append(artifact.references)

    def alert(self, title, text):
        self.alerts.append((title, text))

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


def records_of(file) -> Iterator[Record]:
    """Of a .wandb file: LevelDB's log format (blocks of 32 kB; checksum, length, kind of each chunk) after a header of seven bytes."""
    raw, at, parts = file.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        if at + 7 + length > len(raw):
            return
        parts, at = parts + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            found = Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


def logged(folder) -> tuple[dict, list[dict], set]:
    """What an offline session's file holds: the run's settings, its rows, and the names of referred files."""
    (file,) = folder.glob("*.wandb")
    until = time.monotonic() + 60  # W&B's own process writes it
    while "exit" not in [found.WhichOneof("record_type") for found in records_of(file)]:
        assert time.monotonic() < until
        time.sleep(0.1)
    config, rows, names = {}, [], set()
    for found in records_of(file):
        kind = found.WhichOneof("record_type")
        if kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in found.run.config.update}
            config["_group"], config["_id"] = found.run.run_group, found.run.run_id
        elif kind == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item})
        elif kind == "artifact":
            names |= {entry.path for entry in found.artifact.manifest.contents}
    return config, rows, names


def test_an_offline_directory_is_complete(tmp_path):
    """Every value of every step, the settings, and where the files are: what `wandb sync` will send."""
    config = load(["name=here", "launch.wandb_group=sweep", "cluster.env={NCCL_DEBUG: secret}"])
    records = [
        record(s, loss=6.0 / s, max_vio=[0.5, s], eval_loss=5.0 if s % 3 == 0 else None, eval_loss_by_source={"web": 1.0 * s})
        for s in range(1, 31)
    ]
    (tmp_path / "metrics.jsonl").write_text("x")
    for part in (records[:20], records[20:]):  # two sessions
        sink = WandbSink(config, tmp_path, mode="offline", project="p")
        for r in part:
            sink.write(r)
        sink.close()
        time.sleep(1.1)  # W&B names its folders by the second
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    found = [logged(folder) for folder in folders]
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for _, part, _ in found for row in part]
    assert rows == [wandb_values(r) for r in records]
    for settings, _, names in found:
        assert names == {"metrics.jsonl"}
        assert settings["model"]["num_experts"] == config.model.num_experts and settings["optim"]["lr"] == config.optim.lr
        assert settings["cluster"]["env"] == ["NCCL_DEBUG"] and "secret" not in json.dumps(settings)
        assert settings["_group"] == "sweep" and settings["_id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert all("secret" not in path.read_bytes().decode("latin-1") for folder in folders for path in folder.rglob("*") if path.is_file())


def test_a_real_server_that_is_not_there_loses_nothing(tmp_path, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        sink = WandbSink(load(["name=here"]), tmp_path, mode="online", project="p", timeout_s=2)
        for step in range(1, 6):
            sink.write(record(step))
        sink.close()
    assert "W&B does not answer" in capsys.readouterr().err
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    _, rows, _ = logged(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_files_are_referred_to_and_none_is_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints").mkdir()
    sink = WandbSink(load([]), tmp_path, mode="offline", project="p")
    sink.write(record(1))
    sink.alert("stall", "no step since 60 s")
    sink.close()
    assert fake.artifacts == [{name: (tmp_path / name).resolve().as_uri() for name in ("config.yaml", "metrics.jsonl", "checkpoints")}]
    assert fake.alerts == [("stall", "no step since 60 s")] and fake.finished == 1
    fake.Artifact = None  # no such thing in another version: said, and the run is finished all the same
    sink = WandbSink(load([]), tmp_path, mode="offline", project="p")
    sink.close()
    assert fake.finished == 2 and "W&B has no references" in capsys.readouterr().err
