"""Attention processors for diffusers' `WanAttention`: sequence-parallel self-attention, remembered text keys.

They see as many heads as this rank holds: under tensor parallelism `attn.heads` is their number and the linears and
norms around them are parallel ones.

Shape legend as in `wan_dist.layers.attention`; d is the model's width (H * D).
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from wan_dist.distributed.mesh import Axis
from wan_dist.layers.attention import usp_attention
from wan_dist.layers.attention_kernels import AttentionKernel
from wan_dist.layers.remember import Remembered
from wan_dist.layers.rows import pad_rows, query_rows
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS


class Rotary(NamedTuple):
    """What the rope module hands to every block: `table_lD` of this rank's tokens (complex64 `[1, l, 1, D/2]`), their
    number, and the number of tokens on all ranks."""

    table_lD: torch.Tensor
    mine: int
    tokens: int


def rotate(x_BlHD: torch.Tensor, table_lD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of pairs of neighbouring channels as one complex product, in fp32 as in diffusers.

    A fp32 input is overwritten (it is the fresh output of a norm); the result has the input's dtype.
    """
    pairs = torch.view_as_complex(x_BlHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(table_lD)).flatten(-2).type_as(x_BlHD)


class SequenceParallelSelfAttention:
    """Processor for `attn1`: this rank's tokens in, this rank's tokens out, attention over all of them."""

    def __init__(self, ring: Axis, ulysses: Axis, kernel: AttentionKernel) -> None:
        self.ring = ring
        self.ulysses = ulysses
        self.kernel = kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        assert rotary_emb is not None and encoder_hidden_states is None and attention_mask is None
        rows, mine = hidden_states.shape[1], rotary_emb.mine  # rows beyond `mine` are padding and stay here
        q, k, v = (
            x[:, :mine].unflatten(2, (attn.heads, -1))
            for x in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        q, k = rotate(q, rotary_emb.table_lD), rotate(k, rotary_emb.table_lD)
        out = usp_attention(q, k, v, self.ring, self.ulysses, rotary_emb.tokens, self.kernel)
        return attn.to_out[0](pad_rows(out.flatten(2, 3), rows))


class RememberingCrossAttention:
    """Processor for `attn2`: local, since text and image are whole on every rank; keys and values of a prompt (and its
    image) are computed once and kept for all steps."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.attend = kernel.whole
        self.text_kv: Remembered[list[tuple[torch.Tensor, torch.Tensor]]] = Remembered()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is not None and attention_mask is None
        heads, rows = (attn.heads, -1), hidden_states.shape[1]
        if rows == 0:  # a rank without tokens, as all that share them with it; GPU kernels refuse no queries
            return hidden_states
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        q = pad_rows(q, query_rows(rows, q.device))

        pairs = self.text_kv(partial(_keys_and_values, attn, heads), encoder_hidden_states)
        out = self.attend(q, *pairs[0])
        for key, value in pairs[1:]:
            out = out + self.attend(q, key, value)
        return attn.to_out[0](out[:, :rows].flatten(2, 3))


def _keys_and_values(
    attn: Any, heads: tuple[int, int], conditions: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the text and, where the model has a branch for it, of the image before it: the two are told
    apart by the text's fixed length, as in diffusers."""
    text, image = conditions, None
    if attn.add_k_proj is not None:
        image, text = conditions.tensor_split([-MAX_TEXT_TOKENS], dim=1)
    pairs = [(attn.norm_k(attn.to_k(text)).unflatten(2, heads), attn.to_v(text).unflatten(2, heads))]
    if image is not None:
        key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, heads)
        pairs.append((key, attn.add_v_proj(image).unflatten(2, heads)))
    return pairs
