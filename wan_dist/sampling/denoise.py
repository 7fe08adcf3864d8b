"""The denoising loop, and the guided prediction inside it.

Shape legend: B batch, C channels, T latent frames, H latent rows, W latent columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from wan_dist.distributed.collectives import all_gather
from wan_dist.distributed.mesh import Axis
from wan_dist.sampling.schedule import Step

# (latents_BCTHW, timestep_B, step, branches) -> velocity_BCTHW of each branch; 0 is conditional, 1 is negative.
Predict = Callable[[torch.Tensor, torch.Tensor, Step, Sequence[int]], list[torch.Tensor]]


def initial_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standard normal noise, fp32, on the CPU: the same on every mesh and device, and diffusers' own for
    `generator=torch.Generator("cpu").manual_seed(seed)`."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def guided_prediction(
    predict: Predict, latents: torch.Tensor, timestep: torch.Tensor, step: Step, axis: Axis
) -> torch.Tensor:
    """Classifier-free guidance, `negative + scale * (conditional - negative)` in fp32, over the cfg axis.

    On an axis of 2 each half computes one branch and both combine the two, in the order of the serial formula: the
    result is the same bits. An unguided step is the conditional branch on both halves, so that no half ever waits.
    """
    if not step.guided:
        return predict(latents, timestep, step, [0])[0].float()
    if axis.size == 1:
        parts = predict(latents, timestep, step, [0, 1])
    else:
        (mine,) = predict(latents, timestep, step, [axis.rank])
        parts = all_gather(axis, mine)
    conditional, negative = (part.float() for part in parts)
    return negative + step.guidance * (conditional - negative)


def denoise(
    latents: torch.Tensor,
    schedule: Sequence[Step],
    scheduler: Any,
    predict: Predict,
    cfg_axis: Axis,
    on_step: Callable[[Step, torch.Tensor], None],
) -> torch.Tensor:
    """Denoise `latents` (fp32, `[B, C, T, H, W]`) along `schedule`, all of it or its rest; `on_step` is called after
    each step, with the latents that it made, which nobody writes into.

    scheduler: a diffusers scheduler whose timesteps are those of the schedule.
    """
    for step in schedule:
        t = scheduler.timesteps[step.index]
        velocity = guided_prediction(predict, latents, t.expand(latents.shape[0]), step, cfg_axis)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        on_step(step, latents)
    return latents
