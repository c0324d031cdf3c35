"""What a command is, and what several of them share."""

import argparse
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OVERRIDES = "settings such as model=small, optim.lr=3e-4 or experiment=tiny"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`arguments` fills the command's parser; `run` gets what was parsed and returns an exit code, or None for 0."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    examples: tuple[str, ...] = ()


def call(target: str, *args: Any, **kwargs: Any) -> Any:
    """`target` is "module:function"."""
    return pkgutil.resolve_name(target)(*args, **kwargs)


def config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")
