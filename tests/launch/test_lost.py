"""A rank that stops coming: what the others say, and what they leave behind."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import exit_codes, launcher, worker
from shoestring.train.trainer import Outcome


def _three_of_four(config, device, *, stop, log, beat, job, webhook, hide):
    """Rank 2 is busy with something else, until it is told to stop."""
    dist.barrier()
    while dist.get_rank() == 2 and not stop():
        time.sleep(0.05)
    dist.all_reduce(torch.ones(1))
    return Outcome(summary=None, step=1, stopped=False)


def test_a_rank_that_does_not_come_ends_the_run_with_the_name_of_what_was_waited_for(tmp_path, capfd):
    config = load(["experiment=tiny", f"run_dir={tmp_path}", "launch.timeout_s=3"])
    assert launcher.start(config, "cpu", worker.run_launched, [], _three_of_four, world_size=4) == exit_codes.LOST
    out, err = capfd.readouterr()
    assert "collectives are given up after 3 s (launch.timeout_s)" in out
    (flight,) = (tmp_path / "flight").iterdir()
    first = err.splitlines()[0]
    assert first.startswith("  rank ") and "Timed out" in first
    assert "\nerror: rank 2 does not answer since" in err
    assert 'gloo:all_reduce over "default_pg" (ranks 0 1 2 3)' in first and str(flight) in first
    said = {path: json.loads(path.read_text()) for path in Path(flight).glob("rank_*.json")}
    for rank in (r for r in (0, 1, 3) if flight / f"rank_{r}.json" in said):
        (group,) = said[flight / f"rank_{rank}.json"]["groups"]
        assert (group["ranks"], group["begun"], group["last"]) == ([0, 1, 2, 3], 2, "gloo:all_reduce")


def _busy(config, device, *, beat, **_):
    """Both are in step 3. Rank 1 never leaves `data`, and nobody's collective gives up for a minute."""
    beat("data", 3)
    if dist.get_rank() == 1:
        time.sleep(60)
    beat("reduce")
    dist.all_reduce(torch.ones(1))
    return Outcome(summary=None, step=3, stopped=False)


def test_a_rank_without_a_sign_of_life_is_named_and_shows_its_stack(tmp_path, capfd):
    config = load(["experiment=tiny", f"run_dir={tmp_path}", "launch.timeout_s=60", "launch.hang_s=1.5"])
    began = time.monotonic()
    assert launcher.start(config, "cpu", worker.run_launched, [], _busy, world_size=2) == exit_codes.LOST
    assert time.monotonic() - began < 30, "it did not wait for collectives to give up"
    assert "error: rank 1 does not answer since" in (err := capfd.readouterr().err) and " s in step 3, data\n" in err
    (flight,) = (tmp_path / "flight").iterdir()
    assert "in _busy" in (flight / "rank_1.txt").read_text() and "in _busy" in (flight / "rank_0.txt").read_text()
