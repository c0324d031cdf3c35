"""Tokens to the ranks that hold their experts, and back.

A dispatcher answers three questions about one micro-batch's choice of experts: `start` begins to find out how many rows go where,
`to_experts` sends copies of the tokens, `to_tokens` brings rows back and adds each token's copies. Each of the two exchanges is the
backward of the other. `Dispatch` and `Combine` are the executor's phases over them.

An expert is computed in a *slot*: those of a rank are consecutive. Slot and expert are one number, unless experts have been moved
(`relocate.py`): then `start` is told where they are, and from there on the dispatcher speaks of slots.
"""

import torch.distributed as dist

from ...conf.schema import Config, ConfigError, choose
from ..transport import DIRECT, Transport
from .alltoall import AllToAllDispatcher
from .local import LocalDispatcher
from .phases import Combine, Dispatch
from .routing import Dispatcher, Routing

__all__ = [
    "DISPATCHERS",
    "AllToAllDispatcher",
    "Combine",
    "Dispatch",
    "Dispatcher",
    "LocalDispatcher",
    "Routing",
    "check",
    "make_dispatcher",
]

DISPATCHERS = ("local", "alltoall")


def check(config: Config) -> None:
    """Raises ConfigError for a dispatcher that does not exist or does not fit `parallel.ep`."""
    choose("parallel.dispatcher", config.parallel.dispatcher, ("auto", *DISPATCHERS))
    if config.parallel.dispatcher == "local" and config.parallel.ep > 1:
        rule = f"reaches only this rank's experts, and parallel.ep = {config.parallel.ep}"
        raise ConfigError("parallel.dispatcher", "local", rule, "alltoall")


def make_dispatcher(
    name: str,
    *,
    num_experts: int,
    align: int,
    groups: dict[str, dist.ProcessGroup] | None,
    fp8: bool = False,
    transport: Transport = DIRECT,
) -> Dispatcher:
    """`groups`: the expert-parallel group once per direction ("F", "B"), so that both can be in flight. `align`: rows per expert.

    `fp8`: what goes to experts is quantised before it goes, activations and their gradients; what comes back is not.
    """
    if name == "local":
        return LocalDispatcher(num_experts=num_experts, align=align, fp8=fp8)
    assert groups is not None
    return AllToAllDispatcher(num_experts=num_experts, align=align, groups=groups, fp8=fp8, transport=transport)
