"""Every field a run has, by section, with its unit and its default; those of clusters and of launching are in files of their own.

`conf/rules.py` has the rules between fields, `conf/compose.py` fills these classes from YAML and the command line, checks them and
freezes them. All code past the command line receives a frozen `Config`, never a `DictConfig`.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from .errors import ConfigError, choose, closest, divisors
from .launching import AlertsConfig, KubernetesConfig, LaunchConfig, SlurmConfig
from .machines import ClusterConfig, PhaseConfig, RatesConfig, StackConfig, TermConfig
from .section import Section

__all__ = [
    "AlertsConfig", "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "DataConfig", "KubernetesConfig", "LaunchConfig",
    "ModelConfig", "OptimConfig", "ParallelConfig", "PhaseConfig", "PrecisionConfig", "RampConfig", "RatesConfig", "Section", "SlurmConfig",
    "SourceConfig", "StackConfig", "TermConfig", "TokenizerConfig", "TrainConfig", "YarnConfig",
    "choose", "closest", "divisors",
]  # fmt: skip


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
    score_func: str = "sigmoid"  # sigmoid | softmax (DeepSeek-V2)
    # multi-token prediction: blocks after the last that predict the tokens after the next one
    mtp_depth: int = 0
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
    def embeds_at_head(self) -> bool:
        """Whether the last pipeline stage needs the embedding."""
        return self.tie_embeddings or self.mtp_depth > 0

    @property
    def num_blocks(self) -> int:
        """Multi-token prediction's among them: block `num_layers + k` is its module k."""
        return self.num_layers + self.mtp_depth

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routing, from `num_dense_layers` on: a prediction module is like the last block."""
        return self.num_blocks - self.num_dense_layers if self.num_dense_layers < self.num_layers else 0


@dataclass(kw_only=True)
class ParallelConfig(Section):
    """World = pp x edp x ep, pp outermost, ep innermost. Dense weights are replicated over edp x ep, experts over edp."""

    pp: int = 1
    edp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    chunks: int = 1  # pipeline stages per rank (interleaved schedules; 2 in zbv and dualpipev)
    stages: str = ""  # blocks of each stage, such as "5|4*6|3": 5, six times 4, 3; empty: shared out by cost
    # local | alltoall | hierarchical (a token crosses once to each node of cluster.gpus_per_node) | deepep (if installed) | auto: local
    # where ep is 1, alltoall elsewhere
    dispatcher: str = "auto"
    comm_sms: int = 0  # GPU: of each communicator that exchanges tokens, the most thread blocks, and so SMs; 0: NCCL's own choice
    placement_interval: int = 0  # steps between moves of experts to ranks of even load; 0: experts stay where they are

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
    """dtype of weights and activations: fp32, bf16, or fp64 (for proofs). Main gradients, masters and norms are FP32 or wider.

    `linear`: what the linears of attention, feed-forward and experts multiply: compute (that dtype), or fp8 (DeepSeek-V3's recipe, over
    bf16). Embedding, head, gates, norms, attention itself and the entry of multi-token prediction never do.
    """

    name: str = MISSING
    compute: str = MISSING
    linear: str = "compute"
    sentinel_interval: int = 0  # steps between comparisons of FP8 linears with BF16 ones; 0: none
    sentinel_max_error: float = 0.15  # relative; a block of which a cast or a product is further off leaves FP8

    @property
    def products(self) -> str:
        """fp8, bf16, fp32 or fp64: what nearly all matrix products are made in, and a device's peak is looked up by."""
        return self.compute if self.linear == "compute" else self.linear


@dataclass(kw_only=True)
class SourceConfig(Section):
    """One source of documents; several make a mixture by `weight` (share of training samples)."""

    kind: str = MISSING  # stdlib | files | hf | synthetic
    weight: float = 1.0
    paths: list[str] = field(default_factory=list)  # files: folders or globs of .txt .jsonl .parquet (.txt and .jsonl also .gz)
    sample_by: str = "document"  # files, .txt: a document is a whole file (document), a line, or a paragraph between blank lines
    column: str = "text"
    dataset: str = ""  # hf: name on the Hub, or a folder
    subset: str = ""
    split: str = "train"
    revision: str = ""  # hf: branch, tag or commit; empty: main, as it was when the cache was first built
    streaming: bool = False
    max_documents: int = 0  # 0: all
    num_documents: int = 0  # synthetic: how many to make


@dataclass(kw_only=True)
class TokenizerConfig(Section):
    """bytes: ids 0-255 and an end-of-document id. bpe: trained once on the corpus, cached. file: any tokenizer.json."""

    kind: str = "bpe"
    path: str = ""
    end_of_document: str = ""  # file: the token that ends a document; empty: the usual spellings are tried
    vocab_size: int = 0  # bpe; 0: the model's


@dataclass(kw_only=True)
class DataConfig(Section):
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_len: int = MISSING
    fim_rate: float = 0.0  # share of training documents reordered as prefix, suffix, middle (fill in the middle)
    eval_fraction: float = 0.02  # of documents, held out by a hash of their text
    max_bad_fraction: float = 0.01  # quarantined documents above this share stop the run
    cache_dir: str = "~/.cache/shoestring"
    workers: int = 2
    skip: list[str] = field(default_factory=list)  # samples of the stream to leave out: "128-143"


@dataclass(kw_only=True)
class OptimConfig(Section):
    """The update, its learning-rate shape, what is added to the loss, and the router's balancing. Steps count from the phase's first."""

    engine: str = "whole"  # whole | deepspeed
    algorithm: str = "adamw"  # adamw | muon (matrices and experts; AdamW for embedding, head, gate and norms)
    moments: str = "auto"  # of AdamW: fp32 | bf16 | auto (bf16 where weights are, under engine whole; fp32 elsewhere)
    offload: bool = False  # masters and moments on the host, updated there
    ema_decay: float = 0.0  # of an average of the weights, kept on the host; 0: none
    lr: float = MISSING
    final_lr: float = 0.0
    warmup_steps: int = 0  # from 0
    constant_steps: int = 0  # at `lr`, after the warm-up
    decay: str = "cosine"  # then: cosine or linear to `final_lr`, or none
    decay_steps: int = 0  # 0: until the last step
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms have none
    clip: float = 1.0
    muon_momentum: float = 0.95
    bias_update_speed: float = 0.001
    sequence_balance_coef: float = 1e-4
    z_loss_coef: float = 0.0
    mtp_weight: float = 0.3  # of multi-token prediction's mean loss over depths

    def moment_precision(self, compute: str) -> str:
        """fp64, fp32 or bf16: AdamW's two moments, of weights in `compute`."""
        if compute == "fp64":
            return "fp64"
        if self.moments == "auto":
            return "bf16" if compute == "bf16" and self.engine == "whole" else "fp32"
        return self.moments


@dataclass(kw_only=True)
class RampConfig(Section):
    """Batch growing from `start_tokens` to `train.global_batch_tokens`, by `increment_tokens` at a time, over the first `tokens`."""

    tokens: int = 0  # 0: no ramp
    start_tokens: int = 0
    increment_tokens: int = 0


@dataclass(kw_only=True)
class TrainConfig(Section):
    """`tokens` and `steps` are a whole run's, or a phase's."""

    steps: int = MISSING
    tokens: int = 0  # where given, this is the length, and `steps` follows from it
    global_batch_tokens: int = MISSING
    ramp: RampConfig = field(default_factory=RampConfig)
    micro_batch_sequences: int = 1
    recompute: list[str] = field(default_factory=list)  # in backward, instead of keeping: norm mla_up swiglu; or whole: attention experts
    seed: int = 0
    eval_interval: int = 0  # steps; 0: only at the end
    eval_sequences: int = 64
    stop_after: int = 0  # stop cleanly after this many steps of this session; 0: run to the end


@dataclass(kw_only=True)
class CheckpointConfig(Section):
    interval: int = 100  # steps; 0: not by steps. One is always written at the end
    interval_seconds: float = 0.0  # on the first rank's clock, after the first step that begins when they have passed; 0: not by time
    optimal_interval: bool = False  # as often as costs least, by what saves are measured to cost and cluster.mttf_gpu_hours
    keep_last: int = 2
    async_save: bool = True
    resume: str = "auto"  # auto: the newest in the run directory, if any | never: refuse a directory that has one | a path
    trust: list[str] = field(default_factory=list)  # of somebody else's checkpoint the word that its refusal names: 16 digits of a hash
    signers: str = ""  # an OpenSSH file of allowed signers: a checkpoint from elsewhere must then be signed by one of them


@dataclass(kw_only=True)
class GuardConfig(Section):
    """What a run does about steps that look wrong; `train/guard.py` has the rules."""

    spike: float = 10.0  # deviations above the median of the last `window` steps, of a loss or a gradient norm, that make a step doubtful
    window: int = 64
    patience: int = 3  # steps in a row that cannot be trained on: with so many, back to the last checkpoint
    rollbacks: int = 3  # in a row, with no new checkpoint between
    checksums: bool = True  # of weights and moments around every step: memory that changes by itself is found
    replay_interval: int = 200  # in steps: gradients are computed twice, by different ranks, and compared; 0: never
    stragglers: float = 0.2  # of a step, that a rank keeps the others waiting, step after step, from which on it is told; 0: never


@dataclass(kw_only=True)
class Config(Section):
    """A whole run. `phases`: stretches of it, in order, each a complete configuration made from the run's by what it changes; a run
    without any is one phase. `conf/phases.py` has their lengths and batches."""

    name: str = "run"
    run_dir: str = "runs/${name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stack: StackConfig = field(default_factory=StackConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    # What the run may cost, restarts and lost work included; then it saves and stops. 0: no limit.
    budget_usd: float = 0.0
    budget_gpu_hours: float = 0.0
    max_tokens: int = 0
    deadline: str = ""  # ISO 8601, such as 2026-12-24T18:00+01:00
    phases: dict[str, "Config"] = field(default_factory=dict)

    @property
    def sequences_per_step(self) -> int:
        """Of the full batch, after a ramp."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def num_micro_batches(self) -> int:
        """Of each pipeline (data-parallel rank) in one optimizer step of the full batch."""
        return self.sequences_per_step // (self.parallel.dp * self.train.micro_batch_sequences)
