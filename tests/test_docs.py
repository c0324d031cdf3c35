"""What the pages name is there: tests, settings, experiments."""

import dataclasses
import re
from pathlib import Path

import pytest
from shoestring.conf.build import is_known
from shoestring.train.metrics import StepRecord, Summary
from shoestring.train.sinks.wandb_run import wandb_values

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names(page):
    for path, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{path}::{test}"


def test_every_promise_names_its_test():
    promised = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## What is promised")[1].split("## What is not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and not line.startswith("| ---") and " test |" not in line]
    assert len(rows) > 20 and all(re.search(r"`tests/\w+", row.split("|")[-2]) for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names(page):
    text = page.read_text(encoding="utf-8")
    for key in re.findall(r"[`\s']((?:model|parallel|precision|data|optim|train|checkpoint|cluster|launch)\.[a-z_.0-9]+)=", text):
        assert is_known(key), key
    for experiment in re.findall(r"experiment=([a-z_0-9]+)", text):
        assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").exists() or experiment == "mine", experiment


def test_fields_in_the_table_of_the_recipe():
    """The second column: `section.field`, and `.field` of the section before it."""
    rows = [line.split("|")[2] for line in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    found = 0
    for row in rows:
        section = ""
        for name in re.findall(r"`((?:[a-z]+)?\.[a-z_0-9]+)(?:=[^`]*)?`", row):
            section = name.partition(".")[0] or section
            assert is_known(f"{section}.{name.partition('.')[2]}"), name
            found += 1
    assert found > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links(page):
    """Other pages, and pictures."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_every_metric_is_explained():
    """Each field of a record and of a summary opens a row of the table; and no row is of a field that is not."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    fields = lambda part: {name for row in re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    steps, summary = text.split("## The summary")
    assert fields(steps) == {f.name for f in dataclasses.fields(StepRecord)}
    assert fields(summary) == {f.name for f in dataclasses.fields(Summary)}


def test_names_that_other_tools_have():
    """The column of W&B's names is what is sent there."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## The summary")[0]
    columns = re.findall(r"^\| `[^|]*\|[^|]*\|([^|]*)\|", text, flags=re.MULTILINE)
    told = {name for column in columns for name in re.findall(r"`([\w/]+)`", column)}
    full = {f.name: 1 for f in dataclasses.fields(StepRecord)} | dict(
        mtp_loss=[1.0], eval_loss_by_source={"SOURCE": 1.0}, max_vio=[1.0], rank_overload=[1.0], fp8_sentinel={"MEASURE": 1.0},
        breakdown={"PART": 1.0},
    )  # fmt: skip
    assert told == set(wandb_values(StepRecord(**full)))
