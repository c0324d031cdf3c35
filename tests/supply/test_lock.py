"""requirements.lock has every distribution's hashes and one version of each, and `make` installs nothing but torch without it."""

import re
import shlex
import subprocess
import sys
import zipfile
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .lock import LOCK, MACHINES, PYTHONS, ROOT, constraints, entries, here, pins, project, wanted

BY_TORCH = re.compile(r"nvidia-|cuda-")  # which of them, the build of torch says


def locked():
    return [entry.requirement for entry in entries(LOCK.read_text(encoding="utf-8"))]


def test_every_entry_has_hashes_and_no_line_is_of_another_kind():
    """So: no address of an index, no option that would let something in without a hash."""
    text = LOCK.read_text(encoding="utf-8")
    found = entries(text)
    assert len(found) > 100 and "://" not in text
    for entry in found:
        assert entry.hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in entry.hashes), str(entry.requirement)


def test_no_hash_stands_for_two_files():
    found = [h for entry in entries(LOCK.read_text(encoding="utf-8")) for h in entry.hashes]
    assert len(found) == len(set(found)) > 1000


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", PYTHONS)
def test_its_versions_are_those_of_the_constraints(python, machine):
    expected = pins(constraints(), python, machine)
    assert expected.pop("torch") == "2.13.0"
    assert pins(locked(), python, machine) == expected


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_that_the_project_wants_is_in_it(python):
    """Its extras too, and what builds it."""
    table = project()
    known = pins(locked(), python) | {"torch": "2.13.0"}
    named = {canonicalize_name(r.name) for r in wanted(*table["project"]["optional-dependencies"])} - {"shoestring"}
    assert named == named & set(known), named - set(known)
    for r in [*wanted(*table["project"]["optional-dependencies"]), *map(Requirement, table["build-system"]["requires"])]:
        assert r.name == "shoestring" or r.specifier.contains(known[canonicalize_name(r.name)], prereleases=True), str(r)


def test_everything_that_these_want_is_in_it_and_nothing_else():
    """Followed through what is installed here says of itself."""
    known = here()
    left, seen = [(r.name, extra) for r in wanted(*project()["project"]["optional-dependencies"]) for extra in ["", *r.extras]], set()
    while left:
        name, extra = left.pop()
        if (canonicalize_name(name), extra) in seen or name == "shoestring":
            continue
        seen.add((canonicalize_name(name), extra))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for r in map(Requirement, lines):
            if (r.marker is None or r.marker.evaluate({"extra": extra})) and not BY_TORCH.match(r.name):
                version = known.get(canonicalize_name(r.name))
                assert version and r.specifier.contains(version, prereleases=True), f"{name} wants {r}, not {version}"
                left += [(r.name, e) for e in ["", *r.extras]]
    assert {name for name, _ in seen} >= {"torch", "pysocks", "antlr4-python3-runtime"}
    missing = {name for name in known if name not in {n for n, _ in seen} and _is_here(name)}
    assert missing == set(), "in the lock, and nothing wants it"


def _is_here(name: str) -> bool:
    try:
        return requires(name) is not False
    except PackageNotFoundError:
        return False


def test_what_the_lock_is_told_of_torch_is_what_torch_says():
    [told] = project()["tool"]["uv"]["dependency-metadata"]
    assert (told["name"], told["version"]) == ("torch", here()["torch"])
    said = [Requirement(r) for r in requires("torch")]
    said = {r.name for r in said if not BY_TORCH.match(r.name) and (r.marker is None or r.marker.evaluate({"extra": ""}))} - {"triton"}
    assert set(told["requires-dist"]) == said


@pytest.fixture
def commands(tmp_path):
    """What `make install` would do in a new environment."""
    words = ["make", "--dry-run", "install", f"VENV={tmp_path / 'none'}", f"PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "pip install" in line]


def test_make_installs_all_but_torch_and_itself_by_hash(commands):
    builds, rest, torch, itself = commands
    assert "--require-hashes" in builds and builds.startswith("sed -n '/^setuptools==/") and builds.endswith("--requirement /dev/stdin")
    assert "--require-hashes" in rest and rest.endswith("--requirement requirements.lock")
    assert torch.endswith("--constraint constraints.txt torch==2.13.0")
    assert itself.endswith("--no-deps --no-build-isolation --editable .")
    for line in (builds, rest):  # nothing is fetched beside what is listed: neither a dependency, nor what builds a source distribution
        assert {"--no-deps", "--no-build-isolation", "--only-binary"} <= set(line.split())


def test_what_builds_the_others_is_taken_from_the_lock_alone(commands):
    sed = commands[0].split(" | ")[0]
    [entry] = entries(subprocess.run(["bash", "-c", sed], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert entry.requirement.name == "setuptools" and len(entry.hashes) == 2


@pytest.fixture
def install(commands, tmp_path):
    """`install(lock text)` of what that lies in a folder, with the Makefile's options: (exit code, output, was it installed)."""
    words = shlex.split(commands[1])
    options = words[words.index("install") + 1 : words.index("--requirement")]

    def run(text):
        (tmp_path / "lock").write_text(text)
        words = [*options, "--no-index", "--find-links", tmp_path, "--target", tmp_path / "site", "--requirement", tmp_path / "lock"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *words], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "site" / "small.py").exists()

    return run


@pytest.fixture
def small(tmp_path):
    """A wheel; its hash."""
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("small.py", "")
        file.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\nRequires-Dist: another\n")
        file.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("small-1.0.dist-info/RECORD", "small.py,,\n")
    return sha256(path.read_bytes()).hexdigest()


def test_a_file_with_its_hash_is_installed_alone(install, small):
    """Without the dependency that it wants and that is not to be had."""
    code, said, there = install(f"small==1.0 --hash=sha256:{small}\n")
    assert code == 0 and there, said


def test_a_file_with_another_hash_is_refused(install, small):
    wrong = small[:-1] + ("0" if small[-1] != "0" else "1")
    code, said, there = install(f"small==1.0 --hash=sha256:{wrong}\n")
    assert code != 0 and not there and "DO NOT MATCH THE HASHES" in said and small in said


def test_an_entry_without_a_hash_is_refused(install, small):
    code, said, there = install("small==1.0\n")
    assert code != 0 and not there and "--require-hashes" in said


def test_a_source_distribution_that_is_not_named_is_refused(install, tmp_path):
    """Whatever its hash: to build it would run it."""
    ran = tmp_path / "ran"
    folder = tmp_path / "small-1.0"
    folder.mkdir()
    (folder / "setup.py").write_text(f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='small', version='1.0')\n")
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
    subprocess.run(["tar", "-C", tmp_path, "-czf", tmp_path / "small-1.0.tar.gz", "small-1.0"], check=True)
    digest = sha256((tmp_path / "small-1.0.tar.gz").read_bytes()).hexdigest()
    code, _, there = install(f"small==1.0 --hash=sha256:{digest}\n")
    assert code != 0 and not there and not ran.exists()
