"""Two tiers of tests. `make test` is for the one who makes a change: everything that is promised, in minutes, each with
the cases that fail first. `make test-all` adds more cases of the same, and whatever takes minutes by itself."""

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
