"""Which device a rank computes on."""

import torch

from ..conf.schema import Config, ConfigError
from .environment import Place
from .validate import check_gpu


def choose_type(config: Config) -> str:
    """`cpu` or `cuda`. Raises ConfigError for CUDA where there is none. On `launch.device=cpu`, CUDA is not even asked."""
    wanted = config.launch.device
    if wanted == "cpu":
        return "cpu"
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("launch.device", "cuda", "torch sees no GPU here (does nvidia-smi? is torch a CPU build?)", "cpu")
    return "cuda" if there else "cpu"


def start(config: Config, place: Place) -> torch.device:
    """This rank's device, current from now on. Raises ConfigError if it is not there, or lacks what the precision wants."""
    if choose_type(config) == "cpu":
        torch.set_num_threads(config.cluster.threads or config.launch.threads)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError("launch.device", "cuda", f"local rank {place.local_rank} has no GPU of its own: this machine has {count}")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    check_gpu(config, torch.cuda.get_device_capability(device))
    # In BF16 only gates are products of FP32: of tokens and weights that TF32 has exactly, summed in FP32; logits' gradients keep 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = config.precision.compute == "bf16"
    return device
