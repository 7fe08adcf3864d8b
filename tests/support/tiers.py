"""Two tiers of tests. `make test` is for the one who makes a change: everything that is promised but Slurm, in minutes,
each with few cases. `make test-all`, for what is to land, adds more cases of the same, and Slurm."""

import os
from typing import Any, TypeVar

import pytest

ALL = os.environ.get("WAN_DIST_TESTS") == "all"
all_only = pytest.mark.skipif(not ALL, reason="more of what other tests show: make test-all")
Case = TypeVar("Case")


def in_all(*cases: Case) -> tuple[Case, ...]:
    """These cases, where everything is to be tested; none otherwise."""
    return cases if ALL else ()


def named_in_all(cases: dict[str, Any]) -> dict[str, Any]:
    """The same of cases that have names."""
    return cases if ALL else {}
