"""How the host learns what the device has computed: every value that a training step reads passes here.

A rehearsal, whose tensors have no values, makes them up in this one place.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .transport import Work


class HostReads:
    """Copies to the host's memory. Where tensors are there already (gloo), nothing is copied."""

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def wait(self, tensor: Tensor) -> Tensor:
        """On the host, when the device has come so far."""
        return tensor.cpu()

    def begin(self, tensor: Tensor, work: Work) -> Callable[[], Tensor]:
        """Of what an exchange under way brings. Returns at once; what it returns waits, and gives the copy. The caller keeps `tensor`
        until then.

        On a GPU the copy is on a stream of its own that waits for the exchange; nobody waits for it before the values are needed.
        """
        if not tensor.is_cuda:
            return lambda: (work.wait(), tensor)[1]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            work.wait()  # the stream, not the host
            host.copy_(tensor, non_blocking=True)
            copied = self.stream.record_event()
        return lambda: (copied.synchronize(), host)[1]
