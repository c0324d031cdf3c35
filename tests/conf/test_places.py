"""Names of runs, models and sources stay below the folder that they are put in."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf import places
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError

WORDS = ["data=synthetic"]


@given(st.text(alphabet=st.sampled_from("a./-~\\ \n\0é"), max_size=12), st.booleans())
def test_what_passes_stays_below(name, parts):
    """Oracle: the system's own idea of a path."""
    if not places.wrong(name, parts=parts):
        path = os.path.normpath(os.path.join("/root/runs", name))
        assert path.startswith("/root/runs/") and "\0" not in name and "\n" not in name
        assert path.count("/") == 3 + (name.count("/") if parts else 0)


@given(st.text(max_size=300), st.booleans())
def test_the_nearest_name_is_right(name, parts):
    assert places.wrong(places.nearest(name, parts=parts), parts=parts) == ""


NAMES = ["../../x", "/etc/cron.d/x", "a/../../x", "a//b", ".", "-rf", "a/-x", "~root/x", "a\\nb", "a\\x1b]0;x", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cannot_be_named_out_of_its_folder(name):
    with pytest.raises(ConfigError, match=r"^name = .*(stays in its folder|one line of printable text|200 bytes)"):
        load([*WORDS, 'name="' + name.encode().decode("unicode_escape") + '"'])


def test_names_that_people_give():
    for name in ("tiny", "sweep/0_optim.lr=1e-3", "größer 2", "a..b", "v1.2", ".hidden"):
        assert load([*WORDS, f'name="{name}"']).run_dir == f"runs/{name}"


@pytest.mark.parametrize("field", ["model.name", "data.sources"])
def test_models_and_sources_become_files_too(field):
    word = 'model.name="../../evil"' if field == "model.name" else None
    with pytest.raises(ConfigError, match=f"^{field} = .*stays in its folder"):
        if word:
            load([*WORDS, word])
        else:
            load_with_source("../../evil")


def load_with_source(name):
    from shoestring.conf.compose import _checked, _plain  # a YAML file may have any key; a word on the command line may not

    tree = _plain(load(WORDS))
    tree["data"]["sources"] = {name: tree["data"]["sources"]["synthetic"]}
    return _checked(tree)


@pytest.mark.parametrize("value", ["runs/a\\nb", "-x/run"])
def test_run_directories_are_one_line_and_no_option(value):
    with pytest.raises(ConfigError, match=r"^run_dir = .*one line of printable text that does not begin with -"):
        load([*WORDS, 'run_dir="' + value.encode().decode("unicode_escape") + '"'])
