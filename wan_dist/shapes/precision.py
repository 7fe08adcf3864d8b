"""In which numbers, and by which kernels, a device trains fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def fast_numbers(device: torch.device) -> Iterator[None]:
    """bf16 autocast where the device multiplies bf16; a CPU that does not is ten times slower in it than in fp32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=_multiplies_bf16(device)):
        yield


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """By plain products of matrices on a CPU in bf16: there the backward pass of torch's flash kernel takes more than
    half of a step, for a few dozen tokens and heads of 24."""
    if device.type != "cpu" or not _multiplies_bf16(device):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not every supported release can tell
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
