"""Where a run stands and where it goes on: what a checkpoint keeps beside tensors, which one to begin from, and what must be as it was."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.phases import Phase, phases
from ..conf.schema import Config, ConfigError
from .checkpoint.checkpointer import read_extra
from .checkpoint.folder import NAME, check_lost, complete, find_latest, refuse_link
from .checkpoint.manifest import MANIFEST, CheckpointError
from .checkpoint.trust import OURS, Trust, Verdict, of_checkpoint
from .data.corpus import Corpus
from .metrics import BAD_LINE, from_plain, layout_name

# May be another in each session and phase: nothing that is in a checkpoint depends on them.
FREE_MODEL_FIELDS = ("name", "yarn", "max_seq_len")


@dataclass(kw_only=True)
class Progress:
    """Where the run stands: what a checkpoint keeps beside tensors. `sample` is the next one of the stream to be read."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    stream: int = 0
    sample: int = 0


def find_start(config: Config, *, begun: bool = False) -> Path | None:
    """The checkpoint to go on from: the run directory's newest, else the one that `checkpoint.resume` names (or the newest in it).

    `begun`: by a session that goes back to it. Whether it is whole is not looked into. Raises CheckpointError where there were some, and
    all have been lost, or set aside as damaged, and for somebody else's that is not trusted.
    """
    resume, own = config.checkpoint.resume, _own(config)
    found = find_latest(own)
    if found and resume == "never" and not begun:
        rule = f"{found} is there; to begin anew, choose another `name` or remove the folder"
        raise ConfigError("checkpoint.resume", "never", rule, "auto")
    if found:
        return found
    check_lost(own)
    if resume in ("auto", "never"):
        return None
    named = find_latest(Path(resume) / "checkpoints") or Path(resume)
    if not named.is_dir():
        raise ConfigError("checkpoint.resume", resume, "must be auto, never, or an existing checkpoint or run directory", "auto")
    trusted(config, named)
    return named


def trusted(config: Config, start: Path) -> Verdict:
    """Of a checkpoint to go on from: raises CheckpointError for somebody else's that is not said to be trusted. A run's own are its own."""
    if start.parent == _own(config):
        return OURS
    if NAME.fullmatch(start.name):
        refuse_link(start)
    c = config.checkpoint
    return of_checkpoint(start, Trust(words=tuple(c.trust), signers=c.signers, how="checkpoint.trust=[{}]"))


def steps_done(config: Config) -> int:
    """Where a session started now would begin, as far as manifests say. Changes nothing."""
    start = find_start(config)
    if start and start.parent == _own(config):
        start = next(iter(complete(start.parent)), None)
    return progress_of(start, read_extra(start)).step if start else 0


def progress_of(start: Path, extra: dict[str, Any]) -> Progress:
    """Of what a checkpoint keeps beside tensors. Raises CheckpointError where that is not as a run writes it."""
    try:
        progress = from_plain(Progress, extra.get("progress"))
        if min(dataclasses.astuple(progress)) < 0:
            raise ValueError("a count is negative")
    except BAD_LINE as error:
        raise CheckpointError(f"{start / MANIFEST} does not say where the run stood ({error}): it is not of a run of ours") from None
    return progress


def _own(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def kept(config: Config, phase: Phase, corpus: Corpus, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says of the run, for `check_same_run`."""
    return {
        "progress": dataclasses.asdict(progress),
        "phases": _begun(config, progress.step),
        "model": dataclasses.asdict(phase.config.model),
        "tokenizer": corpus.tokenizer.fingerprint,
        **_stream(phase, corpus),
        "layout": layout_name(phase.config.parallel),
        "precision": phase.config.precision.compute,
    }


def check_same_run(config: Config, phase: Phase, corpus: Corpus, start: Path, extra: dict[str, Any]) -> list[str]:
    """Layout, precision, learning rate and what is to come may change between sessions; model, data and what is past may not: ConfigError.

    Returns what is to be told of what did change.
    """
    told, trained = [], _flat(extra["model"])
    for name, value in _flat(dataclasses.asdict(phase.config.model)).items():
        was = trained.get(name, value)
        if was != value and name.partition(".")[0] not in FREE_MODEL_FIELDS:
            raise ConfigError(f"model.{name}", value, f"{start} was trained with another", was)
        if was != value and name != "name":
            told.append(f"model.{name} is {value:g} from here on; {start.name} was trained with {was:g}")
    tokenizer = corpus.tokenizer.fingerprint
    if extra.get("tokenizer", tokenizer) != tokenizer:
        rule = f"its ids are not those that {start} was trained on; run_dir/tokenizer.json has the run's (data.tokenizer.kind=file)"
        raise ConfigError("data.tokenizer.kind", phase.config.data.tokenizer.kind, rule)
    same_stream = extra["progress"].get("stream", 0) == phase.stream
    for name, value in _stream(phase, corpus).items() if same_stream else ():
        if extra.get(name, value) != value:
            rule = f"{start} was trained on another stream of samples; choose another `name` for a new run"
            raise ConfigError(name, value, rule, extra[name])
    for (name, first), (was, began) in zip(_begun(config, extra["progress"]["step"]), extra.get("phases", ())):
        if (name, first) != (was, began):
            rule = f"{start} says that phase {was} began after step {began}: phases that are past cannot be changed"
            raise ConfigError("phases", f"{name} after step {first}", rule)
    return told


def _stream(phase: Phase, corpus: Corpus) -> dict[str, Any]:
    """What decides which tokens a sample's number stands for."""
    c = phase.config
    return {"train.seed": c.train.seed, "data": corpus.fingerprint, "data.seq_len": c.data.seq_len}


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by their dotted keys."""
    nested = [_flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in section.items()]
    return {key: value for part in nested for key, value in part.items()}


def _begun(config: Config, step: int) -> list[list]:
    """[name, first step] of the phases that have begun when `step` steps are done."""
    return [[phase.name, phase.first_step] for phase in phases(config) if phase.first_step <= step]
