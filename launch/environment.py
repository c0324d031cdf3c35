"""The environment variables that Shoestring reads and sets, all of them. Importing this imports nothing heavy: some must be set first."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..conf.schema import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among `world_size`, `local_world_size` of them on its machine, as torchrun or our own launcher numbers them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Place | None":
        """This process's place, or None where nobody has started it as a rank."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=local_world_size)


def restart() -> str:
    """Which of torchrun's restarts this is; "" where it is none."""
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"restart_{number}" if number != "0" else ""


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts_share_store() -> bool:
    """Whether torchrun may restart this rank, and would let it meet the others where the last meeting still stands in the store."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"


def session() -> str:
    """A name that all ranks and restarts of one job under torchrun share; "" where it was given none (`--rdzv-id`)."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job that this process is a part of. `restart`: how often it was requeued; `task`: of an array, "" where it is none."""

    id: str
    restart: int
    task: str
    nodes: str

    @classmethod
    def from_environment(cls) -> "SlurmJob | None":
        """None outside of Slurm."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        get = os.environ.get
        return cls(
            id=os.environ["SLURM_JOB_ID"],
            restart=int(get("SLURM_RESTART_COUNT", "0")),
            task=get("SLURM_ARRAY_TASK_ID", ""),
            nodes=get("SLURM_JOB_NODELIST", ""),
        )


def to_send() -> dict[str, str]:
    """For sbatch: the log of a job that is requeued goes on where it was."""
    return {**os.environ, "SBATCH_OPEN_MODE": "append"}


def prepare_torchrun() -> None:
    """For the ranks that torchrun is about to start from this process."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds to save after a SIGTERM, of which it would give thirty
    _ask_names_briefly()
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # ranks that share the agent's store do not survive the loss of one


def command(words: Sequence[str]) -> list[str]:
    """What a person would type to train with these settings again, in the way that this process was started."""
    if "SLURM_JOB_ID" in os.environ and "launch=slurm" in words:
        return ["shoestring", "launch", *words]
    if under_torchrun():
        return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "shoestring.train", *words]
    return [_program(), "train", *words]


def _program() -> str:
    """`shoestring` where the shell would find the one that is running, else its path (`make` does not activate .venv)."""
    running, found = Path(sys.argv[0]), shutil.which("shoestring")
    if running.name != "shoestring" or (found and os.path.realpath(found) == os.path.realpath(running)):
        return "shoestring"
    return os.path.relpath(running) if running.resolve().is_relative_to(Path.cwd()) else str(running)


def prepare(threads: int) -> None:
    """Call before torch is imported. What the user has set stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo's and c10d's chatter about sockets
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # what W&B's own processes crash with would go to its makers
    _ask_names_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork, and it says so on every rank


def _ask_names_briefly() -> None:
    """torch's store asks for the name of each rank that connects, one after another, and answers nobody meanwhile: an answer of the name
    server that is lost would hold all of them up for the resolver's 5 s. (Measured: docs/startup.md.)"""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")


def prepare_ranks(cluster: ClusterConfig, threads: int) -> None:
    """`prepare` of a process that is a rank, or starts some: with what its cluster says. `threads`: where the cluster says nothing."""
    for name, value in cluster.env.items():
        os.environ.setdefault(name, value)
    if cluster.threads and under_torchrun() and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # torchrun's, where the user has set none
    prepare(cluster.threads or threads)


def told(cluster: ClusterConfig) -> list[str]:
    """What a rank runs with of what its cluster says, in words: its threads, and each variable."""
    env = os.environ
    kept = lambda name, wanted: "" if env.get(name) == wanted else f" (the environment's; the cluster's is {wanted})"
    words = [f"OMP_NUM_THREADS={env.get('OMP_NUM_THREADS', '')}{kept('OMP_NUM_THREADS', str(cluster.threads))}"] if cluster.threads else []
    return words + [f"{name}={env.get(name, '')}{kept(name, wanted)}" for name, wanted in cluster.env.items()]


def record_flight(folder: Path) -> None:
    """Before NCCL is joined: its watchdog writes what was under way there before it ends a process (not tried: that takes two GPUs)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # from torch 2.13 on, and before
        os.environ.setdefault(name, str(folder.resolve() / "nccl_rank_"))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def prepare_launch(run_on_cpu: bool) -> None:
    """For the ranks that this process is about to start on this machine."""
    os.environ["PYTHONSAFEPATH"] = "1"  # else a rank started from the tree would find our `train` and `kernels` as top-level packages
    if run_on_cpu and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here; the host's own name need not resolve


def named(setting: str) -> str:
    """What a setting of the form env:NAME stands for; "" where there is no such variable."""
    return os.environ.get(setting.removeprefix("env:"), "") if setting else ""


def of_a_job() -> dict[str, str]:
    """For a command of ours that this process is about to start."""
    return os.environ | {"PYTHONSAFEPATH": "1"}


def become_rank(rank: int, world_size: int, store_port: int) -> None:
    """This process is a rank on this machine; its launcher has the store that they meet over."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": store_port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    # The last one is asked for by torch 2.11, which would keep the meetings of several tries apart in one store.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"})


def tell_deepspeed(device_type: str) -> None:
    """Call before deepspeed is imported: its own search guesses, warns, and cannot know `launch.device=cpu` on a machine with GPUs."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
