"""Parallelising diffusers' `WanTransformer3DModel`, on one page.

The model's own forward runs unchanged. Its rope hands out this rank's rows of the table, a hook before the first
block keeps this rank's tokens, the attention processors exchange what attention needs, and a hook after `proj_out`
gathers the result (64 channels, where hidden states would be thousands).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from wan_dist.distributed.collectives import gather_dim
from wan_dist.distributed.mesh import Axis
from wan_dist.layers.attention import Attend
from wan_dist.layers.remember import Remembered
from wan_dist.layers.rows import pad_rows, rows_for
from wan_dist.layers.sequence import split_range, split_sizes
from wan_dist.models.wan_attention import RememberingCrossAttention, Rotary, SequenceParallelSelfAttention


def meta_transformer(config: dict[str, Any]) -> WanTransformer3DModel:
    """The model without memory for its weights. Its rotary tables, which no checkpoint holds, are made for real."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return model.eval().requires_grad_(False)


def parallelize_wan_transformer(model: WanTransformer3DModel, axis: Axis, attend: Attend) -> Callable[[], None]:
    """Teach `model` to run with its token sequence split over `axis` (size 1: unsplit).

    Returns a function that forgets what was remembered of the prompts: call it when they change.
    """
    _split_rope(model, axis)
    _split_sequence(model, axis)
    _activate_in_place(model)
    remembered = _set_attention(model, axis, attend)
    remembered.append(_remember_text_projection(model))

    def forget_text() -> None:
        for memory in remembered:
            memory.clear()

    return forget_text


class _SplitRotaryPosEmbed(WanRotaryPosEmbed):
    """The rope module with this rank's rows of the table, complex, kept for the last video shape."""

    axis: Axis
    last: tuple[tuple[int, ...], Rotary] | None

    def forward(self, hidden_states: torch.Tensor) -> Rotary:
        shape = tuple(hidden_states.shape[2:])
        if self.last is None or self.last[0] != shape:
            cos, sin = super().forward(hidden_states)  # [1, L, 1, D], each value twice
            begin, end = split_range(cos.shape[1], self.axis.size, self.axis.rank)
            table = torch.complex(cos[:, begin:end, :, 0::2].contiguous(), sin[:, begin:end, :, 1::2].contiguous())
            self.last = shape, Rotary(table, end - begin, cos.shape[1])
        return self.last[1]


def _split_rope(model: WanTransformer3DModel, axis: Axis) -> None:
    model.rope.__class__ = _SplitRotaryPosEmbed
    model.rope.axis, model.rope.last = axis, None


def _split_sequence(model: WanTransformer3DModel, axis: Axis) -> None:
    lengths: list[int] = []  # tokens of each rank in the forward that is running
    ffn_width = model.config.ffn_dim

    def keep_my_tokens(_block: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        lengths[:] = split_sizes(args[0].shape[1], axis.size)
        mine = args[0].split(lengths, dim=1)[axis.rank]
        return (pad_rows(mine, rows_for(mine.shape[1], ffn_width, mine.device)), *args[1:])

    def gather_tokens(_proj: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return gather_dim(axis, output[:, : lengths[axis.rank]], 1, lengths)

    model.blocks[0].register_forward_pre_hook(keep_my_tokens)
    model.proj_out.register_forward_hook(gather_tokens)


class _InPlaceGELU(GELU):
    """The feed-forward's activation, written over its input: its widest tensor exists once, not twice (2 GB less at
    75600 tokens of the 14B in bf16)."""

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(gate, approximate=self.approximate)


def _activate_in_place(model: WanTransformer3DModel) -> None:
    for block in model.blocks:
        assert type(block.ffn.net[0]) is GELU
        block.ffn.net[0].__class__ = _InPlaceGELU


def _set_attention(model: WanTransformer3DModel, axis: Axis, attend: Attend) -> list[Remembered[Any]]:
    remembered: list[Remembered[Any]] = []
    for block in model.blocks:
        block.attn1.set_processor(SequenceParallelSelfAttention(axis, attend))
        cross = RememberingCrossAttention(attend)
        block.attn2.set_processor(cross)
        remembered.append(cross.text_kv)
    return remembered


class _RememberingTextProjection(PixArtAlphaTextProjection):
    """The text projection, computed once per prompt: its output's identity is what `attn2` remembers by."""

    remembered: Remembered[torch.Tensor]

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return self.remembered(caption, super().forward)


def _remember_text_projection(model: WanTransformer3DModel) -> Remembered[torch.Tensor]:
    projection = model.condition_embedder.text_embedder
    projection.__class__ = _RememberingTextProjection
    projection.remembered = Remembered()
    return projection.remembered
