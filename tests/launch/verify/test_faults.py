"""`shoestring verify` catches every mistake in faults.py, by the check that ought to, in the step in which it is made.

The cases that they are tried on pass without them: what is caught is the mistake.
"""

import re

import pytest
import torch
from shoestring.launch.verify.prove import prove

from .faults import MISTAKES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: references are kept in it."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("faults")


def step_of(line: str) -> int:
    found = re.search(r"\bstep (\d+)", line)
    return int(found[1]) if found else 10**9


@pytest.mark.parametrize("case, on", dict.fromkeys((m.case, m.on) for m in MISTAKES.values()), ids=lambda part: getattr(part, "name", part))
def test_passes_without_a_mistake(folder, case, on):
    verdict = prove(case, on, folder / "case")
    assert verdict.passed, verdict.error or "\n".join(str(d) for d in verdict.broken)
    assert not verdict.notes


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_caught(folder, mistake):
    verdict = prove(mistake.case, mistake.on, folder / "case", mistake.make)
    assert not verdict.passed
    told = [str(d) for d in verdict.broken] or verdict.error.splitlines()[-1:]
    caught = [line for line in told if re.match(mistake.caught_by, line)]
    assert caught, f"nothing says '{mistake.caught_by}':\n" + "\n".join(told)
    assert step_of(caught[0]) == min(map(step_of, told)), "something else gave it away in an earlier step"
