"""Remembering what was computed from a tensor, for as long as that very tensor is asked about."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """A function's values by the identity of its tensor argument.

    Identity, and the version counter that in-place changes raise, make it impossible to serve a value of another
    prompt; the argument is kept alive, so that its identity cannot be taken over. `clear` frees both.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[torch.Tensor, int, Value]] = []

    def __call__(self, source: torch.Tensor, compute: Callable[[torch.Tensor], Value]) -> Value:
        for kept, version, value in self._entries:
            if kept is source and version == source._version:
                return value
        value = compute(source)
        self._entries.append((source, source._version, value))
        return value

    def clear(self) -> None:
        self._entries.clear()
