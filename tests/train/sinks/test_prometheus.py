"""The Prometheus exporter: every value under its name, labels bounded and escaped, an endpoint for this machine only, never fatal."""

import http.client
import math
import os
import shutil
import socket
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.metrics import StepRecord
from shoestring.train.sinks import prometheus
from shoestring.train.sinks.exported import METRICS, MOST
from shoestring.train.sinks.prometheus import PrometheusSink

EVERYTHING = dict(
    eval_loss=5.5, eval_loss_by_source={"web": 5.25, 'a"b\\c\nd': 6.0}, eval_bits_per_byte=2.5, mtp_loss=[5.75, 6.5], gpu_hours=0.5,
    bubble=0.25,
    exposed_seconds=0.125, hidden_share=0.75, max_vio=[0.5, 1.5], max_vio_mean=1.0, rank_overload=[1.125, 1.25], dead_experts=3,
    bias_norm=0.0625, router_entropy=2.75, fp8_sentinel={"forward": 0.01}, memory_gb=55.5, checkpoint_seconds=0.375, data_seconds=0.03125,
    session=2,
)  # fmt: skip


def config(*words):
    return load(["experiment=tiny", "name=here", *words])


@pytest.fixture
def sink():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = PrometheusSink(config("budget_usd=20"), port=port, file="")
    made.port = port
    yield made
    made.close()


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def samples(text: str) -> dict:
    """Value by name and labels, read by the client library's own parser."""
    return {(s.name, *sorted(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def test_every_value_is_there_under_its_name(sink):
    sink.write(record(3, **EVERYTHING))
    status, text = get(sink.port)
    found = samples(text)
    of = lambda name, **labels: found[(f"shoestring_{name}", *sorted({"run": "here", **labels}.items()))]
    assert status == 200
    assert (of("steps"), of("tokens"), of("loss_nats"), of("restarts_total")) == (3, 3 * 8192, 5.25, 2)
    assert of("spent_dollars_total") == 0.0012 and of("budget_dollars") == 20 and of("devices") == 4 and of("planned_steps") == 150
    assert of("eval_source_loss_nats", source='a"b\\c\nd') == 6.0 and of("mtp_loss_nats", module="1") == 6.5
    assert of("layer_max_vio", layer="1") == of("max_vio_worst") == 1.5 and of("rank_overload_worst") == 1.25
    assert (
        of("memory_peak_bytes") == 55.5e9
        and of("exchange_hidden_ratio") == 0.75
        and of("fp8_sentinel", measure="forward") == 0.01
        and of("checkpoint_stall_seconds") == 0.375
    )
    assert {name for name, *_ in found} == {metric.name for metric in METRICS}, "all of the table, and nothing else"


def test_what_is_not_measured_is_absent_and_what_was_stays(sink):
    sink.write(record(1, eval_loss=5.5))
    sink.write(record(2, eval_loss=None, mfu=None, loss=math.nan))
    found = {name: value for (name, *_), value in samples(get(sink.port)[1]).items()}
    assert found["shoestring_eval_loss_nats"] == 5.5, "the last evaluation"
    assert math.isnan(found["shoestring_loss_nats"]) and found["shoestring_steps"] == 2
    assert "shoestring_bubble_ratio" not in found and "shoestring_budget_dollars" in found


def test_labels_are_bounded(sink):
    sink.write(record(1, max_vio=[1.0] * 500, eval_loss_by_source={str(i): 1.0 for i in range(500)}))
    names = [name for name, *_ in samples(get(sink.port)[1])]
    assert names.count("shoestring_layer_max_vio") == names.count("shoestring_eval_source_loss_nats") == MOST


@pytest.mark.parametrize(
    "asked, status",
    [({}, 200), ({"host": "localhost:1"}, 200), ({"host": "[::1]:9"}, 200), ({"host": "evil.example"}, 403),
    ({"host": "127.0.0.1.evil.example"}, 403),
     ({"path": "/"}, 404), ({"path": "/../etc/passwd"}, 404), ({"path": "/metrics?x=1"}, 200), ({"method": "POST"}, 501),
     ({"method": "DELETE"}, 501)],
)  # fmt: skip
def test_the_endpoint_answers_to_this_machine_and_to_one_question(sink, asked, status):
    sink.write(record(1))
    assert get(sink.port, **asked)[0] == status


def test_it_listens_on_this_machine_only(sink):
    here = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [fields[1] for fields in here if fields[3] == "0A" and fields[1].endswith(f":{sink.port:04X}")] == [f"0100007F:{sink.port:04X}"]


def test_a_port_that_is_taken_is_said_once_and_nothing_stops(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sink = PrometheusSink(config(), port=taken.getsockname()[1], file="")
        sink.write(record(1))
        sink.close()
    err = capsys.readouterr().err
    assert err.count("PrometheusSink stopped: OSError") == 1 and "launch.prometheus_port" in err and err.count("\n") == 1


def test_the_port_is_free_again_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for step in (1, 2):  # a session that goes back opens its sinks again
        sink = PrometheusSink(config(), port=port, file="")
        sink.write(record(step))
        assert samples(get(port)[1])[("shoestring_steps", ("run", "here"))] == step
        sink.close()


def test_the_file_is_written_whole_and_at_most_every_five_seconds(tmp_path, monkeypatch):
    path, clock = tmp_path / "deep" / "run.prom", [100.0]
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: clock[0])
    sink = PrometheusSink(config(), port=0, file=str(path))
    for step, wait in ((1, 0.0), (2, 2.0), (3, 2.0), (4, 2.0)):
        clock[0] += wait
        sink.write(record(step))
        now = samples(path.read_text())[("shoestring_steps", ("run", "here"))]
        assert now == {1: 1, 2: 1, 3: 1, 4: 4}[step]
    sink.write(record(5))
    sink.close()
    assert samples(path.read_text())[("shoestring_steps", ("run", "here"))] == 5 and not list(path.parent.glob("*.tmp"))


@pytest.mark.skipif(shutil.which("promtool") is None and "CI" not in os.environ, reason="needs Debian's prometheus")
def test_promtool_finds_nothing_to_say(tmp_path):
    sink = PrometheusSink(config("budget_usd=1"), port=0, file=str(tmp_path / "x.prom"))
    sink.write(record(1, **EVERYTHING))
    sink.close()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=(tmp_path / "x.prom").read_text(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_imported_or_opened_where_nothing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    sink = PrometheusSink(config(), port=0, file="")
    sink.write(record(1))
    sink.close()


def test_the_table_reads_fields_that_there_are():
    whole = record(1, **EVERYTHING)
    assert {metric.name for metric in METRICS if metric.value and metric.value(whole) is None} == set()
    assert {f.name for f in fields(StepRecord)} >= set(EVERYTHING) and len({metric.name for metric in METRICS}) == len(METRICS)
