"""The fields of what a run is priced by: a cluster's devices and links, and what software reaches of them."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from .section import Section

MEMORY_SHARES = {"norm": 0.38, "quantise": 0.6, "columns": 0.9, "permute": 0.79, "sum": 0.54, "swiglu": 0.68, "other": 0.48}


@dataclass(kw_only=True)
class RatesConfig(Section):
    """What software reaches of a device's figures and of its links': shares of them, 0 to 1, for plans. Defaults are what an H800 reaches,
    and priors for any other device; conf/cluster/h800.yaml says where each comes from."""

    # Matrix products, by precision; "fp8_wgrad" and so on where weight gradients differ. Share of the peak in products that are deep, and
    # the depth K at which half of it is reached.
    products: dict[str, float] = field(
        default_factory=lambda: {"fp8": 0.7, "fp8_wgrad": 0.43, "bf16": 0.75, "tf32": 0.7, "fp32": 0.75, "fp64": 0.75}
    )
    products_half: dict[str, float] = field(
        default_factory=lambda: {"fp8": 560, "fp8_wgrad": 50, "bf16": 250, "tf32": 250, "fp32": 100, "fp64": 100}
    )
    tile: int = 128  # of the result, edges of what one SM computes at a time
    # Attention's core, of the peak in its precision: forward, backward; half at the sequence length named.
    attention: dict[str, float] = field(default_factory=lambda: {"forward": 0.72, "backward": 0.545})
    attention_half: float = 770.0
    # Of the memory's rate: by kind of operator; "other" for those without one.
    memory: dict[str, float] = field(default_factory=lambda: dict(MEMORY_SHARES))
    launch_us: float = 5.0  # of each kernel
    sms: int = 132
    exchange_sms: int = 20  # of them, for exchanges while they are under way
    compute_beside_exchange: float = 0.925  # of its rate
    exchange_beside_compute: float = 0.75
    intra_node: float = 0.94  # of the links' rate, in large messages
    inter_node: float = 0.89
    intra_latency_us: float = 10.0
    inter_latency_us: float = 25.0


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
    kw_per_gpu: float = 1.3  # with its share of the node and of cooling
    # Of each device, hours between what stops a run: 419 interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783).
    mttf_gpu_hours: float = 50_700.0
    restart_minutes: float = 10.0  # from an interruption until the run goes on where its checkpoint is
    checkpoint_gb_s: float = 2.0  # per device, to storage
    rates: RatesConfig = field(default_factory=RatesConfig)
    # What ranks are told. `env`: environment variables, such as NCCL's; one that the user's own environment has stays as it is there.
    env: dict[str, str] = field(default_factory=dict)
    pin: str = "none"  # none | cores: each rank has its share of the CPUs | numa: those beside its GPU; launch/pinning.py
    threads: int = 0  # OMP_NUM_THREADS of each rank, likewise (but torchrun's own 1 gives way); 0: launch.threads


@dataclass(kw_only=True)
class TermConfig(Section):
    """Of what an ideal step leaves out: the likely value, and the interval around it. `source` is where it comes from."""

    low: float = MISSING
    likely: float = MISSING
    high: float = MISSING
    source: str = ""


@dataclass(kw_only=True)
class PhaseConfig(Section):
    """Of one phase in one pass: the device waits `host_us` for its host, and kernels take `times` what they take on their own."""

    host_us: float = 0.0
    times: float = 1.0


@dataclass(kw_only=True)
class StackConfig(Section):
    """What software, and a cluster in use, cost beside kernels and links: for plans. conf/stack/shoestring.yaml has the sources."""

    name: str = MISSING
    hidden: float = MISSING  # share of an overlapped action's exchanges that is under compute, where there is enough of it
    peer_wait: float = 0.0  # how late the last peer comes to an exchange, of the compute between two of them
    # attention_F, and so on: attention, experts, mlp (a dense block's), embed, head, predict; F, B, W. exchange: one of a block's four.
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    host_us_per_step: float = 0.0  # that the device waits for its host, beside those
    terms: dict[str, TermConfig] = field(default_factory=dict)  # of launch/simulate; `~stack.terms.NAME` removes one
    # What other software has and this has not, to price runs that others published. Memory is not counted with them, and no run starts.
    tensor: int = 1  # GPUs that share every matrix of a rank, and the tokens between them (tensor and sequence parallelism)
    context: int = 1  # GPUs that share every sequence of a rank
    sharded_weights: bool = False  # FSDP, ZeRO-3: weights are gathered for each block in each pass, their gradients scattered
    overlap_reduce: bool = False  # a stage's gradients travel from its last backward's start on, its weights back under its first forward
    block_scales: bool = True  # of FP8, as in DeepSeek-V3; false: a scale for each tensor, and weight gradients as fast as the rest

    @property
    def team(self) -> int:
        """GPUs that are one rank of the layout."""
        return self.tensor * self.context
