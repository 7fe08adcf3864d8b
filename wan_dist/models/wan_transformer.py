"""Parallelising diffusers' `WanTransformer3DModel`, on one page.

The model's own forward runs unchanged. Its rope hands out this rank's rows of the table, a hook before the first
block keeps this rank's tokens, the attention processors exchange what attention needs, linears and norms compute this
rank's heads and features, and a hook after `proj_out` gathers the result (64 channels, where hidden states would be
thousands).

Where the first latent frame is an image (`expand_timesteps`, Wan2.2 TI2V), the model is called with the two timesteps
there are, `[B, 2]`: that of the first latent frame and that of all others. Both are embedded once, in fp32, and handed
to this rank's tokens; diffusers embeds one per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanImageEmbedding, WanRotaryPosEmbed

from wan_dist.distributed.collectives import gather_dim
from wan_dist.distributed.mesh import Axis, Mesh
from wan_dist.layers.attention_kernels import AttentionKernel
from wan_dist.layers.fp32_norm import keep_fp32_parameters
from wan_dist.layers.remember import Remembered
from wan_dist.layers.rows import pad_rows, rows_for
from wan_dist.layers.sequence import split_range, split_sizes
from wan_dist.layers.tensor_parallel import split_column, split_rms_norm, split_row
from wan_dist.models.wan_attention import RememberingCrossAttention, Rotary, SequenceParallelSelfAttention


def meta_transformer(config: dict[str, Any]) -> WanTransformer3DModel:
    """The model without memory for its weights. Its rotary tables, which no checkpoint holds, are made for real."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    rope = model.rope
    model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return model.eval().requires_grad_(False)


def parallelize_wan_transformer(
    model: WanTransformer3DModel, mesh: Mesh, kernel: AttentionKernel
) -> Callable[[], None]:
    """Teach `model` to run on `mesh`: its token sequence split over ring x ulysses, its heads and features over tp.

    With tp > 1 the model must still be on the meta device. Sharding of the weights over the FSDP axis comes later, once
    they are read. Returns a function that forgets what was remembered of the prompts: call it when they change.
    """
    _split_features(model, mesh["tp"])
    _split_rope(model, mesh["sp"])
    tokens = _split_sequence(model, mesh["sp"], mesh["tp"])
    _activate_in_place(model)
    keep_fp32_parameters(model)
    remembered = [*_set_attention(model, mesh, kernel), *_remember_projections(model)]
    remembered.append(_complete_conditions(model, tokens))

    def forget_text() -> None:
        for memory in remembered:
            memory.clear()

    return forget_text


def forget_block_text(block: torch.nn.Module) -> None:
    """Drop the text keys and values that one block remembers: where its weights do not stay on the device, neither do
    they (10 MB a block, prompt and branch of the 14B)."""
    block.attn2.processor.text_kv.clear()


def _split_features(model: WanTransformer3DModel, axis: Axis) -> None:
    """Attention by heads (self, text and image), the feed-forward by features; everything else is whole on all ranks.

    Heads must divide, since a head is the least that a rank can attend with; features need not.
    """
    if axis.size == 1:
        return
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            _split_attention(attention, axis)
        linear_in, linear_out = block.ffn.net[0].proj, block.ffn.net[2]
        mine = split_range(linear_in.out_features, axis.size, axis.rank)
        split_column(linear_in, *mine)
        split_row(linear_out, axis, *mine)


def _split_attention(attention: torch.nn.Module, axis: Axis) -> None:
    heads, over = divmod(attention.heads, axis.size)
    assert over == 0, f"{attention.heads} heads over {axis.size} ranks"
    features = attention.inner_dim // axis.size
    mine = axis.rank * features, (axis.rank + 1) * features
    image = ("add_k_proj", "add_v_proj") if attention.add_k_proj is not None else ()
    for name in ("to_q", "to_k", "to_v", *image):
        split_column(getattr(attention, name), *mine)
    for name in ("norm_q", "norm_k", *(("norm_added_k",) if image else ())):
        split_rms_norm(getattr(attention, name), axis, *mine)
    split_row(attention.to_out[0], axis, *mine)
    attention.heads = heads


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


@dataclass
class _Tokens:
    """Of the forward that is running: tokens of each rank of the sequence axis, tokens of one latent frame, and the
    rows that this rank computes with (padding behind its tokens included)."""

    axis: Axis
    lengths: list[int] = field(default_factory=list)
    per_frame: int = 0
    rows: int = 0


def _split_sequence(model: WanTransformer3DModel, axis: Axis, tp: Axis) -> _Tokens:
    tokens = _Tokens(axis)
    # A divisor of every rank's share of the features: all of tp must pad to the same rows, and fill whole vectors.
    ffn_width = gcd(*split_sizes(model.config.ffn_dim, tp.size))

    def count_tokens(_conv: torch.nn.Module, _args: Any, patches_BdTHW: torch.Tensor) -> None:
        frames, *frame = patches_BdTHW.shape[2:]
        tokens.per_frame = frame[0] * frame[1]
        tokens.lengths = split_sizes(frames * tokens.per_frame, axis.size)
        tokens.rows = rows_for(tokens.lengths[axis.rank], ffn_width, patches_BdTHW.device)

    def keep_my_tokens(_block: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        mine = args[0].split(tokens.lengths, dim=1)[axis.rank]
        return (pad_rows(mine, tokens.rows), *args[1:])

    def gather_tokens(_proj: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return gather_dim(axis, output[:, : tokens.lengths[axis.rank]], 1, tokens.lengths)

    model.patch_embedding.register_forward_hook(count_tokens)
    model.blocks[0].register_forward_pre_hook(keep_my_tokens)
    model.proj_out.register_forward_hook(gather_tokens)
    return tokens


def _complete_conditions(model: WanTransformer3DModel, tokens: _Tokens) -> Remembered[torch.Tensor]:
    """Hand the embedder's two timesteps to this rank's tokens, and join image and text here instead of in the model:
    joined once per prompt, they are a tensor that `attn2` can remember keys and values by."""
    joined: Remembered[torch.Tensor] = Remembered()

    def per_token(of_frames: torch.Tensor) -> torch.Tensor:
        """`[B, 2, n]` of the first frame and of the others -> `[B, rows, n]`."""
        assert of_frames.shape[1] == 2, "one timestep for the first latent frame, one for the others"
        begin, end = split_range(sum(tokens.lengths), tokens.axis.size, tokens.axis.rank)
        first = max(min(end, tokens.per_frame) - begin, 0)
        of_first, of_others = of_frames.split(1, dim=1)
        return torch.cat([of_first.expand(-1, first, -1), of_others.expand(-1, tokens.rows - first, -1)], dim=1)

    def complete(_embedder: torch.nn.Module, _args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        timestep, modulation, text, image = output
        if timestep.ndim == 3:
            timestep, modulation = per_token(timestep), per_token(modulation)
        if image is not None:
            text, image = joined(lambda *both: torch.cat(both, dim=1), image, text), None
        return timestep, modulation, text, image

    model.condition_embedder.register_forward_hook(complete)
    return joined


class _InPlaceGELU(GELU):
    """The feed-forward's activation, written over its input: its widest tensor exists once, not twice (2 GB less at
    75600 tokens of the 14B in bf16)."""

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(gate, approximate=self.approximate)


def _activate_in_place(model: WanTransformer3DModel) -> None:
    for block in model.blocks:
        assert type(block.ffn.net[0]) is GELU
        block.ffn.net[0].__class__ = _InPlaceGELU


def _set_attention(model: WanTransformer3DModel, mesh: Mesh, kernel: AttentionKernel) -> list[Remembered[Any]]:
    remembered: list[Remembered[Any]] = []
    for block in model.blocks:
        block.attn1.set_processor(SequenceParallelSelfAttention(mesh["ring"], mesh["ulysses"], kernel))
        cross = RememberingCrossAttention(kernel)
        block.attn2.set_processor(cross)
        remembered.append(cross.text_kv)
    return remembered


class _RememberingTextProjection(PixArtAlphaTextProjection):
    """The text projection, computed once per prompt: its output's identity is what `attn2` remembers by."""

    remembered: Remembered[torch.Tensor]

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return self.remembered(super().forward, caption)


class _RememberingImageEmbedding(WanImageEmbedding):
    """The image embedder, computed once per image."""

    remembered: Remembered[torch.Tensor]

    def forward(self, encoder_hidden_states_image: torch.Tensor) -> torch.Tensor:
        return self.remembered(super().forward, encoder_hidden_states_image)


def _remember_projections(model: WanTransformer3DModel) -> list[Remembered[torch.Tensor]]:
    embedder = model.condition_embedder
    projections = [embedder.text_embedder]
    embedder.text_embedder.__class__ = _RememberingTextProjection
    if embedder.image_embedder is not None:
        embedder.image_embedder.__class__ = _RememberingImageEmbedding
        projections.append(embedder.image_embedder)
    for projection in projections:
        projection.remembered = Remembered()
    return [projection.remembered for projection in projections]
