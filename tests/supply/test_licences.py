"""docs/licences.md lists what is installed, and nothing has a licence that binds who imports it."""

import re
from types import SimpleNamespace

import pytest
from packaging.utils import canonicalize_name

from .licences import PAGE, installed, licence, read, refused, rows, ships, training
from .lock import constraints, here, pins


def test_every_pinned_distribution_is_listed_with_a_licence():
    """Of every Python; each once."""
    listed = read()
    assert set(listed) == {canonicalize_name(r.name) for r in constraints()}
    assert PAGE.read_text(encoding="utf-8").count("\n| ") == len(listed) + 2
    for row in listed.values():
        name, where, said, _ = (cell.strip() for cell in row.strip("|").split("|"))
        assert said and where in ("training", "extras"), name


def test_the_list_is_of_what_is_installed():
    """Where Python 3.10 has an older one, the list is of the newer."""
    newer = pins(constraints(), "3.11.0")
    listed, found = read(), {name: row for name, row in rows().items() if newer.get(name, here()[name]) == here()[name]}
    assert len(found) > 80
    assert {name: listed[name] for name in found} == found


def test_none_is_of_a_kind_that_is_refused():
    """What they ship too."""
    for name, d in installed().items():
        for said in [licence(d), *ships(d)]:
            assert said and not refused(said), f"{name}: {said}"


def test_what_is_lgpl_is_said():
    text = PAGE.read_text(encoding="utf-8")
    assert {name for name, d in installed().items() if "LGPL" in " ".join([licence(d), *ships(d)])} == {"numpy"}
    assert re.search(r"LGPL: libquadmath, .* in\sNumPy's wheels", text)


def test_what_is_for_training():
    used = training(installed())
    assert {"torch", "deepspeed", "hydra-core", "antlr4-python3-runtime", "numpy", "wandb", "plotly"} <= used
    assert not {"pytest", "hypothesis", "bandit", "selenium", "transformers", "dash", "tensorboard", "ruff"} & used


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("GPL-3.0-or-later", True),
        ("AGPL-3.0-only", True),
        ("MIT AND GPL-2.0-only", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("GNU Affero General Public License v3", True),
        ("SSPL-1.0", True),
        ("BUSL-1.1", True),
        ("LicenseRef-NVIDIA-Proprietary", True),
        ("LGPL-2.1-or-later", False),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("GPL-3.0-with-GCC-exception", False),
        ("FTL OR GPL-2.0-or-later", False),
        ("GPL-2.0-or-later OR SSPL-1.0", True),
        ("MIT AND (Zlib OR GPL-2.0-only)", True),  # to be looked at
        ("MPL-2.0 AND MIT", False),
        ("Apache-2.0 WITH LLVM-exception", False),
    ],
)
def test_kinds(said, expected):
    assert refused(said) is expected


@pytest.mark.parametrize(
    ("fields", "classifiers", "expected"),
    [
        ({"License-Expression": "MIT OR Apache-2.0", "License": "MIT"}, [], "MIT OR Apache-2.0"),
        ({"License": "Apache License, Version 2.0"}, [], "Apache-2.0"),
        ({"License": "Copyright (c) someone\nAll rights ..."}, ["License :: OSI Approved :: BSD License"], "BSD"),
        ({"License": "Dual License"}, ["License :: OSI Approved :: BSD License", "License :: OSI Approved :: MIT License"], "BSD, MIT"),
        ({"License-Expression": "Apache-2.0 AND GPL-2.0-only"}, [], "Apache-2.0 AND GPL-2.0-only"),
        ({"License": "Apache-2.0 AND GPL-2.0-only"}, [], "Apache-2.0 AND GPL-2.0-only"),
        ({"License": "something of their own"}, ["Topic :: Software Development"], "something of their own"),
        ({}, ["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], "GNU General Public License v3 (GPLv3)"),
        ({}, [], ""),
    ],
)
def test_a_licence_by_what_metadata_say(fields, classifiers, expected):
    metadata = SimpleNamespace(get=fields.get, get_all=lambda key, default: classifiers)
    assert licence(SimpleNamespace(metadata=metadata)) == expected
