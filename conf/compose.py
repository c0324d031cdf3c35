"""From command-line words to a configuration: Hydra composes, and its complaints become one sentence each."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, UnsupportedInterpolationType
from omegaconf.resolvers import oc

from . import said, secrets
from .build import build, is_known, nearest_key
from .errors import ConfigError, UnknownKey, most_like
from .outside import read_yaml, yaml_error
from .rules import check
from .schema import Config


def load(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """The checked, frozen configuration of overrides such as `model=small` or `optim.lr=3e-4`.

    `config_dir` is a folder with groups or experiments of your own, searched after the package's.
    Raises ConfigError for an unknown key (naming the nearest known one), group, type, missing value or broken rule.
    """
    return finish(compose(overrides, config_dir))


def load_any_data(words: list[str], config_dir: str | Path | None = None) -> Config:
    """`load` for what does not look at data: where its sources lack something, they have any. `words` grows by that."""
    for _ in range(len(words) + 8):
        try:
            return load(words, config_dir)
        except ConfigError as error:
            if not error.field.startswith("data.sources.") or error.value != MISSING:
                raise
            words.append(f"{error.field}=[any]")
    return load(words, config_dir)


def load_saved(path: str | Path) -> Config:
    """The configuration that a run wrote to its directory: values as they stand there, nothing is interpolated. Raises ConfigError as
    `load` does."""
    return _checked(_over(_plain(Config()), read_saved(path)))


def read_saved(path: str | Path) -> dict[str, Any]:
    """What a run wrote to its directory, as it stands there: nothing is checked, and keys of other versions stay. Raises ConfigError."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), "holds no settings")
    return tree


def to_yaml(config: Config) -> str:
    """As `load_saved` reads it; of each phase only what it changes."""
    plain = _plain(config)
    run = {name: value for name, value in plain.items() if name != "phases"}
    plain["phases"] = {name: _difference(changed, run) for name, changed in plain["phases"].items()}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> DictConfig:
    """What Hydra makes of the words and the YAML groups: values neither typed nor checked yet."""
    words = _words(overrides, config_dir)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError("--config-dir", str(config_dir), "no such folder")
        for level in ("*.yaml", "*/*.yaml", "*/*/*.yaml"):
            for path in Path(config_dir).glob(level):
                read_yaml(path)  # Hydra's reader knows no bounds
        words.append(f"hydra.searchpath=['file://{Path(config_dir).resolve()}']")
    # The schema's defaults enter as plain values: conf/build.py holds the result against the types, whatever it came from.
    ConfigStore.instance().store(name="schema", node=_defaults())
    GlobalHydra.instance().clear()
    try:
        with _without_environment(), initialize_config_module("shoestring.conf", version_base="1.3"):
            composed = hydra_compose("config", overrides=words)
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = list(error.options or [])
        raise ConfigError(group, choice, f"no such choice; there are {', '.join(options)}", most_like(choice, options)) from None
    except yaml.YAMLError as error:
        raise yaml_error(error) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _hydra_error(error, overrides) from None
    except OSError as error:  # a choice may be the name of no file that a system could have
        raise ConfigError("config", Path(str(error.filename)).name, f"cannot be read: {error.strerror}") from None
    except (AssertionError, AttributeError, KeyError, TypeError, RecursionError) as error:  # of a file that is YAML, and no settings
        where = str(config_dir or "the command line")
        raise ConfigError("config", where, f"is not made of settings ({type(error).__name__}: {str(error)[:200]})") from None
    if config_dir is not None:
        typed = {parsed.key_or_group: _value(parsed) for parsed in map(_parse, overrides)}
        said.check(OmegaConf.to_container(composed, resolve=False), typed, Path(config_dir))
    return composed


def finish(composed: DictConfig) -> Config:
    """Typed, checked and frozen, what `compose` gave. Raises ConfigError."""
    try:
        with _without_environment():
            tree = OmegaConf.to_container(composed, resolve=True)
    except UnsupportedInterpolationType as error:
        rule = "may refer to other settings only, as in ${train.steps}: what an environment variable holds would be kept with the run"
        raise ConfigError(error.full_key or "config", str(error.child_node), rule) from None
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "config", str(error.child_node), str(error.msg).splitlines()[0]) from None
    secrets.refuse(tree)
    return _checked(tree)


@contextlib.contextmanager
def _without_environment() -> Iterator[None]:
    """`${oc.env:NAME}` is not known: a configuration of somebody else's could take a secret into the run directory, or onto the screen."""
    known = OmegaConf.clear_resolver("oc.env")
    try:
        yield
    finally:
        if known:
            OmegaConf.register_new_resolver("oc.env", oc.env)


def _checked(tree: dict[str, Any]) -> Config:
    config = build(_packaged(tree))
    check(config)
    return config.freeze()


def _over(below: Any, above: Any) -> Any:
    """`above`, with what it has not from `below`."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _over(below.get(name), value) for name, value in above.items()}


def _defaults() -> DictConfig:
    return OmegaConf.create(_plain(Config()))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _difference(above: dict, below: dict) -> dict:
    """What `above` has that `below` has not, or otherwise."""
    changed = {}
    for name, value in above.items():
        if name not in below:
            changed[name] = value
        elif isinstance(value, dict) and isinstance(below[name], dict):
            changed |= {name: part} if (part := _difference(value, below[name])) else {}
        elif value != below[name]:
            changed[name] = value
    changed.pop("phases", None)
    return changed


def _packaged(tree: Any) -> Any:
    """Refuses a group's file that fell beside the schema because its header is missing, which Hydra lets pass."""
    for group in _groups(None):
        if isinstance(tree, dict) and group in tree and not is_known(group):
            raise ConfigError(group, tree[group], f"no such key: a file in {group}/ must begin with the line '# @package _global_'")
    return tree


def _groups(config_dir: str | Path | None) -> list[str]:
    return sorted({entry.name for folder in _folders(config_dir) for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "_"})


def choices(group: str, config_dir: str | Path | None) -> list[str]:
    """The files of a group, by name; none where there is no such group."""
    found = [folder / group for folder in _folders(config_dir) if (folder / group).is_dir()]
    return sorted({entry.name.removesuffix(".yaml") for folder in found for entry in folder.iterdir() if entry.name.endswith(".yaml")})


def _folders(config_dir: str | Path | None) -> list:
    return [resources.files(__package__), *([Path(config_dir)] if config_dir and Path(config_dir).is_dir() else [])]


# ---------------------------------------------------------------- words


def _words(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
    """The overrides as Hydra wants them. Raises ConfigError for a word that is none, or a key that the schema does not have."""
    groups = _groups(config_dir)
    words = []
    for word in overrides:
        parsed = _parse(word)
        key = parsed.key_or_group
        if key in groups and not isinstance(value := _value(parsed), dict):
            words.append(_choice(key, value))
        elif key == "hydra" or key.startswith("hydra."):
            raise ConfigError(key, _value(parsed), "Hydra's own settings have no effect here")
        elif not is_known(key):
            raise UnknownKey(key, secrets.shown(key, _value(parsed)), "no such key", nearest_key(key))
        elif parsed.is_delete():
            words.append(word)
        else:
            words.append("++" + word.lstrip("+"))  # a name new to an open dictionary is set like any other
    return words


def parse(word: str) -> Override:
    """As Hydra reads a word, which may have several values. Raises ConfigError for one that is not KEY=VALUE."""
    try:
        parsed = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):  # a number of thousands of digits, brackets without end
        raise ConfigError("command line", word, "is not KEY=VALUE; quote a value with spaces or commas: 'key=\"a, b\"'") from None
    if not parsed.key_or_group:
        raise ConfigError("command line", word, "is not KEY=VALUE: there is no key")
    return parsed


def _parse(word: str) -> Override:
    """Likewise, of one value."""
    parsed = parse(word)
    if parsed.is_sweep_override():
        rule = "is several values; a list is written [a,b], and --multirun trains with one after the other"
        raise ConfigError(parsed.key_or_group, word.partition("=")[2], rule)
    return parsed


def _choice(group: str, value: Any) -> str:
    """The word that chooses files of a group. All groups are in the defaults list, so there is nothing to add, only to set or delete."""
    if value is None:
        return f"~{group}"
    return f"{group}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{group}='{value}'"


def _value(parsed: Override) -> Any:
    """The value as YAML would give it."""
    return None if parsed.is_delete() else OmegaConf.to_container(OmegaConf.create({"v": parsed.value()}), resolve=False)["v"]


# ---------------------------------------------------------------- complaints


def _hydra_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """A sentence for what Hydra alone can refuse: groups chosen twice or not at all, deletions, defaults lists."""
    text = str(error.__cause__ or error).splitlines()
    text = next((line for line in text if line and not line.endswith("composing config:")), "not understood")
    for word in overrides:
        parsed = _parse(word)
        if parsed.key_or_group in str(error):
            return ConfigError(parsed.key_or_group, word.partition("=")[2] or "(deleted)", text)
    found = re.match(r"In '([^']+)'", str(error))
    return ConfigError("config", found[1] if found else "", text)
