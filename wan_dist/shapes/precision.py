"""In which numbers a device trains fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def fast_numbers(device: torch.device) -> Iterator[None]:
    """bf16 autocast where the device multiplies bf16; a CPU that does not is ten times slower in it than in fp32."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        in_bf16 = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    else:
        in_bf16 = True
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        yield


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as two matrix products and a softmax: over the few tokens of a small clip the backward pass
    of the fused kernel takes longer."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
