"""Which images a checkpoint takes, read from its configs, and whether a request gives them."""

from dataclasses import dataclass
from typing import Any

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.refusal import Refusal
from wan_dist.planning.video_shape import nearest_multiples

_ENCODED_FRAMES = 4  # pixel frames that diffusers' `AutoencoderKLWan` encodes at a time, after the first
NO, MAY, MUST = "no", "may", "must"


@dataclass(frozen=True)
class ImageInput:
    """Whether a first and a last image are taken: NO, MAY or MUST. encoder: whether the transformer attends to what an
    image encoder says of them."""

    first: str
    last: str
    encoder: bool = False


def image_input(transformer: dict[str, Any], vae: dict[str, Any], *, expand_timesteps: bool) -> ImageInput:
    """Raises ValueError where the input channels fit none of Wan's ways.

    Text-to-video takes the z latent channels; so does Wan2.2 TI2V, whose first latent frame may be an image. Others
    take noise, a mask of `stride_t` channels and the images' latents: `2 z + stride_t` channels; of these, Wan2.1 also
    attends to an image encoder's tokens, either of one image or (`pos_embed_seq_len`) of two.
    """
    z, stride_t = vae.get("z_dim", 16), vae.get("scale_factor_temporal", 4)
    channels, encoder = transformer.get("in_channels", 16), transformer.get("image_dim") is not None
    if channels == z and not encoder:
        return ImageInput(MAY if expand_timesteps else NO, NO)
    if channels != 2 * z + stride_t or expand_timesteps:
        attends = " and attends to an image encoder" if encoder else ""
        expanded = ", with expand_timesteps" if expand_timesteps else ""
        raise ValueError(
            f"its transformer takes {channels} channels{attends}{expanded}: neither text-to-video ({z} channels) nor "
            f"image-to-video ({z} of noise, {stride_t} of mask, {z} of images)"
        )
    if not encoder:
        return ImageInput(MUST, MAY)
    return ImageInput(MUST, NO if transformer.get("pos_embed_seq_len") is None else MUST, encoder=True)


def image_refusals(config: Config, checkpoint: Checkpoint) -> list[Refusal]:
    """Images that the model wants and that are not given, or the reverse; numbers of frames that cannot hold them.
    config: resolved. The checkpoint is one that can be run."""
    takes = image_input(
        checkpoint.transformer_config, checkpoint.configs["vae"], expand_timesteps=checkpoint.expand_timesteps
    )
    found = []
    if takes.first == MUST and config.image is None:
        found.append(Refusal("image", None, "this model makes a video of an image", "give one: image=FILE"))
    if takes.first == NO and config.image is not None:
        why = "this model makes a video of text alone"
        found.append(Refusal("image", config.image, why, "leave it out, or use an image-to-video model"))
    if takes.last == MUST and config.last_image is None:
        why = "this model makes a video between two images"
        found.append(Refusal("last_image", None, why, "give the last one: last_image=FILE"))
    if config.last_image is not None and takes.last == NO:
        why = "this model takes no last image"
        found.append(Refusal("last_image", config.last_image, why, "leave it out, or use a first-and-last-frame model"))
    elif config.last_image is not None and config.image is None and takes.first != MUST:
        found.append(Refusal("last_image", config.last_image, "it needs a first one too", "give image=FILE"))
    frames = config.video.num_frames or 1
    if takes.first == MUST and frames % _ENCODED_FRAMES != 1:
        legal = " or ".join(map(str, nearest_multiples(frames, _ENCODED_FRAMES, 1)))
        why = f"the VAE's encoder takes {_ENCODED_FRAMES} n + 1"
        found.append(Refusal("video.num_frames", frames, why, f"the nearest that fit are {legal}"))
    elif config.last_image is not None and takes.last != NO and frames < 2:
        why = "a first and a last image are two frames"
        found.append(Refusal("video.num_frames", frames, why, f"use {1 + _ENCODED_FRAMES} or more"))
    return found
