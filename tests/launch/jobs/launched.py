"""A small run, and `shoestring launch` of it in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

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


def steps(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0
