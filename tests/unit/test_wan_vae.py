"""A VAE that is taught: its weights' order, being taught again, doing without its encoder."""

import pytest
import torch

from support.vae import KINDS, Clip, decoded, encoded, latents, random_vae, video
from wan_dist.distributed.mesh import AXES, build_mesh
from wan_dist.layers.memory_format import weight_format
from wan_dist.models.wan_vae import ParallelVae, parallelize_vae

LIMIT = 2e-5
ALONE = build_mesh(dict.fromkeys(AXES, 1), "cpu")


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def answers(vae: ParallelVae, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = video(clip)
    rows = lambda begin, end: pixels[..., begin:end, :]  # noqa: E731
    return torch.cat(list(vae.decode(latents(clip))), dim=2), vae.encode(clip.frames, pixels.shape[3], rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_of_encoder_and_decoder_have_the_order_asked_for(kind, channels_last):
    vae = parallelize_vae(random_vae(kind), ALONE, channels_last=channels_last)
    expected = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    for part in (vae.model.encoder, vae.model.decoder):
        weights = [m.weight for m in part.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
        formats = [(weight.ndim, found) for weight in weights if (found := weight_format(weight)) is not None]
        assert {ndim for ndim, _ in formats} == {4, 5}
        assert all(found == expected.get(ndim, torch.contiguous_format) for ndim, found in formats)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_diffusers_also_taught_twice(kind):
    clip, model = Clip(kind, 5, 9), random_vae(kind)
    parallelize_vae(model, ALONE)
    for found, expected in zip(
        answers(parallelize_vae(model, ALONE), clip), (decoded(clip), encoded(clip)), strict=True
    ):
        assert apart(found, expected) <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_model_still_decodes_by_itself(kind):
    clip = Clip(kind, 3, 5)
    taught = parallelize_vae(random_vae(kind), ALONE).model
    assert apart(taught.decode(latents(clip)).sample, decoded(clip)) <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_encoder_it_decodes(kind):
    clip, vae = Clip(kind, 4), parallelize_vae(random_vae(kind), ALONE)
    whole = sum(parameter.numel() for parameter in vae.model.parameters())
    vae = vae.without_encoder()
    assert sum(parameter.numel() for parameter in vae.model.parameters()) < whole
    assert apart(torch.cat(list(vae.decode(latents(clip))), dim=2), decoded(clip)) <= LIMIT
