"""What is known of a training session, whoever ran it: all that its steps computed, in whole tensors and by global names.

A session of this code on any layout (`observe.py`), the plain model (`plain.py`) and other systems (`autoep.py`) all give this, so that
one comparison (`compare.py`) serves them all.

L MoE layers (modules of multi-token prediction among them)   E experts   N samples of a step   S sequence length   K top-k
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# (step, layer, samples, the router's own select, score_TE) -> expert_TK: decides the routing. Samples are numbered on from step to step.
Choose = Callable[[int, int, Sequence[int], Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step.

    numbers   loss, mtp_loss.0 ..., grad_norm, clip_coef, lr, balance_loss, z_loss, router_entropy, bias_norm; those that its source knows
    loads_LE  copies of tokens that went to each expert, int64, of the global batch
    tensors   flattened, by name: "embed.grad" (mean over the step's tokens, before clipping); after the step "embed.master",
              "embed.exp_avg", "embed.exp_avg_sq", "embed.ema", "layers.1.router.bias" as far as there are such
    choices   by layer, (N, S, K) int64: each token's experts, ascending
    margins   by layer, (N, S): by how much the scores would have to change for another choice; only where the source knows
    """

    numbers: dict[str, float]
    loads_LE: Tensor
    tensors: dict[str, Tensor]
    choices: dict[int, Tensor] = field(default_factory=dict)
    margins: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """`first`: "embed.master" ... and biases before the first step. `owners`: by tensor's name, (begin, end, rank) of who held which part.

    `faults`: what is wrong without any comparison, such as ranks that disagree, or an element that two ranks own. `complete`: it holds all
    that there is; another system may not tell everything.
    """

    first: dict[str, Tensor]
    steps: list[Step]
    owners: Mapping[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    complete: bool = True
