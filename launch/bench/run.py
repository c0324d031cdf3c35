"""Cases, one after another: is it right, how long does it take, in which of its configurations, and how long do others take.

One case that fails, or one peer that this torch or this device refuses, is a line that says so, and the rest goes on.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.configs import ALL, KernelConfig
from .. import secrets
from . import cast_cases, layer_cases, matmul_cases, memory_cases, peers
from .case import Case, Maker, Peer, Sizes, sqnr
from .results import Row, Timed
from .timing import Clock, measure

ROTATION = 4  # times the L2 cache that the inputs of one measurement fill together
MOST_SETS = 256  # of the smallest ops
GIBI = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how. `clock`: None measures no time. `architecture`: that of the configurations (None: no GPU, none is launched)."""

    device: torch.device
    clock: Clock | None = None
    tune: bool = False
    architecture: int | None = None
    cache_bytes: int = 0


def every_case(sizes: Sizes) -> list[Case]:
    return [case for module in (matmul_cases, cast_cases, memory_cases, layer_cases) for case in module.cases(sizes)]


def architecture_of(capability: tuple[int, int]) -> int:
    """The newest of those that kernels are compiled for that this one runs."""
    return max((a for a in ALL if a <= 10 * capability[0] + capability[1]), default=min(ALL))


@torch.no_grad()
def run_case(case: Case, bench: Bench) -> Row:
    about = dict(op=case.op, shape=case.shape, flops=case.flops, bytes=case.bytes, ceiling=case.ceiling, published=case.published)
    about["least_db"] = _number(case.least_db)
    if bench.architecture and not all(use.configs(bench.architecture) for use in case.uses):
        return Row(**about, passed=True, error=f"not here: no configuration is for sm_{bench.architecture}")
    try:
        return Row(**about, **_measured(case, bench))
    except Exception as error:
        return Row(**about, passed=False, error=sentence(error))
    finally:
        clean(bench.device)


def _measured(case: Case, bench: Bench) -> dict[str, Any]:
    args = case.make(Maker(bench.device))
    exact = case.exact(*args)
    db = sqnr(case.read(case.run(*args)), exact)
    found = {"db": _number(db), "passed": db >= case.least_db, "error": "" if db > -math.inf else "a wrong shape, or not a number"}
    if bench.clock is None:
        return found
    sets = 1 if not case.bytes else min(MOST_SETS, math.ceil(ROTATION * bench.cache_bytes / case.bytes))
    inputs = [args, *(case.make(Maker(bench.device, seed)) for seed in range(1, sets))]
    configs = list(_configs(case, inputs, exact, bench)) if bench.tune else []
    timing = measure(case.run, inputs, bench.clock)
    others = [_peer(peer, inputs, exact, bench) for peer in case.peers]
    wrong = [c.name for c in configs if c.why]
    found |= {"passed": found["passed"] and not wrong, "error": found["error"] or "; ".join(f"{c.name}: {c.why}" for c in configs if c.why)}
    return found | dict(seconds=timing.median, low=timing.low, high=timing.high, configs=configs, peers=others)


def _peer(peer: Peer, inputs: Sequence[tuple], exact: list[Tensor], bench: Bench) -> Timed:
    try:
        prepared = [peer.prepare(*args) for args in inputs]
        db = None if peer.read is None else _number(sqnr(peer.read(peer.run(*prepared[0])), exact))
        return Timed(name=peer.name, seconds=measure(peer.run, prepared, bench.clock).median, db=db)
    except Exception as error:
        return Timed(name=peer.name, why=f"not here: {sentence(error)}")
    finally:
        gc.collect()


def _configs(case: Case, inputs: list[tuple], exact: list[Tensor], bench: Bench) -> Iterator[Timed]:
    """Each of a kernel that has several, the others of the case being those that a launch takes."""
    for use in case.uses:
        listed = use.configs(bench.architecture)
        for config in listed if len(listed) > 1 else ():
            with preferred(use.module, config):
                yield _config(case, config, inputs, exact, bench)


def _config(case: Case, config: KernelConfig, inputs: list[tuple], exact: list[Tensor], bench: Bench) -> Timed:
    try:
        db = sqnr(case.read(case.run(*case.make(Maker(bench.device)))), exact)
        if db < case.least_db:
            return Timed(name=config.name, db=_number(db), why=f"wrong: {db:.0f} dB")
        return Timed(name=config.name, seconds=measure(case.run, inputs, bench.clock).median, db=_number(db))
    except Exception as error:
        return Timed(name=config.name, why=sentence(error))


@contextlib.contextmanager
def preferred(module: ModuleType, config: KernelConfig) -> Iterator[None]:
    """A kernel file launches the first entry that fits: inside, this one."""
    listed = module.CONFIGS
    module.CONFIGS = (config, *(c for c in listed if c is not config))
    try:
        yield
    finally:
        module.CONFIGS = listed


def ceilings(bench: Bench) -> dict[str, float]:
    """FLOP/s of a large product in BF16 and in FP8 (row-wise, by torch), bytes/s of a large copy; without what torch refuses."""
    size, maker = 8192, Maker(bench.device)

    def copy() -> float:
        source, target = (torch.empty(GIBI, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return 2 * GIBI / measure(target.copy_, [(source,)], bench.clock).median

    def product(run: Callable, *operands: Tensor) -> float:
        return 2 * size**3 / measure(run, [operands], bench.clock).median

    def fp8() -> float:
        return product(peers.row_wise(torch.bfloat16), *peers.rows_for_torch(maker.normal(size, size), maker.normal(size, size)))

    made = {"copy": copy, "bf16": lambda: product(F.linear, maker.normal(size, size), maker.normal(size, size)), "fp8": fp8}
    found = {}
    for name, rate in made.items():
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError, AttributeError):
            found[name] = rate()
        clean(bench.device)
    return found


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sentence(error: BaseException) -> str:
    """The first line, which says it; what follows is where in torch."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return secrets.hide(f"{type(error).__name__}: {text}")[:160]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
