"""Event files, read back by TensorBoard's own reader."""

import math

import pytest
from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.sinks.tensorboard import TensorBoardSink
from shoestring.train.sinks.wandb_run import wandb_values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = load(["model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "cluster.env={PLACE: canary}"])


def write(folder, *records) -> None:
    sink = TensorBoardSink(CONFIG, folder)
    for each in records:
        sink.write(each)
    sink.close()


def read(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def series(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars(name)]


def test_every_number_that_wandb_gets(tmp_path):
    records = [record(i, loss=6.0 / i, eval_loss=5.0 if i == 3 else None, max_vio=[0.5, i], time_unix=1e9 + i) for i in range(1, 5)]
    write(tmp_path, *records)
    found = read(tmp_path)
    wanted = {name for each in records for name in wandb_values(each)} - {"step"}
    assert set(found.Tags()["scalars"]) == wanted
    for name in wanted:
        assert series(found, name) == [(r.step, wandb_values(r)[name]) for r in records if name in wandb_values(r)], name
    assert found.Scalars("loss/train")[2].wall_time == 1e9 + 3


def test_steps_taken_again_replace_those_before(tmp_path):
    write(tmp_path, *(record(i, loss=1.0) for i in range(1, 7)))
    write(tmp_path, *(record(i, loss=2.0) for i in range(4, 9)))
    assert series(read(tmp_path), "loss/train") == [(i, 1.0 if i < 4 else 2.0) for i in range(1, 9)]


def test_settings_without_what_may_be_secret(tmp_path):
    write(tmp_path, record(1, loss=math.nan))
    write(tmp_path, record(2))
    (text,) = [e.tensor_proto.string_val[0].decode() for e in read(tmp_path).Tensors("config/text_summary")]
    assert "PLACE" in text and "global_batch_tokens: " in text
    assert all(b"canary" not in file.read_bytes() for file in tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file")
    write(tmp_path / "tensorboard", record(1), record(2))
    assert capfd.readouterr().err.count("TensorBoardSink stopped") == 1
