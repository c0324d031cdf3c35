"""The report: right figures, nothing fetched, nothing unescaped, and a page for every half-written run."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from shoestring.conf.compose import load, to_yaml
from shoestring.launch.figures.chart import Chart
from shoestring.launch.figures.page import Page, render
from shoestring.launch.report import write_report
from shoestring.launch.verify import certificate
from shoestring.launch.verify.certificate import Invalid, Measure, Result
from shoestring.train import metrics
from shoestring.train.metrics import StepRecord
from shoestring.train.sinks.jsonl import JsonlSink

LOADS = [[30, 10, 20, 0], [15, 15, 15, 15], [0, 60, 0, 0]]  # means 15


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=8192 * step, samples=32 * step, loss=8.0 / step, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0,
        tokens_per_second=8192.0, tokens_per_second_per_gpu=2048.0, mfu=0.25, seconds=1.5 * step, dollars=0.001 * step,
        dollars_per_billion_tokens=5.0, max_vio=[0.5, 0.25, 1.5], expert_load=LOADS, time_unix=1e9,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def make_run(path, records, *, config=None, summary=True):
    config = config or load(["experiment=tiny", "train.steps=120", "train.global_batch_tokens=8192"])
    (path / "config.yaml").write_text(to_yaml(config))
    sink = JsonlSink(path / "metrics.jsonl")
    for r in records:
        sink.write(r)
    sink.close()
    if summary:
        metrics.summarize(config, records).write(path / "summary.json")


class Markup(HTMLParser):
    """Elements, their attributes, and text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts, self._in = [], [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._in = tag if tag in ("script", "style") else self._in

    def handle_endtag(self, tag):
        self._in = None if tag == self._in else self._in

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append(data)
        elif self._in is None:
            self.text += data


def read(path) -> tuple[Markup, dict]:
    """The page and its figures by id."""
    page = Markup(write_report(path).read_text())
    found = re.search(r"const FIGURES = (.*);\n", "".join(page.scripts[-1:]))
    return page, {figure["id"]: figure for figure in json.loads(found[1])} if found else {}


def test_a_whole_run(tmp_path):
    records = [record(s, eval_loss=7.5 if s == 4 else None) for s in range(1, 121)]
    make_run(tmp_path, records)
    page, figures = read(tmp_path)
    train, held_out = figures["loss"]["data"]
    assert train["y"] == [r.loss for r in records] and train["x"] == [r.tokens for r in records]
    assert (held_out["x"], held_out["y"]) == ([4 * 8192], [7.5])
    heat, dead = figures["load"]["data"]
    assert heat["z"] == [[2, 2 / 3, 4 / 3, 0], [1, 1, 1, 1], [0, 4, 0, 0]] and heat["customdata"] == LOADS
    assert heat["y"] == ["layer 1", "layer 2", "layer 3"]  # tiny's block 0 is dense
    assert list(zip(dead["x"], dead["y"])) == [(3, "layer 1"), (0, "layer 3"), (2, "layer 3"), (3, "layer 3")]
    assert [t["y"][0] for t in figures["max-vio"]["data"]] == [0.5, 0.25, 1.5]
    assert set(figures["mfu"]["data"][0]["y"]) == {25.0}
    assert figures["dollars"]["data"][0]["y"][-1] == 0.12
    # Spent 0.12 on 983,040 tokens: $122 a billion. Parameters: tiny's.
    facts = ("finished: 120 steps", "pp 2 × edp 1 × ep 2", "4 × CPU core")
    for text in (*facts, "0.067", "7.500", "983 k", "$0.12", "$122", "3.05 M", "1.21 M active"):
        assert text in page.text
    assert "Missing or unusual" not in page.text
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_is_fetched(tmp_path):
    make_run(tmp_path, [record(s) for s in range(1, 121)])
    page, _ = read(tmp_path)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "onload", "onclick"} & {name for name, _ in page.attributes}
    (policy,) = [value for name, value in page.attributes if value and "default-src" in value]
    assert "default-src 'none'" in policy and "http" not in policy and "*" not in policy
    assert "@import" not in (style := (tmp_path / "report.html").read_text().split("</style>")[0]) and "url(" not in style


def test_text_from_the_run_is_only_ever_text(tmp_path):
    evil = "</script><script>alert(1)</script><b onmouseover=x>&amp;"
    config = load([])
    config = dataclasses.replace(config, name=evil, model=dataclasses.replace(config.model, name=evil))
    make_run(tmp_path, [record(1)], config=config)
    page, _ = read(tmp_path)
    assert page.tags.count("script") == 2 and "b" not in page.tags
    assert page.text.count(evil) >= 3  # title, heading, facts: shown as it is
    (tmp_path / "config.yaml").write_text(f"x: '{evil}")  # what cannot be parsed is still shown
    page, _ = read(tmp_path)
    assert page.tags.count("script") == 2 and evil in page.text


def test_a_figure_cannot_end_its_script():
    chart = Chart("c", "t", "s", [{"name": "</script><b>"}], {})
    page = Markup(render(Page(title="", facts=[], status="", notes=[], tiles=[], charts=[chart], config_text="")))
    assert "b" not in page.tags and "\\u003c/script>\\u003cb>" in page.scripts[-1]


@pytest.mark.parametrize(
    "files, said",
    [
        ({}, ["no metrics.jsonl", "no config.yaml", "no step recorded"]),
        ({"metrics.jsonl": ""}, ["holds no complete record"]),
        ({"metrics.jsonl": '{"step":1,"tok'}, ["holds no complete record"]),
        ({"metrics.jsonl": metrics.to_line(record(1))}, ["no config.yaml", "No evaluation"]),
        ({"metrics.jsonl": metrics.to_line(record(1)) + "rubbish\n" + metrics.to_line(record(2)) + '{"st'}, ["1 line(s)", "at line 2"]),
        ({"metrics.jsonl": metrics.to_line(record(1, expert_load=None, max_vio=None))}, ["No expert load"]),
        ({"metrics.jsonl": metrics.to_line(record(1, mfu=None)), "config.yaml": "ok"}, ["MFU is unknown"]),
        ({"metrics.jsonl": metrics.to_line(record(1, loss=math.nan))}, ["not a number at 1 step(s), the first at step 1"]),
        ({"config.yaml": "name: [half"}, ["config.yaml cannot be"]),
        ({"config.yaml": "name: half\nmodel:\n  dim: 3\n"}, ["config.yaml cannot be used"]),
        ({"config.yaml": "ok"}, ["no metrics.jsonl"]),
        ({"summary.json": '{"steps": 3'}, ["summary.json cannot be read"]),
        ({"summary.json": '{"steps": 3}'}, ["summary.json cannot be read: no "]),
        ({"config.yaml": "ok", "metrics.jsonl": metrics.to_line(record(7)), "summary.json": "step 3"}, ["ends at step 3", "step 7 of 120"]),
    ],
    ids=range(14),
)
def test_a_half_written_run_says_what_is_missing(tmp_path, files, said):
    config = load(["experiment=tiny", "train.steps=120", "train.global_batch_tokens=8192"])
    ready = {"ok": to_yaml(config)}
    if files.get("summary.json") == "step 3":
        metrics.summarize(config, [record(3)]).write(tmp_path / "summary.json")
        files = {k: v for k, v in files.items() if k != "summary.json"}
    for name, text in files.items():
        (tmp_path / name).write_text(ready.get(text, text))
    page, figures = read(tmp_path)
    for text in said:
        assert text in page.text
    assert bool(figures) == ('"step":' in files.get("metrics.jsonl", "") and files["metrics.jsonl"].count("time_unix") > 0)
    assert page.text.count("–") >= 6 or figures  # unknown numbers are dashes


def test_no_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run directory"):
        write_report(tmp_path / "nowhere")


EVIL = "</td><script>alert(1)</script>&amp;"


def make_certificate(path, *, failing=False, **changes):
    gradient = Measure(quantity="gradient", where=f"embed {EVIL}, step 1", value=5e-15, limit=1e-10)
    fields = dict(
        layout="pp2ep2", options=[f"model.mtp_depth=1{EVIL}"], routing="ties", passed=True, worst=gradient, broken=[], resumed_on="pp4",
        notes=[f"near-tie {EVIL}"], error="", seconds=12.3, command="shoestring verify layouts=pp2ep2",
    )  # fmt: skip
    cases = [Result(**fields)]
    if failing:
        broken = dict(passed=False, broken=[dataclasses.replace(gradient, value=None)], smallest=f"verify smallest {EVIL}")
        cases += [Result(**fields | broken | {"layout": "ep8"}), Result(**fields | {"passed": False, "error": f"Trace\nRank 1 {EVIL}"})]
    invalid = [Invalid(name="ep3", why=f"no divisor {EVIL}"), Invalid(name="ep5", why=f"no divisor {EVIL}")]
    made = certificate.certificate(load([]), cases, invalid, {}, command=f"shoestring verify {EVIL}", seconds=61.0)
    certificate.write(path, dataclasses.replace(made, limits={"fp64": {"gradient": 1e-10}}, **changes))


def test_a_certificate_alone_is_a_page(tmp_path):
    make_certificate(tmp_path)
    page, figures = read(tmp_path)
    said = ("Shoestring certificate", "1 of 1 cases passed", "1 of 1 case on 1 layout computes what one process computes.",
            "5.0e-15 of 1e-10", "mtp_depth=1", "routing=ties", "near-tie", "ep3, ep5", "torch", "0:12", "1e-10")  # fmt: skip
    assert all(text in page.text for text in said)
    assert not figures and "script" not in page.tags and "Missing or unusual" not in page.text and "–" not in page.text
    assert page.text.count(EVIL) >= 5


def test_cases_that_fail_come_first_and_say_how_to_see_it_again(tmp_path):
    make_certificate(tmp_path, failing=True, passed=False)
    page, _ = read(tmp_path)
    assert "2 of 3 cases on 2 layouts do not compute what one process computes." in page.text
    rows = re.findall(r'<tr class="(pass|fail|more)">', (tmp_path / "report.html").read_text())
    assert rows == ["fail", "more", "fail", "more", "pass"]
    assert f"verify smallest {EVIL}" in page.text and f"Rank 1 {EVIL}" in page.text and "script" not in page.tags


def test_a_run_has_its_certificate_beside_its_curves(tmp_path):
    make_run(tmp_path, [record(s) for s in range(1, 121)])
    before, _ = read(tmp_path)
    assert "Layouts proved" not in before.text
    make_certificate(tmp_path)
    page, figures = read(tmp_path)
    assert "Layouts proved" in page.text and "finished: 120 steps" in page.text and "loss" in figures
    assert page.tags.count("script") == 2 and not {"src", "href", "onload"} & {name for name, _ in page.attributes}


def test_a_damaged_certificate_is_told(tmp_path):
    make_run(tmp_path, [record(1)])
    for text in ("{", '{"cases": []}', "\udcff"):
        (tmp_path / certificate.FILE).write_text(text, errors="surrogateescape")
        page, _ = read(tmp_path)
        assert "certificate.json cannot be read" in page.text and "Layouts proved" not in page.text


def test_restarts_are_marked_and_lost_steps_priced(tmp_path):
    make_run(tmp_path, [record(s, session=int(s > 2)) for s in range(1, 5)], summary=False)
    JsonlSink(tmp_path / metrics.LOST).write(record(3, step_seconds=9000.0))
    page, figures = read(tmp_path)
    assert [shape["x0"] for shape in figures["loss"]["layout"]["shapes"]] == [3 * 8192]
    # 9000 s of four cores at $0.04 an hour.
    assert "1 restart" in page.text and "$0.40 of it on lost steps" in page.text and "step 4 of 120" in page.text


def test_many_layers_get_a_map(tmp_path):
    config = load(["model=deepseek_v3"])
    make_run(
        tmp_path,
        [record(s, max_vio=[i / 100 for i in range(58)], max_vio_mean=0.285, expert_load=[[5] * 256] * 58) for s in (1, 2)],
        config=config,
    )
    _, figures = read(tmp_path)
    assert [t["name"] for t in figures["max-vio"]["data"]] == ["worst layer", "mean over layers"]
    assert [t["y"] for t in figures["max-vio"]["data"]] == [[0.57, 0.57], [0.285, 0.285]]
    assert figures["max-vio-map"]["data"][0]["z"] == [[i / 100] * 2 for i in range(58)]
    assert figures["load"]["data"][0]["y"][::57] == ["layer 3", "layer 60"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="needs Chromium")
def test_a_browser_draws_every_chart_without_complaint(tmp_path):
    make_run(tmp_path, [record(s, loss=math.nan if s == 60 else 2.0, eval_loss=3.0 if s == 50 else None) for s in range(1, 121)])
    _, figures = read(tmp_path)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="([^"]+)"', done.stdout)
    assert set(drawn) == set(figures)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
