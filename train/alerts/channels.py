"""Where alerts go. A channel may fail: that is said once, the others go on, and the next alert is tried there again."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from .alert import Alert, keep

TRIES_S = (0.0, 1.0, 4.0)  # waits before each try to reach a web address
ANSWER_S = 10.0  # that a web address may take
COMMAND_S = 60.0  # that a command may take
_SAID = 200  # characters of what it said that are shown


class Channel:
    """Subclasses implement `_send`, which may raise."""

    _failed = False

    def send(self, alert: Alert) -> None:
        try:
            self._send(alert)
        except Exception as error:
            if not self._failed:
                print(f"alerts do not reach {self.name}: {self._reason(error)}", file=sys.stderr, flush=True)
            self._failed = True

    name = ""

    def _reason(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"

    def _send(self, alert: Alert) -> None:
        raise NotImplementedError


class Journal(Channel):
    """The run's own file."""

    name = "the run directory"

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def _send(self, alert):
        keep(self._run_dir, alert)


class Said(Channel):
    """A function that shows a line: the console."""

    name = "the console"

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def _send(self, alert):
        self._say(f"{'alert' if alert.firing else 'alert over'}: {alert.text}")


class ToWandb(Channel):
    """`tell(title, text)`; only where an episode begins, since W&B sends each by mail."""

    name = "W&B"

    def __init__(self, tell: Callable[[str, str], None]):
        self._tell = tell

    def _send(self, alert):
        if alert.firing:
            self._tell(alert.title, alert.text)


class Webhook(Channel):
    """POST of a JSON object: `text` is a sentence, as chat services take it, the rest are the alert's fields.

    The address is a secret, of which `variable` is the name: no message shows it.
    """

    def __init__(self, variable: str, address: str, *, tries_s: Sequence[float] = TRIES_S):
        self.name, self._address, self._tries_s = f"the webhook of {variable}", address, tries_s
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            what = "holds no http or https address" if address else "is not set"
            print(f"launch.alerts.webhook: {variable} {what}; alerts are not sent there", file=sys.stderr, flush=True)
            self._address = ""

    def _send(self, alert):
        if not self._address:
            return
        body = json.dumps({**asdict(alert), "text": f"{alert.title}. {alert.text}"}).encode()
        for wait in self._tries_s[:-1]:
            time.sleep(wait)
            with contextlib.suppress(OSError):
                return self._post(body)
        time.sleep(self._tries_s[-1])
        self._post(body)

    def _post(self, body: bytes) -> None:
        # Its scheme is http or https: looked at when this was made.
        request = urllib.request.Request(self._address, body, {"Content-Type": "application/json", "User-Agent": "shoestring"})  # noqa: S310
        urllib.request.urlopen(request, timeout=ANSWER_S).close()  # noqa: S310  # nosec B310  # likewise

    def _reason(self, error):
        if isinstance(error, urllib.error.HTTPError):
            return f"it answers {error.code}"
        return type(getattr(error, "reason", error)).__name__  # its words may have the address in them


class Command(Channel):
    """A program, which is given the alert's JSON object on its standard input. No shell is between."""

    def __init__(self, words: Sequence[str], *, limit_s: float = COMMAND_S):
        self.name, self._words, self._limit_s = f"`{shlex.join(words)}`", list(words), limit_s

    def _send(self, alert):
        program = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, said = program.communicate(json.dumps(asdict(alert)) + "\n", timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            raise TimeoutError(f"it did not end within {self._limit_s:g} s") from None
        if program.returncode:
            words = said.strip()  # whole ones: half a secret would be hidden by nobody
            words = words if len(words) <= _SAID else words[-_SAID:].partition(" ")[2]
            raise RuntimeError(f"exit status {program.returncode}: {words}")
