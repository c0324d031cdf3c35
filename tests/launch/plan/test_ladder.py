"""The gate on prices: the record is of this commit, and a change is shown with what moved it."""

import copy
import json
from pathlib import Path

import pytest
from shoestring.conf.compose import load
from shoestring.launch.plan import ladder
from shoestring.launch.validate import validate

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def plans():
    return ladder.price()


@pytest.fixture(scope="module")
def record():
    return json.loads((DOCS / "ladder.json").read_text())


def test_prices_are_on_record(plans, record):
    lines, beyond = ladder.changes(record, ladder.recorded(plans))
    assert not beyond, "\n".join([*lines, "on purpose? python -m shoestring.launch.plan.ladder docs"])


def test_the_page_is_of_these_prices(plans):
    assert (DOCS / "ladder.md").read_text() == ladder.page(plans), "python -m shoestring.launch.plan.ladder docs"


def test_rungs_fit_and_are_valid(plans):
    for rung in ladder.RUNGS:
        plan = plans[rung.experiment]
        assert plan.memory_gb[1.0] <= plan.config.cluster.memory_gb, rung.experiment
        if rung.experiment not in ("deepseek_v3", "dense_405b", "ladder_2048"):
            validate(load([f"experiment={rung.experiment}"]))


def test_what_moved_a_price_is_named(record):
    dearer = copy.deepcopy(record)
    dearer["ladder_64"]["dollars_total"] *= 1.05
    dearer["ladder_64"]["breakdown"]["bubble"] += 0.4
    lines, beyond = ladder.changes(record, dearer)
    assert beyond and any(line.startswith("ladder_64") and "+5.00 %" in line and "bubble: +0.4 s" in line for line in lines)
    assert not ladder.changes(record, record)[1] and ladder.changes({}, record)[1] and ladder.changes(record, {})[1]
