"""The VAE: diffusers' own `AutoencoderKLWan`, from normalised latents to 8-bit frames."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor


def meta_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """The model without memory for its weights. Raises ValueError where its statistics do not fit its latents."""
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(config)
    for name in ("latents_mean", "latents_std"):
        if len(model.config[name]) != model.config.z_dim:
            raise ValueError(f"{name} has {len(model.config[name])} values for {model.config.z_dim} channels")
    return model.eval().requires_grad_(False)


def decode_frames(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[1, z, T, H, W]` as the denoising loop leaves them -> frames uint8 `[T', H', W', 3]` on the CPU.

    De-normalised with the config's mean and standard deviation, decoded in the VAE's dtype, and mapped from [-1, 1]
    by diffusers' video processor; rounded to the nearest of 256 levels.
    """
    weight = next(vae.parameters())
    latents = latents.to(weight.device, weight.dtype)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # The reference divides by the reciprocal; the same operations keep the last bit the same.
    video = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    processor = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)
    frames = processor.postprocess_video(video, output_type="pt")[0]  # [T', 3, H', W'] in [0, 1]
    return (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
