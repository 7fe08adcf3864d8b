"""Shared by the end-to-end tests: they run on the CPU, whatever the machine has."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_gpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
