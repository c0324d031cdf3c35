"""A part of the matrix of faults (`make faults` has all of it): every kind that takes no waiting, each under one layout."""

import pytest
from shoestring.launch import exit_codes

from .judging import LAYOUTS, Place
from .matrix import EXPECTED, KINDS, alarms, cell

SLOW = ("SIGSTOP", "collective left out", "W&B away")  # the first two: test_processes.py; the last: tests/train/sinks/test_wandb_run.py
ELSEWHERE = ("SIGKILL", "exception in forward", "SIGTERM", "no checkpoint whole")  # test_processes.py, test_storage.py
TAKEN = [kind for kind in KINDS if kind.name not in (*SLOW, *ELSEWHERE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults"), seed=1)


@pytest.mark.parametrize("number", range(len(TAKEN)), ids=[kind.name for kind in TAKEN])
def test_twice_in_a_run(place, number):
    layout = list(LAYOUTS)[number % len(LAYOUTS)]
    assert cell(place, TAKEN[number], layout).wrong == []


def test_what_nothing_happens_to(place):
    assert alarms(place, 60)[0] == []
    assert not EXPECTED.match("step 4: memory of rank 0 changed between two updates") and not EXPECTED.match("rank 1 is slow: data takes")


def test_the_matrix_is_whole():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 18 and len(LAYOUTS) == 3
    assert all(kind.code in exit_codes.MEANING for kind in KINDS)
