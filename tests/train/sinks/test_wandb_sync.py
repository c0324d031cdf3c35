"""What is recorded without W&B's server is what `wandb sync` gives it later: to a server on this machine that keeps what it is sent."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import wandb
from shoestring.conf.compose import load
from shoestring.launch import cli, exit_codes
from shoestring.launch.workspace import SECTIONS
from shoestring.tests.train.sinks.made import record
from shoestring.tests.train.sinks.test_prometheus import EVERYTHING
from shoestring.tests.train.sinks.wandb_server import Server
from shoestring.train.sinks.wandb_run import WandbSink, wandb_values


@pytest.fixture
def server():
    wandb.teardown()  # its process keeps the address of the server that it was first told
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()
    wandb.teardown()


RECORDS = [record(s, loss=6.0 / s, max_vio=[0.5, s], eval_loss=5.0 if s % 3 == 0 else None) for s in range(1, 31)]


def session(tmp_path, records, mode="offline", **changes) -> None:
    config = load(["name=here", "launch.wandb_group=sweep", "cluster.env={NCCL_DEBUG: a-secret}"])
    sink = WandbSink(config, tmp_path, mode=mode, project="p", **changes)
    for each in records:
        sink.write(each)
    sink.close()
    time.sleep(1.1)  # W&B names its folders by the second


def sync(tmp_path, server: Server) -> str:
    folders = sorted(map(str, (tmp_path / "wandb").glob("offline-run-*")))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--yes", *folders], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_offline_sessions_are_one_run_there(tmp_path, monkeypatch, server):
    """Two sessions without a server, the second of which takes three steps again, and one that was to be online when nobody answered."""
    session(tmp_path, RECORDS[:12])
    session(tmp_path, RECORDS[9:20])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    session(tmp_path, RECORDS[20:], mode="online", timeout_s=2)
    said = sync(tmp_path, server)
    assert server.rows == [wandb_values(r) for r in RECORDS[:12] + RECORDS[9:]], said
    assert server.group == "sweep" and server.settings["cluster"]["env"] == ["NCCL_DEBUG"]
    assert server.settings["optim"]["lr"] == load(["name=here"]).optim.lr
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert summary["loss/train"]["last"] == RECORDS[-1].loss and summary["step"] == 30
    assert all(b"a-secret" not in raw for raw in server.uploads.values()) and "a-secret" not in json.dumps(server.lines)


def test_an_online_run_is_gone_on_with(tmp_path, monkeypatch, server):
    """The same server, reached: a second session adds to the first's history; alerts arrive."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    session(tmp_path, RECORDS[:8], mode="online")
    config = load(["name=here"])
    sink = WandbSink(config, tmp_path, mode="online", project="p")
    for each in RECORDS[8:16]:
        sink.write(each)
    sink.alert("here: loss", "it is nan")
    sink.close()
    assert server.rows == [wandb_values(r) for r in RECORDS[:16]] and server.alerts == ["here: loss"]


def test_a_view_of_the_project(monkeypatch, capsys, server):
    """`shoestring workspace`: every chart in it draws what runs send."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert cli.main(["workspace", "me/p"]) == exit_codes.OK
    assert capsys.readouterr().out.strip().startswith(f"{server.url}/me/p?nw=")
    sections = server.views["Shoestring"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    sent = set(wandb_values(record(1, **{**EVERYTHING, "mtp_loss": [1.0]})))
    for panel in (panel["config"] for section in sections for panel in section["panels"]):
        assert {panel["xAxis"], *panel["metrics"]} <= sent, panel
    assert sum(len(section["panels"]) for section in sections) == sum(map(len, SECTIONS.values()))


@pytest.mark.parametrize("project", ["", "shoestring", "a/b/c", "me/p?x=1"])
def test_a_project_that_is_none(project, capsys):
    assert cli.main(["workspace", project]) == exit_codes.CONFIG
    assert "must be ENTITY/PROJECT" in capsys.readouterr().err
