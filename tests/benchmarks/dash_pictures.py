"""The pictures of docs/dash.md: `python tests/benchmarks/dash_pictures.py [--out docs]` (five minutes; Chromium and its driver).

Two real runs of `tiny`: one with traces, evaluations, checkpoints and a budget, a rank of which is killed on the way; one of another
layout, in BF16. Then the page of the first, wide and as a phone has it, light and dark; and the two side by side.
"""

import argparse
import base64
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shoestring.tests.launch.dash.browser import Browser, served

MOST_BYTES = 400_000
COMMON = ["experiment=tiny", "train.steps=120", "train.eval_interval=20", "checkpoint.interval=20", "launch.trace_interval=20",
          "launch.log_interval=20"]  # fmt: skip
RUNS = {
    "tiny": ["budget_usd=0.01", "model.mtp_depth=1"],
    "tiny-bf16": ["parallel=single", "precision=bf16", "parallel.edp=2", "optim.lr=1e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--runs", type=Path, help="folder of runs that were made before; empty: they are made there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = (arguments.runs or Path(folder) / "runs").resolve()
        for name, words in RUNS.items():
            if not (runs / name).exists():
                train(runs / name, words, kill=name == "tiny")
        binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = Browser(binary, shutil.which("chromedriver"), Path(folder))
        try:
            with served(runs) as url:
                for scheme in ("light", "dark"):
                    picture(browser, f"{url}?run=tiny", arguments.out / f"dash_wide_{scheme}.png", 1280, 2300, scheme)
                    picture(browser, f"{url}?run=tiny", arguments.out / f"dash_phone_{scheme}.png", 390, 2300, scheme)
                picture(browser, f"{url}?run=tiny", arguments.out / "dash_money.png", 1280, 1300, "light", section="Money")
                picture(browser, f"{url}?run=tiny", arguments.out / "dash_speed.png", 1280, 1300, "dark", section="Speed")
                picture(browser, f"{url}?run=tiny&run=tiny-bf16", arguments.out / "dash_side_by_side.png", 1280, 1400, "light")
        finally:
            browser.close()


def train(run_dir: Path, words: list[str], *, kill: bool) -> None:
    command = [sys.executable, "-m", "shoestring.train", *COMMON, f"run_dir={run_dir}", f"name={run_dir.name}", *words]
    program = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while kill and program.poll() is None:
        time.sleep(0.2)
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 50:
            os.kill(ranks(program.pid)[-1], signal.SIGKILL)
            kill = False
    assert program.wait() == 0


def ranks(launcher: int) -> list[int]:
    """Processes below that one, in the order in which they began."""
    found = []
    for children in sorted(Path(f"/proc/{launcher}/task").glob("*/children")):
        for child in map(int, children.read_text().split()):
            found += [child, *ranks(child)]
    return sorted(pid for pid in found if b"multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_bytes())


def picture(browser: Browser, url: str, path: Path, width: int, height: int, scheme: str, section: str = "") -> None:
    """Of the page's top, or from a section's heading on."""
    browser.size(width, 12_000 if section else height)
    browser.prefers(scheme)
    browser.open(url)
    browser.until("document.querySelector('.tile .value, .side tbody tr') !== null")
    browser.until("document.querySelectorAll('.js-plotly-plot').length > 3")
    time.sleep(6.0)  # charts in view are drawn one after the other; the plan is made
    assert browser.errors() == []
    heading = f"Array.from(document.querySelectorAll('h2.section')).find(h => h.innerText === {section!r}).getBoundingClientRect().top"
    clip = {"x": 0, "y": max(0, browser.ask(heading) - 20) if section else 0, "width": width, "height": height, "scale": 1}
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
    data = base64.b64decode(shot["data"])
    assert len(data) < MOST_BYTES, f"{path}: {len(data)} bytes"
    path.write_bytes(data)
    print(f"{path}: {width} x {height}, {len(data) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
