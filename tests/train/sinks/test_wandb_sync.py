"""What is recorded without W&B's server is what `wandb sync` gives it later: to a server on this machine that keeps what it is sent."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb
from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.sinks.wandb_run import WandbSink, wandb_values


class Server(ThreadingHTTPServer):
    """As much of W&B's as sync and an online run ask for. `lines`: by file of the run's stream, what was sent, at its place."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: dict[str, dict[int, dict]] = {}
        self.settings: dict = {}
        self.group, self.uploads, self.alerts = "", {}, []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict):
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}, "bucket": self._known(variables["name"])}}
        if operation == "UpsertBucket":
            self.settings |= {key: item["value"] for key, item in json.loads(variables.get("config") or "{}").items()}
            self.group = variables.get("groupName") or self.group
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
            return {"upsertBucket": {"bucket": {"id": "B", "name": variables["name"], "project": project}, "inserted": not self.lines}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            artifact = {"id": "A", "state": "COMMITTED", "artifactSequence": {"id": "S", "latestArtifact": {"id": "A", "versionIndex": 0}}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _known(self, name: str):
        if not self.lines:
            return None
        counts = {kind: len(self.lines.get(f"wandb-{kind}.jsonl", {})) for kind in ("history", "events")}
        tail = json.dumps([json.dumps(list(self.lines["wandb-history.jsonl"].values())[-1])])
        return {
            "id": "B", "name": name, "historyLineCount": counts["history"], "eventsLineCount": counts["events"], "logLineCount": 0,
            "historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, files: dict) -> None:
        for name, part in files.items():
            kept = self.lines.setdefault(name, {})
            for i, line in enumerate(part["content"]):
                kept[part["offset"] + i] = json.loads(line) if name.endswith("jsonl") else line

    def handle_error(self, request, address):
        """W&B's client ends connections as it likes."""

    @property
    def rows(self) -> list[dict]:
        """Of the run's history, without what W&B adds."""
        kept = self.lines.get("wandb-history.jsonl", {})
        assert list(sorted(kept)) == list(range(len(kept)))
        return [{k: v for k, v in kept[i].items() if not k.startswith("_")} for i in range(len(kept))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        found: dict = {}
        with self.server.lock:
            if self.path == "/graphql":
                asked = json.loads(raw)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]).group(1)
                found = {"data": self.server.answer(operation, asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                self.server.stream(json.loads(raw).get("files") or {})
            elif self.path.startswith("/upload/"):
                self.server.uploads[self.path.removeprefix("/upload/")] = raw
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_):
        pass


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
