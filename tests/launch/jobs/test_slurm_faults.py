"""Under a real Slurm of three nodes on this machine: a node that dies, then a preemption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shoestring.launch import exit_codes
from shoestring.train.metrics import read_records

from .launched import TWO_NODES, Launched, steps


def curve(run_dir):
    """Step: what must be the same to the bit; of a step that was trained twice, the last."""
    return {r.step: (r.loss, r.grad_norm, r.tokens) for r in read_records(run_dir / "metrics.jsonl")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same run, by our own launcher and without a scheduler."""
    folder = tmp_path_factory.mktemp("reference")
    command = [Path(sys.executable).with_name("shoestring"), "train", *TWO_NODES, "launch=local", "name=a", "train.steps=60"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return curve(folder / "runs/a")


def test_a_node_dies_and_a_preemption_comes(slurm, tmp_path, uninterrupted):
    """The job is requeued on the spare node, then again where it was; the curve is that of a run to which nothing happened."""
    run = tmp_path / "runs/a"
    with Launched(slurm, tmp_path, [*TWO_NODES, "name=a", "train.steps=60"]) as launched:
        job = launched.until(lambda: json.loads(sent.read_text())["id"] if (sent := run / "slurm/sent.json").exists() else None)
        launched.until(lambda: steps(run) >= 8)
        assert slurm.job(job)["NodeList"] == "n[0-1]"
        slurm.ask("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
        slurm.hurry(job)
        begun = steps(run)
        launched.until(lambda: steps(run) > begun + 8)
        assert slurm.job(job)["NodeList"] == "n[0,2]"
        slurm.ask("scancel", "--signal=TERM", job)  # as a scheduler does before it takes the nodes away
        slurm.hurry(job)
        code, text = launched.end()
    slurm.ask("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert code == exit_codes.OK, text
    assert "requeued 2 times" in text and "RUNNING on n[0,2]" in text and f"job {job}: done, at step 60 of 60" in text
    links = [json.loads(line) for line in (run / "slurm/links.jsonl").read_text().splitlines()]
    assert [(link["code"], link["then"]) for link in links] == [(75, "again"), (0, "done")]  # the first link was Slurm's to end
    assert curve(run) == uninterrupted
