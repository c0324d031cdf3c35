"""The Grafana dashboard: docs/ has what the command makes, and a real Prometheus that scrapes a real run answers every query."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from shoestring.conf.compose import load
from shoestring.launch import cli, grafana
from shoestring.tests.train.sinks.made import record
from shoestring.tests.train.sinks.test_prometheus import EVERYTHING
from shoestring.train import metrics
from shoestring.train.sinks.exported import METRICS
from shoestring.train.sinks.prometheus import PrometheusSink

PANELS = [panel for panel in grafana.dashboard()["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_what_is_in_docs_is_what_the_command_makes(tmp_path, capsys):
    kept = Path(grafana.__file__).parents[1] / "docs" / "grafana.json"
    assert cli.main(["grafana", "--output", str(tmp_path / "made.json")]) == 0
    assert kept.read_text() == (tmp_path / "made.json").read_text(), "shoestring grafana --output docs/grafana.json"
    capsys.readouterr()
    assert cli.main(["grafana"]) == 0 and json.loads(capsys.readouterr().out) == json.loads(kept.read_text())


def test_panels_have_their_own_places_and_numbers():
    panels = grafana.dashboard()["panels"]
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    for a, b in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart and a["x"] + a["w"] <= grafana.COLUMNS
    assert all(panel["targets"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_every_metric_is_drawn_and_every_query_asks_for_the_chosen_runs():
    asked = {name for query in QUERIES for name in re.findall(r"shoestring_\w+", query)}
    alone = {"shoestring_planned_steps"}  # beside the steps taken, for those who write queries of their own
    assert {metric.name for metric in METRICS} - asked == alone
    assert all(query.count("shoestring_") == query.count('{run=~"$run"}') for query in QUERIES)


# ---------------------------------------------------------------- with a real Prometheus


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(port: int, query: str, at: float | None = None) -> list[dict]:
    words = {"query": query} | ({"time": at} if at else {})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode(words)}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        if error.code == 503:  # it is still starting
            return []
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:
        return []  # it is still starting


def wait_for(found, seconds: float = 180.0):
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.1)
    return value


@pytest.fixture
def scraped(tmp_path):
    """A training run of two processes, a sink that has everything that this run has not, and a Prometheus that scrapes both."""
    ports = [free_port(), free_port(), free_port()]
    sink = PrometheusSink(load(["experiment=tiny", "name=made", "budget_usd=20"]), port=ports[1], file="")
    sink.write(record(1, **EVERYTHING))
    targets = [f"127.0.0.1:{port}" for port in ports[:2]]
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": "runs", "static_configs": [{"targets": targets}]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))  # YAML has JSON in it
    words = [
        "experiment=tiny", "name=scraped", f"run_dir={tmp_path / 'run'}", "model=micro", "parallel.pp=1", "parallel.ep=2",
        "data=synthetic", f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=32",
        "train.global_batch_tokens=256", "train.steps=100000", "optim.warmup_steps=10", "train.eval_interval=10", "launch.trace_interval=5",
        "checkpoint.interval=7", f"launch.prometheus_port={ports[0]}",
    ]  # fmt: skip
    started = []
    try:
        with open(tmp_path / "out", "w") as out:
            train = [sys.executable, "-u", "-X", "faulthandler", "-m", "shoestring.train", *words]
            started.append(subprocess.Popen(train, cwd=tmp_path, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            serve = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                     f"--web.listen-address=127.0.0.1:{ports[2]}", "--log.level=error"]  # fmt: skip
            started.append(subprocess.Popen(serve, cwd=tmp_path, stdout=out, stderr=out))
        yield ports[2], started[0], tmp_path
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        sink.close()


@pytest.mark.skipif(shutil.which("prometheus") is None and "CI" not in os.environ, reason="needs Debian's prometheus")
def test_a_real_prometheus_answers_every_query(scraped):
    port, training, folder = scraped
    try:
        wait_for(lambda: [r for r in ask(port, 'shoestring_steps{run="scraped"} > 12') if r["metric"]["run"] == "scraped"])
        wait_for(lambda: ask(port, 'deriv(shoestring_tokens{run="scraped"}[10s]) > 0'))
    except AssertionError:
        state = f"exit code {training.poll()}, {[str(p.relative_to(folder)) for p in (folder / 'run').rglob('*') if p.is_file()]}"
        training.send_signal(signal.SIGABRT)  # it tells where it is
        training.wait(60)
        raise AssertionError(f"{state}\n{(folder / 'out').read_text()[-6000:]}") from None
    at = time.time()
    time.sleep(0.5)  # what was being scraped at that time has come
    for query in QUERIES:
        answer = ask(port, query.replace("$run", "scraped|made").replace("$__rate_interval", "10s"), at)
        assert answer and all(result["value"][1] for result in answer), query
        own = ask(port, query.replace("$run", "scraped").replace("$__rate_interval", "10s"), at)
        assert own or any(name in query for name in NOT_IN_THIS_RUN), f"{query}: only of made records"
    values = {name: float(ask(port, f'shoestring_{name}{{run="scraped"}}', at)[0]["value"][1])
              for name in ("steps", "loss_nats", "tokens", "spent_dollars_total", "gradient_norm", "max_vio_mean")}  # fmt: skip
    (written,) = [r for r in metrics.read_records(folder / "run" / "metrics.jsonl") if r.step == values["steps"]]
    assert values == {"steps": written.step, "loss_nats": written.loss, "tokens": written.tokens, "gradient_norm": written.grad_norm,
                      "spent_dollars_total": written.dollars, "max_vio_mean": written.max_vio_mean}  # fmt: skip
    assert training.poll() is None, "it was scraped while it trained"


# This run has no budget, no FP8 and no multi-token prediction, and exchanges nothing in a pipeline: those come from made records.
NOT_IN_THIS_RUN = ("budget", "fp8", "mtp")
