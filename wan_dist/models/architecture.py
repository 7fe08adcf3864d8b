"""Names and shapes of the tensors of Wan's components, by their config alone: what a plan counts bytes from where there
are no weights to look at. Imports no torch.

Tables are in the order of the module's own parameters. Keys that a config lacks take the default of the library's
class; tests compare every table with the classes themselves.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
Named = Iterator[tuple[str, tuple[int, ...]]]

KEEP_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # of WanTransformer3DModel
IMAGE_ENCODER_PREFIX = "vision_model."  # of names in published files, and where the class has a projection

# The list of a component's repeated blocks: what FSDP wraps and what can be streamed. The VAE has none.
BLOCK_LISTS = {
    "transformer": "blocks",
    "transformer_2": "blocks",
    "text_encoder": "encoder.block",
    "image_encoder": "encoder.layers",
}

_COLUMN_PARALLEL = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "ffn.net.0.proj")
_ROW_PARALLEL = ("to_out.0", "ffn.net.2")
_SPLIT_NORMS = ("norm_q", "norm_k", "norm_added_k")

# Ends of names of a transformer block's tensors -> the dim that tensor parallelism divides. The bias behind a row
# parallel linear is added to the sum, so that every rank holds all of it.
TENSOR_PARALLEL_DIMS = {
    **{f".{linear}.{leaf}": 0 for linear in _COLUMN_PARALLEL for leaf in ("weight", "bias")},
    **{f".{linear}.weight": 1 for linear in _ROW_PARALLEL},
    **{f".{norm}.weight": 0 for norm in _SPLIT_NORMS},
}

_T5_DEFAULTS = {
    "t5": {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    "umt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}


def tensor_parallel_dim(name: str) -> int | None:
    """The dim of a transformer's tensor that tensor parallelism divides; None where every rank holds all of it."""
    if not name.startswith("blocks."):
        return None
    return next((dim for ending, dim in TENSOR_PARALLEL_DIMS.items() if name.endswith(ending)), None)


def transformer_tensors(config: Config) -> Shapes:
    """Of diffusers' `WanTransformer3DModel`. Raises ValueError for a config that is none."""
    channels, text, frequencies = (
        _count(config, key, default) for key, default in (("in_channels", 16), ("text_dim", 4096), ("freq_dim", 256))
    )
    dim = _count(config, "num_attention_heads", 40) * _count(config, "attention_head_dim", 128)
    patch = _counts(config, "patch_size", (1, 2, 2))
    image = None if config.get("image_dim") is None else _count(config, "image_dim", 0)

    def named() -> Named:
        yield "scale_shift_table", (1, 2, dim)
        yield from _layer("patch_embedding", dim, channels, *patch)
        yield from _layer("condition_embedder.time_embedder.linear_1", dim, frequencies)
        yield from _layer("condition_embedder.time_embedder.linear_2", dim, dim)
        yield from _layer("condition_embedder.time_proj", 6 * dim, dim)
        yield from _layer("condition_embedder.text_embedder.linear_1", dim, text)
        yield from _layer("condition_embedder.text_embedder.linear_2", dim, dim)
        if image is not None:
            yield from _image_embedder("condition_embedder.image_embedder", config, image, dim)
        for block in range(_count(config, "num_layers", 40)):
            yield from _transformer_block(f"blocks.{block}", config, dim)
        out = channels if config.get("out_channels", 16) is None else _count(config, "out_channels", 16)
        yield from _layer("proj_out", out * prod(patch), dim)

    return dict(named())


def _image_embedder(name: str, config: Config, width: int, dim: int) -> Named:
    if config.get("pos_embed_seq_len") is not None:
        yield f"{name}.pos_embed", (1, _count(config, "pos_embed_seq_len", 0), width)
    yield from _layer(f"{name}.norm1", width)
    yield from _layer(f"{name}.ff.net.0.proj", width, width)
    yield from _layer(f"{name}.ff.net.2", dim, width)
    yield from _layer(f"{name}.norm2", dim)


def _transformer_block(name: str, config: Config, dim: int) -> Named:
    yield f"{name}.scale_shift_table", (1, 6, dim)
    for attention in (f"{name}.attn1", f"{name}.attn2"):
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _layer(f"{attention}.{linear}", dim, dim)
        for norm in ("norm_q", "norm_k"):
            yield f"{attention}.{norm}.weight", (dim,)
    if config.get("added_kv_proj_dim") is not None:
        for linear in ("add_k_proj", "add_v_proj"):
            yield from _layer(f"{name}.attn2.{linear}", dim, _count(config, "added_kv_proj_dim", 0))
        yield f"{name}.attn2.norm_added_k.weight", (dim,)
    if config.get("cross_attn_norm", True):
        yield from _layer(f"{name}.norm2", dim)
    features = _count(config, "ffn_dim", 13824)
    yield from _layer(f"{name}.ffn.net.0.proj", features, dim)
    yield from _layer(f"{name}.ffn.net.2", dim, features)


def text_encoder_tensors(config: Config) -> Shapes:
    """Of transformers' `UMT5EncoderModel` or `T5EncoderModel`, told apart by `model_type`; the embedding, which has two
    names, under the first. UMT5 has a table of relative positions in every layer, T5 in the first alone."""
    kind = "t5" if config.get("model_type") == "t5" else "umt5"
    told = {**_T5_DEFAULTS[kind], **config}
    dim, features, heads = _count(told, "d_model", 512), _count(told, "d_ff", 0), _count(told, "num_heads", 0)
    inner = heads * _count(told, "d_kv", 64)
    gated = str(told["feed_forward_proj"]).startswith("gated-")

    def named() -> Named:
        yield "shared.weight", (_count(told, "vocab_size", 0), dim)
        for block in range(_count(told, "num_layers", 0)):
            attention, dense = (f"encoder.block.{block}.layer.{n}" for n in (0, 1))
            for linear in ("q", "k", "v"):
                yield f"{attention}.SelfAttention.{linear}.weight", (inner, dim)
            yield f"{attention}.SelfAttention.o.weight", (dim, inner)
            if kind == "umt5" or block == 0:
                buckets = _count(told, "relative_attention_num_buckets", 32)
                yield f"{attention}.SelfAttention.relative_attention_bias.weight", (buckets, heads)
            yield f"{attention}.layer_norm.weight", (dim,)
            for linear in ("wi_0", "wi_1") if gated else ("wi",):
                yield f"{dense}.DenseReluDense.{linear}.weight", (features, dim)
            yield f"{dense}.DenseReluDense.wo.weight", (dim, features)
            yield f"{dense}.layer_norm.weight", (dim,)
        yield "encoder.final_layer_norm.weight", (dim,)

    return dict(named())


def image_encoder_tensors(config: Config, *, projection: bool = False) -> Shapes:
    """Of transformers' `CLIPVisionModel`, by its own config or that of a whole CLIP, which holds it as `vision_config`.
    projection: of `CLIPVisionModelWithProjection`."""
    config = config.get("vision_config") or config
    dim, features = _count(config, "hidden_size", 768), _count(config, "intermediate_size", 3072)
    image, patch = _count(config, "image_size", 224), _count(config, "patch_size", 32)

    def named() -> Named:
        yield "embeddings.class_embedding", (dim,)
        yield "embeddings.patch_embedding.weight", (dim, _count(config, "num_channels", 3), patch, patch)
        yield "embeddings.position_embedding.weight", ((image // patch) ** 2 + 1, dim)
        yield from _layer("pre_layrnorm", dim)
        for layer in range(_count(config, "num_hidden_layers", 12)):
            name = f"encoder.layers.{layer}"
            for linear in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield from _layer(f"{name}.self_attn.{linear}", dim, dim)
            yield from _layer(f"{name}.layer_norm1", dim)
            yield from _layer(f"{name}.mlp.fc1", features, dim)
            yield from _layer(f"{name}.mlp.fc2", dim, features)
            yield from _layer(f"{name}.layer_norm2", dim)
        yield from _layer("post_layernorm", dim)

    if not projection:
        return dict(named())
    projected = _count(config, "projection_dim", 512), dim
    return {**{IMAGE_ENCODER_PREFIX + n: s for n, s in named()}, "visual_projection.weight": projected}


def vae_tensors(config: Config, *, encoder: bool = True) -> Shapes:
    """Of diffusers' `AutoencoderKLWan`, Wan2.1's or (`is_residual`) Wan2.2's. encoder: with what decoding does
    without."""
    z, base = _count(config, "z_dim", 16), _count(config, "base_dim", 96)
    decoder_base = base if config.get("decoder_base_dim") is None else _count(config, "decoder_base_dim", base)

    def named() -> Named:
        if encoder:
            yield from _vae_encoder(config, base, 2 * z)
            yield from _layer("quant_conv", 2 * z, 2 * z, 1, 1, 1)
        yield from _layer("post_quant_conv", z, z, 1, 1, 1)
        yield from _vae_decoder(config, decoder_base, z)

    return dict(named())


def _vae_encoder(config: Config, base: int, out: int) -> Named:
    multipliers, depth = _counts(config, "dim_mult", (1, 2, 4, 4)), _count(config, "num_res_blocks", 2)
    in_time, scales = _downsampled_in_time(config, len(multipliers)), config.get("attn_scales", ())
    residual, child = bool(config.get("is_residual")), 0
    dims = [base, *(base * multiplier for multiplier in multipliers)]
    yield from _layer("encoder.conv_in", dims[0], _count(config, "in_channels", 3), 3, 3, 3)
    for level, (wide, dim) in enumerate(pairwise(dims)):
        for block in range(depth):
            name = f"encoder.down_blocks.{level}.resnets.{block}" if residual else f"encoder.down_blocks.{child}"
            yield from _vae_block(name, wide if block == 0 else dim, dim)
            child += 1
            if not residual and 0.5**level in scales:
                yield from _vae_attention(f"encoder.down_blocks.{child}", dim)
                child += 1
        if level < len(multipliers) - 1:
            name = f"encoder.down_blocks.{level}.downsampler" if residual else f"encoder.down_blocks.{child}"
            yield from _layer(f"{name}.resample.1", dim, dim, 3, 3)
            if in_time[level]:
                yield from _layer(f"{name}.time_conv", dim, dim, 3, 1, 1)
            child += 1
    yield from _vae_middle("encoder", dims[-1])
    yield from _vae_head("encoder", dims[-1], out)


def _vae_decoder(config: Config, base: int, z: int) -> Named:
    multipliers, depth = _counts(config, "dim_mult", (1, 2, 4, 4))[::-1], _count(config, "num_res_blocks", 2)
    in_time, residual = _downsampled_in_time(config, len(multipliers))[::-1], bool(config.get("is_residual"))
    dims = [base * multiplier for multiplier in (multipliers[0], *multipliers)]
    yield from _layer("decoder.conv_in", dims[0], z, 3, 3, 3)
    yield from _vae_middle("decoder", dims[0])
    for level, (wide, dim) in enumerate(pairwise(dims)):
        name = f"decoder.up_blocks.{level}"
        wide = wide if residual or level == 0 else wide // 2  # Wan2.1 halves the channels where it upsamples
        for block in range(depth + 1):
            yield from _vae_block(f"{name}.resnets.{block}", wide if block == 0 else dim, dim)
        if level < len(multipliers) - 1:
            name += ".upsampler" if residual else ".upsamplers.0"
            yield from _layer(f"{name}.resample.1", dim if residual else dim // 2, dim, 3, 3)
            if in_time[level]:
                yield from _layer(f"{name}.time_conv", 2 * dim, dim, 3, 1, 1)
    yield from _vae_head("decoder", dims[-1], _count(config, "out_channels", 3))


def _vae_middle(name: str, dim: int) -> Named:
    yield from _vae_attention(f"{name}.mid_block.attentions.0", dim)
    for block in range(2):
        yield from _vae_block(f"{name}.mid_block.resnets.{block}", dim, dim)


def _vae_head(name: str, dim: int, out: int) -> Named:
    yield f"{name}.norm_out.gamma", (dim, 1, 1, 1)
    yield from _layer(f"{name}.conv_out", out, dim, 3, 3, 3)


def _vae_block(name: str, wide: int, dim: int) -> Named:
    yield f"{name}.norm1.gamma", (wide, 1, 1, 1)
    yield from _layer(f"{name}.conv1", dim, wide, 3, 3, 3)
    yield f"{name}.norm2.gamma", (dim, 1, 1, 1)
    yield from _layer(f"{name}.conv2", dim, dim, 3, 3, 3)
    if wide != dim:
        yield from _layer(f"{name}.conv_shortcut", dim, wide, 1, 1, 1)


def _vae_attention(name: str, dim: int) -> Named:
    yield f"{name}.norm.gamma", (dim, 1, 1)
    yield from _layer(f"{name}.to_qkv", 3 * dim, dim, 1, 1)
    yield from _layer(f"{name}.proj", dim, dim, 1, 1)


def _layer(name: str, *shape: int) -> Named:
    """Weight and bias of a linear, a convolution or a norm: one number of the bias for each row of the weight."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _count(config: Config, key: str, default: int) -> int:
    return _whole(key, [config.get(key, default)])[0]


def _counts(config: Config, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return _whole(key, config.get(key, default))


def _whole(key: str, values: Any) -> tuple[int, ...]:
    if not (isinstance(values, (list, tuple)) and values and all(type(n) is int and n > 0 for n in values)):
        raise ValueError(f"its config has {key} {values!r}, not whole numbers above 0")
    return tuple(values)


def _downsampled_in_time(config: Config, levels: int) -> tuple[bool, ...]:
    flags = tuple(config.get("temperal_downsample", (False, True, True)))
    if len(flags) < levels - 1:
        raise ValueError(f"its config has temperal_downsample {flags} for {levels} levels")
    return flags
