"""Prometheus: an endpoint on this machine that it may scrape, and a file for node_exporter's textfile collector.

What was measured last stays until it is measured again, as with a held-out loss. `exported.py` has the metrics.
"""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...conf.schema import Config
from ..metrics import StepRecord, replace_file
from .exported import METRICS, values
from .sink import Sink

HOST = "127.0.0.1"
FILE_S = 5.0  # between two writes of the file
_NAMES = ("127.0.0.1", "localhost", "[::1]")


class PrometheusSink(Sink):
    """`port`: of the endpoint, http://127.0.0.1:PORT/metrics; 0: none. `file`: its path; empty: none."""

    hint = "launch.prometheus_port and launch.prometheus_file choose where its metrics go."

    def __init__(self, config: Config, *, port: int, file: str):
        self._file, self._server, self._told, self._written = Path(file) if file else None, None, {}, -FILE_S
        if not port and not file:
            self._stopped = True
            return
        self._guard(self._start, config, port)

    def _start(self, config: Config, port: int) -> None:
        from prometheus_client import CollectorRegistry  # runs without it need not pay for its import

        self._lock = threading.Lock()
        self._run = config.name
        self._told = {m.name: values(m, m.constant(config)) for m in METRICS if m.constant}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        if port:
            self._server = _Server((HOST, port), _Handler)
            self._server.text = self._text
            threading.Thread(target=self._server.serve_forever, name="prometheus endpoint", daemon=True).start()

    def collect(self) -> Iterator[Any]:
        """Asked by the registry at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            told = dict(self._told)
        for metric in METRICS:
            labels = ["run", metric.label] if metric.label else ["run"]
            family = (CounterMetricFamily if metric.counts else GaugeMetricFamily)(metric.name, metric.help, labels=labels)
            for label, value in told.get(metric.name, {}).items():
                family.add_metric([self._run, label] if metric.label else [self._run], value)
            if family.samples:
                yield family

    def _text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def _write(self, record: StepRecord) -> None:
        found = {m.name: now for m in METRICS if m.value and (now := values(m, m.value(record)))}
        with self._lock:
            self._told = {**self._told, **found}
        if self._file and time.monotonic() - self._written >= FILE_S:
            self._write_file()

    def _write_file(self) -> None:
        self._written = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, self._text().decode())

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._file and self._told:
            self._write_file()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # a run that is started again a second later
    request_queue_size = 16

    def server_bind(self) -> None:
        """As the base does, but without asking a name server for this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = HOST, self.socket.getsockname()[1]
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics, for those who call this machine by a name of its own: a page from elsewhere sends another."""

    timeout = 10
    server_version, sys_version = "shoestring", ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0] if not self.headers.get("Host", "").endswith("]") else self.headers["Host"]
        if host not in _NAMES:
            self.send_error(403, f"this endpoint answers to {', '.join(_NAMES)} only")
        elif self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "there is /metrics only")
        else:
            text = self.server.text()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing: each scrape would be a line."""
