"""The layouts that a number of GPUs allows: meshes x schedules x dispatchers x micro-batches x splits of the layers, as words."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...conf.errors import ConfigError, divisors
from ...conf.rules import replaced
from ...conf.schema import ClusterConfig, Config, ParallelConfig
from ...parallel.schedule import SCHEDULES, share_layers
from ...parallel.schedule.stages import stages_text
from ...train.rank_share import stage_layers
from ..simulate.rates import Rates
from ..simulate.stage import Compute, Load, stages

# From the least to the most that backward computes again: the first that fits is the cheapest.
RECOMPUTE = ((), ("norm", "swiglu"), ("norm", "mla_up", "swiglu"), ("attention", "experts"))
MICRO_BATCHES = (1, 2, 4, 8)  # sequences
MOST_MICRO_BATCHES = 1024  # of a step: beyond, bubbles are small, and more layouts only cost time
# Layers are shared out by how long they take on this device, whatever the cluster: what is searched does not depend on its rates.
REFERENCE = ClusterConfig(
    name="reference", device="H100", price_per_gpu_hour=0.0, memory_gb=80.0, memory_tb_s=3.35, intra_node_gb_s=450.0, inter_node_gb_s=50.0,
    peak_tflops={"fp8": 1979, "bf16": 989, "tf32": 494, "fp32": 67, "fp64": 67},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    pp: int
    edp: int
    ep: int
    schedule: str = "1f1b"
    chunks: int = 1
    dispatcher: str = "auto"
    sequences: int = 1  # of a micro-batch
    recompute: tuple[str, ...] = ()
    stages: str = ""

    @classmethod
    def of(cls, config: Config) -> "Layout":
        p, t = config.parallel, config.train
        return cls(
            pp=p.pp, edp=p.edp, ep=p.ep, schedule=p.schedule, chunks=p.chunks, dispatcher=p.dispatcher,
            sequences=t.micro_batch_sequences, recompute=tuple(t.recompute), stages=p.stages,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, object]:
        """By configuration key."""
        return {
            "parallel.pp": self.pp, "parallel.edp": self.edp, "parallel.ep": self.ep, "parallel.schedule": self.schedule,
            "parallel.chunks": self.chunks, "parallel.dispatcher": self.dispatcher, "parallel.stages": self.stages,
            "train.micro_batch_sequences": self.sequences, "train.recompute": self.recompute,
        }  # fmt: skip

    @property
    def words(self) -> list[str]:
        """As a command line has them."""
        shown = {**self.settings, "train.recompute": f"[{','.join(self.recompute)}]", "parallel.stages": f"'{self.stages}'"}
        return [f"{key}={value}" for key, value in shown.items()]

    def apply(self, config: Config) -> Config:
        """Unchecked."""
        for key, value in self.settings.items():
            config = replaced(config, key, value)
        return config

    def __str__(self) -> str:
        sizes = f"pp {self.pp} x edp {self.edp} x ep {self.ep}"
        schedule = [self.schedule] * (self.pp > 1 or self.schedule != "1f1b")
        rest = [self.dispatcher] * (self.dispatcher != "auto") + [f"micro-batch {self.sequences}"] * (self.sequences > 1)
        again = [f"recompute {'+'.join(self.recompute)}"] * bool(self.recompute)
        return ", ".join([sizes, *schedule, *rest, *again, *[f"stages {self.stages}"] * bool(self.stages)])


def candidates(config: Config, gpus: int, fixed: frozenset[str]) -> Iterator[Layout]:
    """All that the numbers allow, without recomputation unless that is fixed; `validate` has the last word. `fixed`: keys that the user has
    set, which stay as they are."""
    m, asked, splits = config.model, Layout.of(config).settings, _Splits(config)
    usual = {key: asked[key] for key in fixed & asked.keys()}
    for pp in (pp for pp in divisors(gpus) if pp <= m.num_layers and usual.get("parallel.pp", pp) == pp):
        for ep in divisors(gpus // pp) if m.num_moe_layers else [1]:
            if (m.num_moe_layers and m.num_experts % ep) or usual.get("parallel.ep", ep) != ep:
                continue
            for layout in _of_mesh(config, pp, gpus // (pp * ep), ep, splits):
                layout = replace(layout, recompute=tuple(usual.get("train.recompute", ())))
                if all(layout.settings[key] == value for key, value in usual.items()):
                    yield layout


def _of_mesh(config: Config, pp: int, edp: int, ep: int, splits: "_Splits") -> Iterator[Layout]:
    for sequences in sorted({*MICRO_BATCHES, config.train.micro_batch_sequences}):
        num, rest = divmod(config.sequences_per_step, edp * ep * sequences)
        if rest or not 0 < num <= MOST_MICRO_BATCHES:
            continue
        for schedule, chunks in _schedules(pp, ep, num):
            if pp * chunks > config.model.num_layers:
                continue
            for dispatcher in _dispatchers(config, ep):
                for split in splits.of(pp, schedule, chunks):
                    yield Layout(
                        pp=pp, edp=edp, ep=ep, schedule=schedule, chunks=chunks, dispatcher=dispatcher, sequences=sequences, stages=split
                    )


def _schedules(pp: int, ep: int, num: int) -> Iterator[tuple[str, int]]:
    """On one pipeline rank only what runs a forward beside a backward differs from 1F1B, and only if there is anything to hide."""
    for name, schedule in SCHEDULES.items():
        if pp == 1 and name != "1f1b" and (name != "dualpipev" or ep == 1):
            continue
        for chunks in (1, 2):
            if schedule.rule(pp, chunks, num) is None:
                yield name, chunks


def _dispatchers(config: Config, ep: int) -> list[str]:
    gpus, asked = config.cluster.gpus_per_node, config.parallel.dispatcher
    if asked == "deepep":
        return ["deepep" if ep > 1 else "auto"]
    return ["auto"] if ep <= gpus or ep % gpus else ["hierarchical", "auto"]


class _Splits:
    """Layers shared out by FLOPs (no words: the trainer's own way), by how long they take on `REFERENCE`, head, embedding and multi-token
    prediction included, and as the user has it."""

    def __init__(self, config: Config):
        m, self.config = config.model, config
        alone = replaced(Layout(pp=1, edp=1, ep=1).apply(config), "cluster", REFERENCE)
        rates = Rates(cluster=REFERENCE, linear=config.precision.products, plain=config.precision.compute)
        (steps,) = stages(alone, rates, Load(), [range(m.num_blocks)])
        timed = [(step.name, sum(step.of(when, True).seconds for when in "FBW")) for step in steps if isinstance(step, Compute)]
        phases = [seconds for name, seconds in timed if name in ("attention", "experts", "mlp")]
        blocks = [sum(phases[2 * i : 2 * i + 2]) for i in range(m.num_blocks)]
        ends = lambda *names: sum(seconds for name, seconds in timed if name in names)
        self.layers, self.first = blocks[: m.num_layers], ends("embed")
        self.last = ends("head", "predict") + sum(blocks[m.num_layers :])
        self.made: dict[tuple[int, str, int], list[str]] = {}

    def of(self, pp: int, schedule: str, chunks: int) -> list[str]:
        """As `parallel.stages` wants them; no two that are alike."""
        key = pp, schedule, chunks
        if key not in self.made:
            asked = self.config.parallel.stages
            found: dict[tuple[range, ...], str] = {}
            for words in dict.fromkeys(("", self._by_time(*key), asked)):
                p = replace(self.config.parallel, pp=pp, schedule=schedule, chunks=chunks, stages=words)
                try:
                    found.setdefault(stage_layers(replace(self.config, parallel=p)), words)
                except ConfigError:  # the user's, of another number of stages
                    continue
                if words == asked:  # however it says it
                    found[stage_layers(replace(self.config, parallel=p))] = words
            self.made[key] = list(found.values())
        return self.made[key]

    def _by_time(self, pp: int, schedule: str, chunks: int) -> str:
        return _shared_out(schedule, pp, chunks, tuple(self.layers), self.first, self.last) if pp * chunks > 1 else ""


@functools.lru_cache(maxsize=1024)
def _shared_out(schedule: str, pp: int, chunks: int, layers: tuple[float, ...], first: float, last: float) -> str:
    parts = share_layers(ParallelConfig(pp=pp, schedule=schedule, chunks=chunks), layers, first=first, last=last)
    return stages_text(list(map(len, parts)))
