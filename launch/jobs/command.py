"""`shoestring launch`: one command for a run on this machine, under torchrun, under Slurm or on Kubernetes; `--dry-run` shows all of it.

The same command again follows the job that Slurm has already, or goes on with the run where there is none.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...conf.compose import load
from ...conf.errors import ConfigError
from ...conf.schema import Config
from .. import environment, exit_codes, launcher
from ..plan.plans import launch_words
from ..plan.request import load_any_data
from ..validate import validate
from . import kubernetes, slurm
from .follow import follow, live
from .job import Job, plan_job


def main(words: Sequence[str], config_dir: str | None, *, dry_run: bool, detach: bool) -> int:
    """Start it, or show how it would be; an exit code. Raises ConfigError."""
    words = launch_words(words)
    config = _composed(words, config_dir) if dry_run else load(words, config_dir)
    words = [*words, *(["--config-dir", str(Path(config_dir).resolve())] if config_dir else [])]
    if config.launch.how == "local":
        return _local(config, words, dry_run)
    job = plan_job(config, words)
    _check(job, dry_run)
    if config.launch.how == "torchrun":
        return _torchrun(job, dry_run)
    if config.launch.how == "k8s":
        print(kubernetes.manifest(job), end="")
        return exit_codes.OK
    return _slurm(job, ["shoestring", "launch", *words], dry_run=dry_run, detach=detach)


def _composed(words: Sequence[str], config_dir: str | None) -> Config:
    """To be shown only: with any data where none is given yet."""
    config = load_any_data(more := list(words), config_dir)
    for word in more[len(words) :]:
        print(f"not ready yet: {word.partition('=')[0]} must be given", file=sys.stderr)
    return config


def _check(job: Job, dry_run: bool) -> None:
    """Raises ConfigError for what its ranks would refuse. What is shown only may lack its data yet."""
    try:
        validate(job.config, job.world_size)
    except ConfigError as error:
        if not (dry_run and error.field.startswith("data.")):
            raise
        print(f"not ready yet: {error}", file=sys.stderr)


def _local(config: Config, words: Sequence[str], dry_run: bool) -> int:
    if dry_run:
        job = plan_job(config, words)
        print(f"{job.world_size:,} ranks on this machine, as by:\n{shlex.join(environment.command(words))}")
        return exit_codes.OK
    return launcher.train(config, environment.command(words))


def _torchrun(job: Job, dry_run: bool) -> int:
    """This node's share: the same command is run on each."""
    endpoint = job.config.launch.endpoint
    if job.nodes > 1 and not endpoint and not dry_run:
        rule = f"must be given, as the run takes {job.nodes} nodes: HOST of the first one; then run the same command on each"
        raise ConfigError("launch.endpoint", "", rule)
    if ":" not in endpoint:
        endpoint = f"{endpoint or ('FIRST_NODE' if job.nodes > 1 else 'localhost')}:{job.config.launch.port}"
    line = job.torchrun(endpoint=endpoint, name=job.config.name)
    print(f"# on {'each of ' if job.nodes > 1 else ''}{job.nodes:,} node{'s' * (job.nodes > 1)}, {job.ranks_per_node} ranks each:")
    print(shlex.join(line), flush=True)
    return exit_codes.OK if dry_run else subprocess.run(line).returncode


def _slurm(job: Job, command: Sequence[str], *, dry_run: bool, detach: bool) -> int:
    slurm.check(job.config)
    folder = job.run_dir / slurm.FOLDER
    text = slurm.script([job], folder, command, chdir=Path.cwd())
    if dry_run:
        print(f"# sbatch {folder / 'job.sbatch'}, which would be:\n{text}", end="")
        return exit_codes.OK
    sent = slurm.Sent.read(folder)
    if live(sent):
        print(f"job {sent.id} has this run already (scancel {sent.id} ends it)")
    else:
        sent = slurm.send(text, folder)
        print(f"job {sent.id}: sent, {job.world_size:,} ranks on {job.nodes:,} nodes, by {sent.script}")
    print(f"logs: {folder}/job_{sent.id}*.log; run: {job.run_dir}", flush=True)
    if detach:
        return exit_codes.OK
    print("following it; Ctrl-C leaves it running, and the same command follows it again", flush=True)
    try:
        return follow(sent, folder)
    except KeyboardInterrupt:
        end = f"scontrol update JobId={sent.id} Requeue=0; scancel --signal=TERM {sent.id}"
        print(f"\njob {sent.id} goes on; to end it once it has saved: {end}")
        return exit_codes.OK
