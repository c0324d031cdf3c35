"""The wheel has everything that the tree has, and works where the tree is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import shoestring

ROOT = Path(shoestring.__file__).resolve().parent
# Never in a wheel, though it may lie in a working tree.
ASIDE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "wandb", "tests", "docs")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def _run(*words: object, **kwargs) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([str(word) for word in words], text=True, timeout=600, env=environment, **both, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which the build may litter. Nothing is downloaded: setuptools is in the `test` extra."""
    tree, out = tmp_path_factory.mktemp("tree") / "shoestring", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, tree, ignore=ASIDE)
    _run(*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, tree)
    [made] = out.glob("*.whl")
    return made


def test_every_file_of_every_package_is_in_the_wheel(wheel):
    folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    assert len(folders) >= 5
    files = [ROOT / "__init__.py", *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    wanted = {f"shoestring/{path.relative_to(ROOT).as_posix()}" for path in files if "__pycache__" not in path.parts}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert wanted - held == set(), "not in the wheel: add the package or its data to pyproject.toml"
    assert held - wanted == set(), "in the wheel and not in the tree"


def test_the_wheel_trains_from_another_folder_in_another_environment(wheel, tmp_path):
    """The new environment borrows this one's dependencies through a .pth line, which leaves out an editable Shoestring."""
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = _run(python, "-c", "import shoestring; print(shoestring.__file__)", cwd=elsewhere).strip()
    assert Path(where).is_relative_to(site)

    cache = f"data.cache_dir={tmp_path / 'cache'}"
    out = _run(tmp_path / "venv" / "bin" / "shoestring", "train", "experiment=smoke", "train.steps=3", cache, cwd=elsewhere)
    assert "3 of 3 steps" in out
    made = {path.name for path in (elsewhere / "runs" / "smoke").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "report.html"} <= made
    assert {path.name for path in elsewhere.iterdir()} == {"runs"}


def test_a_commit_s_wheel_is_the_same_bytes_wherever_it_is_built(tmp_path):
    """`make wheel` in two clones: elsewhere, at another time, under another umask and time zone."""
    tree = tmp_path / "shoestring"
    shutil.copytree(ROOT, tree, ignore=ASIDE)
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    git = ["git", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false", "-C", tree]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all", "--date", "@1700000000"]):
        subprocess.run([*git, *words], check=True, env={**os.environ, **who, "GIT_COMMITTER_DATE": "@1700000000"})

    venv, made = Path(sys.executable).parents[1], {}
    for name, umask, zone in (("one", 0o022, "UTC"), ("further/two", 0o077, "Pacific/Auckland")):
        clone = tmp_path / name / "shoestring"
        _run("git", "clone", "--quiet", tree, clone, umask=umask)
        # This environment has everything, whatever make thinks of it.
        _run("env", f"TZ={zone}", "make", "wheel", f"VENV={venv}", f"--old-file={venv / '.installed'}", cwd=clone, umask=umask)
        [made[name]] = (clone / "dist").glob("*.whl")
    one, two = (path.read_bytes() for path in made.values())
    assert one == two
    dates = {info.date_time for info in zipfile.ZipFile(made["one"]).infolist()}
    assert dates == {(2023, 11, 14, 22, 13, 20)}, "1700000000 in UTC"
