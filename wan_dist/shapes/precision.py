"""In which numbers, and by which kernels, a device trains fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def fast_numbers(device: torch.device) -> Iterator[None]:
    """bf16 autocast where the device multiplies bf16; a CPU that does not is ten times slower in it than in fp32."""
    if device.type == "cpu":
        # Not every supported release of torch can tell.
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        in_bf16 = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    else:
        in_bf16 = True
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        yield


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """On a CPU by plain products of matrices: for a few dozen tokens and heads of 24 the backward pass of torch's flash
    kernel takes more than half of a step in bf16."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
