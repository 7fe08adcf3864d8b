"""One pad token in place of hundreds: the text that Wan's transformer sees is padded to 512 tokens, all pads alike.

n equal keys with equal values take `n exp(l)` of a softmax, as one with the logit `l + log(n)` does. So training sees a
dozen text tokens where `WanPipeline` has 512, and the model's output is the same.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


class OnePadToken(WanAttnProcessor):
    """diffusers' attention, to be set on cross-attention; the last text token stands for `stands_for` equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stands_for = 1

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        """hidden_states `[B, S, width]`, encoder_hidden_states `[B, L, width]` -> `[B, S, width]`."""
        added = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
        added[..., -1] = math.log(self.stands_for)
        return super().__call__(attn, hidden_states, encoder_hidden_states, added, None)


def install_one_pad_token(transformer: WanTransformer3DModel) -> OnePadToken:
    """Set one processor on the cross-attention of every block; what its token stands for is said before a forward."""
    processor = OnePadToken()
    processors = transformer.attn_processors
    transformer.set_attn_processor(
        {name: processor if ".attn2." in name else current for name, current in processors.items()}
    )
    return processor


def encode_text(text_encoder: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[B, L + 1, width]`: what `WanPipeline.encode_prompt` makes of `tokens` and `mask`, int64 `[B, L]` (zeros where a
    prompt has ended), and one pad token more, for the rest."""
    return F.pad(text_encoder(tokens, mask).last_hidden_state * mask[..., None], (0, 0, 0, 1))
