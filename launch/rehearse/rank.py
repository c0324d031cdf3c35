"""The real step of one rank of a job, on tensors without values and a world without others, and what it was seen to do.

Everything is built and run as in training: `Engine` with its mesh, stages, optimizer and executor. On meta, operators allocate what they
would on a GPU, and the host's reads are answered (`routing.MadeUp`).

Left out is what is not on the device: the data pipeline, the moving average of the weights, offloaded masters and moments. `launch.compile`
is off: elementwise temporaries that it would save are there.
"""

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...conf.schema import Config, ConfigError
from ...kernels.grouped import row_alignment
from ...kernels.row_maps import rows_bound
from ...parallel import world
from ...parallel._torch import join_alone
from ...parallel.dispatch import DeepEpDispatcher, Dispatcher, LocalDispatcher
from ...parallel.host_reads import HostReads
from ...parallel.phases import MicroBatch
from ...parallel.schedule import SCHEDULES
from ...parallel.schedule.ops import Held
from ...train.engine import Engine
from ...train.model.decoder import DTYPES, is_expert
from ...train.step import Watch
from . import deep_ep
from .collectives import ANSWERS, Alone, Collectives
from .meter import Memory, Meter, Owned
from .remember import META, Remembered
from .routing import MadeUp, Routing

OPTIMIZER = "optimizer"  # the stretch after the last action


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One rank's step of the full batch. Peak and categories were measured with `micro_batches` of them, which reach it; FLOPs and bytes
    of actions are those times `of_micro_batches / micro_batches`: all are alike.

    `by_category`: weights, main_grads, optimizer, casts (to FP8), activations, exchange (buffers), working, other.
    `sent`: payload by (collective, link) as in `train/traffic.py`. `flops`: of all micro-batches, what was recomputed
    too; `optimizer_flops`: of what Muon multiplies.
    """

    rank: int
    stages: dict[int, list[int]]  # held: stage -> its blocks
    params: dict[str, int]  # dense, expert
    flops: int
    optimizer_flops: int
    peak_bytes: int
    by_category: dict[str, int]
    peak_at: str
    sent: dict[tuple[str, str], float]
    micro_batches: int
    of_micro_batches: int


def rehearse(config: Config, rank: int, *, imbalance: float = 1.0, reads: HostReads | None = None, like_cpu: bool = False) -> Rehearsal:
    """Raises ConfigError for what cannot be rehearsed. No process group may be open; the one that this opens is closed.

    `imbalance`: see `routing.py`. `reads`: what else answers the host. `like_cpu`: as over gloo, what was sent stays until somebody waits
    for it, and a call that computes returns when it is done.
    """
    config = rehearsable(config)
    if not 0 <= rank < config.parallel.world_size:
        raise ConfigError("ranks", rank, f"the job has ranks 0 to {config.parallel.world_size - 1}", config.parallel.world_size - 1)
    routing = Routing(config, rank % config.parallel.ep, imbalance)
    join_alone(config.parallel.world_size, rank)
    try:
        engine = Engine(config, META, watch=_Looks(routing), transport=Alone(told=not like_cpu), reads=reads or MadeUp(routing))
        engine.executor.enqueues = not like_cpu
        batches = [micro_batch(config) for _ in range(config.num_micro_batches)]
        num = enough(config)
        meter = metered(engine, batches, call=Remembered(ANSWERS | {"aten._grouped_mm": _grouped_mm}), used=used_rows(config, routing))
        run(engine, meter, batches[:num])
        return told(engine, meter, num)
    finally:
        world.leave()


def rehearsable(config: Config) -> Config:
    """As it is rehearsed. Raises ConfigError for what is not."""
    if config.optim.engine != "whole":
        raise ConfigError("optim.engine", config.optim.engine, "reduces and steps by another program's code: rehearsal runs ours", "whole")
    return replace(
        config,
        optim=replace(config.optim, ema_decay=0.0),
        launch=replace(config.launch, compile=False),
        parallel=replace(
            config.parallel, placement_interval=2 if config.parallel.placement_interval == 1 else config.parallel.placement_interval
        ),
    )


def enough(config: Config) -> int:
    """Micro-batches: two more than twice the pipeline ranks, or as many more as it takes until each holds as much at a time as in the full
    batch. At most those of the full batch."""
    p, full = config.parallel, config.num_micro_batches
    schedule = SCHEDULES[p.schedule]
    held = lambda num: [Held.by(actions) for actions in schedule.actions(p.pp, p.chunks, num)]
    fits = (num for num in range(2 * p.pp + 2, full) if schedule.rule(p.pp, p.chunks, num) is None)
    most = held(full)
    return next((num for num in fits if held(num) == most), full)


def micro_batch(config: Config) -> MicroBatch:
    size, seq_len = config.train.micro_batch_sequences, config.data.seq_len
    ids = lambda width: torch.empty(size, width, dtype=torch.int64, device=META)
    return MicroBatch(tokens_BS=ids(seq_len), targets_BN=ids(seq_len + config.model.mtp_depth))


def metered(engine: Engine, batches: list[MicroBatch], **how: Any) -> Meter:
    """A meter of this engine; its executor tells it what runs."""

    def owned() -> Owned:
        o, fp8 = engine.optimizer, engine.ops.fp8
        yield "weights", engine.parameters().values()
        yield "main_grads", o.main_grad.values()
        if not o.optim.offload:
            yield "optimizer", [chunk.data for chunk in o.state().values()]
        yield "casts", fp8.casts.tensors() if fp8 else ()
        yield "other", [engine.biases, *(t for batch in batches for t in (batch.tokens_BS, batch.targets_BN))]

    config = engine.config
    collectives = Collectives(engine.mesh.rank, config.cluster.gpus_per_node)
    memory = Memory(engine.device, owned, host=engine.optimizer.on_host())
    meter = Meter(memory, collectives, discards="norm" in config.train.recompute, **how)
    engine.executor.tracer = meter.tracer
    return meter


def run(engine: Engine, meter: Meter, batches: list[MicroBatch]) -> None:
    """One step."""
    watch = engine.watch
    engine.watch = _AtEnd(meter)
    with meter:
        engine.train_step(batches, lr=engine.config.optim.lr)
        meter.memory.begin("end")
    engine.watch = watch


def told(engine: Engine, meter: Meter, num: int) -> Rehearsal:
    full, own = engine.config.num_micro_batches, engine.parameters()
    experts = sum(param.numel() for name, param in own.items() if is_expert(name))
    more = Fraction(full, num)
    sent = {key: meter.in_actions.sent[key] * more + meter.beside.sent[key] for key in meter.in_actions.sent | meter.beside.sent}
    peak = meter.memory.peak
    return Rehearsal(
        rank=engine.mesh.rank,
        stages={index: [int(layer) for layer in stage.layers] for index, stage in engine.stages.items()},
        params={"dense": sum(param.numel() for param in own.values()) - experts, "expert": experts},
        flops=int(meter.in_actions.flops * more),
        optimizer_flops=meter.beside.flops,
        peak_bytes=peak.bytes,
        by_category=peak.by_category,
        peak_at=peak.at,
        sent={key: float(num_bytes) for key, num_bytes in sorted(sent.items())},
        micro_batches=num,
        of_micro_batches=full,
    )


class _Looks(Watch):
    """Where no counts are exchanged, what the host would be told is known as well."""

    def __init__(self, routing: Routing):
        self.routing = routing

    def dispatcher(self, made: Dispatcher) -> Dispatcher:
        if isinstance(made, DeepEpDispatcher):
            c = self.routing.config
            fake = functools.partial(deep_ep.Buffer, routing=self.routing, places=min(c.parallel.ep, c.cluster.gpus_per_node))
            made.make_buffer = functools.partial(fake, made.make_buffer.args[0])
        return _Local(made, self.routing.own_rows()) if isinstance(made, LocalDispatcher) else made


class _Local(LocalDispatcher):
    def __init__(self, made: LocalDispatcher, rows: list[int]):
        super().__init__(num_experts=made.num_experts, align=made.align, fp8=made.fp8)
        self.rows = rows

    def start(self, r, slot_of_E=None):
        super().start(r, slot_of_E)
        r.groups = replace(r.groups, on_host=self.rows)


class _AtEnd(Watch):
    def __init__(self, meter: Meter):
        self.meter = meter

    def reduced(self, engine: Engine, norm: Tensor) -> None:
        self.meter.memory.begin(OPTIMIZER)


def used_rows(config: Config, routing: Routing) -> dict[int, int]:
    """On one rank, a buffer for experts has room for the worst padding."""
    m, own = config.model, routing.own_rows()
    if config.parallel.ep > 1 or not m.num_moe_layers:
        return {}
    align = row_alignment(DTYPES[config.precision.compute], fp8=config.precision.linear == "fp8")
    return {rows_bound(routing.copies, m.num_experts, align): sum(own)}


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor, *_: Any) -> Tensor:
    """torch's own version for meta takes BF16 only."""
    return a.new_empty(*((len(ends),) if b.dim() == 2 else ()), len(a), b.shape[-1])
