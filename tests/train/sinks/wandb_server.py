"""As much of W&B's server as sync, an online run and a saved view ask for, on this machine: it keeps what it is sent."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`lines`: by file of the run's stream, what was sent, at its place. `views`: by name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: dict[str, dict[int, dict]] = {}
        self.settings: dict = {}
        self.group, self.uploads, self.alerts, self.views = "", {}, [], {}
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
        if operation == "UpsertView2":
            self.views[variables["displayName"]] = json.loads(variables["spec"])
            return {"upsertView": {"view": {"id": "V", "name": variables["name"]}, "inserted": True}}
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
