"""What this software costs beside kernels and links, on a CPU: of each phase of a block the time that its host takes, and how much longer
kernels take in it than on their own (colder caches, memory that is new); of each exchange likewise; of a step what is left.

Small models of several sizes are trained, as many processes as cores at once. What each phase took, beside what is projected for its
kernels, is a line: host + times x kernels. Then two by two in expert parallelism: what a forward takes beyond its phases is its exchanges'.
A CPU is its own host; of a GPU's nothing can be learnt here.
"""

import dataclasses
import json
import statistics
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...conf.compose import load
from ...conf.rules import replaced
from ...conf.schema import ClusterConfig, Config, PhaseConfig, StackConfig
from ...parallel.phases import MicroBatch, Pending
from ...parallel.schedule import Action, Op
from ...parallel.trace import Tracer
from ...train.engine import Engine
from ...train.metrics import replace_file
from ..local import fork_ranks
from ..simulate.stage import Compute, Exchange, Load, StageSteps, stages
from ..simulate.step import Job, project_step
from . import fit

STEPS, SLOW = 8, 2  # of each model; the first ones, which allocate
MARK = "# Measured by `shoestring bench fabric`"
MICRO_BATCHES = 2
# Width, heads, sequences of a micro-batch, their length, experts, width of each, vocabulary.
SIZES = (
    (32, 2, 1, 16, 16, 32, 512), (64, 2, 2, 64, 16, 64, 2048), (64, 4, 8, 128, 16, 64, 512), (192, 6, 2, 64, 16, 128, 512),
    (128, 2, 8, 128, 32, 64, 1024), (256, 4, 2, 256, 16, 256, 512), (96, 6, 1, 512, 16, 96, 512),
)  # fmt: skip
# Of the executor's phases, as whose they count: an exchange's rows are gathered for the experts.
AS = {"dispatch": "experts", "combine": "experts", "losses": "head"}

Measured = dict[str, float]  # by attention_F and so on, forward (of a micro-batch) and step: seconds of one, the median of steps


def measure(cluster: ClusterConfig, processes: int) -> tuple[StackConfig, list[str]]:
    """Shoestring's own stack with what is measured here, and lines about it."""
    usual = load(["stack=shoestring"]).stack
    plain = dataclasses.replace(usual, peer_wait=0.0, phases={}, host_us_per_step=0.0)
    replicas = max(1, min(processes, 8) // 2)
    layouts = [f"parallel.ep={ep} parallel.edp={2 * replicas // ep}" for ep in (1, 2)]
    words = [[*_words(*size, 2 * replicas), *layout.split()] for layout in layouts for size in SIZES]
    configs = [replaced(replaced(load(w), "cluster", cluster), "stack", plain) for w in words]
    found = list(zip(*fork_ranks(2 * replicas, _train, configs)))  # of each model, what each rank found
    phases, errors = _phases(configs[: len(SIZES)], found)
    own = dataclasses.replace(plain, name=cluster.name, phases=phases)
    split = [replaced(config, "stack", own) for config in configs[len(SIZES) :]]
    exchange, errors["exchange"] = _exchange(configs[len(SIZES) :], split, found[len(SIZES) :])
    own = dataclasses.replace(own, phases=phases | {"exchange": exchange})
    beyond = [
        statistics.median(measured["step"] for measured in of_ranks) - project_step(replaced(config, "stack", own), terms=False).ideal
        for config, of_ranks in zip(configs, found)
    ]
    own = dataclasses.replace(own, host_us_per_step=round(max(0.0, statistics.median(beyond)) * 1e6, 1))
    shown = ", ".join(f"{name} {100 * error:.0f} %" for name, error in errors.items())
    return own, [f"{len(configs)} models on {2 * replicas} processes; the lines are off what was measured, in the middle: {shown}"]


def _words(dim: int, heads: int, sequences: int, length: int, experts: int, hidden: int, vocab: int, processes: int) -> list[str]:
    return [
        "model=tiny", "data=synthetic", "optim.warmup_steps=1", "parallel.pp=1",
        f"model.dim={dim}", f"model.q_lora_rank={dim // 2}", f"model.kv_lora_rank={dim // 2}", f"model.num_heads={heads}",
        f"model.dense_hidden_dim={3 * dim}", f"model.num_experts={experts}", f"model.expert_hidden_dim={hidden}",
        f"model.vocab_size={vocab}", f"model.max_seq_len={length}", f"data.seq_len={length}", f"train.micro_batch_sequences={sequences}",
        f"train.global_batch_tokens={MICRO_BATCHES * processes * sequences * length}",
    ]  # fmt: skip


# ---------------------------------------------------------------- on a rank


def _train(configs: Sequence[Config]) -> list[Measured]:
    torch.set_num_threads(1)
    return [_steps(config) for config in configs]


def _steps(config: Config) -> Measured:
    engine, stopwatch = Engine(config), Stopwatch()
    shape, seed = (config.train.micro_batch_sequences, config.data.seq_len + 1), torch.Generator().manual_seed(engine.mesh.dp_rank)
    rows = torch.randint(config.model.vocab_size, shape, generator=seed)
    batches = [MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * config.num_micro_batches
    engine.executor.tracer = stopwatch
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(STEPS):
        stopwatch.seconds.clear()
        began = time.perf_counter()
        engine.train_step(batches, 1e-9)
        taken["step"].append(time.perf_counter() - began)
        for name, seconds in stopwatch.of_one(config).items():
            taken[name].append(seconds)
    return {name: statistics.median(seconds[SLOW:]) for name, seconds in taken.items()}


class Stopwatch(Tracer):
    """Adds up a step's phases and actions, where compute is done when its call returns."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def action(self, action: Action):
        return self._timed("action " + "".join(op.kind for op in action))

    def compute(self, op: Op, phase: str):
        return self._timed(f"{AS.get(phase, phase)}_{op.kind}")

    def weights(self, op: Op, phase: str):
        return self._timed(f"{AS.get(phase, phase)}_W")

    pack = compute

    def issue(self, op: Op, phase: str, pending: Pending) -> Pending:
        if pending.work is None:
            return pending

        def finish() -> tuple:
            with self.compute(op, phase):
                return pending.finish()

        return dataclasses.replace(pending, finish=finish)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def of_one(self, config: Config) -> Measured:
        """Of one phase of one micro-batch, and of its forward, in which nothing is done while an exchange is under way."""
        model, num = config.model, config.num_micro_batches
        routed = model.num_layers - model.num_dense_layers
        blocks = {"attention": model.num_layers, "experts": routed, "mlp": model.num_dense_layers, "embed": 1, "head": 1}
        of_one = {
            f"{phase}_{when}": self.seconds[f"{phase}_{when}"] / (num * count)
            for phase, count in blocks.items()
            for when in "FBW"
            if self.seconds[f"{phase}_{when}"]
        }
        return {**of_one, "forward": self.seconds["action F"] / num}


# ---------------------------------------------------------------- lines


def _steps_of(config: Config) -> StageSteps:
    """What is projected for one micro-batch."""
    job = Job.of(config)
    (steps,) = stages(config, job.rates, Load(), job.layers)
    return steps


def _phases(configs: Sequence[Config], measured: Sequence[Sequence[Measured]]) -> tuple[dict[str, PhaseConfig], dict[str, float]]:
    """By phase: its line, and how far that is off. `measured`: of each model, what each rank found."""
    alone = [{f"{s.name}_{w}": b.seconds for s in _steps_of(c) if isinstance(s, Compute) for w, b in s.alone.items()} for c in configs]
    names = [name for name in measured[0][0] if name not in ("forward", "step")]
    lines = {name: _line([(kernels[name], m[name]) for kernels, of_ranks in zip(alone, measured) for m in of_ranks]) for name in names}
    return {name: line for name, (line, _) in lines.items()}, {name: error for name, (_, error) in lines.items()}


def _exchange(alone: Sequence[Config], with_phases: Sequence[Config], measured: Sequence[Sequence[Measured]]) -> tuple[PhaseConfig, float]:
    """Of one exchange: what a forward takes beyond its phases, by what its links take alone."""
    points = []
    for bare, config, of_ranks in zip(alone, with_phases, measured):
        links = [s.alone["F"] for s in _steps_of(bare) if isinstance(s, Exchange) and s.alone]
        phases = sum(s.alone["F"].seconds for s in _steps_of(config) if isinstance(s, Compute))
        points += [(statistics.mean(links), max(m["forward"] - phases, 0.02 * m["forward"]) / len(links)) for m in of_ranks]
    return _line(points)


def _line(points: Sequence[tuple[float, float]]) -> tuple[PhaseConfig, float]:
    """Of (projected, measured) seconds; and the median of |line - measured| / measured."""
    host, times = fit.line(points) if any(x for x, _ in points) else (statistics.median(y for _, y in points), 1.0)  # no kernels
    error = statistics.median(abs(host + times * x - y) / y for x, y in points)
    return PhaseConfig(host_us=round(host * 1e6, 1), times=round(times, 3)), error


def write(path: Path, stack: StackConfig, notes: Sequence[str]) -> Path:
    """`conf/stack/NAME.yaml`: what differs from Shoestring's own on a GPU is measured, terms are its."""
    of = lambda t: f"{{low: {t.low:g}, likely: {t.likely:g}, high: {t.high:g}, source: {json.dumps(t.source)}}}"
    terms = "".join(f"  {name}: {of(term)}\n" for name, term in stack.terms.items())
    phases = "".join(f"  {name}: {{host_us: {p.host_us:g}, times: {p.times:g}}}\n" for name, p in stack.phases.items())
    comment = "\n".join(textwrap.wrap(f"{MARK}: {' '.join(notes)}", 138, subsequent_indent="#   "))
    text = f"""\
{comment}
name: {stack.name}
hidden: {stack.hidden:g}
peer_wait: {stack.peer_wait:g}
host_us_per_step: {stack.host_us_per_step:g}
phases:
{phases}terms:
{terms}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path
