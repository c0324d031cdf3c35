"""All rules that a configuration must obey before any process starts: each owner's, the size of the world; and what a rank's GPU can."""

from ..conf.errors import ConfigError, closest
from ..conf.phases import phases
from ..conf.schema import Config
from ..kernels.configs import FP8_TENSOR_CORES
from ..parallel import dispatch, placement, schedule
from ..parallel.optimizer import make as optimizer
from ..train.data import corpus as data


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises ConfigError for the first broken rule. `world_size`: how many processes there are, where somebody else started them.

    The configuration's own rules (`conf/rules.py`) were checked when it was composed.
    """
    for phase in phases(config):
        try:
            schedule.check(phase.config)
            dispatch.check(phase.config)
            optimizer.check(phase.config)
            placement.check(phase.config)
            data.check(phase.config.data, vocab_size=config.model.vocab_size)
        except ConfigError as error:
            if not config.phases:
                raise
            raise ConfigError(error.field, error.value, f"{error.rule} (in phase {phase.name})", error.nearest) from None
    ours = {"tensor": 1, "context": 1, "sharded_weights": False, "overlap_reduce": False}
    for name in (name for name, value in ours.items() if world_size is not None and getattr(config.stack, name) != value):
        rule = "is for pricing other software's runs: none of ours starts with it"
        raise ConfigError(f"stack.{name}", getattr(config.stack, name), rule, ours[name])
    if world_size is not None and all(phase.config.parallel.world_size != world_size for phase in phases(config)):
        _check_world(phases(config)[0].config, world_size)


def check_gpu(config: Config, capability: tuple[int, int]) -> None:
    """Raises ConfigError for a precision that a GPU of this compute capability, such as (9, 0), has not. Asked by a rank: who asks a GPU
    cannot fork any more."""
    wanted = min(FP8_TENSOR_CORES)
    if 10 * capability[0] + capability[1] >= wanted:
        return
    if any(phase.config.precision.linear == "fp8" for phase in phases(config)):
        rule = f"this GPU's compute capability is {capability[0]}.{capability[1]}, and FP8 products want {wanted / 10} (H100) or newer"
        raise ConfigError("precision.linear", "fp8", f"{rule}; train here with precision=bf16", "compute")


def _check_world(config: Config, world_size: int) -> None:
    p = config.parallel
    if p.world_size == world_size:
        return
    rule = f"world = pp x edp x ep = {p.pp} x {p.edp} x {p.ep} = {p.world_size}, and {world_size} processes were started"
    if world_size % (p.pp * p.ep) == 0:
        raise ConfigError("parallel.edp", p.edp, rule, world_size // (p.pp * p.ep))
    if world_size % (p.edp * p.ep) == 0 and (pp := world_size // (p.edp * p.ep)) <= config.model.num_layers:
        raise ConfigError("parallel.pp", p.pp, rule, pp)
    if world_size % (p.pp * p.edp) == 0 and config.model.num_experts % (ep := world_size // (p.pp * p.edp)) == 0:
        raise ConfigError("parallel.ep", p.ep, rule, ep)
    unit = p.pp * p.ep
    sizes = [n * unit for n in (world_size // unit, world_size // unit + 1) if n]
    rule += f", which is no multiple of pp x ep = {unit}"
    raise ConfigError("number of processes", world_size, rule, closest(world_size, sizes))
