"""The page's server: for this machine only, reading only, and whatever it is asked, an answer without a traceback."""

import http.client
import json
import socket
import time
from pathlib import Path

import pytest
from shoestring.launch import cli, exit_codes
from shoestring.tests.launch.dash.browser import served

LINE = {"step": 1, "tokens": 10, "loss": 2.5, "seconds": 1.0, "dollars": 0.5, "mfu": 0.25, "max_vio": [0.5, 1.5]}


@pytest.fixture
def server(tmp_path):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(LINE) + "\nrubbish\n" + json.dumps(LINE | {"step": 2, "mfu": None}) + "\n")
    (tmp_path / "secret").write_text("the secret")
    with served(tmp_path / "runs") as url:
        yield int(url.rstrip("/").rpartition(":")[2])


def ask(
    port: int, path: str = "/", method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode(errors="replace")


def update(port: int, *, output: str = "", **inputs) -> tuple[int, str]:
    """The page's one callback, called as a browser would; `inputs` in place of what a browser sends."""
    names = ("page.data", "seen.data", "head.children", "tiles.children", "notes.children", "tables.children", "trace-step.options")
    outputs = [{"id": n.split(".")[0], "property": n.split(".")[1]} for n in names]
    values = {"clock": 1, "runs": ["one"], "over": "tokens", "load-step": None, "trace-step": None, "seen": None} | inputs
    asked = [{"id": k, "property": "n_intervals" if k == "clock" else "value", "value": v} for k, v in values.items() if k != "seen"]
    body = {"output": output or f"..{'...'.join(names)}..", "outputs": outputs, "inputs": asked, "changedPropIds": ["runs.value"],
            "state": [{"id": "seen", "property": "data", "value": values["seen"]}]}  # fmt: skip
    status, _, text = ask(port, "/_dash-update-component", "POST", json.dumps(body))
    return status, text


def test_headers_forbid_what_the_page_does_not_need(server):
    for path in ("/", "/assets/page.js", "/plotly.min.js", "/_dash-layout", "/records.csv?run=one", "/nothing"):
        _, headers, _ = ask(server, path)
        policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'", path
        assert "unsafe" not in policy["script-src"] and "*" not in " ".join(policy.values())
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize(
    "host, status",
    [("127.0.0.1", 200), ("localhost:8050", 200), ("[::1]:8050", 200), ("[::1]", 200), ("evil.example", 403), ("evil.example:8050", 403),
     ("127.0.0.1.evil.example", 403), ("0.0.0.0", 403), ("", 403), ("localhost.", 403)],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(server, host, status):
    assert ask(server, "/_dash-layout", Host=host)[0] == status


@pytest.mark.parametrize(
    "path",
    ["/assets/../page.py", "/assets/%2e%2e/page.py", "/assets/..%2f..%2fpage.py", "/assets//etc/passwd", "/..%2fsecret", "/../secret",
     "/secret", "/records.csv?run=../../secret", "/records.csv?run=/etc", "/records.csv?run=", "/records.csv",
     "/records.csv?run=one/../one", "/_dash-component-suites/dash/../../../../etc/passwd", "/_dash-component-suites/os/os.py"],
)  # fmt: skip
def test_nothing_but_its_own_is_served(server, path):
    status, _, text = ask(server, path)
    assert status in (200, 400, 403, 404, 405, 500) and "the secret" not in text and "root:" not in text and "def make_app" not in text
    assert status != 200 or "<!doctype html>" in text.lower(), "the page itself, or nothing"


def test_it_listens_on_this_machine_only(server):
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{server:04X}")] == [f"0100007F:{server:04X}"]


@pytest.mark.parametrize(
    "inputs",
    [{"runs": None}, {"runs": "one"}, {"runs": [{"a": 1}, None, 5]}, {"runs": ["../../secret"]}, {"runs": ["one"] * 1000},
     {"over": "evil"}, {"over": ["x"]}, {"load-step": -1}, {"load-step": 10**400}, {"load-step": "3"}, {"trace-step": {"a": "b"}},
     {"trace-step": "../../secret"}, {"seen": ["x"]},
     {"seen": {"version": {}, "at": "x", "took": []}}, {"clock": "x"}],
    ids=str,
)  # fmt: skip
def test_whatever_a_browser_sends_there_is_an_answer(server, inputs):
    status, text = update(server, **inputs)
    assert status in (200, 204) and "Traceback" not in text and "the secret" not in text


def test_an_update_has_the_numbers_of_the_file(server):
    status, text = update(server)
    found = json.loads(text)["response"]
    charts = {chart["id"]: chart for chart in found["page"]["data"]["charts"]}
    assert status == 200 and charts["loss"]["data"][0]["y"] == [2.5, 2.5] and charts["mfu"]["data"][0]["y"] == [25.0]
    for _ in range(100):  # it is looked at again when it has been read to its end
        again = json.loads(update(server, seen=found["seen"]["data"])[1])["response"]
        if not again:
            return
        found = again
        time.sleep(0.1)
    pytest.fail("nothing changes, and yet there are news")


def test_all_steps_as_csv(server):
    status, headers, text = ask(server, "/records.csv?run=one")
    assert status == 200 and headers["Content-Disposition"] == "attachment; filename=records.csv"
    head, first, second = text.splitlines()
    assert head == "step,tokens,seconds,dollars,loss,mfu,max_vio[0],max_vio[1],max_vio_worst"
    assert first == "1,10,1.0,0.5,2.5,0.25,0.5,1.5,1.5" and second == "2,10,1.0,0.5,2.5,,0.5,1.5,1.5"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(server, method):
    assert all(ask(server, path, method)[0] in (404, 405) for path in ("/", "/records.csv?run=one", "/assets/page.js", "/_dash-layout"))


def test_a_port_that_is_taken_is_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["dash", str(tmp_path), "--port", str(port)]) == exit_codes.CONFIG
    err = capsys.readouterr().err
    assert err.startswith(f"error: --port = {port}: is taken by another program; nearest valid value: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, said", [(["nowhere"], "DIR = nowhere: no such folder"), (["--port", "70000"], "--port = 70000: is a number from 0")]
)
def test_what_cannot_be_shown_is_one_sentence(words, said, capsys):
    assert cli.main(["dash", *words]) == exit_codes.CONFIG
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1
