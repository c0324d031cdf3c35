"""The lists of what is installed, read: requirements.lock, constraints.txt and what pyproject.toml wants."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.10.12", "3.11.0", "3.11.9", "3.12.1", "3.13.0", "3.13.9")  # as the Makefile has it, patches at both ends
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True, kw_only=True)
class Entry:
    requirement: Requirement
    hashes: tuple[str, ...]  # "sha256:..."


def entries(text: str) -> list[Entry]:
    """Of a lock. Whatever is neither a comment nor a requirement with its hashes raises packaging's InvalidRequirement."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    split = [line.split("--hash=") for line in lines if line.strip() and not line.startswith("#")]
    return [Entry(requirement=Requirement(first), hashes=tuple(h.strip() for h in hashes)) for first, *hashes in split]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(found: list[Requirement], python: str, machine: str = "x86_64") -> dict[str, str]:
    """Name -> version of what is meant for this Python; AssertionError where there are two, or something else than one version."""
    version = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    where = version | {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython"}
    known: dict[str, str] = {}
    for r in found:
        if r.marker is None or r.marker.evaluate(where):
            [one] = r.specifier
            name = canonicalize_name(r.name)
            assert one.operator == "==" and "*" not in one.version and not r.extras and r.url is None and name not in known, str(r)
            known[name] = one.version
    return known


def here() -> dict[str, str]:
    """Name -> version of all that is pinned for this Python, torch among it."""
    return pins(constraints(), ".".join(map(str, sys.version_info[:3])))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def wanted(*extras: str) -> list[Requirement]:
    """What pyproject.toml wants, with these extras; extras of Shoestring that they name are left as they are."""
    table = project()["project"]
    return [Requirement(r) for r in [*table["dependencies"], *(r for e in extras for r in table["optional-dependencies"][e])]]
