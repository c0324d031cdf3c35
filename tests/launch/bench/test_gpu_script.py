"""The one command for a machine with a GPU (`tests/benchmarks/gpu.py`): its parts do not depend on each other."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def shell(script, name, command, limit_s=20.0):
    return script.Part(name=name, command=["/bin/sh", "-c", command], limit_s=limit_s)


def test_one_that_fails_and_one_that_is_late_stop_nothing(script, tmp_path, capsys):
    every = [
        shell(script, "broken", "echo oh >&2; exit 7"),
        shell(script, "late", f"sleep 600 & echo $! > {tmp_path}/child; wait", 0.5),
        shell(script, "good", "echo here"),
    ]
    ended = script.run(every, tmp_path, 60)
    assert [(e.name, e.code) for e in ended] == [("broken", 7), ("late", None), ("good", 0)] and ended[1].seconds < 10
    assert json.loads((tmp_path / "summary.json").read_text())[0]["code"] == 7
    assert ((tmp_path / "broken.txt").read_text(), (tmp_path / "good.txt").read_text()) == ("oh\n", "here\n")
    assert re.search(r"broken +failed with 7.*\nlate +late: ended.*\ngood +done", capsys.readouterr().out)
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_when_the_time_is_over_the_rest_is_late(script, tmp_path):
    ended = script.run([shell(script, "one", "sleep 600"), shell(script, "two", "echo two")], tmp_path, 0.5)
    assert [e.code for e in ended] == [None, None]


def test_parts_are_commands_that_exist(script, tmp_path):
    """Limits leave each part its turn in ten minutes, the first four whatever happens; without a GPU a small model is named."""
    on_gpu, on_cpu = script.parts(tmp_path, gpu=True), script.parts(tmp_path, gpu=False)
    assert [part.name for part in on_gpu] == ["data", "correct", "bench", "step", "overlap", "tune", "profile"]
    assert sum(part.limit_s for part in on_gpu[:4]) <= 600
    for part in (*on_gpu, *on_cpu):
        words = part.command[part.command.index("bench") :] if "bench" in part.command else None
        assert words is None or words[1] in ("kernels", "step"), part.name
    assert "experiment=smoke" in on_cpu[3].command and "experiment=smoke" not in on_gpu[3].command
