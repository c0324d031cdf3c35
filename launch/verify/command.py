"""`shoestring verify`: choose what to prove, say what cannot be, prove the rest side by side, and certify.

base words + layouts and options (cases.py) -> a session per case (observe.py), its reference (plain.py), the differences
(compare.py), all in prove.py -> a table (table.py), certificate.json, and the smallest case that still fails (shrink.py)
"""

import itertools
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from ...conf.errors import ConfigError, most_like
from ...conf.schema import Config
from ...parallel.dispatch import OPTIONAL
from ...parallel.optimizer import deepspeed_zero
from ...train import cost, units
from .. import exit_codes
from ..report import write_report
from . import autoep, certificate, routing, table
from .cases import CONFIG_DIR, USUAL, Case, checked, composed, layout_cover, layouts, option_cases, own_of, written
from .certificate import Invalid
from .compare import LIMITS
from .prove import Fault, Verdict, in_folder, prove, prove_other, reference
from .shrink import shrink
from .table import Screen

# On four processes, within a minute: the mechanisms that differ, once each.
SMOKE = (
    ("pp2ep2", ()), ("edp2ep2", ("model.mtp_depth=1", "model.tie_embeddings=true")), ("pp4", ("optim.algorithm=muon",)),
    ("pp2edp2/interleaved_1f1b", ("train.recompute=[attention,experts]", "model.mtp_depth=1")),
    ("edp2ep2", ("precision=fp32", "optim.engine=deepspeed", "parallel.placement_interval=1")), ("pp2ep2", ("precision=bf16",)),
)  # fmt: skip
# Of `target=deepspeed`: what AutoEP knows, in the precision that it keeps.
AUTOEP = (
    "precision=fp32", "optim.z_loss_coef=0", "optim.sequence_balance_coef=0", "optim.bias_update_speed=0", "optim.warmup_steps=0",
    "optim.decay=none",
)  # fmt: skip
_BYTES_LEFT = 0.8  # of the machine's free memory


@dataclass(frozen=True, kw_only=True)
class Request:
    """`words`: settings of the configuration. `out`: where certificate.json goes."""

    layouts: str = "smoke"  # of target=deepspeed: edp2ep2
    world: int = 8
    steps: int = 3
    seed: int = 0
    routing: str = "natural"
    target: str = "shoestring"
    out: Path = Path("runs/verify")
    words: tuple[str, ...] = ()
    config_dir: str | None = None


def parse(words: Sequence[str], config_dir: str | None = None) -> Request:
    """Raises ConfigError for a setting of ours that is no number where it must be one."""
    own = {}
    settings = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("layouts", "routing", "target"):
            own[key] = value
        elif equals and key in ("world", "steps", "seed"):
            if not value.isdecimal() or (key != "seed" and int(value) < 1):
                raise ConfigError(key, value, "must be a whole number" + (" from 1 on" if key != "seed" else ""))
            own[key] = int(value)
        elif equals and key == "out":
            own[key] = Path(value)
        else:
            settings.append(word)
    if own.get("target", "shoestring") not in ("shoestring", "deepspeed"):
        raise ConfigError("target", own["target"], "must be shoestring or deepspeed", most_like(own["target"], ["shoestring", "deepspeed"]))
    if own.get("target") == "deepspeed":
        own.setdefault("layouts", "edp2ep2")
    return Request(**own, words=tuple(settings), config_dir=config_dir)


def main(words: Sequence[str], config_dir: str | None) -> int:
    return verify(parse(words, config_dir))


def verify(request: Request, *, fault: Fault | None = None, say: Callable[[str], None] | None = None) -> int:
    """Prove what is asked for; an exit code: 0 only if every case passed. Raises ConfigError before anything runs.

    `say`: gets every line; left out, they are printed, with progress where that is to a terminal.
    """
    began = time.monotonic()
    torch.set_num_threads(1)
    base = base_words(request)
    config = composed(base)
    routing.make(request.routing, config)
    valid, invalid = checked(list(choose_cases(request, base)))
    with Screen(say) as screen, tempfile.TemporaryDirectory(prefix="shoestring-verify-") as name:
        folder = Path(name)
        _introduce(request, config, valid, invalid, screen)
        proved = run(valid, folder, fault) if request.target == "shoestring" else run_autoep(valid, folder)
        verdicts = _shown(proved, valid, screen, 1 if request.target == "deepspeed" else _at_once())
        smallest = {v.case: _told(v, request, folder / "shrink", fault, screen) for v in verdicts if not v.passed}
        if request.target == "shoestring":
            _write_trace(request, verdicts, folder)
    results = [v.result(smallest.get(v.case, "")) for v in verdicts]
    seconds = time.monotonic() - began
    content = certificate.certificate(
        config, results, invalid, LIMITS, command=command_of(request), seconds=seconds, target=request.target
    )  # fmt: skip
    path = certificate.write(request.out, content)
    screen.say(f"\n{len(results) - len(smallest)} of {len(results)} cases passed in {units.duration(seconds)}")
    screen.say(f"certificate  {path}\nreport       {write_report(request.out)}")
    return exit_codes.OK if content.passed else exit_codes.FAILED


def _introduce(request: Request, config: Config, valid: list[Case], invalid: list[Invalid], screen: Screen) -> None:
    """What cannot be proved and why, and what is going to be."""
    if invalid:
        screen.say(f"{len(invalid)} {'case is' if len(invalid) == 1 else 'cases are'} invalid and left out:")
    for line in table.invalid_lines(invalid, screen.width):
        screen.say(line)
    if not valid:
        raise ConfigError("layouts", request.layouts, "none of them is valid for this model: see above")
    _check_memory(config, max(case.config().parallel.world_size for case in valid))
    parameters = units.count(cost.num_params(config.model).total)
    what = (f"{config.model.name}, {parameters} parameters: {len(valid)} case{'s' * (len(valid) > 1)} of {request.steps} steps, "
            f"{config.sequences_per_step} x {config.data.seq_len} tokens each, seed {config.train.seed}")  # fmt: skip
    screen.say("\n".join([*[""] * bool(invalid), *table.indented(what, screen.width, 0), ""]))


def _shown(proved: Iterator[Verdict], valid: list[Case], screen: Screen, at_once: int) -> list[Verdict]:
    """A row for each as it comes; in the order of the cases at the end."""
    began, verdicts = time.monotonic(), []
    resumed = RESUME_ON if at_once > 1 else ()
    rows = table.Table([case.layout for case in valid], resumed, screen.width, screen.colour)
    screen.say(rows.header())
    screen.status(table.progress(0, len(valid), at_once, 0.0))
    for verdict in proved:
        verdicts.append(verdict)
        screen.say(rows.row(verdict.result()))
        screen.status(table.progress(len(verdicts), len(valid), at_once, time.monotonic() - began))
    return sorted(verdicts, key=lambda v: valid.index(v.case))


def _told(verdict: Verdict, request: Request, folder: Path, fault: Fault | None, screen: Screen) -> str:
    """All that failed; the command of the smallest case that still fails."""
    case = verdict.case
    screen.say(f"\nFAIL  {case.name}\n{table.details(verdict.result(), screen.width)}\n  again:     {case.command}")
    if request.target != "shoestring":
        return ""
    screen.status("looking for the smallest case that still fails ...")
    small = shrink(case, _still_fails(verdict, folder, fault)).command
    screen.say(f"  smallest:  {small}" if small != case.command else "  no smaller case fails")
    return small


def _write_trace(request: Request, verdicts: list[Verdict], folder: Path) -> None:
    """The reference's routing of the first case among those with the most layers, for `routing=trace:FILE`: it serves all the others."""
    told = [v.case for v in verdicts if not v.error]
    if told:
        case = max(told, key=lambda case: case.config().model.num_moe_layers)
        known = reference(in_folder(case.config(), folder / "trace"), case.routing, folder / "references")
        request.out.mkdir(parents=True, exist_ok=True)
        routing.write(request.out / routing.FILE, routing.trace_of(known.evidence))


def _still_fails(verdict: Verdict, folder: Path, fault: Fault | None) -> Callable[[Case], bool]:
    """Whether a smaller case fails in the same way; gone on with on another layout only where nothing else failed."""
    only_resumed = verdict.broken and all(d.quantity.startswith(("resumed", "random")) for d in verdict.broken)
    return lambda case: prove(case, verdict.resumed_on if only_resumed else "", folder, fault).fails_like(verdict)


def command_of(request: Request) -> str:
    own = [f"{key}={getattr(request, key)}" for key in ("layouts", "world", "steps", "seed", "routing", "target")]
    return " ".join(["shoestring verify", *own, *request.words])


# ---------------------------------------------------------------- what to prove


def base_words(request: Request) -> tuple[str, ...]:
    """The user's settings over the usual ones. A usual value that does not go with the user's gives way to the nearest that does."""
    given = {word.partition("=")[0].lstrip("+~"): word.partition("=")[2] for word in request.words}
    seq_len = int(given["data.seq_len"]) if given.get("data.seq_len", "").isdecimal() else 16
    batch = 2 * (4 if request.layouts == "smoke" else request.world) * seq_len
    asked = [f"train.global_batch_tokens={batch}", f"train.steps={request.steps}", f"train.seed={request.seed}"]
    before_last = f"checkpoint.interval={max(1, request.steps - 1)}"
    usual = together(USUAL, AUTOEP if request.target == "deepspeed" else (), asked, [before_last])
    usual = [word for word in usual if word.partition("=")[0] not in given and not word.startswith(own_of(request.words))]
    given_words = (*request.words, *([f"{CONFIG_DIR}{request.config_dir}"] if request.config_dir else []))
    if named := _phases(given_words):
        rule = "a run of several phases is not proved as a whole: name the model and the settings of the phase instead"
        raise ConfigError("phases", ", ".join(named), rule)
    for _ in range(8):
        words = (*usual, *given_words)
        try:
            composed(words)
            return words
        except ConfigError as error:
            at = next((i for i, word in enumerate(usual) if word.partition("=")[0] == error.field), None)
            if at is None or error.nearest is None:
                raise
            usual[at] = f"{error.field}={error.nearest}"
    return (*usual, *given_words)


def together(*parts: Sequence[str]) -> list[str]:
    """The words of all parts, of each setting only the last."""
    return list({word.partition("=")[0]: word for part in parts for word in part}.values())


def _phases(words: tuple[str, ...]) -> list[str]:
    """Those that the user's words name, if they make a configuration without ours."""
    try:
        return list(composed(words).phases)
    except ConfigError:
        return []


def choose_cases(request: Request, base: tuple[str, ...]) -> Iterator[Case]:
    case = lambda layout, options=(): Case(layout=layout, options=options, routing=request.routing, base=base)
    if request.layouts in ("all", "exhaustive"):
        every = layouts(request.world)
        valid = {one.layout: every[one.layout] for one in checked(list(map(case, every)))[0]}
    if request.layouts == "all":
        gpus = composed(base).cluster.gpus_per_node
        chosen = [written(*parts) for parts in layout_cover(valid.values(), gpus)] if valid else []
        yield from (case(layout) for layout in every if layout in chosen or layout not in valid)
        yield from (case(f"ep{request.world}/{dispatcher}") for dispatcher in OPTIONAL)  # on a CPU: to say why not
        yield from option_cases(base, valid.values(), request.routing) if valid else ()
    elif request.layouts == "exhaustive":
        yield from map(case, every)
        for parts in valid.values():
            yield from option_cases(base, [parts], request.routing)
    elif request.layouts == "smoke":
        given = {word.partition("=")[0] for word in request.words}
        for layout, options in SMOKE:
            yield case(layout, tuple(word for word in options if word.partition("=")[0] not in given))
    else:
        yield from (case(layout.strip()) for layout in request.layouts.split(","))


def _check_memory(config: Config, world: int) -> None:
    """Weights, gradients and optimizer of all ranks, and what is kept of each step for the comparison."""
    params = cost.num_params(config.model).trained
    needed = params * 8 * (4 * world + 8 * config.train.steps)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > _BYTES_LEFT * free:
        rule = (f"has {units.count(params)} parameters: {world} processes want some {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; "
                "prove a small one with the same mechanisms (model.num_layers=, model.dim=, model.num_experts= ...)")  # fmt: skip
        raise ConfigError("model", config.model.name, rule, "micro")


# ---------------------------------------------------------------- side by side


def run_autoep(cases: Sequence[Case], folder: Path) -> Iterator[Verdict]:
    """DeepSpeed's expert parallelism in our place, one case after another."""
    yield from (prove_other(case, folder / f"case{i}", autoep.train) for i, case in enumerate(cases))


RESUME_ON = ("pp2ep2", "edp2ep2", "pp4", "pp2edp2", "ep4", "edp4", "pp2ep2/interleaved_1f1b", "pp2/dualpipev", "ep2", "pp2", "edp2", "pp1")


def run(cases: Sequence[Case], folder: Path, fault: Fault | None = None) -> Iterator[Verdict]:
    """Verdicts as they come. Each case's ranks are forked from a process that is forked from this one, which has the imports."""
    if any("optim.engine=deepspeed" in (*case.base, *case.options) for case in cases):
        logging.getLogger("deepspeed").setLevel(logging.ERROR)
        deepspeed_zero.preload()
    with ProcessPoolExecutor(_at_once(), mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(prove, case, other, folder / f"case{i}", fault) for i, (case, other) in enumerate(zip(cases, _resumed(cases)))]
        for job in as_completed(jobs):
            yield job.result()


def _at_once() -> int:
    return max(1, os.cpu_count() or 1)


def _resumed(cases: Sequence[Case]) -> Iterator[str]:
    """For each case another layout to go on with, in turn."""
    turn = itertools.cycle(RESUME_ON)
    for case in cases:
        yield next((layout for layout in itertools.islice(turn, len(RESUME_ON)) if layout != case.layout and _valid(case, layout)), "")


def _valid(case: Case, layout: str) -> bool:
    return not isinstance(_config(case, layout), Invalid)


def _config(case: Case, layout: str) -> Config | Invalid:
    try:
        return Case(layout=layout, options=case.options, base=case.base).config()
    except ConfigError as error:
        return Invalid(name=layout, why=str(error))
