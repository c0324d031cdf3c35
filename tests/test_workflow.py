"""What runs the tests elsewhere: the workflow of stock runners, and `.ci/run`, which it calls, on machines with and without root."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / ".ci" / "run"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_there_is_one():
    assert [path.name for path in WORKFLOWS] == ["ci.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_can_only_read_and_uses_what_it_names(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert True in workflow, "`on`, which YAML 1.1 reads as a truth value"
    assert "pull_request_target" not in workflow[True] and "secrets." not in path.read_text()
    for job in workflow["jobs"].values():
        assert "permissions" not in job and 0 < job["timeout-minutes"] <= 120 and "container" not in job
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), step
    assert workflow["concurrency"]["cancel-in-progress"] is True


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_s_commit_stands_beside_its_version(path):
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) == 2 and all(re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in lines), lines


def test_newer_actions_are_proposed_and_nothing_else():
    [update] = read(ROOT / ".github" / "dependabot.yml")["updates"]
    assert update["package-ecosystem"] == "github-actions" and update["directory"] == "/"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_shell_of_its_steps_can_be_read(path):
    for step in steps(read(path)):
        checked = subprocess.run(["bash", "-n"], input=step.get("run", ""), capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_it_runs_the_tests_under_pythons_that_are_supported():
    [job] = read(WORKFLOWS[0])["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"] and "\nmake test\n" in RUN.read_text()
    assert os.access(RUN, os.X_OK)
    assert set(job["strategy"]["matrix"]["python"]) <= {"3.10", "3.11", "3.12", "3.13"}  # as the Makefile has it
    [python] = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert (ROOT / python["cache-dependency-path"]).exists() and python["python-version"] == "${{ matrix.python }}"


@pytest.fixture
def machine(tmp_path):
    """`machine(uid, commands)`: `.ci/run` where there are these commands beside the shell's; (exit code, what was called, stderr)."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci" / "run")
    programs, log = tmp_path / "bin", tmp_path / "called"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    programs.mkdir()

    def program(path, body):
        path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        path.chmod(0o755)

    def run(uid, *commands):
        for name in ("bash", "dirname", "env"):
            (programs / name).symlink_to(shutil.which(name))
        program(programs / "id", f"echo {uid}")
        program(tmp_path / ".venv" / "bin" / "python", f'echo "python $*" >> {log}')
        for name in commands:
            program(programs / name, f'echo "{name} $*" >> {log}' + ('; exec "$@"' if name == "sudo" else ""))
        out = subprocess.run([tmp_path / ".ci" / "run"], env={"PATH": str(programs)}, capture_output=True, text=True, timeout=30)
        return out.returncode, log.read_text().splitlines() if log.exists() else [], out.stderr

    return run


TESTS = ["make test", "python -m shoestring.launch.plan.ladder docs --check"]


def test_where_everything_is_there_nothing_is_installed(machine):
    assert machine(1000, "make", "g++", "google-chrome", "chromedriver", "prometheus", "ssh-keygen", "apt-get", "sudo") == (0, TESTS, "")


def test_root_installs_what_is_missing(machine):
    code, called, _ = machine(0, "make", "apt-get", "sudo")
    assert code == 0 and called[2:] == TESTS and called[0] == "apt-get update -qq"
    assert called[1].startswith("apt-get install ") and called[1].endswith(" g++ chromium chromium-driver prometheus openssh-client")


def test_another_user_installs_it_with_sudo(machine):
    code, called, _ = machine(1000, "make", "chromium", "chromedriver", "prometheus", "ssh-keygen", "apt-get", "sudo")
    assert code == 0 and called[-2:] == TESTS
    assert [line.split()[0] for line in called[:-2]] == ["sudo", "apt-get", "sudo", "apt-get"] and called[3].endswith(" g++")


def test_without_either_it_says_what_is_wanted(machine):
    code, called, err = machine(1000, "make", "prometheus", "ssh-keygen", "apt-get")
    assert code == 1 and called == [] and err == "error: g++ chromium chromium-driver must be installed, which takes root or sudo\n"
