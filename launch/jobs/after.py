"""What becomes of a Slurm job whose ranks have ended: it is over, is requeued, or sends another of another size. Its last line runs this:

    python -m shoestring.launch.jobs.after EXIT_CODE FOLDER KEY=VALUE ...

`links.jsonl` in the folder has a line for each link of the chain: job, restart, nodes, exit code, the step that the next one begins from.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...conf import files
from ...conf.phases import num_steps
from ...conf.schema import Config
from ...train.resume import steps_done
from .. import environment, exit_codes, secrets
from ..environment import SlurmJob
from . import slurm
from .job import load_words, plan_job

DONE, AGAIN, OTHER_SIZE, STOP = "done", "again", "other size", "stop"
LINKS = "links.jsonl"


def decide(code: int, *, steps: Sequence[int], most: int) -> str:
    """What to do after `code`. `steps`: of the newest checkpoint after each link of this job, the last one's last; `most`: links in a row
    that brought no new one, after which it is given up."""
    if code == exit_codes.OK:
        return DONE
    if code == exit_codes.OTHER_SIZE:
        return OTHER_SIZE
    fruitless = len([*itertools.takewhile(lambda step: step == steps[-1], reversed(steps))]) - (steps[-1] > 0)
    if code == exit_codes.FAILED:  # of no known kind: one that comes at the start comes again
        return AGAIN if not fruitless else STOP
    killed = code > 128 and code != exit_codes.INTERRUPTED  # 128 + signal, as a shell says it
    if code in (exit_codes.PREEMPTED, exit_codes.LOST) or killed:
        return AGAIN if fruitless <= most else STOP
    return STOP


def main(argv: Sequence[str]) -> int:
    """Do it, and say it; the exit code of the job."""
    secrets.install()
    code, folder, words = int(argv[0]), Path(argv[1]), list(argv[2:])
    job = environment.SlurmJob.from_environment()
    config = load_words(words)
    links = _links(folder, job)
    step = steps_done(config)
    what = decide(code, steps=[*(link["step"] for link in links), step], most=config.launch.max_restarts)
    link = {"job": job.id, "restart": job.restart, "nodes": job.nodes, "code": code, "step": step, "then": what, "time_unix": time.time()}
    _note(folder, link)
    at = f"step {step} of {num_steps(config)}"
    if what == DONE:
        print(f"job {job.id}: done, at {at}", flush=True)
    elif what == STOP:
        print(f"job {job.id} ended with {code} ({exit_codes.meaning(code)}) at {at}: not sent again", flush=True)
    elif not _may_requeue(job):
        print(f"job {job.id} ended with {code} at {at}, and was told not to be requeued (Requeue=0)", flush=True)
    elif what == OTHER_SIZE:
        return _resize(config, words, folder, job)
    else:
        print(f"job {job.id} ended with {code} ({exit_codes.meaning(code)}) at {at}: requeued, to go on from there", flush=True)
        return _ask(["scontrol", "requeue", job.id]) or code
    return code


def _resize(config: Config, words: Sequence[str], folder: Path, job: SlurmJob) -> int:
    """The next phase's job is one of its own: Slurm does not change how many nodes a job has."""
    next_job = plan_job(config, words)
    text = slurm.script([next_job], folder, ["job", job.id], chdir=Path.cwd())
    sent = slurm.send(text, folder / f"task_{job.task}" if job.task else folder)
    print(f"job {job.id}: the next phase has {next_job.world_size:,} ranks; job {sent.id} goes on with them", flush=True)
    return exit_codes.OK


def _may_requeue(job: SlurmJob) -> bool:
    """A person's `scontrol update JobId=... Requeue=0` is how a chain is ended after a save."""
    shown = subprocess.run(["scontrol", "show", "--oneliner", "job", job.id], capture_output=True, text=True).stdout
    return "Requeue=0" not in shown.split()


def _ask(words: Sequence[str]) -> int:
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        print(f"error: {' '.join(words)}: {' '.join((found.stderr or found.stdout).split())}", file=sys.stderr, flush=True)
    return found.returncode


def _links(folder: Path, job: SlurmJob) -> list[dict]:
    path = folder / LINKS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [link for link in map(_read, lines) if link and link["job"] == job.id]


def _read(line: str) -> dict | None:
    try:
        link = json.loads(line)
        return link if isinstance(link["step"], int) and isinstance(link["job"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _note(folder: Path, link: dict) -> None:
    files.folder(folder.parent, folder.name)
    with files.opened(folder / LINKS, "a", encoding="utf-8") as file:
        file.write(json.dumps(link) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
