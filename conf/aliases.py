"""What a YAML file's aliases stand for: nine lines can stand for a billion values, which whoever copies or shows them has to hold."""

from pathlib import Path

import yaml

from .errors import ConfigError

MOST = 100_000  # values in one file, aliases written out
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check(path: str | Path, data: bytes) -> None:
    """Raises ConfigError where there are more. Of a file that is not YAML somebody else says so."""
    if b"*" not in data:
        return
    try:
        size = _size(yaml.compose(data, Loader=_LOADER), {})
    except (yaml.YAMLError, ValueError):
        return
    except RecursionError:
        size = MOST + 1
    if size > MOST:
        raise ConfigError("config", str(path), f"has aliases that stand for more than {MOST:,} values")


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values at and below a node; more than `MOST` where it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST + 1  # until it is known
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = min(MOST + 1, 1 + sum(_size(part, known) for part in parts))
    return known[id(node)]
