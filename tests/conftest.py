"""Shared by all tests: one thread per process, no network, a cache of its own, checkpoints built once a session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: fork workers must not inherit a thread pool
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HYDRA_FULL_ERROR"] = "0"

from pathlib import Path

import pytest

from support.checkpoints import TINY, CheckpointFactory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`checkpoints(heads=3, experts=2, ...)`: the folder of a random checkpoint, built once a session per shape."""
    return CheckpointFactory(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def tiny(checkpoints: CheckpointFactory) -> Path:
    """A random single-expert checkpoint with several shards."""
    return checkpoints()


@pytest.fixture(scope="session")
def repo() -> Path:
    return TINY.parents[2]
