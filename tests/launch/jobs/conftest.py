"""A Slurm for the tests of a file."""

import os

import pytest

from . import cluster


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    lacking = cluster.missing()
    if lacking:
        assert not os.environ.get("CI"), f"CI installs what these tests need: {lacking}"
        pytest.skip(f"needs {', '.join(lacking)}")
    with cluster.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
