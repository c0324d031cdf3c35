"""All rules that a configuration must obey before any process starts: each owner's, and the size of the world."""

from ..conf.errors import ConfigError, closest
from ..conf.schema import Config
from ..parallel import dispatch, schedule


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises ConfigError for the first broken rule. `world_size`: how many processes there are, where somebody else started them.

    The configuration's own rules (`conf/rules.py`) were checked when it was composed.
    """
    if world_size is not None:
        _check_world(config, world_size)
    schedule.check(config)
    dispatch.check(config)


def _check_world(config: Config, world_size: int) -> None:
    p = config.parallel
    if p.world_size == world_size:
        return
    rule = f"world = pp x edp x ep = {p.pp} x {p.edp} x {p.ep} = {p.world_size}, and {world_size} processes were started"
    if world_size % (p.pp * p.ep) == 0:
        raise ConfigError("parallel.edp", p.edp, rule, world_size // (p.pp * p.ep))
    for field, value, others, limit in (("ep", p.ep, p.pp * p.edp, config.model.num_experts), ("pp", p.pp, p.edp * p.ep, config.model.num_layers)):
        fit = world_size // others
        if world_size % others == 0 and fit <= limit and (field == "pp" or config.model.num_experts % fit == 0):
            raise ConfigError(f"parallel.{field}", value, rule, fit)
    unit = p.pp * p.ep
    sizes = [n for n in (world_size // unit * unit, (world_size // unit + 1) * unit) if n]
    raise ConfigError("the number of processes", world_size, f"must be a multiple of pp x ep = {p.pp} x {p.ep}, then edp can fit", closest(world_size, sizes))
