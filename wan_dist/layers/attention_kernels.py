"""torch's scaled dot product attention, unmasked: as it comes, and with the log-sum-exp that partial results need.

Shape legend: B batch, L queries, S keys, H heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# (q_BLHD, k_BSHD, v_BSHD) -> o_BLHD
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (q_BLHD, k_BSHD, v_BSHD) -> o_BLHD and the fp32 log-sum-exp_BLH of the scaled scores
AttendPart = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionKernel:
    """One kernel in two forms: `whole` over all keys, `part` over some of them."""

    whole: Attend
    part: AttendPart


def attention_kernel(name: str) -> AttentionKernel:
    """The kernel of that name; `auto` leaves the choice to torch (for parts, by device, dtype and head dim)."""

    def attend(q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*_heads_first(q_BLHD, k_BSHD, v_BSHD)).transpose(1, 2)

    def attend_with(q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(_BACKENDS[name]):
            return attend(q_BLHD, k_BSHD, v_BSHD)

    def attend_part(
        q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = _heads_first(q_BLHD, k_BSHD, v_BSHD)
        out, lse = _part(name if name != "auto" else _kernel_for(q), q, k, v)
        return out.transpose(1, 2), lse.transpose(1, 2)

    return AttentionKernel(attend if name == "auto" else attend_with, attend_part)


def _heads_first(
    q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if q.device.type == "cpu":  # every block of queries reads all of k and v: one copy pays for itself
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _kernel_for(q_BHLD: torch.Tensor) -> str:
    if q_BHLD.device.type == "cpu":
        return "flash"
    aligned, dim = q_BHLD.shape[-1] % 8 == 0, q_BHLD.shape[-1]
    if aligned and dim <= 256 and q_BHLD.dtype in (torch.bfloat16, torch.float16):
        return "flash"
    return "efficient" if aligned else "math"


def _part(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`o_BHLD`, fp32 `lse_BHL`. The operators are those under `F.scaled_dot_product_attention`, which keeps their
    log-sum-exp to itself."""
    aten = torch.ops.aten
    if name == "math":
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        lse = torch.logsumexp(scores, -1)
        return ((scores - lse.unsqueeze(-1)).exp_() @ v.float()).to(q.dtype), lse
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if name == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif name == "efficient":
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    else:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    # efficient pads the length to a multiple of 32; cuDNN keeps a last dimension of 1
    return out, lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]].float()
