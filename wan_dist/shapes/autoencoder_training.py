"""The first stage of training `wan_shapes`: its VAE, on small crops around the object and then on whole clips.

What step k draws depends on the seed and k alone, so there is no random state to keep.
Shapes: B clips, C latent channels, T frames, H x W pixels.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from wan_dist.shapes.architecture import build_autoencoder
from wan_dist.shapes.clips import Clip, centre, coverage, draw_clip, paint, recoloured
from wan_dist.shapes.optimizer import Rates, Trained, cosine, warm_up
from wan_dist.shapes.precision import fast_numbers

_CROP, _CLIP = 32, 64  # pixels, height and width
_SHORT, _LONG = 9, 17  # frames; every fourth batch of whole clips is of long ones, and half as large
_OFF_CENTRE = 15.0  # pixels: how far a crop's centre is from the object's, at most
_ANY_COLOUR = 0.2  # the share of clips in colours that no word names
_NEAR_OBJECT = 4.0  # the weight of pixels within 2 of the object; others have 1
_KL = 5e-4
_RATES = Rates(muon=1e-2, adamw=1e-2, muon_decay=1e-2, adamw_decay=1e-3, mean_decay=0.995, mean_delay=9)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Steps on crops and then on whole clips, and how many of them are in a batch."""

    crop_steps: int = 3400
    clip_steps: int = 1400
    crops: int = 16
    clips: int = 8

    def scaled(self, fraction: float, batch: float) -> "AutoencoderRecipe":
        """A part of the steps and of the batch, one at least."""
        steps = {name: max(1, round(getattr(self, name) * fraction)) for name in ("crop_steps", "clip_steps")}
        return replace(self, **steps, **{n: max(1, round(getattr(self, n) * batch)) for n in ("crops", "clips")})


class AutoencoderTraining:
    """The VAE between two steps."""

    name = "autoencoder"

    def __init__(self, recipe: AutoencoderRecipe, seed: int, device: torch.device) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.steps = recipe.crop_steps + recipe.clip_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = laid_out(build_autoencoder(), device)
        # Muon pays where a kernel is large: not for the first and last layers.
        self.trained = Trained(model, _RATES, lambda _name, weight: weight.ndim >= 4 and weight.numel() > 2000)

    def train_step(self) -> float:
        """Take the next step; returns its loss."""
        step, model = self.trained.steps_done, self.trained.module
        assert isinstance(model, AutoencoderKLWan)
        frames, weight = (part.to(self.device) for part in self._batch(step))
        noise = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + step)
        with fast_numbers(self.device):
            latents = model.encode(frames).latent_dist
            spread = torch.randn(latents.mean.shape, generator=noise).to(self.device)
            decoded = decode_unclamped(model, latents.mean.float() + latents.std.float() * spread)
        error = decoded.float() - frames
        fidelity = (weight * (error.abs() + 2 * error.square())).mean()
        mean, log_variance = latents.mean.float(), latents.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return self.trained.step(fidelity + _KL * divergence, self._share(step))

    def _share(self, step: int) -> float:
        """Of the highest rates: down over the crops, and again over the clips, from a lower one."""
        crops = self.recipe.crop_steps
        if step < crops:
            return warm_up(step, crops) * cosine(step / crops, last=0.15)
        return 0.35 * cosine((step - crops) / self.recipe.clip_steps, last=0.03)

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `[B, 3, T, H, W]` in -1..1 and weights of pixels `[B, 1, T, H, W]`."""
        rng, recipe = random.Random(f"autoencoder {self.seed} {step}"), self.recipe
        if step < recipe.crop_steps:
            count, size, frames = recipe.crops, _CROP, _SHORT
        elif step % 4:
            count, size, frames = recipe.clips, _CLIP, _SHORT
        else:
            count, size, frames = max(1, recipe.clips // 2), _CLIP, _LONG
        drawn = [_drawn(rng, size, frames) for _ in range(count)]
        covered = torch.from_numpy(np.stack([covered for _, covered in drawn]))
        pixels = torch.from_numpy(np.stack([paint(clip, covered) for clip, covered in drawn]))
        return pixels, 1 + (_NEAR_OBJECT - 1) * near_object(covered)

    def evaluate(self, count: int, pause: Callable[[], None]) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB of `count` held-out clips of 17 frames, over all pixels and over those near
        the object, by the mean weights. pause: called between clips, may raise."""
        model = self.trained.mean
        assert isinstance(model, AutoencoderKLWan)
        errors: list[tuple[float, float]] = []
        for number in range(count):
            pause()
            clip, covered = _drawn(random.Random(f"held out {number}"), _CLIP, _LONG, colours=False)
            frames = torch.from_numpy(paint(clip, covered))[None].to(self.device)
            with torch.no_grad(), fast_numbers(self.device):
                decoded = model.decode(model.encode(frames).latent_dist.mode().float()).sample.float()
            squared = (decoded - frames).square().mean(1, keepdim=True).cpu()
            errors.append(
                (squared.mean().item(), squared[near_object(torch.from_numpy(covered)[None]) > 0].mean().item())
            )
        everywhere, near = (sum(part) / count for part in zip(*errors, strict=True))
        return {"psnr": _decibel(everywhere), "psnr_object": _decibel(near)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`."""
        self.trained.load_state_dict(state)


def laid_out(model: AutoencoderKLWan, device: torch.device) -> AutoencoderKLWan:
    """On the device; on a CPU with the kernels channels last, in which its convolutions are fastest."""
    if device.type == "cpu":
        for weight in model.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model.to(device)


def decode_unclamped(model: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, T, h, w]` -> `[B, 3, T, H, W]`, as the VAE decodes but for the last step, which limits pixels to -1..1:
    one that is beyond would have no gradient."""
    chunks: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _module, _inputs, output: chunks.append(output))
    try:
        model.decode(latents)
    finally:
        hook.remove()
    return torch.cat(chunks, dim=2)


def near_object(covered: torch.Tensor) -> torch.Tensor:
    """1 within two pixels of the object, else 0: `[B, T, H, W]` -> `[B, 1, T, H, W]`."""
    return F.max_pool2d((covered > 0).float(), kernel_size=5, stride=1, padding=2)[:, None]


def _drawn(rng: random.Random, size: int, frames: int, colours: bool = True) -> tuple[Clip, np.ndarray]:
    """A clip, and what of each pixel its object covers; a small size is a crop around it. colours: any, at times."""
    clip = draw_clip(rng, _CLIP, _CLIP, frames)
    if colours and rng.random() < _ANY_COLOUR:
        clip = recoloured(clip, rng)
    if size == _CLIP:
        return clip, coverage(clip, size, size, frames)
    x, y = centre(clip, rng.randrange(frames))
    left, top = (at - size / 2 + rng.uniform(-_OFF_CENTRE, _OFF_CENTRE) for at in (x, y))
    return clip, coverage(clip, size, size, frames, (left, top))


def _decibel(squared_error: float) -> float:
    """Of signals in -1..1."""
    return -10 * math.log10(max(squared_error, 1e-12) / 4)
