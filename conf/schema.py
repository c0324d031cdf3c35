"""Every field a run has, and the rules between fields that need no knowledge of schedules or kernels.

Hydra composes the dataclasses while they are mutable; `resolve` checks them and returns them frozen. All code past the command
line receives these objects, never a `DictConfig`. Rules owned elsewhere (schedules, dispatchers) are called by `launch/validate.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """One thing wrong in a configuration: `field`, its value, the rule, and (where there is one) the nearest valid value."""

    def __init__(self, field: str, value: Any, rule: str, nearest: Any = None):
        self.field, self.value, self.rule, self.nearest = field, value, rule, nearest
        super().__init__(f"{field} = {value}: {rule}" + (f"; nearest valid value: {nearest}" if nearest is not None else ""))


class Section:
    """A dataclass that refuses assignment after `freeze()`: mutable while Hydra composes, constant once resolved."""

    def freeze(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                for item in value.values():
                    item.freeze() if isinstance(item, Section) else None
            elif isinstance(value, Section):
                value.freeze()
            elif isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
        object.__setattr__(self, "_frozen", True)
        return self

    def __setattr__(self, name, value):
        if getattr(self, "_frozen", False):
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} is fixed: use dataclasses.replace before the run starts")
        object.__setattr__(self, name, value)


@dataclass(kw_only=True)
class YarnConfig(Section):
    """Long-context rotary scaling (YaRN, arXiv 2309.00071). factor 1 is plain RoPE."""

    factor: float = 1.0
    original_max_seq_len: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(kw_only=True)
class ModelConfig(Section):
    """A DeepSeek-V3-shaped decoder: multi-head latent attention, a few dense blocks, then mixture-of-experts blocks."""

    name: str = MISSING
    num_layers: int = MISSING
    dim: int = MISSING
    vocab_size: int = MISSING
    max_seq_len: int = MISSING
    # multi-head latent attention
    num_heads: int = MISSING
    q_lora_rank: int = 0  # 0: queries straight from the block's input
    kv_lora_rank: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    rope_theta: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    # feed-forward
    num_dense_layers: int = 1  # the first blocks, without routing
    dense_hidden_dim: int = MISSING
    num_experts: int = MISSING
    num_shared_experts: int = 1
    top_k: int = MISSING
    expert_hidden_dim: int = MISSING
    num_groups: int = 1  # experts are in this many equal groups, one per node or so
    num_limited_groups: int = 1  # a token may use experts of at most this many groups
    norm_topk: bool = True
    route_scale: float = 1.0
    # the rest
    norm_eps: float = 1e-6
    init_std: float = 0.006
    tie_embeddings: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_hidden_dim(self) -> int:
        return self.num_shared_experts * self.expert_hidden_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers


@dataclass(kw_only=True)
class ParallelConfig(Section):
    """World = pp x edp x ep, pp outermost, ep innermost. Dense weights are replicated over edp x ep, experts over edp."""

    pp: int = 1
    edp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    chunks: int = 1  # pipeline stages per rank (interleaved schedules)
    dispatcher: str = "auto"  # auto: `local` where ep is 1, `alltoall` elsewhere

    @property
    def dp(self) -> int:
        return self.edp * self.ep

    @property
    def world_size(self) -> int:
        return self.pp * self.edp * self.ep

    @property
    def num_stages(self) -> int:
        return self.pp * self.chunks


@dataclass(kw_only=True)
class PrecisionConfig(Section):
    """dtype of weights and activations: fp32, bf16, or fp64 (for proofs). Main gradients, masters and norms are FP32 or wider."""

    name: str = MISSING
    compute: str = MISSING


@dataclass(kw_only=True)
class SourceConfig(Section):
    """One source of documents; several make a mixture by `weight` (share of training samples)."""

    kind: str = MISSING  # stdlib | files | hf | synthetic
    weight: float = 1.0
    paths: list[str] = field(default_factory=list)  # files: globs of .txt .jsonl .parquet (also .gz)
    column: str = "text"
    dataset: str = ""  # hf: name on the Hub, or a folder
    subset: str = ""
    split: str = "train"
    streaming: bool = False
    max_documents: int = 0  # 0: all
    num_documents: int = 0  # synthetic: how many to make


@dataclass(kw_only=True)
class TokenizerConfig(Section):
    """bytes: ids 0-255 and an end-of-document id. bpe: trained once on the corpus, cached. file: any tokenizer.json."""

    kind: str = "bpe"
    path: str = ""
    vocab_size: int = 0  # bpe; 0: the model's


@dataclass(kw_only=True)
class DataConfig(Section):
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_len: int = MISSING
    eval_fraction: float = 0.02  # of documents, held out by a hash of their text
    max_bad_fraction: float = 0.01  # quarantined documents above this share stop the run
    cache_dir: str = "~/.cache/shoestring"
    workers: int = 2


@dataclass(kw_only=True)
class OptimConfig(Section):
    """AdamW, its learning-rate shape, and the router's balancing."""

    engine: str = "whole"  # whole | deepspeed
    lr: float = MISSING
    final_lr: float = 0.0
    warmup_steps: int = 0
    constant_steps: int = 0  # at `lr`, after the warm-up; then a cosine to `final_lr`
    decay_steps: int = 0  # 0: until the run's last step
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms have none
    clip: float = 1.0
    bias_update_speed: float = 0.001
    sequence_balance_coef: float = 1e-4
    z_loss_coef: float = 0.0


@dataclass(kw_only=True)
class TrainConfig(Section):
    steps: int = MISSING
    global_batch_tokens: int = MISSING
    micro_batch_sequences: int = 1
    seed: int = 0
    eval_interval: int = 0  # steps; 0: only at the end
    eval_sequences: int = 64
    stop_after: int = 0  # stop cleanly after this many steps of this session; 0: run to the end


@dataclass(kw_only=True)
class CheckpointConfig(Section):
    interval: int = 100  # steps; one is always written at the end
    keep_last: int = 2
    async_save: bool = True
    resume: str = "auto"  # auto: the newest in the run directory, if any | never: refuse a directory that has one | a path


@dataclass(kw_only=True)
class ClusterConfig(Section):
    """What one device is and costs. Figures are the vendor's unless the file says otherwise."""

    name: str = MISSING
    device: str = MISSING
    price_per_gpu_hour: float = MISSING  # US dollars
    peak_tflops: dict[str, float] = field(default_factory=dict)  # dense, per device, by precision name
    memory_gb: float = MISSING  # 1e9 bytes
    memory_tb_s: float = MISSING
    gpus_per_node: int = 8
    intra_node_gb_s: float = MISSING  # per device and direction
    inter_node_gb_s: float = MISSING


@dataclass(kw_only=True)
class LaunchConfig(Section):
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 1  # per rank, on CPU
    timeout_s: float = 600.0  # of collectives
    wandb: str = "disabled"  # disabled | offline | online
    wandb_project: str = "shoestring"
    log_interval: int = 1


@dataclass(kw_only=True)
class Config(Section):
    """A whole run."""

    name: str = "run"
    run_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def sequences_per_step(self) -> int:
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def num_micro_batches(self) -> int:
        """Of each pipeline (data-parallel rank) in one optimizer step."""
        return self.sequences_per_step // (self.parallel.dp * self.train.micro_batch_sequences)


def register() -> None:
    """Give Hydra the schema, once per process and idempotent."""
    ConfigStore.instance().store(name="schema", node=Config)


def resolve(composed: DictConfig) -> Config:
    """The checked, frozen configuration. Raises ConfigError on a missing value, a wrong type or a broken rule."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "config", "???", str(error).splitlines()[0]) from None
    assert isinstance(config, Config)
    check(config)
    return config.freeze()


def nearest_key(key: str, schema: Any = Config) -> str | None:
    """The known dotted key most like an unknown one."""
    return next(iter(difflib.get_close_matches(key, known_keys(schema), n=1, cutoff=0.4)), None)


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of a schema; sources and peak_tflops are open dictionaries."""
    keys = []
    hints = {f.name: f.default_factory for f in dataclasses.fields(schema)}
    for name, factory in hints.items():
        keys.append(prefix + name)
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            keys += known_keys(factory, prefix + name + ".")
    return keys


# ---------------------------------------------------------------- rules


def check(c: Config) -> None:
    """Ranges of single fields first, then rules between fields: the first that fails is raised."""
    _check_ranges(c)
    _check_model(c.model)
    _check_layout(c)
    _check_batch(c)


def closest(value: int, candidates) -> int:
    return min(candidates, key=lambda n: (abs(n - value), n))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check_ranges(c: Config) -> None:
    positive = [
        *(f"model.{n}" for n in ("num_layers dim vocab_size max_seq_len num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
          "dense_hidden_dim num_experts top_k expert_hidden_dim num_groups num_limited_groups rope_theta norm_eps route_scale "
          "yarn.original_max_seq_len").split()),
        *(f"parallel.{n}" for n in "pp edp ep chunks".split()),
        *"data.seq_len optim.lr optim.eps train.steps train.global_batch_tokens train.micro_batch_sequences train.eval_sequences".split(),
        *"checkpoint.keep_last launch.threads launch.timeout_s launch.log_interval data.workers".split(),
    ]  # fmt: skip
    not_negative = [
        *"model.num_dense_layers model.num_shared_experts model.q_lora_rank model.init_std optim.final_lr optim.warmup_steps".split(),
        *"optim.constant_steps optim.decay_steps optim.weight_decay optim.bias_update_speed optim.sequence_balance_coef".split(),
        *"optim.z_loss_coef train.eval_interval train.stop_after train.seed checkpoint.interval cluster.price_per_gpu_hour".split(),
    ]
    for name in positive:
        value = _get(c, name)
        if not value > 0:
            raise ConfigError(name, value, "must be positive", 1 if isinstance(value, int) else None)
    for name in not_negative:
        value = _get(c, name)
        if not value >= 0:
            raise ConfigError(name, value, "must not be negative", 0)
    for name, low, high in (("optim.beta1", 0, 1), ("optim.beta2", 0, 1), ("data.eval_fraction", 0, 1), ("data.max_bad_fraction", 0, 1)):
        if not low <= _get(c, name) < high:
            raise ConfigError(name, _get(c, name), f"must lie in [{low}, {high})")
    if not c.optim.clip > 0:
        raise ConfigError("optim.clip", c.optim.clip, "must be positive (a very large value never clips)", 1.0)
    if not c.model.yarn.factor >= 1:
        raise ConfigError("model.yarn.factor", c.model.yarn.factor, "must be at least 1 (1 is plain RoPE)", 1.0)
    for name, allowed in {
        "precision.compute": ("fp32", "bf16", "fp64"), "optim.engine": ("whole", "deepspeed"), "data.tokenizer.kind": ("bytes", "bpe", "file"),
        "launch.device": ("auto", "cpu", "cuda"), "launch.wandb": ("disabled", "offline", "online"),
        **{f"data.sources.{s}.kind": ("stdlib", "files", "hf", "synthetic") for s in c.data.sources},
    }.items():  # fmt: skip
        choose(name, _get(c, name), allowed)
    for name, source in c.data.sources.items():
        if not source.weight > 0:
            raise ConfigError(f"data.sources.{name}.weight", source.weight, "must be positive")


def choose(name: str, value: str, allowed) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        nearest = next(iter(difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)), None)
        raise ConfigError(name, value, f"must be one of {', '.join(allowed)}", nearest)


def _check_model(m: ModelConfig) -> None:
    if m.qk_rope_head_dim % 2:
        raise ConfigError("model.qk_rope_head_dim", m.qk_rope_head_dim, "must be even: rotary embedding turns pairs", m.qk_rope_head_dim + 1)
    if m.num_dense_layers > m.num_layers:
        raise ConfigError("model.num_dense_layers", m.num_dense_layers, f"must not exceed num_layers = {m.num_layers}", m.num_layers)
    if m.num_experts % m.num_groups:
        raise ConfigError("model.num_groups", m.num_groups, f"must divide num_experts = {m.num_experts}",
                          closest(m.num_groups, divisors(m.num_experts)))  # fmt: skip
    if m.num_limited_groups > m.num_groups:
        raise ConfigError("model.num_limited_groups", m.num_limited_groups, f"must not exceed num_groups = {m.num_groups}", m.num_groups)
    if m.num_groups > 1 and m.num_experts // m.num_groups < 2:
        groups = [d for d in divisors(m.num_experts) if d == 1 or m.num_experts // d >= 2]
        raise ConfigError("model.num_groups", m.num_groups, "a group is ranked by its two best experts, so it needs two",
                          closest(m.num_groups, groups))  # fmt: skip
    reachable = m.num_experts // m.num_groups * m.num_limited_groups
    if m.top_k > reachable:
        raise ConfigError("model.top_k", m.top_k, f"must not exceed the {reachable} experts of {m.num_limited_groups} group(s)", reachable)


def _check_layout(c: Config) -> None:
    m, p = c.model, c.parallel
    if m.num_moe_layers and m.num_experts % p.ep:
        raise ConfigError("parallel.ep", p.ep, f"must divide model.num_experts = {m.num_experts}", closest(p.ep, divisors(m.num_experts)))
    if p.num_stages > m.num_layers:
        raise ConfigError("parallel.pp" if p.chunks == 1 else "parallel.chunks", p.pp if p.chunks == 1 else p.chunks,
                          f"{p.pp} ranks x {p.chunks} chunk(s) need as many blocks, model.num_layers = {m.num_layers}",
                          m.num_layers if p.chunks == 1 else max(1, m.num_layers // p.pp))  # fmt: skip


def _check_batch(c: Config) -> None:
    s, t, dp = c.data.seq_len, c.train, c.parallel.dp
    limit = c.model.max_seq_len
    if s > limit:
        raise ConfigError("data.seq_len", s, f"must not exceed model.max_seq_len = {limit}", limit)
    unit = s * dp * t.micro_batch_sequences
    if t.global_batch_tokens % unit:
        raise ConfigError("train.global_batch_tokens", t.global_batch_tokens,
                          f"must be a multiple of seq_len x dp x micro_batch_sequences = {s} x {dp} x {t.micro_batch_sequences} = {unit}",
                          max(1, round(t.global_batch_tokens / unit)) * unit)  # fmt: skip
    o = c.optim
    if o.decay_steps == 0 and o.warmup_steps + o.constant_steps > t.steps:
        raise ConfigError("optim.warmup_steps", o.warmup_steps, f"warm-up and constant steps must fit in train.steps = {t.steps}",
                          max(0, t.steps - o.constant_steps))  # fmt: skip


def _get(c: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        c = c[name] if isinstance(c, dict) else getattr(c, name)
    return c
