"""Every name of diffusers and transformers that wan_dist reaches into is still there, and means what it did."""

import inspect

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from diffusers.video_processor import VideoProcessor
from transformers import UMT5EncoderModel

from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.models.wan_attention import rotate


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, num_layers=1, ffn_dim=8, text_dim=8)


def test_the_transformers_parts(transformer):
    assert type(transformer.rope) is WanRotaryPosEmbed
    assert type(transformer.condition_embedder.text_embedder) is PixArtAlphaTextProjection
    assert isinstance(transformer.proj_out, torch.nn.Linear)
    for name in ("attention_head_dim", "patch_size", "max_seq_len"):
        assert hasattr(transformer.rope, name)
        assert name in inspect.signature(WanRotaryPosEmbed.__init__).parameters
    assert set(dict(transformer.rope.named_buffers())) == {"freqs_cos", "freqs_sin"}
    assert transformer.rope._non_persistent_buffers_set == {"freqs_cos", "freqs_sin"}


def test_the_blocks_parts(transformer):
    block = transformer.blocks[0]
    for attention in (block.attn1, block.attn2):
        assert isinstance(attention, WanAttention)
        assert attention.heads == 2
        assert attention.add_k_proj is None
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            assert isinstance(getattr(attention, name), torch.nn.Module)
        linear, dropout = attention.to_out
        assert isinstance(linear, torch.nn.Linear)
        assert isinstance(dropout, torch.nn.Dropout)
        assert dropout.p == 0.0
    names = list(inspect.signature(WanAttnProcessor.__call__).parameters)
    assert names == ["self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"]


def test_signatures():
    names = list(inspect.signature(WanTransformer3DModel.forward).parameters)
    assert {"hidden_states", "timestep", "encoder_hidden_states", "return_dict"} <= set(names)
    assert list(inspect.signature(PixArtAlphaTextProjection.forward).parameters) == ["self", "caption"]
    assert list(inspect.signature(WanRotaryPosEmbed.forward).parameters) == ["self", "hidden_states"]
    encode = inspect.signature(WanPipeline.encode_prompt).parameters
    assert {"prompt", "negative_prompt", "do_classifier_free_guidance", "max_sequence_length", "device"} <= set(encode)
    assert inspect.signature(WanPipeline.__call__).parameters["max_sequence_length"].default == MAX_TEXT_TOKENS
    assert "output_type" in inspect.signature(VideoProcessor.postprocess_video).parameters
    assert "return_dict" in inspect.signature(AutoencoderKLWan.decode).parameters


def test_class_attributes():
    islands = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    assert islands <= set(WanTransformer3DModel._keep_in_fp32_modules)
    assert hasattr(WanTransformer3DModel, "_keys_to_ignore_on_load_unexpected")
    assert hasattr(UMT5EncoderModel, "_keys_to_ignore_on_load_unexpected")
    assert not AutoencoderKLWan._keep_in_fp32_modules


def test_the_vaes_config():
    with torch.device("meta"):
        config = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    assert len(config.latents_mean) == len(config.latents_std) == config.z_dim
    assert (config.scale_factor_spatial, config.scale_factor_temporal) == (8, 4)


def diffusers_rotary(hidden_states, freqs_cos, freqs_sin):
    x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(hidden_states)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(hidden_states)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rotate_equals_diffusers_rotary_embedding(dtype, tolerance):
    rope = WanRotaryPosEmbed(24, (1, 2, 2), 64)
    cos, sin = rope(torch.empty(1, 16, 3, 8, 10))
    assert torch.equal(cos[..., 0::2], cos[..., 1::2])
    assert torch.equal(sin[..., 0::2], sin[..., 1::2])
    table = torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())
    x = torch.randn(2, cos.shape[1], 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = diffusers_rotary(x, cos, sin)
    found = rotate(x.clone(), table)
    assert found.dtype == dtype
    error = (found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
    assert error.max() <= tolerance
    assert (found == expected).float().mean() > (0.5 if dtype == torch.float32 else 0.999)
    assert not torch.allclose(found.float(), x.float(), atol=0.1)


def test_the_rotary_formula_above_is_still_diffusers_own():
    source = inspect.getsource(WanAttnProcessor.__call__)
    for line in inspect.getsource(diffusers_rotary).splitlines()[3:]:
        assert line.strip() in source
