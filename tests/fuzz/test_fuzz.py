"""A minute of fuzzing, every case that was ever found, and whether the fuzzer finds what it should."""

import os
import pickle
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from shoestring.conf.errors import ConfigError
from shoestring.tests.fuzz.run import fuzz, judge_all, kept
from shoestring.tests.fuzz.targets import BY_NAME, TARGETS, Target

SECONDS = 60


def test_there_are_enough_of_them():
    assert len(TARGETS) == len(BY_NAME) >= 20


def test_what_was_found_once_is_not_found_again():
    """`cases/` has an input for each finding of `docs/security-findings.md` that a fuzzer made."""
    cases = [(target, data) for target in TARGETS for data in kept(target)]
    assert cases
    assert not judge_all(cases)


def test_a_minute_of_fuzzing(tmp_path):
    """Of CPU, not of wall: half a minute on two cores. The same inputs at each run, as far as it comes."""
    command = [sys.executable, "-m", "shoestring.tests.fuzz", "--seconds", str(SECONDS / 2), "--workers", "2", "--seed", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-4000:]
    inputs = {name.strip(): int(count.replace(",", "")) for name, count in re.findall(r"^(.{34}) +([\d,]+) ", ran.stdout, re.MULTILINE)}
    assert inputs.keys() >= BY_NAME.keys() and all(inputs[name] >= len(BY_NAME[name].seeds()) for name in BY_NAME)


# ---------------------------------------------------------------- the fuzzer itself


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def _sound(folder: Path) -> None:
    if (folder / "a.json").read_bytes()[:1] != b"{":
        raise ConfigError("a.json", "x", "is no object")


def _raises(folder: Path) -> None:
    {}["a"]


def _nameless(folder: Path) -> None:
    raise ConfigError("file", "x", "is wrong")


def _control(folder: Path) -> None:
    raise ConfigError("a.json", "x", "y" * 9000) if False else type("DataError", (ConfigError,), {"__str__": lambda _: ""})("a", "b", "c")


def _half(folder: Path) -> None:
    (folder / "a.json.tmp").write_text("half")


def _holds_much(folder: Path) -> None:
    bytearray(3 << 30)


def _grows(folder: Path) -> None:
    """Only for inputs that a guide comes to step by step."""
    data = (folder / "a.json").read_bytes()
    if data.startswith(b"{") and len(data) > 40:
        raise KeyError("deep")


BAD = {
    "runs a program": (lambda folder: os.system("true"), "Escaped: os.system"),
    "starts one": (lambda folder: subprocess.run(["true"]), "Escaped: subprocess.Popen"),
    "unpickles": (lambda folder: pickle.loads(pickle.dumps(Payload())), "Escaped: unpickles posix.system"),
    "connects": (lambda folder: urllib.request.urlopen("http://127.0.0.1:9", timeout=1), "Escaped: "),
    "writes elsewhere": (lambda folder: (folder.parent / "fuzz-elsewhere").write_text("x"), "Escaped: writes "),
    "removes elsewhere": (lambda folder: (folder.parent / "fuzz-elsewhere").unlink(missing_ok=True), "Escaped: os.remove"),
    "makes a link elsewhere": (lambda folder: (folder / ".." / "fuzz-link").symlink_to("/etc/passwd"), "Escaped: os.symlink"),
    "raises what no command says": (_raises, "KeyError at elsewhere"),
    "names no file": (_nameless, "no name: ConfigError"),
    "says nothing": (_control, "DataError"),
    "leaves half a file": (_half, "left half written"),
    "holds much memory": (_holds_much, "MemoryError"),
    "ends the process": (lambda folder: os._exit(3), "ended: exit code 3"),
}


def target_of(read) -> Target:
    return Target(name="planted", file="a.json", seeds=lambda: [b'{"a": 1}'], read=read)


@pytest.mark.parametrize("name", BAD)
def test_what_is_planted_is_found(name):
    read, kind = BAD[name]
    found = fuzz(target_of(read), 0.0, 0)
    assert found.findings and all(kind in finding.kind for finding in found.findings), found
    assert not list(Path("/tmp").glob("fuzz-elsewhere"))


def test_what_does_not_end_is_found(monkeypatch):
    monkeypatch.setattr("shoestring.tests.fuzz.watch.SECONDS", 0.3)
    (finding,) = fuzz(target_of(lambda folder: time.sleep(60)), 0.0, 0).findings
    assert finding.kind.startswith("Slow")


def test_what_is_sound_is_not_blamed_and_bad_input_is_counted():
    found = fuzz(target_of(_sound), 0.5, 0)
    assert not found.findings and found.runs > 20 and 0 < found.refused < found.runs


def test_a_finding_is_made_smaller():
    (finding,) = fuzz(target_of(_grows), 2.0, 0).findings
    assert finding.kind.startswith("KeyError") and 40 < len(finding.data) < 200
