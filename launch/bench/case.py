"""What a measurement is made of: one op on one shape, an exact result to hold it against, and what a user would otherwise call.

T tokens   R rows of experts   M rows, N outputs, K inputs of a linear   e experts   D model dim   F hidden dim   H heads   S positions
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels.configs import KernelConfig

CAST_DB = 28.0  # least of a cast to E4M3; of normal numbers it has 31.6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all cases. `linears`: (N, K). `published`: DeepGEMM's rates in TFLOP/s, on an H800, as its repository has them."""

    tokens: int
    linears: tuple[tuple[int, int], ...]
    experts: int
    rows_per_expert: int
    grouped: tuple[tuple[int, int], ...]
    dim: int
    hidden: int
    latent: int
    routed_experts: int  # that a router chooses from
    layer_experts: int  # of a whole MoE layer that fits one device
    top_k: int
    heads: int
    seq_len: int
    vocabulary: int
    published: dict[tuple[int, int], float]
    published_grouped: dict[tuple[int, int], float]

    @property
    def rows(self) -> int:
        return self.experts * self.rows_per_expert


FACTS = Sizes(  # DeepSeek-V3's matrices, 4096 tokens; 4 experts of one GPU with 8192 rows each
    tokens=4096, linears=((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)),
    experts=4, rows_per_expert=8192, grouped=((4096, 7168), (7168, 2048)), dim=7168, hidden=2048, latent=512, routed_experts=256,
    layer_experts=32, top_k=8, heads=128, seq_len=4096, vocabulary=129280,
    published={(2112, 7168): 1127, (24576, 1536): 1212, (32768, 512): 775, (7168, 16384): 1520, (4096, 7168): 1410, (7168, 2048): 1168},
    published_grouped={(4096, 7168): 1346, (7168, 2048): 1214},
)  # fmt: skip
SMALL = Sizes(  # for correctness alone, on a CPU: ends inside a block, several experts
    tokens=160, linears=((144, 256), (128, 192)), experts=3, rows_per_expert=128, grouped=((256, 128),), dim=256, hidden=128, latent=192,
    routed_experts=64, layer_experts=16, top_k=8, heads=2, seq_len=64, vocabulary=512, published={}, published_grouped={},
)  # fmt: skip


class Maker:
    """Makes inputs: normal numbers, of which no two tensors have the same."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device, self.seed = device, seed
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).mul_(scale).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a user would otherwise call. `prepare` turns the case's arguments into its own, untimed. `read`: as the case's, for results that
    can be held against its exact ones; None where operands are rounded in another way."""

    name: str
    run: Callable[..., Any]
    prepare: Callable[..., tuple] = lambda *args: args
    read: Callable[[Any], list[Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Uses:
    """The Triton kernel behind an op: entries of `module.CONFIGS` with this kernel and these constants are what can be launched for it."""

    module: ModuleType
    kernel: Callable
    meta: dict[str, object]

    def configs(self, architecture: int | None = None) -> list[KernelConfig]:
        """Those for a GPU of this compute capability x 10 (None: all), each way to launch once: some are listed for several dtypes."""
        fits = lambda c: c.kernel is self.kernel and self.meta.items() <= c.meta.items() and architecture in (None, *c.architectures)
        ways = {(*sorted(map(str, c.meta.items())), c.num_warps, c.num_stages): c for c in reversed(self.module.CONFIGS) if fits(c)}
        return list(reversed(ways.values()))


def uses(module: ModuleType, kernel: Callable, **meta: object) -> tuple[Uses, ...]:
    return (Uses(module=module, kernel=kernel, meta=meta),)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`make(maker) -> args`, `run(*args) -> out` (what is timed), `read(out)` and `exact(*args)` -> tensors to be equal, in the same order.

    `least_db`: below this signal-to-noise ratio the op is wrong; infinite where every number must be equal. `flops`, `bytes`: of one
    call. `ceiling`: what its rate is a share of (fp8, bf16 or copy). `published`: TFLOP/s that DeepGEMM has published for it.
    """

    op: str
    shape: str
    make: Callable[[Maker], tuple]
    run: Callable[..., Any]
    exact: Callable[..., list[Tensor]]
    read: Callable[[Any], list[Tensor]]
    least_db: float
    flops: int = 0
    bytes: int = 0
    ceiling: str = "copy"
    peers: tuple[Peer, ...] = ()
    uses: tuple[Uses, ...] = ()
    published: float | None = None


def sqnr(found: list[Tensor], exact: list[Tensor]) -> float:
    """Signal over noise of the worst tensor in dB: infinite where equal, -infinite where a shape differs or a number is not finite."""
    if [f.shape for f in found] != [e.shape for e in exact]:
        return -torch.inf
    return min(_sqnr(f.double(), e.double()) for f, e in zip(found, exact))


def _sqnr(found: Tensor, exact: Tensor) -> float:
    if not found.isfinite().all():
        return -torch.inf
    noise, signal = (found - exact).square().sum().item(), exact.square().sum().item()
    return torch.inf if noise == 0 else 10 * torch.tensor(signal / noise).log10().item()
