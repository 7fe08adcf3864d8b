"""Remembering what was computed from tensors, for as long as those very tensors are asked about."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """A function's values by the identity of the tensors it computes them from.

    Identity, and the version counter that in-place changes raise, make it impossible to serve a value of another
    prompt; the tensors are kept alive, so that their identity cannot be taken over. `clear` frees all.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[tuple[torch.Tensor, int], ...], Value]] = []

    def __call__(self, compute: Callable[..., Value], *sources: torch.Tensor) -> Value:
        """`compute(*sources)`, computed once as long as the sources are these tensors, unchanged."""
        for kept, value in self._entries:
            if len(kept) == len(sources) and all(
                tensor is source and version == source._version
                for (tensor, version), source in zip(kept, sources, strict=True)
            ):
                return value
        value = compute(*sources)
        self._entries.append((tuple((source, source._version) for source in sources), value))
        return value

    def clear(self) -> None:
        self._entries.clear()
