"""Shared by the Slurm tests: clusters, and the CPU whatever the machine has.

Where Slurm is not installed the tests are skipped; with WAN_DIST_REQUIRE_SLURM=1 they fail instead, so that a machine
that should have run them cannot pass without.
"""

import os

import pytest

from support.slurm import cluster, networks_refused, why_not


@pytest.fixture(scope="module", autouse=True)
def no_gpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory):
    """A cluster of two nodes on this machine's loopback."""
    need(why_not())
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """A cluster of two nodes with a network and a host name each."""
    need(why_not(netns=True))
    if (refused := networks_refused()) is not None:
        pytest.skip(refused)  # nothing that could be installed would help
    with cluster(tmp_path_factory.mktemp("slurm-hosts") / "cluster", netns=True) as running:
        yield running


def need(reason):
    """Skip, or fail where the tests are required, if there is a reason why they cannot run."""
    if reason is not None and os.environ.get("WAN_DIST_REQUIRE_SLURM") == "1":
        pytest.fail(f"{reason}, and WAN_DIST_REQUIRE_SLURM=1")
    if reason is not None:
        pytest.skip(reason)
