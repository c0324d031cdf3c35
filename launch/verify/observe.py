"""A training session of this code, watched on every rank: forked from this process, gathered into whole tensors.

Ranks run `train/trainer.py` as any run does, with data, checkpoints and all; a `Recorder` looks on.

L MoE layers   E experts   N samples of a step   S sequence length   K top-k
"""

import contextlib
import hashlib
import io
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ...conf.schema import Config
from ...parallel.dispatch import Dispatcher
from ...parallel.optimizer.zero import Chunk
from ...train import trainer
from ...train.engine import Engine
from ...train.step import StepResult, Watch
from ..local import fork_ranks
from .by_nodes import AddedByNodes
from .evidence import Choose, Evidence, Step


@dataclass(kw_only=True)
class Pieces:
    """What a rank owns at one moment. `expert_at` (L, E): the expert in each slot, whose slabs follow one another in stacked tensors."""

    expert_at: Tensor
    first_layer: int
    chunks: dict[str, Chunk]

    @classmethod
    def of(cls, engine: Engine, chunks: Mapping[str, Chunk], suffix: str = "") -> "Pieces":
        copies = {name + suffix: Chunk(c.numel, c.offset, c.data.detach().clone()) for name, c in chunks.items()}
        return cls(expert_at=engine.placement.expert_at.clone(), first_layer=engine.placement.first_layer, chunks=copies)


@dataclass(kw_only=True)
class Seen:
    """One step on one rank."""

    numbers: dict[str, float]
    loads_LE: Tensor
    grads: Pieces
    state: Pieces
    weights: dict[str, tuple[int, torch.dtype, int, str]]  # of each parameter held: offset, dtype, elements, digest
    biases: str  # a digest, as the next
    rng: str


@dataclass(kw_only=True)
class View:
    """One rank's session. `samples`: of the stream, by step, as they were read; `choices`: (S, K) by step, layer and sample."""

    rank: int
    pp_rank: int
    first: Pieces
    rng: str  # when it began
    steps: list[Seen] = field(default_factory=list)
    samples: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    choices: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


class Recorder(Watch):
    def __init__(self, config: Config, choose: Choose | None, nodes: int):
        self.batch, self.choose, self.nodes, self.view = config.sequences_per_step, choose, nodes, None
        self._grads: Pieces | None = None

    def dispatcher(self, made: Dispatcher) -> Dispatcher:
        return AddedByNodes(made, self.nodes) if self.nodes > 1 else made

    def begun(self, engine: Engine) -> None:
        first = Pieces.of(engine, engine.chunks(saving=True))
        self.view = View(rank=engine.mesh.rank, pp_rank=engine.mesh.pp_rank, first=first, rng=digest(torch.get_rng_state()))

    def routing(self, step: int, samples: Sequence[int]) -> Callable[..., Tensor]:
        self.view.samples[step] += samples
        within = [sample % self.batch for sample in samples]

        def choose(layer: int, select: Callable[[Tensor], Tensor], score_TE: Tensor) -> Tensor:
            expert_TK = self.choose(step, layer, samples, select, score_TE) if self.choose else select(score_TE)
            for sample, expert_SK in zip(within, expert_TK.sort(1).values.chunk(len(within))):
                self.view.choices[step, layer, sample] = expert_SK.clone()
            return expert_TK

        return choose

    def reduced(self, engine: Engine, norm: Tensor) -> None:
        self._grads = Pieces.of(engine, engine.optimizer.gradients(), ".grad")

    def stepped(self, engine: Engine, result: StepResult) -> None:
        r = result
        numbers = {
            "loss": r.loss, "grad_norm": r.grad_norm, "clip_coef": r.clip_coef, "balance_loss": r.balance_loss, "z_loss": r.z_loss,
            "router_entropy": r.router_entropy, "bias_norm": r.bias_norm, **{f"mtp_loss.{k}": loss for k, loss in enumerate(r.mtp_losses)},
        }  # fmt: skip
        state = Pieces.of(engine, engine.chunks(saving=True))
        weights = {s.name: (s.offset, s.param.dtype, s.param.numel(), digest(s.param.detach())) for s in engine.optimizer.specs.values()}
        digests = {"biases": digest(engine.biases), "rng": digest(torch.get_rng_state())}
        self.view.steps.append(Seen(numbers=numbers, loads_LE=r.loads, grads=self._grads, state=state, weights=weights, **digests))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def run(
    config: Config, choose: Choose | None = None, fault: Callable[[], None] | None = None, timeout_s: float = 300.0, nodes: int = 1
) -> list[View]:
    """A session of `config` on as many forked ranks as it wants. `fault()`: called first on each rank, to break something on purpose.
    `nodes`: of one rank, that it adds up copies as so many nodes would.

    Raises RankFailed where a rank raises, dies or hangs.
    """
    return fork_ranks(config.parallel.world_size, _rank, config, choose, fault, nodes, timeout_s=timeout_s)


def _rank(config: Config, choose: Choose | None, fault: Callable[[], None] | None, nodes: int) -> View:
    if fault is not None:
        fault()
    torch.manual_seed(zlib.crc32(f"{config.run_dir} {dist.get_rank()}".encode()))  # forks have the same: what is not restored shows
    recorder = Recorder(config, choose, nodes)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.run(config, torch.device("cpu"), log=lambda line: None, watch=recorder)
    return recorder.view


# ---------------------------------------------------------------- from pieces to whole tensors


def gather(views: list[View], config: Config) -> Evidence:
    """One session's evidence, and what its ranks alone give away: that they disagree, compute with weights that are not the owners', or
    own an element twice or not at all."""
    faults: list[str] = []
    first, owners = _whole([view.first for view in views], "before the first step", faults)
    first, steps = _by_expert(first, views[0].first), []
    if len(taken := {len(view.steps) for view in views}) > 1:
        faults.append(f"ranks took different numbers of steps: {sorted(taken)}")
    for number, seen in enumerate(zip(*(view.steps for view in views)), 1):
        when = f"in step {number}"
        grads, grad_owners = _whole([s.grads for s in seen], when, faults)
        state, state_owners = _whole([s.state for s in seen], when, faults)
        owners = owners | grad_owners | state_owners
        _agree(seen, when, faults)
        _published(seen, state, when, faults)
        tensors = _by_expert(grads, seen[0].grads) | _by_expert(state, seen[0].state)
        choices = _choices(views, sorted(views[0].samples)[number - 1], config)
        steps.append(Step(numbers=seen[0].numbers, loads_LE=seen[0].loads_LE, tensors=tensors, choices=choices))
    return Evidence(first=first, steps=steps, owners=owners, faults=faults)


def _published(seen: Sequence[Seen], state: Mapping[str, Tensor], when: str, faults: list[str]) -> None:
    """Every replica computes with its owners' masters, rounded to its own dtype."""
    for rank, s in enumerate(seen):
        for name, (offset, dtype, numel, found) in s.weights.items():
            if name + ".master" in state and digest(state[name + ".master"][offset : offset + numel].to(dtype)) != found:
                faults.append(f"{name} on rank {rank} {when} is not its master, rounded to {dtype}")


def _agree(seen: Sequence[Seen], when: str, faults: list[str]) -> None:
    for rank, s in enumerate(seen):
        for name, value in s.numbers.items():
            if value != seen[0].numbers[name]:
                faults.append(f"{name} {when} is {seen[0].numbers[name]!r} on rank 0 and {value!r} on rank {rank}")
        if not torch.equal(s.loads_LE, seen[0].loads_LE):
            faults.append(f"expert loads {when} differ between rank 0 and rank {rank}")
        if s.biases != seen[0].biases:
            faults.append(f"selection biases {when} differ between rank 0 and rank {rank}")


def _whole(of_ranks: list[Pieces], when: str, faults: list[str]) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, int, int]]]]:
    owners: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    whole: dict[str, Tensor] = {}
    for rank, pieces in enumerate(of_ranks):
        for name, c in pieces.chunks.items():
            whole.setdefault(name, torch.full((c.numel,), torch.nan, dtype=c.data.dtype))[c.offset : c.offset + len(c.data)] = c.data
            owners[name].append((c.offset, c.offset + len(c.data), rank))
    for name, held in owners.items():
        at = 0
        for begin, end, rank in [*sorted(held), (len(whole[name]), len(whole[name]), -1)]:
            if begin != at:
                missing, twice = f"elements {at} to {begin} have no owner", f"elements {begin} to {at} have an owner beside rank {rank}"
                faults.append(f"{name} {when}: {missing if begin > at else twice}")
            at = max(at, end)
    return whole, dict(owners)


def _by_expert(tensors: Mapping[str, Tensor], pieces: Pieces) -> dict[str, Tensor]:
    """Slabs in the order of experts, wherever they have been moved."""
    ordered = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." in name:
            slot_of_E = pieces.expert_at[int(name.split(".")[1]) - pieces.first_layer].argsort()
            ordered[name] = tensor.view(len(slot_of_E), -1)[slot_of_E].flatten()
    return ordered


def _choices(views: list[View], step: int, config: Config) -> dict[int, Tensor]:
    """(N, S, K) by layer; -1 where no rank told."""
    found = {key: chosen for view in views for key, chosen in view.choices.items() if key[0] == step}
    shape = (config.sequences_per_step, config.data.seq_len, config.model.top_k)
    choices = {layer: torch.full(shape, -1) for layer in sorted({layer for _, layer, _ in found})}
    for (_, layer, sample), chosen in found.items():
        choices[layer][sample] = chosen
    return choices


def read_twice_or_never(views: list[View], config: Config) -> list[str]:
    """What is wrong with the samples that a session read: each pipeline rank reads every sample of a step once."""
    faults = []
    for step in sorted(views[0].samples):
        wanted = list(range(step * config.sequences_per_step, (step + 1) * config.sequences_per_step))
        for pp_rank in range(config.parallel.pp):
            read = sorted(sample for view in views if view.pp_rank == pp_rank for sample in view.samples[step])
            if read != wanted:
                found = f"samples {read[:4]} ... ({len(read)}), not {wanted[0]} to {wanted[-1]}"
                faults.append(f"step {step + 1} on pipeline rank {pp_rank} read {found}")
    return faults
