"""Are the packages there that Shoestring needs, and new enough? What pyproject.toml asks for, as the installed package's metadata has it,
against what is installed, without importing any of it; and against `constraints.txt`, the set that the tests pass with.
"""

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ...conf.schema import Config
from .line import Line, fail, ok, skipped, warn

KIND, OURS = "software", "shoestring"
MAIN = ("torch", "triton", "deepspeed")  # a line for each; of the others together
_MODULES = {"hydra-core": "hydra", "pyyaml": "yaml"}  # where it is not the package's name
_INSTALL = "pip install -c constraints.txt -e ."
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"  # beside the package in a checkout, not in a wheel


def check(config: Config, constraints: Path = _CONSTRAINTS) -> Iterator[Line]:
    """`constraints`: a file of exact versions."""
    yield _python()
    try:
        wanted = requirements()
    except metadata.PackageNotFoundError:
        yield fail(KIND, OURS, "is not installed here: nobody knows what it needs", f"in its checkout: {_INSTALL}")
        return
    others = []
    for requirement in wanted:
        line = _package(requirement)
        if requirement.name in MAIN or line.state != "ok":
            yield line
        else:
            others.append(requirement.name)
    yield ok(KIND, "other packages", f"{len(others)} more, as pyproject.toml wants them")
    yield _against(constraints, [requirement.name for requirement in wanted])
    yield from _optional(config)


def versions() -> dict[str, str]:
    """Of what every rank must have alike, so far as it is installed."""
    found = {"Python": platform.python_version()}
    for name in (OURS, *MAIN):
        found[name] = _version(name) or "not installed"
    return found


def requirements() -> list[Requirement]:
    """Without extras, and those for other platforms. Raises PackageNotFoundError where Shoestring itself is not installed."""
    every = [Requirement(text) for text in metadata.requires(OURS) or ()]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]


def _python() -> Line:
    version = platform.python_version()
    try:
        wanted = SpecifierSet(metadata.metadata(OURS)["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        wanted = SpecifierSet()
    if not wanted.contains(version, prereleases=True):
        return fail(KIND, "Python", f"{version}, and {wanted} is needed", "make PYTHON=python3.12 install")
    return ok(KIND, "Python", version, alike=True)


def _package(wanted: Requirement) -> Line:
    version, module = _version(wanted.name), _MODULES.get(wanted.name.lower(), wanted.name.replace("-", "_"))
    how = f"pip install -c constraints.txt '{wanted.name}{wanted.specifier}'"
    if version is None:
        return fail(KIND, wanted.name, f"is not installed; {wanted.name}{wanted.specifier} is needed", how)
    if importlib.util.find_spec(module) is None:
        return fail(KIND, wanted.name, f"{version} is installed, but its module {module} is not to be found", f"{how} --force-reinstall")
    if not wanted.specifier.contains(version, prereleases=True):
        return fail(KIND, wanted.name, f"{version}, and {wanted.specifier} is needed", how)
    return ok(KIND, wanted.name, version, alike=wanted.name in MAIN)


def _against(constraints: Path, names: list[str]) -> Line:
    try:
        lines = constraints.read_text(encoding="utf-8").splitlines()
    except OSError:
        return skipped(KIND, "constraints.txt", "is not beside the package: what the tests pass with is not known here")
    tested = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    differ = [
        f"{r.name} {version} (tests: {r.specifier})"
        for r in tested
        if r.name in names and (r.marker is None or r.marker.evaluate())
        if (version := _version(r.name)) and not r.specifier.contains(version, prereleases=True)
    ]
    if differ:
        return warn(KIND, "constraints.txt", "another version than the tests pass with: " + ", ".join(differ), _INSTALL)
    return ok(KIND, "constraints.txt", "the versions that the tests pass with")


def _optional(config: Config) -> Iterator[Line]:
    """What only some settings need."""
    if config.parallel.dispatcher == "deepep" and importlib.util.find_spec("deep_ep") is None:
        value = "is not installed, and parallel.dispatcher=deepep needs it"
        yield fail(KIND, "deep_ep", value, "parallel.dispatcher=alltoall does without")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
