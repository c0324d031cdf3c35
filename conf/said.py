"""Settings that a person says, and no file that was taken for something else: those that name programs, and those that trust somebody.

A folder of groups (`--config-dir`) often comes with a model that somebody else has made. A file in it that is chosen as a model, a cluster
or data can set any key, and Hydra would let it; these it may not.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

KEYS = (
    "launch.alerts.command", "launch.slurm.setup", "launch.slurm.options", "launch.slurm.python", "launch.slurm.container",
    "launch.slurm.mounts", "launch.k8s.image", "checkpoint.trust", "checkpoint.signers",
)  # fmt: skip
GROUPS = ("launch", "experiment")  # whose files say how a run is started: a person who chooses one has chosen that


def is_one(key: str) -> bool:
    """Whether a dotted key is one of these, or holds some."""
    return any(f"{one}.".startswith(f"{key}.") for one in KEYS)


def check(tree: dict[str, Any], typed: dict[str, Any], config_dir: Path) -> None:
    """`tree`: what was composed. `typed`: the words, by key. Raises ConfigError for such a setting that neither a word says nor a file
    that a word has chosen as how to start."""
    files = [text for group in GROUPS for text in _chosen(config_dir, group, typed.get(group))]
    for key in KEYS:
        value = _at(tree, key)
        if not value or any(f"{key}.".startswith(f"{word}.") for word in typed if is_one(word) and word not in GROUPS):
            continue
        if not any(value in (_at(text, key), _at(text, key.removeprefix("launch."))) for text in files):
            rule = f"is said by a file in {config_dir} that was chosen for something else: type it, or put it in a file that launch= or "
            raise ConfigError(key, value, rule + "experiment= chooses")


def _chosen(config_dir: Path, group: str, choice: Any) -> Iterator[Any]:
    for name in choice if isinstance(choice, Collection) and not isinstance(choice, str) else [choice]:
        path = config_dir / group / f"{name}.yaml"
        if path.is_file():
            yield yaml.safe_load(path.read_bytes())


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
