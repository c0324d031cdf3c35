"""The FP8 forms of weights, each made once while the weights stay what they are.

O output dim   I input dim   e experts on this rank
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from .quantise import Quantised, quantise_blocks


class Fp8Weight:
    """A weight (O, I), or experts' (e, O, I), in blocks of 128 x 128; `transposed` is the same codes and scales with I before O, for dgrad.

    A block transposed has the scale that it had: the two forms are one rounding of the weight.
    """

    def __init__(self, weight: Tensor):
        if weight.dim() == 2:
            self.blocks = quantise_blocks(weight)
        else:
            experts = [quantise_blocks(w_OI) for w_OI in weight.unbind(0)]
            self.blocks = Quantised(torch.stack([q.codes for q in experts]), torch.stack([q.scales for q in experts]))

    @cached_property
    def transposed(self) -> Quantised:
        return Quantised(self.blocks.codes.transpose(-1, -2).contiguous(), self.blocks.scales.transpose(-1, -2).contiguous())


class WeightCache:
    """Casts by weight. Whoever changes weights, or cannot know that nobody did, calls `clear` before they are next used.

    Kept by parameter, not by name: one that two stages share is cast once.
    """

    def __init__(self):
        self._casts: dict[Tensor, Fp8Weight] = {}  # tensors hash by identity

    @torch.no_grad()
    def of(self, weight: Tensor) -> Fp8Weight:
        if weight not in self._casts:
            self._casts[weight] = Fp8Weight(weight.detach())
        return self._casts[weight]

    def tensors(self) -> Iterator[Tensor]:
        """All that is held now."""
        for cast in self._casts.values():
            for form in vars(cast).values():  # `transposed` is there once it was asked for
                yield from (form.codes, form.scales)

    def clear(self) -> None:
        self._casts.clear()

    def __len__(self) -> int:
        return len(self._casts)

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._casts
