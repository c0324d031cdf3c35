"""Text from outside: what is taken is what PyYAML and json make of it, and what has no bounds is refused before anything is made of it."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf import outside
from shoestring.conf.errors import ConfigError
from shoestring.conf.outside import parse_json, read_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_json_is_what_was_written(value):
    for ascii_only in (False, True):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize("text", ['"\\ud800"', '{"a": ["\\uDC00"]}', '{"\\ud800": 1}', b'"\\ud800"', b'"\xed\xa0\x80"', b'"\xff"'])
def test_text_that_no_file_can_hold(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_whole_pair_is_text():
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"


def given_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_yaml(path)


@pytest.mark.parametrize("text", ["a: 1\nb: [x, {c: null}]\n", "- &x {a: 1}\n- *x\n", "", "a: &b [1, 2]\nc: *b\n"])
def test_yaml_is_what_pyyaml_reads(tmp_path, text):
    assert given_yaml(tmp_path, text) == yaml.safe_load(text)


@pytest.mark.parametrize(("least", "most"), [
    (lambda n: "[" * n + "]" * n, outside.DEEPEST),  # levels in one line
    (lambda n: "\n".join("  " * i + "a:" for i in range(n)) + " 1", outside.DEEPEST),  # and in lines
])  # fmt: skip
def test_levels_are_counted(tmp_path, least, most):
    given_yaml(tmp_path, least(most - 2))
    for n in (most + 1, 20_000 if "[" in least(1) else most + 9):  # of so many brackets the C loader dies
        with pytest.raises(ConfigError, match=f"config.yaml: is over {most} levels"):
            given_yaml(tmp_path, least(n))


def test_values_are_counted_with_what_aliases_stand_for(tmp_path, monkeypatch):
    """Against the length of what PyYAML makes of it, written out."""
    monkeypatch.setattr(outside, "MOST_VALUES", 1000)
    text = lambda n: "a: &a [x, x, x, x]\nb: &b [" + ", ".join(["*a"] * 9) + "]\nc: [" + ", ".join(["*b"] * n) + "]\n"
    count = lambda value: 1 + sum(map(count, value)) if isinstance(value, list) else 1
    for n in range(15, 25):
        values = sum(1 + count(v) for v in yaml.safe_load(text(n)).values()) + 1
        if values <= 1000:
            given_yaml(tmp_path, text(n))
        else:
            with pytest.raises(ConfigError, match="stands for over 1,000 values"):
                given_yaml(tmp_path, text(n))


@pytest.mark.parametrize(("text", "said"), [
    ("a: [", "is not YAML"), ("!!python/object/apply:os.system [true]", "is not YAML"), ("a: 1\n b: 2", "line 2"),
    ("a: 2024-99-99", "is not YAML"), ("a: " + "9" * 5000, "is not YAML"), ("#" * (5 << 20), "as no settings have"),
])  # fmt: skip
def test_what_is_no_settings_is_one_sentence(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as error:
        given_yaml(tmp_path, text)
    assert str(error.value).count("\n") == 0 and "config.yaml" in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
