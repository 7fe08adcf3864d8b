"""Attention over a sequence that is split over ranks (Ulysses), and the kernel underneath.

Shape legend: B batch, L all tokens, l this rank's tokens, H all heads, h this rank's heads, D head dim, S text tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_dist.distributed.collectives import all_to_all
from wan_dist.distributed.mesh import Axis
from wan_dist.layers.sequence import split_range, split_sizes

# (q_BLHD, k_BSHD, v_BSHD) -> o_BLHD
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernel(name: str) -> Attend:
    """torch's scaled dot product attention, unmasked; `auto` leaves the kernel to torch, a name forces it."""

    def attend(q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
        if q.device.type == "cpu":  # every block of queries reads all of k and v: one copy pays for itself
            k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    if name == "auto":
        return attend

    def attend_with(q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(_BACKENDS[name]):
            return attend(q_BLHD, k_BSHD, v_BSHD)

    return attend_with


def ulysses_attention(
    q_BlHD: torch.Tensor, k_BlHD: torch.Tensor, v_BlHD: torch.Tensor, axis: Axis, tokens: int, attend: Attend
) -> torch.Tensor:
    """Self-attention over all `tokens` from each rank's part of them: returns o_BlHD.

    Tokens are traded for heads in one all-to-all, and back in one (DeepSpeed-Ulysses, arXiv:2309.14509). Neither has
    to divide by the degree: both are split by `split_sizes`, so every rank knows all lengths by arithmetic and no
    padding exists that attention could see. Buffers are token-major, so what is received is in sequence order as it
    lies, without another copy.
    """
    if axis.size == 1:
        return attend(q_BlHD, k_BlHD, v_BlHD)
    batch, mine, heads, dim = q_BlHD.shape
    head_sizes, token_sizes = split_sizes(heads, axis.size), split_sizes(tokens, axis.size)
    my_heads = head_sizes[axis.rank]
    assert mine == token_sizes[axis.rank], f"{mine} tokens here, {token_sizes[axis.rank]} by arithmetic"

    send = q_BlHD.new_empty(3 * q_BlHD.numel())
    send_sizes = [3 * batch * mine * size * dim for size in head_sizes]
    for rank, part in enumerate(send.split(send_sizes)):
        begin, end = split_range(heads, axis.size, rank)
        part_lB3hD = part.view(mine, batch, 3, end - begin, dim)
        for which, x_BlHD in enumerate((q_BlHD, k_BlHD, v_BlHD)):
            part_lB3hD[:, :, which].copy_(x_BlHD[:, :, begin:end].transpose(0, 1))
    receive_sizes = [3 * batch * size * my_heads * dim for size in token_sizes]
    received_LB3hD = all_to_all(axis, send, send_sizes, receive_sizes).view(tokens, batch, 3, my_heads, dim)
    q, k, v = (received_LB3hD[:, :, which].transpose(0, 1) for which in range(3))
    out_BLhD = attend(q, k, v)

    send = out_BLhD.transpose(0, 1).contiguous().view(-1)
    send_sizes = [batch * size * my_heads * dim for size in token_sizes]
    receive_sizes = [batch * mine * size * dim for size in head_sizes]
    parts = all_to_all(axis, send, send_sizes, receive_sizes).split(receive_sizes)
    views = [part.view(mine, batch, size, dim) for part, size in zip(parts, head_sizes, strict=True)]
    return torch.cat(views, dim=2).transpose(0, 1)
