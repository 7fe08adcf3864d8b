"""An attribute looked up through whatever wraps a module: absent is not None, and the outermost that has it wins."""

import types

import pytest
import torch

from wan_dist.layers.wrappers import MISSING, attribute


class Inner(torch.nn.Module):
    config = "inner's"
    nothing = None

    def forward(self, x):
        return x


def holder(name: str, inner: object, **attributes: object) -> torch.nn.Module:
    """A module that holds another under `name`, as compile, DataParallel and FSDP1 do."""
    outer = torch.nn.Module()
    setattr(outer, name, inner)
    for key, value in attributes.items():
        setattr(outer, key, value)
    return outer


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")


@pytest.mark.parametrize("name", WRAPPERS)
def test_through_each_wrapper(name):
    wrapped = holder(name, Inner())
    assert attribute(wrapped, "config") == "inner's"
    assert attribute(wrapped, "nothing") is None
    assert attribute(wrapped, "absent") is MISSING
    assert attribute(holder(name, Inner(), config="outer's"), "config") == "outer's"
    assert attribute(holder(name, Inner(), config=None), "config") is None


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("middle", WRAPPERS)
def test_through_nested_wrappers(outer, middle):
    wrapped = holder(outer, holder(middle, holder("module", Inner())))
    assert attribute(wrapped, "config") == "inner's"
    assert attribute(wrapped, "nothing") is None
    assert attribute(wrapped, "absent") is MISSING
    assert attribute(holder(outer, holder(middle, Inner(), nothing=0)), "nothing") == 0


def test_absent_and_none_and_false_are_three_things():
    assert attribute(Inner(), "absent") is MISSING
    assert attribute(None, "config") is MISSING
    assert MISSING is not None
    assert not MISSING
    assert repr(MISSING) == "MISSING"


def test_a_wrapper_that_holds_nothing_and_a_ring_of_wrappers_end():
    assert attribute(holder("module", None), "config") is MISSING
    ring = types.SimpleNamespace()
    ring.module = types.SimpleNamespace(module=ring)
    assert attribute(ring, "config") is MISSING
    both = types.SimpleNamespace(_orig_mod=None, module=Inner())
    assert attribute(both, "config") == "inner's"


def test_a_property_that_raises_attribute_error_is_absent():
    class Broken:
        @property
        def config(self):
            raise AttributeError("not yet")

    assert attribute(Broken(), "config") is MISSING


def test_a_compiled_and_a_data_parallel_module():
    for wrapped in (
        torch.compile(Inner(), backend="eager"),
        torch.nn.DataParallel(Inner()),
        torch.compile(torch.nn.DataParallel(Inner()), backend="eager"),
    ):
        assert attribute(wrapped, "config") == "inner's"
        assert attribute(wrapped, "nothing") is None
        assert attribute(wrapped, "absent") is MISSING
