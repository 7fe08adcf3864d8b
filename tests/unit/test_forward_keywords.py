"""Which keywords a forward takes: by its real signature, resolved once per function, never mixed up with another's."""

import functools
import inspect
import types

import pytest
import torch

from wan_dist.layers.wrappers import ForwardKeywords


class Inner(torch.nn.Module):
    def forward(self, x, *, scale=1):
        return x * scale


def plain(a, b=1, *args, c, d=2): ...
def open_ended(a, **kwargs): ...
def positional_only(a, b, /, c): ...
def nothing(): ...


def wrap(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Callee:
    def __call__(self, x, *, y=1): ...


class Static:
    @staticmethod
    def forward(x, y): ...


class Class:
    @classmethod
    def forward(cls, x, y): ...


class PartialMethod:
    def _forward(self, x, y, z): ...

    forward = functools.partialmethod(_forward, z=3)


@pytest.mark.parametrize(
    ("forward", "accepted"),
    [
        (plain, {"a", "b", "c", "d"}),
        (open_ended, None),
        (positional_only, {"c"}),
        (nothing, set()),
        (functools.partial(plain, 1), {"b", "c", "d"}),
        (functools.partial(plain, c=1), {"a", "b", "c", "d"}),
        (functools.partial(functools.partial(plain, 1), 2, c=3), {"c", "d"}),
        (functools.partial(open_ended, 1, x=2), None),
        (wrap(plain), {"a", "b", "c", "d"}),
        (wrap(wrap(positional_only)), {"c"}),
        (wrap(open_ended), None),
        (functools.partial(wrap(plain), 1), {"b", "c", "d"}),
        (wrap(functools.partial(plain, 1)), {"b", "c", "d"}),
        (functools.lru_cache(plain), {"a", "b", "c", "d"}),
        (Inner().forward, {"x", "scale"}),
        (Inner.forward, {"self", "x", "scale"}),
        (wrap(Inner().forward), {"x", "scale"}),
        (functools.update_wrapper(functools.partial(lambda module, *a, **k: 0, 1), Inner().forward), {"x", "scale"}),
        (functools.partial(Inner().forward, 1), {"scale"}),
        (Callee(), {"x", "y"}),
        (Static().forward, {"x", "y"}),
        (Class().forward, {"x", "y"}),
        (PartialMethod().forward, {"x", "y", "z"}),
        (Inner(), None),  # nn.Module.__call__ takes anything
        (lambda q: q, {"q"}),
        (len, set()),
        ([].append, set()),
    ],
)
def test_accepted_keywords(forward, accepted):
    keywords = ForwardKeywords()
    for _ in range(2):
        assert keywords.accepted(forward) == accepted


def test_only_accepted():
    given = {"a": 1, "c": 2, "x": 3}
    keywords = ForwardKeywords()
    assert keywords.only_accepted(plain, given) == {"a": 1, "c": 2}
    assert keywords.only_accepted(positional_only, given) == {"c": 2}
    assert keywords.only_accepted(open_ended, given) == given
    assert keywords.only_accepted(nothing, given) == {}
    assert given == {"a": 1, "c": 2, "x": 3}


class A:
    def forward(self, x, a): ...


class B:
    def forward(self, x, b): ...


class WrappedA(A):
    forward = wrap(A.forward)


def test_bound_methods_of_one_name_are_told_apart_by_their_class():
    keywords = ForwardKeywords()
    for _ in range(2):
        assert keywords.accepted(A().forward) == {"x", "a"}
        assert keywords.accepted(B().forward) == {"x", "b"}
        assert keywords.accepted(WrappedA().forward) == {"x", "a"}


@pytest.mark.parametrize("unbound_first", [True, False])
def test_a_function_and_its_bound_method_are_told_apart(unbound_first):
    keywords = ForwardKeywords()
    wanted = [(A.forward, {"self", "x", "a"}), (A().forward, {"x", "a"})]
    for forward, accepted in wanted if unbound_first else reversed(wanted):
        assert keywords.accepted(forward) == accepted


def test_a_forward_of_the_instance_wins():
    keywords, first, second = ForwardKeywords(), Inner(), Inner()
    assert keywords.accepted(first.forward) == {"x", "scale"}
    second.forward = lambda z: z
    assert keywords.accepted(second.forward) == {"z"}
    second.forward = types.MethodType(lambda self, w: w, second)
    assert keywords.accepted(second.forward) == {"w"}
    assert keywords.accepted(first.forward) == {"x", "scale"}
    del second.forward
    assert keywords.accepted(second.forward) == {"x", "scale"}


def test_a_new_function_at_a_collected_ones_address():
    keywords, ids = ForwardKeywords(), []
    for n in range(100):
        forward = eval(f"lambda x, only_{n}: None", {})
        assert keywords.accepted(forward) == {"x", f"only_{n}"}
        ids.append(id(forward))
        del forward
    assert len(set(ids)) < len(ids), "no address was used twice: nothing was tested"
    assert len(keywords._known) == 0


def test_resolved_once_for_a_function_whatever_instance_it_is_bound_to(monkeypatch):
    calls = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: calls.append(function) or signature(function))
    keywords, bound_first = ForwardKeywords(), functools.partial(plain, 1)
    for _ in range(3):
        for forward in (plain, bound_first, A().forward, A().forward, B().forward, Callee(), Callee()):
            keywords.accepted(forward)
    assert len(calls) == 5
    ForwardKeywords().accepted(plain)
    assert len(calls) == 6
