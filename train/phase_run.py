"""One phase of a run on this rank: its corpus, its engine, and what is done with them: read a step's samples, train, evaluate.

Everything in it is constant but the weights: where the next phase differs, another one is made.
"""

import functools
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..conf.phases import Phase
from ..parallel.groups import Mesh
from ..parallel.phases import IGNORED, MicroBatch
from ..parallel.transport import Transport
from .checksum import short
from .data.corpus import Corpus, DamagedSample
from .engine import Engine, learning_rate
from .guard import GoBack
from .replay import Pair, Replay
from .signals import Heard, pack, unpack
from .step import Gradients, StepResult, Watch
from .stragglers import Busy, Stragglers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out losses, nats per token; bits per byte of text where the tokenizer's ids are bytes."""

    loss: float
    by_source: dict[str, float]
    bits_per_byte: float | None
    seconds: float  # that it took


class PhaseRun:
    """Collective to build, as `Engine` is. `mesh`: another phase's, where the layout is the same."""

    def __init__(
        self,
        phase: Phase,
        corpus: Corpus,
        device: torch.device,
        *,
        mesh: Mesh | None = None,
        watch: Watch | None = None,
        beat: Busy | None = None,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.phase, self.corpus, self.device, self.beat, self.log = phase, corpus, device, beat or Busy(), log
        self.engine = Engine(phase.config, device, mesh, watch, Transport(self.beat.own), beat=self.beat)
        self.dp_rank = self.engine.mesh.dp_rank
        self.at_rest: dict[str, int] = {}  # after the last update; empty: not known
        self.stragglers, self.step_seconds = Stragglers(phase.config.parallel, phase.config.guard.stragglers), 0.0
        self.replay = Replay(phase.config.parallel, phase.config.guard.replay_interval, exact=device.type == "cpu")
        self.damage: str | None = None  # why the step's samples are not what they should be

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.phase.config.optim, step - self.phase.first_step, self.phase.num_steps)

    def agreed(self, step: int, samples: np.ndarray, **signals: float) -> tuple[Gradients, Heard]:
        """`gradients`, and what all ranks said with them; computed again where a replay finds others. Raises GoBack where memory has
        changed, WrongGradients where a rank goes on computing wrongly."""
        tries: list[list[Pair]] = []
        while True:
            ahead = self.replay.ahead(step + 1, tries)
            found = self.gradients(step, samples, ahead=ahead, **signals)
            heard = unpack(found.flags)
            if unclean := [str(rank) for rank, said in enumerate(heard.each["unclean"]) if said]:
                self.log(f"step {step + 1}: gradients of rank {', '.join(unclean)} were not zero before the step began: they are made so")
            if changed := self.changed(heard):
                raise GoBack(changed, without_since=False)
            if ahead is None or self.unreadable(heard):
                return found, heard
            tries.append(self.replay.differ(ahead, heard))
            once_more, told = self.replay.judge(step + 1, tries)
            if told:
                self.log(f"step {step + 1}: {told}")
            if not once_more:
                return found, heard
            self.engine.discard()

    def gradients(self, step: int, samples: np.ndarray, *, ahead: int | None = None, **signals: float) -> Gradients:
        """Of step `step` of the run (0 is the first) on these samples of the stream, those of all ranks. `signals`: see there. `ahead`:
        those of the team so far ahead are replayed first."""
        if self.phase.config.guard.checksums:
            signals["unclean"] = not self.engine.clean()
        self.beat("data", step + 1)
        self.damage, p = None, self.phase.config.parallel
        other = self._read(step, samples, (self.dp_rank + ahead * p.ep) % p.dp) if ahead is not None else ()
        return self.engine.gradients(self._read(step, samples), functools.partial(self._flags, **signals), other)

    def apply(self, step: int, found: Gradients) -> StepResult:
        result = self.engine.apply(found, self.learning_rate(step))
        self.at_rest = self.engine.sums() if self.phase.config.guard.checksums else {}
        self.beat.rest()
        return result

    def _flags(self, own: int = 0, replayed: int = 0, **signals: float) -> Tensor:
        """When backward is over: until then, memory may have changed that this step's gradients came from."""
        signals |= {"own": short(own), "replayed": short(replayed)}
        if self.at_rest:
            signals["changed"] = self.engine.sums() != self.at_rest
            signals |= {name: short(self.at_rest[name]) for name in ("dense", "experts")}
        signals["unreadable"] = self.damage is not None
        busy, self.step_seconds = self.beat.take()
        return pack(dist.get_rank(), dist.get_world_size(), memory=peak_memory(self.device), **busy, **signals)

    def late(self, step: int, heard: Heard) -> list[str]:
        """Who kept the others waiting in step `step` (0 is the first)."""
        return self.stragglers.hear(step + 1, heard.each, self.step_seconds)

    def changed(self, heard: Heard) -> str | None:
        """Whose memory is not what it should be; None if it all is. Alike on all ranks."""
        p = self.phase.config.parallel
        if ranks := [rank for rank, changed in enumerate(heard.each["changed"]) if changed]:
            return f"memory of rank {', '.join(map(str, ranks))} changed between two updates: weights, or the optimizer's state"
        for name, replica in (("dense", lambda rank: rank // p.dp), ("experts", lambda rank: (rank // p.dp, rank % p.ep))):
            alike: dict = {}
            for rank, value in enumerate(heard.each[name]):
                alike.setdefault(replica(rank), {}).setdefault(value, []).append(rank)
            for found in (found for found in alike.values() if len(found) > 1):
                odd = min(found.values(), key=len)
                rest = sorted(rank for ranks in found.values() for rank in ranks if ranks is not odd)
                return (
                    f"{name} weights of rank {', '.join(map(str, odd))} differ from those of their replicas on {', '.join(map(str, rest))}"
                )
        return None

    def unreadable(self, heard: Heard) -> str | None:
        """Whose samples are damaged. Alike on all ranks."""
        ranks = [str(rank) for rank, damaged in enumerate(heard.each["unreadable"]) if damaged]
        return f"damaged samples on rank {', '.join(ranks)}" if ranks else None

    def blame(self, step: int, samples: np.ndarray) -> list[str]:
        """Computed once more, and not summed over ranks: what is not finite, where, of which samples. Or which file is damaged. Collective;
        alike on all ranks."""
        mine = self._mine(samples, self.dp_rank)
        self.damage = None
        found = self.engine.blame(self._read(step, samples))
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, self.damage or (f"not finite: {found.sentence(mine.tolist())}" if found else None))
        return [f"rank {rank}: {sentence}" for rank, sentence in enumerate(said) if sentence]

    def _mine(self, samples: np.ndarray, dp_rank: int) -> np.ndarray:
        """(micro-batches, sequences of each): micro-batch i of data-parallel rank r has samples (i * dp + r) * B and on, so that any layout
        reads the same set."""
        c = self.phase.config
        return samples.reshape(-1, c.parallel.dp, c.train.micro_batch_sequences)[:, dp_rank]

    def _read(self, step: int, samples: np.ndarray, dp_rank: int | None = None) -> list[MicroBatch]:
        """Micro-batches of this rank, or of another. Damaged ones are replaced, and told in `damage`: the step is taken part in, and not
        applied."""
        indices = self._mine(samples, self.dp_rank if dp_rank is None else dp_rank)
        try:
            rows = self.corpus.train(indices.flatten(), phase=self.phase.stream)
        except DamagedSample as error:
            self.damage = str(error)
            rows = torch.zeros(indices.size, self.phase.config.data.seq_len + 1 + self.phase.config.model.mtp_depth, dtype=torch.int64)
        batches = [self._micro_batch(part) for part in rows.split(indices.shape[1])]
        for batch, of_batch in zip(batches, indices.tolist()):
            batch.choose = self.engine.watch.routing(step, of_batch)
        return batches

    def evaluate(self) -> Evaluation | None:
        """On `train.eval_sequences` held-out samples, shared among the sources (all, where there are fewer); None where there are none."""
        began = time.monotonic()
        sums = {name: self._evaluate(samples) for name, samples in self.corpus.eval_plan(self.phase.config.train.eval_sequences).items()}
        if not sums:
            return None
        loss, tokens, num_bytes = (sum(column) for column in zip(*sums.values()))
        return Evaluation(
            loss=loss / tokens,
            by_source={name: loss / tokens for name, (loss, tokens, _) in sums.items()},
            bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None,
            seconds=time.monotonic() - began,
        )

    def _evaluate(self, samples: range) -> tuple[float, int, int]:
        """(summed loss, tokens, bytes of text) of one source's samples."""
        c = self.phase.config
        size, dp, num = c.train.micro_batch_sequences, c.parallel.dp, c.num_micro_batches
        sums = (0.0, 0, 0)
        for first in range(samples.start, samples.stop, dp * size * num):
            self.beat("evaluation")
            batches = []
            for i in range(num):
                start = first + (i * dp + self.dp_rank) * size
                rows = self.corpus.eval([min(index, samples.stop - 1) for index in range(start, start + size)])
                rows[max(0, samples.stop - start) :, 1:] = IGNORED  # past the last: every rank still runs every micro-batch
                batches.append(self._micro_batch(rows, counted=False))
            num_bytes = sum(self.corpus.num_bytes(b.ahead(1)) or 0 for b in batches)
            sums = tuple(a + b for a, b in zip(sums, self.engine.evaluate(batches, num_bytes)))
        return sums

    def _micro_batch(self, rows_BW: Tensor, counted: bool = True) -> MicroBatch:
        """(B, S + 1 + depth) consecutive tokens. An IGNORED target's own input is never looked at as a target."""
        rows, seq_len = rows_BW.to(self.device), self.phase.config.data.seq_len
        tokens = rows[:, :seq_len].clamp(min=0).contiguous()  # IGNORED, where it stands in a row, is no token
        return MicroBatch(tokens_BS=tokens, targets_BN=rows[:, 1:].contiguous(), counted=counted)


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank has held at most: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
