"""The latents that the denoiser is trained on: those of the latest clips, encoded a few at a time and used many times.

Clip n of a ring is drawn from the seed and n alone, so that its caption is never stored.
Shapes: N clips, C channels, t latent frames, h x w latent pixels.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from wan_dist.shapes.architecture import LATENT_CHANNELS
from wan_dist.shapes.clips import Clip, draw_clip, render
from wan_dist.shapes.precision import fast_numbers

FRAMES = 17  # of every clip; the VAE is causal, so the latents of fewer frames are the first of these
_LATENT_FRAMES, _PIXELS = 5, 8  # of 17 frames; pixels a latent pixel, in height and in width
_GROUP = 16  # clips that are encoded at once, to fill a ring


class LatentRing:
    """Posterior means and standard deviations, fp16 `[N, C, t, h, w]`, of the latest N clips of one size."""

    def __init__(self, vae: AutoencoderKLWan, seed: int, height: int, width: int, capacity: int) -> None:
        """height, width: of the clips, in pixels. capacity: N."""
        self.vae, self.seed, self.size, self.capacity = vae, seed, (height, width), capacity
        self.made = 0  # clips, since the beginning
        shape = (capacity, LATENT_CHANNELS, _LATENT_FRAMES, height // _PIXELS, width // _PIXELS)
        self._mean, self._std = (torch.zeros(shape, dtype=torch.float16, device=vae.device) for _ in range(2))

    def fill(self, pause: Callable[[], None]) -> None:
        """Until there are N. pause: called between groups, may raise."""
        while self.made < self.capacity:
            pause()
            self.add(_GROUP)

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Encode `count` new clips in place of the oldest; all of them where there are fewer."""
        numbers = range(self.made, self.made + min(count, self.capacity))
        clips = np.stack([render(self._clip(number), *self.size, FRAMES) for number in numbers])
        with fast_numbers(self.vae.device):
            posterior = self.vae.encode(torch.from_numpy(clips).to(self.vae.device)).latent_dist
        slots = torch.tensor([number % self.capacity for number in numbers], device=self.vae.device)
        self._mean[slots], self._std[slots] = posterior.mean.half(), posterior.std.half()
        self.made += len(numbers)

    def draw(self, count: int, rng: random.Random) -> tuple[list[Clip], torch.Tensor, torch.Tensor]:
        """Clips, and the mean and standard deviation of their posteriors, fp32 `[count, C, t, h, w]`."""
        slots = [rng.randrange(self.capacity) for _ in range(count)]
        latest = [slot + self.capacity * ((self.made - 1 - slot) // self.capacity) for slot in slots]
        chosen = torch.tensor(slots, device=self._mean.device)
        return [self._clip(number) for number in latest], self._mean[chosen].float(), self._std[chosen].float()

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of samples from all posteriors."""
        mean, std = self._mean.float(), self._std.float()
        over = (0, 2, 3, 4)
        total = (mean.var(over) + std.square().mean(over)).sqrt()
        return [round(x, 5) for x in mean.mean(over).tolist()], [round(x, 5) for x in total.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"made": self.made, "mean": self._mean, "std": self._std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`."""
        self.made = state["made"]
        self._mean.copy_(state["mean"])
        self._std.copy_(state["std"])

    def _clip(self, number: int) -> Clip:
        height, width = self.size
        return draw_clip(random.Random(f"clip {self.seed} {height}x{width} {number}"), height, width, FRAMES)
