"""An exponential moving average of the weights that a rank owns, on the host, updated beside the next step's compute.

average = decay * average + (1 - decay) * master, after each step
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .host import HostLink


class Average:
    """Of live masters, by name, (n,) each, in their dtype. It begins at the masters, where nothing is loaded over it."""

    def __init__(self, masters: Mapping[str, Tensor], decay: float):
        self._masters, self._decay = masters, decay
        device = next(iter(masters.values())).device if masters else torch.device("cpu")
        self._link = HostLink(device)
        self._averages = {name: torch.full_like(m, torch.nan, device="cpu") for name, m in masters.items()}
        # Masters on the host are read where they lie: they do not change before `begin` of the next step has waited.
        self._copies = masters if device.type == "cpu" else {name: self._link.empty(m.numel(), m.dtype) for name, m in masters.items()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._in_flight: Future | None = None
        self._begun = False

    def begin(self, *, anew: bool = False) -> None:
        """To call before masters change. Waits for the last update; pieces that nothing was loaded over start at their masters.

        `anew`: pieces may have been loaded since the last call.
        """
        averages = self.read()
        if anew or not self._begun:
            for name, average in averages.items():
                if average[0].isnan():
                    average.copy_(self._masters[name])
        self._begun = True

    def update(self) -> None:
        """After masters changed; returns before it is done."""
        if self._copies is self._masters:
            arrivals = [lambda: None]
        else:
            arrivals = [self._link.download(self._copies[name], m) for name, m in self._masters.items()]
        self._in_flight = self._thread.submit(self._add, arrivals)

    def read(self) -> dict[str, Tensor]:
        """Live averages, complete."""
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None
        return self._averages

    @torch.no_grad()
    def _add(self, arrivals: list[Callable[[], None]]) -> None:
        for arrived in arrivals:
            arrived()
        for name, average in self._averages.items():
            average.lerp_(self._copies[name], 1 - self._decay)
