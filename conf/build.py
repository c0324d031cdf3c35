"""From plain nested dictionaries (what Hydra or a saved YAML gives) to the dataclasses of `conf/schema.py`.

Everything that a typed tree can refuse is refused here, whatever file or word it came from: a key that is not there, a value of the
wrong type, a value that was never given. Hydra itself composes an untyped tree, so there is one wording and the value is at hand.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from . import secrets
from .errors import ConfigError, UnknownKey, most_like
from .schema import Config

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def build(tree: Any) -> Config:
    """The configuration that a tree of plain values describes, unchecked. Raises UnknownKey or ConfigError for the first thing wrong.

    Unknown keys and wrong types anywhere come before missing values: a key spelt wrongly is the likelier cause of both.
    """
    phases = tree.get("phases") if isinstance(tree, dict) else None
    if not isinstance(phases, dict):
        config = _section(Config, tree, "")
    else:
        run = {name: value for name, value in tree.items() if name != "phases"}
        config = _section(Config, run, "")
        config.phases = {str(name): _phase(run, changes, f"phases.{name}") for name, changes in phases.items()}
    for key, hint in _walk(config):
        raise ConfigError(key, MISSING, f"must be given, for example {key}={'[A,B]' if hint == list[str] else 'VALUE'}")
    return config


def section(schema: type, tree: Any, key: str) -> Any:
    """One section alone, such as the model that a checkpoint was saved with. Raises as `build` does; what is not given has its default."""
    return _section(schema, tree, key)


def _phase(run: dict, changes: Any, key: str) -> Config:
    """The run with some of its fields changed: what a phase does not say is as it is in the run's own sections."""
    if not isinstance(changes, dict):
        raise ConfigError(key, changes, f"is a phase: give what it changes, such as {key}.train.tokens=VALUE")
    if "phases" in changes:
        raise ConfigError(f"{key}.phases", changes["phases"], "a phase has no phases of its own")
    _section(Config, changes, key)  # first alone: what is wrong in the run's own sections is not to be blamed on the phase
    return _section(Config, _overlaid(run, changes), key)


def _overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _overlaid(below.get(name), value) for name, value in above.items()}


def is_known(key: str) -> bool:
    """Whether the schema has this dotted key; an open dictionary (`data.sources`, `cluster.peak_tflops`) has every name."""
    hint: Any = Config
    for part in key.split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint) and part in _hints(hint):
            hint = _hints(hint)[part]
        else:
            return False
    return True


def nearest_key(key: str) -> str:
    """The known dotted key most like an unknown one: the same last word in another section, else the nearest spelling."""
    parts = key.split(".")
    known = [
        ".".join(p if p != "*" else (parts[i] if i < len(parts) else "NAME") for i, p in enumerate(k.split(".")))
        for k in known_keys()
        if not k.endswith("*")
    ]
    same = [k for k in known if k.rpartition(".")[2] == parts[-1]]
    siblings = [k for k in known if k.rpartition(".")[0] == ".".join(parts[:-1])]
    return most_like(key, same or (siblings if len(parts) > 1 else []) or known) or ""


def known_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; `*` stands for any name in an open dictionary."""
    for name, hint in _hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) is dict:
            yield f"{prefix}{name}.*"
            item = typing.get_args(hint)[1]
            if dataclasses.is_dataclass(item) and item is not Config:  # a phase's keys are the run's: they are found there
                yield from known_keys(item, f"{prefix}{name}.*.")


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    """Field name to type, in the order of the class."""
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, key)
    if isinstance(value, str) and value == MISSING:
        return MISSING
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(key, value, f"is a dictionary: give its entries, {key}.NAME=VALUE")
        return {str(name): _value(typing.get_args(hint)[1], item, f"{key}.{name}") for name, item in value.items()}
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(key, value, "must be a list", f"[{value}]" if isinstance(value, str) and value else None)
        return [_value(typing.get_args(hint)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    return _scalar(hint, value, key)


def _section(schema: type, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        fields = ", ".join(f"{key}.{name}" for name in list(_hints(schema))[:3])
        raise ConfigError(key or "the configuration", value, f"is a section: set its fields ({fields} ...)")
    prefix = f"{key}." if key else ""
    for name, item in value.items():
        if name not in _hints(schema):
            raise UnknownKey(f"{prefix}{name}", secrets.shown(str(name), item), "no such key", nearest_key(f"{prefix}{name}"))
    return schema(**{name: _value(_hints(schema)[name], item, prefix + name) for name, item in value.items()})


def _scalar(hint: type, value: Any, key: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and number:
        return float(value)
    if hint is str and (isinstance(value, str) or number):
        return str(value)
    nearest = round(value) if hint is int and number and abs(value) < 2**63 else None
    raise ConfigError(key, "null" if value is None else value, f"must be {_NAMES[hint]}", nearest)


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and type of every field that still has no value."""
    for name, hint in _hints(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, str) and value == MISSING:
            yield prefix + name, hint
        elif dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for entry, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from _walk(item, f"{prefix}{name}.{entry}.")
                elif isinstance(item, str) and item == MISSING:
                    yield f"{prefix}{name}.{entry}", hint
