"""Copies between a device and the host's memory, beside compute."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostLink:
    """On CUDA: pinned memory, and a stream for each direction. On a CPU the same calls copy at once; what is on meta has a host there."""

    def __init__(self, device: torch.device):
        self._device, self._host = device, torch.device("meta" if device.type == "meta" else "cpu")
        self._down, self._up = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,), on the host."""
        return torch.empty(numel, dtype=dtype, device=self._host, pin_memory=self._down is not None)

    def download(self, host: Tensor, source: Tensor) -> Callable[[], None]:
        """Start `host.copy_(source)`, after the work that is enqueued; the result, called, waits until it is there."""
        if self._down is None:
            host.copy_(source)
            return lambda: None
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host.copy_(source, non_blocking=True)
            return self._down.record_event().synchronize

    def upload(self, target: Tensor, host: Tensor) -> None:
        """Start `target.copy_(host)`, of one dtype, after the work that is enqueued. See `join`."""
        if self._up is None:
            target.copy_(host)
            return
        self._up.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._up):
            target.copy_(host, non_blocking=True)

    def join(self) -> None:
        """What is enqueued from here on sees all uploads."""
        if self._up is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._up)
