"""Text that somebody else may have written, as plain values: JSON that can be written again, YAML of bounded depth and size.

A parser takes what the text says: YAML's C loader ends the process at some ten thousand brackets, and nine lines of aliases stand for a
billion values. Settings need neither.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

DEEPEST = 64  # levels of YAML
MOST_VALUES = 100_000  # of YAML, aliases counted as what they stand for
MOST_BYTES = 4 << 20  # of a file of settings
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SURROGATE = re.compile(r"\\u[dD]")


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError, also for half a surrogate pair, which no file can hold, or RecursionError."""
    text = text.decode() if isinstance(text, bytes) else text  # json would let half a pair through here, too
    value = json.loads(text)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_yaml(path: str | Path) -> Any:
    """Raises ConfigError for a file that cannot be read, is no YAML, or is deeper or larger than settings are."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError("config", str(path), f"has over {MOST_BYTES:,} bytes, as no settings have")
        _check_size(data, str(path))
        return yaml.load(data, Loader=_SafeLoader)  # noqa: S506  # nosec B506  # either is safe
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise yaml_error(error, str(path)) from None
    except (ValueError, RecursionError, OverflowError) as error:  # a number or a date that is none
        raise ConfigError("config", str(path), f"is not YAML: {type(error).__name__}") from None


def yaml_error(error: yaml.YAMLError, where: str = "a configuration file") -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    named = mark.name if mark and not mark.name.startswith("<") else where
    what = getattr(error, "problem", None) or error
    return ConfigError("config", f"{named}, line {mark.line + 1}" if mark else named, f"is not YAML: {what}")


def _check_size(data: bytes, where: str) -> None:
    """Before anything is made of it: events come one by one, whatever the depth."""
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(data, Loader=_SafeLoader):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            open_ones.append((anchor, 1))
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, size = open_ones.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(anchor, 1)
        if anchor is not None:
            sizes[anchor] = size
        open_ones[-1] = (open_ones[-1][0], open_ones[-1][1] + size)
        if len(open_ones) > DEEPEST or open_ones[-1][1] > MOST_VALUES:
            raise ConfigError("config", where, f"is over {DEEPEST} levels deep, or stands for over {MOST_VALUES:,} values")
