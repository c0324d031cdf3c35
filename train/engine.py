"""One rank's share of a training step: its stages, its executor and its optimizer, built from a configuration.

The step reads as the recipe does: run every micro-batch, sum gradients over replicas, scale once, clip by the global norm, update,
move the routers' biases. The loop around it (data, checkpoints, records) is `train/trainer.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conf.schema import Config, OptimConfig
from ..kernels.fp8_layers import Fp8Linears
from ..kernels.fp8_weights import WeightCache
from ..kernels.grouped import row_alignment
from ..kernels.ops import Ops
from ..kernels.weight_grad import WeightGradStore
from ..parallel.dispatch import make_dispatcher
from ..parallel.executor import Executor
from ..parallel.groups import Mesh
from ..parallel.host_reads import HostReads
from ..parallel.optimizer.make import make_optimizer
from ..parallel.optimizer.zero import Chunk, Spec
from ..parallel.phases import MicroBatch
from ..parallel.placement import rank_overload
from ..parallel.relocate import Placement
from ..parallel.schedule import Action, direction_of, proven
from ..parallel.trace import Tracer
from ..parallel.transport import DIRECT, Transport
from .checksum import checksum
from .model.decoder import DTYPES, Stage, is_expert, materialise, named_weights
from .model.moe import Balance
from .owned import muon_matrices
from .rank_share import stage_layers
from .replay import repeatable
from .sentinel import Sentinel
from .step import Beat, Blame, Gradients, StepResult, Totals, Watch, silent

ROUTER_SUMS = ("balance", "z", "entropy")  # of `Routing.sums`


class Engine:
    """Collective to build: every rank of an initialised world makes one. Weights are those of `config.train.seed`.

    `mesh`: one of the same layout, to be used again; None makes one. `transport`: what token exchanges and pipeline transfers pass.
    `reads`: what every value passes that the step reads on the host. `beat` is told where in its step this rank is.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        mesh: Mesh | None = None,
        watch: Watch | None = None,
        transport: Transport = DIRECT,
        reads: HostReads | None = None,
        beat: Beat = silent,
    ):
        self.config, self.device, self.watch, self.transport = config, torch.device(device), watch or Watch(), transport
        self.reads, self.beat = reads or HostReads(), beat
        self.mesh = mesh or Mesh.create(
            config.parallel,
            dist.get_rank(),
            embeds_at_head=config.model.embeds_at_head,
            gpus_per_node=config.cluster.gpus_per_node,
            timeout_s=config.launch.timeout_s,
        )
        self.dtype = DTYPES[config.precision.compute]
        store = WeightGradStore()
        fp8 = Fp8Linears(casts=WeightCache(), store=store) if config.precision.linear == "fp8" else None
        self.ops = Ops(store=store, fp8=fp8, compiled=config.launch.compile, recompute=frozenset(config.train.recompute))
        self.placement = Placement(config, self.device)
        self.stages = self._build_stages()
        self.sentinel = Sentinel(config=config, fp8=fp8, stages=self.stages, device=self.device) if fp8 else None
        self.biases = self._share_biases()
        self.optimizer = make_optimizer(config.optim, self._specs())
        self.optimizer.waiting = transport.waiting
        for stage in self.stages.values():
            stage.prepare()
        self.executor = self._build_executor()

    # ------------------------------------------------------------ building

    def _build_stages(self) -> dict[int, Stage]:
        c, mesh = self.config, self.mesh
        name = c.parallel.dispatcher
        if name == "auto":
            name = "alltoall" if c.parallel.ep > 1 else "local"
        fp8 = self.ops.fp8 is not None
        align = row_alignment(self.dtype, fp8=fp8)
        dispatcher = make_dispatcher(
            name, num_experts=c.model.num_experts, align=align, groups=mesh.ep, fp8=fp8, transport=self.transport, reads=self.reads
        )
        dispatcher = self.watch.dispatcher(dispatcher)
        balance = Balance(sequence_coef=c.optim.sequence_balance_coef, z_coef=c.optim.z_loss_coef, token_weight=1.0 / self.nominal_tokens)
        layers = stage_layers(c)
        stages: dict[int, Stage] = {}
        for index in mesh.my_stages:
            is_last = index == mesh.num_stages - 1
            with torch.device("meta"):
                stages[index] = Stage(
                    c.model,
                    layers=layers[index],
                    is_first=index == 0,
                    is_last=is_last,
                    ep=c.parallel.ep,
                    balance=balance,
                    dtype=self.dtype,
                    dispatcher=dispatcher,
                    ops=self.ops,
                    shared_embed=stages[0].embed if is_last and c.model.embeds_at_head and 0 in stages else None,
                    slot_of=self.placement.slot_of,
                )
            materialise(stages[index], seed=c.train.seed, ep_rank=mesh.ep_rank, device=self.device)
        return stages

    def _specs(self) -> list[Spec]:
        """Each parameter with its replica group: experts over edp, an embedding on both ends over two stages, the rest over dp."""
        mesh, specs = self.mesh, []
        for stage, name, param in named_weights(self.stages):
            group, numel, offset = mesh.dense, param.numel(), 0
            if is_expert(name):
                group, numel, offset = mesh.expert, param.numel() * mesh.parallel.ep, param.numel() * mesh.ep_rank
            elif name == "embed" and mesh.embed is not None:
                group = mesh.embed
            matrices = muon_matrices(self.config.model, name, param.shape) if self.config.optim.algorithm == "muon" else ()
            decay = param.dim() > 1
            specs.append(Spec(name=name, param=param, group=group, numel=numel, offset=offset, stage=stage, decay=decay, matrices=matrices))
        return specs

    def _build_executor(self) -> Executor:
        c, mesh = self.config, self.mesh

        @functools.cache
        def actions(num_micro_batches: int) -> list[Action]:
            return proven(c.parallel.schedule, c.parallel.pp, c.parallel.chunks, num_micro_batches)[mesh.pp_rank]

        depth = c.model.mtp_depth
        return Executor(
            transport=self.transport,
            stages={index: stage.phases for index, stage in self.stages.items()},
            mesh=mesh,
            actions=actions,
            store=self.ops.store,
            boundary=lambda num_tokens: torch.empty(num_tokens, c.model.dim, dtype=self.dtype, device=self.device),
            enqueues=self.device.type != "cpu",
            tick=functools.partial(self.beat, ""),
            loss_weights=torch.tensor([1.0] + [c.optim.mtp_weight / max(1, depth)] * depth, dtype=torch.float64, device=self.device),
        )

    @property
    def nominal_tokens(self) -> int:
        """Of a micro-batch: what backward divides the summed loss by."""
        return self.config.train.micro_batch_sequences * self.config.data.seq_len

    def _heads(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Those that end, and have their loss, on this rank."""
        ways, last = len(self.mesh.placements), self.mesh.num_stages - 1
        ends_here = lambda i: self.mesh.holder(last, direction_of(i, len(batches), ways)) == self.mesh.pp_rank
        return [batch for i, batch in enumerate(batches) if ends_here(i)]

    # ------------------------------------------------------------ one step

    def train_step(self, batches: Sequence[MicroBatch], lr: float, flags: Tensor | None = None) -> StepResult:
        """`gradients`, then `apply`. Raises FloatingPointError, on all ranks and before any weight changes, if their norm is not finite."""
        found = self.gradients(batches, flags)
        if not math.isfinite(found.grad_norm):
            raise FloatingPointError(f"gradient norm is {found.grad_norm} (loss {found.loss}): no weight was changed")
        return self.apply(found, lr)

    def gradients(
        self, batches: Sequence[MicroBatch], flags: Tensor | Callable[..., Tensor] | None = None, replay: Sequence[MicroBatch] = ()
    ) -> Gradients:
        """Of this data-parallel rank's micro-batches, as many on every rank. Collective; then `apply` or `discard`, on every rank.

        `flags`: a 1-D FP64 tensor, added over ranks beside the step's own counts; or what makes it, called when backward is over.
        `replay`: another rank's micro-batches. What these give is thrown away; `flags` is called with `replayed` and `own`, checksums of it
        and of what the rank's own give. On every rank or on none.
        """
        if replay:
            with repeatable(self.device):
                replayed = self._replay(replay)
                self.beat("forward and backward")
                self._forget_casts()
                losses = self.executor.step(batches)
            flags = functools.partial(flags, replayed=replayed, own=self._found(losses))
        else:
            self.beat("forward and backward")
            self._forget_casts()
            losses = self.executor.step(batches, done=self._reduce)
        self.beat("reduce")
        self.optimizer.reduce()  # what remains
        totals = self._reduce_counts(losses, batches, flags)
        # Gradients are of sums over nominal_tokens; this makes them the mean over the tokens that the step really had.
        norm = self.optimizer.norm(self.nominal_tokens / totals.tokens)
        return Gradients(loss=totals.losses[0] / totals.tokens, grad_norm=self._value(norm), norm=norm, totals=totals)

    def discard(self) -> None:
        """Of gradients that will not be applied: as if they had never been made."""
        self.optimizer.discard()

    def clean(self) -> bool:
        """Before a step: whether no gradient is anything but zero. If one was, it is now."""
        clean = checksum(self.optimizer.main_grad.values()) == 0
        if not clean:
            self.discard()
        return clean

    def _replay(self, batches: Sequence[MicroBatch]) -> int:
        """A checksum of what these micro-batches give here. Nothing is left of them: no sum over replicas, no count, no span. But what the
        sentinel looks at, it looks at here: some rank does so in every team's first micro-batch, as it would otherwise."""
        self.beat("replay")
        self._forget_casts()
        tracer, self.executor.tracer = self.executor.tracer, Tracer()
        found = self._found(self.executor.step(batches))
        self.executor.tracer = tracer
        self._forget_pass()
        return found

    def _found(self, losses: Tensor) -> int:
        """A checksum of what a pass has found so far, on this rank alone: gradients, losses, what routers counted."""
        stats = [t for stage in self.stages.values() for s in stage.stats.values() for t in (s.load_E, *s.sums.values())]
        return checksum([*self.optimizer.main_grad.values(), losses, *stats])

    def _forget_pass(self) -> None:
        for stage in self.stages.values():
            for stats in stage.stats.values():
                stats.take()
        self.discard()

    def blame(self, batches: Sequence[MicroBatch]) -> "Blame | None":
        """What this rank's own gradients and losses of these micro-batches have that is not finite; nothing is summed over replicas."""
        self._forget_casts()
        self.executor.step(batches)
        weights = [name for name, grad in self.optimizer.main_grad.items() if not grad.isfinite().all()]
        losses = {i: loss.tolist() for i, loss in self.executor.losses.items()}
        self._forget_pass()
        bad = sorted(i for i, loss in losses.items() if not all(map(math.isfinite, loss)))
        return Blame(weights=weights, micro_batches=bad) if weights or bad else None

    def apply(self, found: Gradients, lr: float) -> StepResult:
        """The update, and what follows from what was counted. Collective."""
        norm, totals, grad_norm = found.norm, found.totals, found.grad_norm
        self.watch.reduced(self, norm)
        self.beat("update")
        coefficient = self.optimizer.step(norm, lr)
        self._update_biases(totals.loads)
        overload = rank_overload(totals.loads, self.config.parallel.ep, self.placement.expert_at)
        self.placement.after_step(totals.loads, self.optimizer, self.mesh.dense)
        c, routed = self.config.optim, totals.tokens * max(1, self.config.model.num_moe_layers)
        result = StepResult(
            loss=found.loss,
            mtp_losses=[loss / totals.tokens for loss in totals.losses[1:]],
            tokens=totals.tokens,
            grad_norm=grad_norm,
            clip_coef=self._value(coefficient),
            balance_loss=c.sequence_balance_coef * totals.router_sums[0] / totals.tokens,
            z_loss=c.z_loss_coef * totals.router_sums[1] / totals.tokens,
            router_entropy=totals.router_sums[2] / routed,
            loads=totals.loads,
            rank_overload=overload,
            bias_norm=self._value(self.biases.double().norm()),
            flags=totals.flags,
        )
        self.watch.stepped(self, result)
        return result

    def _reduce(self, stage: int) -> None:
        """Of a stage that adds no more to its gradients, the sums over replicas, under what the others still have to do. Not where the
        last stage adds to the first one's embedding: that is done when both are."""
        if not (stage == 0 and self.config.model.embeds_at_head and self.mesh.num_stages - 1 in self.stages):
            self.optimizer.reduce(stage)

    def evaluate(self, batches: Sequence[MicroBatch], count: int = 0) -> tuple[float, int, int]:
        """(summed loss of the next token, tokens, `count`s) over data-parallel ranks; targets that are IGNORED do not count. Collective."""
        self._forget_casts()
        losses = self.executor.evaluate(batches) * self.nominal_tokens
        counted_here = self.mesh.holder(self.mesh.num_stages - 1, 0) == self.mesh.pp_rank
        counts = [_num_targets(self._heads(batches), self.reads), count * counted_here]
        totals = torch.cat([self.reads.wait(losses[:1]), torch.tensor(counts, dtype=torch.float64)]).to(self.device)
        dist.all_reduce(totals)
        loss, tokens, count = self.reads.wait(totals).tolist()
        return loss, int(tokens), int(count)

    def _forget_casts(self) -> None:
        """Before every pass: since the last, the optimizer may have stepped, a checkpoint been loaded, an expert moved."""
        if self.ops.fp8 is not None:
            self.ops.fp8.casts.clear()

    def _reduce_counts(self, losses: Tensor, batches: Sequence[MicroBatch], flags: Tensor | Callable | None) -> Totals:
        """One all-reduce over the world for everything that is counted: FP64 holds integers exactly to 9e15."""
        m = self.config.model
        flags = torch.zeros(0, dtype=torch.float64) if flags is None else flags() if callable(flags) else flags
        losses = self.reads.wait(losses) * self.nominal_tokens
        tokens = torch.tensor([_num_targets(self._heads(batches), self.reads)], dtype=torch.float64)
        router_sums = torch.zeros(len(ROUTER_SUMS), dtype=torch.float64)
        loads = torch.zeros(m.num_moe_layers, m.num_experts, dtype=torch.float64)
        for stage in self.stages.values():
            for layer, stats in stage.stats.items():
                load_E, sums = stats.take()
                loads[layer - m.num_dense_layers] = self.reads.wait(load_E).double()
                router_sums += torch.stack([self.reads.wait(sums[name]).double() for name in ROUTER_SUMS]) if sums else 0
        parts = [losses, tokens, router_sums, flags, loads.flatten()]
        packed = torch.cat(parts).to(self.device)
        dist.all_reduce(packed)
        losses, tokens, router_sums, flags, loads = self.reads.wait(packed).split([len(part) for part in parts])
        return Totals(
            losses=losses.tolist(),
            tokens=int(tokens.item()),
            router_sums=router_sums.tolist(),
            flags=flags,
            loads=loads.to(torch.int64).view(m.num_moe_layers, m.num_experts),
        )

    def _share_biases(self) -> Tensor:
        """(MoE layers, experts): the selection biases of the whole model, kept alike on every rank; this rank's routers use their rows."""
        m = self.config.model
        biases = torch.zeros(m.num_moe_layers, m.num_experts, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        for stage in self.stages.values():
            for layer, block in stage.layers.items():
                if block.is_moe:
                    block.router.bias = biases[int(layer) - m.num_dense_layers]
        return biases

    def _update_biases(self, loads: Tensor) -> None:
        """Aux-loss-free balancing (V3 §2.1.2): up where an expert had less than the mean of the global batch, down where more."""
        if loads.numel():
            short = loads.sum(1, keepdim=True) - loads * loads.shape[1]  # in whole numbers: a GPU's mean of equal loads may be off by a bit
            self.biases += self.config.optim.bias_update_speed * short.sign().to(self.biases)

    def _value(self, scalar: Tensor) -> float:
        return self.reads.wait(scalar).item()

    # ------------------------------------------------------------ state

    def chunks(self, *, saving: bool) -> dict[str, Chunk]:
        """What a checkpoint holds of this rank: its optimizer pieces, and the routers' biases (rank 0 saves them, all load them)."""
        chunks = dict(self.optimizer.state())
        if not saving or self.mesh.rank == 0:
            for row, bias_E in enumerate(self.biases):
                layer = row + self.config.model.num_dense_layers
                chunks[f"layers.{layer}.router.bias"] = Chunk(bias_E.numel(), 0, bias_E)
        return chunks

    def sums(self) -> dict[str, int]:
        """Checksums of what nothing changes between two updates: dense weights, experts' (replicas of both are alike), and the rest."""
        named = self.parameters().items()
        return {
            "dense": checksum(param for name, param in named if not is_expert(name)),
            "experts": checksum(param for name, param in named if is_expert(name)),
            "state": checksum([*self.optimizer.at_rest(), self.biases]),
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: param for _, name, param in named_weights(self.stages)}


def _num_targets(batches: Sequence[MicroBatch], reads: HostReads) -> int:
    return int(reads.wait(torch.stack([b.num_targets for b in batches]).sum())) if batches else 0


def learning_rate(o: OptimConfig, step: int, num_steps: int) -> float:
    """Of optimizer step `step` (0 is the first) of a phase of `num_steps`: linear warm-up, constant, a decay to `final_lr`, and that from
    then on."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    past = step - o.warmup_steps - o.constant_steps
    if past < 0 or o.decay == "none":
        return o.lr
    decay = o.decay_steps or num_steps - o.warmup_steps - o.constant_steps
    share = min(1.0, past / max(1, decay - 1)) if not o.decay_steps else min(1.0, past / decay)
    left = 0.5 * (1 + math.cos(math.pi * share)) if o.decay == "cosine" else 1 - share
    return o.final_lr + (o.lr - o.final_lr) * left
