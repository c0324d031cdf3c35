"""From command-line words to a configuration: Hydra composes, and its complaints become one sentence each."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .schema import Config, ConfigError, nearest_key, register, resolve


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The composed, unchecked configuration of overrides such as `model=small` or `optim.lr=3e-4`.

    `config_dir` is a folder with groups or experiments of your own, searched after the package's.
    Raises ConfigError for an unknown key, group or value type, naming the nearest known key.
    """
    register()
    words = list(overrides)
    if config_dir is not None:
        words.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("shoestring.conf", version_base="1.3"):
            return hydra_compose("config", overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error) from None


def load(overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Compose, check and freeze."""
    return resolve(compose(overrides, config_dir))


def load_saved(path: str | Path) -> Config:
    """The configuration that a run wrote to its directory."""
    return resolve(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(_thaw(config)))


def _thaw(config: Config) -> Config:
    """OmegaConf wants lists where the frozen configuration has tuples."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _plain(config)))


def _plain(value):
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _explain(error: Exception) -> ConfigError:
    text = str(error.__cause__ or error)
    if found := re.search(r"Could not override '([^']+)'", str(error)) or re.search(r"full_key: (\S+)", text):
        key = found[1]
        if "not in" in text or "is not in struct" in text:
            return ConfigError(key, "?", "no such key", nearest_key(key))
        return ConfigError(key, "?", text.splitlines()[0])
    if found := re.search(r"Could not find '([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.M)
        return ConfigError(found[1].rpartition("/")[0] or found[1], found[1].rpartition("/")[2], f"no such choice; there are: {', '.join(options)}")
    if found := re.search(r"Could not override '([^']+)'|In '[^']*': (.*)", text):
        return ConfigError(found[1] or "config", "?", text.splitlines()[0])
    return ConfigError("command line", text.splitlines()[0], "not understood")
