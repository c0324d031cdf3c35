"""bandit finds nothing in the tree. What it skips everywhere is in pyproject.toml; at a line it is named there, with the reason."""

import json
import re
import subprocess
import sys

import pytest

from .lock import ROOT, project

BANDIT = [sys.executable, "-m", "bandit", "--quiet", "--configfile", ROOT / "pyproject.toml", "--format", "json"]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([*BANDIT, "--recursive", "."], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout) | {"code": done.returncode, "said": done.stderr}


def test_it_finds_nothing(found):
    assert [f"{r['filename']}:{r['line_number']} {r['test_id']} {r['issue_text']}" for r in found["results"]] == []
    assert found["code"] == 0 and found["errors"] == [] and "nosec" not in found["said"], "a nosec that is not needed"


def test_it_has_looked_at_every_module_but_the_tests(found):
    looked = {name.removeprefix("./") for name in found["metrics"]}
    packages = [ROOT / path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    assert looked >= {path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")}
    assert not any(name.startswith("tests/") for name in looked)


def test_each_thing_that_it_may_not_say_is_named_with_a_reason():
    """`# nosec` alone would hide everything of its line."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ("conf", "kernels", "launch", "parallel", "train")]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"#\s*nosec", line)]
    assert lines and [line for line in lines if not re.search(r"# nosec B\d{3}  # \w", line)] == []


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("import yaml\nyaml.load(open('a'), Loader=yaml.Loader)", "B506"),
        ("import pickle\npickle.loads(b'')", "B301"),
        ("import datasets\ndatasets.load_dataset('a')", "B615"),
        ("import subprocess\nsubprocess.run('ls ' + input(), shell=True)", "B602"),
        ("eval(input())", "B307"),
        ("import torch\ntorch.load('a')", "B614"),
    ],
)
def test_it_would_find(tmp_path, program, test):
    (tmp_path / "a.py").write_text(program + "\n")
    done = subprocess.run([*BANDIT, "a.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and test in {r["test_id"] for r in json.loads(done.stdout)["results"]}, done.stdout


def test_no_more_is_skipped_than_was_decided():
    assert project()["tool"]["bandit"]["skips"] == ["B101", "B105", "B108", "B311", "B403", "B404", "B603", "B607"]
    assert "bandit -q -c pyproject.toml -r ." in (ROOT / "Makefile").read_text(encoding="utf-8")
