"""The table of exit codes: the page has what the program says."""

import re
from pathlib import Path

from shoestring.conf.errors import ConfigError
from shoestring.launch import exit_codes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"


def test_the_page_has_every_code_with_its_meaning():
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): meaning for code, meaning, _ in rows} == exit_codes.MEANING
    assert {int(code) for code, _, again in rows if again == "yes"} == set(exit_codes.PASSING)


def test_codes_are_of_one_kind_only():
    assert not set(exit_codes.AGREED) - {exit_codes.OTHER_SIZE} & set(exit_codes.PASSING)
    assert len(exit_codes.MEANING) == len(set(exit_codes.MEANING))


def test_a_sentence_is_text_for_a_terminal():
    """Control characters of a hostile file would set the title, move the cursor, or stop the print (a lone surrogate)."""
    said = exit_codes.sentence(ConfigError("name", 9, "\x1b]0;owned\x07 \ud800 größe\r\n" + "x" * 10**6, 3))
    assert said.isprintable() and "größe" in said and "\\x1b" in said and len(said) < 2100
    assert said.startswith("name = ") and said.endswith("nearest valid value: 3")
