"""Under torchrun."""

from ..conf.schema import Config
from .environment import Place


def fitted(config: Config, place: Place) -> Config:
    return config


def run_rank(config, place, run, command):
    return run(config, place, command)
