"""The tutorial, as it is written: every command of docs/tutorial.md, in order, in an empty directory, with a Slurm to send to."""

import os
import re
import subprocess
import sys
from pathlib import Path

from shoestring.train.metrics import read_records

PAGE = Path(__file__).resolve().parents[3] / "docs/tutorial.md"
SAID = {  # a part of what each must say, so that a command that does nothing is not taken for one that works
    "doctor --quick": "0 failed",
    "experiment=tiny train.steps=20": "trained   tiny: 20 of 20 steps",
    "parallel.ep=3": "must divide model.num_experts = 16; nearest valid value: 2\nrefused, with exit code 2",
    "tokens=14.8e12": "2,048 x H800",
    "rehearse": "1 of 2,048 ranks rehearsed",
    "gpus=4": "plans    plan.json",
    "--dry-run": "#SBATCH --nodes=2\n",
    "launch=slurm plan=plan.json name=first": "COMPLETED",
    "runs": "first",
    "runs compare": "train.steps",
    "report": "runs/first/report.html",
    "checkpoint verify": "whole",
    "export": "step_00000020",
    "sample": "def main(",
}


def commands():
    return [line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) for line in block.splitlines()]


def test_every_command(slurm, tmp_path):
    lines = commands()
    assert len(lines) == len(SAID)
    env = {**slurm.env, "PATH": f"{Path(sys.executable).parent}:{slurm.env['PATH']}", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    for line, part in zip(lines, SAID):
        assert part in line
        found = subprocess.run(["bash", "-c", f"exec 2>&1; {line}"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, timeout=240)
        assert found.returncode == 0 and SAID[part] in found.stdout, f"{line}\n{found.stdout}"
    assert len(read_records(tmp_path / "runs/first/metrics.jsonl")) == 20
    assert {"config.json", "tokenizer.json"} <= set(os.listdir(tmp_path / "first-hf"))
