"""How a Triton kernel is launched and for which GPUs: what the public functions launch with and what the gate compiles ahead of time.

A kernel file lists its launches in a module constant `CONFIGS`, a tuple of `KernelConfig`; tests/kernels/gate.py walks them all. A kernel
that is launched has a name ending in `_kernel`; a `@triton.jit` helper has not, and needs no entry.
"""

from collections.abc import Callable
from dataclasses import dataclass

ALL, FP8_TENSOR_CORES = (80, 90, 100), (90, 100)  # 80: A100, which has no FP8; 90: H100, H200; 100: B200


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """One kernel with its compile-time choices.

    `signature`: run-time argument -> type in Triton's notation: "*bf16", "*fp8e4nv", "*fp32", "*i32" (pointers; taken as 16-byte
    aligned, as torch allocates them), "i32", "fp32"; "i32:16" for a whole number that every launch has as a multiple of 16. Triton
    compiles one kernel for each case; list the one that launches meet (the plain one, where they meet both).
    `meta`: constexpr argument -> value. Together they name every argument.
    `architectures`: compute capability x 10.
    `operands`: "" (no matrix product), "fp8" or "bf16". A matrix kernel also says `macs_per_step`: multiply-adds that one pass of its
    innermost loop needs for one tile (rows x columns x depth); FP8 sums must be promoted to FP32 at least every `promote_every` of depth.
    `warp_specialised`: the kernel asks for it, so the gate refuses it where the compiler dropped it (Hopper).
    """

    kernel: Callable
    name: str
    signature: dict[str, str]
    meta: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    architectures: tuple[int, ...] = ALL
    operands: str = ""
    macs_per_step: int = 0
    promote_every: int = 128
    warp_specialised: bool = False

    def __post_init__(self):
        if self.operands not in ("", "fp8", "bf16") or bool(self.operands) != bool(self.macs_per_step):
            raise ValueError(f"{self.name}: operands {self.operands!r} with macs_per_step {self.macs_per_step}: a matrix kernel has both")
        if self.operands == "fp8" and min(self.architectures) < 90:
            raise ValueError(f"{self.name}: sm_{min(self.architectures)} has no FP8 tensor cores; leave it out of `architectures`")

    @property
    def options(self) -> dict[str, object]:
        """What a launch passes by keyword: `kernel[grid](*args, **config.options)`."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages}


def choose(configs: tuple[KernelConfig, ...], kernel: Callable, **meta) -> KernelConfig:
    """The first configuration of `kernel` with these constexpr values, so that nothing is launched that the gate has not compiled.

    Raises LookupError where none is listed.
    """
    for config in configs:
        if config.kernel is kernel and meta.items() <= config.meta.items():
            return config
    raise LookupError(f"{kernel.__name__} has no entry with {meta} in its file's CONFIGS: list it, so that the gate compiles and checks it")
