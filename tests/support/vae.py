"""Small random VAEs of both kinds, clips for them, and diffusers' own answers: what a parallel VAE must equal."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from wan_dist.models.random_weights import randomise

COLUMNS = 2  # of latents


def _config(z_dim: int, **entries: Any) -> dict[str, Any]:
    statistics = {"latents_mean": [0.1] * z_dim, "latents_std": [1.2] * z_dim}
    # A decoder of 4 channels would divide by such small norms that the serial answer is 2e-5 from that in fp64.
    sizes = {"z_dim": z_dim, "base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    return {**sizes, **statistics, **entries}


_RESIDUAL = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
CONFIGS = {
    "wan2.1": _config(4),
    "wan2.2": _config(4, **_RESIDUAL),
    "wan2.1 of 5 channels": _config(5),
    "wan2.2 of 3 channels": _config(3, **_RESIDUAL),
}
KINDS = ("wan2.1", "wan2.2")


@dataclass(frozen=True)
class Clip:
    """A request by its sizes: rows of latents, frames of pixels. content: `noise`, `constant` or `ramp` over rows."""

    kind: str
    rows: int
    frames: int = 5
    batch: int = 1
    content: str = "noise"


def stride_of(kind: str) -> int:
    return CONFIGS[kind].get("scale_factor_spatial", 8)


def random_vae(kind: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    model = AutoencoderKLWan(**CONFIGS[kind]).eval().requires_grad_(False)
    randomise(model, seed=0)
    return model if dtype == torch.float32 else model.to(dtype)


def latents(clip: Clip) -> torch.Tensor:
    shape = (clip.batch, CONFIGS[clip.kind]["z_dim"], (clip.frames + 3) // 4, clip.rows, COLUMNS)
    if clip.content == "noise":
        return _noise(shape, clip)
    over_rows = torch.linspace(-1, 1, clip.rows) if clip.content == "ramp" else torch.full((clip.rows,), 0.7)
    return over_rows[:, None].expand(shape).contiguous()


def video(clip: Clip) -> torch.Tensor:
    stride = stride_of(clip.kind)
    return _noise((clip.batch, 3, clip.frames, clip.rows * stride, COLUMNS * stride), clip).clamp(-1, 1)


def _noise(shape: tuple[int, ...], clip: Clip) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(clip.rows + clip.frames))


_serial = functools.cache(random_vae)


@functools.cache
@torch.no_grad()
def decoded(clip: Clip, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _serial(clip.kind, dtype).decode(latents(clip).to(dtype)).sample


@functools.cache
@torch.no_grad()
def encoded(clip: Clip, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _serial(clip.kind, dtype).encode(video(clip).to(dtype)).latent_dist.mode()


def laid_out(x_BCTHW: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another order in memory: `plain`, `channels last`, or a `permuted` view that is neither."""
    if layout == "channels last":
        return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    if layout == "permuted":
        return x_BCTHW.permute(4, 1, 0, 3, 2).contiguous().permute(2, 1, 4, 3, 0)
    return x_BCTHW.contiguous()
