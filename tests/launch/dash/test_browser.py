"""The live page in a real Chromium: it follows a run, shows what is in its files and nothing else, and nothing in them breaks or runs."""

import csv
import io
import json
import math
import os
import shutil
import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from shoestring.conf.compose import load, to_yaml
from shoestring.launch import lease
from shoestring.tests.launch.dash.browser import Browser, served, wait
from shoestring.train import metrics, sessions
from shoestring.train.metrics import StepRecord
from shoestring.train.sessions import Began
from shoestring.train.sinks.jsonl import JsonlSink

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif((CHROMIUM is None or DRIVER is None) and "CI" not in os.environ, reason="needs Chromium and its driver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(CHROMIUM, DRIVER, tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture
def page(browser):
    """The browser at laptop size, in light colours; no test may leave an error behind."""
    browser.driver.get("about:blank")
    browser.size(1280)
    browser.prefers("light")
    browser.errors()
    yield browser
    assert browser.errors() == []


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=4096 * step, samples=16 * step, loss=6.0 / step + 1 / 3, lr=1e-3 / step, grad_norm=1.0 + 1 / step, clip_coef=1.0,
        step_seconds=0.8, tokens_per_second=5120.0, tokens_per_second_per_gpu=1280.0 + step / 7, mfu=0.25, seconds=10 + 1.5 * step,
        dollars=0.002 * (10 + 1.5 * step), dollars_per_billion_tokens=5.0 + 1 / step, batch_tokens=4096, max_vio=[0.5, 0.25 + 1 / step],
        max_vio_mean=0.5, expert_load=[[30, 10, 20, 0], [15, 15, 15, 15]], dead_experts=1, memory_gb=0.5, time_unix=1.79e9 + step,
        session=0,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def make(path, records=(), **changes):
    path.mkdir(parents=True)
    config = load(["experiment=tiny", "train.steps=120", "train.global_batch_tokens=4096", *(f"{k}={v}" for k, v in changes.items())])
    (path / "config.yaml").write_text(to_yaml(config))
    sessions.note(path, Began(session=0, job="j", time_unix=1.79e9, seconds=0.0, devices=4, dollars=0.002))
    (path / "metrics.jsonl").write_text("".join(map(metrics.to_line, records)))
    return path


def test_a_live_run_is_followed(page, tmp_path):
    run = make(tmp_path / "live", [record(s) for s in range(1, 6)])
    with served(tmp_path) as url, lease.held(run):
        page.open(url)
        page.until("document.querySelector('.status')?.innerText === 'running: step 5 of 120'")
        sink = JsonlSink(run / "metrics.jsonl")
        for step in (6, 7, 8):
            sink.write(record(step, eval_loss=5.5 if step == 7 else None))
            assert page.until(f"document.querySelector('.status').innerText === 'running: step {step} of 120'", 15) < 5, "seen within 5 s"
        sink.close()
        # A restart takes two steps back, and goes on.
        metrics.rewind(run / "metrics.jsonl", 6)
        sink = JsonlSink(run / "metrics.jsonl")
        for step in (7, 8, 9):
            sink.write(record(step, session=1))
        sink.close()
        page.until("document.querySelector('.status').innerText === 'running: step 9 of 120'", 15)
        # What is shown is what is in the file, to the last digit.
        written = metrics.read_records(run / "metrics.jsonl")
        for key, field, times in (
            ("loss", "loss", 1),
            ("speed", "tokens_per_second_per_gpu", 1),
            ("grad", "grad_norm", 1),
            ("mfu", "mfu", 100),
        ):
            found = page.drawn(key)
            assert found["x"] == [r.tokens for r in written] and found["y"] == [times * getattr(r, field) for r in written], key
        last = written[-1]
        tiles = page.tiles()
        assert tiles["Loss"] == f"{last.loss:.3f}" and tiles["Spent"] == f"${last.dollars:.3f}" and tiles["Tokens"] == "36.9 k"
        assert page.ask("document.getElementById('loss').layout.shapes.map(s => s.x0)") == [7 * 4096]
        assert "started again (session 2), from step 7" in page.text()
    assert page.errors() == []


EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def test_hostile_names_and_values_neither_break_nor_execute(page, tmp_path):
    run = make(tmp_path / EVIL.replace("/", "∕"), [record(1, eval_loss=5.0, eval_loss_by_source={EVIL: 5.0}, checkpoint=f"failed: {EVIL}")])
    config = (run / "config.yaml").read_text().replace("name: tiny", f"name: '{EVIL}'", 1)
    (run / "config.yaml").write_text(config)
    (run / "alerts.jsonl").write_text(json.dumps({"text": EVIL, "step": 1, "tokens": 4096, "time_unix": 1.79e9}) + "\n")
    (run / "ending.json").write_text(json.dumps({"code": 5, "what": EVIL, "time_unix": 1.79e9}))
    plain = metrics.to_plain(record(2))
    with open(run / "metrics.jsonl", "a") as file:
        for value in (None, -5, "9", EVIL, [1], {"a": EVIL}, 1e308, True):
            for name in plain:
                file.write(json.dumps(plain | {name: value}) + "\n")
        file.write('{"step": NaN, "tokens": Infinity, "loss": -Infinity}\n' + "x" * 100_000 + "\n\x00\x01\n")
        file.write(metrics.to_line(record(3, loss=math.nan)) + metrics.to_line(record(9, loss=-4.0)) + metrics.to_line(record(10))[:80])
    make(tmp_path / "fine", [record(s) for s in range(1, 4)])
    os.mkfifo(make(tmp_path / "pipe") / "summary.json")
    with served(tmp_path) as url:
        page.open(url + "?run=" + run.name.replace("<", "%3C").replace("&", "%26").replace("=", "%3D"))
        page.until("document.querySelector('.tile .value') !== null")
        for key in ("loss", "load", "waterfall"):
            page.drawn(key)
        page.driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        time.sleep(0.5)
        assert page.ask("window.hacked") is None and page.ask("document.querySelectorAll('main img, main script').length") == 0
        assert EVIL in page.ask("document.querySelector('h1').innerText") and page.tiles()["Loss"] == "-4.000"
        assert -4.0 in page.drawn("loss")["y"] and "not a number" in page.text()
        page.open(url + "?run=fine")
        page.until("document.querySelector('h1')?.innerText.startsWith('tiny')")
        assert page.drawn("loss")["y"] == [6.0 / s + 1 / 3 for s in range(1, 4)]


def test_nothing_half_a_run_and_one_that_comes_later(page, tmp_path):
    with served(tmp_path) as url:
        page.open(url)
        page.until("document.body.innerText.includes('No runs in')")
        make(tmp_path / "half" / "written").joinpath("metrics.jsonl").write_text('{"step":1,"tok')
        page.until("document.body.innerText.includes('metrics.jsonl holds no complete record yet')")
        assert page.tiles()["Loss"] == "–"
        (tmp_path / "half" / "written" / "metrics.jsonl").write_text(metrics.to_line(record(1)))
        page.until("document.querySelector('.tile .value').innerText === '6.333'", 10)
        make(tmp_path / "later", [record(1)])
        page.until("!document.getElementById('runs').innerText.includes('later')", 1)
        page.open(url + "?run=later")
        wait(lambda: page.open(url + "?run=later") or page.ask("document.querySelector('#runs').innerText.includes('later')"))
        page.until("document.querySelector('.tile .value') !== null")
        shutil.rmtree(tmp_path / "later")
        page.until("document.body.innerText.includes('There is no metrics.jsonl')", 15)


def test_ten_runs_side_by_side_fit_a_phone(page, tmp_path):
    for i in range(10):
        make(tmp_path / f"run{i}", [record(s, loss=i + 6.0 / s) for s in range(1, 40)])
    with served(tmp_path) as url:
        page.size(390, 844)
        page.open(url + "?" + "&".join(f"run=run{i}" for i in range(10)))
        page.until("document.querySelectorAll('.side tbody tr').length === 10")
        assert [page.drawn("loss", i)["y"][-1] for i in range(10)] == [i + 6.0 / 39 for i in range(10)]
        assert page.ask("document.scrollingElement.scrollWidth <= window.innerWidth"), "nothing is wider than the phone"
        page.open(url + "?run=run3")
        page.until("document.querySelectorAll('.tile').length === 8")
        assert page.ask("document.scrollingElement.scrollWidth <= window.innerWidth")


def test_axes_themes_keys_and_files(page, tmp_path):
    run = make(tmp_path / "run", [record(s) for s in range(1, 30)])
    with served(tmp_path) as url:
        page.open(url)
        before = page.drawn("loss")
        page.ask("document.querySelectorAll('#over input')[2].click()")
        page.until("document.getElementById('loss').layout.xaxis.title.text === 'dollars spent'")
        assert page.drawn("loss")["x"] == [0.002 * (10 + 1.5 * s) for s in range(1, 30)] and before["y"] == page.drawn("loss")["y"]
        light = page.ask("document.getElementById('loss').layout.paper_bgcolor")
        page.prefers("dark")
        page.until(f"document.getElementById('loss').layout.paper_bgcolor !== {light!r}")
        page.ask("document.querySelectorAll('#theme input')[1].click()")
        page.until(f"document.getElementById('loss').layout.paper_bgcolor === {light!r}")
        # By keyboard: every control is reached, and it can be seen which has the focus.
        page.ask("window.scrollTo(0, 0)")
        page.ask("document.activeElement.blur()")
        reached = set()
        for _ in range(40):
            ActionChains(page.driver).send_keys(Keys.TAB).perform()
            focus = page.ask(
                "(e => [e.id, e.dataset.save || '', e.closest('[id]')?.id || '', getComputedStyle(e).outlineStyle + "
                "getComputedStyle(e).boxShadow + getComputedStyle(e.parentElement).outlineStyle])(document.activeElement)"
            )
            assert focus[3] != "nonenonenone", focus
            reached |= set(focus[:3])
        assert {"csv", "png", "runs", "load-step", "trace-step"} <= reached and {"over", "theme"} & reached
        # Files: the points that are drawn, and a picture of them.
        page.ask("document.querySelector('[data-file=loss][data-save=csv]').focus()")
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        saved, drawn = page.folder / "loss.csv", page.folder / "loss.png"
        rows = list(csv.DictReader(io.StringIO(wait(lambda: saved.exists() and saved.read_text()))))
        assert [float(row["y"]) for row in rows if row["series"] == "training"] == before["y"]
        page.driver.find_element("css selector", "[data-file=loss][data-save=png]").click()
        picture = wait(lambda: drawn.exists() and drawn.read_bytes())
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000
        page.driver.set_script_timeout(20)
        text = page.driver.execute_async_script("fetch('/records.csv?run=run').then(r => r.text()).then(arguments[0])")
        table = list(csv.DictReader(io.StringIO(text)))
        assert [float(row["loss"]) for row in table] == [r.loss for r in metrics.read_records(run / "metrics.jsonl")]
        # The load of a step of one's choice.
        box = page.driver.find_element("id", "load-step")
        box.send_keys("3" + Keys.ENTER)
        page.until("document.getElementById('load').parentElement.innerText.includes('at step 3')")


def test_inputs_have_labels_and_text_can_be_read(page, tmp_path):
    make(tmp_path / "run", [record(s) for s in range(1, 5)])
    with served(tmp_path) as url:
        page.open(url)
        page.drawn("loss")
        nameless = page.ask(
            "Array.from(document.querySelectorAll('main input, main button, main select')).filter(e => e.type !== 'hidden' && "
            "!e.ariaHidden && !e.labels?.length && !e.ariaLabel && !e.getAttribute('aria-labelledby') && "
            "!e.innerText.trim()).map(e => e.outerHTML)"
        )
        assert nameless == []
        for scheme in ("light", "dark"):
            page.prefers(scheme)
            time.sleep(0.2)
            for css in (
                "h1",
                ".facts",
                ".tile .label",
                ".tile .value",
                ".tile .note",
                ".sub",
                ".status",
                ".section",
                ".save button",
                ".brand",
            ):
                colors = page.ask(
                    "(e => { let b = e; while (b && getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement; "
                    "return [getComputedStyle(e).color, getComputedStyle(b || document.body).backgroundColor] })"
                    f"(document.querySelector({css!r}))"
                )
                assert contrast(*colors) >= 4.5, (scheme, css, colors)


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's, of two colours as CSS computes them."""
    lights = []
    for color in (a, b):
        parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_long_run_opens_as_samples_and_keeps_its_peaks(page, tmp_path):
    run = make(tmp_path / "long")
    fields = metrics.to_plain(record(1, expert_load=None, max_vio=None))
    template = json.dumps({k: v for k, v in fields.items() if v is not None and k not in ("step", "tokens", "loss")})[1:]
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 200_001):
            file.write(f'{{"step":{step},"tokens":{4096 * step},"loss":{77.5 if step == 123_456 else 2.0},{template}\n')
    with served(tmp_path) as url:
        page.open(url)
        page.until("document.querySelector('.tile .value') !== null && (document.getElementById('loss')?.data || []).length > 0")
        assert page.drawn("loss")["x"][-1] == 4096 * 200_000, "all of it, at once"
        page.ask("document.querySelectorAll('#over input')[3].click()")
        page.until("document.getElementById('loss').layout.xaxis.title.text === 'step'", 5)
        page.until("!document.body.innerText.includes('The file is long')", 60)
        page.until("Math.max(...document.getElementById('loss').data[0].y) === 77.5", 15)
        found = page.drawn("loss")
        assert found["x"][found["y"].index(77.5)] == 123_456 and len(found["x"]) < 5000


def test_two_pages_of_one_server_do_not_disturb_each_other(page, tmp_path):
    for name in "ab":
        make(tmp_path / name, [record(s, loss=ord(name) + 0.0) for s in range(1, 4)])
    with served(tmp_path) as url:
        page.open(url + "?run=a")
        first = page.drawn("loss")
        page.driver.switch_to.new_window("tab")
        page.open(url + "?run=b")
        assert page.drawn("loss")["y"] == [98.0] * 3 and first["y"] == [97.0] * 3
        page.driver.close()
        page.driver.switch_to.window(page.driver.window_handles[0])
        assert page.drawn("loss")["y"] == [97.0] * 3
