"""The peak of the bytes that operations allocate, by following every storage they return while it lives."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class PeakLiveBytes(TorchDispatchMode):
    """While active: `peak` is the largest sum of the sizes of all storages that operations made and that were alive at
    once. What existed before (weights, inputs) is not counted. Works on fake tensors, whose storages have sizes too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        fresh = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in before:
                self._live[leaf.untyped_storage()] = None
                fresh = True
        if fresh:  # sizes are asked anew: FSDP frees a storage by shrinking it
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self._live))
        return out
