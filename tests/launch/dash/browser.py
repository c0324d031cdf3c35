"""A real Chromium, and a dashboard server beside it, for the tests of the page."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from shoestring.launch.dash import serve
from shoestring.launch.dash.watch import Watch

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,900",
)  # fmt: skip


class Browser:
    """`errors`: what the page has complained of since the last time it was asked."""

    def __init__(self, binary: str, driver: str, folder: Path):
        options = Options()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.folder = folder

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until("document.querySelector('h1') !== null")

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def until(self, script: str, seconds: float = 30.0) -> float:
        """Seconds until the expression is true."""
        began = time.monotonic()
        while not self.ask(script):
            assert time.monotonic() < began + seconds, f"never: {script}\n{self.errors()}\n{self.text()[:500]}"
            time.sleep(0.03)
        return time.monotonic() - began

    def text(self) -> str:
        return self.ask("document.body.innerText")

    def tiles(self) -> dict[str, str]:
        return self.ask(
            "Object.fromEntries(Array.from(document.querySelectorAll('.tile')).map(t => "
            "[t.querySelector('.label').innerText, t.querySelector('.value').innerText]))"
        )

    def drawn(self, key: str, trace: int = 0) -> dict[str, list]:
        """Points of a chart, after it was brought into view."""
        self.until(f"document.getElementById({key!r}) !== null")
        self.ask(f"document.getElementById({key!r}).scrollIntoView()")
        self.until(f"(document.getElementById({key!r}).data || []).length > {trace}")
        return self.ask(f"(t => ({{x: Array.from(t.x || []), y: Array.from(t.y || [])}}))(document.getElementById({key!r}).data[{trace}])")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefers(self, scheme: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def close(self) -> None:
        self.driver.quit()


@contextlib.contextmanager
def served(*roots: Path) -> Iterator[str]:
    """The address of a server of these folders."""
    watch = Watch(roots).start()
    server = serve.make(watch, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        watch.stop()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def wait(found: Callable[[], Any], seconds: float = 20.0) -> Any:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)
    return value
