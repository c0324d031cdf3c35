"""What the pages name is there: tests, settings, experiments."""

import re
from pathlib import Path

import pytest
from shoestring.conf.build import is_known

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names(page):
    for path, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{path}::{test}"


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
