"""`shoestring checkpoint`: what is listed is what is there, damage has its exit code, and the newest whole checkpoint is never removed."""

import os
import shutil

import pytest
import torch
from shoestring.launch import cli, exit_codes
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train.checkpoint.checkpointer import Checkpointer

EXTRA = {"layout": "pp 1 x edp 1 x ep 1", "precision": "bf16", "progress": {"step": 0}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(run / "checkpoints", keep_last=9, async_save=False)
    for step in (100, 200, 300):
        checkpointer.save(step, {"w": Chunk(500, 0, torch.full((500,), float(step)))}, EXTRA)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def flip(run, step, file="__0_0.distcp"):
    path = run / "checkpoints" / f"step_{step:08d}" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shoestring(capsys, *words):
    """(exit code, lines of stdout, stderr)"""
    code = cli.main(["checkpoint", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def left(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_list(run, capsys):
    os.truncate(run / "checkpoints" / "step_00000200" / "__0_0.distcp", 100)
    (run / "checkpoints" / "step_00000050.damaged").mkdir()
    (run / "checkpoints" / ".step_00000400.partial").mkdir()
    code, lines, _ = shoestring(capsys, "list", run)
    assert code == exit_codes.OK and len(lines) == 6
    assert [line.split()[0] for line in lines] == ["step", "100", "200", "300", "step_00000050.damaged", ".step_00000400.partial"]
    assert lines[1].endswith("pp 1 x edp 1 x ep 1  bf16       complete") and lines[3].endswith("complete, latest")
    assert "kB" in lines[1] and ":" in lines[1]
    assert "damaged: " in lines[2] and "__0_0.distcp is damaged (it has 100 bytes" in lines[2]
    assert lines[4].endswith("set aside: damaged") and lines[5].endswith("cut short, or being written")


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000300"])
def test_verify_the_newest(run, capsys, where):
    flip(run, 100)
    code, lines, _ = shoestring(capsys, "verify", run / where)
    assert code == exit_codes.OK and len(lines) == 1 and lines[0].startswith("step_00000300  whole: 2 files, ")


def test_verify_all(run, capsys):
    flip(run, 300)
    flip(run, 100, "manifest.json")
    before = left(run)
    code, lines, _ = shoestring(capsys, "verify", run, "--all")
    assert code == exit_codes.STORAGE and left(run) == before
    assert [line.split()[1] for line in lines] == ["DAMAGED:", "whole:", "DAMAGED:"]
    assert "manifest.json is damaged" in lines[0] and "__0_0.distcp is damaged" in lines[2]
    code, lines, _ = shoestring(capsys, "verify", run, "--all", "--quarantine")
    assert code == exit_codes.STORAGE and "it is now step_00000100.damaged" in lines[1]
    assert left(run) == ["latest", "step_00000100.damaged", "step_00000200", "step_00000300.damaged"]
    assert shoestring(capsys, "verify", run, "--all")[0] == exit_codes.OK


def test_prune(run, capsys):
    assert shoestring(capsys, "prune", run, "keep=2", "--dry-run")[1][0].startswith("would remove step_00000100, ")
    assert left(run) == ["latest", "step_00000100", "step_00000200", "step_00000300"]
    code, lines, _ = shoestring(capsys, "prune", run, "keep=2")
    assert code == exit_codes.OK and lines[0].startswith("removed step_00000100") and "2 kept" in lines[1]
    assert left(run) == ["latest", "step_00000200", "step_00000300"]


def test_prune_keeps_the_newest_that_is_whole(run, capsys):
    flip(run, 300), flip(run, 200)
    assert shoestring(capsys, "prune", run, "keep=1")[1][-1] == "2 kept; the newest that is whole: step_00000100"
    assert left(run) == ["latest", "step_00000100", "step_00000300"]
    flip(run, 100)
    code, _, error = shoestring(capsys, "prune", run, "keep=1")
    assert code == exit_codes.STORAGE and "no checkpoint there is whole, so none is removed" in error
    assert left(run) == ["latest", "step_00000100", "step_00000300"]


@pytest.mark.parametrize("words", [["list", "nowhere"], ["verify", "step_00000001"], ["prune", ".", "keep=0"], ["prune", ".", "all"]])
def test_what_cannot_be_is_told(capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    code, _, error = shoestring(capsys, *words)
    assert code == exit_codes.CONFIG and ("must be a run directory" in error or "nearest valid value: keep=2" in error)


@pytest.mark.parametrize("file", ["manifest.json", ".metadata"])
def test_export_says_which_is_whole(run, capsys, tmp_path, file):
    flip(run, 300, file)
    for source in (run, run / "checkpoints" / "step_00000300"):
        assert cli.main(["export", str(source), str(tmp_path / "out")]) == exit_codes.STORAGE
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{file} is damaged" in error
        assert error.endswith(f"nearest valid one: {run}/checkpoints/step_00000200\n")
