"""Every name of diffusers' Wan VAE that wan_dist reaches into is still there, and means what it did."""

import inspect
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanUpsample,
    unpatchify,
)

from support.vae import CONFIGS, KINDS, Clip, decoded, latents, random_vae, video
from wan_dist.models import wan_vae


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(kind) -> AutoencoderKLWan:
    return random_vae(kind)


def test_a_place_in_the_time_cache_for_every_causal_convolution(vae):
    for part in ("encoder", "decoder"):
        convolutions = [module for module in getattr(vae, part).modules() if isinstance(module, WanCausalConv3d)]
        assert vae._cached_conv_counts[part] == len(convolutions) > 0
    names = list(inspect.signature(vae.decoder.forward).parameters)
    assert names == ["x", "feat_cache", "feat_idx", "first_chunk"]
    vae.clear_cache()
    assert vae._feat_map == [None] * vae._cached_conv_counts["decoder"]


def test_the_padding_of_causal_convolutions(vae):
    """As `F.pad` takes it, symmetric in space, all of it before in time, none left to `Conv3d`."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            assert type(module) is WanCausalConv3d
            left, right, above, below, past, future = module._padding
            assert (left, above, future) == (right, below, 0)
            assert (above, left) == tuple(length // 2 for length in module.kernel_size[1:])
            assert past in (0, module.kernel_size[0] - 1)
            assert module.padding == (0, 0, 0)
            assert module.padding_mode == "zeros"
            assert module.stride[1:] == module.dilation[1:] == (1, 1)
            assert past == 0 or (module.stride[0], module.dilation[0]) == (1, 1)
    assert list(inspect.signature(WanCausalConv3d.forward).parameters) == ["self", "x", "cache_x"]


def test_a_causal_convolution_is_one_over_what_its_padding_says():
    conv = WanCausalConv3d(2, 3, 3, padding=1)
    x, cache = torch.randn(1, 2, 2, 4, 4), torch.randn(1, 2, 1, 4, 4)
    padded = F.pad(torch.cat([cache, x], dim=2), (1, 1, 1, 1, 1, 0))
    assert torch.equal(conv(x, cache), F.conv3d(padded, conv.weight, conv.bias))


def test_resampling_is_a_pad_or_an_upsampling_and_a_convolution(vae):
    found = set()
    for module in vae.modules():
        if isinstance(module, WanResample):
            assert type(module) is WanResample
            before, conv = module.resample
            assert type(conv) is torch.nn.Conv2d
            assert (conv.kernel_size, conv.dilation, conv.padding_mode) == ((3, 3), (1, 1), "zeros")
            if "down" in module.mode:
                assert type(before) is torch.nn.ZeroPad2d
                assert (before.padding, conv.stride, conv.padding) == ((0, 1, 0, 1), (2, 2), (0, 0))
            else:
                assert type(before) is WanUpsample
                assert (before.mode, before.scale_factor) == ("nearest-exact", (2.0, 2.0))  # a row knows no other
                assert (conv.stride, conv.padding) == ((1, 1), (1, 1))
            found.add(module.mode)
    assert found == {"upsample2d", "upsample3d", "downsample2d", "downsample3d"}
    assert isinstance(WanResample(4, "none").resample, torch.nn.Identity)


def test_no_other_layer_looks_beyond_a_row(vae):
    known = (WanCausalConv3d, WanResample, WanAttentionBlock)
    inside = {part for module in vae.modules() if isinstance(module, known) for part in module.modules()}
    leaves = {type(module).__name__ for module in vae.modules() if module not in inside and not list(module.children())}
    assert leaves <= {"WanRMS_norm", "SiLU", "Dropout", "Identity", "AvgDown3D", "DupUp3D"}


def test_attention_is_one_call_with_three_positional_arguments():
    block, calls = WanAttentionBlock(4), []

    def attention(*args, **kwargs):
        calls.append((args, kwargs))
        return args[0]

    with patch.object(F, "scaled_dot_product_attention", attention):
        block(torch.randn(2, 4, 3, 5, 2))
    (((query, key, value), keywords),) = calls
    assert keywords == {}
    assert query.shape == key.shape == value.shape == (2 * 3, 1, 5 * 2, 4)  # tokens are dim 2, row after row


def test_the_tokens_of_attention_go_row_by_row():
    block, x, seen = WanAttentionBlock(4), torch.randn(1, 4, 1, 5, 2), []

    def attention(query, key, value):
        seen.append(key)
        return query

    with patch.object(F, "scaled_dot_product_attention", attention):
        block(x)
        block(x[..., 2:4, :])
    whole, part = seen
    torch.testing.assert_close(whole[:, :, 4:8], part)


def test_attention_is_in_the_middle_only(vae):
    """diffusers' own encoder fails with it at another scale: it hands the time cache to every layer."""
    blocks = [name for name, module in vae.named_modules() if isinstance(module, WanAttentionBlock)]
    assert blocks == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]
    assert all(type(vae.get_submodule(name)) is WanAttentionBlock for name in blocks)
    elsewhere = AutoencoderKLWan(**CONFIGS["wan2.1"], attn_scales=[0.5])
    with pytest.raises(TypeError, match="feat_cache"):
        elsewhere.encode(video(Clip("wan2.1", 1)))


def test_what_decode_does_around_the_decoder(kind, vae):
    """The loop over latent frames that wan_dist has in its place."""
    clip = Clip(kind, 2, 9)
    with torch.no_grad():
        hidden, cache = vae.post_quant_conv(latents(clip)), [None] * vae._cached_conv_counts["decoder"]
        frames = [
            vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=number == 0)
            for number, frame in enumerate(hidden.split(1, dim=2))
        ]
    assert [frame.shape[2] for frame in frames] == [1, 4, 4]
    whole = torch.cat(frames, dim=2)
    if vae.config.patch_size is not None:
        whole = unpatchify(whole, patch_size=vae.config.patch_size)
    assert torch.equal(whole.clamp(-1, 1), decoded(clip))


def test_unpatchify_keeps_rows_together():
    x = torch.randn(1, 12, 1, 5, 2)
    assert torch.equal(unpatchify(x, patch_size=2)[..., 2:6, :], unpatchify(x[..., 1:3, :], patch_size=2))


def test_encode_takes_one_frame_and_then_four_at_a_time(vae):
    seen, encoder = [], vae.encoder
    forward = encoder.forward

    def watch(x, **cache):
        seen.append(x.shape[2])
        return forward(x, **cache)

    with patch.object(encoder, "forward", watch), torch.no_grad():
        vae.encode(torch.zeros(1, 3, 13, vae.config.scale_factor_spatial, vae.config.scale_factor_spatial))
    assert seen == [1, *[wan_vae._ENCODER_CHUNK] * 3]


def test_encode_starts_with_an_empty_time_cache(vae):
    """A failed call leaves one behind."""
    clip = torch.randn(1, 3, 5, vae.config.scale_factor_spatial, vae.config.scale_factor_spatial)
    with torch.no_grad():
        first = vae.encode(clip).latent_dist.mode()
        vae._enc_feat_map = ["left behind"] * len(vae._enc_feat_map)
        assert torch.equal(vae.encode(clip).latent_dist.mode(), first)


def test_the_numbers_that_sizes_come_from(vae):
    stride = vae.config.scale_factor_spatial
    with torch.no_grad():
        latents_of = vae.encode(torch.zeros(1, 3, 5, 3 * stride, 2 * stride)).latent_dist.mode()
    assert latents_of.shape == (1, vae.config.z_dim, 2, 3, 2)
    assert not vae.use_tiling
    assert not vae.use_slicing
    assert autoencoder_kl_wan.CACHE_T == 2
