"""How fast the page of long runs is: `python tests/benchmarks/dash_speed.py [--out docs/dash_speed.md]` (ten minutes, 3 GB of disk).

In a real Chromium, with a server begun anew for each opening: a run of 1,000,000 steps, every field of a step of `tiny` in each record; ten
runs of 100,000 steps side by side; and a live run that grows by a step a second at the end of such a file.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from shoestring.conf.compose import load, to_yaml
from shoestring.launch import lease
from shoestring.tests.launch.dash.browser import Browser, served
from shoestring.train import metrics
from shoestring.train.metrics import StepRecord

LAYERS, EXPERTS, TOKENS = 4, 16, 4096
LOADED = "document.querySelector('.tile .value, .side tbody tr') !== null && (document.getElementById('loss')?.data || []).length > 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(folder / "one" / "long", arguments.steps)
        for i in range(10):
            make(folder / "ten" / f"run{i}", arguments.steps // 10, seed=i)
        binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = Browser(binary, shutil.which("chromedriver"), folder)
        try:
            browser.driver.get("about:blank")
            rows = [
                (f"one run of {arguments.steps:,} steps ({size / 1e9:.2g} GB)", opened(browser, folder / "one", "", arguments.times)),
                (f"ten runs of {arguments.steps // 10:,} steps, side by side",
                 opened(browser, folder / "ten", "?" + "&".join(f"run=run{i}" for i in range(10)), arguments.times)),
            ]  # fmt: skip
            live = followed(browser, folder / "one", arguments.steps)
        finally:
            browser.close()
    text = page(rows, live)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def make(run: Path, steps: int, seed: int = 0) -> int:
    """A run's files; bytes of its records."""
    run.mkdir(parents=True)
    config = load(["experiment=tiny", f"train.steps={2 * steps}", "optim.decay=none", f"name={run.name}"])
    (run / "config.yaml").write_text(to_yaml(config))
    draw = random.Random(seed)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(line(step, steps, seed, draw))
    return (run / "metrics.jsonl").stat().st_size


def record(step: int, steps: int, seed: int, draw: random.Random) -> StepRecord:
    loss = 2 + 4 * math.exp(-8 * step / steps) + 0.05 * seed + 0.1 * draw.random()
    return StepRecord(
        step=step, tokens=TOKENS * step, samples=16 * step, batch_tokens=TOKENS, seq_len=256, loss=77.7 if step == steps // 2 else loss,
        lr=1e-3, grad_norm=1 + draw.random(), clip_coef=1.0, step_seconds=0.4, tokens_per_second=10_000.0,
        tokens_per_second_per_gpu=2500 + 50 * draw.random(), mfu=0.12 + 0.01 * draw.random(), seconds=0.5 * step, dollars=1e-5 * step,
        gpu_hours=0.5 * step / 900, dollars_per_billion_tokens=4.6, eta_seconds=0.5 * (steps - step),
        eval_loss=loss + 0.05 if step % 1000 == 0 else None, balance_loss=1e-4, expert_load=[[256] * EXPERTS] * LAYERS,
        max_vio=[draw.random() for _ in range(LAYERS)], max_vio_mean=0.5, rank_overload=[1.1] * LAYERS, dead_experts=0, bias_norm=0.1,
        bias_update_speed=1e-3, router_entropy=2.5, data_seconds=1e-3, memory_gb=0.7, time_unix=1.79e9 + 0.5 * step,
    )  # fmt: skip


_templates: dict[int, str] = {}
_CHANGES = (
    "step", "tokens", "samples", "loss", "grad_norm", "tokens_per_second_per_gpu", "seconds", "dollars", "gpu_hours", "time_unix", "mfu",
)  # fmt: skip


def line(step: int, steps: int, seed: int, draw: random.Random) -> str:
    """As `metrics.to_line(record(...))`, ten times as fast: what changes is put into a line that was made so."""
    if step % 1000 == 0 or step == steps // 2 or seed not in _templates:
        made = metrics.to_plain(record(step, steps, seed, draw))
        if step % 1000:
            marked = json.dumps(made | {name: f"@{name}@" for name in _CHANGES}).replace("%", "%%")
            _templates[seed] = marked.replace('"@', "%(").replace('@"', ")s")
        return json.dumps(made) + "\n"
    loss = 2 + 4 * math.exp(-8 * step / steps) + 0.05 * seed + 0.1 * draw.random()
    changes = dict(
        step=step, tokens=TOKENS * step, samples=16 * step, loss=loss, grad_norm=1 + draw.random(), seconds=0.5 * step, dollars=1e-5 * step,
        tokens_per_second_per_gpu=2500 + 50 * draw.random(), gpu_hours=0.5 * step / 900, time_unix=1.79e9 + 0.5 * step, mfu=0.12,
    )  # fmt: skip
    return _templates[seed] % changes + "\n"


def opened(browser: Browser, folder: Path, query: str, times: int) -> dict[str, list[float]]:
    """Seconds until tiles and the loss are drawn; until another axis is; until the file is read to its end, in the background."""
    found = {"open": [], "axis": [], "read": [], "peak": []}
    for _ in range(times):
        with served(folder) as url:
            began = time.monotonic()
            browser.driver.get(url + query)
            browser.until(LOADED, 60)
            found["open"].append(time.monotonic() - began)
            for label in ("Dollars", "Tokens"):
                began = time.monotonic()
                clicked = f"Array.from(document.querySelectorAll('#over label')).find(l => l.innerText.trim() === '{label}').click()"
                browser.driver.execute_script(clicked)
                wanted = "dollars spent" if label == "Dollars" else "tokens"
                browser.until(f"document.getElementById('loss')?.layout?.xaxis?.title?.text === '{wanted}'", 60)
                found["axis"].append(time.monotonic() - began)
    with served(folder) as url:  # once: to its end
        began = time.monotonic()
        browser.driver.get(url + query)
        browser.until(LOADED, 60)
        browser.until("!document.body.innerText.includes('The file is long')", 600)
        found["read"].append(time.monotonic() - began)
        browser.until("Math.max(...document.getElementById('loss').data.map(t => Math.max(...t.y))) === 77.7", 60)
    assert browser.errors() == []
    return found


def followed(browser: Browser, folder: Path, steps: int) -> list[float]:
    """Seconds from a step's line to the page that has it."""
    run, took, draw = folder / "long", [], random.Random(1)
    with served(folder) as url, lease.held(run):
        browser.driver.get(url)
        browser.until(LOADED, 60)
        browser.until("!document.body.innerText.includes('The file is long')", 600)
        for step in range(steps, steps + 5):
            with open(run / "metrics.jsonl", "a") as file:
                file.write(metrics.to_line(record(step + 1, 2 * steps, 0, draw)))
            took.append(browser.until(f"document.querySelector('.status').innerText.includes('{step + 1:,}')", 30))
            time.sleep(1.0)
    return took


def page(rows: list[tuple[str, dict[str, list[float]]]], live: list[float]) -> str:
    spread = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    table = "\n".join(f"| {name} | {spread(f['open'])} | {spread(f['axis'])} | {f['read'][0]:.0f} |" for name, f in rows)
    return f"""# How fast the dashboard is

`python tests/benchmarks/dash_speed.py --out docs/dash_speed.md`, {datetime.date.today()}, {machine}, no GPU;
server, headless Chromium and its driver on the same cores. Seconds, median (least to greatest) of {len(rows[0][1]["open"])} openings,
each by a server begun anew. Aim: below 3 s.

| | until tiles and loss are drawn | until drawn over another axis | until all is read, in the background |
| --- | --- | --- | --- |
{table}

A run that goes on at the end of the long file: {spread(live)} s from a step's line to the page that shows it. When all is read, the loss's
one spike in the middle is in the curve: curves keep the least and the greatest value of each stretch.
"""


if __name__ == "__main__":
    main()
