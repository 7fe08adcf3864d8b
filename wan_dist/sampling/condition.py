"""What a transformer is shown besides the noise: nothing, or images, in one of the two ways Wan has.

Shape legend: B batch, z latent channels, T latent frames, H latent rows, W latent columns.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A text-to-video model's: nothing is added, and all tokens are at the loop's timestep.

    image_tokens: `[n, tokens, width]` of an image encoder, for models that attend to them.
    """

    image_tokens: torch.Tensor | None = None

    def model_input(self, latents_BzTHW: torch.Tensor) -> torch.Tensor:
        """The model's input for the loop's latents."""
        return latents_BzTHW

    def timesteps(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """The model's timesteps for the loop's."""
        return timestep_B

    def finish(self, latents_BzTHW: torch.Tensor) -> torch.Tensor:
        """The video's latents for those that the loop ends with."""
        return latents_BzTHW


@dataclass(frozen=True, kw_only=True)
class ImageChannels(Condition):
    """The images' latents and a mask of the frames they are given for, as more channels of the input (Wan2.1 and Wan2.2
    A14B image-to-video). channels: `[1, stride_t + z, T, H, W]`, fp32."""

    channels: torch.Tensor

    def model_input(self, latents_BzTHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents_BzTHW, self.channels], dim=1)


@dataclass(frozen=True, kw_only=True)
class FirstFrame(Condition):
    """The image's latents in place of the first latent frame, whose tokens are at timestep 0 (Wan2.2 TI2V).

    frame: `[1, z, 1, H, W]`, fp32. The model takes two timesteps, `[B, 2]`: the first frame's, and all others'.
    """

    frame: torch.Tensor

    def model_input(self, latents_BzTHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.frame, latents_BzTHW[:, :, 1:]], dim=2)

    def timesteps(self, timestep_B: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(timestep_B), timestep_B], dim=1)

    def finish(self, latents_BzTHW: torch.Tensor) -> torch.Tensor:
        return self.model_input(latents_BzTHW)


def frame_mask(shape: tuple[int, ...], stride_t: int, *, last: bool) -> torch.Tensor:
    """`[1, stride_t, T, H, W]`, fp32: 1 where a frame of pixels is given, 0 where it is to be made.

    shape: of the latents. Channel c of latent frame t > 0 stands for the c-th of its `stride_t` frames of pixels; the
    first latent frame is one frame of pixels, in all channels. last: the last frame is given besides the first.
    """
    frames, rows, columns = shape[2:]
    mask = torch.zeros(1, stride_t, frames, rows, columns)
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask
