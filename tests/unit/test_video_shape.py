"""Pixels, latents and tokens: the published sequence lengths, and sizes that do not fit refused with the nearest."""

import pytest

from wan_dist.config.schema import VideoConfig
from wan_dist.planning.refusals import video_refusals
from wan_dist.planning.video_shape import ModelShape, nearest_multiples

WAN = ModelShape.from_configs({}, {})
WAN_5B = ModelShape.from_configs(
    {"patch_size": [1, 2, 2], "in_channels": 48, "num_attention_heads": 24}, {"scale_factor_spatial": 16, "z_dim": 48}
)


def refused(height: int, width: int, frames: int, shape: ModelShape = WAN) -> dict[str, str]:
    found = video_refusals(VideoConfig(height=height, width=width, num_frames=frames), shape)
    return {refusal.key: str(refusal) for refusal in found}


@pytest.mark.parametrize(
    ("height", "width", "frames", "tokens", "shape"),
    [
        (480, 832, 81, 32760, WAN),
        (720, 1280, 81, 75600, WAN),
        (480, 848, 81, 33390, WAN),
        (704, 1280, 121, 27280, WAN_5B),
    ],
)
def test_published_sequence_lengths(height, width, frames, tokens, shape):
    assert shape.tokens(frames, height, width) == tokens
    assert refused(height, width, frames, shape) == {}


def test_latent_shapes():
    assert WAN.latent_shape(81, 480, 832) == (1, 16, 21, 60, 104)
    assert WAN_5B.latent_shape(121, 704, 1280) == (1, 48, 31, 44, 80)
    assert WAN.latent_shape(1, 16, 16) == (1, 16, 1, 2, 2)


def test_what_a_config_lacks_is_the_default_of_diffusers():
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    def defaults(cls: type) -> dict:
        import inspect

        return {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}

    assert ModelShape.from_configs(defaults(WanTransformer3DModel), defaults(AutoencoderKLWan)) == WAN


@pytest.mark.parametrize(
    ("value", "multiple", "offset", "nearest"),
    [
        (65, 16, 0, [64, 80]),
        (80, 4, 1, [77, 81]),
        (8, 16, 0, [16]),
        (3, 4, 1, [1, 5]),
        (2, 4, 1, [1, 5]),
        (479, 16, 0, [464, 480]),
    ],
)
def test_nearest_multiples(value, multiple, offset, nearest):
    assert nearest_multiples(value, multiple, offset) == nearest


def test_every_size_that_does_not_fit_is_refused_with_the_nearest_two():
    found = refused(481, 840, 80)
    assert set(found) == {"video.height", "video.width", "video.num_frames"}
    assert found["video.height"].startswith("video.height=481: not a multiple of 16")
    assert "480 or 496" in found["video.height"]
    assert "832 or 848" in found["video.width"]
    assert "77 or 81" in found["video.num_frames"]


def test_the_5b_needs_multiples_of_32():
    assert set(refused(720, 1280, 121, WAN_5B)) == {"video.height"}
    assert "704 or 736" in refused(720, 1280, 121, WAN_5B)["video.height"]


def test_a_size_below_the_smallest_names_only_the_smallest():
    assert "are 16" in refused(8, 16, 1)["video.height"]


def test_a_size_is_never_rounded():
    video = VideoConfig(height=481, width=840, num_frames=80)
    video_refusals(video, WAN)
    assert video == VideoConfig(height=481, width=840, num_frames=80)


def test_the_rotary_table_is_the_limit():
    most = (1024 * 16, 1024 * 16, 1023 * 4 + 1)
    assert refused(*most) == {}
    found = refused(most[0] + 16, most[1] + 16, most[2] + 4)
    assert [message.split("use ")[1] for message in found.values()] == [f"{size} at most" for size in most]
