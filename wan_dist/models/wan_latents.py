"""Between a transformer's latents and a VAE's: normalisation, and frames of 8-bit pixels as they are decoded."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from wan_dist.layers.halo import rows_to_first
from wan_dist.models.wan_vae import ParallelVae


def _statistics(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`latents_mean` and the reciprocal of `latents_std`, `[1, z, 1, 1, 1]`, on the device and in the dtype of `like`.

    The reciprocal, because the reference multiplies and divides by it: the same operations keep the last bit the same.
    """
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / std


def normalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """From what a VAE's encoder gives to what a transformer takes."""
    mean, per_std = _statistics(vae, latents)
    return (latents - mean) * per_std


def denormalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """From what the denoising loop leaves to what a VAE's decoder takes, on its device and in its dtype."""
    weight = next(vae.parameters())
    latents = latents.to(weight.device, weight.dtype)
    mean, per_std = _statistics(vae, latents)
    return latents / per_std + mean


def decode_frames(vae: ParallelVae, latents: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """Latents `[1, z, T, H, W]` as the denoising loop leaves them, the same on every rank -> frames, uint8
    `[t, H', W', 3]` on the CPU of the first rank, a latent frame at a time; None on the others, and nothing on those
    that have no rows.

    Mapped from [-1, 1] by diffusers' video processor and rounded to the nearest of 256 levels where they are decoded: a
    quarter of the bytes travel, and no rank ever holds more of the video than one latent frame's.
    """
    processor = VideoProcessor(vae_scale_factor=vae.model.config.scale_factor_spatial)
    for rows in vae.decode(denormalised(vae.model, latents)):
        frames = processor.postprocess_video(rows, output_type="pt")[0]  # [t, 3, h', W'] in [0, 1]
        levels = (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        whole = rows_to_first(levels, vae.split, dim=1)
        yield None if whole is None else whole.cpu()
