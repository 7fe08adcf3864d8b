"""Self-attention over a sequence that is split over ranks: Ulysses and ring in one function (USP, arXiv:2405.07719).

The tokens are split over ring x ulysses, ulysses fastest. Within a Ulysses group tokens are traded for heads, so that
every rank holds all tokens of its group for some heads; these groups are the ring, over which keys and values pass.

Shape legend: B batch, L all tokens, G tokens of a Ulysses group, l this rank's tokens, S tokens of some other part,
H all heads, h this rank's heads, D head dim.
"""

import torch

from wan_dist.distributed.collectives import all_to_all, pass_on
from wan_dist.distributed.mesh import Axis
from wan_dist.layers.attention_kernels import AttendPart, AttentionKernel
from wan_dist.layers.sequence import split_range, split_sizes


def usp_attention(
    q_BlHD: torch.Tensor,
    k_BlHD: torch.Tensor,
    v_BlHD: torch.Tensor,
    ring: Axis,
    ulysses: Axis,
    tokens: int,
    kernel: AttentionKernel,
) -> torch.Tensor:
    """Attention over all `tokens` from each rank's part of them (`split_sizes` over ring x ulysses): returns o_BlHD.

    Nothing has to divide: tokens and heads are split unevenly and exactly, every rank knows all lengths by arithmetic,
    and no padding exists that attention could see. A degree of 1 costs nothing.
    """
    sizes = split_sizes(tokens, ring.size * ulysses.size)
    groups = [sizes[first : first + ulysses.size] for first in range(0, len(sizes), ulysses.size)]
    mine = groups[ring.rank]
    assert q_BlHD.shape[1] == mine[ulysses.rank], f"{q_BlHD.shape[1]} tokens here, {mine[ulysses.rank]} by arithmetic"
    q, k, v = tokens_to_heads(q_BlHD, k_BlHD, v_BlHD, ulysses, mine)
    if ring.size == 1:
        out = kernel.whole(q, k, v)
    else:
        out = ring_attention(q, k, v, ring, [sum(group) for group in groups], kernel.part)
    return heads_to_tokens(out, ulysses, mine, q_BlHD.shape[2])


def tokens_to_heads(
    q_BlHD: torch.Tensor, k_BlHD: torch.Tensor, v_BlHD: torch.Tensor, axis: Axis, token_sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of this rank's tokens and all heads -> `[B, G, h, D]` of all the axis's tokens and this rank's heads.

    One all-to-all for the three (DeepSpeed-Ulysses, arXiv:2309.14509). Buffers are token-major, so what is received
    is in sequence order as it lies, without another copy.
    """
    if axis.size == 1:
        return q_BlHD, k_BlHD, v_BlHD
    batch, mine, heads, dim = q_BlHD.shape
    head_sizes = split_sizes(heads, axis.size)
    my_heads, tokens = head_sizes[axis.rank], sum(token_sizes)
    send = q_BlHD.new_empty(3 * q_BlHD.numel())
    send_sizes = [3 * batch * mine * size * dim for size in head_sizes]
    for rank, part in enumerate(send.split(send_sizes)):
        begin, end = split_range(heads, axis.size, rank)
        part_lB3hD = part.view(mine, batch, 3, end - begin, dim)
        for which, x_BlHD in enumerate((q_BlHD, k_BlHD, v_BlHD)):
            part_lB3hD[:, :, which].copy_(x_BlHD[:, :, begin:end].transpose(0, 1))
    receive_sizes = [3 * batch * size * my_heads * dim for size in token_sizes]
    received_GB3hD = all_to_all(axis, send, send_sizes, receive_sizes).view(tokens, batch, 3, my_heads, dim)
    q, k, v = (received_GB3hD[:, :, which].transpose(0, 1) for which in range(3))
    return q, k, v


def heads_to_tokens(out_BGhD: torch.Tensor, axis: Axis, token_sizes: list[int], heads: int) -> torch.Tensor:
    """The way back for the result, in one all-to-all: `[B, G, h, D]` -> `[B, l, heads, D]`."""
    if axis.size == 1:
        return out_BGhD
    batch, _, my_heads, dim = out_BGhD.shape
    mine, head_sizes = token_sizes[axis.rank], split_sizes(heads, axis.size)
    send = out_BGhD.transpose(0, 1).contiguous().view(-1)
    send_sizes = [batch * size * my_heads * dim for size in token_sizes]
    receive_sizes = [batch * mine * size * dim for size in head_sizes]
    parts = all_to_all(axis, send, send_sizes, receive_sizes).split(receive_sizes)
    views = [part.view(mine, batch, size, dim) for part, size in zip(parts, head_sizes, strict=True)]
    return torch.cat(views, dim=2).transpose(0, 1)


def ring_attention(
    q_BGhD: torch.Tensor,
    k_BGhD: torch.Tensor,
    v_BGhD: torch.Tensor,
    axis: Axis,
    token_sizes: list[int],
    attend_part: AttendPart,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys and values of every rank of the axis: returns o_BGhD.

    token_sizes: tokens of each rank. Keys and values travel round the ring (arXiv:2310.01889) in two buffers: while
    one part is attended to, the next arrives. Partial results are merged in fp32 by their log-sum-exp.
    """
    batch, mine, heads, dim = q_BGhD.shape
    buffers = [q_BGhD.new_empty(2 * batch * max(token_sizes) * heads * dim) for _ in range(2)]

    def held(step: int) -> torch.Tensor:
        """The part that is here in this round: `[2, B, S, h, D]`, in a buffer that rounds share in turn."""
        size = token_sizes[(axis.rank - step) % axis.size]
        return buffers[step % 2][: 2 * batch * size * heads * dim].view(2, batch, size, heads, dim)

    held(0)[0].copy_(k_BGhD)
    held(0)[1].copy_(v_BGhD)
    merged = _Merged(q_BGhD)
    for step in range(axis.size):
        wait = pass_on(axis, held(step), held(step + 1)) if step + 1 < axis.size else None
        k, v = held(step)
        if mine and k.shape[1]:
            merged.add(*attend_part(q_BGhD, k, v))
        if wait is not None:
            wait()
    return merged.out_BGhD.to(q_BGhD.dtype)


class _Merged:
    """Attention over the parts so far, fp32, with its log-sum-exp: the exact softmax over their union."""

    def __init__(self, q_BGhD: torch.Tensor) -> None:
        self.out_BGhD = torch.zeros_like(q_BGhD, dtype=torch.float32)
        self._lse_BGh: torch.Tensor | None = None

    def add(self, out_BGhD: torch.Tensor, lse_BGh: torch.Tensor) -> None:
        """The new part's share of the softmax is e^lse / (e^lse + e^sum): a sigmoid, which no size of logit breaks."""
        if self._lse_BGh is None:
            self.out_BGhD, self._lse_BGh = out_BGhD.float(), lse_BGh
            return
        share = torch.sigmoid(lse_BGh - self._lse_BGh).unsqueeze(-1)
        self.out_BGhD = torch.lerp(self.out_BGhD, out_BGhD.float(), share)
        self._lse_BGh = torch.logaddexp(self._lse_BGh, lse_BGh)
