"""The one place that knows which sharded optimizer engines there are, and what they refuse."""

from collections.abc import Sequence

from ...conf.errors import ConfigError, choose
from ...conf.schema import Config, OptimConfig
from .deepspeed_zero import DeepSpeedOptimizer
from .whole import WholeOptimizer
from .zero import ShardedOptimizer, Spec

ENGINES = {"whole": WholeOptimizer, "deepspeed": DeepSpeedOptimizer}
MOST_BETA2_OF_BF16 = 0.99


def make_optimizer(optim: OptimConfig, specs: Sequence[Spec]) -> ShardedOptimizer:
    """Collective: ranks of one replica group pass equal specs in one order. Parameters become views of the engine's buffers.

    A spec with `matrices` is updated by Muon, one without by AdamW.
    """
    choose("optim.engine", optim.engine, tuple(ENGINES))
    return ENGINES[optim.engine](specs, optim)


def check(config: Config) -> None:
    """Raises ConfigError for an optimizer that no engine has, or that would not learn."""
    o, compute = config.optim, config.precision.compute
    if o.engine == "deepspeed":
        if o.algorithm == "muon":
            raise ConfigError("optim.engine", o.engine, "cuts weights anywhere, and optim.algorithm=muon needs whole matrices", "whole")
        if o.moments == "bf16":
            raise ConfigError("optim.moments", o.moments, "optim.engine=deepspeed keeps FP32 moments; optim.engine=whole has both", "fp32")
        if compute == "fp64":
            raise ConfigError("optim.engine", o.engine, "keeps FP32 masters, which would round precision.compute=fp64", "whole")
        return
    if o.moments == "bf16" and compute == "fp64":
        raise ConfigError("optim.moments", o.moments, "FP64 weights have FP64 moments", "auto")
    if o.moment_precision(compute) == "bf16" and o.beta2 > MOST_BETA2_OF_BF16:
        rule = (f"with BF16 moments must be at most {MOST_BETA2_OF_BF16}: BF16 keeps 8 bits, so that a second moment that should shrink by "
                "less than 1 part in 256 a step rounds back to what it was, and never decays; or set optim.moments=fp32")  # fmt: skip
        raise ConfigError("optim.beta2", o.beta2, rule, MOST_BETA2_OF_BF16)
