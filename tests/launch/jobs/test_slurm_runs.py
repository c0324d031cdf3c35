"""Runs under a real Slurm of three nodes on this machine: a node that dies, a preemption, a time limit, a sweep."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shoestring.launch import exit_codes
from shoestring.train.metrics import read_records

SMALL = [
    "launch=slurm", "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2",
    "model.dense_hidden_dim=48", "model.expert_hidden_dim=24", "optim.warmup_steps=2", "train.eval_sequences=8",
    "train.global_batch_tokens=256", "train.micro_batch_sequences=2", "checkpoint.interval=5", "cluster.gpus_per_node=2",
]  # fmt: skip
TWO_NODES = [*SMALL, "parallel.edp=2", "parallel.ep=2"]


class Launched:
    """`shoestring launch WORDS`, which follows its job; what it prints is in a file."""

    def __init__(self, slurm, tmp_path, words, *options):
        self.slurm, self.out = slurm, tmp_path / "launch.out"
        command = [Path(sys.executable).with_name("shoestring"), "launch", *options, *words, f"data.cache_dir={tmp_path.parent / 'tokens'}"]
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(command, env=slurm.env, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def until(self, happened, seconds=120):
        until = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < until and self.process.poll() is None, self.text()
            time.sleep(0.1)
        return found

    def hurrying(self, job, seconds=400):
        """Until it ends, as often as it is requeued."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            if self.slurm.job(job)["JobState"] == "PENDING":
                self.slurm.hurry(job)
            time.sleep(0.5)

    def text(self):
        return self.out.read_text(errors="replace")

    def end(self, seconds=240):
        code = self.process.wait(seconds)
        return code, self.text()


def curve(run_dir):
    """Step: what must be the same to the bit; of a step that was trained twice, the last."""
    return {r.step: (r.loss, r.grad_norm, r.tokens) for r in read_records(run_dir / "metrics.jsonl")}


def steps(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


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


def test_a_run_longer_than_its_limit_is_a_chain(slurm, tmp_path):
    """Slurm looks at limits every half minute, so a link of two minutes is told to save after 30 to 60 seconds."""
    run = tmp_path / "runs/long"
    words = [*SMALL, "parallel.ep=2", "name=long", "train.steps=700", "launch.slurm.time=0:02:00", "launch.slurm.signal_s=60"]
    with Launched(slurm, tmp_path, words) as launched:
        job = launched.until(lambda: json.loads(sent.read_text())["id"] if (sent := run / "slurm/sent.json").exists() else None)
        launched.hurrying(job)
        code, text = launched.end()
    assert code == exit_codes.OK, text
    links = [json.loads(line) for line in (run / "slurm/links.jsonl").read_text().splitlines()]
    assert len(links) > 1 and links[-1]["then"] == "done"
    assert {(link["code"], link["then"]) for link in links[:-1]} <= {(75, "again"), (143, "again")}  # told before its ranks were up
    assert any(link["code"] == exit_codes.PREEMPTED for link in links)
    assert [record.step for record in read_records(run / "metrics.jsonl")] == list(range(1, 701))  # each once: nothing was lost


def test_a_sweep_is_an_array(slurm, tmp_path):
    words = [*SMALL, "name=sweep", "train.steps=4", "optim.lr=1e-3,2e-3", "train.seed=1,2"]
    with Launched(slurm, tmp_path, words, "--multirun") as launched:
        code, text = launched.end()
        assert code == exit_codes.OK, text
        ended = sorted((tmp_path / "runs/sweep").glob("*/metrics.jsonl"))
        assert [path.parent.name[:1] for path in ended] == ["0", "1", "2", "3"]
        assert len({tuple(record.loss for record in read_records(path)) for path in ended}) == 4  # four different runs
        assert all(len(read_records(path)) == 4 for path in ended)
    again = Launched(slurm, tmp_path, words, "--multirun")
    assert again.end(60) == (exit_codes.OK, "all of its runs are complete\n")
