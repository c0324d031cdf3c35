"""Judging what came of a kind of fault that has struck twice in a run; `matrix.py` has the kinds.

Same layout and same data: the curve is the uninterrupted run's, bit for bit. Samples left out: that of a run that was told to leave out
the same. Another layout: within 1e-6. Nothing to go on from: stopped within a minute, with cause, rank and remedy. And the books are right.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.conf.schema import Config
from shoestring.launch import elastic, exit_codes
from shoestring.train.ledger import account
from shoestring.train.metrics import read_records

from .processes import Fault, twice
from .runs import Ran, launch

STEPS = 12
BASE = (
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=256", "train.micro_batch_sequences=2", f"train.steps={STEPS}",
    "train.eval_sequences=8", "optim.warmup_steps=2", "checkpoint.interval=2", "checkpoint.async_save=false", "launch.timeout_s=30",
)  # fmt: skip
LAYOUTS = {
    "ep 2": ("parallel.ep=2",),
    "pp 2 x ep 2, dualpipe": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    "ep 2 x edp 2": ("parallel.ep=2", "parallel.edp=2"),
}
STOP_S = 60.0
ENDS_A_RANK = ("sigkill", "sigstop", "exception", "skipped_collective", "flip_checkpoint", "truncate", "kill_save")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`told`: what is said of it, a pattern with {rank} and {step}; "": nothing, training bears it. `code`: a session ends so, and the same
    command goes on. `first`, `every`: the steps it may strike."""

    name: str
    fault: str
    told: str
    judge: "Callable[[Place, Kind, str, Config, list[Fault]], Row] | None" = None
    words: Sequence[str] = ()
    code: int = exit_codes.OK
    first: int = 3
    every: int = 1
    steps: int = STEPS  # of the run
    seconds: tuple[float, float] = (0.0, 0.0)
    times: int = 1
    outcome: str = "the same curve"

    def faults(self, world_size: int, seed: int) -> list[Fault]:
        found = twice(self.fault, seed, world_size=world_size, steps=self.steps - 2, first=self.first, every=self.every, times=self.times)
        return [replace(f, seconds=s) for f, s in zip(found, self.seconds)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of two faults. `detected`, `again`: seconds after each (None: nothing to detect). `wrong`: what is not as it should be."""

    kind: str
    layout: str
    faults: Sequence[Fault]
    detected: Sequence[float | None]
    again: Sequence[float | None]
    outcome: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        at = ", ".join(f"rank {f.rank} step {f.step}" for f in self.faults)
        outcome = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else self.outcome
        return f"{at} | {_seconds(self.detected)} | {_seconds(self.again)} | {outcome}"


def _seconds(values: Sequence[float | None]) -> str:
    return ", ".join("-" if s is None else f"{s:.2f}" for s in values) if any(s is not None for s in values) else "-"


class Place:
    """A folder for runs, with those that nothing happens to."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.seed = folder, seed
        self._clean: dict[tuple, list] = {}

    def config(self, name: str, *words: str) -> Config:
        return load([*BASE, f"data.cache_dir={self.folder / 'cache'}", f"run_dir={self.folder / name}", *words])

    def clean(self, layout: str, steps: int = STEPS) -> list[tuple]:
        """The curve of an uninterrupted run."""
        return self.reference(f"clean {layout} {steps}", *LAYOUTS[layout], f"train.steps={steps}")

    def reference(self, name: str, *words: str, faults: Sequence[Fault] = ()) -> list[tuple]:
        if words not in self._clean or faults:
            config = self.config(name.replace(" ", "_").replace(",", ""), *words)
            ran = launch(config, *faults)
            assert (ran.code, ran.restarts) == (exit_codes.OK, []), ran.text
            self._clean[words] = curve(config)
        return self._clean[words]


def curve(config: Config) -> list[tuple]:
    records = read_records(Path(config.run_dir) / "metrics.jsonl")
    return [(r.step, r.tokens, r.loss, r.grad_norm, r.lr, r.eval_loss, r.expert_load) for r in records]


# ---------------------------------------------------------------- judges


def struck(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """One run; or as many as the faults end, by the same command."""
    runs = _until_done(config, faults, kind.code)
    wrong = [*_ended_well(runs), *_books(config, runs)]
    if curve(config) != place.clean(layout, kind.steps):
        wrong.append("another curve")
    return _row(kind, layout, faults, runs, wrong)


def left_out(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    runs = _until_done(config, faults, kind.code)
    entries = json.loads((Path(config.run_dir) / "left_out.json").read_text()) if runs[-1].code == exit_codes.OK else []
    skip = [f"{e['first']}-{e['last']}" for e in entries]
    wrong = [*_ended_well(runs), *_books(config, runs)]
    if len(skip) != len(faults):
        wrong.append(f"left out: {', '.join(skip) or 'nothing'}")
    elif curve(config) != place.reference(f"told {kind.fault} {layout}", *LAYOUTS[layout], f"data.skip=[{','.join(skip)}]"):
        wrong.append("another curve than that of a run told to leave them out")
    elif curve(config) == place.clean(layout):
        wrong.append("the curve of a run that has left out nothing")
    return _row(kind, layout, faults, runs, wrong)


def starved(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """Tokens go other ways, and the sums are other sums: one process that is told the same ways says what is right."""
    runs = _until_done(config, faults, kind.code)
    wrong = [*_ended_well(runs), *_books(config, runs)]
    alone = place.reference(f"alone {layout}", faults=[replace(f, ep=config.parallel.ep) for f in faults])
    wrong += _near(curve(config), alone)
    for f in faults:
        load = curve(config)[f.step - 1][-1]
        share, first = len(load[0]) // config.parallel.ep, f.rank % config.parallel.ep
        if any(any(layer[first * share : (first + 1) * share]) for layer in load):
            wrong.append(f"tokens in step {f.step}")
    return _row(kind, layout, faults, runs, wrong)


def server_away(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """Two sessions: it is looked for where one begins."""
    runs = [launch(replaced(config, "train.stop_after", STEPS // 2), *faults), launch(config, *faults)]
    wrong = [*_ended_well(runs), *_books(config, runs)]
    if curve(config) != place.clean(layout):
        wrong.append("another curve")
    if len(list((Path(config.run_dir) / "wandb").glob("offline-run-*"))) != 2:
        wrong.append("records are not kept for a later sync")
    found = [next((at - ran.began for at, line in ran.lines if re.search(kind.told, line)), None) for ran in runs]
    begun = [next((at - ran.began for at, line in ran.lines if re.match(r"step +\d+/", line)), None) for ran in runs]
    wrong += ["not told"] * (None in found)
    return Row(kind=kind.name, layout=layout, faults=faults, detected=found, again=begun, outcome=kind.outcome, wrong=wrong)


def nothing_left(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """Each in a run of its own, which ends; started again it refuses again, rather than begin from nothing."""
    wrong, detected = [], []
    for i, fault in enumerate(faults):
        config = replaced(config, "run_dir", f"{config.run_dir}-{i}")
        ran = launch(config, fault)
        wrong += _stopped(ran, kind, fault)
        detected.append(_detected([ran], kind, fault))
        if (code := launch(config).code) != kind.code:
            wrong.append(f"then it went on with code {code}")
    return Row(kind=kind.name, layout=layout, faults=faults, detected=detected, again=(None, None), outcome=kind.outcome, wrong=wrong)


def repaired(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """Stopped twice, and gone on with by the same command when what was gone is back."""
    row = struck(place, kind, layout, config, faults)
    over = [f"not over after {STOP_S:g} s" for s in row.detected if s is None or s > STOP_S]
    return replace(row, wrong=[*row.wrong, *over])


def lost_node(place: Place, kind: Kind, layout: str, config: Config, faults: list[Fault]) -> Row:
    """A rank is lost for good, and another after it. The layout becomes what is left, if that keeps every shard; else the run says what
    would do, and goes on from its checkpoint in a layout that somebody chooses."""
    runs, wrong, now, struck = [], [], config, []
    for f in faults:
        struck.append(f := replace(f, rank=f.rank % now.parallel.world_size))
        runs.append(launch(replaced(now, "launch.max_restarts", 0), f))
        if runs[-1].code not in (exit_codes.LOST, -9):  # a world of one is its own launcher, and is gone with it
            wrong.append(f"the loss of rank {f.rank} ended with code {runs[-1].code}")
        now = _with_less(now, now.parallel.world_size - 1, wrong)
    runs.append(launch(now))
    wrong += [*_ended_well(runs), *_books(config, runs), *_near(curve(config), place.clean(layout))]
    return _row(kind, layout, struck, runs, wrong)


def _with_less(config: Config, survivors: int, wrong: list[str]) -> Config:
    try:
        return elastic.fitting(config, max(1, survivors))
    except ConfigError as error:
        if "none can be left out" not in str(error):
            wrong.append(f"not said what is lost: {error}")
    alone = {"parallel.pp": 1, "parallel.ep": 1, "parallel.edp": 1, "parallel.schedule": "1f1b"}
    for key, value in alone.items():
        config = replaced(config, key, value)
    return config


# ---------------------------------------------------------------- what they look at


def _until_done(config: Config, faults: Sequence[Fault], code: int) -> list[Ran]:
    runs = [launch(config, *faults)]
    while runs[-1].code == code != exit_codes.OK and len(runs) <= len(faults):
        runs.append(launch(config, *faults))
    return runs


def _row(kind: Kind, layout: str, faults: Sequence[Fault], runs: list[Ran], wrong: list[str]) -> Row:
    injected, again = runs[-1].injected, runs[-1].again
    wrong = [*wrong, *(f"{f.name} was not injected" for f in faults if f.name not in injected)]
    detected = [_detected(runs, kind, f) for f in faults]
    wrong += [f"{f.name} was not told" for f, at in zip(faults, detected) if kind.told and at is None]
    restarts = len(faults) if kind.fault in ENDS_A_RANK and kind.judge is not lost_node else 0
    if len(runs[-1].restarts) != restarts:
        wrong.append(f"{len(runs[-1].restarts)} restarts, not {restarts}: {'; '.join(r['what'] for r in runs[-1].restarts)}")
    times = [again[f.name] - injected[f.name] if f.name in again else None for f in faults]
    return Row(kind=kind.name, layout=layout, faults=faults, detected=detected, again=times, outcome=kind.outcome, wrong=wrong)


def _detected(runs: list[Ran], kind: Kind, fault: Fault) -> float | None:
    """Seconds until it was told of, or seen by the launcher, which tells of it a moment later."""
    at = runs[-1].injected.get(fault.name)
    if at is None or not kind.told:
        return None
    pattern = re.compile(kind.told.replace("{rank}", str(fault.rank)).replace("{step}", str(fault.step)))
    said = [line for ran in runs for line in ran.lines] + [(r["seen"], r["what"]) for ran in runs for r in ran.restarts]
    return min((when - at for when, text in said if when >= at and pattern.search(text)), default=None)


def _ended_well(runs: list[Ran]) -> list[str]:
    if runs[-1].code == exit_codes.OK:
        return []
    return [f"ended with code {runs[-1].code}: {' / '.join(line for _, line in runs[-1].lines[-3:])}"]


def _stopped(ran: Ran, kind: Kind, fault: Fault) -> list[str]:
    wrong = [] if ran.code == kind.code else [f"ended with code {ran.code}"]
    if fault.name not in ran.injected:
        return [*wrong, f"{fault.name} was not injected"]
    return [*wrong, "not over in time"] if ran.ended - ran.injected[fault.name] > STOP_S else wrong


def _books(config: Config, runs: list[Ran]) -> list[str]:
    """Every step and token once, and no more seconds than have passed."""
    records, ledger = list(read_records(Path(config.run_dir) / "metrics.jsonl")), account(Path(config.run_dir))
    wrong = [] if [r.step for r in records] == list(range(1, len(records) + 1)) else ["steps are not there once each"]
    if not ledger.tokens == sum(r.batch_tokens for r in records) == config.train.global_batch_tokens * len(records):
        wrong.append(f"{ledger.tokens} tokens in the ledger")
    held = sum(ledger.seconds.values())
    if not 0 < held <= runs[-1].ended - runs[0].began:
        wrong.append(f"{held:.1f} s in the ledger, {runs[-1].ended - runs[0].began:.1f} s have passed")
    return wrong


def _near(found: list[tuple], wanted: list[tuple]) -> list[str]:
    if [row[0] for row in found] != [row[0] for row in wanted]:
        return ["other steps"]
    most = max(abs(a[2] / b[2] - 1) for a, b in zip(found, wanted))
    return [] if most <= 1e-6 else [f"losses differ by {most:.1e}"]
