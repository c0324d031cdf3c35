"""Tokens to the ranks that hold their experts, and back.

A dispatcher answers three questions about one micro-batch's choice of experts: `start` begins to find out how many rows go where,
`to_experts` sends copies of the tokens, `to_tokens` brings rows back and adds each token's copies. Each of the two exchanges is the
backward of the other. `Dispatch` and `Combine` are the executor's phases over them.

An expert is computed in a *slot*: those of a rank are consecutive. Slot and expert are one number, unless experts have been moved
(`relocate.py`): then `start` is told where they are, and from there on the dispatcher speaks of slots.
"""

import functools
import importlib.util

import torch.distributed as dist

from ...conf.schema import Config, ConfigError, choose
from ..host_reads import HostReads
from ..transport import DIRECT, Transport
from .alltoall import AllToAllDispatcher
from .deepep import DeepEpDispatcher, deep_ep_buffer
from .hierarchical import HierarchicalDispatcher
from .local import LocalDispatcher
from .phases import Combine, Dispatch
from .routing import Dispatcher, Routing

__all__ = [
    "DISPATCHERS",
    "AllToAllDispatcher",
    "Combine",
    "DeepEpDispatcher",
    "Dispatch",
    "Dispatcher",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "Routing",
    "check",
    "make_dispatcher",
]

DISPATCHERS = ("local", "alltoall", "hierarchical")
OPTIONAL = ("deepep",)  # want a package and GPUs that are not everywhere


def check(config: Config) -> None:
    """Raises ConfigError for a dispatcher that does not exist or does not fit `parallel.ep`."""
    name, ep, gpus = config.parallel.dispatcher, config.parallel.ep, config.cluster.gpus_per_node
    choose("parallel.dispatcher", name, ("auto", *DISPATCHERS, *OPTIONAL))
    if name == "local" and ep > 1:
        raise ConfigError("parallel.dispatcher", name, f"reaches only this rank's experts, and parallel.ep = {ep}", "alltoall")
    if name == "hierarchical" and ep % gpus and gpus % ep:
        rule = f"goes by whole nodes, so of parallel.ep = {ep} and cluster.gpus_per_node = {gpus} one must divide the other"
        raise ConfigError("parallel.dispatcher", name, rule, "alltoall")
    if name == "deepep":
        _check_deep_ep(config)


def _check_deep_ep(config: Config) -> None:
    if importlib.util.find_spec("deep_ep") is None:
        rule = "wants the package deep_ep, which is not installed: see github.com/deepseek-ai/DeepEP"
        raise ConfigError("parallel.dispatcher", "deepep", rule, "alltoall")
    if config.parallel.ep == 1:
        raise ConfigError("parallel.dispatcher", "deepep", "exchanges nothing where parallel.ep = 1", "local")
    if config.precision.compute != "bf16":
        rule = f"has kernels for BF16 and FP8, and precision.compute = {config.precision.compute}"
        raise ConfigError("parallel.dispatcher", "deepep", rule, "alltoall")
    if config.precision.linear == "fp8" and config.model.dim % 128:
        rule = f"sends FP8 in whole blocks of 128, and model.dim = {config.model.dim}"
        raise ConfigError("parallel.dispatcher", "deepep", rule, "alltoall")


def make_dispatcher(
    name: str,
    *,
    num_experts: int,
    align: int,
    groups: dict[str, dist.ProcessGroup] | None,
    fp8: bool = False,
    transport: Transport = DIRECT,
    reads: HostReads | None = None,
) -> Dispatcher:
    """`groups`: `Mesh.ep`. `align`: rows per expert.

    `fp8`: what goes to experts is quantised before it goes, activations and their gradients; what comes back is not.
    """
    if name == "local":
        return LocalDispatcher(num_experts=num_experts, align=align, fp8=fp8)
    assert groups is not None
    if name == "deepep":
        buffer = functools.partial(deep_ep_buffer, groups["F"])
        return DeepEpDispatcher(num_experts=num_experts, align=align, ep=groups["F"].size(), make_buffer=buffer, fp8=fp8)
    make = HierarchicalDispatcher if name == "hierarchical" else AllToAllDispatcher
    return make(num_experts=num_experts, align=align, groups=groups, fp8=fp8, transport=transport, reads=reads)
