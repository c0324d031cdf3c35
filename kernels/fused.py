"""Elementwise arithmetic, written once as plain tensor functions, that torch.compile can turn into one loop where it is asked to.

Only pure functions are compiled: nothing with autograd inside, nothing that leaves a weight gradient to a store. Compiling costs a
second or two per function and process, and a C++ compiler on CPU; it is `launch.compile` in a run's configuration.
"""

import functools
from collections.abc import Callable

import torch


def fused(function: Callable) -> Callable:
    """`function(*args)` with one more keyword, `compiled`: whether torch.compile's version of it runs. Any shapes, any strides."""

    @functools.cache
    def compiled_version() -> Callable:
        return torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args, compiled: bool):
        return compiled_version()(*args) if compiled else function(*args)

    return call
