"""The sbatch file of a run, or of a sweep as an array; sending it.

One job is a run's whole life: it is requeued when it is preempted, at its time limit, and when a node dies, and goes on from the newest
checkpoint. `--signal` makes ranks save before the limit; what they ended with decides what comes next (`after.py`, the file's last line).
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...conf import files
from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...train.metrics import replace_file
from .. import environment
from .job import Job

FOLDER = "slurm"  # in the run directory
PORTS = 1000  # jobs with as many numbers in a row have ports of their own, should they share a node
_WAIT_S = 120  # after the first node's torchrun has ended, for the others': they end together, or not at all


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A job that Slurm has. `id`: such as 1234; of a sweep, the array's."""

    id: str
    script: str

    @classmethod
    def read(cls, folder: Path) -> "Sent | None":
        try:
            return cls(**json.loads((folder / "sent.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def script(jobs: Sequence[Job], folder: Path, command: Sequence[str], *, chdir: Path, numbers: Sequence[int] = ()) -> str:
    """The sbatch file of one job, or of several with these `numbers` as an array. `folder`: for logs; `command`: what was typed.

    Raises ConfigError where jobs of an array want nodes of different numbers.
    """
    first, name = jobs[0], _name(folder.parent.name if numbers else jobs[0].config.name)
    for number, job in zip(numbers, jobs):
        if (job.nodes, job.ranks_per_node) != (first.nodes, first.ranks_per_node):
            rule = f"has {job.world_size} ranks, and another {first.world_size}: an array's jobs are of one size. Make it several sweeps"
            raise ConfigError(f"job {number}", " ".join(job.words), rule)
    log = folder / ("job_%A_%a" if numbers else "job_%j")
    lines = [
        "#!/bin/bash",
        f"# {name}: {first}"
        + (f", {len(jobs)} times" if numbers else "") + f". Made by: {_one_line(command)}",
        *(f"#SBATCH {option}" for option in options(first, name, log, chdir, numbers)),
        "",
        "export PYTHONSAFEPATH=1 SLURM_OPEN_MODE=append",
        *first.config.launch.slurm.setup,
        *_words(jobs, numbers),
        f'head=$(hostname):$(({first.config.launch.port} + SLURM_JOB_ID % {PORTS}))',
        "",
        *_srun(first, log),
        "",
        f'exec {shlex.quote(_python(first, host=True))} -m shoestring.launch.jobs.after $? {shlex.quote(str(folder))} "${{words[@]}}"',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def options(job: Job, name: str, log: Path, chdir: Path, numbers: Sequence[int]) -> list[str]:
    """Of sbatch, each `--name` or `--name=value`."""
    s = job.config.launch.slurm
    asked = {"partition": s.partition, "account": s.account, "qos": s.qos, "constraint": s.constraint, "exclude": ",".join(s.exclude)}
    return [
        f"--job-name={name}",
        *([f"--array={_ranges(numbers)}"] if numbers else []),
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *(["--exclusive", "--mem=0"] if job.whole_nodes else []),
        f"--gpus-per-node={job.ranks_per_node}" if job.gpus else f"--cpus-per-task={job.cores}",
        f"--time={s.time}",
        f"--signal=TERM@{s.signal_s}",
        "--requeue",
        *(["--no-kill"] if job.min_nodes < job.nodes else []),
        f"--chdir={shlex.quote(str(chdir))}",
        f"--output={shlex.quote(f'{log}.log')}",
        *(f"--{name}={value}" for name, value in asked.items() if value),
        *s.options,
    ]


def _srun(job: Job, log: Path) -> list[str]:
    """One task a node. What it may compute on is for our own pinning to say: Slurm would give a task one core."""
    s, elastic = job.config.launch.slurm, job.min_nodes < job.nodes
    flags = ["--cpu-bind=none", f"--wait={0 if elastic else _WAIT_S}", *(["--no-kill"] if elastic else [])]
    if not job.gpus:
        flags.append(f"--cpus-per-task={job.cores}")
    if s.container:
        flags += [f"--container-image={s.container}", *([f"--container-mounts={','.join(s.mounts)}"] if s.mounts else [])]
    line = job.torchrun(endpoint="HEAD", name="NAME", python=_python(job), words=())
    line = shlex.join(line).replace("HEAD", '"$head"').replace("NAME", '"$SLURM_JOB_ID"')
    return [
        f"srun {' '.join(shlex.quote(flag) for flag in flags)} \\",
        f"  --output={shlex.quote(f'{log}_node_%n.log')} \\",
        f'  {line} "${{words[@]}}"',
    ]


def _words(jobs: Sequence[Job], numbers: Sequence[int]) -> list[str]:
    if not numbers:
        return [f"words=({shlex.join(jobs[0].words)})"]
    return ["case $SLURM_ARRAY_TASK_ID in", *(f"  {n}) words=({shlex.join(job.words)}) ;;" for n, job in zip(numbers, jobs)), "esac"]


def _ranges(numbers: Sequence[int]) -> str:
    """Such as 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _python(job: Job, host: bool = False) -> str:
    """In the container, or on the host beside it."""
    s = job.config.launch.slurm
    if s.container:
        return sys.executable if host else s.python or "python3"
    return s.python or sys.executable


def _name(text: str) -> str:
    return re.sub(r"[^\w.+-]", "_", text)[:60]


def check(config: Config) -> None:
    """Raises ConfigError for settings that sbatch would not take, or would take for something else."""
    s = config.launch.slurm
    limit = _seconds(s.time)
    if s.time.isdigit():
        rule = "is a number, as which YAML also reads 12:00:00 (quote it there); write hours:minutes:seconds"
        raise ConfigError("launch.slurm.time", s.time, rule, f"{int(s.time) // 60}:{int(s.time) % 60:02}:00")
    if limit is None:
        rule = "is no time as Slurm has them: hours:minutes:seconds, days-hours or days-hours:minutes:seconds"
        raise ConfigError("launch.slurm.time", s.time, rule, "1-00:00:00")
    if limit <= s.signal_s:
        raise ConfigError("launch.slurm.signal_s", s.signal_s, f"must be less than the limit, launch.slurm.time = {s.time}", limit // 2)
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        for text in value if isinstance(value, (list, tuple)) else [str(value)]:
            if not text.isprintable():
                raise ConfigError(f"launch.slurm.{f.name}", text, "must be one line of printable text")
    for option in s.options:
        if not option.startswith("-"):
            raise ConfigError("launch.slurm.options", option, "must be an option of sbatch, with its dashes", f"--{option}")


_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<a>\d+)(?::(?P<b>\d+)(?::(?P<c>\d+))?)?)")


def _seconds(time: str) -> int | None:
    """Of a limit as Slurm writes it; None where it is none. (Two numbers without days are minutes:seconds.)"""
    found = _TIME.fullmatch(time)
    if not found:
        return None
    n = {name: int(value or 0) for name, value in found.groupdict().items()}
    if found["days"]:
        return ((n["days"] * 24 + n["h"]) * 60 + n["m"]) * 60 + n["s"]
    if found["c"]:
        return (n["a"] * 60 + n["b"]) * 60 + n["c"]
    return n["a"] * 60 + n["b"]


def _one_line(command: Sequence[str]) -> str:
    return " ".join(shlex.join(command).split())


# ---------------------------------------------------------------- sending


def send(text: str, folder: Path) -> Sent:
    """Write the file and hand it to sbatch. Raises ConfigError with Slurm's own words where it is refused."""
    if not shutil.which("sbatch"):
        raise ConfigError("launch", "slurm", "there is no sbatch here: run it where jobs are sent from, or see it with --dry-run", "local")
    files.folder(folder.parent, folder.name)
    path = folder / "job.sbatch"
    replace_file(path, text)
    found = subprocess.run(["sbatch", "--parsable", str(path)], env=environment.to_send(), capture_output=True, text=True)
    if found.returncode:
        raise ConfigError("launch", "slurm", f"sbatch refused {path}: {' '.join(found.stderr.split())}")
    sent = Sent(id=found.stdout.strip().partition(";")[0], script=str(path))
    replace_file(folder / "sent.json", json.dumps(asdict(sent)) + "\n")
    return sent
