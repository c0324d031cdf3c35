"""From one link of a chain to the next, and the command sent twice: with a Slurm that only writes down what it is asked."""

import json
import os

import pytest
from shoestring.launch import cli, exit_codes
from shoestring.launch.doctor import command as doctor
from shoestring.launch.jobs import after

WORDS = [
    "launch=slurm", "data=synthetic", "train.global_batch_tokens=4096", "cluster.gpus_per_node=2", "name=a", "optim.warmup_steps=0",
    "phases.one.train.steps=4", "phases.two.train.steps=4", "phases.two.parallel.ep=4",
]  # fmt: skip
STATE = "JobId=7 JobState={state} Reason=None Restarts=1 Requeue={requeue} ExitCode={code}:0 NodeList=n0"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Its commands, which note their words in `asked`; job 7 is as `say` has told last."""
    bin_dir, asked = tmp_path / "bin", tmp_path / "asked"
    bin_dir.mkdir()

    def say(state="RUNNING", requeue=1, code=0, refuse=""):
        note, shown = f'echo "$(basename $0) $*" >> {asked}', STATE.format(state=state, requeue=requeue, code=code)
        scripts = {
            "sbatch": f'{note}; echo "SBATCH_OPEN_MODE=$SBATCH_OPEN_MODE" >> {asked}; echo 8',
            "scontrol": f'{note}; case $1 in show) echo "{shown}";; {refuse or "never"}) echo "not allowed" >&2; exit 1;; esac',
        }
        for name, text in scripts.items():
            (bin_dir / name).write_text(f"#!/bin/sh\n{text}\n")
            (bin_dir / name).chmod(0o755)

    say()
    say.asked = lambda: asked.read_text().splitlines() if asked.exists() else []
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0")
    monkeypatch.chdir(tmp_path)
    return say


def steps(monkeypatch, step):
    monkeypatch.setattr(after, "steps_done", lambda config: step)
    monkeypatch.setattr("shoestring.launch.jobs.job.steps_done", lambda config: step)


def ended(code, tmp_path):
    return after.main([str(code), str(tmp_path / "runs/a/slurm"), *WORDS])


def test_the_next_phase_is_a_job_of_another_size(slurm, tmp_path, monkeypatch, capsys):
    steps(monkeypatch, 4)
    assert ended(exit_codes.OTHER_SIZE, tmp_path) == exit_codes.OK
    assert "the next phase has 4 ranks; job 8 goes on with them" in capsys.readouterr().out
    text = (tmp_path / "runs/a/slurm/job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in text and "--nproc-per-node=2" in text
    assert any(line.startswith("sbatch --parsable") for line in slurm.asked()) and "SBATCH_OPEN_MODE=append" in slurm.asked()


def test_requeued_unless_told_not_to_be(slurm, tmp_path, monkeypatch, capsys):
    steps(monkeypatch, 2)
    assert ended(exit_codes.PREEMPTED, tmp_path) == exit_codes.PREEMPTED and slurm.asked()[-1] == "scontrol requeue 7"
    slurm(requeue=0)
    assert ended(exit_codes.PREEMPTED, tmp_path) == exit_codes.PREEMPTED and slurm.asked()[-1].startswith("scontrol show")
    assert "Requeue=0" in capsys.readouterr().out
    slurm(refuse="requeue")
    assert ended(exit_codes.PREEMPTED, tmp_path) == 1 and "scontrol requeue 7: not allowed" in capsys.readouterr().err
    links = [json.loads(line) for line in (tmp_path / "runs/a/slurm/links.jsonl").read_text().splitlines()]
    assert [link["step"] for link in links] == [2, 2, 2]


def test_an_end_that_would_come_again(slurm, tmp_path, monkeypatch, capsys):
    steps(monkeypatch, 2)
    assert ended(exit_codes.DIVERGED, tmp_path) == exit_codes.DIVERGED
    assert "not sent again" in capsys.readouterr().out and slurm.asked() == []


@pytest.mark.parametrize(("state", "sent"), [("RUNNING", False), ("PENDING", False), ("COMPLETED", True)])
def test_the_command_twice_is_one_job(slurm, tmp_path, capsys, state, sent):
    assert cli.main(["launch", *WORDS, "--detach"]) == exit_codes.OK
    assert "job 8: sent, 1 rank on 1 node" in capsys.readouterr().out
    slurm(state=state)
    assert cli.main(["launch", *WORDS, "--detach"]) == exit_codes.OK
    assert ("has this already" in capsys.readouterr().out) is not sent
    assert sum(line.startswith("sbatch") for line in slurm.asked()) == 1 + sent


def test_what_the_doctor_finds_stops_it(slurm, tmp_path, monkeypatch, capsys):
    bad = doctor.Line(kind="storage", check="room for run_dir", state=doctor.FAIL, value="1 GB free", advice="make room")
    node = doctor.Line(kind="machine", check="GPUs", state=doctor.FAIL, value="none on this login node", advice="")
    monkeypatch.setattr(doctor, "quick", lambda config: [node])
    assert cli.main(["launch", *WORDS, "--detach"]) == exit_codes.OK  # nodes are not this machine
    slurm(state="COMPLETED")
    monkeypatch.setattr(doctor, "quick", lambda config: [bad])
    before = slurm.asked()
    assert cli.main(["launch", *WORDS, "--detach"]) == exit_codes.STORAGE
    said = capsys.readouterr()
    assert "make room" in said.out and "--no-doctor" in said.err
    assert not any(line.startswith("sbatch") for line in slurm.asked()[len(before) :])
    assert cli.main(["launch", *WORDS, "--detach", "--no-doctor"]) == exit_codes.OK
