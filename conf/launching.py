"""The fields of how a run is started, watched and kept going; nothing here changes what it computes."""

from dataclasses import dataclass, field

from .section import Section


@dataclass(kw_only=True)
class SlurmConfig(Section):
    """A job under Slurm: what `sbatch` is asked for. Empty: the cluster's own default."""

    time: str = "1-00:00:00"  # limit of one link of the chain of jobs that a run becomes: hours:minutes:seconds, or days-hours
    signal_s: int = 300  # before that limit, ranks are told to save
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: list[str] = field(default_factory=list)  # nodes, or ranges of them such as n[3-5]
    options: list[str] = field(default_factory=list)  # further ones, as sbatch has them: --mail-type=END
    setup: list[str] = field(default_factory=list)  # lines of shell before the ranks start: module load cuda
    container: str = ""  # image, for Slurm's pyxis plugin (`srun --container-image`)
    mounts: list[str] = field(default_factory=list)  # of the container: HERE:THERE
    python: str = ""  # on the nodes; empty: the one that runs `shoestring launch`, in a container `python3`


@dataclass(kw_only=True)
class KubernetesConfig(Section):
    """A job on Kubernetes, as a JobSet."""

    image: str = ""  # with Shoestring in it; required
    namespace: str = "default"
    gpu_resource: str = "nvidia.com/gpu"
    claim: str = ""  # a PersistentVolumeClaim that all pods share, for runs and data; required
    mount: str = "/shared"  # where it is in the pods, and the working directory
    shm_gb: float = 64.0  # of /dev/shm in a pod
    grace_s: int = 300  # to save, when a pod is told to end
    max_restarts: int = 10  # of the whole set, beside what torchrun restarts in place


@dataclass(kw_only=True)
class AlertsConfig(Section):
    """What somebody should know of at once: said on the console, in W&B, in the run's alerts.jsonl, and wherever else is named here; once
    when it begins and once when it is over. 0: not watched."""

    stall_s: float = 300.0  # without a step; or five times the longest of the last ones, where that is more
    loss_spike: float = 8.0  # deviations above the median of the last steps, of loss or gradient norm
    max_vio: float = 3.0  # of the worst layer, median of the last steps
    mfu_drop: float = 0.3  # share of the run's own median that is lost, over the last steps and a minute
    window: int = 32  # these last steps
    budget: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.95])  # shares of each limit that are spent
    disk_checkpoints: float = 2.0  # there is no room for as many more
    webhook: str = ""  # env:NAME of the variable that holds an http or https address: each alert is posted there, as JSON
    command: list[str] = field(default_factory=list)  # a program and its arguments, run with each alert's JSON on standard input


@dataclass(kw_only=True)
class LaunchConfig(Section):
    how: str = "local"  # where `shoestring launch` starts ranks: local | torchrun | slurm | k8s
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 1  # per rank, on CPU
    compile: bool = False  # fuse norms, activations and rotations with torch.compile: half a minute at start, faster after
    timeout_s: float = 600.0  # of collectives
    hang_s: float = 0.0  # without a sign of life from a rank in a step, after which the launcher ends all of them; 0: as timeout_s
    max_restarts: int = 3  # in a row without a new checkpoint between them, of ranks that our launcher has started here
    elastic: bool = False  # under torchrun: on another number of ranks than the layout's, another `edp` that fits
    wandb: str = "disabled"  # disabled | offline | online
    wandb_project: str = "shoestring"
    wandb_group: str = ""  # of runs that belong together, such as a sweep
    prometheus_port: int = 0  # on 127.0.0.1 of the first rank's machine, whose /metrics may be scraped; 0: none
    prometheus_file: str = ""  # FILE.prom, for node_exporter's textfile collector; empty: none
    tensorboard: bool = False  # event files under run_dir/tensorboard
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    endpoint: str = ""  # launch=torchrun: HOST or HOST:PORT of the first node; empty: there is one node, this one
    port: int = 29400  # of the rendezvous, on the first node, where `endpoint` does not say
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    k8s: KubernetesConfig = field(default_factory=KubernetesConfig)
    log_interval: int = 1
    trace_interval: int = 0  # steps between traced ones, each a file under run_dir/traces; 0: none
