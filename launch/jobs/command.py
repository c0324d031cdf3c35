"""`shoestring launch`: one command for a run on this machine, under torchrun, under Slurm or on Kubernetes; `--dry-run` shows all of it.

The same command again follows the job that Slurm has already, or goes on with the run where there is none.
"""

import shlex
import subprocess
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from ...conf import sweep
from ...conf.compose import load, load_any_data
from ...conf.errors import ConfigError
from ...conf.schema import Config
from .. import environment, exit_codes, launcher
from ..doctor import command as doctor
from ..overview import read
from ..plan.plans import launch_words
from ..sweep import run as run_sweep
from ..validate import validate
from . import kubernetes, slurm
from .follow import follow, live
from .job import Job, plan_job

_OF_ALL_NODES = ("variables", "storage")  # what the doctor finds here that is so on nodes too: their GPUs and packages may be others


def main(words: Sequence[str], config_dir: str | None, *, multirun: bool, dry_run: bool, detach: bool, examined: bool) -> int:
    """Start it, or show how it would be; an exit code. Raises ConfigError."""
    words = launch_words(words)
    more = ["--config-dir", str(Path(config_dir).resolve())] if config_dir else []
    if multirun:
        return _sweep(words, more, config_dir, dry_run=dry_run, detach=detach, examined=examined)
    config = _composed(words, config_dir) if dry_run else load(words, config_dir)
    words = [*words, *more]
    if config.launch.how == "local":
        return _local(config, words, dry_run, examined)
    job = plan_job(config, words)
    _check(job, dry_run)
    if config.launch.how == "torchrun":
        return _torchrun(job, dry_run, examined)
    if config.launch.how == "k8s":
        print(kubernetes.manifest(job), end="")
        return exit_codes.OK
    return _slurm([job], job.run_dir / slurm.FOLDER, words, dry_run=dry_run, detach=detach, examined=examined)


def _sweep(words: Sequence[str], more: Sequence[str], config_dir: str | None, *, dry_run: bool, detach: bool, examined: bool) -> int:
    """One run after the other here, or all of them as an array; those that are complete are left out of it."""
    jobs = sweep.sweep(words, config_dir)
    how = next((job.config.launch.how for job in jobs if job.config), "local")
    if how not in ("local", "slurm"):
        raise ConfigError("launch", how, "a sweep runs here, or as an array under Slurm", "slurm")
    if dry_run and how == "local":
        print("\n".join(shlex.join(["shoestring", "train", *job.words, *more]) for job in jobs))
        return exit_codes.OK
    if how == "local":
        return run_sweep(jobs, more)
    if wrong := next((job for job in jobs if job.error), None):
        raise ConfigError(str(wrong), wrong.error.field, str(wrong.error))
    made = {job.number: plan_job(job.config, [*job.words, *more]) for job in jobs if not _complete(job.config)}
    if not made:
        print("all of its runs are complete")
        return exit_codes.OK
    for job in made.values():
        _check(job, dry_run)
    folder = next(iter(made.values())).run_dir.parent / slurm.FOLDER
    words = ["--multirun", *words, *more]
    return _slurm([*made.values()], folder, words, numbers=[*made], dry_run=dry_run, detach=detach, examined=examined)


def _complete(config: Config) -> bool:
    return read.read(Path(config.run_dir)).state == "complete"


def _healthy(config: Config, kinds: Container[str], wanted: bool) -> int:
    """The doctor's quick part: the exit code of what fails, after telling it. `kinds`: of its lines, those that matter."""
    lines = [line for line in doctor.quick(config) if line.kind in kinds] if wanted else []
    wrong = [line for line in lines if line.state in (doctor.WARN, doctor.FAIL)]
    if wrong:
        doctor.show(wrong, title="shoestring doctor --quick")
    if code := doctor.exit_code(lines):
        print("error: nothing was started; --no-doctor does so all the same", file=sys.stderr)
        return code
    return exit_codes.OK


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


def _local(config: Config, words: Sequence[str], dry_run: bool, examined: bool) -> int:
    if dry_run:
        job = plan_job(config, words)
        print(f"{job.world_size:,} ranks on this machine, as by:\n{shlex.join(environment.command(words))}")
        return exit_codes.OK
    if code := _healthy(config, doctor.KINDS, examined):
        return code
    environment.prepare_ranks(config.cluster, config.launch.threads)
    return launcher.train(config, environment.command(words))


def _torchrun(job: Job, dry_run: bool, examined: bool) -> int:
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
    if dry_run:
        return exit_codes.OK
    return _healthy(job.config, doctor.KINDS, examined) or subprocess.run(line).returncode


def _slurm(
    jobs: Sequence[Job], folder: Path, words: Sequence[str], *, dry_run: bool, detach: bool, examined: bool, numbers: Sequence[int] = ()
) -> int:
    """`numbers`: of the jobs of an array."""
    job = jobs[0]
    slurm.check(job.config)
    text = slurm.script(jobs, folder, ["shoestring", "launch", *words], chdir=Path.cwd(), numbers=numbers)
    if dry_run:
        print(f"# {folder / 'job.sbatch'} would be:\n{text}", end="")
        return exit_codes.OK
    sent = slurm.Sent.read(folder)
    if live(sent):
        print(f"job {sent.id} has this already (scancel {sent.id} ends it)")
    elif code := _healthy(job.config, _OF_ALL_NODES, examined):
        return code
    else:
        sent = slurm.send(text, folder)
        many = f"{len(jobs)} jobs of " if numbers else ""
        print(f"job {sent.id}: sent, {many}{job}, by {sent.script}")
    print(f"logs: {folder}/job_{sent.id}*.log" + ("" if numbers else f"; run: {job.run_dir}"), flush=True)
    if detach:
        return exit_codes.OK
    print("following it; Ctrl-C leaves it running, and the same command follows it again", flush=True)
    try:
        return follow(sent, folder)
    except KeyboardInterrupt:
        end = f"scontrol update JobId={sent.id} Requeue=0; scancel --signal=TERM {sent.id}"
        print(f"\njob {sent.id} goes on; to end it once it has saved: {end}")
        return exit_codes.OK
