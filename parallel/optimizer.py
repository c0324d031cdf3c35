"""The one place that knows which sharded optimizer engines there are."""

from collections.abc import Sequence

from .deepspeed_zero import DeepSpeedOptimizer
from .whole import WholeOptimizer
from .zero import AdamW, ShardedOptimizer, Spec

ENGINES = {"whole": WholeOptimizer, "deepspeed": DeepSpeedOptimizer}


def make_optimizer(engine: str, specs: Sequence[Spec], hyper: AdamW) -> ShardedOptimizer:
    """Collective: ranks of one replica group pass equal specs in one order. Parameters become views of the engine's buffers."""
    if engine not in ENGINES:
        raise ValueError(f"optim.engine = {engine}: must be one of {', '.join(ENGINES)}")
    return ENGINES[engine](specs, hyper)
