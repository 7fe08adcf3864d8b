"""Which images a checkpoint takes and whether a request gives them, and what a transformer is shown of them: mask,
channels, first frame and timesteps are diffusers' own."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.image_input import MAY, MUST, NO, ImageInput, image_input, image_refusals
from wan_dist.sampling.condition import Condition, FirstFrame, ImageChannels, frame_mask

WIDE_VAE = {"z_dim": 48, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
ENCODED = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# kind -> config of the transformer and the VAE, expand_timesteps, what it takes
KINDS = {
    "text": ({"in_channels": 16}, {"z_dim": 16}, False, ImageInput(NO, NO)),
    "text, by default": ({}, {}, False, ImageInput(NO, NO)),
    "wan2.1": (ENCODED, {"z_dim": 16}, False, ImageInput(MUST, NO, encoder=True)),
    "wan2.1 first and last": (
        {**ENCODED, "pos_embed_seq_len": 514}, {"z_dim": 16}, False, ImageInput(MUST, MUST, encoder=True),
    ),
    "wan2.2 a14b": ({"in_channels": 36}, {"z_dim": 16}, False, ImageInput(MUST, MAY)),
    "wan2.2 ti2v": ({"in_channels": 48}, WIDE_VAE, True, ImageInput(MAY, NO)),
    "a wide VAE's images": ({"in_channels": 100}, WIDE_VAE, False, ImageInput(MUST, MAY)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_takes(kind):
    transformer, vae, expand, takes = KINDS[kind]
    assert image_input(transformer, vae, expand_timesteps=expand) == takes


@pytest.mark.parametrize(
    ("transformer", "vae", "expand", "words"),
    [
        ({"in_channels": 33}, {}, False, ["33 channels", "text-to-video (16", "4 of mask"]),
        ({"in_channels": 32}, {}, False, ["32 channels"]),  # no room for a mask
        ({"in_channels": 16, "image_dim": 1280}, {}, False, ["16 channels", "image encoder"]),
        ({"in_channels": 36}, {}, True, ["36 channels", "expand_timesteps"]),
        ({"in_channels": 36}, WIDE_VAE, False, ["36 channels", "(48 channels)"]),
        ({"in_channels": 96}, {}, False, ["96 channels"]),  # a VACE, or a controlled model
    ],
)
def test_input_channels_that_no_wan_has(transformer, vae, expand, words):
    with pytest.raises(ValueError) as caught:
        image_input(transformer, vae, expand_timesteps=expand)
    assert all(word in str(caught.value) for word in words)


def checkpoint_of(kind: str) -> Checkpoint:
    transformer, vae, expand, _ = KINDS[kind]
    return Checkpoint(Path("x"), {"expand_timesteps": expand}, {"transformer": transformer, "vae": vae})


def refused(kind: str, frames: int, *images: str) -> list[tuple[str, object]]:
    """Key and value of each refusal of a request that gives `images`, each of the name of its key."""
    config = Config(prompt="a cat", **{key: f"{key}.png" for key in images})
    config.video.num_frames = frames
    return [(refusal.key, refusal.value) for refusal in image_refusals(config, checkpoint_of(kind))]


BOTH = ("image", "last_image")
NO_IMAGE, NO_LAST = ("image", None), ("last_image", None)
EXTRA_IMAGE, EXTRA_LAST = ("image", "image.png"), ("last_image", "last_image.png")


@pytest.mark.parametrize(
    ("kind", "images", "found"),
    [
        ("text", (), []),
        ("text", ("image",), [EXTRA_IMAGE]),
        ("text", ("last_image",), [EXTRA_LAST]),
        ("text", BOTH, [EXTRA_IMAGE, EXTRA_LAST]),
        ("wan2.1", (), [NO_IMAGE]),
        ("wan2.1", ("image",), []),
        ("wan2.1", ("last_image",), [NO_IMAGE, EXTRA_LAST]),
        ("wan2.1", BOTH, [EXTRA_LAST]),
        ("wan2.1 first and last", (), [NO_IMAGE, NO_LAST]),
        ("wan2.1 first and last", ("image",), [NO_LAST]),
        ("wan2.1 first and last", ("last_image",), [NO_IMAGE]),
        ("wan2.1 first and last", BOTH, []),
        ("wan2.2 a14b", (), [NO_IMAGE]),
        ("wan2.2 a14b", ("image",), []),
        ("wan2.2 a14b", ("last_image",), [NO_IMAGE]),
        ("wan2.2 a14b", BOTH, []),
        ("wan2.2 ti2v", (), []),
        ("wan2.2 ti2v", ("image",), []),
        ("wan2.2 ti2v", ("last_image",), [EXTRA_LAST]),
        ("wan2.2 ti2v", BOTH, [EXTRA_LAST]),
    ],
)
def test_images_that_are_wanted_and_given(kind, images, found):
    assert refused(kind, 17, *images) == found


@pytest.mark.parametrize(
    ("kind", "images", "frames", "found"),
    [
        ("wan2.1", ("image",), 1, []),
        ("wan2.2 ti2v", ("image",), 1, []),
        ("wan2.2 a14b", BOTH, 5, []),
        ("wan2.2 a14b", BOTH, 1, [("video.num_frames", 1)]),
        ("wan2.1 first and last", BOTH, 1, [("video.num_frames", 1)]),
        ("wan2.2 a14b", ("image",), 6, [("video.num_frames", 6)]),
        ("text", (), 6, []),  # said by the rules of the video
    ],
)
def test_numbers_of_frames(kind, images, frames, found):
    assert refused(kind, frames, *images) == found


def test_refusals_name_the_legal_numbers_of_frames():
    config = Config(image="it.png")
    config.video.num_frames = 18
    (refusal,) = image_refusals(config, checkpoint_of("wan2.2 a14b"))
    assert "4 n + 1" in refusal.why and refusal.remedy.endswith("17 or 21")


SIZE = (64, 48)  # 8 x 6 latents


@pytest.fixture(scope="module")
def diffusers_conditions():
    """`(num_frames, last) -> [1, 20, T, H, W]`: what diffusers puts beside the noise, of a random VAE."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None)
    image = torch.rand(1, 3, *SIZE) * 2 - 1

    @torch.no_grad()
    def condition(num_frames: int, last: bool) -> torch.Tensor:
        images = {"image": image, "last_image": -image if last else None}
        size = {"height": SIZE[0], "width": SIZE[1], "num_frames": num_frames}
        return pipe.prepare_latents(**images, batch_size=1, **size, dtype=torch.float32, device="cpu")[1]

    return condition


@pytest.mark.parametrize(("frames", "last"), [(1, False), (5, False), (9, False), (5, True), (9, True)])
def test_the_mask_is_that_of_diffusers(diffusers_conditions, frames, last):
    theirs = diffusers_conditions(frames, last)
    mask = frame_mask((1, 16, *theirs.shape[2:]), 4, last=last)
    assert mask.dtype == torch.float32 and torch.equal(mask, theirs[:, :4])


def test_the_mask_marks_whole_frames_of_pixels():
    """First frame: all four channels; last frame: the last channel alone. Of 5 frames, in two latent frames."""
    mask = frame_mask((1, 16, 2, 3, 2), 4, last=True)
    assert mask.shape == (1, 4, 2, 3, 2)
    marked = mask[0, :, :, 0, 0]
    assert marked.tolist() == [[1, 0], [1, 0], [1, 0], [1, 1]]
    assert torch.equal(mask, marked[None, :, :, None, None].expand_as(mask))
    assert frame_mask((1, 48, 3, 1, 1), 2, last=False).flatten().tolist() == [1, 0, 0, 1, 0, 0]


LATENTS, TIMESTEP = torch.randn(1, 16, 3, 4, 6), torch.tensor([999])


def test_without_images_the_model_sees_the_loops_own_tensors():
    condition = Condition()
    assert condition.model_input(LATENTS) is LATENTS
    assert condition.timesteps(TIMESTEP) is TIMESTEP
    assert condition.finish(LATENTS) is LATENTS
    assert condition.image_tokens is None


def test_image_channels_follow_the_noise():
    condition = ImageChannels(channels=torch.randn(1, 20, 3, 4, 6))
    assert torch.equal(condition.model_input(LATENTS), torch.cat([LATENTS, condition.channels], dim=1))
    assert condition.timesteps(TIMESTEP) is TIMESTEP
    assert condition.finish(LATENTS) is LATENTS


@pytest.mark.parametrize("frames", [1, 3])
def test_a_first_frame_replaces_that_of_the_latents_before_the_model_and_at_the_end(frames):
    latents = LATENTS[:, :, :frames]
    before = latents.clone()
    condition = FirstFrame(frame=torch.randn(1, 16, 1, 4, 6))
    keep = torch.ones(1, 1, frames, 4, 6)  # as diffusers writes it
    keep[:, :, 0] = 0
    expected = (1 - keep) * condition.frame + keep * latents
    assert torch.equal(condition.model_input(latents), expected)
    assert torch.equal(condition.finish(latents), expected)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("timestep", [torch.tensor([999]), torch.tensor([857.25]), torch.tensor([999.5, 3.0])])
def test_a_first_frame_is_at_timestep_0_and_the_others_at_the_loops(timestep):
    timesteps = FirstFrame(frame=torch.zeros(1, 16, 1, 4, 6)).timesteps(timestep)
    assert timesteps.dtype == timestep.dtype
    assert timesteps.tolist() == [[0, value] for value in timestep.tolist()]
