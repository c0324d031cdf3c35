"""The server of the live page: on this machine only, for addresses that name this machine only, reading only."""

import csv
import io
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

from flask import Response, abort, request, send_file
from plotly import offline
from werkzeug.serving import BaseWSGIServer, make_server

from ...conf.errors import ConfigError
from .. import secrets
from ..figures.history import AXES, numbers, parse
from .page import make_app
from .watch import Watch

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
_PLOTLY = Path(offline.__file__).parents[1] / "package_data" / "plotly.min.js"
_COLUMNS = 400
_TEXTS = ("text/html", "application/json")


def make(watch: Watch, port: int) -> BaseWSGIServer:
    """A server that has its port (0: any free one) and does not serve yet. Raises ConfigError where the port is taken."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or each second would be a line
    app = make_app(watch)
    server = app.server
    policy = _policy(app.csp_hashes())

    @server.before_request
    def only_here() -> None:
        """A page from elsewhere whose name was made to mean this machine sends its own name."""
        host = request.host.rpartition(":")[0] if not request.host.endswith("]") and ":" in request.host else request.host
        if host not in NAMES:
            abort(403, f"this server answers to {', '.join(NAMES)} only")

    @server.after_request
    def guarded(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        if response.mimetype in _TEXTS and not response.direct_passthrough:  # what an older run has kept, say
            response.set_data(secrets.hide(response.get_data(as_text=True).replace("\\u002f", "/")))  # as Dash writes it
        return response

    @server.get("/plotly.min.js")
    def plotly() -> Response:
        return send_file(_PLOTLY, mimetype="text/javascript", max_age=86400)

    @server.get("/records.csv")
    def records() -> Response:
        runs = watch.runs([request.args.get("run", "")])
        if not runs:
            abort(404)
        head = {"Content-Disposition": "attachment; filename=records.csv"}
        return Response(_csv(runs[0].path / "metrics.jsonl"), mimetype="text/csv", headers=head)

    try:
        taken = socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError("--port", port, "is taken by another program", _free(port)) from error
    return make_server(HOST, taken.getsockname()[1], server, threaded=True, fd=taken.detach())


def _policy(hashes: list[str]) -> str:
    scripts = " ".join(["'self'", *hashes])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _free(port: int) -> int | None:
    for other in range(port + 1, min(port + 50, 65536)):
        try:
            socket.create_server((HOST, other)).close()
            return other
        except OSError:
            continue
    return None


def _csv(path: Path) -> Iterator[str]:
    """All records' numbers, a line each; columns are those that the first hundred records have."""
    columns: dict[str, None] = {}
    try:
        with open(path, "rb") as file:
            for _, line in zip(range(100), file):
                columns |= dict.fromkeys(_row(line))
            names = list(columns)[:_COLUMNS]
            yield _line(names)
            file.seek(0)
            for line in file:
                if row := _row(line):
                    yield _line([row.get(name, "") for name in names])
    except OSError:
        return


def _row(line: bytes) -> dict[str, float]:
    record = parse(line)
    return {axis: record.get(axis) for axis in AXES} | numbers(record) if record else {}


def _line(cells: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
