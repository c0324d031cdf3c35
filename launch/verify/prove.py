"""One case proved: trained on its layout, gone on with on another, exported; and each of these held against the reference.

The reference in FP64 and FP32 is the plain model (`plain.py`). Where rounding is part of the algorithm (BF16 weights or moments) it is
one process of this code in the same precision, which adds up by nodes where the case does (`by_nodes.py`); and both take the plain
model's choice of experts.
"""

import dataclasses
import hashlib
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...conf.compose import to_yaml
from ...conf.schema import Config, ConfigError
from ...train.checkpoint.checkpointer import read_extra
from ...train.data.corpus import open_corpus
from ...train.interop.hf import HFError, export, load_pretrained
from ...train.interop.hf_format import weight_shapes
from ...train.model.decoder import DTYPES, initial_weight
from .. import secrets
from ..local import RankFailed, fork_ranks
from . import observe, plain
from .by_nodes import nodes_of
from .cases import Case, changed
from .certificate import Result, measure
from .compare import LIMITS, Deviation, Limits, compare, near_ties, resumed, worst
from .evidence import Choose, Evidence, Step
from .routing import make, replay, trace_of

# One process, and nothing that may not matter.
ALONE = (
    "parallel.pp=1", "parallel.edp=1", "parallel.ep=1", "parallel.chunks=1", "parallel.schedule=1f1b", "parallel.dispatcher=auto",
    "parallel.placement_interval=0", "parallel.stages=''", "optim.engine=whole", "optim.offload=false", "train.recompute=[]",
)  # fmt: skip
Fault = Callable[[], None]
MOST = 100  # deviations of a case that a certificate keeps


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`broken`: what failed, worst first. `worst`: nearest to its limit, failed or not; None where nothing could be compared."""

    case: Case
    seconds: float
    worst: Deviation | None = None
    broken: list[Deviation] = field(default_factory=list)
    resumed_on: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""  # why there is nothing to compare

    @property
    def passed(self) -> bool:
        return not self.broken and not self.error

    def result(self, smallest: str = "") -> Result:
        """As it stands in a certificate, which keeps the worst of what is broken."""
        case = self.case
        return Result(
            layout=case.layout, options=list(case.options), routing=case.routing, passed=self.passed,
            worst=measure(self.worst) if self.worst else None, broken=[measure(d) for d in self.broken[:MOST]],
            resumed_on=self.resumed_on, notes=list(self.notes), error=self.error, seconds=round(self.seconds, 2),
            command=case.command, smallest=smallest,
        )  # fmt: skip

    def fails_like(self, other: "Verdict") -> bool:
        """In a quantity that `other` fails in too; or raised, as it did."""
        return bool(self.error and other.error) or not {d.quantity for d in self.broken}.isdisjoint(d.quantity for d in other.broken)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`choose`: what a session is to choose; None: as it likes. `logits` of the exported model for the first samples, (n, S, V)."""

    evidence: Evidence
    choose: Choose | None
    logits: Tensor | None
    trace: Choose  # what the reference chose


def prove(case: Case, resume_on: str, folder: Path, fault: Fault | None = None) -> Verdict:
    """`folder`: for runs, removed at the end; references are kept beside it. `fault` breaks every rank of the case, not the reference."""
    began = time.monotonic()
    config = in_folder(case.config(), folder)
    try:
        deviations, notes = _prove(case, config, resume_on, folder, fault)
    except RankFailed as error:
        return Verdict(case=case, seconds=time.monotonic() - began, error=secrets.hide(str(error).strip()), resumed_on=resume_on)
    except Exception:  # what a session left cannot be read, say: one case that failed, and the others go on
        trace = secrets.hide(traceback.format_exc().strip())
        return Verdict(case=case, seconds=time.monotonic() - began, error=trace, resumed_on=resume_on)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _verdict(case, began, deviations, notes, resume_on)


def prove_other(case: Case, folder: Path, train: Callable[..., Evidence]) -> Verdict:
    """Another system's session: `train(config, first, rows, choose) -> Evidence`. It is neither resumed nor exported."""
    began, config = time.monotonic(), in_folder(case.config(), folder)
    known, limits, notes = reference(config, case.routing, folder.parent / "references"), limits_of(config), []
    session = lambda choose: train(config, first_of(config), rows_of(config), choose)
    try:
        evidence = session(known.choose)
        if known.choose is None and (ties := near_ties(evidence, known.evidence, limits)):
            notes.append(_told(ties))
            evidence = session(known.trace)
    except (RankFailed, ConfigError) as error:
        return Verdict(case=case, seconds=time.monotonic() - began, error=secrets.hide(str(error).strip()))
    deviations = list(compare(evidence, known.evidence, limits, config.model.num_experts))
    return _verdict(case, began, deviations, notes)


def in_folder(config: Config, folder: Path) -> Config:
    """With its runs there and a token cache beside it."""
    return changed(config, [f"run_dir={folder / 'run'}", f"data.cache_dir={folder.parent / 'cache'}"])


def _prove(case: Case, config: Config, resume_on: str, folder: Path, fault: Fault | None) -> tuple[list[Deviation], list[str]]:
    notes, limits = [], limits_of(config)
    known = reference(config, case.routing, folder.parent / "references")
    choose = known.choose
    views = observe.run(config, choose, fault)
    evidence = observe.gather(views, config)
    if choose is None and (ties := near_ties(evidence, known.evidence, limits)):
        notes.append(_told(ties))
        choose = known.trace
        shutil.rmtree(config.run_dir)
        views = observe.run(config, choose, fault)
        evidence = observe.gather(views, config)
    deviations = list(compare(evidence, known.evidence, limits, config.model.num_experts))
    deviations += _positions(views, config)
    deviations += _resume(case, config, resume_on, folder, evidence, views, known, choose, limits, fault)
    deviations += _export(config, folder, known, limits, notes, fault)
    return deviations, notes


def _verdict(case: Case, began: float, deviations: list[Deviation], notes: list[str], resumed_on: str = "") -> Verdict:
    broken = sorted((d for d in deviations if not d.passed), key=lambda d: -d.share)
    seconds = time.monotonic() - began
    return Verdict(case=case, seconds=seconds, worst=worst(deviations), broken=broken, resumed_on=resumed_on, notes=notes)


def _told(ties: list[str]) -> str:
    more = f" and {len(ties) - 3} more" * (len(ties) > 3)
    return f"near-tie, so the reference's choice was replayed: {'; '.join(ties[:3])}{more}"


def limits_of(config: Config) -> Limits:
    precision, o = config.precision.products, config.optim
    inside = precision == "fp32" and (o.algorithm == "muon" or o.moment_precision(precision) == "bf16")
    return LIMITS["fp32 with bf16 inside" if inside else precision]


# ---------------------------------------------------------------- the reference


def reference(config: Config, routing: str, folder: Path) -> Reference:
    """Made once for all cases that share it, kept in `folder`."""
    alone, rounded = changed(config, ALONE), limits_of(config) not in (LIMITS["fp64"], LIMITS["fp32"])
    nodes = nodes_of(config) if rounded else 1
    same = to_yaml(changed(alone, ["run_dir=x", "data.cache_dir=x"]))
    key = hashlib.sha256(f"{same} {routing} {nodes}".encode()).hexdigest()[:16]
    path = folder / f"{key}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = _make_reference(alone, routing, folder / f"{key}.{time.monotonic_ns()}", rounded, nodes)
        torch.save(made, partial := path.with_suffix(f".{time.monotonic_ns()}"))
        partial.rename(path)
    with torch.serialization.safe_globals([Evidence, Step]):
        evidence, trace, logits, forced = torch.load(path, weights_only=True)
    choose = replay(trace)
    return Reference(evidence=evidence, choose=choose if forced else make(routing, config), logits=logits, trace=choose)


def _make_reference(alone: Config, routing: str, folder: Path, rounded: bool, nodes: int) -> tuple[Evidence, dict, Tensor | None, bool]:
    rows, first = rows_of(alone), first_of(alone)
    choose = make(routing, alone)
    evidence = plain.train(alone, first, rows, choose)
    trace = trace_of(evidence)
    if not rounded:
        return evidence, trace, plain.logits(alone.model, evidence.steps[-1].tensors, tokens_of(alone, rows)), False
    config = in_folder(alone, folder)
    evidence = observe.gather(observe.run(config, replay(trace), nodes=nodes), config)
    logits = _exported_logits(config, folder)
    shutil.rmtree(folder)
    return evidence, trace, None if isinstance(logits, str) else logits, True


def rows_of(config: Config) -> list[Tensor]:
    """(N, S + 1 + depth) of each step."""
    corpus = open_corpus(
        config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, extra=config.model.mtp_depth, log=lambda line: None
    )
    num = config.sequences_per_step
    return [corpus.train(range(step * num, (step + 1) * num)) for step in range(config.train.steps)]


def first_of(config: Config) -> dict[str, Tensor]:
    """Masters and selection biases before the first step, flattened; FP64."""
    m, dtype = config.model, DTYPES[config.precision.compute]
    first = {}
    for name, shape in weight_shapes(m).items():
        if name.endswith(".bias"):
            first[name] = torch.zeros(shape, dtype=torch.float64).flatten()
        else:
            weight = initial_weight(name, torch.empty(shape, dtype=dtype, device="meta"), m, seed=config.train.seed)
            first[f"{name}.master"] = weight.double().flatten()
    return first


def tokens_of(config: Config, rows: list[Tensor]) -> Tensor:
    return rows[0][:2, : config.data.seq_len]


# ---------------------------------------------------------------- what a session leaves behind


def _positions(views: list[observe.View], config: Config) -> list[Deviation]:
    """Every sample once, and the place in the data as the checkpoint has it."""
    faults = observe.read_twice_or_never(views, config)
    steps, num = config.train.steps, config.sequences_per_step
    progress = read_extra(Path(config.run_dir) / "checkpoints" / f"step_{steps:08}")["progress"]
    wanted = {"step": steps, "tokens": steps * num * config.data.seq_len, "samples": steps * num, "stream": 0, "sample": steps * num}
    faults += [f"{name} after the last step is {progress[name]}, not {value}" for name, value in wanted.items() if progress[name] != value]
    return [Deviation(quantity="data position", where=fault, value=float("inf"), limit=0.0) for fault in faults]


def _resume(
    case: Case, config: Config, layout: str, folder: Path, evidence: Evidence, views: list[observe.View], known: Reference,
    choose: Choose | None, limits: Limits, fault: Fault | None,
) -> list[Deviation]:  # fmt: skip
    """The last step again, on another layout, from the checkpoint before it."""
    if config.train.steps < 2 or not layout:
        return []
    before = config.train.steps - 1
    start = f"{config.run_dir}/checkpoints/step_{before:08}"
    other = Case(layout=layout, options=case.options, routing=case.routing, base=case.base)
    resumed_config = changed(in_folder(other.config(), folder), [f"run_dir={folder / 'resumed'}", f"checkpoint.resume={start}"])
    later = observe.run(resumed_config, choose, fault)
    again = observe.gather(later, resumed_config)
    where = f"after step {before} on {layout}"
    found = list(resumed(again, evidence.steps[before - 1], where))
    tail = Evidence(first=known.evidence.first, steps=known.evidence.steps[before:])
    continued = Evidence(first=known.evidence.first, steps=again.steps, owners=again.owners, faults=again.faults)
    for d in compare(continued, tail, limits, config.model.num_experts, first_step=before + 1):
        found.append(dataclasses.replace(d, quantity=f"resumed {d.quantity}", where=f"{d.where}, on {layout}"))
    for fault_found in observe.read_twice_or_never(later, resumed_config):
        found.append(Deviation(quantity="resumed data position", where=f"{fault_found}, on {layout}", value=float("inf"), limit=0.0))
    for view, saved in zip(later, views):
        if view.rng != saved.steps[before - 1].rng:
            found.append(Deviation(quantity="random state", where=f"rank {view.rank} {where}", value=float("inf"), limit=0.0))
    return found


def _export(
    config: Config, folder: Path, known: Reference, limits: Limits, notes: list[str], fault: Fault | None
) -> list[Deviation]:  # fmt: skip
    logits = _exported_logits(config, folder, fault)
    if isinstance(logits, str):
        notes.append(f"not exported: {logits}")
        return []
    if known.logits is None:
        return []
    value = ((logits - known.logits).norm() / known.logits.norm()).item()
    return [Deviation(quantity="exported logits", where="the model after the last step", value=value, limit=limits.update)]


def _exported_logits(config: Config, folder: Path, fault: Fault | None = None) -> Tensor | str:
    """Of the first samples, by the model as exported and read again, FP64; or why it cannot be exported."""
    out = folder / "exported"
    (refused,) = fork_ranks(1, _exported, config.run_dir, out, fault)
    if refused:
        return refused
    model = load_pretrained(out, dtype=config.precision.compute)
    return model(tokens_of(config, rows_of(config))).double()


def _exported(run_dir: str, out: Path, fault: Fault | None) -> str:
    if fault is not None:
        fault()
    try:
        export(run_dir, out)
    except HFError as error:
        return str(error)
    return ""
