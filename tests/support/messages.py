"""What a rank hands to torch.distributed and to convolutions: whether it is contiguous, of one format at both ends."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from wan_dist.layers.memory_format import weight_format


@dataclass(frozen=True)
class Message:
    """strides: of the dims that have any, those longer than 1."""

    contiguous: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Log:
    """What one rank handed to torch.distributed, in order: messages by peer, and whether the tensors that it gave to
    another function were contiguous, by its name. followed: of each convolution whose weight has a format, whether the
    input had the same."""

    sent: dict[int, list[Message]] = field(default_factory=lambda: defaultdict(list))
    received: dict[int, list[Message]] = field(default_factory=lambda: defaultdict(list))
    others: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    followed: list[bool] = field(default_factory=list)


def message(tensor: torch.Tensor) -> Message:
    strides = tuple(stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1)
    contiguous = tensor.is_contiguous(memory_format=torch.contiguous_format)
    return Message(contiguous, tuple(tensor.shape), strides, tensor.dtype)


# `isend` and `irecv` go by `batch_isend_irecv`, where they are known by what they are, so that they cannot be replaced.
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@contextmanager
def logged() -> Iterator[Log]:
    log, batch = Log(), dist.batch_isend_irecv

    def exchanged(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            messages = log.sent if operation.op is dist.isend else log.received
            messages[operation.group_peer].append(message(operation.tensor))
        return batch(operations)

    def watched(name: str) -> Callable:
        function = getattr(dist, name)

        def watch(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                tensors = value if isinstance(value, (list, tuple)) else [value]
                log.others[name] += [tensor.is_contiguous() for tensor in tensors if isinstance(tensor, torch.Tensor)]
            return function(*args, **kwargs)

        return watch

    def convolution(function: Callable) -> Callable:
        def watch(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
            wanted = weight_format(weight)
            if wanted is not None:
                log.followed.append(x.is_contiguous(memory_format=wanted))
            return function(x, weight, *args)

        return watch

    with (
        patch.multiple(dist, batch_isend_irecv=exchanged, **{name: watched(name) for name in COLLECTIVES}),
        patch.multiple(F, conv2d=convolution(F.conv2d), conv3d=convolution(F.conv3d)),
    ):
        yield log
