"""Looking through what wraps a module (compile, data parallelism, FSDP1): its attributes, and what its forward takes.

FSDP2 wraps nothing: it changes the class of the module in place.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


MISSING = _Missing()  # no such attribute, as opposed to one that is None


def attribute(module: Any, name: str) -> Any:
    """`module.name`, or that of the module it wraps, at any depth: MISSING where none of them has it, None where the
    outermost that has it holds None."""
    seen: set[int] = set()
    while module is not None and id(module) not in seen:
        seen.add(id(module))
        value = getattr(module, name, MISSING)
        if value is not MISSING:
            return value
        inner = (getattr(module, wrapper, None) for wrapper in _WRAPPERS)
        module = next((candidate for candidate in inner if candidate is not None), None)
    return MISSING


class ForwardKeywords:
    """Which keywords a forward accepts, resolved once per function object.

    Entries are kept by the function itself, not by its id, and vanish with it, so that a new function at a collected
    one's address is never taken for it. Bound methods share their function's entry, whatever instance they belong to.
    """

    def __init__(self) -> None:
        # by function, then by whether its first parameter is bound
        self._known: weakref.WeakKeyDictionary[Any, dict[bool, frozenset[str] | None]] = weakref.WeakKeyDictionary()

    def accepted(self, forward: Callable[..., Any]) -> frozenset[str] | None:
        """The names that may be passed by keyword; None where any may (`**kwargs`), or nothing tells (a builtin)."""
        function, is_bound = _function_under(forward)
        try:
            known = self._known.setdefault(function, {})
        except TypeError:  # takes no weak reference
            known = {}
        if is_bound not in known:
            known[is_bound] = _keywords(function, skip_first=is_bound)
        return known[is_bound]

    def only_accepted(self, forward: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
        """Those of `keywords` that `forward` takes."""
        accepted = self.accepted(forward)
        return {name: value for name, value in keywords.items() if accepted is None or name in accepted}


def _function_under(forward: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """The object that owns the signature, and whether its first parameter is an instance that is bound already."""
    if inspect.ismethod(forward):
        return forward.__func__, True
    if inspect.isroutine(forward) or isinstance(forward, (functools.partial, type)):
        return forward, False
    return type(forward).__call__, True


def _keywords(function: Callable[..., Any], *, skip_first: bool) -> frozenset[str] | None:
    """From the real signature: `inspect` sees through `partial` and `wraps`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip_first:]
    except ValueError:  # a builtin that does not say
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_keyword)
